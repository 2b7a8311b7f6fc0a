"""Samplers that do not look at lengths: rows as they are drawn, in shuffled blocks, or from one source per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import numpy as np

from ..store.block_order import ORDER, block_order
from .draws import Draw, Permutation, draw_of
from .length_sampler import ResumableSampler, as_ints, check_sizes, checksum, values_of

_AT_ONCE = 1 << 16  # rows whose order is computed at once
_ASKED = 64  # rows that are asked for at once


class RowSampler(ResumableSampler[int]):
    """Rows in the order in which they are drawn, such as those of a `WeightedDraw`.

    Parameters
    ----------
    draw : Draw
        The rows of an epoch.
    seed : int, default: 0
        Seed of the draw, which is a function of (seed, epoch).
    rank, world_size : int, default: 0, 1
        Which of how many equal parts of the rows to return; their sizes differ by at most one row. All ranks draw the
        same rows, so without replacement theirs are disjoint, and with replacement independent. Keep the defaults if
        accelerate or Trainer prepares the loader, which divides the batches itself.

    Raises
    ------
    ValueError
        The rank is outside the world.
    """

    rank: int

    def __init__(self, draw: Draw, seed: int = 0, *, rank: int = 0, world_size: int = 1):
        super().__init__(seed, rank, world_size)
        self.draw = draw

    def __len__(self) -> int:
        """Return the number of rows of this rank in an epoch."""
        start, stop = self._range()
        return stop - start

    def _sequence(self, start: int) -> Iterator[int]:
        first, stop = self._range()
        yield from as_ints(self.draw(np.random.default_rng([self.seed, self.epoch]))[first + start : stop])

    def _settings(self) -> dict[str, object]:
        return {"n_rows": self.draw.n_rows, **values_of(self, "seed", "world_size"), **self.draw.settings()}

    def _range(self) -> tuple[int, int]:
        n_rows = len(self.draw)
        return self.rank * n_rows // self.world_size, (self.rank + 1) * n_rows // self.world_size


class BlockShuffleSampler(RowSampler):
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
    window : int, default: 1
        Number of blocks whose rows are shuffled together. 512 blocks of 16 rows mix batches almost as a full shuffle
        does, and are read from the disk as blocks: while a window is read, the blocks of the next one are asked for
        (`CellStore.read_ahead`). Two windows should fit into the memory.
    rank, world_size : int, default: 0, 1
        As for `RowSampler`.

    Raises
    ------
    ValueError
        The rank is outside the world, or the block size or the window is below 1.
    """

    def __init__(
        self,
        store: Sized,
        block_size: int = 16,
        seed: int = 0,
        *,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(Permutation(len(store)), seed, rank=rank, world_size=world_size)
        self.store, self.block_size, self.window = store, block_size, window
        self._order(0, 0, window)  # which checks both numbers

    def _order(self, start: int, stop: int, window: int) -> np.ndarray:
        return block_order(len(self.draw), self.block_size, self.seed, self.epoch, start, stop, window=window)

    def _sequence(self, start: int) -> Iterator[int]:
        first, stop = self._range()
        read_ahead = getattr(self.store, "read_ahead", None)
        if self.window > 1 and read_ahead is not None:
            yield from self._in_windows(first + start, stop, read_ahead)
            return
        for begin in range(first + start, stop, _AT_ONCE):  # the whole order is never in memory
            yield from self._order(begin, min(begin + _AT_ONCE, stop), self.window).tolist()

    def _in_windows(self, start: int, stop: int, read_ahead: Callable[[np.ndarray], None]) -> Iterator[int]:
        """Yield the rows from start to stop, and ask for those of the next window a few at a time."""
        size = self.window * self.block_size
        first = start // size * size
        read_ahead(self._order(first, first + size, 1))
        for begin in range(first, stop, size):
            end = begin + size
            rows = self._order(max(begin, start), min(end, stop), self.window)
            following = self._order(end, end + size if end < stop else end, 1)
            for at in range(0, max(len(rows), len(following)), _ASKED):
                read_ahead(following[at : at + _ASKED])
                yield from rows[at : at + _ASKED].tolist()

    def _settings(self) -> dict[str, object]:
        windows = {"window": self.window} if self.window > 1 else {}  # absent from the states of earlier versions
        return {**super()._settings(), "block_size": self.block_size, "order": ORDER, **windows}


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
    draw : Draw, optional
        The rows of an epoch; by default every row once.

    Raises
    ------
    ValueError
        The batch size is below 1, or the draw has another number of rows.
    """

    def __init__(self, sources: np.ndarray, batch_size: int, seed: int = 0, *, draw: Draw | None = None):
        super().__init__(seed, 0, 1)
        check_sizes(batch_size=batch_size)
        self.sources, self.batch_size = np.asarray(sources, np.int64), batch_size
        self.draw = draw_of(draw, len(self.sources))

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self.draw)

    def _sequence(self, start: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = self.draw(rng)
        rows = rows[np.argsort(self.sources[rows], kind="stable")]
        _, first, sizes = np.unique(self.sources[rows], return_index=True, return_counts=True)
        place = np.arange(len(rows)) - np.repeat(first, sizes)
        in_full = place < np.repeat(sizes // self.batch_size * self.batch_size, sizes)
        full = rng.permutation(rows[in_full].reshape(-1, self.batch_size)).ravel()
        yield from as_ints(np.concatenate([full, rows[~in_full]])[start:])

    def _settings(self) -> dict[str, object]:
        own = {"sources": checksum(self.sources), **values_of(self, "batch_size", "seed")}
        return {**own, **self.draw.settings()}
