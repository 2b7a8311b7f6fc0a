"""Text files: unpacked by what they hold, fields as they stand, and errors that name the file."""

import errno
import gzip
import json
import zlib

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stformer_hf.genes.text_files import naming, open_text, read_columns, read_text_table

ERRORS = [
    KeyError("Unable to open object"),
    gzip.BadGzipFile("Not a gzipped file"),
    EOFError("Compressed file ended"),
    zlib.error("Error -3"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting value", "{", 0),
    pa.ArrowInvalid("Could not open Parquet input source a.csv"),
    OSError("Can't read data (inflate() failed)"),
    OSError(errno.EIO, "Input/output error"),
    RuntimeError("error during blosc decompression"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_names_the_file_and_what_to_do(error):
    with pytest.raises(
        ValueError, match=f"^data/a.csv cannot be read as csv: {type(error).__name__}: .*copy or"
    ) as got:
        with naming("data/a.csv", "csv"):
            raise error
    assert type(got.value) is ValueError and got.value.__cause__ is error


def test_messages_of_our_own_are_kept():
    with pytest.raises(ValueError, match=r"^data/a\.csv: no cells$"), naming("data/a.csv"):
        raise ValueError("no cells")
    for error in (ValueError("/data/a.csv has no cells"), FileNotFoundError("There is no file data/a.csv.")):
        with pytest.raises(type(error)) as got, naming("data/a.csv"):
            raise error
        assert got.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        FileNotFoundError(errno.ENOENT, "No such file", "b.csv"),
        ImportError("No module named 'zarr'"),
        MemoryError(),
    ],
)
def test_errors_that_are_not_of_the_file_pass(error):
    with pytest.raises(type(error)) as got, naming("data/a.csv"):
        raise error
    assert got.value is error


fields = st.text("abc019NA-\"' .", max_size=4)


@given(
    lines=st.lists(st.lists(fields, min_size=1, max_size=5), min_size=1, max_size=12),
    n=st.integers(1, 4),
    end=st.sampled_from(["\n", "\r\n"]),
    zipped=st.booleans(),
)
def test_columns_of_ragged_lines_are_what_stands_there(tmp_path, lines, n, end, zipped):
    content = end.join("\t".join(line) for line in lines).encode()
    (tmp_path / "t.tsv").write_bytes(gzip.compress(content) if zipped else content)
    with open_text(tmp_path / "t.tsv") as file:
        assert file.read() == content
    kept = [line for line in lines if "\t".join(line).strip(" ")]  # empty lines are passed over
    width = min(n, max(map(len, lines)))
    expected = [(line + [""] * width)[:width] for line in kept]
    assert read_columns(tmp_path / "t.tsv", n).to_numpy().tolist() == expected


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_separators_are_those_of_the_first_line(tmp_path, separator):
    (tmp_path / "t.csv").write_text(separator.join("ab") + "\n" + separator.join(["x y", "z"]) + "\n")
    assert read_text_table(tmp_path / "t.csv").to_dict("list") == {"a": ["x y"], "b": ["z"]}
    assert read_text_table(tmp_path / "t.csv", header=False).to_numpy().tolist() == [["a", "b"], ["x y", "z"]]
