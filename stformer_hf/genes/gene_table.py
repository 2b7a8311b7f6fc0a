"""GeneTable: the genes of a store or a file, one a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_ENSEMBL = r"^(?P<prefix>ENS[A-Z]*)G\d{11}(?P<version>\.\d+)?$"
_SPECIES = {  # prefixes of Ensembl gene ids
    "ENS": "human",
    "ENSMUS": "mouse",
    "ENSRNO": "rat",
    "ENSDAR": "zebrafish",
    "ENSMMU": "macaque",
    "ENSPTR": "chimpanzee",
    "ENSSSC": "pig",
    "ENSBTA": "cow",
    "ENSGAL": "chicken",
    "ENSCJA": "marmoset",
}
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
        frame = pd.DataFrame({"gene_id": _strip_versions(ids), "symbol": symbols}, dtype=object)
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

    @property
    def species(self) -> str | None:
        """Species that the prefixes of the Ensembl ids tell; see `guess_species`."""
        return guess_species(self.gene_ids)

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as a parquet file; columns of mixed types are written as strings."""
        arrays = {}
        for name in self.frame.columns:
            try:
                arrays[name] = pa.array(self.frame[name], from_pandas=True)
            except pa.ArrowException:
                arrays[name] = pa.array(self.frame[name].astype(str))
        pq.write_table(pa.table(arrays), path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> GeneTable:
        """Read a table that `to_parquet` wrote."""
        return cls(pq.read_table(path).to_pandas())


def is_ensembl(names: np.ndarray) -> np.ndarray:
    """Tell which names are Ensembl gene ids, with or without a version: bool array (n,)."""
    return pc.match_substring_regex(pa.array(names, pa.string()), _ENSEMBL).to_numpy(zero_copy_only=False)


def _mostly_ensembl(names: np.ndarray) -> bool:
    return is_ensembl(names).sum() > len(names) / 2


def guess_species(gene_ids: np.ndarray) -> str | None:
    """Tell the species of Ensembl ids by their prefix: a name such as `human`, or the prefix of one not listed here.

    None where there are no Ensembl ids, and where under nine in ten of them agree (mixed species).
    """
    found = pc.extract_regex(pa.array(gene_ids, pa.string()), _ENSEMBL).drop_null()
    if not len(found):
        return None
    prefixes = pd.Series(found.field("prefix").to_pandas()).value_counts()
    if prefixes.iloc[0] < 0.9 * len(found):
        return None
    return _SPECIES.get(prefixes.index[0], prefixes.index[0])


def _strip_versions(names: np.ndarray) -> np.ndarray:
    ids = np.array(names, dtype=object)
    versioned = np.flatnonzero(is_ensembl(ids))
    ids[versioned] = [name.partition(".")[0] for name in ids[versioned]]
    return ids


__all__ = ["GeneTable", "guess_species", "is_ensembl"]
