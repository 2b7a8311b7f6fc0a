"""Samplers: in which order the rows of a store are learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import Sampler

from ..data.cell_store import block_order


class BlockShuffleSampler(Sampler[int]):
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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block has at least one row.")
        self.store, self.block_size, self.seed = store, block_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._taken, self._loaded = 0, False

    def __len__(self) -> int:
        """Count the rows of an epoch of this rank."""
        start, stop = self._range()
        return stop - start

    def __iter__(self) -> Iterator[int]:
        start, stop = self._range()
        order = block_order(len(self.store), self.block_size, self.seed, self.epoch)[start:stop]
        if not self._loaded:
            self._taken = 0
        self._loaded = False
        for row in order[self._taken :].tolist():
            self._taken += 1
            yield row

    def set_epoch(self, epoch: int) -> None:
        """Give the order of another epoch; call it before the epoch's first row."""
        if epoch != self.epoch:
            self._taken, self._loaded = 0, False
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Tell how many rows of the epoch were drawn: plain numbers, for `load_state_dict`.

        A loader with workers, or one that accelerate prepared, draws ahead of the batches that it delivers: there take
        `state_after`.
        """
        return self.state_after(self._taken)

    def state_after(self, n_rows: int) -> dict[str, Any]:
        """Give the state when so many rows of the epoch were used, those before a resumption included.

        Raises
        ------
        ValueError
            The epoch has fewer rows.
        """
        if not 0 <= n_rows <= len(self):
            raise ValueError(f"n_rows={n_rows}: an epoch has {len(self)} rows.")
        return {"epoch": self.epoch, "taken": n_rows, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the rest of its epoch, later ones whole epochs.

        Raises
        ------
        ValueError
            The state is of another number of rows, or of other settings.
        """
        settings, saved = self._settings(), state.get("settings", {})
        other = [name for name in settings if saved.get(name) != settings[name]]
        if other:
            found = ", ".join(f"{name} {saved.get(name)!r} instead of {settings[name]!r}" for name in other)
            raise ValueError(f"The state is of another sampler: {found}.")
        self.epoch, self._taken, self._loaded = state["epoch"], state["taken"], True

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
