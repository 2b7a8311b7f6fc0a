"""SingleCellCollection: datasets of many files in one folder, and one dataset of them all."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..sources.open_source import _key
from ..store.shards import write_json
from .scdl import SingleCellMemMapDataset
from .scdl_building import unite

_RECORD = "collection.json"


class SingleCellCollection:
    """Datasets of many files, one a file, in one folder.

    Parameters
    ----------
    data_path : str or Path
        The folder; made with the first dataset. A file that was converted there before is not converted again, unless
        it, or the options, changed since.

    Attributes
    ----------
    data_path : Path
    datasets : dict of Path to SingleCellMemMapDataset
        Of each file that was loaded; everything below counts and unites them in the order of the files' paths.
    """

    def __init__(self, data_path: str | Path):
        self.data_path = Path(data_path)
        self.datasets: dict[Path, SingleCellMemMapDataset] = {}

    def load_h5ad(self, h5ad_path: str | Path, **options: Any) -> None:
        """Convert a file and add it.

        Parameters
        ----------
        h5ad_path : str or Path
            The file.
        **options
            Of `SingleCellMemMapDataset`, such as `load_neighbors` or `data_dtype`.

        Raises
        ------
        FileNotFoundError, ValueError
            As of `SingleCellMemMapDataset`.
        """
        file = Path(h5ad_path)
        self.datasets[file] = _convert(file, self._place(file, options), options)

    def load_h5ad_multi(
        self, directory_path: str | Path, max_workers: int = 5, use_processes: bool = False, **options: Any
    ) -> None:
        """Convert all h5ad files in a folder and the folders in it, and add them.

        Parameters
        ----------
        directory_path : str or Path
            The folder. Hidden files and folders in it are left out.
        max_workers : int, default: 5
            Files that are read at a time.
        use_processes : bool, default: False
            Read in processes, not in threads. Needs, as all of multiprocessing, a script's main part under
            `if __name__ == "__main__":`.
        **options
            Of `SingleCellMemMapDataset`, such as `load_neighbors` or `data_dtype`.

        Raises
        ------
        FileNotFoundError
            There is no h5ad file in the folder.
        RuntimeError
            A file could not be converted; the message names it and says why. No file is added then; called again,
            those that were done are not converted again.
        """
        files = sorted(_h5ad_files(Path(directory_path)))
        if not files:
            raise FileNotFoundError(f"There are no h5ad files in {directory_path}.")
        places = [self._place(file, options) for file in files]
        datasets = {}
        with _pool(max_workers, use_processes) as pool:
            running = [pool.submit(_convert, file, place, options) for file, place in zip(files, places, strict=True)]
            for file, done in zip(files, running, strict=True):
                try:
                    datasets[file] = done.result()
                except Exception as error:
                    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
                    raise RuntimeError(f"{file} could not be converted: {kind}{error}") from error
        self.datasets.update(datasets)

    def _place(self, file: Path, options: dict[str, Any]) -> Path:
        """Find the folder of a file's dataset, and note that it is this file's.

        Files of one name in different folders get folders of their own. A dataset that was made of the file as it was,
        or with other options, goes.
        """
        record = self.data_path / _RECORD
        known = json.loads(record.read_text()) if record.exists() else {}
        key = {**_key(file), "options": {name: str(value) for name, value in sorted(options.items())}}
        name = next((name for name, other in known.items() if other["path"] == key["path"]), None)
        if name is None:
            taken = {other.lower() for other in [_RECORD, *known]}  # some file systems do not tell a from A
            names = itertools.chain([file.stem], (f"{file.stem}-{i}" for i in itertools.count(1)))
            name = next(new for new in names if new.lower() not in taken and not (self.data_path / new).exists())
        elif known[name] != key:
            shutil.rmtree(self.data_path / name, ignore_errors=True)
        self.data_path.mkdir(parents=True, exist_ok=True)
        write_json(record, {**known, name: key})
        return self.data_path / name

    def _sorted(self) -> list[SingleCellMemMapDataset]:
        return [self.datasets[file] for file in sorted(self.datasets)]

    def number_of_rows(self) -> int:
        """Count the cells."""
        return sum(dataset.number_of_rows() for dataset in self.datasets.values())

    def number_of_values(self) -> int:
        """Count all values, the zeros too: rows times variables of each dataset, summed."""
        return sum(dataset.number_of_values() for dataset in self.datasets.values())

    def number_nonzero_values(self) -> int:
        """Count the values that are stored."""
        return sum(dataset.number_nonzero_values() for dataset in self.datasets.values())

    def sparsity(self) -> float:
        """Share of zeros among all values; 0 where there are no values."""
        n_values = self.number_of_values()
        return 1 - self.number_nonzero_values() / n_values if n_values else 0.0

    def number_of_variables(self) -> list[int]:
        """Count the genes of every block of rows with the same genes; `[0]` if there are no rows."""
        blocks: list[list[str]] = []
        for dataset in self._sorted():
            genes = dataset.store.gene_ids.tolist()
            if not blocks or blocks[-1] != genes:
                blocks.append(genes)
        return [len(genes) for genes in blocks] or [0]

    def shape(self) -> tuple[int, list[int]]:
        """Give the number of rows, and `number_of_variables`."""
        return self.number_of_rows(), self.number_of_variables()

    def version(self) -> str:
        """Name the software that writes the datasets, and its version."""
        return f"stformer_hf {version('stformer_hf')}"

    def flatten(
        self, output_path: str | Path, destroy_on_copy: bool = False, extend_copy_size: int | None = None
    ) -> None:
        """Write all datasets as one, in the order of the files' paths, with the genes and obs columns of all.

        Parameters
        ----------
        output_path : str or Path
            Folder to make; `SingleCellMemMapDataset(output_path)` opens it.
        destroy_on_copy : bool, default: False
            Remove the datasets of the collection once they are written; it is empty then.
        extend_copy_size : int, optional
            Without effect; SCDL copies so many bytes at a time.

        Raises
        ------
        ValueError
            There are no datasets; some have neighbours and some have none.
        FileExistsError
            There is something at the path.
        """
        if not self.datasets:
            raise ValueError(f"The collection at {self.data_path} is empty: load files first.")
        unite(Path(output_path), [dataset.store for dataset in self._sorted()])
        if destroy_on_copy:
            for dataset in self.datasets.values():
                shutil.rmtree(dataset.data_path)
            self.datasets = {}


def _h5ad_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*.h5ad"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file


def _convert(file: Path, place: Path, options: dict[str, Any]) -> SingleCellMemMapDataset:
    # What is at the place is whole, and of this file.
    return SingleCellMemMapDataset(place, None if place.exists() else file, **options)


@contextmanager
def _pool(max_workers: int, use_processes: bool) -> Iterator[Executor]:
    if use_processes:  # not forked: threads of Arrow and torch do not survive it
        pool: Executor = ProcessPoolExecutor(max_workers, mp_context=multiprocessing.get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(max_workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


__all__ = ["SingleCellCollection"]
