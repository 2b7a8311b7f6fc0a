"""Sources of any format: found, expanded and opened to their matrices, without reading these yet."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from anndata import AnnData

from ..genes.text_files import naming
from ..models.gene_bert.cell_tables import find_table, is_mudata, is_spatialdata
from . import anndata_files, loom_files, pipeline_files, tenx_files  # noqa: F401  (register their formats)
from .anndata_files import Tables, anndata_layers
from .registry import FORMATS, Layer, find_format
from .soma import Measurements, find_soma, is_soma
from .stored_cells import store_layers

logger = logging.getLogger(__name__)

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
# Names of files, and of folders that are not stores, on a server.
_NO_STORE = re.compile(r"\.(h5ad|h5mu|h5|loom|zarr|mtx|csv|tsv|txt|zip|tar|gz|parquet|arrow)/?$", re.IGNORECASE)


class Found(NamedTuple):
    """The matrices of a source."""

    name: str  # of the source, for errors
    table: str  # the chosen modality or table, for errors; empty if there is no choice
    layers: list[Layer]
    layer: str | None  # the requested one


def is_source(value: Any) -> bool:
    """Return whether a value is a single source, not an iterable of sources."""
    return (
        isinstance(value, (AnnData, str, Path))
        or hasattr(value, "manifest")
        or is_mudata(value)
        or is_spatialdata(value)
        or is_soma(value)
    )


def _no_source(value: Any) -> ValueError:
    """Return the error for what is neither a source nor an iterable of sources."""
    return ValueError(
        "A source must be a path, an AnnData, MuData, SpatialData, CellStore or experiment of TileDB-SOMA, got "
        f"{type(value).__name__}."
    )


def find_layers(source: Any, layer: str | None = None) -> Found:
    """Open a source of any kind, as `open_source` takes it and with its errors, and return its matrices."""
    if isinstance(source, (str, Path)) or is_soma(source):
        name, found = (str(source), read_layers(source)) if isinstance(source, (str, Path)) else find_soma(source)
        if isinstance(found, list):
            return Found(name, "", found, layer)
        with naming(name):
            table, layer = found.choose(layer, name)
            layers = found.layers(table)
        return Found(name, f", {found.kind} {table!r}", layers, layer)
    if hasattr(source, "manifest"):
        return Found(str(source.path), "", store_layers(source), layer)
    if not is_source(source):
        raise _no_source(source)
    chosen = find_table(source, layer)
    name = str(chosen.table.filename) if chosen.table.isbacked else type(source).__name__
    said = "" if chosen.table is source else chosen.name.removeprefix(type(source).__name__)
    return Found(name, said, anndata_layers(chosen.table, chosen.obs), chosen.layer)


def read_layers(path: str | Path) -> list[Layer] | Tables | Measurements:
    """Open a file or folder and return its matrices, or its tables if it can hold multiple."""
    place = remote_folder(path) or local_path(path)
    if isinstance(place, Path) and not place.exists():
        raise FileNotFoundError(f"No such file: {place}")
    known = find_format(place)
    if known is None:
        raise _unknown(path)
    with naming(place):
        return known.read(place)


def is_format(path: str | Path, name: str) -> bool:
    """Return whether a path, or the address of a folder on a server, has the registered format of this name."""
    known = find_format(remote_folder(path) or local_path(path))
    return known is not None and known.name == name


def remote_folder(path: str | Path) -> str | None:
    """Return the address of a folder on a server, which may be a store; None for all other paths.

    Files on a server are not read; for these, `local_path` says what to do.
    """
    remote = _REMOTE.match(str(path))
    if remote is None or remote[1].lower() in ("file", "tiledb") or _NO_STORE.search(str(path)) or Path(path).exists():
        return None
    return _address(path, remote)


def _address(path: str | Path, remote: re.Match[str]) -> str:
    return f"{remote[1]}://{str(path)[remote.end() :]}"  # a Path has one slash


def local_path(path: str | Path) -> Path:
    """Return the path of a local file; raise ValueError for an address such as `s3://…` or `https://…`."""
    remote = _REMOTE.match(str(path))
    if remote is None or Path(path).exists():
        return Path(path)
    if remote[1].lower() == "file":
        raise ValueError(f"{path}: pass the path alone, without {remote[1]}://.")
    address = _address(path, remote)
    if remote[1].lower() == "tiledb":
        way = f"pass the experiment that tiledbsoma.Experiment.open({address!r}) opens"
    elif remote_folder(path):
        way = f"if it is a store, copy it with CellStore({address!r}).save(path)"
    elif ".zarr" in address:
        way = f"pass the AnnData that anndata.io.read_zarr({address!r}) reads"
    else:
        way = f"use fsspec.open_local('simplecache::{address}', simplecache={{'same_names': True}})"
    raise ValueError(f"{address}: only local files can be read. Download it and pass its path, or {way}.")


def _unknown(path: str | Path) -> ValueError:
    inside = list(itertools.islice(_walk(Path(path)), 2)) if Path(path).is_dir() else []
    if inside:
        return ValueError(
            f"{path} is a folder of files, and one source is needed here: pass a file, such as {inside[0]}, or build "
            "a store of all of them with CellStore.build(store_path, folder), and pass that."
        )
    names = ", ".join(known.name for known in FORMATS)
    return ValueError(
        f"{path}: unsupported file format (supported: {names}). Read it into an AnnData, for example with "
        "anndata.io.read_mtx(path).T or anndata.io.read_csv(path), and pass that or an h5ad of it."
    )


def expand(sources: Any) -> list[Any]:
    """Replace folders and patterns by the files that they stand for.

    Parameters
    ----------
    sources : AnnData, MuData, SpatialData, CellStore, str or Path, or an iterable of these
        A path may be a file or folder of a known format, another folder (for all such files in it, at any depth, in
        alphabetical order), a pattern such as `data/*.h5ad`, or the address of a store on a server.

    Returns
    -------
    list
        Objects unchanged, paths of a known format, and addresses of stores as str.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a pattern matches nothing.
    ValueError
        A file has an unsupported format; something else is given, such as a DataFrame.
    """
    if is_source(sources):
        sources = [sources]
    elif isinstance(sources, (Mapping, pd.DataFrame)) or not isinstance(sources, Iterable):
        raise _no_source(sources)  # iterating would give the names of parts or columns, which look like paths
    found = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            found.append(source)
            continue
        if address := remote_folder(source):
            found.append(address)
            continue
        path = local_path(source)
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(source)
        paths = [path] if path.exists() else sorted(Path(path.anchor).glob(pattern))
        if not paths:
            raise FileNotFoundError(f"No such file: {path}")
        for path in paths:
            inside = list(_walk(path))
            if not inside:
                raise _unknown(path)
            found += inside
    return found


def _walk(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if find_format(path):
        yield path
    elif path.is_dir() and path.resolve() not in above:  # a link to a parent folder would loop forever
        for inside in sorted(path.iterdir()):
            if inside.name.lower().endswith((".h5ad.gz", ".h5mu.gz", ".h5.gz", ".loom.gz")):
                logger.warning(f"{inside} is left out: it is compressed. Unpack it (gunzip), or move it away.")
            elif not inside.name.startswith("."):
                yield from _walk(inside, (*above, path.resolve()))
