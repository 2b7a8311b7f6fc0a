"""Read the cells that commands take, and write what they found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import h5py
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from anndata import AnnData
from anndata.io import write_elem

from ..genes.whole_files import whole_file
from ..sources.formats import local_path, remote_folder
from ..sources.read_anndata import read_anndata
from ..store.cell_store import CellStore
from ..store.replacing import locked
from .arguments import check_free


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
        return CellStore(data), None
    adata, layer = read_anndata(data, layer, backed=blockwise)
    if output is not None and Path(output).suffix.lower() == ".zarr":
        _check_names(adata, output)
    if adata.isbacked and isinstance(adata.file["obs"], h5py.Dataset):  # anndata < 0.7, which `write` cannot add to
        return adata.to_memory(), layer
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


def _check_names(adata: AnnData, output: str) -> None:
    """Raise a ValueError for a name that a zarr cannot hold, before the work."""
    for part in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
        for name in getattr(adata, part):
            if "/" in str(name):
                raise ValueError(
                    f"--output {output}: a zarr cannot hold names with a slash, such as {part}[{str(name)!r}]. Rename "
                    "it, or write .h5ad."
                )


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

    An h5ad of an AnnData on disk is a copy of its file with the new obs, obsm and uns. With several processes, only
    the first one writes.
    """
    if not is_first_process():
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        if path.suffix.lower() == ".csv":
            adata.obs[list(columns)].to_csv(part)
        elif path.suffix.lower() == ".zarr":
            (adata.to_memory() if adata.isbacked else adata).write_zarr(part)
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
