"""The harness of all benchmarks: contenders take turns in fresh processes; medians, ratios to us, private memory.

A contender is a module-level function `name(folder: Path, **settings) -> float` that returns how much work it did
(cells), and calls `clock()` around what is timed. Each run is a process of its own, so that nothing that another
loaded, cached or allocated counts; the turns go round, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_seconds: list[float] = []
_Label = TypeVar("_Label", bound=Hashable)


@contextmanager
def clock() -> Iterator[None]:
    """Time what is inside; several in one run are added."""
    began = time.perf_counter()
    yield
    _seconds.append(time.perf_counter() - began)


def private_mb(process: str = "self") -> float:
    """Memory of a process and its children now, in MB; not that of mapped files, which the system can take back."""
    total = 0.0
    with contextlib.suppress(OSError):  # a child that just ended
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) / 1024
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(private_mb(child) for child in (task / "children").read_text().split())
    return total


class _Memory(threading.Thread):
    """Looks at the private memory every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = private_mb()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, private_mb())
            time.sleep(0.02)


def run_one(contender: str, folder: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Run a contender in this process."""
    module, _, name = contender.partition(":")
    work = getattr(importlib.import_module(module), name)
    memory = _Memory()
    memory.start()
    cells = work(Path(folder), **settings)
    return {"cells": cells, "seconds": sum(_seconds), "peak_mb": memory.peak}


def take_turns(
    contenders: Mapping[_Label, tuple[str, Mapping[str, Any]]], folder: Path, turns: int
) -> dict[_Label, dict]:
    """Run contenders in turn, each run in a fresh process.

    Parameters
    ----------
    contenders : mapping of label to (str, mapping)
        Label, such as a str -> `module:function` and its settings.
    folder : Path
        Where the data are.
    turns : int
        How often each is run.

    Returns
    -------
    dict of label to dict
        Label -> cells a second (median), peak private memory in MB (highest), all runs.
    """
    runs: dict[_Label, list[dict]] = {label: [] for label in contenders}
    for turn in range(turns):
        for label, (contender, settings) in contenders.items():
            print(f"  turn {turn + 1} of {turns}: {label}", file=sys.stderr, flush=True)
            code = (
                "import sys, json; from benchmarks.harness import run_one\n"
                "if __name__ == '__main__':\n"
                "    print('RESULT', json.dumps(run_one(*json.loads(sys.argv[1]))))"
            )
            arguments = json.dumps([contender, str(folder), dict(settings)])
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            done = subprocess.run(
                [sys.executable, "-c", code, arguments], capture_output=True, text=True, env=environment
            )
            result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not result:
                raise RuntimeError(f"{label} failed:\n{done.stderr[-3000:]}")
            runs[label].append(json.loads(result[0].removeprefix("RESULT ")))
    return {
        label: {
            "cells_per_second": statistics.median(run["cells"] / run["seconds"] for run in found),
            "peak_mb": max(run["peak_mb"] for run in found),
            "runs": found,
        }
        for label, found in runs.items()
    }


def print_table(title: str, results: Mapping[str, dict], ours: str, columns: Sequence[str] = ()) -> None:
    """Print results, with the ratio of ours to each."""
    best = results[ours]["cells_per_second"]
    print(f"\n{title}")
    print(f"{'':<58}{'cells/s':>10}{'us / it':>9}{'peak MB':>9}" + "".join(f"{name:>12}" for name in columns))
    for label, result in results.items():
        rate = result["cells_per_second"]
        extra = "".join(f"{result.get(name, ''):>12}" for name in columns)
        print(f"{label:<58}{rate:>10,.0f}{best / rate:>9.2f}{result['peak_mb']:>9,.0f}{extra}")


def installed(module: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(module) is not None
