"""Cells to masked batches, and batches through a model, against transformers' collator, BERT and ModernBERT.

All get the same cells: of `--h5ad`, or made ones, whose numbers of expressed genes are log-normal, as those of real
cells are. All models have the same number of layers, heads, hidden and feed-forward units (ModernBERT, whose gated
feed-forward block has three matrices instead of two, two thirds of these: as many weights; and full attention in
each layer), the same vocabulary, tied weights, hidden dropout 0.1 and no attention dropout (which would keep BERT
from sdpa's fast kernels), the same masks and the same AdamW; sdpa, or flash attention 2 where it is installed.
Tokens are those of the cells: padding does work, but does not count. "random" are batches of random cells; "grouped"
are the same cells, sorted by length and then cut into batches. On a CPU all compute in float32 on 2 threads, on a
GPU in bfloat16 (autocast).

MFU, on a GPU, is the share of the device's peak that the useful work makes up, counted alike for all: a token's
forward pass is 2 FLOP a weight of the encoder, 4 * layers * hidden * length of its cell for attention, and at a masked
position 2 FLOP a weight of the head and of what follows the attention of the last layer; a training step is three
forward passes. (Until 2026-11-29 that part of the last layer counted for all tokens.)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from .data import _n_cores
from .harness import clock, print_table, private_mb, take_turns
from .tokens import _one_core

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from stformer_hf import GeneTokenizer
    from stformer_hf.batches.collate import CellCollator

BATCH = 64  # cells a batch of the collators
THREADS = 2
DROPOUT = 0.1
MASKED = 0.15
MAX_LENGTH = 2048
N_GENES = 20_000
LENGTH_MEDIAN, LENGTH_SIGMA = 800, 0.35  # of the made cells' numbers of expressed genes


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cells, and one turn")
    parser.add_argument("--h5ad", help="file of counts whose cells to take, instead of made ones")
    parser.add_argument("--size", help="of the models: tiny, small, base, large; tiny, or base on a GPU, by default")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--output", default="benchmark_model.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    turns = 1 if args.quick else args.turns
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    size = args.size or ("base" if device else "tiny")
    n_cells = (256 if args.quick else 1024) if device else (32 if args.quick else 64)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        _prepare(folder, args.h5ad, 1024 if args.quick else 4096)
        rank = take_turns(_collators("rank"), folder, turns)
        binned = take_turns(_collators("binned"), folder, turns)
        settings = {"size": size, "n_cells": n_cells, "batch_size": 16}
        forward = _measure("rank", {**settings, "train": False}, folder, turns, device)
        step = _measure("rank", settings, folder, turns, device)
        step_binned = _measure("binned", settings, folder, turns, device)
        memory = _memory(size, folder)
        mix = {scheme: _mix(_lengths(folder, scheme)) for scheme in ("rank", "binned")}
        n_genes = len(json.loads((folder / "rank" / "gene_vocabulary.json").read_text())["genes"])
    finally:
        shutil.rmtree(folder)
    about = {
        "cells": Path(args.h5ad).name if args.h5ad else f"made, log-normal({LENGTH_MEDIAN}, {LENGTH_SIGMA})",
        "genes": n_genes,
        "tokens a cell": mix,
        **settings,
        "hidden dropout": DROPOUT,
        "device": device or f"{os.uname().machine}, {_n_cores()} cores, {THREADS} threads, float32",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "torch", "transformers")},
    }
    print(f"\nCells: {about['cells']}; {n_genes:,} genes; tokens a cell: {_told(mix['rank'])}")
    print(f"Medians of {turns} turns, {about['device']}, {about['date']}")
    for result in (*rank.values(), *binned.values()):
        result["batches/s"] = f"{result['cells_per_second'] / BATCH:.0f}"
    print_table(
        f"Masked batches of {BATCH} cells, rank tokens, 1 core", rank, "ours, tokenized dataset, padded", ["batches/s"]
    )
    print_table(
        f"Masked batches of {BATCH} cells, binned tokens, 1 core",
        binned,
        "ours, tokenized dataset, padded",
        ["batches/s"],
    )
    columns = ["tokens/s", "padding", "work MB", *(["MFU"] if device else [])]
    about_batches = f"{size} models, {n_cells} cells in batches of 16"
    print_table(f"Encoder, forward, rank tokens; {about_batches}", forward, "GeneBert, packed", columns)
    print_table(f"Training step, rank tokens; {about_batches}", step, "GeneBert, packed", columns)
    print_table(f"Training step, binned tokens; {about_batches}", step_binned, "GeneBert, packed", columns)
    for n, table in memory.items():
        title = f"Memory of a training step, {size} models, {n} of 2,048 tokens, a vocabulary of 25,000"
        print_table(title, table, "GeneBert", ["work MB"])
    tables = {
        "collate, rank": rank,
        "collate, binned": binned,
        "forward": forward,
        "step": step,
        "step, binned": step_binned,
        "memory": memory,
    }
    Path(args.output).write_text(json.dumps({**about, "tables": tables}, indent=1))
    print(f"\nwritten to {args.output}")


# ---------------------------------------------------------------------- the data


def _made_cells(n_cells: int, median: int = LENGTH_MEDIAN) -> AnnData:
    """Cells whose numbers of expressed genes are log-normal; counts mostly 1."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), LENGTH_SIGMA, n_cells), 200, 6_000).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    # Each cell expresses every k-th gene, shifted here and there: sorted and distinct.
    gaps = np.repeat(N_GENES // lengths, lengths)
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    genes = within * gaps + rng.integers(0, 1 << 30, len(within)) % gaps
    counts = np.minimum(rng.zipf(2.0, len(genes)), 4_000).astype(np.float32)
    adata = AnnData(sparse.csr_matrix((counts, genes.astype(np.int32), indptr), shape=(n_cells, N_GENES)))
    adata.var_names = [f"ENSG{i:011d}" for i in range(N_GENES)]
    return adata


def _prepare(folder: Path, h5ad: str | None, n_cells: int) -> None:
    """Make the store, the tokenizers and the tokenized datasets."""
    from stformer_hf import CellStore, GeneTokenizer, estimate_gene_medians

    CellStore.build(folder / "all", h5ad or _made_cells(n_cells))
    store = CellStore(folder / "all")
    rows = np.random.default_rng(0).permutation(np.flatnonzero(store.lengths))[:n_cells]
    store = CellStore.build(folder / "store", store.select(rows))
    medians = estimate_gene_medians(store)
    tokenizers = {
        "rank": GeneTokenizer.from_store(store, "rank", medians=medians, max_length=MAX_LENGTH),
        "binned": GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 2.5, 4.5, 8.5], max_length=MAX_LENGTH),
    }
    for scheme, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / scheme)
        tokenizer.tokenize_store(store, folder / f"{scheme}-tokens")


def _lengths(folder: Path, scheme: str) -> np.ndarray:
    """Tokens of each cell."""
    return np.array(json.loads((folder / f"{scheme}-tokens" / "lengths.json").read_text()))


def _mix(lengths: np.ndarray) -> dict[str, int]:
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    found = {"mean": lengths.mean(), "5 %": low, "median": middle, "95 %": high, "max": lengths.max()}
    return {name: round(float(value)) for name, value in found.items()}


def _told(mix: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in mix.items())


# ---------------------------------------------------------------------- collating


def _collators(scheme: str) -> dict:
    def ours(**settings: Any) -> tuple[str, dict]:
        return "benchmarks.model:collate_ours", {"scheme": scheme, **settings}

    def stock(**settings: Any) -> tuple[str, dict]:
        return "benchmarks.model:collate_stock", {"scheme": scheme, **settings}

    name = "DataCollatorForLanguageModeling"
    contenders = {
        "ours, tokenized dataset, padded": ours(source="dataset"),
        "ours, tokenized dataset, packed": ours(source="dataset", packing=True),
        "ours, store, tokenized on the way, padded": ours(source="store"),
        "ours, store, tokenized on the way, packed": ours(source="store", packing=True),
        "ours, rows, padded": ours(source="rows"),
        f"{name}, rows": stock(source="rows"),
        f"{name}, tokenized dataset": stock(source="dataset"),
    }
    if scheme == "rank":  # binned tokens have types, and only GeneTokenizer gives these
        contenders[f"{name}, rows, fast tokenizer"] = stock(source="rows", fast=True)
    return contenders


def _collator(tokenizer: GeneTokenizer, packing: bool) -> CellCollator:
    """Our collator of a scheme."""
    from stformer_hf.batches import collators

    rank = tokenizer.scheme == "rank"
    make = collators.DataCollatorForGeneRankMLM if rank else collators.DataCollatorForPhenotypicMLM
    return make(tokenizer, mlm_probability=MASKED, packing=packing)


def _rows_of(folder: Path, scheme: str, columns: list[str]) -> Dataset:
    """Open a tokenized dataset, with the columns that a collator reads."""
    from datasets import load_from_disk

    return load_from_disk(str(folder / f"{scheme}-tokens")).select_columns(columns)


def collate_ours(folder: Path, scheme: str, source: str, packing: bool = False) -> float:
    """Make batches of a store's cells, of a tokenized dataset as CellTrainer reads it, or of its rows as lists."""
    from stformer_hf import CellStore, GeneTokenizer
    from stformer_hf.batches.token_rows import TokenRows

    collate = _collator(GeneTokenizer.from_pretrained(folder / scheme), packing)
    data = CellStore(folder / "store")
    if source != "store":
        data = _rows_of(folder, scheme, ["input_ids", "token_type_ids", "cell_id"])
    if source == "dataset":
        data = TokenRows(data)
    return _time_batches(collate, data, source, _lengths(folder, scheme))


def collate_stock(folder: Path, scheme: str, source: str, fast: bool = False) -> float:
    """Make batches with transformers' collator, of the columns that the scheme needs and no other."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    from stformer_hf import GeneTokenizer

    tokenizer = GeneTokenizer.from_pretrained(folder / scheme)
    data = _rows_of(folder, scheme, ["input_ids"] if scheme == "rank" else ["input_ids", "token_type_ids"])
    if fast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / scheme / "tokenizer.json"), **tokenizer.special_tokens_map
        )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    return _time_batches(collate, data, source, _lengths(folder, scheme))


def _time_batches(collate: Callable, data: Any, source: str, lengths: np.ndarray) -> float:
    """Time an epoch of random batches on one core; the first batches are seen to hold the cells, masked."""
    _one_core()
    torch.set_num_threads(1)
    rows_in_order = np.random.default_rng(1).permutation(len(data))
    orders = rows_in_order[: len(data) // BATCH * BATCH].reshape(-1, BATCH).tolist()
    if source == "rows":
        rows = [data[i] for i in range(len(data))]
        batches = [[rows[i] for i in order] for order in orders]
        for batch, order in zip(batches[:4], orders, strict=False):
            _check(collate(batch), lengths[order])
        with clock():
            for batch in batches:
                collate(batch)
    else:
        for order in orders[:4]:
            _check(collate(data.__getitems__(order)), lengths[order])
        with clock():
            for order in orders:
                collate(data.__getitems__(order))
    return len(orders) * BATCH


def _check(batch: dict, lengths: np.ndarray) -> None:
    """See that a batch has all tokens, and masks of the wanted share."""
    n_tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    share = int((batch["labels"] != -100).sum()) / n_tokens
    if n_tokens != lengths.sum() or abs(share - MASKED) > 0.02:
        raise RuntimeError(f"A batch of {n_tokens} tokens, {share:.3f} of them masked, for {lengths.sum()} tokens.")


# ---------------------------------------------------------------------- models


def _measure(scheme: str, settings: dict, folder: Path, turns: int, device: str | None) -> dict[str, dict]:
    """Let the models take turns; add tokens a second, the share of padding, the memory of the work, and MFU."""
    from stformer_hf.training.throughput import BF16_PEAKS

    contenders = {
        "GeneBert, packed": ("gene_bert", "packed"),
        "GeneBert, padded, grouped": ("gene_bert", "grouped"),
        "GeneBert, padded, random": ("gene_bert", "random"),
        "BertForMaskedLM, padded, random": ("bert", "random"),
        "BertForMaskedLM, padded, grouped": ("bert", "grouped"),
    }
    if scheme == "rank":  # ModernBERT has no token types
        contenders["ModernBertForMaskedLM, padded, random"] = ("modernbert", "random")
        if settings.get("train", True):
            contenders["ModernBertForMaskedLM, sparse_prediction"] = ("modernbert_sparse", "random")
    results = take_turns(
        {
            label: (
                "benchmarks.model:through_model",
                {"model": model, "batches": batches, "scheme": scheme, "note": f"{model}-{batches}.json", **settings},
            )
            for label, (model, batches) in contenders.items()
        },
        folder,
        turns,
    )
    for label, (model, batches) in contenders.items():
        orders = _batches_of(folder, scheme, batches, settings["n_cells"], settings["batch_size"])
        lengths = _lengths(folder, scheme)[orders]
        cells_per_second = results[label]["cells_per_second"]
        room = lengths.sum() if batches == "packed" else (lengths.max(axis=1) * lengths.shape[1]).sum()
        results[label]["tokens/s"] = f"{lengths.mean() * cells_per_second:,.0f}"
        results[label]["padding"] = f"{1 - lengths.sum() / room:.0%}"
        note = _read_note(folder / f"{model}-{batches}.json", results[label])
        peak = BF16_PEAKS.get(device or "")
        if peak:
            flops = useful_flops(lengths.ravel(), note["vocab_size"], settings["size"], settings.get("train", True))
            results[label]["MFU"] = f"{flops / lengths.size * cells_per_second / peak:.1%}"
    return results


def _batches_of(folder: Path, scheme: str, kind: str, n_cells: int, batch_size: int) -> np.ndarray:
    """Rows of the store (n_batches, batch_size): the same cells, in random order or sorted by length."""
    lengths = _lengths(folder, scheme)
    rows = np.random.default_rng(2).permutation(len(lengths))[: min(n_cells, len(lengths)) // batch_size * batch_size]
    if kind == "grouped":
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    return rows.reshape(-1, batch_size)


def useful_flops(lengths: np.ndarray, vocab_size: int, size: str | tuple, train: bool = True) -> float:
    """Count the work that cells are worth; see the head of this file."""
    layers, _, hidden, intermediate, _ = _shape(size)
    weights = layers * (4 * hidden**2 + 2 * hidden * intermediate)
    head = hidden**2 + hidden * vocab_size
    attention = 4 * layers * hidden * (lengths.astype(float) ** 2).sum()
    if not train:
        return 2 * weights * lengths.sum() + attention
    last = hidden**2 + 2 * hidden * intermediate  # what follows the attention of the last layer: at masked tokens
    return 3 * (2 * (weights - last + MASKED * (head + last)) * lengths.sum() + attention)


def _shape(size: str | tuple) -> tuple:
    """Return layers, heads, hidden size, feed-forward size and attention dropout of a size that has a name."""
    from stformer_hf.models.gene_bert.configuration_gene_bert import SIZES

    return SIZES[size] if isinstance(size, str) else size


def make_model(
    name: str,
    size: str | tuple,
    vocab_size: int,
    type_vocab_size: int,
    pad_token_id: int,
    sparse: bool = True,
    attention: str | None = None,
) -> PreTrainedModel:
    """Make a model for masked tokens, on the GPU if there is one."""
    from transformers import AutoModelForMaskedLM, BertConfig, ModernBertConfig
    from transformers.utils import is_flash_attn_2_available

    from stformer_hf import GeneBertConfig

    layers, heads, hidden, intermediate, _ = _shape(size)
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
    }
    if name == "gene_bert":
        dropout = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": 0.0}
        places = "learned" if type_vocab_size < 5 else "none"  # as from_tokenizer has it, for ranks and for bins
        config = GeneBertConfig(
            **shape,
            **dropout,
            type_vocab_size=type_vocab_size,
            sparse_prediction=sparse,
            position_embedding_type=places,
            max_position_embeddings=MAX_LENGTH,
        )
    elif name == "bert":
        dropout = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**shape, **dropout, type_vocab_size=type_vocab_size, max_position_embeddings=MAX_LENGTH)
    else:
        shape["intermediate_size"] = round(intermediate * 2 / 3 / 8) * 8
        ids = dict.fromkeys(["bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"], 0)
        config = ModernBertConfig(
            **shape,
            **ids,
            embedding_dropout=DROPOUT,
            mlp_dropout=DROPOUT,
            layer_types=["full_attention"] * layers,
            max_position_embeddings=MAX_LENGTH,
            sparse_prediction=name == "modernbert_sparse",
        )
    on_gpu = torch.cuda.is_available()
    attention = attention or ("flash_attention_2" if on_gpu and is_flash_attn_2_available() else "sdpa")
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    return model.to("cuda" if on_gpu else "cpu")


def through_model(
    folder: Path,
    model: str,
    batches: str,
    scheme: str,
    size: str,
    n_cells: int,
    batch_size: int,
    note: str,
    train: bool = True,
) -> float:
    """Put batches through an encoder, or through training steps."""
    from stformer_hf import CellStore, GeneTokenizer

    tokenizer, store = GeneTokenizer.from_pretrained(folder / scheme), CellStore(folder / "store")
    collate = _collator(tokenizer, packing=batches == "packed")
    made = [collate(store.__getitems__(rows)) for rows in _batches_of(folder, scheme, batches, n_cells, batch_size)]
    if model.startswith("modernbert"):
        for batch in made:
            del batch["token_type_ids"]
    net = make_model(model, size, len(tokenizer), tokenizer.type_vocab_size, tokenizer.pad_token_id)
    _time_model(net, made, train, folder / note)
    return len(made) * batch_size


def _time_model(net: PreTrainedModel, batches: list[dict], train: bool, note: Path) -> None:
    """Time batches after a round of warming, and note what is known here alone."""
    torch.manual_seed(0)
    on_gpu = net.device.type == "cuda"
    if on_gpu:
        batches = [{name: _moved(value) for name, value in batch.items()} for batch in batches]
    else:
        torch.set_num_threads(THREADS)
    net.train(train)
    before = private_mb()
    if train:
        work = functools.partial(_train, net, torch.optim.AdamW(net.parameters(), 1e-4, fused=True))
    else:
        work = functools.partial(_encode, net.base_model)
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    for batch in batches if on_gpu else [longest]:
        work(batch)
    _wait(on_gpu)
    with clock():
        for batch in batches:
            work(batch)
        _wait(on_gpu)
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    note.write_text(json.dumps({"before_mb": before, "gpu_mb": gpu_mb, "vocab_size": net.config.vocab_size}))


def _read_note(note: Path, result: dict) -> dict:
    """Read what a process noted, and add the memory of its work: on a GPU all of it, else above the model's."""
    found = json.loads(note.read_text())
    memory = found["gpu_mb"] or result["peak_mb"] - found["before_mb"]
    result["work MB"] = f"{memory:,.0f}"
    return found


def _moved(value: Any) -> Any:
    return value.cuda() if torch.is_tensor(value) else value


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _train(net: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """Make a training step."""
    with torch.autocast(net.device.type, torch.bfloat16, enabled=net.device.type == "cuda"):
        loss = net(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _encode(encoder: PreTrainedModel, batch: dict) -> None:
    """Return hidden states."""
    batch = {name: value for name, value in batch.items() if name != "labels"}
    with (
        torch.inference_mode(),
        torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.device.type == "cuda"),
    ):
        encoder(**batch)


# ---------------------------------------------------------------------- memory


def _memory(size: str, folder: Path) -> dict[str, dict]:
    """Let models make a step on few and on many tokens of a large vocabulary: number of cells -> results."""
    contenders: dict[str, dict[str, Any]] = {
        "GeneBert": {"model": "gene_bert"},
        "GeneBert, logits at all positions": {"model": "gene_bert", "sparse": False},
        "BertForMaskedLM": {"model": "bert"},
        "ModernBertForMaskedLM": {"model": "modernbert"},
    }
    found = {}
    for n_cells in (1, 4):
        settings = {"size": size, "n_cells": n_cells, "note": "memory.json"}
        table: dict[str, dict] = {}
        for label, model in contenders.items():
            table |= take_turns({label: ("benchmarks.model:step_of_many_genes", {**model, **settings})}, folder, 1)
            _read_note(folder / "memory.json", table[label])
        found[str(n_cells)] = table
    return found


def step_of_many_genes(folder: Path, model: str, size: str, n_cells: int, note: str, sparse: bool = True) -> float:
    """Make a training step on 2,048 tokens a cell, of a vocabulary of 25,000."""
    rng = torch.Generator().manual_seed(0)
    shape, n_ids = (n_cells, 2048), 25_000
    ids = torch.randint(4, n_ids, shape, generator=rng)
    labels = torch.where(torch.rand(shape, generator=rng) < MASKED, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if model != "modernbert":
        batch["token_type_ids"] = torch.ones_like(ids)
    net = make_model(model, size, n_ids, 2, 3, sparse)
    _time_model(net, [batch], True, folder / note)
    return n_cells
