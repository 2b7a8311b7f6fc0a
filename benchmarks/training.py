"""An epoch of training: padding and cells a second of each order of the cells, and what a trainer costs.

Every contender trains the same model (GeneBert, dropout 0.1, none in attention, AdamW, clipping, linear schedule) for
one epoch of the same cells with rank tokens, tokenized on the way from a store, but for the first batches, which are
not timed. "random", "grouped" (by length) and "budget" are padded; "packed" has the same budget of tokens a batch, and
"random, packed" the same cells. The bare loop is what one would write by hand: a DataLoader's batches, forward,
backward, clip, step. Tokens are those of the cells: padding does work, but does not count.

"Whole cells" sets a model whose `[CLS]` is the whole cell (`cell_embedding`) beside the same model whose `[CLS]` is a
token, on binned tokens of random batches: training by CellTrainer, and `embed` of an AnnData.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import _n_cores
from .harness import clock, print_table, take_turns
from .model import DROPOUT, MAX_LENGTH, _lengths, _mix, _prepare, _told

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

BATCH = 16
THREADS = 2
WARM_UP = 2  # steps that are not timed
# (whole cells, tokens a cell); a model of whole cells is trained on few tokens by the recipes of tiny models
WHOLE_CELLS = {
    "[CLS] is a token, 512 tokens": (False, 512),
    "[CLS] is the whole cell, 512 tokens": (True, 512),
    "[CLS] is the whole cell, 34 tokens": (True, 34),
}
ORDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "random": ({}, {}),
    "random, packed": ({}, {"packing": True}),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, {}),
    "budget": ({}, {"max_tokens_per_batch": "budget"}),
    "packed": ({}, {"max_tokens_per_batch": "budget", "packing": True}),
}


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cells, and one turn")
    parser.add_argument("--h5ad", help="file of counts whose cells to take, instead of made ones")
    parser.add_argument("--size", help="of the model: tiny, small, base, large; tiny, or base on a GPU, by default")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--parts", nargs="+", choices=("orders", "whole_cells"), default=["orders", "whole_cells"])
    parser.add_argument("--output", default="benchmark_training.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    turns = 1 if args.quick else args.turns
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    settings = {
        "size": args.size or ("base" if device else "tiny"),
        "n_cells": (1_024 if args.quick else 4_096) if device else (96 if args.quick else 384),
    }
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        _prepare(folder, args.h5ad, 1_024 if args.quick else 100_000)
        shares = _useful_shares(_lengths(folder, "rank"))
        mix = _mix(_lengths(folder, "rank"))
        results = _compare_orders(folder, settings, turns) if "orders" in args.parts else {}
        whole_cells = _compare_whole_cells(folder, settings, turns) if "whole_cells" in args.parts else {}
    finally:
        shutil.rmtree(folder)
    about = {
        "cells": Path(args.h5ad).name if args.h5ad else "made",
        "tokens a cell": mix,
        **settings,
        "device": device or f"{os.uname().machine}, {_n_cores()} cores, {THREADS} threads, float32",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "torch", "transformers")},
    }
    print(f"\nCells: {about['cells']}; tokens a cell: {_told(mix)}; medians of {turns} turns, {about['device']}")
    print(f"\nShare of useful tokens, an epoch of all cells, {BATCH} a batch (or as many tokens as those have)")
    for order, share in shares.items():
        print(f"  {order:<30}{share:.3f}")
    if results:
        title = f"Training, {settings['size']} model, {settings['n_cells']} cells"
        print_table(title, results, "CellTrainer, packed", ["tokens/s", "useful"])
        for order in ("random", "packed"):
            ours, bare = (results[f"{by}, {order}"]["cells_per_second"] for by in ("CellTrainer", "bare loop"))
            print(f"CellTrainer takes {bare / ours:.3f} times as long as the bare loop ({order}).")
    for work, table in whole_cells.items():
        print_table(f"Whole cells {work}, {settings['size']} model", table, "[CLS] is the whole cell, 512 tokens")
    tables = {"training": results, **{f"whole cells {work}": table for work, table in whole_cells.items()}}
    Path(args.output).write_text(json.dumps({**about, "useful": shares, "tables": tables}, indent=1))
    print(f"\nwritten to {args.output}")


def _compare_orders(folder: Path, settings: dict, turns: int) -> dict[str, dict]:
    """Train by each order, by transformers' own trainer and by a bare loop."""
    contenders = {f"CellTrainer, {order}": ("cells_of_trainer", order) for order in ORDERS}
    contenders["Trainer of transformers, random"] = ("cells_of_stock_trainer", "random")
    contenders |= {f"bare loop, {order}": ("cells_of_bare_loop", order) for order in ("random", "packed")}
    results = take_turns(
        {
            label: (f"benchmarks.training:{name}", {**settings, "order": order, "note": str(folder / label)})
            for label, (name, order) in contenders.items()
        },
        folder,
        turns,
    )
    for label, result in results.items():
        note = json.loads((folder / label).read_text())
        a_cell = note["tokens"] / note["cells"]
        result["tokens/s"] = f"{result['cells_per_second'] * a_cell:,.0f}"
        result["useful"] = f"{note['tokens'] / note['positions']:.3f}"
    return results


def _compare_whole_cells(folder: Path, settings: dict, turns: int) -> dict[str, dict]:
    """Train models whose `[CLS]` is the whole cell, and one whose `[CLS]` is a token, and embed cells with them."""
    return {
        work: take_turns(
            {
                label: (
                    f"benchmarks.training:cells_{work}",
                    {**settings, "whole_cell": whole_cell, "max_length": max_length},
                )
                for label, (whole_cell, max_length) in WHOLE_CELLS.items()
            },
            folder,
            turns,
        )
        for work in ("trained", "embedded")
    }


def _useful_shares(lengths: np.ndarray) -> dict[str, float]:
    """Measure the share of tokens among the positions of an epoch's batches, an order each."""
    from stformer_hf import EvenBatchSampler, LengthGroupedSampler, TokenBudgetBatchSampler, padding_share
    from stformer_hf.batches.samplers import BlockShuffleSampler

    budget = _budget(lengths)
    shares = {
        "random": 1 - padding_share(lengths, EvenBatchSampler(BlockShuffleSampler(lengths, 1), BATCH)),
        "grouped": 1 - padding_share(lengths, EvenBatchSampler(LengthGroupedSampler(lengths, BATCH), BATCH)),
        "budget": 1 - padding_share(lengths, TokenBudgetBatchSampler(lengths, budget)),
        "packed": 1.0,
    }
    packed = TokenBudgetBatchSampler(lengths, budget, packing=True)
    return {**shares, "packed: of the budget, filled": float(lengths.sum() / (len(packed) * budget))}


def _budget(lengths: np.ndarray) -> int:
    """Return the tokens that random batches have, and room for the longest cell."""
    return max(int(BATCH * lengths.mean()), int(lengths.max()))


# ---------------------------------------------------------------------- contenders


class _Counted:
    """Counts what a model is given, and keeps the time, from the third batch on."""

    def __init__(self, model: torch.nn.Module):
        self.counts = {"cells": 0, "tokens": 0, "positions": 0}
        self._n_steps, self._clock = 0, clock()
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: torch.nn.Module, args: tuple, batch: dict) -> None:
        self._n_steps += 1
        if self._n_steps == WARM_UP + 1:
            self._wait()
            self._clock.__enter__()
        if self._n_steps > WARM_UP:
            ids = batch["input_ids"]
            packed = "cu_seq_lens_q" in batch
            self.counts["cells"] += len(batch["cu_seq_lens_q"]) - 1 if packed else len(ids)
            self.counts["tokens"] += ids.numel() if packed else int(batch["attention_mask"].sum())
            self.counts["positions"] += ids.numel()

    def stop(self, note: str) -> float:
        self._wait()
        self._clock.__exit__(None, None, None)
        Path(note).write_text(json.dumps(self.counts))
        return self.counts["cells"]

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Make the arguments of an epoch."""
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )


def _trainer(folder: Path, size: str, n_cells: int, order: str, stock: bool = False) -> Trainer:
    from transformers import AutoTokenizer, Trainer

    from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, STFormerPretrainer

    torch.set_num_threads(THREADS)
    store = CellStore(folder / "store")
    store = store.select(np.random.default_rng(1).permutation(len(store))[:n_cells])
    tokenizer = AutoTokenizer.from_pretrained(folder / "rank")
    dropout = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size=size, **dropout))
    sampling, own = ORDERS[order]
    if "max_tokens_per_batch" in own:
        lengths = np.minimum(store.lengths + tokenizer.add_cls + tokenizer.add_eos, MAX_LENGTH)
        own = {**own, "max_tokens_per_batch": _budget(lengths)}
    arguments = _arguments(folder, logging_steps=10, **({} if stock else sampling))
    trainer = STFormerPretrainer(arguments, store, model=model, processing_class=tokenizer, **own)
    if stock:
        arguments.remove_unused_columns = False
        trainer = Trainer(model, arguments, data_collator=trainer.data_collator, train_dataset=store)
    return trainer


def cells_of_trainer(folder: Path, size: str, n_cells: int, order: str, note: str) -> float:
    """Train an epoch by CellTrainer."""
    trainer = _trainer(folder, size, n_cells, order)
    counted = _Counted(trainer.model)
    trainer.train()
    return counted.stop(note)


def cells_of_stock_trainer(folder: Path, size: str, n_cells: int, order: str, note: str) -> float:
    """Train an epoch by transformers' Trainer, with the collator of this package."""
    trainer = _trainer(folder, size, n_cells, order, stock=True)
    counted = _Counted(trainer.model)
    trainer.train()
    return counted.stop(note)


def cells_of_bare_loop(folder: Path, size: str, n_cells: int, order: str, note: str) -> float:
    """Train an epoch by a loop, on the batches of CellTrainer."""
    from transformers import get_linear_schedule_with_warmup

    trainer = _trainer(folder, size, n_cells, order)
    model, device = trainer.model, trainer.args.device
    loader = trainer.get_train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    counted = _Counted(model)
    model.train()
    for batch in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return counted.stop(note)


# ---------------------------------------------------------------------- whole cells


def _whole_cell_model(folder: Path, size: str, n_cells: int, whole_cell: bool, max_length: int) -> tuple:
    """Make the cells, their tokenizer and a new model."""
    from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer

    torch.set_num_threads(THREADS)
    store = CellStore(folder / "store")
    cells = store.select(np.random.default_rng(1).permutation(len(store))[:n_cells])
    tokenizer = GeneTokenizer.from_store(store, max_length=max_length, whole_cell=whole_cell)
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, size=size, attention_probs_dropout_prob=0.0)
    return cells, tokenizer, GeneBertForPhenotypicMLM(config)


def cells_trained(folder: Path, size: str, n_cells: int, whole_cell: bool, max_length: int) -> float:
    """Train an epoch by CellTrainer on masked genes."""
    from stformer_hf import STFormerPretrainer

    cells, tokenizer, model = _whole_cell_model(folder, size, n_cells, whole_cell, max_length)
    trainer = STFormerPretrainer(_arguments(folder), cells, model=model, processing_class=tokenizer)
    counted = _Counted(trainer.model)
    trainer.train()
    return counted.stop(str(folder / "whole-cells.json"))


def cells_embedded(folder: Path, size: str, n_cells: int, whole_cell: bool, max_length: int) -> float:
    """Embed the cells."""
    from anndata import AnnData

    from stformer_hf import embed

    cells, tokenizer, model = _whole_cell_model(folder, size, n_cells, whole_cell, max_length)
    adata = AnnData(cells.rows(slice(None)))
    adata.var_names = cells.gene_ids
    embed(adata[:BATCH].copy(), model, tokenizer=tokenizer, pooling="cls")
    with clock():
        embed(adata, model, tokenizer=tokenizer, pooling="cls")
    return n_cells
