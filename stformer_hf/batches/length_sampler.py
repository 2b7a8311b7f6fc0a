"""Samplers that group rows by length: batches of cells with similar lengths have little padding."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from .draws import Draw, draw_of
from .lengths import known_lengths

logger = logging.getLogger(__name__)
Drawn = TypeVar("Drawn", int, list[int])


def check_rank(rank: int | None, world_size: int, seed: int = 0) -> None:
    """Raise ValueError for a rank outside the world, or a negative seed."""
    if world_size < 1 or not 0 <= (rank or 0) < world_size:
        raise ValueError(f"rank={rank} of world_size={world_size}: ranks must be 0 to world_size - 1.")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0.")


def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError for a size below 1; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: must be at least 1.")


def values_of(sampler: Any, *names: str) -> dict[str, Any]:
    """Return some attributes of a sampler, for its settings."""
    return {name: getattr(sampler, name) for name in names}


class ResumableSampler(Sampler[Drawn]):
    """Base class of samplers whose sequence is a function of (seed, epoch), and that can resume anywhere in it.

    A subclass defines the sequence of an epoch, its length, and the settings that it depends on.
    """

    def __init__(self, seed: int, rank: int | None, world_size: int):
        check_rank(rank, world_size, seed)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self._taken, self._loaded = 0, False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _sequence(self, start: int) -> Iterator[Drawn]:
        """Yield what this rank draws in the epoch, from position `start` on."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return what the sequence depends on, except the epoch and the rank, as plain values."""

    def __iter__(self) -> Iterator[Drawn]:
        if not self._loaded:
            self._taken = 0
        self._loaded = False
        for drawn in self._sequence(self._taken):
            self._taken += 1
            yield drawn

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before the epoch begins."""
        if epoch != self.epoch:
            self._taken, self._loaded = 0, False
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return how much of the epoch was drawn, as plain values for `load_state_dict`.

        A loader with workers, or one prepared by accelerate, draws ahead of the batches that it delivers: use
        `state_after` there.
        """
        return self.state_after(self._taken)

    def state_after(self, n_drawn: int) -> dict[str, Any]:
        """Return the state after `n_drawn` rows or batches of the epoch, including those before a resumption.

        Parameters
        ----------
        n_drawn : int
            Number that this rank used: rows for a sampler of rows, batches for a sampler of batches.

        Raises
        ------
        ValueError
            The epoch has fewer.
        """
        if not 0 <= n_drawn <= len(self):
            raise ValueError(f"n_drawn={n_drawn}, but an epoch has {len(self)}.")
        return {"epoch": self.epoch, "taken": n_drawn, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state: the next iteration returns the rest of its epoch, later ones whole epochs.

        Raises
        ------
        ValueError
            The state belongs to other lengths or settings.
        """
        check_settings(self._settings(), state, "sampler")
        self.epoch, self._taken, self._loaded = state["epoch"], state["taken"], True


def as_ints(rows: np.ndarray) -> Iterator[int]:
    """Yield rows as Python integers, in chunks, so that they are never all in memory."""
    for start in range(0, len(rows), 1 << 16):
        yield from rows[start : start + (1 << 16)].tolist()


class LengthGroupedSampler(ResumableSampler[int]):
    """Rows in a random order in which the rows of a batch have similar lengths.

    The rows of an epoch, by default a random permutation, are split into mega-batches, and each is sorted by length,
    descending. The longest row of the epoch comes first, so that running out of memory shows at the first step. The
    order is a function of (seed, epoch), and differs between epochs.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Number of tokens per row; see `known_lengths`.
    batch_size : int
        Rows per batch. If ranks, or steps of gradient accumulation, take batches in turn from one sampler, pass the
        rows of all of them together, so that those of a step have similar lengths.
    mega_batch : int, default: 50
        Maximum number of batches per mega-batch. Larger values make the lengths in a batch more similar, and the order
        less random; there are at least four mega-batches, if there are as many batches.
    seed : int, default: 0
        Seed of the order.
    rank, world_size : int, default: 0, 1
        Which rank's rows to return: each rank takes `batch_size` of every `batch_size * world_size` rows. Keep the
        defaults if accelerate or Trainer prepares the loader, which divides the batches itself.
    drop_last : bool, default: False
        Drop the last rows, which do not fill a batch of every rank. Otherwise ranks share them equally, to within one
        row; all ranks have equally many batches, and every row comes once. Only if fewer rows than ranks are left do
        some come twice, which is logged.
    draw : Draw, optional
        The rows of an epoch, such as a `WeightedDraw`; by default every row once.

    Raises
    ------
    ValueError
        The batch size is below 1; lengths are unknown, or not integers; the rank is outside the world; the draw has
        another number of rows.

    Notes
    -----
    The scheme is that of CancerStFormer, and of `group_by_length` in transformers.
    """

    rank: int

    def __init__(
        self,
        lengths: Any,
        batch_size: int,
        *,
        mega_batch: int = 50,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        draw: Draw | None = None,
    ):
        super().__init__(seed, rank, world_size)
        check_sizes(batch_size=batch_size, mega_batch=mega_batch)
        self.lengths = known_lengths(lengths)
        self.draw = draw_of(draw, len(self.lengths))
        self.batch_size, self.mega_batch, self.drop_last = batch_size, mega_batch, drop_last
        n_left = len(self.draw) % (batch_size * world_size)
        if 0 < n_left < world_size and not drop_last:
            _warn_of_repeats(world_size - n_left)

    def __len__(self) -> int:
        """Return the number of rows of this rank in an epoch."""
        n_steps, n_left = divmod(len(self.draw), self.batch_size * self.world_size)
        start, stop = self._share(n_left)
        return n_steps * self.batch_size + stop - start

    def _sequence(self, start: int) -> Iterator[int]:
        order = self._order()
        in_step = self.batch_size * self.world_size
        n_whole = len(order) // in_step * in_step
        whole = order[:n_whole].reshape(-1, self.world_size, self.batch_size)[:, self.rank].ravel()
        rest = order[n_whole:]
        if 0 < len(rest) < self.world_size:
            rest = np.concatenate([rest, np.resize(order, self.world_size - len(rest))])
        rest = rest[slice(*self._share(len(order) - n_whole))]
        yield from as_ints(np.concatenate([whole, rest])[start:])

    def _order(self) -> np.ndarray:
        """Return the rows of all ranks in the order of the epoch."""
        order = self.draw(np.random.default_rng([self.seed, self.epoch]))
        if not len(order):
            return order
        longest = self.lengths[order].argmax()
        order[[0, longest]] = order[[longest, 0]]
        in_step = self.batch_size * self.world_size
        n_steps = max(1, min(self.mega_batch, len(order) // (4 * in_step)))
        mega_batches = np.arange(len(order)) // (n_steps * in_step)
        return order[np.lexsort((-self.lengths[order], mega_batches))]

    def _share(self, n_left: int) -> tuple[int, int]:
        """Return this rank's range of the last rows, which do not fill a batch of every rank."""
        if n_left and not self.drop_last:
            n_left = max(n_left, self.world_size)
            return self.rank * n_left // self.world_size, (self.rank + 1) * n_left // self.world_size
        return 0, 0

    def _settings(self) -> dict[str, Any]:
        return {
            "lengths": checksum(self.lengths),
            **values_of(self, "batch_size", "mega_batch", "seed", "world_size", "drop_last"),
            **self.draw.settings(),
        }


class EvenBatchSampler(Sampler[list[int]]):
    """Batches of the rows of a sampler: equally many for each rank, and every row once.

    accelerate's own division fills the last batches with rows from the beginning of the epoch, which are then seen
    twice. Here the last batches are split instead. At most three steps of rows are in memory; what the sampler itself
    needs comes on top: nothing per row for a `BlockShuffleSampler`, 8 bytes for a permutation.

    Parameters
    ----------
    sampler : Sampler of int
        Source of the rows, the same on all ranks.
    batch_size : int
        Maximum number of rows per batch.
    rank : int, optional
        Which rank's batches to return. By default those of all ranks in turn, as accelerate expects: it passes batch i
        to process i % world_size.
    world_size : int, default: 1
        Number of ranks.
    drop_last : bool, default: False
        Drop the last batch if it is not full, and then more until every rank has equally many.

    Raises
    ------
    ValueError
        The batch size is below 1, or the rank is outside the world.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int = 1,
        drop_last: bool = False,
    ):
        check_rank(rank, world_size)
        check_sizes(batch_size=batch_size)
        # Not named batch_size and drop_last: with these names accelerate would assume batches of equal size.
        self.sampler, self._n_rows, self._drop_last = sampler, batch_size, drop_last
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch, of this rank or of all."""
        n_rows = len(self.sampler)
        if self._drop_last:
            n_steps = n_rows // self._n_rows // self.world_size
        else:
            n_steps = -(-n_rows // (self._n_rows * self.world_size))
        return n_steps * (self.world_size if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        drawn, in_step = iter(self.sampler), self._n_rows * self.world_size
        cuts = np.arange(self.world_size + 1) * self._n_rows
        rows = np.fromiter(islice(drawn, 2 * in_step), np.int64)
        first = rows[: self.world_size]
        while len(step := np.fromiter(islice(drawn, in_step), np.int64)):
            yield from batches_of_rank(rows[:in_step], cuts, self.rank, self.world_size)
            rows = np.concatenate([rows[in_step:], step])
        # Only the last rows, of at least one whole step if there is one, must be known to divide the last batches.
        if self._drop_last:
            cuts = np.arange(len(rows) // in_step * self.world_size + 1) * self._n_rows
        else:
            cuts = np.minimum(np.arange(-(-len(rows) // self._n_rows) + 1) * self._n_rows, len(rows))
            rows, cuts = even_out(rows, cuts, self.world_size, first=first)
        yield from batches_of_rank(rows, cuts, self.rank, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, if the sampler has epochs; call it before the epoch begins."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def padding_share(lengths: Any, batches: Iterable[Sequence[int]]) -> float:
    """Return the share of positions that are padding if each batch is padded to its longest row.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Number of tokens per row.
    batches : iterable of sequences of int
        Row numbers of each batch.

    Returns
    -------
    float
        0 (no padding, or no positions) to 1; 1 minus it is the share of useful tokens.
    """
    lengths = known_lengths(lengths)
    n_tokens = n_positions = 0
    for batch in batches:
        of_batch = lengths[np.asarray(batch, np.int64)]
        n_tokens += int(of_batch.sum())
        n_positions += len(of_batch) * int(of_batch.max(initial=0))
    return 1 - n_tokens / n_positions if n_positions else 0.0


def checksum(lengths: np.ndarray) -> str:
    """Return a checksum of lengths, or of other integers."""
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()[:16]


def check_settings(settings: Mapping[str, Any], state: Mapping[str, Any], of_what: str) -> None:
    """Raise ValueError if the settings in a state differ from those of the object that resumes from it."""
    saved = state.get("settings", {})
    other = [name for name in {**settings, **saved} if saved.get(name) != settings.get(name)]
    if other:
        found = ", ".join(f"{name} {saved.get(name)!r} instead of {settings.get(name)!r}" for name in other)
        raise ValueError(f"The state belongs to another {of_what}: {found}. Resume with the same data and settings.")


def even_out(
    rows: np.ndarray, cuts: np.ndarray, world_size: int, n_before: int = 0, *, first: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Make the number of batches, `rows[cuts[i]:cuts[i + 1]]`, a multiple of `world_size` by splitting the last ones.

    `n_before` earlier batches count, but can no longer be split. If there are fewer rows than batches, the `first`
    rows, by default those of `rows`, are repeated, which is logged. Returns new rows and cuts.
    """
    n_batches = len(cuts) - 1
    wanted = -(-(n_before + n_batches) // world_size) * world_size - n_before
    n_repeats = wanted - len(rows)
    if n_repeats > 0:
        _warn_of_repeats(n_repeats)
        cuts = np.concatenate([cuts, len(rows) + 1 + np.arange(n_repeats)])
        rows = np.concatenate([rows, np.resize(rows if first is None else first, n_repeats)])
    begin = max(wanted - world_size, 0)  # first batch of the last step
    while begin > 0 and cuts[-1] - cuts[begin] < wanted - begin:  # too few rows to split
        begin = max(begin - world_size, 0)
    return rows, split(cuts, wanted, begin)


def split(cuts: np.ndarray, n_batches: int, first: int = 0) -> np.ndarray:
    """Halve the largest batches from `first` on, until there are `n_batches`."""
    while (n_more := n_batches - len(cuts) + 1) > 0:
        sizes = np.diff(cuts)
        sizes[:first] = 0
        largest = np.argsort(-sizes, kind="stable")[:n_more]
        largest = largest[sizes[largest] > 1]
        cuts = np.sort(np.concatenate([cuts, cuts[largest] + sizes[largest] // 2]))
    return cuts


def batches_of_rank(
    rows: np.ndarray, cuts: np.ndarray, rank: int | None, world_size: int, start: int = 0
) -> Iterator[list[int]]:
    """Yield the batches of a rank, or (None) of all ranks in turn, from its `start`-th batch on."""
    first, step = (0, 1) if rank is None else (rank, world_size)
    for i in range(first + start * step, len(cuts) - 1, step):
        yield rows[cuts[i] : cuts[i + 1]].tolist()


def _warn_of_repeats(n_rows: int) -> None:
    logger.warning(
        f"{n_rows} rows come twice in an epoch: too few are left for one batch on each rank. Use fewer ranks "
        "or smaller batches, or drop_last=True."
    )


__all__ = ["EvenBatchSampler", "LengthGroupedSampler", "ResumableSampler", "known_lengths", "padding_share"]
