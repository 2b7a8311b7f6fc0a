"""loom files."""

from __future__ import annotations

from pathlib import Path

import h5py
import pandas as pd

from ..genes.gene_table import GeneTable
from .anndata_files import open_hdf5
from .matrices import DenseMatrix, FileHandle
from .registry import Layer, reads

_LOOM_CELLS = ("CellID", "Cell_id", "cell_id", "obs_names")
_LOOM_GENES = ("Gene", "gene_names", "GeneName", "var_names")


@reads("loom", lambda path: path.suffix.lower() == ".loom" and path.is_file())
def _read_loom(path: Path) -> list[Layer]:
    """Read a loom file: genes by cells, dense, with attributes of both."""
    handle = FileHandle(path, open_hdf5)
    if not {"matrix", "row_attrs", "col_attrs"} <= set(handle.file):
        raise ValueError(f"{path} is not a loom file: it has no matrix, row_attrs or col_attrs.")

    def attributes(key: str, index: tuple[str, ...]) -> pd.DataFrame:
        columns = {}
        for name, node in handle[key].items():
            if node.ndim == 1 and node.dtype.names is None:  # SCope stores embeddings as compound attributes
                strings = h5py.check_string_dtype(node.dtype) is not None
                columns[name] = node.asstr()[:].astype(object) if strings else node[:]
        frame = pd.DataFrame(columns)
        for name in index:
            if name in frame:
                return frame.set_index(frame[name].astype(str).to_numpy(object)).drop(columns=name)
        return frame.set_index(frame.index.astype(str))

    def layer(name: str, key: str) -> Layer:
        return Layer(
            name,
            DenseMatrix(handle, key, transposed=True),
            lambda: GeneTable.from_var(attributes("row_attrs", _LOOM_GENES)),
            lambda: attributes("col_attrs", _LOOM_CELLS),
        )

    layers = list(handle["layers"]) if "layers" in handle.file else []
    return [layer("X", "matrix")] + [layer(name, f"layers/{name}") for name in layers]
