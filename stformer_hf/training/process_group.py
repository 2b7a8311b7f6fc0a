"""Leave the group of processes before Python ends."""

from __future__ import annotations

import atexit
import functools
import gc

from torch import distributed


def leave_process_group() -> None:
    """Destroy the default group of processes, if there is one, and wait until the threads of gloo have ended.

    A thread of gloo frees the tensors of an operation after this process has its result. If Python ends meanwhile, the
    thread aborts the process ("terminate called without an active exception"). Freeing the group joins its threads;
    models that hold it, wrapped by DDP, are in reference cycles of their trainers.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


@functools.cache
def leave_gloo_at_exit() -> None:
    """Leave a group of gloo when Python ends; of NCCL's, torch itself says whether they need to be destroyed."""

    def leave() -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
            leave_process_group()

    atexit.register(leave)


__all__ = ["leave_gloo_at_exit", "leave_process_group"]
