"""Read and write the h5ad files of the verbs."""

from __future__ import annotations

from pathlib import Path

from anndata import AnnData

from ..genes.whole_files import whole_file
from ..sources.formats import local_path
from ..sources.read_anndata import read_anndata


def read(
    data: str, output: str | None = None, overwrite: bool = False, layer: str | None = None
) -> tuple[AnnData, str | None]:
    """Read the input, after checking the path of the output file; see `read_anndata`.

    Raises
    ------
    FileExistsError
        The output exists, and `overwrite` is False.
    ValueError
        The input holds no AnnData; output and input are the same file; the output is a folder.
    """
    if not local_path(data).exists():
        raise FileNotFoundError(f"No such file: {data}")
    if output is not None:
        _check_output(data, Path(output), overwrite)
    return read_anndata(data, layer)


def _check_output(data: str, output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; pass a file in it.")
    if output.exists():
        if output.samefile(data):
            raise ValueError(f"--output is the input, {data}; choose another file.")
        if not overwrite:
            raise FileExistsError(f"{output} exists. Choose another --output, or pass --overwrite.")


def write(adata: AnnData, output: str) -> None:
    """Write the file atomically."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        adata.write_h5ad(part, compression="gzip")
