"""Samplers: in which order the rows of a store are learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from ..data.cell_store import block_order
from .length_sampler import ResumableSampler


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


__all__ = ["BlockShuffleSampler"]
