"""GeneTable: the genes of a store or a file, one a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?$")
_ID_COLUMNS = ("ensembl_id", "gene_id", "gene_ids", "feature_id")
_SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "feature_name", "symbol")


class GeneTable:
    """Genes, one a row: `gene_id`, `symbol`, and what the source said of them.

    Parameters
    ----------
    frame : DataFrame
        Has the columns `gene_id` and `symbol` (str).

    Raises
    ------
    ValueError
        A column is missing.
    """

    def __init__(self, frame: pd.DataFrame):
        missing = {"gene_id", "symbol"} - set(frame.columns)
        if missing:
            raise ValueError(f"A gene table has the columns gene_id and symbol; {', '.join(sorted(missing))} missing.")
        self.frame = frame.reset_index(drop=True)
        self.gene_ids: np.ndarray = self.frame["gene_id"].to_numpy(dtype=object)
        self.symbols: np.ndarray = self.frame["symbol"].to_numpy(dtype=object)

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        return f"GeneTable({len(self)} genes: {', '.join(map(str, self.gene_ids[:3]))}, …)"

    @classmethod
    def from_var(cls, var: pd.DataFrame) -> GeneTable:
        """Read the genes of `AnnData.var`.

        The id is the index where it holds Ensembl ids, else a column that does (`ensembl_id`, `gene_id`, `gene_ids`,
        `feature_id`) with the index for genes that have none there, else the index. Version suffixes of Ensembl ids
        are cut. The symbol is the index where it is not the id, else a column such as `gene_symbol`, else the id.

        Parameters
        ----------
        var : DataFrame (n_vars, …)
            Genes of an AnnData. Repeated ids are kept as they are.

        Returns
        -------
        GeneTable
        """
        index = var.index.astype(str).to_numpy(dtype=object)
        ids = index
        if not _mostly_ensembl(index):
            for name in _ID_COLUMNS:
                if name in var:
                    column = var[name].astype(object).fillna("").astype(str).to_numpy(dtype=object)
                    if _mostly_ensembl(column):
                        ids = np.where(column == "", index, column)
                        break
        symbols = index
        if ids is index:
            for name in _SYMBOL_COLUMNS:
                if name in var:
                    column = var[name].astype(object).fillna("").astype(str).to_numpy(dtype=object)
                    symbols = np.where(column == "", index, column)
                    break
        frame = pd.DataFrame({"gene_id": [_strip_version(gene) for gene in ids], "symbol": symbols}, dtype=object)
        for name in var.columns:
            if str(name) not in frame and pd.api.types.is_scalar(var[name].iloc[0] if len(var) else None):
                frame[str(name)] = var[name].to_numpy()
        return cls(frame)

    @classmethod
    def union(cls, tables: Sequence[GeneTable]) -> GeneTable:
        """Unite tables by id, in the order in which the ids first appear; the first row of an id is kept.

        Parameters
        ----------
        tables : sequence of GeneTable
            At least one.

        Returns
        -------
        GeneTable
            Every id once.
        """
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        return cls(frame.drop_duplicates("gene_id", keep="first"))

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as a parquet file; columns of mixed types are written as strings."""
        arrays = {}
        for name in self.frame.columns:
            try:
                arrays[name] = pa.array(self.frame[name], from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                arrays[name] = pa.array(self.frame[name].astype(str))
        pq.write_table(pa.table(arrays), path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> GeneTable:
        """Read a table that `to_parquet` wrote."""
        return cls(pq.read_table(path).to_pandas())


def _mostly_ensembl(names: np.ndarray) -> bool:
    return sum(bool(_ENSEMBL.match(name)) for name in names) > len(names) / 2


def _strip_version(gene: str) -> str:
    return gene.rsplit(".", 1)[0] if _ENSEMBL.match(gene) else gene


__all__ = ["GeneTable"]
