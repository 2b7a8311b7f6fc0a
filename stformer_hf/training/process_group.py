"""Leave the group of processes before Python ends."""

from __future__ import annotations

import atexit
import functools
import time

from torch import distributed

_SECONDS = 0.3  # for threads that need microseconds, on a machine that may be busy


def leave_process_group() -> None:
    """Destroy the default group of processes, if there is one, once the threads of gloo have freed their tensors.

    A thread of gloo frees the tensors of an operation after this process has its result, for which it needs Python's
    lock. If Python ends meanwhile, that aborts the process ("terminate called without an active exception"); if this
    thread frees the group meanwhile, both wait for each other. So they are given the lock for a moment.
    """
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(_SECONDS)
        distributed.destroy_process_group()


@functools.cache
def leave_gloo_at_exit() -> None:
    """Leave a group of gloo when Python ends; of NCCL's, torch itself says whether they need to be destroyed."""

    def leave() -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
            leave_process_group()

    atexit.register(leave)
