"""Files of 10x: Cell Ranger's HDF5, and folders of Matrix Market files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from ..genes.gene_table import GeneTable
from ..genes.text_files import read_columns
from .anndata_files import Tables, by_feature_type, open_hdf5, read_anndata_file
from .matrices import CompressedMatrix, FileHandle
from .mtx_files import beside, names_table, rows_of_mtx
from .registry import Layer, reads


@reads("10x h5", lambda path: path.suffix.lower() == ".h5" and path.is_file())
def _read_tenx_h5(path: Path) -> list[Layer] | Tables:
    """Read a Cell Ranger or Space Ranger file: v3 (`matrix`, multiple feature types) or v2 (one group per genome)."""
    handle = FileHandle(path, open_hdf5)
    if {"obs", "var"} <= set(handle.file):
        return read_anndata_file(path)

    def strings(key: str) -> np.ndarray:
        return handle[key].asstr()[:].astype(object)

    def obs(group: str) -> Callable[[], pd.DataFrame]:
        return lambda: pd.DataFrame(index=pd.Index(strings(f"{group}/barcodes"), dtype=object))

    def matrix(group: str) -> CompressedMatrix:  # stored by barcode
        return CompressedMatrix(handle, group, tuple(handle[group]["shape"][:][::-1]))

    if "matrix" in handle.file:
        names = {"gene_symbol": "name", "feature_type": "feature_type", "genome": "genome"}
        columns = {
            column: strings(f"matrix/features/{name}")
            for column, name in names.items()
            if name in handle["matrix/features"]
        }
        features = pd.DataFrame(columns, index=strings("matrix/features/id"))
        return by_feature_type("X", matrix("matrix"), features, obs("matrix"))
    genomes = [name for name, node in handle.file.items() if isinstance(node, h5py.Group) and "barcodes" in node]
    if not genomes:
        raise ValueError(f"{path} is neither a 10x file (it has no group `matrix` or of a genome) nor an AnnData.")

    def genes(genome: str) -> Callable[[], GeneTable]:
        return lambda: GeneTable.from_var(
            pd.DataFrame({"gene_symbol": strings(f"{genome}/gene_names")}, index=strings(f"{genome}/genes"))
        )

    name = "X" if len(genomes) == 1 else None
    return [Layer(name or genome, matrix(genome), genes(genome), obs(genome)) for genome in genomes]


def _matrix_file(path: Path) -> Path | None:
    """Return the matrix.mtx of a 10x folder; the path may be the folder or the matrix itself."""
    if path.is_dir():
        found = sorted(path.glob("*matrix.mtx")) or sorted(path.glob("*matrix.mtx.gz"))
        return found[0] if len(found) == 1 else None
    return path if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")) else None


@reads("10x mtx", lambda path: _matrix_file(path) is not None)
def _read_tenx_mtx(path: Path) -> list[Layer]:
    """Read a Cell Ranger folder: matrix.mtx, barcodes.tsv, and features.tsv (v3) or genes.tsv (v2); gzipped or not."""
    file = _matrix_file(path)
    assert file is not None  # as for all files of this format
    prefix = file.name[: file.name.index("matrix.mtx")]
    genes = _read_features(beside(file, prefix + "features.tsv", prefix + "genes.tsv"))
    cells = names_table(beside(file, prefix + "barcodes.tsv"))
    return by_feature_type("X", rows_of_mtx(file, genes, cells, cells_in_rows=False), genes, lambda: cells)


def _read_features(file: Path) -> pd.DataFrame:
    """Read features.tsv or genes.tsv: ids, and if lines have more fields, `gene_symbol` and `feature_type`."""
    table = read_columns(file, 3)
    genes = pd.DataFrame(index=pd.Index(table[0], dtype=object, name=None))
    for column, name in ((1, "gene_symbol"), (2, "feature_type")):
        if column in table and (table[column] != "").any():
            genes[name] = table[column].to_numpy(object)
    return genes
