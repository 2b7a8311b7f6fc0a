"""Worker slots: send arrays from a DataLoader's worker to its main process through reused shared memory.

Torch creates a new shared file for each tensor of each batch and passes its descriptor over a socket; numpy arrays go
through a pipe of 64 KB. Both take longer than reading a batch of cells. Here a worker writes the arrays of a batch
into one of its slots; torch sends the slot itself once, and after that only its number is sent. The main process uses
the arrays in place, and returns the slot, by a flag in its first byte, when the last of them is deleted.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

_ALIGNMENT = 64  # the flag takes the first place
_numbers = itertools.count()
_own: dict[int, torch.Tensor] = {}  # in a worker: its slots
_sent: set[int] = set()  # in a worker: the slots that the main process has
_received: dict[tuple[int, int], torch.Tensor] = {}  # in the main process: (worker's process, number) -> slot


class CollatedBatch(dict):
    """A collated batch, whose tensors a worker sends to its loader through one slot of shared memory."""

    def __copy__(self) -> CollatedBatch:
        return CollatedBatch(self)

    def __reduce__(self):
        tensors = [value for value in self.values() if isinstance(value, torch.Tensor)]
        if any(tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16 for tensor in tensors):
            return dict, (dict(self),)
        arrays = {name: value.numpy() for name, value in self.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in self.items() if name not in arrays}
        return _collated_batch, (arrays if get_worker_info() is None else SharedArrays(arrays), others)


def _collated_batch(arrays: dict[str, np.ndarray], others: dict[str, Any]) -> CollatedBatch:
    return CollatedBatch({**{name: torch.from_numpy(array) for name, array in arrays.items()}, **others})


class SharedArrays:
    """Arrays that are sent through a slot when they are pickled.

    Parameters
    ----------
    arrays : dict of str to array
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def __reduce__(self):
        places, end = [], _ALIGNMENT
        for name, array in self.arrays.items():
            places.append((name, array.dtype.str, array.shape, end))
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        number = _free_slot(end)
        slot = _own[number]
        memory = slot.numpy()
        memory[0] = 1
        for (_, _, _, start), array in zip(places, self.arrays.values(), strict=True):
            memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        first = number not in _sent
        _sent.add(number)
        return _receive, (os.getpid(), number, slot if first else None, places)


def _free_slot(size: int) -> int:
    """Return the number of a free slot that is large enough; create one if there is none."""
    for number, slot in list(_own.items()):
        if not slot[0]:
            if len(slot) >= size:
                return number
            del _own[number]
    number = next(_numbers)
    _own[number] = torch.zeros(size + size // 4, dtype=torch.uint8).share_memory_()
    return number


def _receive(process: int, number: int, slot: torch.Tensor | None, places: list[tuple[str, str, Any, int]]):
    """Return the arrays of a slot."""
    if slot is not None:
        for key in [key for key in _received if not _is_running(key[0])]:
            del _received[key]  # its worker has ended
        _received[process, number] = slot
    memory = np.asarray(_Lease(_received[process, number].numpy()))
    return {
        name: memory[start : start + np.dtype(dtype).itemsize * math.prod(shape)].view(dtype).reshape(shape)
        for name, dtype, shape, start in places
    }


class _Lease:
    """A slot's memory, held as long as an array in it exists; then the worker may write there again."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        self._memory[0] = 0


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


__all__ = ["CollatedBatch", "SharedArrays"]
