"""Processes that train on a stream of files: each reads all cells, or only its part (`rank`, `world_size`).

OMP_NUM_THREADS=1 python -m benchmarks streams

Cells of about 300 expressed genes, in padded batches. "first of": the batches that the first of several processes
makes of an epoch, alone on the machine, since processes read independently. "batches" and "training": an epoch of
batches, and of training a model of size tiny, in two processes at once. Cells per second are those of all processes
together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .data import _n_cores
from .harness import clock, print_table, take_turns
from .scale import _small_cells

BATCH = 32  # cells, of each process
PROCESSES = 2, 8, 32


def run(arguments: list[str]) -> None:
    """Make the file, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks streams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=40_000, help="cells whose batches are read")
    parser.add_argument("--training_cells", type=int, default=200, help="cells that are trained on")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", help="where the data are kept; a temporary folder by default")
    parser.add_argument("--output", default="benchmark_streams.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cores": _n_cores(), "tables": {}}
    about["versions"] = {name: version(name) for name in ("stformer_hf", "torch", "transformers", "accelerate")}
    both = {"each reads its part": True, "each reads all": False}
    tables: dict[str, tuple[int, dict]] = {
        f"first of {n}": (args.cells, {name: ("first", {"of": n, "split": split}) for name, split in both.items()})
        for n in PROCESSES
    }
    for table, n_cells in (("batches", args.cells), ("training", args.training_cells)):
        each = {name: ("epoch", {"train": table == "training", "split": split}) for name, split in both.items()}
        tables[table] = n_cells, each
    try:
        for table, (n_cells, each) in tables.items():
            _small_cells(folder / f"{n_cells}.h5ad", n_cells)
            contenders = {
                name: (f"benchmarks.streams:{contender}", {"n_cells": n_cells, **settings})
                for name, (contender, settings) in each.items()
            }
            results = take_turns(contenders, folder, args.turns)
            print_table(f"{table}: an epoch of {n_cells:,} cells", results, "each reads its part")
            about["tables"][table] = {"cells": n_cells, "rows": results}
            Path(args.output).write_text(json.dumps(about, indent=1))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    print(f"\nwritten to {args.output}")


def first(folder: Path, n_cells: int, of: int, split: bool) -> float:
    """Make the batches of an epoch for the first of several processes."""
    from accelerate.data_loader import BatchSamplerShard

    from stformer_hf.training.streams import read_stream

    trainer = _trainer(folder / f"{n_cells}.h5ad", 0, of, split)
    batches, numbers = read_stream(
        trainer.train_dataset,
        trainer.args,
        BATCH,
        trainer.data_collator,
        max_tokens_per_batch=None,
        packing=False,
        max_cells=None,
        seed=trainer.seed_of_order,
        tokenizer=trainer.processing_class,
        mark=None,
    )
    with clock():
        for (number,) in BatchSamplerShard(numbers, of, 0):
            batches[number]
    return n_cells


def epoch(folder: Path, n_cells: int, train: bool, split: bool) -> float:
    """Read, or train on, an epoch in two processes, which begin it and end it together."""
    import stformer_hf.training.pretrainer  # noqa: F401  once, before the processes are forked

    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = folder / f"{n_cells}.h5ad", port, train, split, together.wait
    processes = [context.Process(target=_epoch_of, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    together.wait(300)
    with clock():
        together.wait(600)
    for process in processes:
        process.join()
    return n_cells


def _epoch_of(rank: int, file: Path, port: int, train: bool, split: bool, wait: Callable[[], int]) -> None:
    """Read or train on the cells of one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    from transformers import TrainerCallback

    class Together(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            wait()

    torch.set_num_threads(1)
    trainer = _trainer(file, rank, 2, split)
    if train:
        trainer.add_callback(Together())
        trainer.train()
    else:
        loader = trainer.get_train_dataloader()
        wait()
        for _ in loader:
            pass
    wait()
    torch.distributed.destroy_process_group()


def _trainer(file: Path, rank: int, number: int, split: bool) -> Any:
    """Make the trainer of one of several processes, whether or not the others are there."""
    from transformers import TrainingArguments

    from stformer_hf import (
        GeneBertConfig,
        GeneBertForPhenotypicMLM,
        GeneTokenizer,
        IterableAnnDataset,
        STFormerPretrainer,
    )

    class Arguments(TrainingArguments):
        process_index = property(lambda _: rank)
        world_size = property(lambda _: number)

    parts = {"rank": rank, "world_size": number} if split else {}
    tokenizer = GeneTokenizer(genes=IterableAnnDataset(file).gene_ids, bin_edges=[0.5, 1.5, 3.5], max_length=2048)
    arguments = Arguments(
        tempfile.mkdtemp(dir=file.parent),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    stream = IterableAnnDataset(file, tokenizer, shuffle=True, **parts)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    return STFormerPretrainer(arguments, stream, model=model, processing_class=tokenizer)
