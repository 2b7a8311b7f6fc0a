"""Batches by number of tokens: as many cells as fit into a budget, padded or packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from .draws import Draw, draw_of
from .length_sampler import ResumableSampler, batches_of_rank, check_sizes, checksum, even_out, split, values_of
from .lengths import known_lengths

_MEGA_BATCH = {False: 50, True: 200}  # if packed, any cells can share a batch, so larger windows fill batches better
_MOST_DRAWS = 20  # permutations tried per epoch, until one has few enough batches
_SPARE_BATCHES = 500  # one extra batch per so many of the first epoch, so that nearly every draw has few enough
_SPARE_DEVIATIONS = 6  # of the number of batches, where each epoch has other rows
_LEAST_TOGETHER = 10  # minimum batches per mega-batch, since its last is not full


class TokenBudgetBatchSampler(ResumableSampler[list[int]]):
    """Batches of rows, each within a token budget.

    The cost of a padded batch is its number of cells times its longest cell: the rows of an epoch, by default a random
    permutation, are split into mega-batches, each is sorted by length, and each batch takes the cells that fit. The
    cost of a packed batch is the sum of its cells: the cells of a mega-batch are packed, longest first, each into the
    first batch with room. The batches then come in a random order, except for the one with the longest cell, which
    comes first.

    The batches are a function of (seed, epoch). Every row that is drawn comes once, and **every epoch has the same
    number of batches**, which Trainer relies on: in epochs that need fewer, some batches are split.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, or dataset
        Number of tokens of each cell in a batch, or an upper bound; see `known_lengths`. A store has the number of
        expressed genes: add the special tokens, and clip at the tokenizer's `max_length`. If the collator pads to a
        multiple, round up to it. A cell without tokens counts as one token.
    max_tokens_per_batch : int
        The budget.
    packing : bool, default: False
        Whether the collator packs, so that padding is not counted.
    max_cells : int, optional
        Maximum number of cells per batch.
    mega_batch : int, default: 50, and 200 for packing
        Approximate number of batches that are sorted or packed together: at most a quarter of all batches, but at
        least 10.
    seed : int, default: 0
        Seed of the batches.
    rank : int, optional
        Which rank's batches to return. By default those of all ranks in turn, for a single process, and for accelerate
        and Trainer, which pass batch i to process i % world_size.
    world_size : int, default: 1
        Number of ranks. The number of batches is a multiple of it, for which the last batches are split. A row comes
        twice only if there are fewer rows than batches, which is logged.
    drop_last : bool, default: False
        Drop last batches until every rank has equally many, instead of splitting any.
    draw : Draw, optional
        The rows of an epoch, such as a `WeightedDraw`; by default every row once. If each epoch has other rows, there
        are enough batches for six standard deviations of their tokens.

    Raises
    ------
    ValueError
        A single cell exceeds the budget; lengths are unknown, or not integers; the rank is outside the world; the draw
        has another number of rows.

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
        draw: Draw | None = None,
    ):
        super().__init__(seed, rank, world_size)
        check_sizes(max_tokens_per_batch=max_tokens_per_batch, max_cells=max_cells, mega_batch=mega_batch)
        self.lengths = known_lengths(lengths)
        self.draw = draw_of(draw, len(self.lengths))
        too_long = np.flatnonzero(self.lengths > max_tokens_per_batch)
        if len(too_long):
            name = f"Row {too_long[0]} (one of {len(too_long)} such)"
            raise ValueError(too_long_message(name, self.lengths[too_long[0]], max_tokens_per_batch))
        self.max_tokens_per_batch, self.packing, self.max_cells = max_tokens_per_batch, packing, max_cells
        self.mega_batch, self.drop_last = mega_batch or _MEGA_BATCH[packing], drop_last

    def __len__(self) -> int:
        """Return the number of batches in an epoch, of this rank or of all; the same in every epoch."""
        n_steps = self._n_batches // self.world_size
        if self._n_batches % self.world_size and not self.drop_last:
            n_steps += 1
        return n_steps * (self.world_size if self.rank is None else 1)

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """Itself: in multiple processes, accelerate sets the epoch of a batch sampler's `sampler`, and of no other."""
        return self

    def _sequence(self, start: int) -> Iterator[list[int]]:
        rows, cuts = self._batches()
        yield from batches_of_rank(rows, cuts, self.rank, self.world_size, start)

    def _batches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's batches for all ranks: rows, and the boundaries of the batches."""
        if not len(self.draw):
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
        put_first(order, batch_of_longest(self.lengths[rows], cuts))
        rows, cuts = reorder(rows, cuts, order)
        if self.drop_last:
            return rows, cuts[: self._n_batches // self.world_size * self.world_size + 1]
        return even_out(rows, cuts, self.world_size)

    @cached_property
    def _n_batches(self) -> int:
        """Number of batches in an epoch, before it is rounded to a multiple of the number of ranks."""
        if not len(self.draw):
            return 0
        n_batches = len(self._draw(np.random.default_rng([self.seed, 0]))[1]) - 1
        spare = 0
        if self._n_windows > 1 or not self.draw.same_rows:  # else all draws have the same number
            spare = 1 + n_batches // _SPARE_BATCHES
        if not self.draw.same_rows:
            variance = self.draw.mean((self._costs - self.draw.mean(self._costs)) ** 2)
            deviation = math.sqrt(variance / len(self.draw)) / self.draw.mean(self._costs)  # relative, of an epoch
            spare += math.ceil(_SPARE_DEVIATIONS * deviation * n_batches)
        return min(n_batches + spare, len(self.draw))

    @cached_property
    def _n_windows(self) -> int:
        """Number of mega-batches in an epoch."""
        n_cells = self.max_tokens_per_batch / self.draw.mean(self._costs)
        if self.max_cells is not None:
            n_cells = min(n_cells, self.max_cells)
        n_batches = len(self.draw) / n_cells
        return max(1, round(n_batches / min(self.mega_batch, max(n_batches / 4, _LEAST_TOGETHER))))

    @property
    def _costs(self) -> np.ndarray:
        """Number of tokens that each row counts as: int64 array (n,)."""
        return np.maximum(self.lengths, 1)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows, and split them into batches."""
        rows = self.draw(rng)
        order, cuts = cut_batches(
            self.lengths[rows], self.max_tokens_per_batch, self.packing, self.max_cells, self._n_windows
        )
        return rows[order], cuts

    def _settings(self) -> dict[str, Any]:
        return {
            "lengths": checksum(self.lengths),
            **values_of(self, "max_tokens_per_batch", "packing", "max_cells", "mega_batch", "seed", "world_size"),
            "all_ranks": self.rank is None,
            "drop_last": self.drop_last,
            **self.draw.settings(),
        }


def cut_batches(
    lengths: np.ndarray, budget: int, packing: bool, max_cells: int | None = None, n_windows: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Split cells into batches, each within a token budget.

    Parameters
    ----------
    lengths : int array (n,)
        Number of tokens per cell, none over the budget.
    budget : int
        Tokens per batch: the sum if packing, else the number of cells times the longest.
    packing : bool
        Whether batches are packed, so that padding is not counted.
    max_cells : int, optional
        Maximum number of cells per batch.
    n_windows : int, default: 1
        Number of parts of equal size (to within one cell) that are each sorted by length or packed.

    Returns
    -------
    order : int array (n,)
        Positions in `lengths`, batch after batch, the longest first in each.
    cuts : int array (n_batches + 1,)
        Batch i is `order[cuts[i]:cuts[i + 1]]`.

    Notes
    -----
    If padded, this is the smallest possible number of batches for a window: the longest cell decides how many fit, and
    the remaining cells are the shortest. If packed, this is first-fit decreasing (Johnson 1973), with at most 11/9 of
    the smallest number; all windows are processed at once, so that a step is one numpy operation.
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
    """Put each cell into the first bin of its window that has room for it; return the bin's number, int array (n,).

    `costs` (n,) are the tokens of the cells, window after window, descending in each, 1 to the budget; `sizes`
    (n_windows,) the numbers of cells of the windows, which differ by at most one.
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


def batch_of_longest(lengths: np.ndarray, cuts: np.ndarray) -> int:
    """Return the index of the batch with the longest cell; `lengths` are in the order of the batches."""
    return int(np.searchsorted(cuts, lengths.argmax(), side="right")) - 1


def put_first(order: np.ndarray, value: int) -> None:
    """Swap a value of a permutation with the first one."""
    place = np.flatnonzero(order == value)[0]
    order[[0, place]] = order[[place, 0]]


def reorder(rows: np.ndarray, cuts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the batches in another order."""
    sizes = np.diff(cuts)[order]
    new_cuts = np.concatenate([[0], np.cumsum(sizes)])
    return rows[np.repeat(cuts[:-1][order] - new_cuts[:-1], sizes) + np.arange(len(rows))], new_cuts


def too_long_message(name: str, length: int, budget: int) -> str:
    """Return the message for a cell that no batch can hold."""
    return (
        f"{name} has {length} tokens, more than max_tokens_per_batch={budget}: raise the budget, truncate cells "
        "(tokenizer.max_length, and lengths clipped at it), or leave such cells out."
    )
