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
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

_ALIGNMENT = 64  # the flag takes the first place
_TYPES = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64}
_TYPES |= {torch.float16, torch.float32, torch.float64}
_numbers = itertools.count()
_own: dict[int, torch.Tensor] = {}  # in a worker: its slots
_sent: set[int] = set()  # in a worker: the slots that the main process has
_received: dict[tuple[int, int], torch.Tensor] = {}  # in the main process: (worker's process, number) -> slot


class CollatedBatch(dict):
    """A collated batch, whose tensors a worker sends to its loader through one slot of shared memory.

    To write one to a file that `torch.load` reads, save `dict(batch)`.
    """

    def __copy__(self) -> CollatedBatch:
        return CollatedBatch(self)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> CollatedBatch:
        """Return the batch with its tensors on a device; accelerate calls it for each batch of a loader.

        Pinned tensors (`pin_memory` of the loader) are copied to a GPU beside what it computes: on a stream of their
        own, for which the current stream waits, but not the CPU, whatever `non_blocking` says.
        """
        from accelerate.utils import send_to_device

        device = torch.device(device)
        pinned = {name: value for name, value in self.items() if device.type == "cuda" and _is_pinned(value)}
        others = {name: value for name, value in self.items() if name not in pinned}
        moved = {name: send_to_device(value, device, non_blocking) for name, value in others.items()}
        if pinned:
            current = torch.cuda.current_stream(device)
            copying = _stream_to(current.device)
            with torch.cuda.stream(copying):
                moved |= {name: value.to(current.device, non_blocking=True) for name, value in pinned.items()}
            current.wait_stream(copying)
            for name in pinned:
                moved[name].record_stream(current)  # whose work must end before its memory is used again
        return CollatedBatch({name: moved[name] for name in self})

    def __reduce__(self) -> tuple:
        arrays = {name: value.numpy() for name, value in self.items() if _fits(value)}  # torch cannot pickle uint16
        return _of_arrays, (arrays, {name: value for name, value in self.items() if name not in arrays})


def _is_pinned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.is_pinned()


@cache
def _stream_to(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _of_arrays(arrays: dict[str, np.ndarray], others: dict[str, Any]) -> CollatedBatch:
    return CollatedBatch({**{name: torch.from_numpy(array) for name, array in arrays.items()}, **others})


def _reduce(batch: CollatedBatch) -> tuple:
    """Reduce a batch that is sent to another process."""
    of_arrays, (arrays, others) = batch.__reduce__()
    if get_worker_info() is None or not arrays:
        return of_arrays, (arrays, others)
    places, end = [], _ALIGNMENT
    for name, array in arrays.items():
        places.append((name, array.dtype.str, array.shape, end))
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    number = _free_slot(end)
    slot = _own[number]
    memory = slot.numpy()
    memory[0] = 1
    for (_, _, _, start), array in zip(places, arrays.values(), strict=True):
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    first = number not in _sent
    _sent.add(number)
    return _receive, (os.getpid(), number, slot if first else None, places, others)


ForkingPickler.register(CollatedBatch, _reduce)  # loaders use it; copies and other pickles do not


def _fits(value: Any) -> bool:
    """Return whether a value is a tensor with an array; torch pickles others in its own way."""
    return (
        type(value) is torch.Tensor
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.dtype in _TYPES
        and not value.requires_grad
    )


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


def _receive(
    process: int,
    number: int,
    slot: torch.Tensor | None,
    places: list[tuple[str, str, tuple[int, ...], int]],
    others: dict[str, Any],
) -> CollatedBatch:
    """Return the batch of a slot."""
    if slot is not None:
        for key in [key for key in _received if not _is_running(key[0])]:
            del _received[key]  # its worker has ended
        _received[process, number] = slot
    memory = np.asarray(_Lease(_received[process, number].numpy()))
    arrays = {
        name: memory[start : start + np.dtype(dtype).itemsize * math.prod(shape)].view(dtype).reshape(shape)
        for name, dtype, shape, start in places
    }
    return _of_arrays(arrays, others)


class _Lease:
    """A slot's memory, held as long as an array in it exists; then the worker may write there again."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._memory[0] = 0


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
