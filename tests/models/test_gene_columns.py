"""Which gene a column is: the rule, case by case, and that order and what surrounds a name change nothing."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from stformer_hf import GeneTokenizer
from stformer_hf.models.gene_bert.feature_types import GENES, feature_types
from stformer_hf.models.gene_bert.gene_columns import (
    ColumnNames,
    clean_names,
    guess_species,
    resolve_genes,
    strip_version,
)
from stformer_hf.models.gene_bert.gene_matcher import GeneMatcher

IDS = [f"ENSG{i:011d}" for i in range(1, 5)]
SYMBOLS = ["CD4", "GAPDH", "ACTB", "CD8A"]
NUMBERS = list("0123")
PLACEHOLDERS = ["nan", "NA", "NaN", "None", "<NA>", "-", "", " ", "unknown", None, np.nan, pd.NA]


@pytest.mark.parametrize(
    "column",
    ["gene_ids", "gene_id", "feature_id", "ensembl_id", "ensembl", "ENSEMBL", "ensembl_gene_id", "ensemblid"]
    + ["Accession", "gene_ids-0", "Ensembl_ID", "ensembl_ids", "ensemble_id", "Gene stable ID", "ID"],
)
@pytest.mark.parametrize("index", [SYMBOLS, NUMBERS])
def test_ids_come_from_a_column_of_any_usual_name(column, index):
    found = resolve_genes(index, {column: IDS, "gene_symbol": SYMBOLS})
    assert found.gene_ids.tolist() == IDS
    assert found.symbols.tolist() == SYMBOLS and found.genomes is None


@pytest.mark.parametrize(
    "column", ["gene_name", "feature_name", "gene_symbols", "features", "hgnc_symbol", "Symbol", "gene_short_name"]
)
def test_row_numbers_give_way_to_a_column_of_names(column):
    assert resolve_genes(NUMBERS, {column: SYMBOLS}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(["1", "4", "7", "30000"], {column: SYMBOLS}).gene_ids.tolist() == SYMBOLS  # a selection


@pytest.mark.parametrize("index", [["0", "1", "2"], ["3", "1", "2"], ["5", "17", "30000"]])
def test_row_numbers_alone_are_refused_with_the_columns_there_are(index):
    with pytest.raises(ValueError, match="these are row numbers.*its columns: n_cells, highly_variable"):
        resolve_genes(index, {"n_cells": [1, 2, 3], "highly_variable": [True] * 3})


def test_entrez_ids_are_names():
    entrez = ["105369239", "107985288", "920"]
    assert resolve_genes(entrez).gene_ids.tolist() == entrez
    assert resolve_genes(entrez, {"symbol": SYMBOLS[:3]}).gene_ids.tolist() == entrez


@pytest.mark.parametrize("blank", PLACEHOLDERS)
def test_genes_without_an_id_go_by_their_symbols_each_alone(blank):
    found = resolve_genes(SYMBOLS, {"ensembl_id": [IDS[0], IDS[1], blank, blank]})
    assert found.gene_ids.tolist() == [IDS[0], IDS[1], "ACTB", "CD8A"]
    found = resolve_genes([*IDS[:3], "CD8A"], {"gene_symbol": ["CD4", blank, "ACTB", blank]})
    assert found.symbols.tolist() == ["CD4", IDS[1], "ACTB", "CD8A"]
    assert resolve_genes([blank], {"gene_symbol": [blank]}).gene_ids.tolist() == [""]


def test_what_a_column_is_its_values_say():
    """A column named after ids that holds symbols, or labels, is none of ids."""
    assert resolve_genes(SYMBOLS, {"gene_id": SYMBOLS, "id": ["a"] * 4}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(SYMBOLS, {"feature_name": IDS}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(SYMBOLS, {"gene_ids": IDS, "ensembl": SYMBOLS}).gene_ids.tolist() == IDS
    maize = [f"Zm00001d{i:06d}" for i in range(4)]
    assert resolve_genes(SYMBOLS, {"gene_ids": maize}).gene_ids.tolist() == maize
    flies = [f"FBgn{i:07d}" for i in range(4)]
    assert resolve_genes(SYMBOLS, {"gene_ids": flies}).gene_ids.tolist() == flies


def test_versions_and_both_copies_on_x_and_y_are_one_gene(caplog):
    index = ["ENSG00000000001.5", "ENSG00000000001.5_PAR_Y", "ENSG00000000002_PAR_Y", "AC000001.1", "HLA_PAR_Y"]
    found = resolve_genes(index, {"gene_name": ["A", "A", "B", "AC000001.1", "H"]})
    assert found.gene_ids.tolist() == [IDS[0], IDS[0], IDS[1], "AC000001.1", "HLA_PAR_Y"]
    assert "2 genes of the Y chromosome's" in caplog.text
    assert strip_version("ENSMUSG00000000001.12") == "ENSMUSG00000000001"
    both = resolve_genes(index, copies=True).gene_ids.tolist()
    assert both == [IDS[0], f"{IDS[0]}_PAR_Y", f"{IDS[1]}_PAR_Y", "AC000001.1", "HLA_PAR_Y"]
    assert GeneMatcher(IDS, {}).find(both).tolist() == [0, 0, 1, -1, -1]
    assert GeneMatcher([*IDS, both[1]], {}).find(both).tolist() == [0, 4, 1, -1, -1]


@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38______", "mm10___", "hg19_", "GRCm39_"])
def test_prefixes_of_references_are_taken_off_and_kept(prefix):
    genome = prefix.rstrip("_")
    found = resolve_genes([prefix + name for name in SYMBOLS], {"gene_ids": [prefix + name for name in IDS]})
    assert found.gene_ids.tolist() == IDS and found.symbols.tolist() == SYMBOLS
    assert found.genomes.tolist() == [genome] * 4


def test_one_name_in_two_genomes_stays_two_genes(caplog):
    found = resolve_genes(["hg19_C3", "mm10_C3", "hg19_CD4", "mm10_Cd4"])
    assert found.gene_ids.tolist() == ["hg19_C3", "mm10_C3", "CD4", "Cd4"]
    assert "genes of two genomes, such as 'C3'" in caplog.text


@pytest.mark.parametrize(
    "prefix", ["GRCh38-", "mm10---", "dm6___", "WBcel235_", "TAIR10_", "Rnor_6.0_", "GRCh38_2020_A_"]
)
def test_whatever_stands_before_ids_is_a_reference(prefix):
    """Seurat writes - for _; references have names that no list has."""
    found = resolve_genes([prefix + name for name in SYMBOLS], {"gene_ids": [prefix + name for name in IDS]})
    assert found.gene_ids.tolist() == IDS and found.symbols.tolist() == SYMBOLS
    assert found.genomes.tolist() == [prefix.rstrip("_-")] * 4


def test_what_stands_before_one_id_in_many_is_none():
    """Flex marks genes that its filtered matrices leave out."""
    ids = [f"ENSG{i:011d}" for i in range(50)]
    found = resolve_genes([*ids, f"DEPRECATED_{ids[0]}"])
    assert found.gene_ids.tolist() == [*ids, f"DEPRECATED_{ids[0]}"] and found.genomes is None


def test_a_name_of_two_genomes_and_of_none_keeps_its_own():
    found = resolve_genes(["hg19_C3", "mm10_C3", "C3"])
    assert found.gene_ids.tolist() == ["hg19_C3", "mm10_C3", "C3"]
    assert found.genomes.tolist() == ["hg19", "mm10", ""]


def test_probes_and_old_copies_are_their_gene():
    assert clean_names([f"{IDS[0]}|A1BG|a1b2c3d", "A|B", "ENSGR0000000002.7", f"{IDS[2]}-PAR-Y"]).tolist() == [
        IDS[0],
        "A|B",
        IDS[1],
        IDS[2],
    ]
    assert clean_names([f"GRCh38_{IDS[0]}.4", None, " NA "]).tolist() == [IDS[0], "", ""]


def test_each_gene_takes_the_first_id_there_is():
    """In pig and zebrafish the index is symbols where there are some, else ids."""
    found = resolve_genes([*IDS[:3], "CD8A"], {"gene_ids": IDS})
    assert found.gene_ids.tolist() == IDS and found.symbols.tolist() == [*IDS[:3], "CD8A"]
    found = resolve_genes(["CD4", *IDS[1:]], {"gene_ids": [None] * 4, "gene_name": SYMBOLS})
    assert found.gene_ids.tolist() == ["CD4", *IDS[1:]] and found.symbols.tolist() == SYMBOLS


def test_ids_are_of_one_species():
    mouse = [f"ENSMUSG{i:011d}" for i in range(4)]
    orthologs = {"ensembl_id": [*IDS[:3], None], "gene_ids": mouse}
    assert resolve_genes(["Cd4", "Gapdh", "Actb", "Cd8a"], orthologs).gene_ids.tolist() == mouse
    gaps = {"gene_ids": [*mouse[:3], None], "ensembl": [IDS[0], None, None, IDS[3]]}
    assert resolve_genes(["Cd4", "Gapdh", "Actb", "Cd8a"], gaps).gene_ids.tolist() == [*mouse[:3], "Cd8a"]
    mixed = {"gene_ids": [IDS[0], mouse[1], IDS[2], None], "ensembl": [None, None, None, mouse[3]]}
    assert resolve_genes(SYMBOLS, mixed).gene_ids.tolist() == [IDS[0], mouse[1], IDS[2], mouse[3]]


def test_other_ids_are_read_where_there_are_no_known_ones():
    maize = [f"Zm00001d{i:06d}" for i in range(4)]
    found = resolve_genes(maize, {"gene_symbol": SYMBOLS})
    assert found.gene_ids.tolist() == maize and found.symbols.tolist() == SYMBOLS
    found = resolve_genes(SYMBOLS, {"gene_ids": [*IDS[:3], None], "feature_id": maize})
    assert found.gene_ids.tolist() == [*IDS[:3], "CD8A"]  # not a name of another reference


@pytest.mark.parametrize("index", [["7", "2", "9", "0"], ["0-0", "1-0", "0-1", "1-1"], ["0.0", "1.0", "2.0", "3.0"]])
def test_row_numbers_that_were_moved_or_joined_give_way_too(index):
    assert resolve_genes(index, {"feature_name": SYMBOLS}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(index, {"gene_ids": IDS, "gene_name": SYMBOLS}).symbols.tolist() == SYMBOLS


def test_how_large_row_numbers_are():
    """Selected columns of a large table ascend; Entrez ids soon pass the size of any."""
    with pytest.raises(ValueError, match="row numbers"):
        resolve_genes(["5", "71", "199999"])
    assert resolve_genes(["5", "71", "200000"]).gene_ids.tolist() == ["5", "71", "200000"]
    assert resolve_genes(["3", "1", "1"]).gene_ids.tolist() == ["3", "1", "1"]  # twice: no numbers of rows


@pytest.mark.parametrize("column", [[True, False, True, True], [0.5, 1.0, 2.0, 3.0], ["1", "2", "3", "4"]])
def test_symbols_are_text(column):
    assert resolve_genes(IDS, {"genes": column}).symbols.tolist() == IDS


def test_columns_that_are_no_names_are_refused():
    twice = pd.DataFrame([[name, name] for name in IDS], columns=["gene_ids", "gene_ids"])
    for read in (resolve_genes, ColumnNames):
        with pytest.raises(ValueError, match="is a column name repeated"):
            read(SYMBOLS, twice)
        with pytest.raises(ValueError, match="holds ndarrays"):
            read(SYMBOLS, {"gene_ids": pd.Series([np.array([name]) for name in IDS])})


def test_the_key_of_names_is_of_index_and_columns():
    keys = [ColumnNames(SYMBOLS, {"gene_ids": ids}).key for ids in (IDS, IDS[::-1], IDS)]
    assert keys[0] == keys[2] != keys[1]
    assert ColumnNames(SYMBOLS).key != ColumnNames(SYMBOLS[::-1]).key


@given(st.data())
def test_order_and_what_surrounds_names_change_no_gene(data):
    """Random columns of ids and symbols, permuted, with versions, prefixes and placeholders."""
    n = data.draw(st.integers(3, 12))
    ids = [f"ENSG{i:011d}" for i in range(n)]
    symbols = [f"SYM{i}A" for i in range(n)]
    order = data.draw(st.permutations(range(n)))
    missing = data.draw(st.sets(st.integers(0, n - 1), max_size=(n - 1) // 2))
    prefix = data.draw(st.sampled_from(["", "GRCh38_", "hg38____"]))
    version = data.draw(st.sampled_from(["", ".3", ".12"]))
    blank = data.draw(st.sampled_from(PLACEHOLDERS))
    space = data.draw(st.sampled_from(["", " "]))
    column = data.draw(st.sampled_from(["gene_ids", "Ensembl", "feature_id", "gene_ids-1"]))
    written = [blank if i in missing else space + prefix + ids[i] + version for i in order]
    expected = [symbols[i] if i in missing else ids[i] for i in order]
    names = [prefix + symbols[i] for i in order]
    in_index = data.draw(st.booleans())
    if in_index and not missing:
        found = resolve_genes(written, {"gene_name": names})
    elif data.draw(st.booleans()):
        found = resolve_genes(names, pd.DataFrame({"n_cells": range(n), column: written}))
    else:
        found = resolve_genes([str(i) for i in range(n)], {column: written, "feature_name": names})
    assert found.gene_ids.tolist() == expected
    assert found.symbols.tolist() == [symbols[i] for i in order]


# ---------------------------------------------------------------------- feature types


@pytest.mark.parametrize("name", ["feature_types", "feature_type", "modality", "Feature Type"])
def test_known_feature_types_split_the_columns(name):
    types = ["Gene Expression", "Antibody Capture", "", "CRISPR Guide Capture"]
    assert feature_types({name: types}).tolist() == [GENES, "Antibody Capture", GENES, "CRISPR Guide Capture"]
    assert feature_types({name: ["gex", "ADT", "rna", "HTO"]}).tolist() == [GENES, "ADT", GENES, "HTO"]
    assert feature_types({name: ["Gene Expression"] * 2}) is None


def test_unknown_feature_types_are_genes():
    """The third column of a features.tsv may be a biotype; nothing is dropped but what is known to be no gene."""
    assert feature_types({"feature_type": ["gene", "ncRNA_gene", "pseudogene"]}) is None
    assert feature_types({"feature_type": ["mRNA", "lncRNA"]}) is None
    types = feature_types({"feature_type": ["Gene Expression", "lncRNA", "Unassigned Codeword", "Negative Control X"]})
    assert types.tolist() == [GENES, GENES, "Unassigned Codeword", "Negative Control X"]


def test_biotypes_and_blanks_are_no_feature_types(caplog):
    assert feature_types({"feature_type": ["protein_coding", "lncRNA", ""]}) is None
    assert "unknown feature types, lncRNA, protein_coding: treated as genes" in caplog.text
    assert feature_types({"feature_types": ["", None, np.nan]}) is None
    assert feature_types({"feature_type": ["protein_coding"] * 2, "modality": ["rna", "prot"]}).tolist() == [
        GENES,
        "prot",
    ]
    assert feature_types(None) is None and feature_types({"n_cells": [1]}) is None


# ---------------------------------------------------------------------- genes of a vocabulary


def test_a_symbol_does_not_take_the_place_of_an_id():
    matcher = GeneMatcher(IDS, dict(zip(SYMBOLS, IDS, strict=True)))
    ids = [IDS[1], "ENSG00000099999", "ENSG00000099998", IDS[3]]
    # The second column's symbol is that of a gene whose id another column has; the third's of one that none has.
    assert matcher.find_columns(ids, ["CD4", "GAPDH", "ACTB", "CD8A"]).tolist() == [1, -1, 2, 3]
    moved = matcher.find_columns([IDS[1], IDS[0]], ["CD4", "GAPDH"])
    assert moved.tolist() == [1, 0]


def test_species():
    mouse = [f"ENSMUSG{i:011d}" for i in range(4)]
    assert guess_species(IDS) == "human" and guess_species([*mouse, "Cd4"]) == "mouse"
    assert guess_species(["CD4"]) is None and guess_species([*IDS, *mouse]) is None
    assert guess_species([*IDS, *IDS, mouse[0]]) is None  # eight of nine
    assert guess_species([*IDS, *IDS, *IDS[:1], mouse[0]]) == "human"  # nine of ten
    assert guess_species(["FBgn0000001"]) == "fly" and guess_species(["WBGene00000001"]) == "worm"
    assert guess_species(["AT1G01010"]) == "cress" and guess_species(["YAL001C"]) == "yeast"
    matcher = GeneMatcher(IDS, dict(zip(SYMBOLS, IDS, strict=True)))
    with pytest.raises(ValueError, match="genes of mouse .*the tokenizer's are of human"):
        matcher.find_columns(mouse, SYMBOLS)
    assert matcher.find_columns(mouse, SYMBOLS, match="symbol").tolist() == [0, 1, 2, 3]
    assert matcher.find_columns([*IDS, mouse[0]], [*SYMBOLS, "Cd4"]).tolist() == [0, 1, 2, 3, -1]
    with pytest.raises(ValueError, match="genes of fly"):
        matcher.find_columns([f"FBgn{i:07d}" for i in range(4)], SYMBOLS)
    with pytest.raises(ValueError, match="genes of mouse"):  # over half, with a few that are known
        matcher.find_columns([IDS[0], *mouse * 3], ["CD4", *SYMBOLS * 3])


def test_symbols_in_a_column_of_their_own_are_preferred_to_names_made_unique():
    """But not descriptions, nor what a column of a loose name holds."""
    index, own = ["MALAT1--1", "MT.ND1", "ACTB", "X"], ["MALAT1", "MT-ND1", "", "X"]
    expected = ["MALAT1", "MT-ND1", "ACTB", "X"]
    for name in ("gene_symbol", "feature_name", "Symbol"):
        found = resolve_genes(index, {name: own})
        assert (found.gene_ids.tolist(), found.symbols.tolist()) == (index, expected)
    ids = [f"ENSG{i:011d}" for i in range(4)]
    found = resolve_genes(index, {"gene_symbol": own, "ensembl_id": ids})
    assert (found.gene_ids.tolist(), found.symbols.tolist()) == (ids, expected)
    shared = resolve_genes(["PSMA2", "PSMA2.1", "MT.ND1", "X"], {"gene_symbol": ["PSMA2", "PSMA2", "MT-ND1", ""]})
    assert shared.symbols.tolist() == ["PSMA2", "PSMA2.1", "MT-ND1", "X"]
    for name, values in (("gene_name", ["a long text", "another one", "actin beta", "X"]), ("name", own)):
        assert resolve_genes(index, {name: values}).symbols.tolist() == index


def test_a_gene_is_found_by_its_symbol_under_any_name_in_the_index():
    tokenizer = GeneTokenizer(["ENSG00000251562", "ENSG00000198888"], symbols={"MALAT1": "ENSG00000251562"})
    found = resolve_genes(["g1x", "MT.ND1"], {"gene_symbol": ["MALAT1", "MT-ND1"]})
    assert tokenizer.find_genes(found.gene_ids, found.symbols).tolist() == [0, -1]


def test_an_input_that_differs_by_case_is_told_so():
    genes = [f"ENSG{i:011d}" for i in range(20)]
    tokenizer = GeneTokenizer(genes, symbols={f"MT-RNR{i}": gene for i, gene in enumerate(genes)}, bin_edges=[0.5])
    for names in ([gene.lower() for gene in genes], [f"mt-rnr{i}" for i in range(20)]):
        with pytest.raises(ValueError, match="has 0 of the model's 20 .*If upper and lower case were the same, .* 20"):
            tokenizer(AnnData(np.ones((2, 20), np.float32), var=pd.DataFrame(index=names)))
    with pytest.raises(ValueError, match="has 0 of the model's 20 ") as error:
        tokenizer(AnnData(np.ones((2, 20), np.float32), var=pd.DataFrame(index=[f"G{i}x" for i in range(20)])))
    assert "case" not in str(error.value)
