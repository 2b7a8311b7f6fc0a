"""TextMatrix: a dense csv table of cells by genes, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..genes.text_files import naming, open_text
from .matrices import ScatteredMatrix

_VALUES_AT_ONCE = 1 << 22


class TextMatrix(ScatteredMatrix):
    """A csv file with gene names in the first line and cell names in the first column.

    These are its `columns` and its `index`, object arrays. The file is plain or gzipped; leading lines that begin with
    `#` are comments.
    """

    def __init__(self, file: Path):
        super().__init__()
        self._file, self._n_above, header = file, 0, b""
        with naming(file, "csv"), open_text(file) as lines:
            for header in lines:
                self._n_above += 1
                if header.strip() and not header.startswith(b"#"):
                    break
            names = header.decode("utf-8-sig").rstrip("\r\n").split(",")
            self.columns = np.array([name.strip('"') for name in names[1:]], dtype=object)
            cells = []
            for number, line in enumerate(lines, self._n_above + 1):
                if not line.strip():
                    continue
                if line.count(b",") != len(self.columns):
                    raise ValueError(
                        f"{file} is damaged: line {number} has {line.count(b',')} values, but there are "
                        f"{len(self.columns)} genes."
                    )
                cells.append(line[: line.index(b",")].decode().strip('"'))
        self.index = np.array(cells, dtype=object)
        self.shape = (len(self.index), len(self.columns))

    def size(self) -> tuple[int, np.dtype]:
        """Return the maximum number of values and their type."""
        return self.shape[0] * self.shape[1], np.dtype(np.float64)

    def entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield cells, genes and values, block by block."""
        at = 0
        with naming(self._file, "csv"), open_text(self._file) as lines:
            parts = pd.read_csv(
                lines,
                header=None,
                names=range(self.shape[1] + 1),
                skiprows=self._n_above,
                dtype={0: str, **{column: np.float64 for column in range(1, self.shape[1] + 1)}},
                keep_default_na=False,
                chunksize=max(1, _VALUES_AT_ONCE // (self.shape[1] + 1)),
                index_col=False,
            )
            for part in parts:
                values = part.iloc[:, 1:].to_numpy()
                rows, columns = np.nonzero(values)
                yield rows + at, columns, values[rows, columns]
                at += len(part)
