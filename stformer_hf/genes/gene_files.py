"""Read genes from files: annotations (GTF, GFF3), tables (csv, tsv, parquet) and JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..models.gene_bert.gene_columns import are_ids, mostly_ids, strip_versions
from .text_files import existing_file, naming, open_text, read_text_table

logger = logging.getLogger(__name__)

# Usual names of columns, the preferred ones first; case and punctuation are ignored.
ID_COLUMNS = (
    "ensembl_gene_id",  # HGNC, biomaRt
    "ensembl_id",
    "gene_stable_id",  # BioMart
    "ensembl_gene_id_version",
    "gene_stable_id_version",
    "gene_id",
    "gene_ids",  # scanpy
    "feature_id",  # CELLxGENE
    "ensembl_id_supplied_by_ensembl",  # HGNC's custom downloads
    "ensembl",
    "index",  # of a DataFrame
)
SYMBOL_COLUMNS = (
    "symbol",  # HGNC
    "gene_symbol",
    "gene_symbols",
    "approved_symbol",  # HGNC's custom downloads
    "gene_name",  # BioMart
    "external_gene_name",  # biomaRt
    "hgnc_symbol",
    "mgi_symbol",
    "feature_name",  # CELLxGENE
    "gene_short_name",  # monocle
    "gene",
    "index",
)
_GTF_ATTRIBUTE = re.compile(r'([^\s;]+)\s+(?:"([^"]*)"|([^\s;"]+))')  # gene_id "ENSG…"; level 2
_GFF3_ATTRIBUTES = re.compile(r"\s*[^\s;=\"]+=")  # ID=gene:ENSG…;Name=…
_BLOCK = 1 << 20  # bytes


def read_gtf(path: str | Path) -> pd.DataFrame:
    """Read the genes of an annotation; see `GeneTable.from_gtf`."""
    path = existing_file(path)
    genes = []
    with naming(path, "GTF or GFF3"), open_text(path) as file:
        for line in _gene_lines(file):
            fields = line.decode(errors="replace").split("\t")
            if len(fields) == 9 and fields[2].endswith("gene") and not line.startswith(b"#"):
                attributes = _attributes(fields[8])
                if "Parent" not in attributes:  # else a transcript with a type such as processed_pseudogene
                    genes.append((fields[0], attributes))
    if not genes:
        seen = _features(path)
        raise ValueError(
            f"{path} has no gene features{f' (but {seen})' if seen else ': it is not GTF or GFF3'}. Use a GTF with "
            "gene lines, as from Ensembl or GENCODE, or a table of ids and symbols (GeneTable.from_table)."
        )
    # GFF3 of Ensembl and NCBI has the type of a feature before its id.
    ids = [of.get("gene_id") or of.get("ID", "").removeprefix("gene:").removeprefix("gene-") for _, of in genes]
    others = {
        "gene_type": [_first(of, "gene_type", "gene_biotype", "biotype") for _, of in genes],
        "chromosome": [chromosome for chromosome, _ in genes],
    }
    symbols = [_first(of, "gene_name", "Name", "gene_symbol", "gene") for _, of in genes]
    return _unite_rows(ids, symbols, pd.DataFrame(others, dtype=object), str(path))


def read_table(table: str | Path | pd.DataFrame, gene_id: str | None, symbol: str | None) -> pd.DataFrame:
    """Read genes from columns of a table; see `GeneTable.from_table`."""
    if isinstance(table, pd.DataFrame):
        return _read_frame(table, "The table", gene_id, symbol)
    path = existing_file(table)
    with naming(path, "a table"):
        frame = pq.read_table(path).to_pandas() if path.suffix == ".parquet" else read_text_table(path)
    return _read_frame(frame, str(path), gene_id, symbol)


def _read_frame(frame: pd.DataFrame, name: str, gene_id: str | None, symbol: str | None) -> pd.DataFrame:
    if not pd.api.types.is_numeric_dtype(frame.index) and frame.index.name not in frame.columns:
        frame = frame.reset_index()
    seen = f"Its columns are {', '.join(map(str, frame.columns)) or '(none)'}"
    if not frame.columns.is_unique:
        raise ValueError(f"{name} has repeated column names. {seen}.")
    if len(frame) == 0:
        raise ValueError(f"{name} has no rows. {seen}.")
    for argument, column in {"gene_id": gene_id, "symbol": symbol}.items():
        if column is not None and column not in frame:
            raise ValueError(f"{name} has no column {column!r} ({argument}=…). {seen}.")
    gene_id = _find_ids(frame, name, seen) if gene_id is None else gene_id
    symbol = _find_symbols(frame, name, seen, gene_id) if symbol is None else symbol
    ids, symbols = _names(frame[gene_id]), _names(frame[symbol])
    if mostly_ids(symbols) and not mostly_ids(ids):
        raise ValueError(f"{name} has gene ids in {symbol!r}, not in {gene_id!r}: swap gene_id= and symbol=.")
    others = frame.drop(columns=[column for column in (gene_id, symbol, "gene_id", "symbol") if column in frame])
    return _unite_rows(ids, symbols, others.rename(columns=str), name)


def read_json(path: str | Path) -> pd.DataFrame:
    """Read genes from a JSON object or list; see `GeneTable.from_json`."""
    path = existing_file(path)
    with naming(path, "JSON"), open_text(path) as file:
        content = json.loads(file.read(), object_pairs_hook=tuple)  # a symbol may be repeated
    if isinstance(content, list) and content and all(isinstance(record, tuple) for record in content):
        return _read_frame(pd.DataFrame([dict(record) for record in content]), str(path), None, None)
    if not isinstance(content, tuple) or not all(isinstance(value, str | None) for _, value in content):
        raise ValueError(f"{path} must be {{symbol: id}}, {{id: symbol}}, or a list of records with id and symbol.")
    if not content:
        raise ValueError(f"{path} has no genes.")
    left, right = (_names(pd.Series(names, dtype=object)) for names in zip(*content, strict=True))
    n_left, n_right = are_ids(left).sum(), are_ids(right).sum()
    if max(n_left, n_right) == 0:
        raise ValueError(f"{path} has no gene ids, only names like {left[0]!r} and {right[0]!r}.")
    if n_left == n_right:
        raise ValueError(f"{path} has as many gene ids among its keys as among its values: which are the symbols?")
    ids, symbols = (left, right) if n_left > n_right else (right, left)
    return _unite_rows(ids, symbols, pd.DataFrame(index=range(len(ids))), str(path))


def _gene_lines(file: BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines that may be genes; most lines are exons, and parsing each would take three times as long.

    All features of genes end in `gene`, also Ensembl's `ncRNA_gene` and `pseudogene`.
    """
    rest = b""
    while block := file.read(_BLOCK):
        lines = rest + block
        end = lines.rfind(b"\n") + 1
        yield from _lines_with(b"gene\t", lines, end)
        rest = lines[end:]
    yield from _lines_with(b"gene\t", rest + b"\n", len(rest) + 1)


def _lines_with(part: bytes, lines: bytes, end: int) -> Iterator[bytes]:
    at = lines.find(part, 0, end)
    while at >= 0:
        stop = lines.find(b"\n", at)
        yield lines[lines.rfind(b"\n", 0, at) + 1 : stop]
        at = lines.find(part, stop, end)


def _attributes(text: str) -> dict[str, str]:
    """Parse the last field of a GTF or GFF3 line."""
    if _GFF3_ATTRIBUTES.match(text):
        pairs = (part.partition("=") for part in text.split(";"))
        return {key.strip(): unquote(value).strip() for key, _, value in pairs}
    return {key: quoted or bare for key, quoted, bare in _GTF_ATTRIBUTE.findall(text)}


def _features(path: Path) -> str:
    """Return the feature types of an annotation without genes, for a message."""
    with open_text(path) as file:
        lines = [line.split(b"\t") for line in islice(file, 1000) if not line.startswith(b"#")]
    return ", ".join(sorted({fields[2].decode(errors="replace") for fields in lines if len(fields) == 9}))


def _first(attributes: Mapping[str, str], *keys: str) -> str:
    return next((attributes[key] for key in keys if attributes.get(key)), "")


def whole_numbers(column: pd.Series) -> pd.Series:
    """Convert integers that pandas read as floats, because some are missing, back to integers."""
    return column.astype("Int64") if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all() else column


def _names(column: pd.Series) -> np.ndarray:
    """Return a column as names, object array (n,) of str; "" where missing (R writes `NA`)."""
    column = whole_numbers(column)
    names = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    return names.where(names != "NA", "").to_numpy(dtype=object)


def plain_name(name: object) -> str:
    """Return the name of a column in lower case, with underscores for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def _usual(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return the columns that have one of the usual names, in the order of these."""
    columns = {plain_name(name): name for name in reversed(frame.columns)}
    return [columns[name] for name in names if name in columns]


def _find_ids(frame: pd.DataFrame, name: str, seen: str) -> Any:
    others = []
    for column in _usual(frame, ID_COLUMNS):
        names = _names(frame[column])
        if mostly_ids(names):
            return column
        others += [f" {column!r} has names like {example!r}." for example in names[names != ""][:1]]
    if are_ids([str(column) for column in frame.columns]).any():
        others.append(" The first line seems to be a gene: add a line with column names above it.")
    raise ValueError(
        f"{name} has no gene ids in a column with a usual name, such as ensembl_gene_id. {seen}; pass the name of the "
        f"column with the ids, gene_id=….{''.join(others)}"
    )


def _find_symbols(frame: pd.DataFrame, name: str, seen: str, gene_id: Any) -> Any:
    for column in _usual(frame, SYMBOL_COLUMNS):
        names = _names(frame[column])
        if column != gene_id and not are_ids(names[names != ""]).all():  # some genes have their id as symbol
            return column
    raise ValueError(
        f"{name} has no symbols in a column with a usual name, such as gene_name. {seen}; pass the name of the "
        "column with the symbols, symbol=…."
    )


def _unite_rows(ids: Iterable[str], symbols: Iterable[str], others: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the frame of a `GeneTable`: ids without version, each pair of id and symbol once."""
    # GENCODE marks the second copy of a gene that is on both X and Y.
    ids = strip_versions(np.array([gene.removesuffix("_PAR_Y") for gene in ids], dtype=object))
    symbols = np.array(symbols, dtype=object)
    known = ids != ""
    if not known.any():
        raise ValueError(f"{name} has no gene ids.")
    if not known.all():
        logger.warning(f"{name}: {(~known).sum()} of {len(known)} genes have no id and are left out.")
    names = pd.DataFrame({"gene_id": ids, "symbol": np.where(symbols == "", ids, symbols)}, dtype=object)
    frame = pd.concat([names, others.reset_index(drop=True)], axis=1)[known]
    return frame.drop_duplicates(["gene_id", "symbol"]).reset_index(drop=True)
