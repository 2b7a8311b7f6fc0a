"""Networks of gene pairs: how much a model reads one gene for the other, beside their co-expression."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..evaluation.cell_baselines import log_normalise
from ..genes.wrong_names import some_of
from ..models.gene_bert.encoder_layers import GeneBertAttention
from ..models.gene_bert.randomness import uniforms
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a
from ..sources.open_source import Source, open_source
from .batches import TokenBatch, at_work, check_cells, load, read_batches
from .gene_states import gene_frame, groups_of, indices_of, pairs_of, places_of, refuse_neighborhoods, symmetric

if TYPE_CHECKING:
    import networkx

logger = logging.getLogger(__name__)
MOST_GENES = 5_000  # of a network of one group: a matrix of pairs has 25 million entries
_PAIRS_OF_TOKENS = 2**22  # cells x length ** 2 of a batch: 128 MiB of attention for 8 heads
_ROWS_PER_BLOCK = 4096
_PROBE, _TARGET = 40, 41  # streams of `uniforms`


@dataclass
class GeneNetwork:
    """Scores of gene pairs in each group of cells, beside their co-expression.

    Attributes
    ----------
    genes : DataFrame (n_genes, 2)
        `gene_id` and `symbol` of each row and column of the matrices.
    scores : dict of str to float32 array (n_genes, n_genes)
        Group -> mean score of the pairs (row: the gene that reads; column: the gene that is read). 1 is the mean over
        the genes of a cell. NaN for pairs in fewer than `min_cells` cells.
    n_cells : dict of str to int32 array (n_genes, n_genes)
        Number of cells in which a pair was scored.
    coexpression : dict of str to float32 array (n_genes, n_genes)
        Pearson correlation of ln(1 + 10,000 x / total) over the cells of the group; NaN for constant genes.
    method : str
    """

    genes: pd.DataFrame
    scores: dict[str, np.ndarray]
    n_cells: dict[str, np.ndarray]
    coexpression: dict[str, np.ndarray]
    method: str

    def __repr__(self) -> str:
        return f"GeneNetwork({len(self.genes):,} genes, method {self.method}, groups: {some_of(self.scores, 10)})"

    def edges(self, n_edges: int = 1_000) -> pd.DataFrame:
        """Return the `n_edges` pairs with the largest scores in each group.

        Returns
        -------
        DataFrame
            `group`, `source` and `target` (ids; the target reads the source), their symbols, `score`, `n_cells` and
            `coexpression`, from the largest score of each group to the smallest.
        """
        return pd.concat([self._edges_of(group, n_edges) for group in self.scores], ignore_index=True)

    def _edges_of(self, group: str | None, n_edges: int) -> pd.DataFrame:
        if group not in self.scores:
            raise ValueError(f"There is no group {group!r}; groups are {', '.join(self.scores)}.")
        ids, symbols = self.genes["gene_id"].to_numpy(), self.genes["symbol"].to_numpy()
        flat = self.scores[group].ravel()
        known = np.flatnonzero(np.isfinite(flat))
        best = known[np.argsort(-flat[known], kind="stable")[:n_edges]]
        target, source = np.divmod(best, len(ids))
        return pd.DataFrame(
            {
                "group": group,
                "source": ids[source],
                "target": ids[target],
                "source_symbol": symbols[source],
                "target_symbol": symbols[target],
                "score": flat[best],
                "n_cells": self.n_cells[group].ravel()[best],
                "coexpression": self.coexpression[group].ravel()[best],
            }
        )

    def agreement(self) -> pd.DataFrame:
        """Compare scores with co-expression over all scored pairs of each group.

        Returns
        -------
        DataFrame
            One row per group: `n_pairs` (unordered, scored in at least one direction); `spearman`, the rank
            correlation of the mean score of both directions with the absolute correlation; and `top_share`, the share
            of the strongest hundredth of the pairs by score that is also in that by absolute correlation (chance:
            0.01; NaN for fewer than 100 pairs).
        """
        rows = []
        for group in self.scores:
            score, expected = symmetric(self.scores[group]), np.abs(pairs_of(self.coexpression[group]))
            known = np.isfinite(score) & np.isfinite(expected)
            score, expected = score[known], expected[known]
            row = {"group": group, "n_pairs": len(score), "spearman": np.nan, "top_share": np.nan}
            if len(score) > 2:
                row["spearman"] = float(spearmanr(score, expected).statistic)
            if len(score) >= 100:
                n_top = len(score) // 100
                top, top_expected = (np.argsort(-of, kind="stable")[:n_top] for of in (score, expected))
                both = np.intersect1d(top, top_expected)
                row["top_share"] = len(both) / n_top
            rows.append(row)
        return pd.DataFrame(rows)

    def graph(self, group: str | None = None, n_edges: int = 1_000) -> networkx.DiGraph:
        """Return the edges of a group as a directed graph, with their columns as attributes.

        Raises
        ------
        ValueError
            The group is unknown, or not given although there are several.
        ImportError
            networkx is not installed.
        """
        import networkx

        if group is None and len(self.scores) == 1:
            group = next(iter(self.scores))
        edges = self._edges_of(group, n_edges)
        graph = networkx.from_pandas_edgelist(
            edges, edge_attr=["score", "n_cells", "coexpression"], create_using=networkx.DiGraph
        )
        symbol = dict(zip(self.genes["gene_id"], self.genes["symbol"], strict=True))
        networkx.set_node_attributes(graph, {node: symbol[node] for node in graph}, "symbol")
        return graph

    def save(self, path: str | Path, group: str | None = None, n_edges: int = 1_000) -> None:
        """Write the edges: all groups to a .csv, or one group to a .graphml.

        Raises
        ------
        ValueError
            The path ends with neither .csv nor .graphml; as for `graph`.
        """
        suffix = Path(path).suffix
        if suffix == ".csv":
            edges = self.edges(n_edges) if group is None else self._edges_of(group, n_edges)
            edges.to_csv(path, index=False)
        elif suffix == ".graphml":
            import networkx

            networkx.write_graphml(self.graph(group, n_edges), path)
        else:
            raise ValueError(f"{path}: the name must end with .csv or .graphml.")


def gene_network(
    model: str | PreTrainedModel,
    adata: AnnData,
    *,
    tokenizer: GeneTokenizer | None = None,
    groups: str | None = None,
    genes: Sequence[str] | int = 1_000,
    method: Literal["attention", "gradient"] = "attention",
    n_targets: int = 16,
    min_cells: int = 10,
    seed: int = 0,
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> GeneNetwork:
    """Score pairs of genes by how much a model reads one for the other, in each group of cells.

    Parameters
    ----------
    model : str or PreTrainedModel
        GeneBert checkpoint, folder of a PEFT adapter, or model.
    adata : AnnData, MuData or SpatialData
        Cells with raw counts.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default. Only genes that are tokens of a cell are scored in it: `max_length` matters.
    groups : str, optional
        Column of obs: one network per value. Cells without a value are left out.
    genes : sequence of str, or int, default: 1,000
        Ids or symbols of the genes of the network; or a number, for the genes that most cells express.
    method : {"attention", "gradient"}, default: "attention"
        "attention": attention of the reading gene to the read gene, mean over heads and layers. "gradient": norm of
        the gradient of the reading gene's last state, projected on random signs, by the read gene's input embedding.
        Both are divided by their mean over the genes of the cell, so that 1 is what a model has that does not
        distinguish genes.
    n_targets : int, default: 16
        "gradient": number of reading genes per cell, a random choice of those in the network.
    min_cells : int, default: 10
        Cells in which a pair must be scored.
    seed : int, default: 0
        "gradient": seed of the signs and of the choice of reading genes.
    layer, fractional, batch_size, device
        As for `embed`.

    Raises
    ------
    ValueError
        There are too many genes for the number of groups (5,000 for one group); a gene or the column is unknown; a
        number is below 1; the model reads neighbourhoods, is not a GeneBert, or is one whose attention has no effect.

    Notes
    -----
    Cells are read in blocks, three times for a number of genes and twice otherwise. Memory is that of four matrices of
    gene pairs per group, 20 bytes per pair.

    Neither score is evidence of regulation. Compare with `GeneNetwork.coexpression`, which needs no model.
    """
    if method not in ("attention", "gradient"):
        raise ValueError(f'method must be "attention" or "gradient", got {method!r}.')
    if n_targets < 1 or min_cells < 1:
        raise ValueError(f"n_targets={n_targets} and min_cells={min_cells} must be at least 1.")
    check_cells(adata)
    encoder, tokenizer = load(model, tokenizer, AutoModel)
    refuse_neighborhoods(tokenizer)
    encoder = encoder.base_model
    attentions = _attentions_of(encoder)
    source = open_source(adata, layer, fractional)
    group_of = groups_of(source, groups)
    named, n_genes = None, 0
    if isinstance(genes, (int, np.integer)):
        n_genes = int(genes)
    else:
        named = indices_of(genes, tokenizer, adata, source)
        n_genes = len(named)
    n_groups = len(group_of.categories)
    if n_genes < 2:
        raise ValueError(f"A network needs at least two genes, got {n_genes}.")
    if n_genes**2 * n_groups > MOST_GENES**2:
        most = int((MOST_GENES**2 / n_groups) ** 0.5)
        raise ValueError(
            f"A network of {n_genes:,} genes in {n_groups} groups has {n_genes**2 * n_groups:,} pairs, more than "
            f"{MOST_GENES**2:,}: choose at most {most:,} genes, or fewer groups."
        )
    columns = tokenizer.find_genes(source.genes.gene_ids, source.genes.symbols)
    chosen = _most_expressed(source, columns, n_genes) if named is None else named
    places = places_of(chosen, tokenizer)
    sums = np.zeros((n_groups, len(chosen), len(chosen)), np.float32)
    n_cells = np.zeros(sums.shape, np.int32)
    batches = read_batches(source, tokenizer, batch_size, desc=f"gene network ({method})", max_padded=_PAIRS_OF_TOKENS)
    by_gradient = method == "gradient"
    scored = _gradients if by_gradient else _attention
    with at_work(encoder, device, by_gradient), _backend(encoder, None if by_gradient else "eager"):
        for batch in batches:
            group, of_token = group_of.codes[batch.rows], places[batch.genes]
            if not ((of_token >= 0).any(axis=1) & (group >= 0)).any():
                continue
            batch = batch.to(encoder.device)
            for cell, targets, rows in scored(encoder, attentions, batch, of_token, n_targets, seed):
                if group[cell] < 0:
                    continue
                read = np.flatnonzero(of_token[cell] >= 0)
                pairs = np.ix_(of_token[cell, targets], of_token[cell, read])
                sums[group[cell]][pairs] += rows[:, read]
                n_cells[group[cell]][pairs] += 1
    for of_group in n_cells:
        np.fill_diagonal(of_group, 0)
    enough = n_cells >= min_cells
    np.divide(sums, n_cells, out=sums, where=enough, casting="same_kind")
    sums[~enough] = np.nan
    names = [str(name) for name in group_of.categories]
    without = [name for name, of_group in zip(names, enough, strict=True) if not of_group.any()]
    if without:
        logger.warning(f"No pair of genes was scored in {min_cells} cells of {', '.join(without)}: lower min_cells.")
    return GeneNetwork(
        gene_frame(tokenizer, chosen).reset_index(drop=True),
        dict(zip(names, sums, strict=True)),
        dict(zip(names, n_cells, strict=True)),
        dict(zip(names, _coexpression(source, columns, places, group_of, len(chosen)), strict=True)),
        method,
    )


@torch.no_grad()
def _attentions_of(encoder: PreTrainedModel) -> list[GeneBertAttention]:
    """Return the attention modules of a GeneBert; any input must change the output of one, its adapters included."""
    found = [module for module in encoder.modules() if is_a(module, GeneBertAttention)]
    if not found:
        raise ValueError(f"gene_network reads the attention of GeneBert models, got {type(encoder).__name__}.")
    unit = torch.eye(encoder.config.hidden_size, device=encoder.device, dtype=encoder.dtype)
    if all(torch.equal(module.out_lin(unit), module.out_lin(torch.zeros_like(unit))) for module in found):
        raise ValueError(
            "No gene has an effect on the state of another in this model: the outputs of its attention are 0, as in a "
            "whole-cell model at its start, before the first step (and after finetune, if cross-validation chose no "
            "training). Train it first (num_train_epochs), or pass a pretrained model."
        )
    return found


def _attention(
    encoder: PreTrainedModel, attentions: list[GeneBertAttention], batch: TokenBatch, of_token: np.ndarray, *_: Any
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each cell, its tokens that are genes of the network, and their attention: float array (k, length)."""
    total: list[torch.Tensor] = []

    def add(_: nn.Module, __: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        mean = outputs[1].float().mean(dim=1)
        total[:] = [mean if not total else total[0].add_(mean)]

    hooks = [module.register_forward_hook(add) for module in attentions]
    try:
        encoder(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    weights = total[0].cpu().numpy() / len(attentions)
    for cell, tokens in enumerate(of_token):
        targets = np.flatnonzero(tokens >= 0)
        if len(targets):
            yield cell, targets, _relative(weights[cell, targets], batch.genes[cell] >= 0)


def _gradients(
    encoder: PreTrainedModel,
    _: list[GeneBertAttention],
    batch: TokenBatch,
    of_token: np.ndarray,
    n_targets: int,
    seed: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each cell, one of its tokens as the target, and the gradient norms of all tokens: float array (1, length).

    One backward pass serves one target in every cell of the batch: cells do not influence one another.
    """
    order = np.full(of_token.shape, np.inf)
    cells, tokens = np.nonzero(of_token >= 0)
    cell_ids = np.array([zlib.crc32(genes[genes >= 0].tobytes()) for genes in batch.genes])  # in any order of cells
    order[cells, tokens] = uniforms(seed, 0, _TARGET, cell_ids, of_token[cells, tokens], cells)
    ranked = np.argsort(order, axis=1)
    n_known = (of_token >= 0).sum(axis=1)
    signs = uniforms(seed, 0, _PROBE, np.zeros(1, np.int64), np.arange(encoder.config.hidden_size)) < 0.5
    signs = torch.from_numpy(np.where(signs, 1.0, -1.0).astype(np.float32)).to(encoder.device)
    inputs = dict(batch.inputs)
    embedded = encoder.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    states = encoder(inputs_embeds=embedded, **inputs).last_hidden_state.float() @ signs
    n_passes = int(min(n_targets, n_known.max(initial=0)))
    for number in range(n_passes):
        having = np.flatnonzero(n_known > number)
        at = ranked[having, number]
        one = states[torch.from_numpy(having), torch.from_numpy(at)].sum()
        (gradient,) = torch.autograd.grad(one, embedded, retain_graph=number + 1 < n_passes)
        norms = gradient.float().norm(dim=-1).cpu().numpy()
        for cell, target in zip(having.tolist(), at.tolist(), strict=True):
            norms[cell, target] = 0  # the residual stream of the gene itself
            yield cell, np.array([target]), _relative(norms[cell][None], batch.genes[cell] >= 0)


def _relative(rows: np.ndarray, of_genes: np.ndarray) -> np.ndarray:
    """Divide each row by its mean over the tokens that are genes."""
    means = rows[:, of_genes].mean(axis=1, keepdims=True)
    return rows / np.maximum(means, np.finfo(np.float32).tiny)


@contextmanager
def _backend(encoder: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Use an attention backend within the context; None for the model's own."""
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation(name or before)
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


def _coexpression(
    source: Source, columns: np.ndarray, places: np.ndarray, group_of: pd.Categorical, n: int
) -> Iterator[np.ndarray]:
    """Yield the Pearson correlations of each group, float32 array (n, n).

    They are of ln(1 + 10,000 x / total) of the genes of a network; totals are over known genes.
    """
    target = np.where(columns >= 0, places[columns], -1)
    at = np.flatnonzero(target >= 0)
    to_genes = sparse.csr_array((np.ones(len(at)), (at, target[at])), shape=(len(columns), n))
    n_groups = len(group_of.categories)
    products = np.zeros((n_groups, n, n))
    sums, n_cells, start = np.zeros((n_groups, n)), np.bincount(group_of.codes[group_of.codes >= 0]), 0
    for block in source.blocks(_ROWS_PER_BLOCK):
        block = sparse.csr_array(block, dtype=np.float64)
        values = log_normalise(block @ to_genes, block @ (columns >= 0).astype(np.float64))
        codes = group_of.codes[start : start + values.shape[0]]
        start += values.shape[0]
        for group in np.unique(codes[codes >= 0]):
            of_group = values[np.flatnonzero(codes == group)]
            products[group] += (of_group.T @ of_group).toarray()
            sums[group] += of_group.sum(axis=0)
    for group in range(n_groups):
        mean = sums[group] / n_cells[group]
        covariance = products[group] / n_cells[group] - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0))
        spread[spread < 1e-6] = np.nan
        yield (covariance / np.outer(spread, spread)).astype(np.float32)


def _most_expressed(source: Source, columns: np.ndarray, n: int) -> np.ndarray:
    """Return the n genes that most cells express, ascending: int64 array."""
    known = np.flatnonzero(columns >= 0)
    n_genes = columns.max(initial=-1) + 1
    to_genes = sparse.csr_array((np.ones(len(known)), (known, columns[known])), shape=(len(columns), n_genes))
    n_cells = np.zeros(n_genes, np.int64)
    for block in source.blocks(_ROWS_PER_BLOCK):
        of_genes = sparse.csr_array(block) @ to_genes  # a cell counts once, whatever its entries and columns of a gene
        n_cells += np.bincount(of_genes.indices, minlength=n_genes)
    return np.sort(np.argsort(-n_cells, kind="stable")[: min(n, int((n_cells > 0).sum()))])
