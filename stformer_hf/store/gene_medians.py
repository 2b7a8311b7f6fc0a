"""estimate_gene_medians: gene statistics of stores, files and AnnData objects, computed block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from tqdm.auto import tqdm

from ..genes.statistics import MAX_MEMORY, GeneStatistics
from ..genes.unite import unite
from ..sources.formats import expand
from ..sources.matrices import MemoryMatrix
from ..sources.open_source import open_source
from .engines import check_engine, run_tasks, runs_here
from .reader import StoreReader

logger = logging.getLogger(__name__)

_CELLS_AT_ONCE = 1024
_CELLS_OF_PART = 65_536  # sums are of parts, then of their sums: the same numbers on any number of workers


def estimate_gene_medians(
    source: AnnData | StoreReader | str | Path | Iterable[AnnData | StoreReader | str | Path],
    target_sum: float = 1e4,
    *,
    method: str = "auto",
    max_memory: int = MAX_MEMORY,
    layer: str | None = None,
    fractional: bool = False,
    aliases: Mapping[str, str] | pd.DataFrame | str | Path | None = None,
    unify: str | None = None,
    workers: int = 1,
    engine: str = "local",
) -> GeneStatistics:
    """Estimate the median of the non-zero values of each gene, as the rank scheme of `GeneTokenizer` needs.

    A value is count / total counts of the cell * `target_sum`; cells without counts are skipped. Counts are read block
    by block and stay sparse.

    Parameters
    ----------
    source : AnnData, MuData, SpatialData, CellStore, str, Path, or an iterable of them
        As in `CellStore.build`: AnnData objects, stores and selections of them, files, folders and patterns. The genes
        of multiple sources are merged by id.
    target_sum : float, default: 10,000
        Sum of the values of a cell.
    method : {"auto", "exact", "sketch"}, default: "auto"
        `exact` keeps every count. `sketch` takes about 4 kB per gene for any number of cells; its medians are off by
        at most 0.75 %. `auto` is exact while the counts fit into `max_memory`, then a sketch.
    max_memory : int, default: 1 GB
        Limit for the counts that `auto` keeps, in bytes.
    layer : str, optional
        Where the counts are, in every source; as in `CellStore.build`.
    fractional : bool, default: False
        Allow fractional counts (RSEM, SoupX).
    aliases : mapping, DataFrame or file, optional
        Old gene id (or name) -> new id.
    unify : "symbol", optional
        Merge genes of different sources that have the same symbol under different ids.
    workers : int, default: 1
        Number of processes that read stores and files, 65,536 cells at a time; AnnData objects in memory are read by
        this process. The result is the same, bit for bit. As always with multiprocessing, the main part of a script
        must be under `if __name__ == "__main__":`.
    engine : {"local", "ray"}, default: "local"
        Where these processes run; as in `CellStore.build`.

    Returns
    -------
    GeneStatistics
        Pass its `medians` to `GeneTokenizer(…, scheme="rank", medians=…)`. It can be saved, and merged with others.

    Raises
    ------
    ValueError
        There are no sources, no cells or no counts; values are not counts; sources are of different species; the
        target sum is not positive; the method is unknown.
    FileNotFoundError
        A file does not exist.

    Examples
    --------
    >>> medians = estimate_gene_medians(store).medians
    >>> tokenizer = GeneTokenizer.from_store(store, scheme="rank", medians=medians)
    """
    check_engine(engine, workers)
    GeneStatistics([], target_sum=target_sum, method=method, max_memory=max_memory)  # raises before files are read
    sources = [open_source(found, layer, fractional) for found in expand(source)]
    if not sources:
        raise ValueError("No sources: pass at least one AnnData, store or file.")
    united = unite([found.genes for found in sources], [found.name for found in sources], aliases=aliases, unify=unify)
    settings = {"target_sum": target_sum, "method": method, "max_memory": max_memory}
    counts = [found.align(genes) for found, genes in zip(sources, united.rows, strict=True)]
    work = _Work(united.genes.gene_ids, united.genes.symbols, settings, counts)
    n_cells = sum(found.shape[0] for found in sources)
    with tqdm(total=n_cells, desc="gene medians", unit="cell", disable=None) as bar:
        if runs_here(engine, workers):
            statistics = work.begin()
            for part in work.parts():
                with statistics.as_one_part():
                    work.add(statistics, part, bar.update)
        else:
            statistics = _by_workers(work, workers, engine, bar.update)
    names = ", ".join(found.name for found in sources[:3]) + (", …" if len(sources) > 3 else "")
    if not n_cells:
        raise ValueError(f"{names}: no cells.")
    if not statistics.n_cells:
        raise ValueError(f"{names}: none of the {n_cells} cells has counts.")
    if statistics.n_cells < n_cells:
        logger.warning(f"{n_cells - statistics.n_cells} of {n_cells} cells have no counts; they are skipped.")
    return statistics


class _Part(NamedTuple):
    """A range of cells of a source."""

    source: int
    start: int
    stop: int


@dataclass
class _Work:
    """Sources, and the statistics to compute of them."""

    gene_ids: np.ndarray
    symbols: np.ndarray
    settings: dict[str, Any]
    sources: list[Any]  # of AlignedCounts; None where another process reads

    def begin(self) -> GeneStatistics:
        """Return statistics of no cells."""
        return GeneStatistics(self.gene_ids, self.symbols, **self.settings)

    def parts(self) -> list[_Part]:
        """Cut the sources into parts, in order."""
        parts = []
        for number, source in enumerate(self.sources):
            n_cells = source.matrix.shape[0]
            step = _CELLS_OF_PART if source.matrix.seekable else max(1, n_cells)
            parts += [_Part(number, start, min(start + step, n_cells)) for start in range(0, n_cells, step)]
        return parts

    def add(
        self, statistics: GeneStatistics, part: _Part, progress: Callable[[int], object] = lambda n_cells: None
    ) -> None:
        """Add the cells of a part to statistics."""
        source = self.sources[part.source]
        try:
            for block in source.blocks(_CELLS_AT_ONCE, part.start, part.stop):
                statistics.add(block, source.genes)
                progress(block.shape[0])
        finally:
            source.matrix.close()


def _statistics_of(work: _Work, argument: tuple[_Part, bool]) -> GeneStatistics:
    """Compute the statistics of a part; of those to be sketched, counts are not kept."""
    part, sketched = argument
    settings = {**work.settings, "method": "sketch"} if sketched else work.settings
    statistics = GeneStatistics(work.gene_ids, work.symbols, **settings)
    work.add(statistics, part)
    return statistics


def _by_workers(work: _Work, workers: int, engine: str, progress: Callable[[int], object]) -> GeneStatistics:
    """Compute the statistics of the parts, those of files and stores by workers, and merge them in order."""
    parts = work.parts()
    here = {number for number, source in enumerate(work.sources) if isinstance(source.matrix, MemoryMatrix)}
    sent = [number for number, part in enumerate(parts) if part.source not in here]
    readable = [None if number in here else source for number, source in enumerate(work.sources)]
    statistics, found = work.begin(), {}
    with run_tasks(
        _statistics_of,
        # What is added to a sketch is sketched by the workers.
        ((parts[number], statistics.method == "sketch") for number in sent),
        shared=replace(work, sources=readable),
        workers=workers,
        engine=engine,
        ahead=2 * workers,
    ) as results:
        for number, part in enumerate(parts):
            if part.source in here:
                found[number] = _statistics_of(work, (part, False))
            while number not in found:
                at, result = next(results)
                found[sent[at]] = result
            statistics = statistics.merge(found.pop(number))
            progress(part.stop - part.start)
    return statistics
