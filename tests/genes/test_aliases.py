"""Aliases: read from every usual file as they stand, applied, and what is not applied is told."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stformer_hf import CellStore
from stformer_hf.genes.aliases import read_aliases

NEW = [f"ENSG{i:011d}" for i in (1, 2)]
PAIRS = {"OLD1": NEW[0], "OLD2": NEW[1]}


def ids_of_a_store(tmp_path, names, aliases) -> list[str]:
    cells = AnnData(np.ones((1, len(names)), np.float32), var=pd.DataFrame(index=names))
    return CellStore.build(tmp_path / "store", cells, aliases=aliases, report=False).gene_ids.tolist()


FRAME = pd.DataFrame({"old": list(PAIRS), "new": list(PAIRS.values()), "note": ["x", None]})
FILES = {
    "a.csv": FRAME.to_csv(index=False),
    "a.tsv": FRAME.to_csv(index=False, sep="\t"),
    "a.txt": FRAME.to_csv(index=False, sep="\t"),
    "semicolons.csv": FRAME.to_csv(index=False, sep=";"),
    "row_numbers.csv": FRAME.to_csv(),
    "of_R.csv": FRAME.set_axis([1, 2]).to_csv(),
    "names_in_the_index.csv": FRAME.set_index("old").rename_axis(None).to_csv(),
    "of_a_series.csv": FRAME.set_index("old")["new"].rename_axis(None).rename(0).to_csv(),
    "no_header.csv": FRAME.iloc[:, :2].to_csv(index=False, header=False),
    "windows.csv": "\ufeff" + FRAME.to_csv(index=False, lineterminator="\r\n"),
    "a.json": json.dumps(PAIRS),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_usual_file_gives_its_pairs(tmp_path, name, zipped):
    content = FILES[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    assert read_aliases(tmp_path / name) == PAIRS


@pytest.mark.parametrize(
    "frame", [FRAME, FRAME.set_index("old")[["new"]], FRAME.rename_axis("Unnamed: 0").reset_index()]
)
def test_frames_and_parquet_files_give_their_pairs(tmp_path, frame):
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_aliases(frame) == read_aliases(tmp_path / "a.parquet") == PAIRS


@pytest.mark.parametrize(
    "aliases",
    [
        PAIRS,
        {f"{NEW[0]}.3": "ENSG00000000009.1", "OTHER": "x"},
        {f"GRCh38_{NEW[0]}": "ENSG00000000009", " OTHER": "x"},
        {f"{NEW[0]}.3_PAR_Y": "ENSG00000000009", "OTHER": "x"},
    ],
)
def test_aliases_are_applied(tmp_path, aliases):
    names = ["OLD1", "OLD2"] if aliases is PAIRS else [f"{NEW[0]}.7", "OTHER"]
    expected = NEW if aliases is PAIRS else ["ENSG00000000009", "x"]
    assert ids_of_a_store(tmp_path, names, aliases) == expected


def test_entrez_ids_stay_what_they_are(tmp_path):
    entrez = dict(zip(["105369239", "107985288"], NEW, strict=True))
    (tmp_path / "a.json").write_text(json.dumps(entrez))
    assert read_aliases(tmp_path / "a.json") == entrez
    frame = pd.DataFrame({"entrez": [105369239, np.nan, 107985288], "new": [NEW[0], NEW[1], NEW[1]]})
    assert read_aliases(frame) == entrez  # float64, because one is missing
    assert ids_of_a_store(tmp_path, list(entrez), tmp_path / "a.json") == NEW


def test_a_first_line_that_may_be_a_pair_is_one(tmp_path):
    (tmp_path / "a.csv").write_text(f"-,{NEW[0]}\nB,{NEW[1]}\n")
    assert read_aliases(tmp_path / "a.csv") == {"-": NEW[0], "B": NEW[1]}


def test_row_numbers_that_may_be_names_raise(tmp_path):
    (tmp_path / "a.csv").write_text(f"1,{NEW[0]},x\n2,{NEW[1]},y\n")
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as aliases: its first column may be row numbers"):
        read_aliases(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(f"entrez_id,new_id,note\n1,{NEW[0]},x\n2,{NEW[1]},y\n")
    assert read_aliases(tmp_path / "a.csv") == {"1": NEW[0], "2": NEW[1]}


def test_pairs_without_a_name_or_with_several_are_left_out(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(f"old,new\nA,{NEW[0]}\nB,NA\n,{NEW[0]}\nNA,{NEW[1]}\nC,X\nC,Y\nD.1,D.1\nD,\n")
    assert read_aliases(tmp_path / "a.csv") == {"A": NEW[0], "NA": NEW[1]}
    assert "a.csv: 3 of 8 pairs lack the old or new name" in caplog.text
    assert "1 old names have more than one new name, such as C (X, Y)" in caplog.text
    versions = {f"{NEW[0]}.1": "X", f"{NEW[0]}.2": "Y", f"{NEW[1]}.4": NEW[1]}
    assert read_aliases(versions) == {}


def test_aliases_of_other_names_are_told(tmp_path, caplog):
    names = [f"ENSG{i:011d}" for i in range(50)]
    assert ids_of_a_store(tmp_path / "none", names, {"TP53": NEW[0], "MYC": NEW[1]}) == names
    assert "0 of 2 aliases are genes of the sources. The aliases are for names like 'TP53', 'MYC'" in caplog.text
    assert "ids like 'ENSG00000000000'" in caplog.text
    caplog.clear()
    ids_of_a_store(tmp_path / "few", names, {f"x{i}": "y" for i in range(40)} | {names[3]: "z"})
    assert "1 of 41 aliases are genes of the sources" in caplog.text
    caplog.clear()
    ids_of_a_store(tmp_path / "one", names, {names[3]: "z"})
    ids_of_a_store(tmp_path / "without", names, None)
    assert "aliases" not in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"only one column\nTP53\n", "two columns"),
        ("a.csv", b"a,b\nc,d,e\n", "ParserError"),
        ("a.csv", b"", "EmptyDataError"),
        ("a.csv", b"old,new\n", "has no aliases"),
        ("a.csv", b"old,new\n\xff\xfe,x\n", "UnicodeDecodeError"),
        ("a.csv.gz", gzip.compress(b"old,new\n" * 99, mtime=0)[:-9], "EOFError"),
        ("a.json", b"{", "JSONDecodeError"),
        ("a.json", b'["a", "b"]', r"must be one object \{old: new\}"),
        ("a.json", b'{"a": ["b"]}', r"must be one object \{old: new\}"),
        ("a.parquet", b"PAR1", "Arrow"),
        ("a.xlsx", b"", "aliases must be in one of .json, .csv"),
    ],
)
def test_what_is_no_table_of_aliases_raises(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        read_aliases(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_other_aliases_that_are_no_pairs_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*none.csv"):
        read_aliases(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="one name each"):
        read_aliases({"A": ["B", "C"]})
    with pytest.raises(ValueError, match="two columns"):
        read_aliases(FRAME[["old"]])
