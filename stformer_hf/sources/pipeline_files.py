"""Files of other pipelines: Parse, kb-python, alevin-fry and BD Rhapsody."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from ..genes.gene_table import GeneTable
from ..genes.text_files import read_columns, read_text_table
from ..models.gene_bert.feature_types import GENES
from .anndata_files import by_feature_type
from .matrices import Selection
from .mtx_files import beside, file_of, names_table, rows_of_mtx
from .registry import Layer, reads
from .text_matrix import TextMatrix

_BD_FILE = re.compile(r"_MolsPerCell(_Unfiltered)?\.csv(\.gz)?$", re.IGNORECASE)


@reads("Parse", lambda path: _parse_file(path) is not None)
def _read_parse(path: Path) -> list[Layer]:
    """Read a folder of Parse Biosciences: count_matrix.mtx or DGE.mtx, all_genes.csv and cell_metadata.csv."""
    file = _parse_file(path)
    assert file is not None  # as for all files of this format

    def read_table(name: str, index: str) -> pd.DataFrame:
        table = read_text_table(beside(file, name))
        if index not in table:
            raise ValueError(f"{name} beside {file} has no column {index}; it has {', '.join(map(str, table))}.")
        return table.set_index(index).rename_axis(index=None)

    genes, cells = read_table("all_genes.csv", "gene_id"), read_table("cell_metadata.csv", "bc_wells")
    matrix = rows_of_mtx(file, genes, cells, cells_in_rows=True)
    return [Layer("X", matrix, lambda: GeneTable.from_var(genes), lambda: cells.apply(_whole_numbers))]


def _parse_file(path: Path) -> Path | None:
    file = file_of(path, "count_matrix.mtx", "DGE.mtx")
    return file if file is not None and file_of(file.parent, "all_genes.csv") else None


def _whole_numbers(column: pd.Series) -> pd.Series:
    """Convert text to numbers if all values are integers in their usual form; `01` and `1e5` are labels."""
    usual = column.str.fullmatch(r"0|-?[1-9]\d{0,17}")
    return column.astype(np.int64) if usual.all() else column


@reads("kb-python", lambda path: bool(_kallisto_files(path)))
def _read_kallisto(path: Path) -> list[Layer]:
    """Read a folder of kb-python: cells_x_genes.mtx, or one matrix per kind of molecule (mature, nascent, …)."""
    files = _kallisto_files(path)
    genes = names_table(beside(files[0], "cells_x_genes.genes.txt"))
    symbols = file_of(files[0].parent, "cells_x_genes.genes.names.txt")
    if symbols is not None:
        names = read_columns(symbols)[0].to_numpy(object)
        if len(names) != len(genes):
            raise ValueError(f"{symbols} has {len(names)} lines, but there are {len(genes)} genes.")
        genes["gene_symbol"] = names
    cells = names_table(beside(files[0], "cells_x_genes.barcodes.txt"))
    return [
        Layer(
            file.name.removesuffix(".gz").removesuffix(".mtx").removeprefix("cells_x_genes").strip(".") or "X",
            rows_of_mtx(file, genes, cells, cells_in_rows=True),
            lambda: GeneTable.from_var(genes),
            lambda: cells,
        )
        for file in files
    ]


def _kallisto_files(path: Path) -> list[Path]:
    names = ("cells_x_genes*.mtx", "cells_x_genes*.mtx.gz")
    if path.is_dir():
        return sorted(file for name in names for file in path.glob(name))
    return [path] if any(path.match(name) for name in names) else []


@reads("alevin-fry", lambda path: file_of(path, "quants_mat.mtx") is not None)
def _read_alevin_fry(path: Path) -> list[Layer]:
    """Read the folder `alevin` of alevin-fry: quants_mat.mtx, quants_mat_cols.txt and quants_mat_rows.txt.

    In USA mode each gene has three columns: `gene`, `gene-U` and `gene-A`. Which of them should be counted depends on
    the experiment, so there is no X: `spliced+ambiguous` is usual for cells, all three for nuclei.
    """
    file = file_of(path, "quants_mat.mtx")
    assert file is not None  # as for all files of this format
    genes, cells = (names_table(beside(file, f"quants_mat_{kind}.txt")) for kind in ("cols", "rows"))
    matrix = rows_of_mtx(file, genes, cells, cells_in_rows=True)
    n, names = len(genes) // 3, genes.index.to_numpy(object)
    if (
        len(genes) % 3
        or not n
        or any((names[:n] + end != names[i * n :][:n]).any() for i, end in ((1, "-U"), (2, "-A")))
    ):
        return [Layer("X", matrix, lambda: GeneTable.from_var(genes), lambda: cells)]
    parts = dict(zip(("spliced", "unspliced", "ambiguous"), np.arange(3 * n).reshape(3, n), strict=True))

    def layer(*kinds: str) -> Layer:  # columns of the same gene are summed, as everywhere
        columns = np.concatenate([parts[kind] for kind in kinds])
        var = genes.iloc[columns % n]
        return Layer("+".join(kinds), Selection(matrix, None, columns), lambda: GeneTable.from_var(var), lambda: cells)

    return [layer("spliced", "ambiguous"), layer(*parts), *map(layer, parts)]


@reads("BD Rhapsody csv", lambda path: _BD_FILE.search(path.name) is not None and path.is_file())
def _read_rhapsody(path: Path) -> list[Layer]:
    """Read the molecule table of BD Rhapsody: cells by genes, dense; names of antibodies end in pAbO."""
    matrix = TextMatrix(path)
    names = pd.Series(matrix.columns, dtype=object)
    kinds = np.where(names.str.endswith("pAbO"), "Antibody Capture", GENES).astype(object)
    # Genes are named by symbol, in targeted panels by `symbol|transcript|kind`.
    genes = np.where(kinds == GENES, names.str.partition("|")[0], names).astype(object)
    var = pd.DataFrame({"feature_type": kinds}, index=pd.Index(genes, dtype=object))
    return by_feature_type("X", matrix, var, lambda: pd.DataFrame(index=pd.Index(matrix.index, dtype=object)))
