"""Matrix Market files: read by their own header, line by line, and nothing is guessed."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import io, sparse

from stformer_hf.sources import matrix_market
from stformer_hf.sources.matrix_market import MtxMatrix

HEADER = "%%MatrixMarket matrix coordinate {} general\n% made by hand\n\n3 2 2\n"


def write(path, field: str, lines: str):
    path.write_text(HEADER.format(field) + lines)
    return path


def dense(matrix: MtxMatrix) -> np.ndarray:
    return matrix.rows(0, matrix.shape[0]).toarray()


@pytest.mark.parametrize("field", ["integer", "unsigned-integer", "real", "float", "double"])
def test_every_name_of_numbers_is_read(tmp_path, field):
    kind = np.int64 if "integer" in field else np.float64
    matrix = MtxMatrix(write(tmp_path / "m.mtx", field, "1 1 2\n3 2 7\n"))
    assert matrix.size() == (2, kind)
    np.testing.assert_array_equal(dense(matrix), [[2, 0, 0], [0, 0, 7]])
    np.testing.assert_array_equal(dense(MtxMatrix(tmp_path / "m.mtx", cells_in_rows=True)), [[2, 0], [0, 0], [0, 7]])


def test_fractions_need_a_header_of_fractions_and_patterns_are_ones(tmp_path):
    fractions = MtxMatrix(write(tmp_path / "m.mtx", "float", "1 1 2.5\n3 2 1e-3\n"))
    np.testing.assert_array_equal(dense(fractions), [[2.5, 0, 0], [0, 0, 0.001]])
    with pytest.raises(ValueError, match=r"line 5, '1 1 2\.5', has a fraction, but the header says integer"):
        MtxMatrix(write(tmp_path / "m.mtx", "integer", "1 1 2.5\n3 2 1\n"))
    np.testing.assert_array_equal(
        dense(MtxMatrix(write(tmp_path / "m.mtx", "pattern", "1 1\n3 2\n"))), [[1, 0, 0], [0, 0, 1]]
    )


@pytest.mark.parametrize(
    "lines", ["1 1 2 3\n3 2 7\n", "1 1 2\n3 2 7 1\n", "1 1 2\n3 2 7 1 4\n", "1 1 2\n3\t2  7\t1\n"]
)
@pytest.mark.parametrize("block", [6, 1 << 20])
def test_lines_of_more_numbers_raise(tmp_path, monkeypatch, lines, block):
    """STARsolo's Velocyto wrote spliced, unspliced and ambiguous counts into one line."""
    monkeypatch.setattr(matrix_market, "_BLOCK", block)
    number = 5 if lines.startswith("1 1 2 3") else 6
    with pytest.raises(ValueError, match=rf"m\.mtx: line {number}, .* numbers, but an entry has 3 .*Velocyto.*split"):
        dense(MtxMatrix(write(tmp_path / "m.mtx", "integer", lines)))


@pytest.mark.parametrize(
    ("field", "lines", "match"),
    [
        ("integer", "1 1\n3 2 7\n", "line 5, '1 1', has fewer than 3 numbers"),
        ("pattern", "1 1 2\n3 2 7\n", r"line 5, '1 1 2', has 3 numbers, but an entry has 2 \(row and column\)"),
        ("integer", "1 1 2\n3 two 7\n", "line 6, '3 two 7', has no integers for row and column"),
        ("integer", "1 1 2\n3 2 many\n", "line 6, '3 2 many', has no numeric value"),
        ("integer", "1 1 2\n3 3 7\n", "outside the matrix, such as in column 3 of 2"),
        ("integer", "1 1 2\n0 2 7\n", "outside the matrix, such as in row 0 of 3"),
        ("integer", "1 1 2\n", "is truncated: 1 entries of 2"),
        ("integer", "1 1 2\n2 2 1\n3 2 1\n", "is damaged: 3 entries of 2"),
        ("complex", "1 1 2 0\n3 2 7 0\n", "'%%matrixmarket matrix coordinate complex general' is not supported"),
    ],
)
def test_what_is_damaged_says_where(tmp_path, field, lines, match):
    with pytest.raises(ValueError, match=match) as raised:
        dense(MtxMatrix(write(tmp_path / "m.mtx", field, lines)))
    assert str(tmp_path / "m.mtx") in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n\xff\xfe",
        b"%%MatrixMarket matrix coordinate integer symmetric\n2 2 0\n",
        b"%%MatrixMarket matrix coordinate integer general\n2 2\n",
        gzip.compress(HEADER.format("integer").encode() * 50)[:-30],
        gzip.compress(HEADER.format("integer").encode())[:9] + b"junk" * 20,
    ],
    ids=["empty", "png", "symmetric", "cut header", "cut gzip", "broken gzip"],
)
def test_what_is_no_matrix_names_the_file(tmp_path, content):
    (tmp_path / "m.mtx").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.mtx"):
        dense(MtxMatrix(tmp_path / "m.mtx"))


spaces = st.sampled_from([" ", "  ", "\t", " \t"])


@given(
    entries=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(1, 10**12)), max_size=25),
    block=st.integers(1, 90),
    space=spaces,
    begin=st.sampled_from(["", " "]),
    end=st.sampled_from(["\n", "\r\n", " \n", "\n\n"]),
    last=st.booleans(),
)
def test_blocks_and_spaces_of_any_kind_give_what_scipy_reads(tmp_path, entries, block, space, begin, end, last):
    entries = list({(row, column): (row, column, value) for row, column, value in entries}.values())
    rows, columns, values = (np.array([entry[i] for entry in entries], np.int64) for i in range(3))
    expected = sparse.coo_matrix((values, (rows, columns)), shape=(9, 7))
    io.mmwrite(tmp_path / "m.mtx", expected, field="integer")
    lines = (tmp_path / "m.mtx").read_text().splitlines()
    head, body = lines[: len(lines) - len(entries)], lines[len(lines) - len(entries) :]
    text = "\n".join(head) + "\n" + end.join(begin + line.replace(" ", space) for line in body)
    (tmp_path / "m.mtx").write_bytes((text + (end if last and body else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_market, "_BLOCK", block)
        np.testing.assert_array_equal(dense(MtxMatrix(tmp_path / "m.mtx")), expected.toarray().T)
