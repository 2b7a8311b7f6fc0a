"""GeneTable: the genes of a store or a file, one per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..models.gene_bert.gene_columns import guess_species, resolve_genes
from .gene_files import read_gtf, read_json, read_table


class GeneTable:
    """Genes, one per row: `gene_id`, `symbol`, and other columns of the source.

    Parameters
    ----------
    frame : DataFrame
        Table with the columns `gene_id` and `symbol` (str).

    Raises
    ------
    ValueError
        A column is missing.
    """

    def __init__(self, frame: pd.DataFrame):
        missing = sorted({"gene_id", "symbol"} - set(frame.columns))
        if missing:
            raise ValueError(f"A gene table needs the columns gene_id and symbol; missing: {', '.join(missing)}.")
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

        The gene of a row is found by `resolve_genes`: ids before symbols, without versions; placeholders and row
        numbers are not names.

        Parameters
        ----------
        var : DataFrame (n_vars, …)
            Genes of an AnnData. Repeated ids are kept.

        Returns
        -------
        GeneTable
            Genes with the other columns of `var`, and `genome` if names have prefixes of references.

        Raises
        ------
        ValueError
            The genes are named by row numbers, and no column has names.
        """
        found = resolve_genes(var.index, var)
        frame = pd.DataFrame({"gene_id": found.gene_ids, "symbol": found.symbols}, dtype=object)
        if found.genomes is not None and "genome" not in var:
            frame["genome"] = found.genomes
        for name in var.columns:
            if str(name) not in frame and pd.api.types.is_scalar(var[name].iloc[0] if len(var) else None):
                frame[str(name)] = var[name].to_numpy()
        return cls(frame)

    @classmethod
    def from_gtf(cls, path: str | Path) -> GeneTable:
        """Read the genes of an annotation, such as the GTF of a release of Ensembl or GENCODE.

        Parameters
        ----------
        path : str or Path
            GTF or GFF3, plain or gzipped. Lines of genes are read: the id is `gene_id` (in GFF3 otherwise `ID`), the
            symbol `gene_name`, `Name`, `gene_symbol` or `gene`, or the id if there is none.

        Returns
        -------
        GeneTable
            Genes with the columns `gene_type` (`gene_type`, `gene_biotype` or `biotype` of the file) and
            `chromosome`. Ids have no version; each pair of id and symbol is there once.

        Raises
        ------
        FileNotFoundError
            There is no file at the path.
        ValueError
            The file has no genes, or is damaged.
        """
        return cls(read_gtf(path))

    @classmethod
    def from_table(
        cls, path_or_frame: str | Path | pd.DataFrame, *, gene_id: str | None = None, symbol: str | None = None
    ) -> GeneTable:
        """Read genes from two columns of a table, such as those of HGNC and BioMart.

        Parameters
        ----------
        path_or_frame : str, Path or DataFrame
            A csv, tsv or parquet file with a header; text may be compressed with gzip.
        gene_id, symbol : str, optional
            Names of the columns. By default columns with a usual name (`ensembl_gene_id`, `gene_id`, `Gene stable ID`,
            … that hold gene ids; `symbol`, `gene_name`, `Gene name`, … that do not).

        Returns
        -------
        GeneTable
            Genes with the other columns of the table. Ids have no version; each pair of id and symbol is there once,
            with the other columns of its first row. Genes without an id are left out, with a warning; those without a
            symbol get their id as symbol.

        Raises
        ------
        FileNotFoundError
            There is no file at the path.
        ValueError
            A column does not exist; no column with a usual name has gene ids; the file is damaged.
        """
        return cls(read_table(path_or_frame, gene_id, symbol))

    @classmethod
    def from_json(cls, path: str | Path) -> GeneTable:
        """Read genes from JSON: `{symbol: id}`, `{id: symbol}`, or a list of records, which are read as a table.

        Parameters
        ----------
        path : str or Path
            Plain or gzipped file. In an object, either the keys or the values are the ids: those with more gene ids.

        Returns
        -------
        GeneTable
            As from `from_table`.

        Raises
        ------
        FileNotFoundError
            There is no file at the path.
        ValueError
            The JSON has another form; there are no gene ids, or as many among the keys as among the values.
        """
        return cls(read_json(path))

    @classmethod
    def union(cls, tables: Sequence[GeneTable]) -> GeneTable:
        """Merge tables by id, in the order in which the ids first appear; the first row of an id is kept.

        Parameters
        ----------
        tables : sequence of GeneTable
            At least one.
        """
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        return cls(frame.drop_duplicates("gene_id", keep="first"))

    @property
    def species(self) -> str | None:
        """Species according to the prefixes of the Ensembl ids; see `guess_species`."""
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
    def from_parquet(cls, path: str | Path | BinaryIO) -> GeneTable:
        """Read a table that `to_parquet` wrote."""
        return cls(pq.read_table(path).to_pandas())
