"""SingleCellCollection: datasets of many files in one folder, and their concatenation."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import __version__
from ..sources.open_source import _key
from ..store.shards import write_json
from .scdl import SingleCellMemMapDataset
from .scdl_building import unite

_RECORD = "collection.json"


class SingleCellCollection:
    """Datasets of many files, one per file, in one folder.

    Parameters
    ----------
    data_path : str or Path
        The folder, created with the first dataset. A file that was converted before is not converted again, unless the
        file or the options have changed.

    Attributes
    ----------
    data_path : Path
    datasets : dict of Path to SingleCellMemMapDataset
        The dataset of each loaded file; all methods count and concatenate them in the order of the paths.
    """

    def __init__(self, data_path: str | Path):
        self.data_path = Path(data_path)
        self.datasets: dict[Path, SingleCellMemMapDataset] = {}

    def load_h5ad(self, h5ad_path: str | Path, **options: Any) -> None:
        """Convert a file and add it; options and errors are those of `SingleCellMemMapDataset`."""
        file = Path(h5ad_path)
        self.datasets[file] = _convert(file, self._place(file, options), options)

    def load_h5ad_multi(
        self, directory_path: str | Path, max_workers: int = 5, use_processes: bool = False, **options: Any
    ) -> None:
        """Convert all h5ad files of a folder and its subfolders, and add them.

        Parameters
        ----------
        directory_path : str or Path
            The folder. Hidden files and folders in it are ignored.
        max_workers : int, default: 5
            Number of files read at a time.
        use_processes : bool, default: False
            Read in processes instead of threads. As always with multiprocessing, the main part of a script must then
            be under `if __name__ == "__main__":`.
        **options
            Options of `SingleCellMemMapDataset`, such as `load_neighbors` or `data_dtype`.

        Raises
        ------
        FileNotFoundError
            There is no h5ad file in the folder.
        RuntimeError
            A file could not be converted; the message names it and the reason. No file is then added; converted files
            are not converted again in the next call.
        """
        folder = Path(directory_path)
        found = [file for file in folder.rglob("*.h5ad") if file.is_file()]
        files = sorted(file for file in found if "/." not in f"/{file.relative_to(folder).as_posix()}")  # not hidden
        if not files:
            raise FileNotFoundError(f"There are no h5ad files in {directory_path}.")
        datasets, places = {}, [self._place(file, options) for file in files]
        if use_processes:  # not forked, which threads of Arrow and torch do not survive
            pool: Executor = ProcessPoolExecutor(max_workers, mp_context=multiprocessing.get_context("spawn"))
        else:
            pool = ThreadPoolExecutor(max_workers)
        try:
            running = [pool.submit(_convert, file, place, options) for file, place in zip(files, places, strict=True)]
            for file, done in zip(files, running, strict=True):
                try:
                    datasets[file] = done.result()
                except Exception as error:
                    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
                    raise RuntimeError(f"{file} could not be converted: {kind}{error}") from error
        finally:
            pool.shutdown(cancel_futures=True)
        self.datasets.update(datasets)

    def _place(self, file: Path, options: dict[str, Any]) -> Path:
        """Choose the folder of a file's dataset, and record it.

        Files with the same name in different folders get separate folders. A dataset made from an earlier version of
        the file, or with other options, is removed.
        """
        record = self.data_path / _RECORD
        known = json.loads(record.read_text()) if record.exists() else {}
        key = {**_key(file), "options": {name: str(value) for name, value in sorted(options.items())}}
        name = next((name for name, other in known.items() if other["path"] == key["path"]), None)
        if name is None:
            taken = {other.lower() for other in [_RECORD, *known]}  # some file systems are case-insensitive
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
        """Count all values, including zeros: rows times variables of each dataset, summed."""
        return sum(dataset.number_of_values() for dataset in self.datasets.values())

    def number_nonzero_values(self) -> int:
        """Count the stored values."""
        return sum(dataset.number_nonzero_values() for dataset in self.datasets.values())

    def sparsity(self) -> float:
        """Compute the share of zeros among all values; 0 if there are no values."""
        n_values = self.number_of_values()
        return 1 - self.number_nonzero_values() / n_values if n_values else 0.0

    def number_of_variables(self) -> list[int]:
        """Count the genes of each block of rows with the same genes; `[0]` if there are no rows."""
        blocks: list[list[str]] = []
        for dataset in self._sorted():
            genes = dataset.store.gene_ids.tolist()
            if not blocks or blocks[-1] != genes:
                blocks.append(genes)
        return [len(genes) for genes in blocks] or [0]

    def shape(self) -> tuple[int, list[int]]:
        """Return the number of rows, and `number_of_variables`."""
        return self.number_of_rows(), self.number_of_variables()

    def version(self) -> str:
        """Return the name and version of the software that writes the datasets."""
        return f"stformer_hf {__version__}"

    def flatten(
        self, output_path: str | Path, destroy_on_copy: bool = False, extend_copy_size: int | None = None
    ) -> None:
        """Concatenate all datasets, in the order of the paths, with the genes and obs columns of all.

        Parameters
        ----------
        output_path : str or Path
            Folder to create; `SingleCellMemMapDataset(output_path)` opens it.
        destroy_on_copy : bool, default: False
            Remove the datasets of the collection once they are written; it is then empty.
        extend_copy_size : int, optional
            No effect; in SCDL, the number of bytes copied at a time.

        Raises
        ------
        ValueError
            There are no datasets; only some of them have neighbours.
        FileExistsError
            The path exists.
        """
        if not self.datasets:
            raise ValueError(f"The collection at {self.data_path} is empty: load files first.")
        unite(Path(output_path), [dataset.store for dataset in self._sorted()])
        if destroy_on_copy:
            for dataset in self.datasets.values():
                shutil.rmtree(dataset.data_path)
            self.datasets = {}


def _convert(file: Path, place: Path, options: dict[str, Any]) -> SingleCellMemMapDataset:
    # An existing dataset is complete, and belongs to this file.
    return SingleCellMemMapDataset(place, None if place.exists() else file, **options)
