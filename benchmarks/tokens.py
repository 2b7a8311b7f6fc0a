"""Cells to tokens, against the ways of working of Geneformer's and PerturbGene's tokenizers.

Neither is in a package index, so both are reimplemented here from their descriptions, with the operations that these
name and nothing that slows them: Geneformer normalises chunks of sparse rows and sorts each cell's scores,
and builds its dataset of lists, cut by a map; PerturbGene makes strings of a cell's bins and looks each up. All get
the same cells: 30,000 x 20,000, about 2,000 counts a cell. What runs on one core is held to one. Before the clock
starts, each is seen to give our tokens.
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
from typing import Any

import numpy as np
from anndata import read_h5ad
from scipy import sparse
from transformers import PreTrainedTokenizer

from .data import N_GENES, _make_cells, _n_cores
from .harness import clock, print_table, take_turns

MAX_LENGTH = 2048
EDGES = [0.1]


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tokens", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 cells instead of 30,000, and one turn")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", help="where the data are kept; a temporary folder by default")
    parser.add_argument("--output", default="benchmark_tokens.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    n_cells, turns = (2_000, 1) if args.quick else (30_000, args.turns)
    parent = Path(args.folder or tempfile.mkdtemp(prefix="benchmark-"))
    folder = parent / f"{n_cells}-cells"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _prepare(folder, n_cells)
        ranks = take_turns(
            {
                "store -> saved dataset": ("benchmarks.tokens:save_ours", {"scheme": "rank"}),
                "store -> saved dataset, 2 workers": (
                    "benchmarks.tokens:save_ours",
                    {"scheme": "rank", "workers": 2},
                ),
                "h5ad -> store -> saved dataset": ("benchmarks.tokens:save_ours", {"scheme": "rank", "build": True}),
                "h5ad -> saved dataset, Geneformer's way": ("benchmarks.tokens:save_geneformers_way", {}),
                "store -> tokens in memory": ("benchmarks.tokens:encode_ours", {"scheme": "rank"}),
                "h5ad -> tokens in memory, Geneformer's way": ("benchmarks.tokens:rank_geneformers_way", {}),
            },
            folder,
            turns,
        )
        bins = take_turns(
            {
                "store -> tokens in memory": ("benchmarks.tokens:encode_ours", {"scheme": "binned"}),
                "h5ad -> tokens in memory, PerturbGene's way": ("benchmarks.tokens:bin_perturbgenes_way", {}),
                "store -> saved dataset": ("benchmarks.tokens:save_ours", {"scheme": "binned"}),
                "store -> saved dataset, 2 workers": (
                    "benchmarks.tokens:save_ours",
                    {"scheme": "binned", "workers": 2},
                ),
            },
            folder,
            turns,
        )
    finally:
        if args.folder is None:
            shutil.rmtree(parent)
    about = {
        "cells": n_cells,
        "genes": N_GENES,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.uname().machine}, {_n_cores()} cores",
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "datasets", "transformers")},
    }
    print(f"\n{n_cells:,} cells x {N_GENES:,} genes, medians of {turns} turns, {about['machine']}, {about['date']}")
    print_table(f"Rank tokens, at most {MAX_LENGTH} a cell", ranks, "store -> saved dataset")
    print_table(f"Binned tokens, the first {MAX_LENGTH} a cell", bins, "store -> tokens in memory")
    Path(args.output).write_text(json.dumps({**about, "tables": {"ranks": ranks, "bins": bins}}, indent=1))
    print(f"\nwritten to {args.output}")


def _prepare(folder: Path, n_cells: int) -> None:
    """Make the cells, the store, medians and the tokenizers."""
    from stformer_hf import CellStore, GeneTokenizer

    _make_cells(folder / "cells.h5ad", n_cells)
    if not (folder / "store").exists():
        CellStore.build(folder / "store", folder / "cells.h5ad")
    store = CellStore(folder / "store")
    values = np.random.default_rng(0).lognormal(0, 1, len(store.genes))
    medians = dict(zip(store.gene_ids, values.tolist(), strict=True))
    GeneTokenizer.from_store(
        store, "rank", medians=medians, max_length=MAX_LENGTH, add_cls=False, add_eos=False
    ).save_pretrained(folder / "rank")
    GeneTokenizer.from_store(store, bin_edges=EDGES, max_length=MAX_LENGTH, truncation="head").save_pretrained(
        folder / "binned"
    )


def _one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _wanted(folder: Path, scheme: str, n_cells: int = 50) -> list[tuple[list[int], list[int]]]:
    """Return our tokens of the first cells."""
    from stformer_hf import CellStore, GeneTokenizer

    tokens = GeneTokenizer.from_pretrained(folder / scheme)(CellStore(folder / "store").__getitems__(range(n_cells)))
    return list(zip(tokens["input_ids"], tokens["token_type_ids"], strict=True))


def _check(found: list, folder: Path, scheme: str) -> None:
    """See that a peer gives our tokens."""
    wanted = _wanted(folder, scheme)
    if len(found) != len(wanted):
        raise RuntimeError(f"{len(found)} cells instead of {len(wanted)}.")
    for cell, (ours, theirs) in enumerate(zip(wanted, found, strict=False)):
        if [list(map(int, part)) for part in theirs] != [list(part) for part in ours[: len(theirs)]]:
            raise RuntimeError(f"Cell {cell} has other tokens than ours.")


# ---------------------------------------------------------------------- ours


def encode_ours(folder: Path, scheme: str) -> float:
    """Read batches of a store and tokenize them, into flat arrays."""
    from stformer_hf import CellStore, GeneTokenizer

    _one_core()
    store, tokenizer = CellStore(folder / "store"), GeneTokenizer.from_pretrained(folder / scheme)
    rows = [np.arange(start, min(start + 64, len(store))) for start in range(0, len(store), 64)]
    for some in rows[:20]:
        tokenizer.encode_cells(store.__getitems__(some))
    with clock():
        for some in rows:
            tokenizer.encode_cells(store.__getitems__(some))
    return len(store)


def save_ours(folder: Path, scheme: str, workers: int = 1, build: bool = False) -> float:
    """Write a tokenized dataset of a store, or first the store too."""
    import datasets  # noqa: F401

    from stformer_hf import CellStore, GeneTokenizer

    if workers == 1:
        _one_core()
    tokenizer = GeneTokenizer.from_pretrained(folder / scheme)
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    shutil.rmtree(folder / "store-built", ignore_errors=True)
    with clock():
        store = CellStore(folder / "store")
        if build:
            store = CellStore.build(folder / "store-built", folder / "cells.h5ad")
        tokenizer.tokenize_store(store, folder / "tokens", workers=workers)
    return len(store)


# ---------------------------------------------------------------------- Geneformer's way


def _geneformer_tokens(folder: Path, stop: int | None = None) -> list[np.ndarray]:
    """Rank chunks of 512 cells: normalise sparse rows, sort each cell's scores, take its tokens."""
    saved = json.loads((folder / "rank" / "gene_vocabulary.json").read_text())
    adata = read_h5ad(folder / "cells.h5ad", backed="r")
    place = {gene: i for i, gene in enumerate(saved["genes"])}
    known = np.array([j for j, gene in enumerate(adata.var_names) if gene in place])
    rows = np.array([place[gene] for gene in adata.var_names[known]])
    medians, tokens = np.array(saved["medians"])[rows], 4 + rows
    cells = []
    for start in range(0, min(stop or adata.n_obs, adata.n_obs), 512):
        chunk = adata.X[start : start + 512]
        totals = np.asarray(chunk.sum(axis=1, dtype=np.float64))
        view = sparse.csr_matrix(chunk[:, known] if len(known) < adata.n_vars else chunk, dtype=np.float64)
        scores = view
        scores.data = scores.data / np.repeat(totals.ravel(), np.diff(scores.indptr)) * 1e4 / medians[scores.indices]
        for i in range(scores.shape[0]):
            row = scores[i]
            cells.append(tokens[row.indices][np.argsort(-row.data, kind="stable")])
    return cells


def rank_geneformers_way(folder: Path) -> float:
    """Rank cells, in memory."""
    _one_core()
    _check([(cell[:MAX_LENGTH],) for cell in _geneformer_tokens(folder, 50)[:50]], folder, "rank")
    with clock():
        return len(_geneformer_tokens(folder))


def save_geneformers_way(folder: Path) -> float:
    """Rank cells, make a dataset of the lists, cut it by a map that adds the length, and save it."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    _one_core()
    shutil.rmtree(folder / "tokens-geneformer", ignore_errors=True)

    def cut(example: dict) -> dict:
        example["input_ids"] = example["input_ids"][:MAX_LENGTH]
        example["length"] = len(example["input_ids"])
        return example

    _check([(cell[:MAX_LENGTH],) for cell in _geneformer_tokens(folder, 50)[:50]], folder, "rank")
    with clock():
        cells = _geneformer_tokens(folder)
        dataset = Dataset.from_dict({"input_ids": cells}).map(cut)
        dataset.save_to_disk(str(folder / "tokens-geneformer"))
    return len(cells)


# ---------------------------------------------------------------------- PerturbGene's way


class StringTokenizer(PreTrainedTokenizer):
    """A tokenizer whose input ids are looked up by strings: special tokens and bins."""

    def __init__(self, n_bins: int, **kwargs: Any):
        self._words = ["[CLS]", "[EOS]", "[MASK]", "[PAD]", *(f"bin_{i}" for i in range(n_bins))]
        self._ids = {word: i for i, word in enumerate(self._words)}
        super().__init__(cls_token="[CLS]", eos_token="[EOS]", mask_token="[MASK]", pad_token="[PAD]", **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        """Word -> id."""
        return dict(self._ids)

    def _tokenize(self, text: str) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing."""
        return ()


def _perturbgene_tokens(folder: Path, stop: int | None = None) -> list[tuple[list[int], list[int]]]:
    """Make strings of a cell's special tokens and bins, and look them up; a type a gene."""
    tokenizer = StringTokenizer(len(EDGES) + 1)
    adata = read_h5ad(folder / "cells.h5ad", backed="r")
    cells = []
    for start in range(0, min(stop or adata.n_obs, adata.n_obs), 512):
        chunk = adata.X[start : start + 512]
        for i in range(chunk.shape[0]):
            row = chunk[i]
            bins = np.digitize(row.data, EDGES)
            words = ["[CLS]", *(f"bin_{b}" for b in bins if b)][: MAX_LENGTH - 1] + ["[EOS]"]
            types = [0, *(1 + row.indices[bins > 0]).tolist()][: MAX_LENGTH - 1] + [0]
            cells.append((tokenizer.convert_tokens_to_ids(words), types))
    return cells


def bin_perturbgenes_way(folder: Path) -> float:
    """Bin cells, in memory."""
    _one_core()
    _check(_perturbgene_tokens(folder, 50)[:50], folder, "binned")
    with clock():
        return len(_perturbgene_tokens(folder))
