"""Small models, and edits of counts as the documentation of `perturb` describes them."""

import numpy as np
import torch
from conftest import make_adata
from scipy import sparse

from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer

QUANTILES = {"inhibit": 0.25, "activate": 0.75, "overexpress": 0.99}
N = 24


def make_cells():
    """Cells of two types and three donors; the third has one gene, the fourth none."""
    cells = make_adata(N, 30, seed=2)
    counts = cells.X.toarray()
    counts[2] = 0
    counts[2, 5] = 4
    cells.X = sparse.csr_matrix(counts)
    cells.obs["donor"] = np.tile(["d1", "d2", "d3"], N // 3)
    return cells


def make_tokenizer(cells, scheme: str, **settings) -> GeneTokenizer:
    genes = cells.var_names.tolist()
    if scheme == "rank":
        return GeneTokenizer(genes, scheme="rank", medians=dict.fromkeys(genes, 1.0), max_length=12, **settings)
    own = {"whole_cell": True} if scheme == "whole" else {}
    return GeneTokenizer(genes, bin_edges=[0.5, 1.5, 3.5], max_length=12, **own, **settings)


def make_model(tokenizer, kind=GeneBertModel, **fields):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    whole = {"cell_embedding": True} if tokenizer.whole_cell else {}
    config = GeneBertConfig.from_tokenizer(tokenizer, **small, **whole, **fields)
    return kind(config).eval()


def edit(cells, genes: list[int], kind: str) -> sparse.csr_matrix:
    """Edit a dense copy of the counts, as the documentation of `perturb` says."""
    counts = cells.X.toarray()
    totals, edited = counts.sum(1), cells.X.toarray()
    for gene in genes:
        for cell in range(len(cells)):
            count = counts[cell, gene]
            if kind == "delete":
                edited[cell, gene] = 0
                continue
            expressing = counts[:, gene] > 0
            level = np.quantile(counts[expressing, gene] / totals[expressing], QUANTILES[kind])
            target = max(np.rint(level * totals[cell]), 1) if totals[cell] else 0
            if kind == "inhibit":
                edited[cell, gene] = min(count, target)
            else:
                edited[cell, gene] = max(count, target)
    return sparse.csr_matrix(edited)
