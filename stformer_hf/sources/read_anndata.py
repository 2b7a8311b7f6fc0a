"""Read cells as an AnnData: with coordinates from a file of one, a MuData or a SpatialData; else the counts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, read_h5ad, read_zarr, sparse_dataset
from anndata.utils import make_index_unique
from scipy import sparse

from ..genes.text_files import naming
from ..genes.wrong_names import must_have
from ..models.gene_bert.cell_counts import split_features
from ..models.gene_bert.cell_tables import CellTable, find_table, is_spatialdata
from .anndata_files import Tables
from .formats import local_path, read_layers
from .open_source import open_source
from .registry import find_format

if TYPE_CHECKING:
    from mudata import MuData
    from spatialdata import SpatialData

_ROWS = 8192  # cells that are read at once
_ATTRS = "spatialdata_attrs"  # key of uns in which a table names the elements of its rows
_SYSTEM = "global"  # the coordinate system that every element has by default
_ELEMENTS = ("shapes", "labels", "points")  # elements that a table can annotate; images, the largest, are not read


def is_anndata_file(path: Path) -> bool:
    """Return whether `read_anndata` reads a file, judging by its name."""
    return path.name.lower().endswith((".h5ad", ".h5mu", ".zarr", ".zarr.zip")) and path.exists()


def read_anndata(path: str | Path, layer: str | None = None, backed: bool = False) -> tuple[AnnData, str | None]:
    """Read a file as an AnnData.

    Parameters
    ----------
    path : str or Path
        `.h5ad`, `.h5mu`, the `.zarr` of an AnnData, MuData or SpatialData, or any other supported file or folder, such
        as those of 10x.
    layer : str, optional
        The layer to read, and for MuData and SpatialData the modality or table; see `choose_table`.
    backed : bool, default: False
        Leave X, raw and the layers of an h5ad file on disk. For other files the chosen table is read completely.

    Returns
    -------
    adata : AnnData
        For MuData the modality, whose obs also has the MuData's columns; for SpatialData the table, with
        `obsm["spatial"]`, see `add_coordinates`. For files that hold no AnnData, the counts in X (float32), obs, and
        in var the columns of the gene table.
    layer : str or None
        The layer in it, with which `open_source` finds the counts: for X of antibodies alone, their feature type.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ImportError
        The table of a SpatialData has no coordinates, and the package `spatialdata` is not installed.
    ValueError
        The file has another format, or is damaged; there is no table, or the choice is ambiguous; and the errors of
        `add_coordinates`.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file: {path}")
    if not (path.suffix.lower() == ".h5mu" or path.name.lower().endswith((".zarr", ".zarr.zip"))):
        known = find_format(path)
        if known is not None and known.name != "h5ad":
            return _read_counts(path, layer)
        with naming(path, "h5ad"):
            return _read_backed(path) if backed else read_h5ad(path), layer
    found = read_layers(path)
    with naming(path):
        if not isinstance(found, Tables):
            return (read_h5ad if path.suffix.lower() == ".h5mu" else read_zarr)(path), layer
        name, layer = found.choose(layer, str(path))
        place = found.places[name]
        adata = read_elem(place.file[place.root.rstrip("/")])
        place.close()
        adata.obs = found.join(adata.obs, name)
    if found.kind == "table":
        add_coordinates(adata, lambda: _import_spatialdata().read_zarr(path, selection=_ELEMENTS), str(path))
    return adata, layer


def _read_backed(path: Path) -> AnnData:
    """Read an h5ad file without its matrices: anndata itself reads the layers of a backed file into memory."""
    with h5py.File(path, "r") as file:
        if "encoding-type" not in file.attrs or not len(file.get("layers", ())):
            return read_h5ad(path, backed="r")
        axes = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns")
        parts = {name: read_elem(file[name]) for name in axes if name in file}
        if "raw" in file:
            parts["raw"] = {name: read_elem(file["raw"][name]) for name in ("var", "varm") if name in file["raw"]}
    adata = AnnData(**parts, filename=path, filemode="r")
    for name, node in adata.file["layers"].items():
        adata.layers[name] = sparse_dataset(node) if isinstance(node, h5py.Group) else node
    return adata


def _read_counts(path: Path, layer: str | None) -> tuple[AnnData, str | None]:
    """Read the counts into memory, where they are once: their arrays grow in place, block by block."""
    source = open_source(path, layer, fractional=True)  # who uses the counts checks whether they may be fractional
    data, indices, ends = np.empty(0, np.float32), np.empty(0, np.int32), [np.zeros(1, np.int64)]
    for block in source.blocks(_ROWS):
        start = len(data)
        for array, part in ((data, block.data), (indices, block.indices)):
            array.resize(start + block.nnz, refcheck=False)
            array[start:] = part
        ends.append(block.indptr[1:] + np.int64(start))
    X = sparse.csr_matrix((data, indices, np.concatenate(ends)), shape=source.shape)
    var = source.genes.frame.set_axis(make_index_unique(pd.Index(source.genes.gene_ids)), axis=0)
    own = None if split_features(var) is None else source.counts_in  # X without genes has the name of its type
    return AnnData(X, obs=source.obs.rename_axis(None), var=var), own


def find_placed_table(cells: AnnData | MuData | SpatialData, layer: str | None = None) -> CellTable:
    """Find the table that holds the cells, as `find_table` does; add coordinates to that of a SpatialData."""
    found = find_table(cells, layer)
    if is_spatialdata(cells):
        add_coordinates(found.table, lambda: cells, found.name)
    return found


def as_anndata(found: CellTable) -> AnnData:
    """Return the table with the obs found for it: the table itself, or an AnnData that shares its arrays."""
    table = found.table
    if found.obs is table.obs:
        return table
    if table.isbacked:
        table = table.to_memory()
    raw = None if table.raw is None else {"X": table.raw.X, "var": table.raw.var}
    parts = {name: dict(getattr(table, name)) for name in ("layers", "obsm", "obsp")}
    return AnnData(table.X, obs=found.obs, var=table.var, uns=dict(table.uns), raw=raw, **parts)


def section_of(adata: AnnData) -> str | None:
    """Return the obs column of tissue sections: the regions for a table of a SpatialData, None for others."""
    key = dict(adata.uns.get(_ATTRS, {})).get("region_key")
    return key if key in adata.obs else None


def coordinates_of(adata: AnnData, key: str, n_axes: int = 3) -> np.ndarray:
    """Read coordinates from obsm, which has 2 or 3 columns of finite numbers: float64 (n_cells, at most n_axes)."""
    must_have(adata.obsm, "obsm", key)
    coordinates = np.asarray(adata.obsm[key])
    if coordinates.ndim != 2 or coordinates.shape[1] not in (2, 3):
        raise ValueError(f"obsm[{key!r}] has the shape {coordinates.shape}; coordinates have 2 or 3 columns.")
    try:
        coordinates = coordinates[:, :n_axes].astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"obsm[{key!r}] does not hold numbers: {error}.") from error
    wrong = np.flatnonzero(~np.isfinite(coordinates).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(coordinates)} cells have no finite coordinates in obsm[{key!r}], such as "
            f"{adata.obs_names[wrong[0]]}: remove them first."
        )
    return coordinates


def add_coordinates(table: AnnData, read: Callable[[], SpatialData], name: str) -> None:
    """Write `obsm["spatial"]` of a SpatialData's table: the centroids of the instances that its rows annotate.

    Parameters
    ----------
    table : AnnData
        Changed in place: float64 (n_cells, 2 or 3), in the coordinate system "global". Not changed if it has
        coordinates, or annotates no element.
    read : callable () -> SpatialData
        Function that reads the elements.
    name : str
        Name of the source, for errors.

    Raises
    ------
    ValueError
        An element does not exist, lacks some of the instances, has one twice, or is not in "global"; elements have
        both 2 and 3 dimensions.
    """
    attrs = table.uns.get(_ATTRS)
    if "spatial" in table.obsm or not attrs:
        return
    for key in ("region_key", "instance_key"):
        if attrs[key] not in table.obs:
            raise ValueError(f"{name}: the table's {key} is {attrs[key]!r}, but obs has no such column.")
    regions, instances = table.obs[attrs["region_key"]].astype(object), table.obs[attrs["instance_key"]]
    if regions.isna().any():
        raise ValueError(f"{name}: {regions.isna().sum()} cells have no region in obs[{attrs['region_key']!r}].")
    places, elements = {}, read() if table.n_obs else None
    for region in regions.unique():
        rows = np.flatnonzero(regions == region)
        places[region] = rows, _centroids(elements, region, instances.iloc[rows], name)
    widths = {region: found.shape[1] for region, (_, found) in places.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{name}: the elements of its table differ in their number of dimensions: {widths}.")
    coordinates = np.empty((table.n_obs, max(widths.values(), default=2)))
    for rows, found in places.values():
        coordinates[rows] = found
    table.obsm["spatial"] = coordinates


def _centroids(elements: SpatialData, region: str, instances: Any, name: str) -> np.ndarray:
    """Return the centroids of some instances of an element, float64 (n, 2 or 3)."""
    spatialdata = _import_spatialdata()
    if region not in elements:
        there = ", ".join(repr(found[1]) for found in elements.gen_elements() if found[0] in _ELEMENTS)
        raise ValueError(f"{name}: its table annotates {region!r}, which is missing; available: {there or 'none'}.")
    systems = spatialdata.transformations.get_transformation(elements[region], get_all=True)
    if _SYSTEM not in systems:
        raise ValueError(
            f"{name}: the element {region!r} is not in the coordinate system {_SYSTEM!r}, but in "
            f"{', '.join(map(repr, systems))}. Put the coordinates of the cells into obsm['spatial'] of its table; "
            "compute them with spatialdata.get_centroids(element, coordinate_system=…)."
        )
    centroids = spatialdata.get_centroids(elements[region], coordinate_system=_SYSTEM).compute()
    if not centroids.index.is_unique:
        twice = centroids.index[centroids.index.duplicated()][0]
        raise ValueError(f"{name}: the element {region!r} has the instance {twice!r} twice.")
    found = centroids.index.get_indexer(instances)
    if (found < 0).any():
        raise ValueError(
            f"{name}: {(found < 0).sum()} of {len(found)} cells of the region {region!r} have no instance in it, such "
            f"as {instances.iloc[int(np.argmin(found))]}; it has {len(centroids)}, such as "
            f"{next(iter(centroids.index), 'none')}. The table's {instances.name!r} must hold the element's index."
        )
    axes = [axis for axis in ("x", "y", "z") if axis in centroids]
    return centroids[axes].to_numpy(np.float64)[found]


def _import_spatialdata() -> Any:
    try:
        import spatialdata
        import spatialdata.transformations
    except ImportError as error:
        raise ImportError(
            "Reading the coordinates of a SpatialData needs the package spatialdata: pip install "
            '"stformer_hf[spatialdata]". Stores and streams read only its counts, and work without the package.'
        ) from error
    return spatialdata
