"""Engines: run independent tasks in processes of this machine (`local`), or on a cluster (`ray`).

A task is idempotent: it writes files under temporary names and renames them, so a task that was killed in the middle
can be run again, and the result does not depend on where or how often a task ran.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

ENGINES = ("local", "ray")
_RETRIES = 3  # of a task whose worker was killed or whose machine was lost

_Submit = Callable[[Any], Future]


def check_engine(engine: str, workers: int) -> None:
    """Raise ValueError if the engine is unknown or there are no workers, ImportError if Ray is not installed."""
    if engine not in ENGINES:
        raise ValueError(f'engine={engine!r}: must be "local" or "ray".')
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1.")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError('engine="ray" needs ray: pip install "stformer_hf[ray]"')


def runs_here(engine: str, workers: int) -> bool:
    """Return whether no other process is needed: one local worker is this process."""
    return engine == "local" and workers == 1


@contextmanager
def run_tasks(
    task: Callable[[Any, Any], Any],
    arguments: Iterable[Any],
    *,
    shared: Any = None,
    workers: int = 1,
    engine: str = "local",
    ahead: float = math.inf,
    gpus: float = 0,
) -> Iterator[Iterator[tuple[int, Any]]]:
    """Call `task(shared, argument)` in other processes; at the end of the block, unfinished tasks are cancelled.

    Parameters
    ----------
    task : callable
        A function of a module.
    arguments : iterable
        One per task; picklable, and consumed as tasks are started.
    shared : object, optional
        What all tasks need; picklable, and sent to each worker once.
    workers : int, default: 1
        Number of tasks that run at once.
    engine : {"local", "ray"}, default: "local"
        `local` starts processes, which end with this one. `ray` uses the cluster that this process is connected to,
        else the one at `RAY_ADDRESS` or on this machine; without a cluster it starts one of `workers` CPUs here, and
        stops it at the end. A task whose worker is killed runs again, up to 3 times.
    ahead : int, optional
        Start a task only if fewer than this number separate it from the oldest unfinished one, which limits the
        results that wait for an earlier one.
    gpus : float, default: 0
        With Ray, number of GPUs that a task needs.

    Yields
    ------
    iterator of (int, object)
        Number of the argument and result of the task, in the order in which tasks finish.

    Raises
    ------
    Exception
        While iterating: what a task raised.
    RuntimeError
        While iterating: a local worker was killed, or none could start.
    """
    started = _on_ray(task, shared, workers, gpus) if engine == "ray" else _in_processes(task, shared, workers)
    with started as submit:
        # A local worker finds its next task waiting; of a cluster, no more than `workers` CPUs are used.
        most = workers if engine == "ray" else 2 * workers
        yield _as_completed(submit, arguments, most, ahead)


def _as_completed(submit: _Submit, arguments: Iterable[Any], most: int, ahead: float) -> Iterator[tuple[int, Any]]:
    running: dict[Future, int] = {}
    for number, argument in enumerate(arguments):
        while len(running) >= most or (running and number - min(running.values()) >= ahead):
            yield from _finished(running)
        running[submit(argument)] = number
    while running:
        yield from _finished(running)


def _finished(running: dict[Future, int]) -> Iterator[tuple[int, Any]]:
    for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=running.__getitem__):
        yield running.pop(future), future.result()


def _call(task: Callable[[Any, Any], Any], shared: Path | bytes, argument: Any) -> Any:
    """Run a task in a worker; `shared` is pickled, and loaded once."""
    return task(_load(shared), argument)


@lru_cache(1)
def _load(pickled: Path | bytes) -> Any:
    return pickle.loads(pickled if isinstance(pickled, bytes) else pickled.read_bytes())


# ---------------------------------------------------------------------- processes of this machine


@contextmanager
def _in_processes(task: Callable[[Any, Any], Any], shared: Any, workers: int) -> Iterator[_Submit]:
    with tempfile.TemporaryDirectory() as folder:
        # Passed through a file: arguments larger than a pipe's buffer would keep the next worker from starting until
        # the first has finished its imports.
        file = Path(folder, "shared")
        file.write_bytes(pickle.dumps(shared))
        # Not forked: threads of Arrow and torch do not survive a fork.
        started = Path(folder, "started")
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (started,))
        try:
            yield lambda argument: pool.submit(_call, task, file, argument)
        except BrokenProcessPool as error:
            if started.exists():
                message = "A worker was killed, probably because memory ran out: use fewer workers."
            else:
                message = (
                    "No worker could start. Workers import the script that starts them: put what it runs below "
                    '`if __name__ == "__main__":`, in a file.'
                )
            raise RuntimeError(message) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(started: Path) -> None:
    """Note that a worker has started, and make it end when its parent is killed.

    Else it would write into the folder of the next build.
    """
    started.touch()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # only workers run this
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------- Ray


@contextmanager
def _on_ray(task: Callable[[Any, Any], Any], shared: Any, workers: int, gpus: float) -> Iterator[_Submit]:
    import ray

    started = _connect(workers)
    remote = ray.remote(_call).options(max_retries=_RETRIES, num_gpus=gpus)
    pickled = ray.put(pickle.dumps(shared))
    running: dict[Future, Any] = {}

    def submit(argument: Any) -> Future:
        reference = remote.remote(task, pickled, argument)
        future = reference.future()
        running[future] = reference
        future.add_done_callback(running.pop)
        return future

    try:
        yield submit
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        left = list(running.values())
        for reference in left:
            ray.cancel(reference, force=True)
        if left:  # until they have ended: the caller may remove or reuse the folder that they write to
            ray.wait(left, num_returns=len(left), timeout=60)
        if started:
            ray.shutdown()


def _connect(workers: int) -> bool:
    """Connect to a Ray cluster, or start one on this machine; return whether to disconnect at the end."""
    import ray

    if ray.is_initialized():
        return False
    try:
        ray.init(address="auto")
    except ConnectionError:  # there is none
        ray.init(address="local", num_cpus=workers, include_dashboard=False)
    return True
