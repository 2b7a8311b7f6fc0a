"""Resumable batches of a stream, by a token budget or a number of cells."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import ChainDataset, Dataset, IterableDataset, Sampler, get_worker_info

from .iterable_ann_dataset import IterableAnnDataset
from .length_sampler import batches_of_rank, check_rank, check_settings, check_sizes, even_out, values_of
from .token_budget import batch_of_longest, cut_batches, put_first, reorder, too_long_message

_SETTINGS = ("max_tokens_per_batch", "packing", "max_cells", "buffer_size", "seed", "world_size", "n_batches")
_MOST_MARKS = 256  # number of last windows from which a stream can be resumed


class TokenBudgetBuffer(IterableDataset):
    """Batches of a stream of cells, each within a token budget.

    A window of cells is read and split into batches as `TokenBudgetBatchSampler` splits a mega-batch; the batches are
    returned in a random order, then the next window is read. The batches are a function of the stream's order and of
    (seed, epoch).

    Parameters
    ----------
    stream : IterableAnnDataset, datasets.IterableDataset, or another iterable
        Cells, as dictionaries. It must start from the beginning each time it is iterated, so it cannot be a generator.
    max_tokens_per_batch : int
        The budget: number of cells times the longest, or, if packed, the sum.
    packing : bool, default: False
        Whether the collator packs, so that padding is not counted.
    max_cells : int, optional
        Maximum number of cells per batch.
    buffer_size : int, default: 2048
        Cells per window; each reading process holds one window in memory. The last batch of a window may be small.
    n_tokens : callable, optional
        Returns the number of tokens of a cell in a batch, or an upper bound; None leaves the cell out. By default the
        cell's value `length`, else the number of its `input_ids`.
    seed : int, default: 0
        Seed of the order of a window's batches.
    rank : int, optional
        Which rank's batches to return; each rank reads the whole stream. By default those of all ranks in turn, for a
        single process, and for accelerate (`dispatch_batches=False`), which passes batch i to process i % world_size.
    world_size : int, default: 1
        Number of ranks. The number of batches is a multiple of it, for which the last batches of the last window are
        split. A cell comes twice only if these have too few cells, which is logged.
    n_batches : int, optional
        Number of batches of the rank with the most cells, if each rank reads its own part of the stream and parts
        differ by one cell: if this part has one batch less, one of its last batches is split.

    Yields
    ------
    list of dict
        The cells of a batch.

    Raises
    ------
    ValueError
        The rank is outside the world, or there is no room for a cell. While reading: a single cell exceeds the budget,
        or has no known length.
    TypeError
        The stream is a generator.

    Notes
    -----
    Each worker of a DataLoader batches its own part of the stream.

    A state holds no cells: it consists of the stream's own state at the beginning of the window, and the number of its
    batches that were used; resuming reads this window again. If the stream has no state, or an inexact one (as in
    `datasets` with a shuffle buffer), the cells before the window are read again and skipped.

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
        n_tokens: Callable[[Mapping[str, Any]], int | None] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int = 1,
        n_batches: int | None = None,
    ):
        check_rank(rank, world_size, seed)
        if isinstance(stream, Iterator):
            raise TypeError(
                f"A {type(stream).__name__} can be read only once: pass an iterable such as a dataset or a list."
            )
        check_sizes(max_tokens_per_batch=max_tokens_per_batch, max_cells=max_cells, buffer_size=buffer_size)
        self.stream: Any = stream
        self.max_tokens_per_batch, self.packing, self.max_cells = max_tokens_per_batch, packing, max_cells
        self.buffer_size, self.n_tokens, self.seed = buffer_size, n_tokens, seed
        self.rank, self.world_size, self.n_batches = rank, world_size, n_batches
        # In shared memory: persistent workers see the next epoch, and this process sees that they read.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()
        self._start_at(_BEGINNING, 0)
        self._loaded = False

    @property
    def epoch(self) -> int:
        """Epoch whose order is read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also of the stream if it has epochs; call it before the epoch's first batch."""
        if epoch != self.epoch:
            self._start_at(_BEGINNING, 0)
            self._loaded = False
            self._read_by_workers.fill_(False)
        self._epoch.fill_(epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the reading position, as plain values for `load_state_dict`.

        Raises
        ------
        RuntimeError
            Workers of a DataLoader read ahead of the batches that it delivered.
        """
        return self.state_after(self._n_given)

    def state_after(self, n_batches: int) -> dict[str, Any]:
        """Return the state after `n_batches` batches of the epoch, including those before a resumption.

        Use it with a loader prepared by accelerate, which draws ahead of the batches that it delivers.

        Raises
        ------
        ValueError
            These batches have not been returned yet, or are too old (256 windows are kept).
        RuntimeError
            Workers of a DataLoader read; the state of a stream is available in this process only.
        """
        if self._read_by_workers and get_worker_info() is None:
            raise RuntimeError(
                "Workers of a DataLoader read this stream, and only they know their position: read it in this process "
                "(num_workers=0), or resume by skipping the batches that were used."
            )
        n_used = n_batches * self._step
        mark = next((mark for mark in reversed(self._marks) if mark["n_before"] <= n_used), None)
        if mark is None or n_batches > self._n_given:
            raise ValueError(
                f"n_batches={n_batches}: {self._n_given} were returned, and only the last {len(self._marks)} windows "
                "are kept."
            )
        return {"epoch": self.epoch, **mark, "taken": n_used - mark["n_before"], "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state: the next iteration returns the rest of its epoch, later ones whole epochs.

        Raises
        ------
        ValueError
            The state belongs to other settings, or its part for the stream to another stream.
        """
        check_settings(self._settings(), state, "buffer")
        self.set_epoch(state["epoch"])
        self._start_at({name: state[name] for name in _BEGINNING}, (state["n_before"] + state["taken"]) // self._step)
        self._loaded = True
        self._read_by_workers.fill_(False)

    def _settings(self) -> dict[str, Any]:
        return values_of(self, *_SETTINGS)

    @property
    def _step(self) -> int:
        """Number of batches over all ranks per returned batch."""
        return 1 if self.rank is None else self.world_size

    def _start_at(self, mark: Mapping[str, Any], n_given: int) -> None:
        """Start at a window, after `n_given` returned batches."""
        self._marks = deque([dict(mark)], maxlen=_MOST_MARKS)
        self._n_given = n_given

    # ------------------------------------------------------------------ batches

    def __iter__(self) -> Iterator[list[Any]]:
        info = get_worker_info()
        self._read_by_workers.fill_(info is not None)
        if self._loaded and info is not None and info.num_workers > 1:
            raise RuntimeError("Multiple workers cannot resume from a loaded state: use num_workers=0 or 1.")
        if not self._loaded:
            self._start_at(_BEGINNING, 0)
        self._loaded = False
        mark, n_given = self._marks[-1], self._n_given
        stream, cells = self._open(mark)
        ahead = list(islice(cells, 1))  # to detect the last window
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

    def _open(self, mark: Mapping[str, Any]) -> tuple[Any, Iterator[Any]]:
        """Open the stream at a mark; return the stream (None if its state is not exact) and its cells."""
        if not hasattr(self.stream, "state_dict") or _has_shuffle_buffer(getattr(self.stream, "_ex_iterable", None)):
            return None, islice(self.stream, mark["n_read"], None)
        # A stream of `datasets` starts each iteration at the state that was loaded last, until it is removed.
        if mark["stream"] is not None or hasattr(self.stream, "_ex_iterable"):
            self.stream.load_state_dict(mark["stream"])
        return self.stream, iter(self.stream)

    def _cut(self, window: list[Any], number: int, n_before: int, is_last: bool) -> list[list[Any]]:
        """Split a window into batches."""
        found = [self._length(cell) for cell in window]
        window = [cell for cell, length in zip(window, found, strict=True) if length is not None]
        if not window:
            return []
        lengths = np.array([length for length in found if length is not None], np.int64)
        too_long = np.flatnonzero(lengths > self.max_tokens_per_batch)
        if len(too_long):
            at = too_long[0]
            name = window[at].get("cell_id", f"number {number * self.buffer_size + at} of the stream")
            raise ValueError(too_long_message(f"Cell {name}", lengths[at], self.max_tokens_per_batch))
        cells, cuts = cut_batches(lengths, self.max_tokens_per_batch, self.packing, self.max_cells)
        order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(cuts) - 1)
        if number == 0:
            put_first(order, batch_of_longest(lengths[cells], cuts))
        cells, cuts = reorder(cells, cuts, order)
        if is_last:
            one_more = n_before + len(cuts)
            multiple_of = one_more if one_more == self.n_batches else self.world_size
            cells, cuts = even_out(cells, cuts, multiple_of, n_before)
        return [[window[cell] for cell in batch] for batch in batches_of_rank(cells, cuts, None, 1)]

    def _length(self, cell: Mapping[str, Any]) -> int | None:
        if self.n_tokens is not None:
            return self.n_tokens(cell)
        if "length" in cell:
            return cell["length"]
        if "input_ids" in cell:
            return len(cell["input_ids"])
        raise ValueError(
            f"A cell of the stream has neither length nor input_ids; it has {', '.join(cell)}. Pass a tokenizer to "
            "the stream, or a function n_tokens that returns the number of tokens of a cell."
        )


# Mark of the beginning of an epoch: numbers of batches, windows and cells before, and the state of the stream.
_BEGINNING = {"n_before": 0, "window": 0, "n_read": 0, "stream": None}


class StreamBatches(Dataset):
    """Collated batches of a stream by their number, counted from the first batch of epoch 0 through all epochs.

    Batches are requested in ascending order, and those between are skipped. So a DataLoader, accelerate and Trainer
    treat a stream as rows: each process requests its own batches, and a resumed run the remaining ones.

    Parameters
    ----------
    batches : TokenBudgetBuffer
        Batches of all ranks (`rank=None`), or those of a part that only this process reads.
    collator : callable
        Collates the cells of a batch. Its epoch is set.
    mark : dict, optional
        From `json.loads(batch["stream_mark"])`: position to start from, instead of the beginning.

    Raises
    ------
    RuntimeError, ValueError
        While reading: a requested batch was skipped already, or there are multiple workers; the stream has no cells.
    """

    def __init__(
        self,
        batches: TokenBudgetBuffer,
        collator: Callable[[Any], dict[str, Any]],
        mark: Mapping[str, Any] | None = None,
    ):
        self.batches, self.collator, self.mark = batches, collator, mark
        self._reading: Iterator[Any] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a collated batch; its `stream_mark`, as JSON, is the position of the next batch."""
        info = get_worker_info()
        if info is not None and info.num_workers > 1:
            raise RuntimeError("Each worker would read the whole stream: use num_workers=0 or 1.")
        if self._reading is None:
            self._start_at(number)
        if number < self._next:
            raise RuntimeError(f"Batch {number} of the stream was skipped already: make a new DataLoader.")
        while self._next <= number:
            cells = self._draw()
        if hasattr(self.collator, "set_epoch"):
            self.collator.set_epoch(self.batches.epoch)
        mark = {"next": self._next, "state": self.batches.state_after(self._n_of_epoch)}
        return {**self.collator(cells), "stream_mark": json.dumps(mark)}

    def _start_at(self, number: int) -> None:
        mark = self.mark
        if mark is not None and mark["next"] <= number:
            self._next, state = mark["next"], mark["state"]
            self.batches.load_state_dict(state)
            self._n_of_epoch = state["n_before"] + state["taken"]
        else:
            self._next = self._n_of_epoch = 0
            self.batches.set_epoch(0)
        self._reading = iter(self.batches)

    def _draw(self) -> list[Any]:
        """Return the next batch, from the next epoch if this one has ended."""
        assert self._reading is not None  # `_start_at` was called
        cells = next(self._reading, None)
        if cells is None:
            if not self._n_of_epoch:
                raise ValueError("The stream has no cells with counts.")
            self.batches.set_epoch(self.batches.epoch + 1)
            self._n_of_epoch, self._reading = 0, iter(self.batches)
            return self._draw()
        self._next += 1
        self._n_of_epoch += 1
        return cells


class StreamOrder(Sampler[list[int]]):
    """The numbers of the batches of an epoch, over all ranks, for `StreamBatches`: a batch sampler.

    Parameters
    ----------
    n_batches : int
        Batches of an epoch; with parts, those of each part.
    n_parts : int, default: 1
        Number of processes that each read a part of the stream, and number its batches from 0: each number comes once
        for each process.
    """

    def __init__(self, n_batches: int, n_parts: int = 1):
        self.n_batches, self.n_parts, self.epoch = n_batches, n_parts, 0

    def __len__(self) -> int:
        return self.n_batches * self.n_parts

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.n_batches
        for number in range(first, first + self.n_batches):
            yield from ([number] for _ in range(self.n_parts))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch."""
        self.epoch = epoch


def only(batches: list[Any]) -> Any:
    """Return the only element of a list: a collate function for ready-made batches."""
    (batch,) = batches
    return batch


def part_of(dataset: Any) -> tuple[int, int]:
    """Return which of how many parts of a stream a dataset reads, as its user has split it: (0, 1) if not.

    An `IterableAnnDataset` is split by `rank` and `world_size`; one of `datasets` by `split_dataset_by_node`. Raise a
    ValueError if streams in a chain are split in different ways.
    """
    if not isinstance(dataset, IterableDataset):
        return 0, 1
    if isinstance(dataset, ChainDataset):
        parts = {part_of(stream) for stream in dataset.datasets}
        if len(parts) > 1:
            raise ValueError("The streams of a ChainDataset are split in different ways: split all of them, or none.")
        return parts.pop() if parts else (0, 1)
    split = getattr(dataset, "_distributed", None) or dataset
    return getattr(split, "rank", 0), getattr(split, "world_size", 1)


def cells_of_largest_part(stream: IterableDataset) -> int | None:
    """Return the number of cells of the largest part of a stream, or of a stream that is not split, if it is known.

    Raise a ValueError if there are fewer cells than parts.
    """
    if isinstance(stream, IterableAnnDataset):
        n_cells = int(stream.n_cells_of_files.sum())
        if n_cells < stream.world_size:
            raise ValueError(f"The stream has {n_cells} cells for {stream.world_size} processes: use fewer processes.")
        return -(-n_cells // stream.world_size)
    return len(stream) if hasattr(stream, "__len__") and part_of(stream)[1] == 1 else None


def _has_shuffle_buffer(examples: Any) -> bool:
    """Return whether a stream of `datasets` has a shuffle buffer, which its state does not hold."""
    if examples is None:
        return False
    within = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return type(examples).__name__ == "BufferShuffledExamplesIterable" or any(map(_has_shuffle_buffer, within))
