"""Batches by their number of tokens: as many cells as fit into a budget, padding included or packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .length_sampler import (
    ResumableSampler,
    batches_of_rank,
    check_settings,
    checksum,
    even_out,
    known_lengths,
    split,
)

_MEGA_BATCH = {False: 50, True: 200}  # packed, any cells may meet, and fewer batches are left half full
_MOST_DRAWS = 20  # of an epoch, until one has few enough batches
_SPARE_BATCHES = 500  # one batch in so many is added to the first epoch's, so that nearly every draw has few enough
_LEAST_TOGETHER = 10  # batches; the last of a mega-batch is not full
_MOST_MARKS = 256  # windows that a stream can be taken up in again


class TokenBudgetBatchSampler(ResumableSampler[list[int]]):
    """Batches of rows, each within a budget of tokens.

    Padded, a batch costs its number of cells times its longest cell: a random permutation is cut into mega-batches,
    each is sorted by length, and each batch takes what fits. Packed, a batch costs the sum of its cells: those of a
    mega-batch are packed, longest first, each into the first batch with room. The batches then come in a random
    order, but for the one with the longest cell, which comes first.

    The batches are a function of (seed, epoch). Every row comes once an epoch, and **every epoch has the same number
    of batches**, by which Trainer counts: epochs that need fewer have some batches split.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Tokens of each cell in a batch, or an upper bound of them; see `known_lengths`. A store knows the number of
        expressed genes: add the special tokens, and cut at the tokenizer's `max_length`. Where the collator pads to
        a multiple, round up to it. A cell without tokens counts as one token.
    max_tokens_per_batch : int
        The budget.
    packing : bool, default: False
        Whether the collator packs, so that there is no padding to count.
    max_cells : int, optional
        Most cells a batch.
    mega_batch : int, default: 50, and 200 for packing
        Batches, about, that are sorted or packed together: a quarter of them all, if that is less, but not under 10.
    seed : int, default: 0
        Of the batches.
    rank : int, optional
        Which rank's batches to give, of those of all. By default all in turn: for a single process, and for accelerate
        and Trainer, which give batch i to process i % world_size.
    world_size : int, default: 1
        Number of ranks; the number of batches is a multiple of it, for which the last batches are split. A row comes
        twice only where there are fewer rows than batches, which is told.
    drop_last : bool, default: False
        Leave out the last batches that not every rank has one of, rather than to split any.

    Raises
    ------
    ValueError
        A cell that alone is over the budget; lengths that are unknown, or no whole numbers; a rank outside the world.

    Examples
    --------
    >>> lengths = np.minimum(store.lengths + 2, tokenizer.max_length)
    >>> batches = TokenBudgetBatchSampler(lengths, 16_384, packing=True)
    >>> collator = DataCollatorForPhenotypicMLM(tokenizer, packing=True)
    >>> loader = DataLoader(store, batch_sampler=batches, collate_fn=collator)
    """

    def __init__(
        self,
        lengths: Any,
        max_tokens_per_batch: int,
        *,
        packing: bool = False,
        max_cells: int | None = None,
        mega_batch: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int = 1,
        drop_last: bool = False,
    ):
        super().__init__(seed, rank, world_size)
        _check_sizes(max_tokens_per_batch=max_tokens_per_batch, max_cells=max_cells, mega_batch=mega_batch)
        self.lengths = known_lengths(lengths)
        too_long = np.flatnonzero(self.lengths > max_tokens_per_batch)
        if len(too_long):
            name = f"Row {too_long[0]} (one of {len(too_long)} such)"
            raise ValueError(_too_long(name, self.lengths[too_long[0]], max_tokens_per_batch))
        self.max_tokens_per_batch, self.packing, self.max_cells = max_tokens_per_batch, packing, max_cells
        self.mega_batch, self.drop_last = mega_batch or _MEGA_BATCH[packing], drop_last

    def __len__(self) -> int:
        """Count the batches of an epoch, of this rank or of all; the same in every epoch."""
        n_steps = self._n_batches // self.world_size
        if self._n_batches % self.world_size and not self.drop_last:
            n_steps += 1
        return n_steps * (self.world_size if self.rank is None else 1)

    def _sequence(self, start: int) -> Iterator[list[int]]:
        rows, cuts = self._batches()
        yield from batches_of_rank(rows, cuts, self.rank, self.world_size, start)

    def _batches(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the epoch's batches for all ranks: rows, and where each batch begins (and the last one ends)."""
        if not len(self.lengths):
            return np.empty(0, np.int64), np.zeros(1, np.int64)
        rng = np.random.default_rng([self.seed, self.epoch])
        for _ in range(_MOST_DRAWS):
            rows, cuts = self._draw(rng)
            if len(cuts) - 1 <= self._n_batches:
                break
        else:
            rows, cuts = self._draw(np.random.default_rng([self.seed, 0]))
        cuts = split(cuts, self._n_batches)
        order = rng.permutation(len(cuts) - 1)
        _put_first(order, _batch_of_longest(self.lengths[rows], cuts))
        rows, cuts = _reorder(rows, cuts, order)
        if self.drop_last:
            return rows, cuts[: self._n_batches // self.world_size * self.world_size + 1]
        return even_out(rows, cuts, self.world_size)

    @cached_property
    def _n_batches(self) -> int:
        """Number of batches of an epoch, before they are made even for the ranks."""
        if not len(self.lengths):
            return 0
        n_batches = len(self._draw(np.random.default_rng([self.seed, 0]))[1]) - 1
        if self._n_windows > 1:  # else all draws have the same number
            n_batches = min(n_batches + 1 + n_batches // _SPARE_BATCHES, len(self.lengths))
        return n_batches

    @cached_property
    def _n_windows(self) -> int:
        """Number of mega-batches of an epoch."""
        n_cells = self.max_tokens_per_batch / np.maximum(self.lengths, 1).mean()
        if self.max_cells is not None:
            n_cells = min(n_cells, self.max_cells)
        n_batches = len(self.lengths) / n_cells
        return max(1, round(n_batches / min(self.mega_batch, max(n_batches / 4, _LEAST_TOGETHER))))

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Cut a random permutation into batches."""
        rows = rng.permutation(len(self.lengths))
        order, cuts = cut_batches(
            self.lengths[rows], self.max_tokens_per_batch, self.packing, self.max_cells, self._n_windows
        )
        return rows[order], cuts

    def _settings(self) -> dict[str, Any]:
        return {
            "lengths": checksum(self.lengths),
            "max_tokens_per_batch": self.max_tokens_per_batch,
            "packing": self.packing,
            "max_cells": self.max_cells,
            "mega_batch": self.mega_batch,
            "seed": self.seed,
            "world_size": self.world_size,
            "all_ranks": self.rank is None,
            "drop_last": self.drop_last,
        }


class TokenBudgetBuffer(IterableDataset):
    """Batches of a stream of cells, each within a budget of tokens.

    A window of cells is read, cut into batches as `TokenBudgetBatchSampler` cuts a mega-batch, and the batches are
    given in a random order; then the next window is read. Which batches there are is a function of the stream's order
    and of (seed, epoch).

    Parameters
    ----------
    stream : IterableAnnDataset, datasets.IterableDataset, or another iterable
        Cells: dictionaries. It must begin anew each time that it is iterated, so no generator.
    max_tokens_per_batch : int
        The budget: of the number of cells times the longest, or, packed, of the sum.
    packing : bool, default: False
        Whether the collator packs, so that there is no padding to count.
    max_cells : int, optional
        Most cells a batch.
    buffer_size : int, default: 2048
        Cells a window; so many are in memory in each process that reads. The last batch of a window may be small.
    n_tokens : callable, optional
        Tells how many tokens a cell has in a batch, or an upper bound of them. By default its value `length`, else the
        number of its `input_ids`.
    seed : int, default: 0
        Of the order of a window's batches.
    rank : int, optional
        Which rank's batches to give, of those of all, for which each rank reads the whole stream. By default all in
        turn: for a single process, and for accelerate (`dispatch_batches=False`), which gives batch i to process
        i % world_size.
    world_size : int, default: 1
        Number of ranks; the number of batches is a multiple of it, for which the last batches of the last window are
        split. A cell comes twice only where these have too few cells, which is told.

    Yields
    ------
    list of dict
        The cells of a batch.

    Raises
    ------
    ValueError
        A rank outside the world; no room for a cell. While reading: a cell that alone is over the budget; one without
        a known length.
    TypeError
        A generator.

    Notes
    -----
    Workers of a DataLoader each batch what the stream gives them.

    A state holds no cells: it is the stream's own state where the window began, and how many of its batches were used;
    going on reads this window again. Of a stream without a state of its own, or one that is not exact (one of
    `datasets` with a shuffle buffer), the cells before the window are read again and passed over.

    Examples
    --------
    >>> stream = IterableAnnDataset("atlas/*.h5ad", tokenizer, shuffle=True)
    >>> batches = TokenBudgetBuffer(stream, 16_384)
    >>> loader = DataLoader(batches, batch_size=None, collate_fn=DataCollatorForPhenotypicMLM(tokenizer))
    """

    def __init__(
        self,
        stream: Iterable[Mapping[str, Any]],
        max_tokens_per_batch: int,
        *,
        packing: bool = False,
        max_cells: int | None = None,
        buffer_size: int = 2048,
        n_tokens: Callable[[Mapping[str, Any]], int] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int = 1,
    ):
        if world_size < 1 or not 0 <= (rank or 0) < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
        if seed < 0:
            raise ValueError(f"seed={seed}: seeds start at 0.")
        if isinstance(stream, Iterator):
            raise TypeError(
                f"{type(stream).__name__} can be read once only: give what makes it, such as a dataset or a list."
            )
        _check_sizes(max_tokens_per_batch=max_tokens_per_batch, max_cells=max_cells, buffer_size=buffer_size)
        self.stream = stream
        self.max_tokens_per_batch, self.packing, self.max_cells = max_tokens_per_batch, packing, max_cells
        self.buffer_size, self.n_tokens, self.seed = buffer_size, n_tokens, seed
        self.rank, self.world_size = rank, world_size
        # In shared memory: workers that outlive an epoch see the next one, and tell this process that they read.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()
        self._set_out(_BEGINNING, 0)
        self._loaded = False

    @property
    def epoch(self) -> int:
        """The epoch whose order is read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Read another epoch, of the stream too, if it has epochs; call it before the epoch's first batch."""
        if epoch != self.epoch:
            self._set_out(_BEGINNING, 0)
            self._loaded = False
            self._read_by_workers.fill_(False)
        self._epoch.fill_(epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Tell where the reading is: plain values, for `load_state_dict`.

        Raises
        ------
        RuntimeError
            Workers of a DataLoader read, ahead of what it has delivered.
        """
        return self.state_after(self._n_given)

    def state_after(self, n_batches: int) -> dict[str, Any]:
        """Give the state when so many batches of the epoch were used, those before a resumption included.

        For a loader that accelerate prepared, which draws ahead of the batches that it delivers.

        Raises
        ------
        ValueError
            So many were not given yet, or are too long ago (256 windows are remembered).
        RuntimeError
            Workers of a DataLoader read: the state of a stream can be taken in this process only.
        """
        if self._read_by_workers:
            raise RuntimeError(
                "Workers of a DataLoader read this stream, and only they know where they are: read it in this process "
                "(num_workers=0), or go on by passing over the batches that were used."
            )
        n_used = n_batches * self._step
        mark = next((mark for mark in reversed(self._marks) if mark["n_before"] <= n_used), None)
        if mark is None or n_batches > self._n_given:
            raise ValueError(
                f"n_batches={n_batches}: {self._n_given} were given, and those of the last {len(self._marks)} windows "
                "are remembered."
            )
        return {"epoch": self.epoch, **mark, "taken": n_used - mark["n_before"], "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the rest of its epoch, later ones whole epochs.

        Raises
        ------
        ValueError
            The state is of other settings. The stream itself may find its part to be of another stream.
        """
        check_settings(self._settings(), state, "buffer")
        self.set_epoch(state["epoch"])
        self._set_out({name: state[name] for name in _BEGINNING}, (state["n_before"] + state["taken"]) // self._step)
        self._loaded = True
        self._read_by_workers.fill_(False)

    def _settings(self) -> dict[str, Any]:
        return {
            "max_tokens_per_batch": self.max_tokens_per_batch,
            "packing": self.packing,
            "max_cells": self.max_cells,
            "buffer_size": self.buffer_size,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    @property
    def _step(self) -> int:
        """Batches of all ranks for one that is given."""
        return 1 if self.rank is None else self.world_size

    def _set_out(self, mark: Mapping[str, Any], n_given: int) -> None:
        """Take a window as the first that is known, after which so many batches were given."""
        self._marks = deque([dict(mark)], maxlen=_MOST_MARKS)
        self._n_given = n_given

    # ------------------------------------------------------------------ batches

    def __iter__(self) -> Iterator[list[Any]]:
        self._read_by_workers.fill_(get_worker_info() is not None)
        if self._loaded and self._read_by_workers:
            raise RuntimeError("A state was loaded, and workers of a DataLoader cannot go on from it: num_workers=0.")
        if not self._loaded:
            self._set_out(_BEGINNING, 0)
        self._loaded = False
        mark, n_given = self._marks[-1], self._n_given
        stream, cells = self._open(mark)
        ahead = list(islice(cells, 1))  # to know the last window
        while ahead:
            window = ahead + list(islice(cells, self.buffer_size - 1))
            state = None if stream is None else stream.state_dict()
            ahead = list(islice(cells, 1))
            batches = self._cut(window, mark["window"], mark["n_before"], is_last=not ahead)
            for i in range(n_given * self._step + (self.rank or 0) - mark["n_before"], len(batches), self._step):
                n_given += 1
                self._n_given = n_given
                yield batches[i]
            mark = {
                "n_before": mark["n_before"] + len(batches),
                "window": mark["window"] + 1,
                "n_read": mark["n_read"] + len(window),
                "stream": state,
            }
            if ahead:
                self._marks.append(mark)

    def _open(self, mark: Mapping[str, Any]) -> tuple[Any, Iterator]:
        """Read the stream from a mark on; gives the stream, or None if its state is not exact, and its cells."""
        if not _has_exact_state(self.stream):
            return None, islice(self.stream, mark["n_read"], None)
        # A stream of `datasets` begins each iteration at the state that was loaded last, until that is taken away.
        if mark["stream"] is not None or hasattr(self.stream, "_ex_iterable"):
            self.stream.load_state_dict(mark["stream"])
        return self.stream, iter(self.stream)

    def _cut(self, window: list[Any], number: int, n_before: int, is_last: bool) -> list[list[Any]]:
        """Make the batches of a window."""
        lengths = np.array([self._length(cell) for cell in window], np.int64)
        too_long = np.flatnonzero(lengths > self.max_tokens_per_batch)
        if len(too_long):
            at = too_long[0]
            name = window[at].get("cell_id", f"number {number * self.buffer_size + at} of the stream")
            raise ValueError(_too_long(f"Cell {name}", lengths[at], self.max_tokens_per_batch))
        cells, cuts = cut_batches(lengths, self.max_tokens_per_batch, self.packing, self.max_cells)
        order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(cuts) - 1)
        if number == 0:
            _put_first(order, _batch_of_longest(lengths[cells], cuts))
        cells, cuts = _reorder(cells, cuts, order)
        if is_last:
            cells, cuts = even_out(cells, cuts, self.world_size, n_before)
        return [[window[cell] for cell in batch] for batch in batches_of_rank(cells, cuts, None, 1)]

    def _length(self, cell: Mapping[str, Any]) -> int:
        if self.n_tokens is not None:
            return self.n_tokens(cell)
        if "length" in cell:
            return cell["length"]
        if "input_ids" in cell:
            return len(cell["input_ids"])
        raise ValueError(
            f"A cell of the stream has neither length nor input_ids; it has {', '.join(cell)}. Give the stream a "
            "tokenizer, or tell by n_tokens how many tokens a cell has."
        )


# Where an epoch begins: batches, windows and cells before, and the state of the stream.
_BEGINNING = {"n_before": 0, "window": 0, "n_read": 0, "stream": None}


def cut_batches(
    lengths: np.ndarray, budget: int, packing: bool, max_cells: int | None = None, n_windows: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cut cells into batches, each within a budget of tokens.

    Parameters
    ----------
    lengths : int array (n,)
        Tokens a cell, none over the budget.
    budget : int
        Tokens a batch: of the sum if packing, else of the number of cells times the longest.
    packing : bool
        Whether there is no padding to count.
    max_cells : int, optional
        Most cells a batch.
    n_windows : int, default: 1
        Number of equal parts of the cells, to within one, that are each sorted by length or packed.

    Returns
    -------
    order : int array (n,)
        Positions in `lengths`: batch after batch, in each the longest first.
    cuts : int array (n_batches + 1,)
        Batch i is `order[cuts[i]:cuts[i + 1]]`.

    Notes
    -----
    Padded, no division of a window into batches has fewer: the longest cell decides how many fit, and those that are
    left are the shortest. Packed, first-fit decreasing (Johnson 1973), at most 11/9 of the fewest; in all windows at
    once, so that a step is one numpy operation.
    """
    n = len(lengths)
    windows = np.arange(n) * n_windows // max(n, 1)
    order = np.lexsort((-lengths, windows))
    costs = np.maximum(lengths[order], 1)
    if packing:
        bins = _first_fit(costs, np.bincount(windows, minlength=n_windows), budget, max_cells)
        by_bin = np.lexsort((bins, windows))
        order, bins = order[by_bin], bins[by_bin]
        is_first = np.ones(n, bool)
        is_first[1:] = (np.diff(bins) != 0) | (np.diff(windows) != 0)
        return order, np.append(np.flatnonzero(is_first), n)
    n_fit = budget // costs
    if max_cells is not None:
        n_fit = np.minimum(n_fit, max_cells)
    ends = np.searchsorted(windows, windows, side="right")
    following = np.minimum(np.arange(n) + n_fit, ends).tolist()
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(following[cuts[-1]])
    return order, np.array(cuts)


def _first_fit(costs: np.ndarray, sizes: np.ndarray, budget: int, max_cells: int | None) -> np.ndarray:
    """Put each cell into the first bin of its window that has room for it.

    Parameters
    ----------
    costs : int array (n,)
        Window after window, descending in each; 1 to the budget.
    sizes : int array (n_windows,)
        Cells of each window; they differ by at most one.
    budget, max_cells
        Of a bin.

    Returns
    -------
    int array (n,)
        Number of the bin in its window.
    """
    windows = np.arange(len(sizes))
    starts = np.cumsum(sizes) - sizes
    room = np.full((len(sizes), 8), budget)
    n_cells = np.zeros_like(room)
    bins = np.empty(len(costs), np.int64)
    for i in range(sizes.max()):
        if i == sizes.min():  # the larger windows have one more
            windows = np.flatnonzero(sizes > i)
        at = starts[windows] + i
        fitting = room if len(windows) == len(room) else room[windows]
        chosen = (fitting >= costs[at, None]).argmax(axis=1)  # the last bin is always empty
        bins[at] = chosen
        room[windows, chosen] -= costs[at]
        if max_cells is not None:
            n_cells[windows, chosen] += 1
            room[windows, chosen] = np.where(n_cells[windows, chosen] < max_cells, room[windows, chosen], 0)
        if chosen.max() == room.shape[1] - 1:
            room = np.concatenate([room, np.full_like(room, budget)], axis=1)
            n_cells = np.concatenate([n_cells, np.zeros_like(n_cells)], axis=1)
    return bins


def _batch_of_longest(lengths: np.ndarray, cuts: np.ndarray) -> int:
    """Find the batch that holds the longest cell; `lengths` are in the order of the batches."""
    return int(np.searchsorted(cuts, lengths.argmax(), side="right")) - 1


def _put_first(order: np.ndarray, value: int) -> None:
    """Let a value of a permutation change places with its first one."""
    place = np.flatnonzero(order == value)[0]
    order[[0, place]] = order[[place, 0]]


def _reorder(rows: np.ndarray, cuts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put batches in another order."""
    sizes = np.diff(cuts)[order]
    new_cuts = np.concatenate([[0], np.cumsum(sizes)])
    return rows[np.repeat(cuts[:-1][order] - new_cuts[:-1], sizes) + np.arange(len(rows))], new_cuts


def _has_exact_state(stream: Any) -> bool:
    """Tell whether a stream can go on exactly where it was, by a state of its own."""
    return hasattr(stream, "state_dict") and not _has_shuffle_buffer(getattr(stream, "_ex_iterable", None))


def _has_shuffle_buffer(examples: Any) -> bool:
    """Tell whether a stream of `datasets` mixes its examples in a buffer, which its state does not hold."""
    if examples is None:
        return False
    within = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return type(examples).__name__ == "BufferShuffledExamplesIterable" or any(map(_has_shuffle_buffer, within))


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: it is 1 or more.")


def _too_long(name: str, length: int, budget: int) -> str:
    return (
        f"{name} has {length} tokens, more than max_tokens_per_batch={budget}: raise the budget, shorten cells "
        "(tokenizer.max_length, and lengths cut at it), or leave such cells out."
    )


__all__ = ["TokenBudgetBatchSampler", "TokenBudgetBuffer"]
