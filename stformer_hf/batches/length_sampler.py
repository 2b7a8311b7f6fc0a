"""Rows grouped by length: a batch of cells of similar length has little padding."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import ConcatDataset, Sampler, Subset

from .parts import gather

logger = logging.getLogger(__name__)
Drawn = TypeVar("Drawn", int, list[int])


class ResumableSampler(Sampler[Drawn]):
    """A sampler whose sequence is a function of (seed, epoch), and which can go on anywhere in it.

    A subclass gives the sequence of an epoch, its length, and the settings that it depends on.
    """

    def __init__(self, seed: int, rank: int | None, world_size: int):
        if world_size < 1 or not 0 <= (rank or 0) < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
        if seed < 0:
            raise ValueError(f"seed={seed}: seeds start at 0.")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self._taken, self._loaded = 0, False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _sequence(self, start: int) -> Iterator[Drawn]:
        """Give what this rank draws in the epoch, from a position on."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Tell what the sequence depends on, but for the epoch and the rank; plain values."""

    def __iter__(self) -> Iterator[Drawn]:
        if not self._loaded:
            self._taken = 0
        self._loaded = False
        for drawn in self._sequence(self._taken):
            self._taken += 1
            yield drawn

    def set_epoch(self, epoch: int) -> None:
        """Give the order of another epoch; call it before the epoch begins."""
        if epoch != self.epoch:
            self._taken, self._loaded = 0, False
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Tell how much of the epoch was drawn: plain values, for `load_state_dict`.

        A loader with workers, or one that accelerate prepared, draws ahead of the batches that it delivers: there take
        `state_after`.
        """
        return self.state_after(self._taken)

    def state_after(self, n_drawn: int) -> dict[str, Any]:
        """Give the state when so much of the epoch was used, what came before a resumption included.

        Parameters
        ----------
        n_drawn : int
            What this rank used: rows of a sampler of rows, batches of a sampler of batches.

        Raises
        ------
        ValueError
            The epoch has less.
        """
        if not 0 <= n_drawn <= len(self):
            raise ValueError(f"{n_drawn} were used, and an epoch has {len(self)}.")
        return {"epoch": self.epoch, "taken": n_drawn, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the rest of its epoch, later ones whole epochs.

        Raises
        ------
        ValueError
            The state is of other lengths, or of other settings.
        """
        check_settings(self._settings(), state, "sampler")
        self.epoch, self._taken, self._loaded = state["epoch"], state["taken"], True


class LengthGroupedSampler(ResumableSampler[int]):
    """Rows in a random order in which those of a batch have similar lengths.

    A random permutation is cut into mega-batches, and each is sorted by length, descending. The longest row of all
    comes first, so that memory that does not suffice shows at the first step. The order is a function of (seed,
    epoch), drawn anew in each epoch.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Tokens a row; see `known_lengths`.
    batch_size : int
        Rows a batch. Where ranks, or steps of gradient accumulation, take batches in turn from one sampler, give the
        rows of them all together: then those of a step are alike.
    mega_batch : int, default: 50
        Most batches a mega-batch. More of them make batches more alike, and the order less random; there are at least
        four mega-batches, if there are as many batches.
    seed : int, default: 0
        Of the order.
    rank, world_size : int, default: 0, 1
        Which rank's rows to give: of `batch_size * world_size` rows at a time, each takes its `batch_size`. Leave them
        where accelerate or Trainer prepares the loader, which divides the batches itself.
    drop_last : bool, default: False
        Leave out the last rows, which do not fill a batch of every rank. Otherwise ranks share them equally, each to
        within a row; all have equally many batches, and every row comes once. Only where fewer rows than ranks are
        left do some come twice, which is told.

    Raises
    ------
    ValueError
        No rows a batch; lengths that are unknown, or no whole numbers; a rank outside the world.

    Notes
    -----
    The scheme is that of CancerStFormer, and of `group_by_length` in transformers.
    """

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
    ):
        super().__init__(seed, rank, world_size)
        if batch_size < 1 or mega_batch < 1:
            raise ValueError(f"batch_size={batch_size}, mega_batch={mega_batch}: both are 1 or more.")
        self.lengths = known_lengths(lengths)
        self.batch_size, self.mega_batch, self.drop_last = batch_size, mega_batch, drop_last
        n_left = len(self.lengths) % (batch_size * world_size)
        if 0 < n_left < world_size and not drop_last:
            _tell_repeats(world_size - n_left, world_size)

    def __len__(self) -> int:
        """Count the rows of an epoch of this rank."""
        n_steps, n_left = divmod(len(self.lengths), self.batch_size * self.world_size)
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
        yield from np.concatenate([whole, rest])[start:].tolist()

    def _order(self) -> np.ndarray:
        """Order all rows."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        if not len(order):
            return order
        longest = self.lengths[order].argmax()
        order[[0, longest]] = order[[longest, 0]]
        in_step = self.batch_size * self.world_size
        n_steps = max(1, min(self.mega_batch, len(order) // (4 * in_step)))
        mega_batches = np.arange(len(order)) // (n_steps * in_step)
        return order[np.lexsort((-self.lengths[order], mega_batches))]

    def _share(self, n_left: int) -> tuple[int, int]:
        """Tell which of the rows that do not fill a batch of every rank are this rank's."""
        if n_left and not self.drop_last:
            n_left = max(n_left, self.world_size)
            return self.rank * n_left // self.world_size, (self.rank + 1) * n_left // self.world_size
        return 0, 0

    def _settings(self) -> dict[str, Any]:
        return {
            "lengths": checksum(self.lengths),
            "batch_size": self.batch_size,
            "mega_batch": self.mega_batch,
            "seed": self.seed,
            "world_size": self.world_size,
            "drop_last": self.drop_last,
        }


class EvenBatchSampler(Sampler[list[int]]):
    """Batches of the rows of a sampler: equally many for each rank, and every row once.

    accelerate's own division fills the last batches up with rows from the beginning of the epoch, which are then
    learnt from twice. Here the last batches are split instead.

    Parameters
    ----------
    sampler : Sampler of int
        Gives the rows, the same on all ranks.
    batch_size : int
        Most rows a batch.
    rank : int, optional
        Which rank's batches to give. By default those of all ranks in turn, as accelerate wants them: it gives batch i
        to process i % world_size.
    world_size : int, default: 1
        Number of ranks.
    drop_last : bool, default: False
        Leave out the last batch that is not full, and then the last batches that not every rank has one of.

    Raises
    ------
    ValueError
        No rows a batch; a rank outside the world.
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
        if world_size < 1 or not 0 <= (rank or 0) < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one row.")
        # Not named batch_size and drop_last: by these names accelerate takes batches for equally large.
        self.sampler, self._n_rows, self._drop_last = sampler, batch_size, drop_last
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Count the batches of an epoch, of this rank or of all."""
        n_rows = len(self.sampler)
        if self._drop_last:
            n_steps = n_rows // self._n_rows // self.world_size
        else:
            n_steps = -(-n_rows // (self._n_rows * self.world_size))
        return n_steps * (self.world_size if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        rows = np.fromiter(self.sampler, np.int64)
        n_whole = len(rows) // self._n_rows
        cuts = np.arange(n_whole + 1) * self._n_rows
        if self._drop_last:
            cuts = cuts[: n_whole // self.world_size * self.world_size + 1]
        else:
            if cuts[-1] < len(rows):
                cuts = np.append(cuts, len(rows))
            rows, cuts = even_out(rows, cuts, self.world_size)
        yield from batches_of_rank(rows, cuts, self.rank, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Give the order of another epoch, if the sampler has epochs; call it before the epoch begins."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def padding_share(lengths: Any, batches: Iterable[Sequence[int]]) -> float:
    """Measure which share of the positions is padding, where each batch is padded to its longest row.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Tokens a row.
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


def known_lengths(lengths: Any, column: str = "length") -> np.ndarray:
    """Take the lengths of rows from where they are known already; tokens are not read.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, datasets.Dataset, or a Subset or ConcatDataset of such
        Lengths, or what has them: an attribute `lengths` (a store, whose expressed genes are counted), a column
        of lengths, or a dataset made of such.
    column : str, default: "length"
        Name of the column.

    Returns
    -------
    int64 array (n,)

    Raises
    ------
    ValueError
        A dataset of neither; something other than whole numbers of 0 or more.
    """
    if isinstance(lengths, (Subset, ConcatDataset)):
        return gather(lengths, partial(known_lengths, column=column))
    if hasattr(lengths, "lengths"):
        lengths = lengths.lengths
    elif hasattr(lengths, "column_names"):
        if not hasattr(lengths, "__len__"):
            raise ValueError("The lengths of a stream are not known before it is read: use TokenBudgetBuffer.")
        if column not in lengths.column_names:
            raise ValueError(
                f"The dataset has no column `{column}`; it has {', '.join(lengths.column_names)}. Add one "
                "(CellStore.tokenize writes it), or give a list of lengths (load_example_lengths reads one)."
            )
        lengths = lengths.with_format("arrow")[column][:].to_numpy()
    try:
        values = np.asarray(lengths)
    except (TypeError, ValueError):  # ragged
        values = np.asarray(None)
    if values.shape == (0,):
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(
            f"Lengths are whole numbers of 0 or more, one a row; got {type(lengths).__name__} "
            f"{np.array2string(values, threshold=5, edgeitems=2)}. Give a list of them, a CellStore, or a dataset "
            "with a column `length`."
        )
    return values.astype(np.int64)


def checksum(lengths: np.ndarray) -> str:
    """Tell lengths apart from others."""
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()[:16]


def check_settings(settings: Mapping[str, Any], state: Mapping[str, Any], of_what: str) -> None:
    """Compare the settings in a state with those of who is to go on from it.

    Raises
    ------
    ValueError
        They differ; the message says in what.
    """
    saved = state.get("settings", {})
    other = [name for name in settings if saved.get(name) != settings[name]]
    if other:
        found = ", ".join(f"{name} {saved.get(name)!r} instead of {settings[name]!r}" for name in other)
        raise ValueError(f"The state is of another {of_what}: {found}.")


def even_out(rows: np.ndarray, cuts: np.ndarray, world_size: int, n_before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make the number of batches a multiple of the number of ranks, by splitting the last ones.

    Parameters
    ----------
    rows : int array (n,)
        Rows of all batches.
    cuts : int array (n_batches + 1,)
        Batch i is `rows[cuts[i]:cuts[i + 1]]`; none is empty.
    world_size : int
        Number of ranks.
    n_before : int, default: 0
        Batches that went before these, and count, but can no longer be split.

    Returns
    -------
    rows, cuts : int array
        Rows are repeated only where there are fewer than batches are needed; that is told.
    """
    n_batches = len(cuts) - 1
    wanted = -(-(n_before + n_batches) // world_size) * world_size - n_before
    n_repeats = wanted - len(rows)
    if n_repeats > 0:
        _tell_repeats(n_repeats, world_size)
        cuts = np.concatenate([cuts, len(rows) + 1 + np.arange(n_repeats)])
        rows = np.concatenate([rows, np.resize(rows, n_repeats)])
    first = max(wanted - world_size, 0)  # of the last step
    while first > 0 and cuts[-1] - cuts[first] < wanted - first:  # too few rows to split
        first = max(first - world_size, 0)
    return rows, split(cuts, wanted, first)


def split(cuts: np.ndarray, n_batches: int, first: int = 0) -> np.ndarray:
    """Halve the largest batches, of those from `first` on, until there are so many."""
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
    """Give the batches of a rank, or (None) of all of them in turn, from its `start`-th on."""
    first, step = (0, 1) if rank is None else (rank, world_size)
    for i in range(first + start * step, len(cuts) - 1, step):
        yield rows[cuts[i] : cuts[i + 1]].tolist()


def _tell_repeats(n_rows: int, world_size: int) -> None:
    logger.warning(
        f"{n_rows} rows come twice in an epoch: too few are left for a batch of each of {world_size} ranks. Use fewer "
        "ranks or smaller batches, or drop_last=True."
    )


__all__ = ["EvenBatchSampler", "LengthGroupedSampler", "ResumableSampler", "known_lengths", "padding_share"]
