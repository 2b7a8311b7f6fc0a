"""Gene tables of annotations, tables and JSON: which column is the id, and what is no gene."""

import gzip
import json
import string

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stformer_hf import GeneTable, GeneTokenizer
from stformer_hf.genes import gene_files

TP53, ACTB, TARP = "ENSG00000141510", "ENSG00000075624", "ENSG00000289746"

GTF = f"""\
#!genome-build GRCh38.p14
#17\thavana\tgene\t1\t2\t.\t-\t.\tgene_id "ENSG00000000001";
17\tensembl_havana\tgene\t7661779\t7687546\t.\t-\t.\tgene_id "{TP53}"; gene_version "19"; gene_name "TP53"; \
gene_source "ensembl_havana"; gene_biotype "protein_coding";
17\thavana\ttranscript\t7661779\t7687546\t.\t-\t.\tgene_id "{TP53}"; transcript_id "ENST1"; gene_name "other";
17\tgene\texon\t7661779\t7661822\t.\t-\t.\tgene_id "ENSG00000000002"; exon_number "1"; tag "gene";
7\tensembl_havana\tgene\t5526409\t5563902\t.\t-\t.\tgene_id "{ACTB}"; gene_name "ACTB"; gene_biotype "protein_coding";
7\tensembl\tgene\t38253380\t38273648\t.\t-\t.\tgene_id "{TARP}"; gene_version "1"; gene_biotype "lncRNA"; level 2;
"""
ENSEMBL_GFF3 = f"""\
##gff-version 3
17\tGRCh38\tchromosome\t1\t83257441\t.\t.\t.\tID=chromosome:17;Alias=CM000679.2
17\thavana\tgene\t1\t2\t.\t-\t.\tID=gene:{TP53};Name=TP53;biotype=protein_coding;description=a%3Bb;gene_id={TP53};version=19
17\thavana\tmRNA\t1\t2\t.\t-\t.\tID=transcript:ENST00000413465;Parent=gene:{TP53};Name=TP53-201
7\thavana\tncRNA_gene\t1\t2\t.\t-\t.\tID=gene:{TARP};biotype=lncRNA;gene_id={TARP};version=1
7\thavana\tpseudogene\t1\t2\t.\t-\t.\tID=gene:{ACTB};Name=AC%2CTB;biotype=processed_pseudogene
7\thavana\tprocessed_pseudogene\t1\t2\t.\t-\t.\tID=transcript:ENST00000000001;Parent=gene:{ACTB}
"""


def pairs(table: GeneTable) -> list[tuple[str, str]]:
    return list(zip(table.gene_ids, table.symbols, strict=True))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_genes_of_a_gtf(tmp_path, zipped, line_end):
    file = tmp_path / ("genes.gtf.gz" if zipped else "genes.gtf")
    content = GTF.replace("\n", line_end).encode()
    file.write_bytes(gzip.compress(content) if zipped else content)
    table = GeneTable.from_gtf(file)
    assert pairs(table) == [(TP53, "TP53"), (ACTB, "ACTB"), (TARP, TARP)]
    assert table.frame["gene_type"].tolist() == ["protein_coding", "protein_coding", "lncRNA"]
    assert table.frame["chromosome"].tolist() == ["17", "7", "7"]
    assert table.species == "human"


def test_the_genes_of_gff3(tmp_path):
    (tmp_path / "ensembl.gff3").write_text(ENSEMBL_GFF3)
    table = GeneTable.from_gtf(str(tmp_path / "ensembl.gff3"))
    assert pairs(table) == [(TP53, "TP53"), (TARP, TARP), (ACTB, "AC,TB")]
    assert table.frame["gene_type"].tolist() == ["protein_coding", "lncRNA", "processed_pseudogene"]
    ncbi = "NC_000017.11\tBestRefSeq\tgene\t1\t2\t.\t-\t.\tID=gene-TP53;Dbxref=GeneID:7157;Name=TP53;gene_biotype=x\n"
    (tmp_path / "ncbi.gff3").write_text(ncbi)
    assert pairs(GeneTable.from_gtf(tmp_path / "ncbi.gff3")) == [("TP53", "TP53")]


def test_gencode_repeats_the_genes_that_x_and_y_share(tmp_path):
    line = 'chr{}\tHAVANA\tgene\t1\t2\t.\t+\t.\tgene_id "ENSG00000182378.15{}"; gene_type "t"; gene_name "PLCXD1";\n'
    (tmp_path / "g.gtf").write_text(line.format("X", "") + line.format("Y", "_PAR_Y"))
    table = GeneTable.from_gtf(tmp_path / "g.gtf")
    assert pairs(table) == [("ENSG00000182378", "PLCXD1")]
    assert table.frame["chromosome"].tolist() == ["chrX"]


def plain_gtf(text: str) -> list[tuple[str, str]]:
    """Pairs of a GTF, line by line and word by word."""
    found = {}
    for line in text.split("\n"):
        fields = line.split("\t")
        if len(fields) == 9 and fields[2] == "gene":
            words = {word.split(" ")[0]: word.split('"')[1] for word in fields[8].split("; ")}
            gene = words["gene_id"].split(".")[0]
            found[gene, words.get("gene_name", gene)] = None
    return list(found)


gtf_lines = st.tuples(
    st.sampled_from(["gene", "exon", "transcript", "gene", "CDS"]),
    st.integers(0, 30).map(lambda i: f"ENSMUSG{i:011d}.{i}"),
    st.none() | st.text(string.ascii_letters + string.digits + "-.:@()' =/é", min_size=1).map(str.strip),
).map(
    lambda of: (
        f'1\tgene\t{of[0]}\t1\t2\t.\t+\t.\tgene_id "{of[1]}"' + (f'; gene_name "{of[2]}"' if of[2] else "") + '; x "y"'
    )
)


@given(lines=st.lists(gtf_lines, max_size=25), block=st.integers(1, 300), last=st.sampled_from(["", "\n", "\n\n"]))
def test_blocks_of_any_size_give_the_lines_of_genes(tmp_path, lines, block, last):
    text = "\n".join(lines) + last
    (tmp_path / "g.gtf").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gene_files, "_BLOCK", block)
        if plain_gtf(text):
            assert pairs(GeneTable.from_gtf(tmp_path / "g.gtf")) == plain_gtf(text)
        else:
            with pytest.raises(ValueError, match="has no gene features"):
                GeneTable.from_gtf(tmp_path / "g.gtf")


def test_what_is_no_annotation_raises(tmp_path):
    exons = "".join(line + "\n" for line in GTF.split("\n") if line[:1] == "#" or line.split("\t")[2:3] != ["gene"])
    (tmp_path / "exons.gtf").write_text(exons)
    with pytest.raises(ValueError, match=r"no gene features \(but exon, transcript\).*from_table"):
        GeneTable.from_gtf(tmp_path / "exons.gtf")
    (tmp_path / "t.csv").write_text("gene_id,symbol\n")
    with pytest.raises(ValueError, match="it is not GTF or GFF3"):
        GeneTable.from_gtf(tmp_path / "t.csv")
    (tmp_path / "no_ids.gtf").write_text('1\tx\tgene\t1\t2\t.\t+\t.\tgene_name "A";\n')
    with pytest.raises(ValueError, match="has no gene ids"):
        GeneTable.from_gtf(tmp_path / "no_ids.gtf")
    (tmp_path / "cut.gtf.gz").write_bytes(gzip.compress(GTF.encode() * 50)[:-20])
    with pytest.raises(ValueError, match="cut.gtf.gz cannot be read"):
        GeneTable.from_gtf(tmp_path / "cut.gtf.gz")


@pytest.mark.parametrize("read", [GeneTable.from_gtf, GeneTable.from_table, GeneTable.from_json])
def test_no_file(tmp_path, read):
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read(path)


# HGNC's and BioMart's headers, CELLxGENE's and scanpy's columns.
HEADERS = [
    ("ensembl_gene_id", "symbol"),
    ("Gene stable ID version", "Gene name"),
    ("Gene stable ID", "HGNC symbol"),
    ("Ensembl ID(supplied by Ensembl)", "Approved symbol"),
    ("feature_id", "feature_name"),
    ("gene_ids", "gene_symbols"),
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "tsv.gz", "parquet", "frame"])
def test_tables_of_usual_columns(tmp_path, header, kind, caplog):
    frame = pd.DataFrame(
        {
            "Transcript": ["a", "b", "c", "d", "e", "f"],
            header[1]: ["TP53", "TP53", "nan", "", "gone", "NA"],
            header[0]: [f"{TP53}.19", TP53, ACTB, TARP, "", "ENSG00000000001"],
        }
    )
    table = frame
    if kind != "frame":
        table = tmp_path / f"genes.{kind}"
        if kind == "parquet":
            frame.to_parquet(table)
        else:
            frame.to_csv(table, index=False, sep="," if kind == "csv" else "\t", encoding="utf-8-sig")
    table = GeneTable.from_table(table)
    # The gene `nan` is one; R's NA is none.
    assert pairs(table) == [(TP53, "TP53"), (ACTB, "nan"), (TARP, TARP), ("ENSG00000000001", "ENSG00000000001")]
    assert table.frame["Transcript"].tolist() == ["a", "c", "d", "f"]
    assert "1 of 6 genes have no id" in caplog.text


def test_columns_are_chosen_by_what_they_hold():
    ids = [TP53, ACTB]
    frame = pd.DataFrame({"gene_id": ["7157", "60"], "ensembl": ids, "symbol": ids, "Gene name": ["A", TARP]})
    assert pairs(GeneTable.from_table(frame)) == [(TP53, "A"), (ACTB, TARP)]
    assert pairs(GeneTable.from_table(frame, gene_id="gene_id")) == [("7157", "A"), ("60", TARP)]
    assert pairs(GeneTable.from_table(frame, gene_id="symbol", symbol="gene_id")) == [(TP53, "7157"), (ACTB, "60")]
    table = GeneTable.from_table(frame.astype({"gene_id": int}), gene_id="gene_id")
    assert pairs(table) == [("7157", "A"), ("60", TARP)]


@pytest.mark.parametrize("name", [None, "Gene stable ID", "gene"])
def test_the_index_is_a_column(name):
    by_id = pd.DataFrame({"symbol": ["TP53", "ACTB"]}, index=pd.Index([TP53, ACTB], name=name and "Gene stable ID"))
    by_symbol = pd.DataFrame({"gene_ids": [TP53, ACTB]}, index=pd.Index(["TP53", "ACTB"], name=name and "gene"))
    for frame in (by_id, by_symbol):
        assert pairs(GeneTable.from_table(frame)) == [(TP53, "TP53"), (ACTB, "ACTB")]
    picked = by_id.reset_index(names="gene_id").iloc[[1]]  # a numeric index is none
    assert list(GeneTable.from_table(picked).frame) == ["gene_id", "symbol"]


def test_tables_without_the_columns_say_which_there_are(tmp_path):
    names = pd.DataFrame({"gene_id": ["TP53"], "symbol": ["TP53"], "other": [TP53]})
    with pytest.raises(ValueError, match=r"no gene ids .*gene_id, symbol, other.*gene_id=….*names like 'TP53'"):
        GeneTable.from_table(names)
    with pytest.raises(ValueError, match=r"no symbols .*columns are ensembl, x; .*symbol=…"):
        GeneTable.from_table(pd.DataFrame({"ensembl": [TP53], "x": ["TP53"]}))
    with pytest.raises(ValueError, match=r"no column 'ids' \(gene_id=…\)\. Its columns are gene_id, symbol, other"):
        GeneTable.from_table(names, gene_id="ids")
    with pytest.raises(ValueError, match="swap gene_id= and symbol="):
        GeneTable.from_table(names, gene_id="symbol", symbol="other")
    with pytest.raises(ValueError, match="has no rows"):
        GeneTable.from_table(names[:0])
    with pytest.raises(ValueError, match="repeated column names"):
        GeneTable.from_table(pd.DataFrame([[TP53, "A", "B"]], columns=["gene_id", "symbol", "symbol"]))
    with pytest.raises(ValueError, match="has no gene ids"):
        GeneTable.from_table(pd.DataFrame({"id": [None], "symbol": ["A"]}), gene_id="id")
    features = tmp_path / "features.tsv"
    features.write_text(f"{TP53}\tTP53\tGene Expression\n{ACTB}\tACTB\tGene Expression\n")
    with pytest.raises(ValueError, match="features.tsv has no .*The first line seems to be a gene"):
        GeneTable.from_table(features)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.tsv"])
def test_damaged_tables_raise(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if name == "t.csv" else b"PAR1 \xff\xfe\x00 not\n1,2,3,4\n\xff")
    with pytest.raises(ValueError, match=f"{name} cannot be read as a table"):
        GeneTable.from_table(tmp_path / name)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", ["symbol to id", "id to symbol", "records"])
def test_json_of_either_direction(tmp_path, form, zipped):
    names = {"TP53": f"{TP53}.19", "ACTB": ACTB, "old name": ACTB}
    content = {
        "symbol to id": names,
        "id to symbol": {f"{TP53}.19": "TP53", ACTB: "ACTB", f"{ACTB}.1": "old name"},
        "records": [{"Gene name": symbol, "n": 1, "Gene stable ID": gene} for symbol, gene in names.items()],
    }[form]
    text = json.dumps(content).encode()
    (tmp_path / "g.json").write_bytes(gzip.compress(text) if zipped else text)
    table = GeneTable.from_json(tmp_path / "g.json")
    assert pairs(table) == [(TP53, "TP53"), (ACTB, "ACTB"), (ACTB, "old name")]


def test_a_symbol_that_stands_twice_in_json_keeps_both_ids(tmp_path):
    (tmp_path / "g.json").write_text(f'{{"A": "{TP53}", "B": null, "A": "{ACTB}", "A": "{TP53}.2"}}')
    assert pairs(GeneTable.from_json(tmp_path / "g.json")) == [(TP53, "A"), (ACTB, "A")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "has no genes"),
        ("[]", "must be {symbol: id}"),
        ("[1, 2]", "must be {symbol: id}"),
        ('"x"', "must be {symbol: id}"),
        (f'{{"A": ["{TP53}"]}}', "must be {symbol: id}"),
        ('{"TP53": "P53", "A": "B"}', "no gene ids, only names like 'TP53' and 'P53'"),
        (f'{{"{TP53}": "{ACTB}"}}', "which are the symbols"),
        ('[{"a": 1}]', "no gene ids .*columns are a;"),
        ('{"A": ', "cannot be read as JSON"),
    ],
)
def test_other_json_raises(tmp_path, text, match):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        GeneTable.from_json(tmp_path / "g.json")


symbols = (
    st.text(string.ascii_letters + string.digits + string.punctuation + " é", max_size=8)
    .map(str.strip)
    .filter(lambda name: name not in ("", "NA"))
)
gene_numbers = st.integers(0, 10**11 - 1)


@given(genes=st.lists(st.tuples(gene_numbers, symbols), min_size=1, max_size=12))
def test_what_is_written_is_read(tmp_path, genes):
    names = list(dict.fromkeys((f"ENSG{number:011d}", symbol) for number, symbol in genes))
    frame = pd.DataFrame(names * 2, columns=["gene_id", "symbol"])
    frame.to_parquet(tmp_path / "g.parquet")
    frame.to_csv(tmp_path / "g.csv", index=False, lineterminator="\n")
    (tmp_path / "g.json").write_text(frame.to_json(orient="records"))
    for table in (tmp_path / "g.parquet", tmp_path / "g.csv", frame):
        assert pairs(GeneTable.from_table(table)) == names
    assert pairs(GeneTable.from_json(tmp_path / "g.json")) == names
    one_symbol = list({gene: (gene, symbol) for gene, symbol in names}.values())
    (tmp_path / "one.json").write_text(json.dumps(dict(one_symbol)))
    assert pairs(GeneTable.from_json(tmp_path / "one.json")) == one_symbol


def test_a_tokenizer_knows_the_symbols_of_a_table(tmp_path):
    (tmp_path / "g.gtf").write_text(GTF)
    tokenizer = GeneTokenizer([TP53, ACTB], symbols=GeneTable.from_gtf(tmp_path / "g.gtf"), bin_edges=[0.5])
    counts = np.array([[1.0, 0.0], [1.0, 2.0]])
    by_id = tokenizer(counts, genes=[ACTB, TP53])
    assert tokenizer(counts, genes=["ACTB", "TP53"])["token_type_ids"] == by_id["token_type_ids"]
    assert len(by_id["input_ids"][1]) == len(by_id["input_ids"][0]) + 1
