"""MtxMatrix: a Matrix Market file, read according to its header and checked line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from ..genes.text_files import naming, open_text
from .matrices import ScatteredMatrix

# Types of the values by the field in the header: those of the format, and those written by STARsolo (float), Julia
# (double) and fast_matrix_market (unsigned-integer).
_TYPES = {
    "integer": pa.int64(),
    "unsigned-integer": pa.int64(),
    "real": pa.float64(),
    "float": pa.float64(),
    "double": pa.float64(),
    "pattern": None,
}
_BLOCK = 1 << 23  # bytes


class MtxMatrix(ScatteredMatrix):
    """A matrix of coordinates, one entry per line: row, column and value; all that the header says is checked.

    The file is plain or gzipped, regardless of its name. It is cells by genes (`cells_in_rows`), as written by
    kallisto and alevin, or genes by cells, as written by Cell Ranger and STARsolo.
    """

    def __init__(self, file: Path, cells_in_rows: bool = False):
        super().__init__()
        self._file, self._cells_in_rows = file, cells_in_rows
        with naming(file, "Matrix Market"), open_text(file) as lines:
            first = lines.readline()
            sizes, self._n_header = _next_line(lines, 1)
            self._type = self._value_type(first.decode().lower().split())
            if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
                raise ValueError(
                    f"{file}: the line below the header must hold the numbers of rows, columns and entries, got "
                    f"{b' '.join(sizes).decode()!r}."
                )
            n_rows, n_columns, self._n_entries = map(int, sizes)
            entry, number = _next_line(lines, self._n_header)
            if entry:
                self._check_line(entry, number)
        self._file_shape = n_rows, n_columns
        self.shape = (n_rows, n_columns) if cells_in_rows else (n_columns, n_rows)

    def _value_type(self, header: list[str]) -> pa.DataType | None:
        if len(header) != 5 or header[:2] != ["%%matrixmarket", "matrix"]:
            raise ValueError(f"{self._file} is not a Matrix Market file: its first line must be like {_EXAMPLE!r}.")
        _, _, layout, field, symmetry = header
        if layout != "coordinate" or field not in _TYPES or symmetry != "general":
            raise ValueError(
                f"{self._file}: the header {' '.join(header)!r} is not supported; expected one like {_EXAMPLE!r}."
            )
        return _TYPES[field]

    @property
    def _n_numbers(self) -> int:
        return 2 if self._type is None else 3

    def size(self) -> tuple[int, np.dtype]:
        """Return the number of entries and their type, both according to the header."""
        return self._n_entries, np.dtype(np.float64 if self._type == pa.float64() else np.int64)

    def entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield cells, genes and values, buffer by buffer."""
        n_entries = 0
        with naming(self._file, "Matrix Market"), open_text(self._file) as file:
            for _ in range(self._n_header):
                file.readline()
            n_lines = self._n_header
            for block in _blocks(file):
                rows, columns, values = self._parse(block, n_lines)
                n_lines += block.count(b"\n")
                if not len(rows):
                    continue
                n_entries += len(rows)
                for name, at, n in zip(("row", "column"), (rows, columns), self._file_shape, strict=True):
                    if at.min() < 1 or at.max() > n:
                        outside = at.min() if at.min() < 1 else at.max()
                        raise ValueError(
                            f"{self._file} is damaged: it has entries outside the matrix, such as in {name} {outside} "
                            f"of {n}."
                        )
                rows, columns = rows - 1, columns - 1
                yield (rows, columns, values) if self._cells_in_rows else (columns, rows, values)
        if n_entries != self._n_entries:
            what = "is truncated" if n_entries < self._n_entries else "is damaged"
            raise ValueError(f"{self._file} {what}: {n_entries} entries of {self._n_entries}.")

    def _parse(self, block: bytes, n_before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parse whole lines to rows and columns, counted from 1, and values."""
        if block[:1] == b" " or any(odd in block for odd in (b"\t", b"  ", b" \n", b" \r", b"\n ")):
            block = b"\n".join(b" ".join(line.split()) for line in block.splitlines()) + b"\n"
        types = {"row": pa.int64(), "column": pa.int64()} | ({} if self._type is None else {"value": self._type})
        if not block.strip():
            return (np.empty(0, np.int64),) * 3
        try:
            table = csv.read_csv(
                pa.BufferReader(block),
                csv.ReadOptions(column_names=list(types), use_threads=False),
                csv.ParseOptions(delimiter=" ", quote_char=False),
                csv.ConvertOptions(column_types=types, null_values=[]),
            )
        except pa.ArrowInvalid:
            for number, line in enumerate(block.splitlines(), n_before + 1):
                if words := line.split():
                    self._check_line(words, number)
            raise
        found = [column.to_numpy() for column in table.columns]
        return tuple(found) if len(found) == 3 else (*found, np.ones(len(table), np.int64))

    def _check_line(self, words: list[bytes], number: int) -> None:
        """Raise ValueError if a line is not an entry."""
        line = f"line {number}, {b' '.join(words).decode(errors='replace')!r},"
        kinds = "row and column" if self._type is None else "row, column and value"
        if len(words) > self._n_numbers:
            raise ValueError(
                f"{self._file}: {line} has {len(words)} numbers, but an entry has {self._n_numbers} ({kinds}). "
                "A file with multiple matrices, as written by STARsolo's Velocyto (spliced, unspliced, ambiguous), "
                "must be split into one file per matrix, with one value per line."
            )
        if len(words) < self._n_numbers:
            raise ValueError(f"{self._file} is damaged: {line} has fewer than {self._n_numbers} numbers ({kinds}).")
        if not (words[0].isdigit() and words[1].isdigit()):
            raise ValueError(f"{self._file} is damaged: {line} has no integers for row and column.")
        if self._type is not None and not _is_number(words[2], whole=self._type == pa.int64()):
            if _is_number(words[2], whole=False):
                raise ValueError(
                    f"{self._file}: {line} has a fraction, but the header says integer. If fractions are right, write "
                    "real into the first line."
                )
            raise ValueError(f"{self._file} is damaged: {line} has no numeric value.")


_EXAMPLE = "%%MatrixMarket matrix coordinate integer general"


def _next_line(lines: Iterable[bytes], n_before: int) -> tuple[list[bytes], int]:
    """Return the words of the next line that is not a comment or empty (none at the end), and its number from 1."""
    for number, line in enumerate(lines, n_before + 1):
        if line.strip() and not line.startswith(b"%"):
            return line.split(), number
    return [], n_before


def _blocks(file: BufferedIOBase) -> Iterator[bytes]:
    """Yield a file in blocks of whole lines."""
    rest = b""
    while block := file.read(_BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if end:
            yield block[:end]
    if rest:
        yield rest + b"\n"


def _is_number(word: bytes, whole: bool) -> bool:
    try:
        (int if whole else float)(word)
    except ValueError:
        return False
    return True
