"""Samplers: in which order the rows of a store are learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np

from ..store.cell_store import block_order
from .length_sampler import ResumableSampler, checksum


class BlockShuffleSampler(ResumableSampler[int]):
    """Rows in a random order, but for blocks of neighbours on disk, which stay together and are read at once.

    The order is a function of (seed, epoch); it is that of `CellStore.block_shuffle`.

    Parameters
    ----------
    store : CellStore, or anything with a length
        Whose row numbers are given.
    block_size : int, default: 16
        Rows a block; 1 gives a full shuffle.
    seed : int, default: 0
        Of the order.
    rank, world_size : int, default: 0, 1
        Which of how many equal parts of the order to give; their sizes differ by at most one row. Leave them where
        accelerate or Trainer prepares the loader, which divides the batches itself.

    Raises
    ------
    ValueError
        A rank outside the world; no rows in a block.
    """

    def __init__(self, store: Sized, block_size: int = 16, seed: int = 0, *, rank: int = 0, world_size: int = 1):
        super().__init__(seed, rank, world_size)
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block has at least one row.")
        self.store, self.block_size = store, block_size

    def __len__(self) -> int:
        """Count the rows of an epoch of this rank."""
        start, stop = self._range()
        return stop - start

    def _sequence(self, start: int) -> Iterator[int]:
        first, stop = self._range()
        yield from block_order(len(self.store), self.block_size, self.seed, self.epoch)[first + start : stop].tolist()

    def _settings(self) -> dict[str, int]:
        return {
            "n_rows": len(self.store),
            "block_size": self.block_size,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def _range(self) -> tuple[int, int]:
        n_rows = len(self.store)
        return self.rank * n_rows // self.world_size, (self.rank + 1) * n_rows // self.world_size


class SameSourceSampler(ResumableSampler[int]):
    """Rows in a random order in which batches of consecutive rows are of one source.

    The rows of each source are permuted and cut into batches, and the full batches of all sources come in a random
    order. The rest of each source follows, source after source: only there can a batch have rows of several sources.
    The order is a function of (seed, epoch).

    Parameters
    ----------
    sources : int array (n,)
        Source of each row.
    batch_size : int
        Rows per batch of one process; `EvenBatchSampler` with as many divides the batches among processes.
    seed : int, default: 0
        Of the order.

    Raises
    ------
    ValueError
        No rows in a batch.
    """

    def __init__(self, sources: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(seed, 0, 1)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one row.")
        self.sources, self.batch_size = np.asarray(sources, np.int64), batch_size

    def __len__(self) -> int:
        """Count the rows of an epoch."""
        return len(self.sources)

    def _sequence(self, start: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(len(self.sources))
        rows = rows[np.argsort(self.sources[rows], kind="stable")]
        _, first, sizes = np.unique(self.sources[rows], return_index=True, return_counts=True)
        place = np.arange(len(rows)) - np.repeat(first, sizes)
        in_full = place < np.repeat(sizes // self.batch_size * self.batch_size, sizes)
        full = rng.permutation(rows[in_full].reshape(-1, self.batch_size)).ravel()
        yield from np.concatenate([full, rows[~in_full]])[start:].tolist()

    def _settings(self) -> dict[str, object]:
        return {"sources": checksum(self.sources), "batch_size": self.batch_size, "seed": self.seed}


__all__ = ["BlockShuffleSampler", "SameSourceSampler"]
