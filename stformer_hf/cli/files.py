"""Read the cells that commands take, and write what they found."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.experimental import write_dispatched
from anndata.io import sparse_dataset, write_elem

from ..genes.whole_files import whole_file
from ..sources.formats import local_path, remote_folder
from ..sources.read_anndata import read_anndata
from ..store.cell_store import CellStore
from ..store.replacing import locked
from .arguments import check_free

# which no longer writes names with a slash to an h5ad
_OF_ANNDATA_0_13 = tuple(map(int, version("anndata").split(".")[:2])) >= (0, 13)
_CHUNK = 2**20  # values in a chunk of a zarr
_CHUNKS = 4  # that are copied at once


def holds_store(path: str | Path) -> bool:
    """Return whether a path is the folder of a store, or the address of a folder on a server."""
    return remote_folder(path) is not None or (Path(path) / "manifest.json").exists()


def read(
    data: str,
    output: str | None = None,
    overwrite: bool = False,
    layer: str | None = None,
    blockwise: bool = False,
    suffixes: Sequence[str] = (".h5ad", ".zarr"),
) -> tuple[AnnData | CellStore, str | None]:
    """Read the input, after checking the path of the output, which has one of the suffixes; see `read_anndata`.

    With `blockwise`, the input may be larger than memory: a store is opened, and the matrices of an h5ad file stay on
    disk.
    """
    if remote_folder(data) is None and not local_path(data).exists():
        raise FileNotFoundError(f"No such file: {data}")
    if output is not None:
        _check_output(data, Path(output), overwrite, suffixes)
    if blockwise and holds_store(data):
        if layer is not None:
            raise ValueError(f"--layer {layer}: {data} is a store, which holds the counts of one layer.")
        store = CellStore(data)
        if output is not None:
            _check_names(store, output)
        return store, None
    adata, layer = read_anndata(data, layer, backed=blockwise)
    if adata.isbacked and isinstance(adata.file["obs"], h5py.Dataset):  # anndata < 0.7, which `write` cannot add to
        adata = adata.to_memory()
    if output is not None:
        _check_names(adata, output)
    return adata, layer


def _check_output(data: str, output: Path, overwrite: bool, suffixes: Sequence[str]) -> None:
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"--output {output}: pass a name that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    if not output.exists():
        return
    if remote_folder(data) is None and output.samefile(data):
        raise ValueError(f"--output is the input, {data}; choose another file.")
    of_zarr = output.suffix.lower() == ".zarr"
    if output.is_dir() and not (of_zarr and any((output / name).exists() for name in (".zgroup", "zarr.json"))):
        raise ValueError(f"--output {output} is a folder{' that is not a zarr' * of_zarr}; choose another name.")
    if of_zarr and output.is_file():
        raise ValueError(f"--output {output} is a file, and a zarr is a folder; choose another name.")
    check_free(output, overwrite)


def _check_names(cells: AnnData | CellStore, output: str) -> None:
    """Raise a ValueError for a name that the output cannot hold, before the work."""
    if isinstance(cells, CellStore):
        check_names(cells.obs, "obs", output)
        return
    for part in ("obs", "obsm", "uns"):
        check_names(getattr(cells, part), part, output)
    if cells.isbacked and Path(output).suffix.lower() == ".h5ad":
        return  # a copy of the file has the other names, see `write`
    for part in ("var", "varm"):
        check_names(getattr(cells, part), part, output)
    if cells.raw is not None:
        check_names(cells.raw.var, "raw.var", output)
    for part in ("obsp", "varp", "layers"):  # from anndata 0.13 on, X is a layer, None
        check_names([*filter(None, getattr(cells, part))], part, output)


def check_names(names: Iterable[str], part: str, output: str, what_to_do: str = "Rename it") -> None:
    """Raise a ValueError for a name with a slash, also in a table or mapping, if the output cannot hold it."""
    suffix = Path(output).suffix.lower()
    if suffix == ".csv" or (suffix == ".h5ad" and not _OF_ANNDATA_0_13):
        return
    places = {f"{part}[{str(name)!r}]": name for name in names}
    if isinstance(names, pd.DataFrame):
        places[f"{part}.index.name {str(names.index.name)!r}"] = names.index.name
    for where, name in places.items():
        if "/" in str(name):
            raise ValueError(f"--output {output}: {suffix[1:]} cannot hold names with a slash, {where}. {what_to_do}.")
        value = names[name] if isinstance(names, Mapping) else None
        if isinstance(value, Mapping | pd.DataFrame):
            check_names(value, where, output)


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Let only one command at a time write to a path, and leave no empty folder after an error (see `locked`).

    The processes of one command share the path. Raise a ValueError if it is empty, as that of a variable that is not
    set: it would be the current folder.
    """
    if not os.fspath(output):
        raise ValueError("The path to write to is empty: pass a name.")
    first = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0
    with locked(Path(output).resolve()) if first else nullcontext():
        yield


def several_processes() -> bool:
    """Return whether `accelerate launch` started several processes, which divide the cells."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first_process() -> bool:
    """Return whether this process prints and writes: the first of several, or the only one."""
    return not several_processes() or PartialState().is_main_process


def write(adata: AnnData, output: str, columns: Sequence[str] = ()) -> None:
    """Write an h5ad file, a zarr folder, or a csv file with some columns of obs, whole or not at all.

    An h5ad of an AnnData on disk is a copy of its file with the new obs, obsm and uns; its matrices are copied to a
    zarr in blocks. With several processes, only the first one writes.
    """
    if not is_first_process():
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        if path.suffix.lower() == ".csv":
            adata.obs[list(columns)].to_csv(part)
        elif path.suffix.lower() == ".zarr":
            (_write_zarr_from_disk if adata.isbacked else AnnData.write_zarr)(adata, part)
        elif adata.isbacked:
            source = adata.filename
            adata.file.close()
            shutil.copyfile(source, part)
            with h5py.File(part, "r+") as file:
                for name in ("obs", "obsm", "uns"):
                    value = getattr(adata, name)
                    write_elem(file, name, value if name == "obs" else dict(value))
        else:
            adata.write_h5ad(part, compression="gzip")


def _write_zarr_from_disk(adata: AnnData, path: Path) -> None:
    """Write an AnnData whose matrices are in an HDF5 file to a zarr, a few million values at a time."""
    import zarr

    def write_part(
        write: Callable[..., None], group: Any, name: str, value: Any, *, dataset_kwargs: Mapping[str, Any], **_: Any
    ) -> None:
        if isinstance(value, CSRDataset | CSCDataset | h5py.Dataset):
            _copy_matrix(value, group, name)
        else:
            write(group, name, value, dataset_kwargs=dataset_kwargs)

    AnnData().write_zarr(path)  # which shows the format that anndata writes
    settings: dict[str, Any] = {"zarr_format": 3 if (path / "zarr.json").exists() else 2}
    group = zarr.open_group(str(path), mode="w", **({} if version("zarr").startswith("2.") else settings))
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    parts: dict[str, Any] = {"obs": adata.obs, "var": adata.var}
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        mapping = getattr(adata, name)
        parts[name] = {key: mapping[key] for key in filter(None, mapping)}
    if "X" in adata.file:  # anndata raises an error if not
        parts["X"] = adata.X
    if adata.raw is not None:
        parts["raw"] = adata.raw
    for name, part in parts.items():
        write_dispatched(group, name, part, callback=write_part)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?i).*consolidated metadata")  # which anndata writes in format 3, too
        zarr.consolidate_metadata(group.store)


def _copy_matrix(matrix: CSRDataset | CSCDataset | h5py.Dataset, group: Any, name: str) -> None:
    """Copy a matrix to a group of a zarr, by rows, or by columns if it is stored by columns."""
    if isinstance(matrix, h5py.Dataset):
        n, width = len(matrix), int(np.prod(matrix.shape[1:]))
        step = max(_CHUNK // max(width, 1), 1)
        write_elem(group, name, matrix[:0], dataset_kwargs={"chunks": (step, *matrix.shape[1:])})
        for start in range(0, n, _CHUNKS * step):
            group[name].append(matrix[start : start + _CHUNKS * step])
        return
    by_row = matrix.format == "csr"
    empty = matrix[:0] if by_row else matrix[:, :0]
    write_elem(group, name, empty, dataset_kwargs={"chunks": (_CHUNK,), "indptr_dtype": np.dtype(np.int64)})
    copy, indptr = sparse_dataset(group[name]), matrix.group["indptr"][:]
    start = 0
    while start < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, indptr[start] + _CHUNKS * _CHUNK, side="right")) - 1
        stop = max(stop, start + 1)  # a single row may have more
        copy.append(matrix[start:stop] if by_row else matrix[:, start:stop])
        start = stop
