"""Tasks of `test_engines.py`, in a file that is quickly imported by the processes that run them."""

import os
import signal
from pathlib import Path


def times(shared: int, argument: int) -> tuple[int, int]:
    """Multiply; return also the process."""
    if argument < 0:
        raise ValueError(f"{argument} is negative.")
    return shared * argument, os.getpid()


def die_once(shared: Path, argument: int) -> int:
    """Kill the process that runs argument 1 for the first time."""
    if argument == 1 and not (shared / "killed").exists():
        (shared / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return argument
