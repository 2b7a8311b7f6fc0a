"""Another commit against this tree: building, loading, tokenizing and training, in turns.

python -m benchmarks commits v0.1.0 --output benchmark_commits.json

Each part runs in a process of its own with either code first on PYTHONPATH, on the same cells: those of `--h5ad`, or
made ones. Processor time of one thread is measured, which other programs disturb less than the clock; a ratio above 1
means that this tree is slower. The range is that of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

N_CELLS = 4_000
REPOSITORY = Path(__file__).resolve().parents[1]


def run(arguments: list[str]) -> None:
    """Measure both in turns, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks commits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the commit to compare with, by any name that git knows")
    parser.add_argument("--h5ad", help=f"file of counts, of which {N_CELLS:,} cells are taken, instead of made ones")
    parser.add_argument("--turns", type=int, default=5, help="how often each is run")
    parser.add_argument("--output", default="benchmark_commits.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        cells, old = _cells(Path(folder), args.h5ad), Path(folder) / "old"
        old.mkdir()
        archive = subprocess.run(["git", "archive", args.commit], cwd=REPOSITORY, check=True, capture_output=True)
        subprocess.run(["tar", "-x"], cwd=old, input=archive.stdout, check=True)
        runs: dict[Path, list[dict[str, float]]] = {old: [], REPOSITORY: []}
        for turn in range(args.turns):
            for tree in list(runs)[:: 1 if turn % 2 else -1]:
                runs[tree].append(_measured(tree, cells))
    parts = {part: _compared(*([run[part] for run in of] for of in runs.values())) for part in runs[old][0]}
    of = {
        "old": _git("rev-parse", "--short", args.commit),
        "new": _git("describe", "--always", "--dirty", "--exclude=*"),
    }
    print(f"\nprocessor seconds, medians of {args.turns} turns: {of['old']}, and this tree ({of['new']})")
    print(f"{'':<12}{'old':>8}{'new':>8}{'new / old':>11}{'range':>15}")
    for part, found in parts.items():
        low, high = found["range"]
        print(f"{part:<12}{found['old']:>8.3f}{found['new']:>8.3f}{found['ratio']:>11.2f}{low:>9.2f} to{high:>5.2f}")
    about = {"cells": Path(args.h5ad).name if args.h5ad else "made", "date": time.strftime("%Y-%m-%d"), **of}
    Path(args.output).write_text(json.dumps({**about, "parts": parts}, indent=1))
    print(f"\nwritten to {args.output}")


def _cells(folder: Path, h5ad: str | None) -> Path:
    """Write the cells to a file, and return its path."""
    import anndata

    from .model import _made_cells

    adata = anndata.read_h5ad(h5ad)[:N_CELLS].copy() if h5ad else _made_cells(N_CELLS)
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()


def _measured(tree: Path, cells: Path) -> dict[str, float]:
    """Return the seconds of each part with the code in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-W", "ignore", __file__, str(tree), str(cells)]  # -P: not this folder's modules
    done = subprocess.run(command, cwd=cells.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compared(old: list[float], new: list[float]) -> dict:
    ratios = [after / before for before, after in zip(old, new, strict=True)]
    medians = {"old": statistics.median(old), "new": statistics.median(new)}
    return {**medians, "ratio": medians["new"] / medians["old"], "range": [min(ratios), max(ratios)]}


def measure(tree: str, cells: str) -> dict[str, float]:
    """Return the processor seconds of each part, with the code that is imported; by names that all versions have."""
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

    import stformer_hf as sf

    if not Path(sf.__file__).is_relative_to(tree):
        raise RuntimeError(f"{sf.__file__} was imported, not the code in {tree}.")
    seconds = {}

    def clock(part: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = work()
        seconds[part] = time.process_time() - began
        return found

    with tempfile.TemporaryDirectory() as folder:
        sf.CellStore.build(f"{folder}/first", cells, report=False)  # imports what the parts need
        store = clock("build", lambda: sf.CellStore.build(f"{folder}/cells", cells, report=False))
        loader = DataLoader(store, 64, shuffle=True, collate_fn=sf.collate_cells)
        clock("load", lambda: [len(batch) for _ in range(50) for batch in loader])
        tokenizer = sf.GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 3.5], max_length=256)
        rows = [range(start, min(start + 200, len(store))) for start in range(0, len(store), 200)]
        clock("tokenize", lambda: [tokenizer.encode_cells(store.__getitems__(some)) for some in rows * 5])
        trainer = sf.STFormerPretrainer(
            TrainingArguments(
                f"{folder}/model",
                max_steps=12,
                per_device_train_batch_size=16,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=100,
            ),
            store,
            model=sf.GeneBertForPhenotypicMLM(sf.GeneBertConfig.from_tokenizer(tokenizer, size="tiny")),
            processing_class=tokenizer,
        )
        clock("train", trainer.train)
    return seconds


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
