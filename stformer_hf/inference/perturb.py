"""In-silico perturbation: change the counts of genes, and see how far the model moves the cells."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from .. import __version__
from ..batches.evaluating import length_to_read
from ..evaluation.cell_baselines import log_normalise
from ..evaluation.readers import fit_pca
from ..genes.whole_files import whole_file
from ..genes.wrong_names import must_have
from ..models.gene_bert.configuration_gene_bert import output_name
from ..models.gene_bert.heads import pool
from ..models.gene_bert.modeling_gene_bert import GeneBertModel
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.gene_bert.tokenized_cells import take
from ..sources.open_source import open_source
from ..training.cell_checksum import checksum
from ..training.cell_heads import check_finite, read_heads
from ..training.loading import name_of
from .batches import (
    TokenBatch,
    at_work,
    check_cells,
    check_dtype,
    check_hidden_layer,
    choose_pooling,
    is_classifier,
    load,
    make_batch,
    packs,
)
from .embed import pooled_states
from .gene_edits import QUANTILES, GeneEdits, Panel, choose_perturbations
from .gene_shifts import GeneStates, ShardGenes, ShiftSums, make_gene_table, unit_length
from .gene_states import gene_frame
from .perturb_statistics import CellGroups, DonorGroups, ShardScores, cell_statistics, make_table

logger = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4096
_CELLS_AT_ONCE = 512  # edited and tokenized together
_CELLS_AT_ONCE_WITH_GENES = 64  # whose states of all tokens are in memory together
_TOKENS, _TOKENS_ON_CPU = 4096, 1024  # per batch; the caches of a CPU hold the states of few tokens


def perturb(
    adata: AnnData,
    model: str | PreTrainedModel,
    genes: Sequence[str | Sequence[str]] | Mapping[str, Sequence[str]] | None = None,
    *,
    kind: str = "delete",
    quantile: float | None = None,
    goal_key: str | None = None,
    goal: str | None = None,
    start: str | None = None,
    donor_key: str | None = None,
    predicted: str | None = None,
    n_null: int = 25,
    gene_shifts: int = 0,
    output: str | Path | None = None,
    tokenizer: GeneTokenizer | None = None,
    hidden_layer: int = -1,
    pooling: str | None = None,
    layer: str | None = None,
    fractional: bool = False,
    max_tokens: int | None = None,
    shard_size: int = 20_000,
    device: str | None = None,
    dtype: str | None = None,
    min_coverage: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Change the counts of genes in cells, and measure how far a model moves the cells.

    Each perturbation is made in each cell: its counts are edited, and tokenized and embedded like those of a new cell.
    So perturbations work alike for all tokenizers and models. Cells that an edit does not change (such as deleting a
    gene that a cell does not express) have scores of 0.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with raw counts, of the goal group too.
    model : str or PreTrainedModel
        Checkpoint, adapter or model, as for `embed`. With a classifier of cells, the change of a class's probability
        is measured too.
    genes : sequence of str or of sequences of str, or dict of str to sequence, optional
        Ids or symbols of genes. A sequence in it is a group, such as a pair, whose genes are edited together; a dict
        names the groups. By default, every gene that the model knows and a cell expresses.
    kind : {"delete", "inhibit", "activate", "overexpress"}, default: "delete"
        Set the count of a gene to 0; lower it to a low quantile; raise it to a high one. Quantiles are those of
        the share of the gene in the counts of a cell, over the perturbed cells that express it (if there are none,
        over all cells that do), multiplied by the total of a cell and rounded to a whole count of at least 1. Cells
        already beyond it are not changed.
    quantile : float, optional
        By default 0.25 for "inhibit", 0.75 for "activate" and 0.99 for "overexpress".
    goal_key, goal : str, optional
        Column of obs, and its value in the cells of the goal group, which are not perturbed.
    start : str, optional
        Value of `goal_key` in the cells to perturb; by default all cells with another value than the goal group.
    donor_key : str, optional
        Column of obs with the donor of each cell: intervals and tests are then over donors.
    predicted : str, optional
        Class whose probability is measured. By default `goal` if the classifier has such a class, else the class that
        it predicts for each unperturbed cell. For several label columns, "COLUMN: CLASS"; by default `goal` if
        `goal_key` is one of the columns.
    n_null : int, default: 25
        Number of matched genes, which are perturbed too, for comparison: this many random genes from each bin of mean
        counts that has a gene of `genes` (ten bins, fewer for fewer than 300 genes). For a group of genes, number of
        random groups from the same bins. They multiply the work for few genes. No p-value is below 1 / (1 + their
        number). With 0, and if all genes are perturbed, `genes` are compared with one another; p-values are NaN where
        fewer than ten of them have similar expression.
    gene_shifts : int, default: 0
        For each perturbation, write this many genes that it moves most to `gene_shifts.csv` in `output`; see
        `gene_shifts.make_gene_table`. The shift of a gene is the cosine distance between the hidden states of its
        token in the edited and in the unperturbed cell. The edited genes are left out.
    output : str or Path, optional
        Folder for the scores, written shard by shard, and the tables. Called again with the same arguments, the
        function resumes from the shards that are there. Needed with several processes (`accelerate launch`), which
        share the shards. By default a temporary folder.
    tokenizer, hidden_layer, pooling, layer, fractional, device, dtype, min_coverage
        As for `embed`. The phenotypes of cells are masked, also for classifiers. Rounding in half precision adds to
        the shift of every perturbation, about 2e-5 for bfloat16.
    max_tokens : int, optional
        Tokens per batch; more are faster on a GPU. By default 1,024 on a CPU, and 4,096 elsewhere.
    shard_size : int, default: 20,000
        Number of edited cells per shard; a killed run loses at most one shard.
    seed : int, default: 0
        Seed of the matched genes, and of permutations.

    Returns
    -------
    DataFrame
        One row per perturbation, in the order of `genes`:

        `n_changed`             number of cells that it changes; the others count as 0 in all means
        `shift`                 mean cosine distance of the state of a cell to its unperturbed state
        `goal_shift`            mean change of the cosine to the goal state; positive towards it, negative away
        `probability`           mean change of the probability of the class
        `pca_shift`, `pca_goal_shift`   the same shifts in 50 principal components of log-normalised genes
        `linear_probability`    change of the goal's probability in a logistic regression on log-normalised genes
        `…_low`, `…_high`       95 % interval, over donors with `donor_key`, else over cells
        `z`, `p_matched`        comparison with the matched genes, see `perturb_statistics.compare`
        `p_donors`              permutation of the groups across donors, see `perturb_statistics.permute_donors`
        `p_cells`               without donors: whether the groups' cells differ along the shift, see `compare_groups`
        `p_wilcoxon`            signed-rank test against the matched genes, over donors or (dependent) cells
        `p`, `fdr`              the larger of `p_matched` and `p_donors` or `p_cells`, and its Benjamini-Hochberg
                                correction
        `…_z`, `…_fdr`          the same comparison with matched genes for the other scores

        The tested score is `goal_shift` if there is a goal, else `probability` for a classifier, else `shift`.
        `attrs["settings"]` has the settings. `output` also has the table of the matched genes, `null.csv`.

    Raises
    ------
    ValueError
        A gene is unknown or not measured; a column, group or class does not exist; a setting is invalid; the folder
        holds other results; as for `embed`.
    FileNotFoundError, TypeError
        As for `embed`.

    Notes
    -----
    The results show what the model has learned, not what a cell would do. A shift means something only if it is larger
    than that of genes of similar expression, and than that of the baselines.

    References
    ----------
    Theodoris et al. 2023, Nature 618:616, for perturbation in silico by deletion and overexpression.
    """
    quantile = _check_settings(
        kind,
        quantile,
        goal_key,
        goal,
        start,
        n_null=n_null,
        gene_shifts=gene_shifts,
        max_tokens=max_tokens,
        shard_size=shard_size,
    )
    check_dtype(dtype)
    check_cells(adata)
    state = PartialState() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    if state is not None and output is None:
        raise ValueError("Several processes share their results through a folder: pass output=…")
    if gene_shifts and output is None:
        raise ValueError("The shifts of genes are written to a folder: pass output=…")
    reader = _Reader(model, tokenizer, hidden_layer, pooling, max_tokens, fractional, min_coverage)
    if gene_shifts:
        reader.read_genes()
    source = open_source(adata, layer, fractional)
    genes_of = np.asarray(source.genes.gene_ids), np.asarray(source.genes.symbols)
    has_index = isinstance(adata, AnnData) and adata.n_vars == len(genes_of[0])
    panel = Panel(*genes_of, reader.tokenizer, adata.var_names if has_index else ())
    reader.names = panel.gene_ids, panel.symbols
    counts = sparse.vstack([panel.merge(block) for block in source.blocks(_ROWS_PER_BLOCK)], format="csr")
    cells = _choose_cells(source.obs, counts[:, panel.known], goal_key, goal, start, donor_key)
    edits = GeneEdits(counts, cells.perturbed, kind, quantile)
    perturbations = choose_perturbations(genes, panel, edits.expression, n_null, seed)
    reader.choose_class(predicted, goal, goal_key)
    weights = reader.model.state_dict()
    settings = {
        "version": __version__,
        "model": str(name_of(model)),
        "kind": kind,
        "quantile": quantile,
        "goal_key": goal_key,
        "goal": goal,
        "start": start,
        "donor_key": donor_key,
        "predicted": reader.class_name,
        "n_null": n_null,
        "gene_shifts": gene_shifts or None,
        "hidden_layer": hidden_layer,
        "pooling": reader.pooling,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "seed": seed,
        "counts_in": source.counts_in,
        "vocabulary_fingerprint": reader.tokenizer.fingerprint,
        "tokenizer": checksum(reader.tokenizer.saved_settings()),
        "genes": checksum(panel.gene_ids.tolist()),
        "weights": checksum(*(tensor.detach().float().cpu().numpy() for tensor in weights.values())),
        "perturbations": checksum([each.columns for each in perturbations], [each.name for each in perturbations]),
        "cells": checksum(counts.indptr, counts.indices, counts.data, cells.perturbed, cells.goal, cells.donors),
    }
    with tempfile.TemporaryDirectory(prefix="perturb-") as temporary:
        folder = Path(temporary if output is None else output)
        _open_folder(folder, settings, state)
        with at_work(reader.model, device or (None if state is None else str(state.device)), dtype=dtype):
            grid = _Grid(folder, reader, edits, counts, cells, perturbations, panel, shard_size, gene_shifts > 0)
            grid.run(state)
        shards = partial(grid.shards, ShardScores)
        table = make_table(perturbations, shards, grid.score_names, cells.donors_of(0), grid.groups, seed)
        asked = table[~table["null"]].drop(columns=["null", "matched"])
        if output is not None and (state is None or state.is_main_process):
            if gene_shifts:
                frame = gene_frame(reader.tokenizer, np.arange(len(reader.tokenizer.genes)))
                gene_ids, symbols = (frame[name].to_numpy(object) for name in ("gene_id", "symbol"))
                shards = partial(grid.shards, ShardGenes)
                found = make_gene_table(perturbations, shards, gene_ids, symbols, gene_shifts)
                _write(folder / "gene_shifts.csv", found.to_csv(index=False))
            _write(folder / "null.csv", table[table["null"]].drop(columns="null").to_csv())
            _write(folder / "table.csv", asked.to_csv())
    n_alone = int(asked["p"].isna().sum())
    if goal is not None and cells.donors is None and min(len(cells.perturbed), len(cells.goal)) < 2:
        logger.warning("No p-values: the goal group or the start group is a single cell.")
    elif n_alone:
        with_many = ", or with many genes pass n_null=0, which compares them with one another" if n_null else ""
        logger.warning(
            f"{n_alone} perturbations have no p-value: they change fewer than 3 cells, or fewer than 10 other genes "
            f"of similar expression were perturbed, or most of these move no cell. Raise n_null{with_many}."
        )
    asked.attrs["settings"] = {**settings, "tested": grid.score_names[0], "n_cells": len(cells.perturbed)}
    return asked


class _Cells(NamedTuple):
    """Rows of the perturbed cells and of the goal's, int64 arrays, and the donor of every cell, -1 for none."""

    perturbed: np.ndarray
    goal: np.ndarray
    donors: np.ndarray | None

    def donors_of(self, group: int) -> np.ndarray | None:
        """Return the donors of the perturbed cells (0) or the goal's (1)."""
        return None if self.donors is None else self.donors[self[group]]


def _choose_cells(obs, known_counts, goal_key, goal, start, donor_key) -> _Cells:
    """Split the cells into those to perturb and the goal's; cells without counts are in neither."""
    for key in (goal_key, donor_key):
        must_have(obs, "obs", key)
    full = np.diff(known_counts.indptr) > 0
    in_goal, perturbed = np.zeros(len(obs), bool), np.ones(len(obs), bool)
    if goal_key is not None:
        known = obs[goal_key].notna().to_numpy()
        groups = obs[goal_key].astype(str).to_numpy()
        in_goal = known & (groups == str(goal))
        perturbed = known & (~in_goal if start is None else groups == str(start))
        if not known.all():
            logger.warning(
                f"{(~known).sum()} of {len(known)} cells have no value in obs[{goal_key!r}]; they are left out."
            )
        for name, of in (("goal", in_goal), ("start", perturbed)):
            if not (of & full).any():
                found = ", ".join(map(repr, sorted(set(groups[known]))))
                raise ValueError(f"No cell is in the {name} group: obs[{goal_key!r}] has {found}.")
    if not (perturbed & full).any():
        raise ValueError("There are no cells with counts in genes that the model knows.")
    if not full.all():
        logger.warning(
            f"{(~full).sum()} of {len(full)} cells have no counts in genes that the model knows; they are left out."
        )
    donors = None
    if donor_key is not None:
        donors, _ = pd.factorize(obs[donor_key].astype("category").cat.rename_categories(str), sort=True)
        donors = donors.astype(np.int64)
        lost = (donors < 0) & (in_goal | perturbed)
        if lost.any():
            raise ValueError(f"{lost.sum()} cells have no donor in obs[{donor_key!r}]: remove them.")
    return _Cells(np.flatnonzero(perturbed & full), np.flatnonzero(in_goal & full), donors)


class _Reader:
    """A model that reads cells: states of length 1, and probabilities of classes."""

    def __init__(self, model, tokenizer, hidden_layer, pooling, max_tokens, fractional, min_coverage):
        of_cells = is_classifier(model)
        auto_class = AutoModelForSequenceClassification if of_cells else AutoModel
        self.model, self.tokenizer = load(model, tokenizer, auto_class, min_coverage)
        if self.tokenizer.neighborhood:
            raise ValueError("Models that read neighbourhoods cannot be perturbed.")
        self.heads = read_heads(self.model) if of_cells else []
        if self.heads and self.heads[0].kind != "single_label_classification":
            self.heads = []
        self.classes = [
            name if head.column is None else output_name(head.column, name)
            for head in self.heads
            for name in head.names
        ]
        self.encoder = self.model.base_model
        if not self.heads:
            self.model = self.encoder
        self.pooling = choose_pooling(pooling, self.model, self.tokenizer)
        check_hidden_layer(self.model, hidden_layer)
        self.hidden_layer, self.max_tokens, self.fractional = hidden_layer, max_tokens, fractional
        self.names: tuple[np.ndarray, np.ndarray] | None = None
        self.class_name: str | None = None
        pooled = {self.pooling, *[self.model.config.classifier_pooling] * bool(self.heads)}
        self.length = length_to_read(self.encoder, self.tokenizer, *pooled)

    def read_genes(self) -> None:
        """Read all tokens, for the states of genes; raise a ValueError if these do not depend on other genes."""
        if self.hidden_layer in (0, -self.model.config.num_hidden_layers - 1):
            raise ValueError(
                f"hidden_layer={self.hidden_layer} is before the first layer, where the state of a gene does not "
                "depend on other genes: choose another, or leave out gene_shifts."
            )
        if isinstance(self.encoder, GeneBertModel) and self.encoder.adds_nothing():
            raise ValueError(
                "The layers of this model add nothing yet (a spectral start that was not trained), so the state of a "
                "gene does not depend on other genes: train the model, or leave out gene_shifts."
            )
        self.length = None

    def choose_class(self, predicted: str | None, goal: str | None, goal_key: str | None) -> None:
        """Choose the class whose probability is measured; with several label columns, one must be named."""
        names, several = self.classes, len(self.heads) > 1
        if predicted is not None and predicted not in names:
            raise ValueError(f"The model has no class {predicted!r}; its classes: {', '.join(names) or 'none'}.")
        of_goal = None if goal is None else output_name(str(goal_key), str(goal)) if several else str(goal)
        self.class_name = predicted or (of_goal if of_goal in names else None)
        if several and self.class_name is None:
            columns = ", ".join(str(head.column) for head in self.heads)
            raise ValueError(
                f"The model predicts a class in each of several label columns ({columns}): name the one whose "
                f"probability is measured, such as predicted={names[0]!r}."
            )

    def __call__(
        self, counts: sparse.csr_matrix, of_genes: _OfGenes | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the states of cells, float32 (n, d) of length 1, and the probabilities (n, n_classes), or None.

        The states of genes are given to `of_genes`, batch by batch: cells and genes, int64 arrays (k,), and states,
        Tensor (k, d).
        """
        tokens = self.tokenizer.encode_cells(
            counts, genes=self.names, fractional=self.fractional, for_inference=True, max_length=self.length
        )
        lengths = np.diff(tokens.indptr)
        of_cells, of_classes = [], []
        order = np.argsort(-lengths, kind="stable")
        packed = packs(self.model)
        on_cpu = self.model.device.type == "cpu"
        most = self.max_tokens or (_TOKENS_ON_CPU if on_cpu else _TOKENS)
        for cells in _cut(order, lengths, most, packed):
            batch = make_batch(take(tokens, cells), cells, self.tokenizer, packed).to(self.model.device)
            some, probabilities = self._forward(batch, of_genes)
            of_cells.append(some)
            if probabilities is not None:
                of_classes.append(probabilities)
        back = np.argsort(order)
        states = np.concatenate(of_cells)[back]
        check_finite(states, np.ones(len(states), bool))
        return states, np.concatenate(of_classes)[back] if of_classes else None

    def _forward(self, batch: TokenBatch, of_genes: _OfGenes | None) -> tuple[np.ndarray, np.ndarray | None]:
        inputs, types = batch.inputs, batch.types
        if not self.heads and of_genes is None:
            settings = {"hidden_layer": self.hidden_layer, "pooling": self.pooling}
            return unit_length(pooled_states(self.model, inputs, types, **settings)).cpu().numpy(), None
        outputs = self.model(**inputs, output_hidden_states=True)
        hidden, boundaries = outputs.hidden_states[self.hidden_layer], inputs.get("cu_seq_lens_q")
        pooled = pool(hidden, types, inputs.get("attention_mask"), self.pooling, boundaries)
        states = unit_length(pooled).cpu().numpy()
        if of_genes is not None:
            is_gene = batch.genes >= 0
            cells = np.repeat(batch.rows, batch.n_genes)
            of_genes(cells, batch.genes[is_gene], hidden[torch.from_numpy(is_gene).to(hidden.device)])
        if not self.heads:
            return states, None
        return states, torch.cat([head.predictions(outputs.logits) for head in self.heads], dim=1).cpu().numpy()


_OfGenes = Callable[[np.ndarray, np.ndarray, torch.Tensor], None]


def _cut(order: np.ndarray, lengths: np.ndarray, max_tokens: int, packed: bool) -> Iterator[np.ndarray]:
    """Cut cells, the longest first, into batches within a number of tokens; a longer cell is a batch of its own."""
    first = 0
    while first < len(order):
        of = lengths[order[first:]]
        cost = np.cumsum(of) if packed else np.arange(1, len(of) + 1) * of[0]
        n = max(int(np.searchsorted(cost, max_tokens, side="right")), 1)
        yield order[first : first + n]
        first += n


class _Linear:
    """The baselines: principal components, and a logistic regression of the goal, of log-normalised genes."""

    def __init__(self, counts: sparse.csr_matrix, known: np.ndarray, cells: _Cells):
        self._known = known
        rows = np.concatenate([cells.perturbed, cells.goal])
        values = log_normalise(counts[rows][:, known])
        self._pca = fit_pca(values, 0)
        self._classifier = None
        if len(cells.goal):
            is_goal = np.repeat([0, 1], [len(cells.perturbed), len(cells.goal)])
            self._classifier = LogisticRegression(max_iter=2000).fit(values, is_goal)

    def __call__(self, counts: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray | None]:
        """Return states of length 1, float64 (n, 50), and the probability of the goal (n, 1), None without a goal."""
        values = log_normalise(counts[:, self._known])
        states = self._pca(values)
        states /= np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-30)
        return states, None if self._classifier is None else self._classifier.predict_proba(values)[:, 1:]


class _Unperturbed(NamedTuple):
    """What a reader says of the n unperturbed cells; states have the length 1."""

    states: np.ndarray  # (n, d)
    probabilities: np.ndarray | None  # of the class that is measured (n,)
    classes: np.ndarray | None  # which class that is: int64 (n,)
    goal: np.ndarray | None  # the goal state: float64 (d,)

    def scores(self, cells: np.ndarray, states: np.ndarray, probabilities: np.ndarray | None) -> list[np.ndarray]:
        """Return the scores of edited cells: shift, shift to the goal, change of the probability."""
        before, after = self.states[cells].astype(np.float64), states.astype(np.float64)
        found = [0.5 * ((after - before) ** 2).sum(axis=1)]  # 1 - cosine of two vectors of length 1
        if self.goal is not None:
            found.append((after - before) @ self.goal)
        if probabilities is not None:
            assert self.probabilities is not None and self.classes is not None  # of the same model
            found.append(probabilities[np.arange(len(cells)), self.classes[cells]] - self.probabilities[cells])
        return found


class _Grid:
    """All perturbations in all cells, shard by shard."""

    def __init__(self, folder, reader, edits, counts, cells, perturbations, panel, shard_size, with_genes):
        self.folder, self.reader, self.edits, self.cells = folder, reader, edits, cells
        self.counts, self.perturbations = counts, perturbations
        self._linear = _Linear(counts, panel.known, cells)
        self._shard_size = shard_size
        self._gene_of = reader.tokenizer.find_genes(panel.gene_ids, panel.symbols) if with_genes else None
        self._base: list[_Unperturbed] = []
        self.groups: CellGroups | DonorGroups | None = None  # with a goal
        with_goal, with_classes = len(cells.goal) > 0, bool(reader.heads)
        own = ["shift", *["goal_shift"] * with_goal, *["probability"] * with_classes]
        linear = ["pca_shift", *["pca_goal_shift", "linear_probability"] * with_goal]
        self._names = own + linear
        # The tested score comes first.
        first = "goal_shift" if with_goal else "probability" if with_classes else "shift"
        self._order = sorted(range(len(self._names)), key=lambda i: (self._names[i] != first, i))
        self.score_names = [self._names[i] for i in self._order]

    def run(self, state: PartialState | None) -> None:
        """Write all shards that are not there, those of this process."""
        sizes = np.array([len(self.edits.changes(each)[0]) for each in self.perturbations], np.int64)
        cuts = self._cuts(sizes)
        files = [self.folder / f"shard_{first:07d}_{stop:07d}.npz" for first, stop in cuts]
        self._files = files
        rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
        mine = [i for i in range(len(files)) if i % world == rank and not files[i].exists()]
        self._read_unperturbed()
        total = sum(int(sizes[slice(*cuts[i])].sum()) for i in mine)
        with tqdm(total=total, desc="perturb", unit="cell", disable=None if rank == 0 else True) as bar:
            for i in mine:
                self._write_shard(files[i], range(*cuts[i]), bar)
        if state is not None:
            state.wait_for_everyone()

    def shards(self, kind: Any) -> Iterator[Any]:
        """Read the shards: their `ShardScores`, or their `ShardGenes`."""
        for file in self._files:
            with np.load(file) as found:
                yield kind(**{name: found[name] for name in kind._fields})

    def _cuts(self, sizes: np.ndarray) -> list[tuple[int, int]]:
        """Cut the perturbations into shards of at most `shard_size` edited cells, or of one perturbation."""
        cuts, first, cost = [], 0, 0
        for i, size in enumerate(sizes.tolist()):
            if i > first and cost + size > self._shard_size:
                cuts.append((first, i))
                first, cost = i, 0
            cost += size
        return [*cuts, (first, len(sizes))]

    def _read_unperturbed(self) -> None:
        """Read the unperturbed cells and the goal's, once for all perturbations."""
        for reader in (self.reader, self._linear):
            states, probabilities = self._read_all(reader, self.cells.perturbed)
            classes = None
            if probabilities is not None:
                classes = probabilities.argmax(axis=1)
                if reader is self._linear:
                    classes[:] = 0
                elif self.reader.class_name is not None:
                    classes[:] = self.reader.classes.index(self.reader.class_name)
                probabilities = probabilities[np.arange(len(classes)), classes]
            goal = None
            if len(self.cells.goal):
                goals = self._read_all(reader, self.cells.goal)[0].astype(np.float64)
                donors = self.cells.donors_of(1)
                means = goals if donors is None else _mean_states(goals, donors)[0]
                goal = means.mean(axis=0)
                goal /= max(np.linalg.norm(goal), 1e-30)
                if reader is self.reader and donors is None:
                    self.groups = CellGroups(cell_statistics(states.astype(np.float64)), cell_statistics(goals))
                elif reader is self.reader:
                    assert donors is not None
                    starts, of_starts = _mean_states(states.astype(np.float64), self.cells.donors_of(0))
                    of_goals = np.unique(donors)
                    self.groups = DonorGroups(
                        np.concatenate([starts, means]),
                        np.concatenate([of_starts, of_goals]),
                        np.repeat([False, True], [len(of_starts), len(of_goals)]),
                    )
            self._base.append(_Unperturbed(states, probabilities, classes, goal))

    def _read_all(self, reader, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        parts = [reader(self.counts[rows[i : i + _CELLS_AT_ONCE]]) for i in range(0, len(rows), _CELLS_AT_ONCE)]
        states, probabilities = zip(*parts, strict=True)
        return np.concatenate(states), None if probabilities[0] is None else np.concatenate(probabilities)

    def _write_shard(self, file: Path, numbers: range, bar: tqdm) -> None:
        """Read the edited cells of some perturbations, and write their scores."""
        found = [self.edits.changes(self.perturbations[number]) for number in numbers]
        n_changed = np.array([len(cells) for cells, *_ in found], np.int64)
        before = np.concatenate([[0], np.cumsum(n_changed)])
        cells = np.concatenate([of for of, *_ in found])
        rows = np.concatenate([of + shift for (_, of, *_), shift in zip(found, before[:-1], strict=True)])
        columns, values = (np.concatenate([each[i] for each in found]) for i in (2, 3))
        by_cell = np.argsort(cells, kind="stable")  # the edits of a cell together
        cells, of_pair = cells[by_cell], np.repeat(np.arange(len(numbers)), n_changed)[by_cell]
        rows = np.argsort(by_cell)[rows]
        order = np.argsort(rows, kind="stable")
        rows, columns, values = rows[order], columns[order], values[order]

        n_cells = len(self.cells.perturbed)
        scores = np.zeros((len(numbers), len(self._names), n_cells), np.float32)
        directions = np.zeros((len(numbers), self._base[0].states.shape[1]))
        gene_sums = self._gene_sums(numbers)
        step = _CELLS_AT_ONCE if gene_sums is None else _CELLS_AT_ONCE_WITH_GENES
        for first in range(0, len(cells), step):
            some, of = cells[first : first + step], of_pair[first : first + step]
            part = slice(*np.searchsorted(rows, [first, first + len(some)]))
            edited = self.edits.edited(some, rows[part] - first, columns[part], values[part])
            of_genes = None if gene_sums is None else self._add_gene_shifts(gene_sums, some, of)
            states, probabilities = self.reader(edited, of_genes)
            of_scores = self._base[0].scores(some, states, probabilities)
            of_scores += self._base[1].scores(some, *self._linear(edited))
            moved = states.astype(np.float64) - self._base[0].states[some]
            for i, score in enumerate(of_scores):
                scores[of, i, some] = score
            np.add.at(directions, of, moved)
            bar.update(len(some))
        changed = np.zeros((len(numbers), n_cells), bool)
        changed[of_pair, cells] = True
        shard = ShardScores(
            np.array(numbers, np.int64), n_changed, scores[:, self._order], changed, directions / n_cells
        )
        arrays = shard._asdict() | ({} if gene_sums is None else gene_sums.means()._asdict())
        with whole_file(file) as unfinished, open(unfinished, "wb") as to:
            np.savez(to, **arrays)

    def _gene_sums(self, numbers: range) -> ShiftSums | None:
        if self._gene_of is None:
            return None
        edited = [self._gene_of[list(self.perturbations[number].columns)] for number in numbers]
        return ShiftSums(numbers, len(self.reader.tokenizer.genes), edited)

    def _add_gene_shifts(self, sums: ShiftSums, cells: np.ndarray, of_pair: np.ndarray) -> _OfGenes:
        """Read unperturbed cells; return a function that adds the shifts of the genes of the edited cells to sums."""
        own, at = np.unique(cells, return_inverse=True)
        before = GeneStates(len(self.reader.tokenizer.genes))
        self.reader(self.edits.counts[own], before.add)
        before.sort()

        def add(rows: np.ndarray, genes: np.ndarray, states: torch.Tensor) -> None:
            here, shifts = before.shifts(at[rows], genes, states)
            sums.add(of_pair[rows[here]], genes[here], shifts)

        return add


def _mean_states(states: np.ndarray, donors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean state of each donor (n_donors, d), and the donors."""
    found, codes = np.unique(donors, return_inverse=True)
    sums = np.zeros((len(found), states.shape[1]))
    np.add.at(sums, codes, states)
    return sums / np.bincount(codes)[:, None], found


def _check_settings(kind, quantile, goal_key, goal, start, **numbers: int | None) -> float | None:
    """Refuse invalid settings; return the quantile."""
    if kind not in QUANTILES:
        raise ValueError(f"kind must be one of {', '.join(QUANTILES)}, got {kind!r}.")
    if quantile is not None and (kind == "delete" or not 0 <= quantile <= 1):
        raise ValueError(f"quantile={quantile}: must be a number from 0 to 1, and is not for kind='delete'.")
    for name, value in numbers.items():
        least = 0 if name in ("n_null", "gene_shifts") else 1
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}.")
    if (goal_key is None) != (goal is None):
        raise ValueError("goal_key and goal belong together: the column of obs, and its value in the goal's cells.")
    if start is not None and (goal is None or str(start) == str(goal)):
        raise ValueError("start must be a value of goal_key other than goal: pass goal_key and goal too.")
    return QUANTILES[kind] if quantile is None else quantile


def _open_folder(folder: Path, settings: dict, state: PartialState | None) -> None:
    """Create the folder of the results, or check that it holds those of the same settings, and nothing else."""
    manifest = folder / "perturb.json"
    if state is None or state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            if any(folder.glob("[!.]*")):
                raise ValueError(f"{folder} holds other files: choose an empty folder.")
            _write(manifest, json.dumps(settings, indent=1, default=lambda number: number.item()))  # numpy's numbers
    if state is not None:
        state.wait_for_everyone()
    found = json.loads(manifest.read_text(encoding="utf-8"))
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        raise ValueError(
            f"{folder} holds results of other settings: {other[0]} was {found.get(other[0])!r} and is "
            f"{settings[other[0]]!r}. Choose another folder, or remove it."
        )


def _write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
