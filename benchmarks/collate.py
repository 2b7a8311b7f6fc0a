"""Masked, padded batches from a store against the stock MLM collator on the same, tokenized cells."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from anndata import AnnData
from scipy import sparse
from transformers import DataCollatorForLanguageModeling

from stformer_hf import CellStore, DataCollatorForPhenotypicMLM, GeneTokenizer

N_CELLS, N_GENES, DENSITY, BATCH, TURNS = 2048, 20_000, 0.075, 64, 5


def run(arguments: list[str]) -> None:
    """Time both in turn; print medians and their ratio. There are no flags."""
    rng = np.random.default_rng(0)
    counts = sparse.random(N_CELLS, N_GENES, DENSITY, "csr", np.float32, rng, lambda n: 1 + rng.geometric(0.4, n))
    with tempfile.TemporaryDirectory() as folder:
        store = CellStore.build(f"{folder}/store", AnnData(counts))
        tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 2.5, 4.5, 8.5])
        orders = rng.permutation(N_CELLS).reshape(-1, BATCH)
        ours = DataCollatorForPhenotypicMLM(tokenizer)
        stock = DataCollatorForLanguageModeling(tokenizer)
        # The peer's cells are tokenized beforehand; ours are read and tokenized while the clock runs.
        tokens = tokenizer(AnnData(counts, var=store.genes.frame.set_index("gene_id")))
        examples = [dict(zip(tokens, values, strict=True)) for values in zip(*tokens.values(), strict=True)]

        def read_tokenize_mask() -> None:
            for rows in orders:
                ours(store.__getitems__(rows))

        def tokenize() -> None:
            for rows in orders:
                tokenizer.encode_cells(store.__getitems__(rows))

        def stock_mask() -> None:
            for rows in orders[:4]:
                stock([examples[row] for row in rows])

        runs = {
            "read, tokenize, mask, pad (ours)": (read_tokenize_mask, N_CELLS),
            "read, tokenize (ours)": (tokenize, N_CELLS),
            "mask, pad tokenized cells (DataCollatorForLanguageModeling)": (stock_mask, 4 * BATCH),
        }
        rates = {name: [] for name in runs}
        for _ in range(TURNS):
            for name, (work, n_cells) in runs.items():
                rates[name].append(n_cells / _seconds(work))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peer = medians["mask, pad tokenized cells (DataCollatorForLanguageModeling)"]
    print(f"{N_CELLS} cells of {N_GENES} genes, {int(N_GENES * DENSITY)} expressed; batches of {BATCH}; one process")
    print(f"{'':<62} {'cells/s':>9} {'ratio':>7}")
    for name, rate in medians.items():
        print(f"{name:<62} {rate:>9,.0f} {rate / peer:>7.1f}")


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
