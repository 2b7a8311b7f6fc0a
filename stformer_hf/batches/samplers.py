"""Samplers: the order of the rows of a store in training."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np

from ..store.cell_store import block_order
from .length_sampler import ResumableSampler, checksum


class BlockShuffleSampler(ResumableSampler[int]):
    """Rows in a random order of blocks; the rows of a block are adjacent on disk, and are read at once.

    The order is a function of (seed, epoch); it is that of `CellStore.block_shuffle`.

    Parameters
    ----------
    store : CellStore, or anything with a length
        The rows to sample.
    block_size : int, default: 16
        Rows per block; 1 is a full shuffle.
    seed : int, default: 0
        Seed of the order.
    rank, world_size : int, default: 0, 1
        Which of how many equal parts of the order to return; their sizes differ by at most one row. Keep the defaults
        if accelerate or Trainer prepares the loader, which divides the batches itself.

    Raises
    ------
    ValueError
        The rank is outside the world, or the block size is below 1.
    """

    def __init__(self, store: Sized, block_size: int = 16, seed: int = 0, *, rank: int = 0, world_size: int = 1):
        super().__init__(seed, rank, world_size)
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block needs at least one row.")
        self.store, self.block_size = store, block_size

    def __len__(self) -> int:
        """Return the number of rows of this rank in an epoch."""
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
    """Rows in a random order in which the rows of a batch come from one source.

    The rows of each source are permuted and split into batches, and the full batches of all sources come in a random
    order. The remaining rows follow, source after source; only there can a batch have rows of multiple sources. The
    order is a function of (seed, epoch).

    Parameters
    ----------
    sources : int array (n,)
        Source of each row.
    batch_size : int
        Rows per batch of one process; `EvenBatchSampler` with the same batch size divides the batches among processes.
    seed : int, default: 0
        Seed of the order.

    Raises
    ------
    ValueError
        The batch size is below 1.
    """

    def __init__(self, sources: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(seed, 0, 1)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one row.")
        self.sources, self.batch_size = np.asarray(sources, np.int64), batch_size

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
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
