"""In-silico perturbation: change the counts of genes, and see how far the model moves the cells."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from anndata import AnnData
from scipy import sparse
from transformers import PreTrainedModel

from .. import __version__
from ..genes.whole_files import whole_file
from ..genes.wrong_names import must_have
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..sources.open_source import open_source
from ..training.cell_checksum import checksum
from ..training.loading import name_of
from .batches import at_work, check_cells, check_dtype
from .gene_edits import QUANTILES, GeneEdits, Panel, choose_perturbations
from .gene_shifts import ShardGenes, make_gene_table
from .gene_states import gene_frame
from .perturb_grid import Cells, Grid
from .perturb_reader import Reader
from .perturb_statistics import ShardScores, make_table

logger = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4096


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
    reader = Reader(model, tokenizer, hidden_layer, pooling, max_tokens, fractional, min_coverage)
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
            grid = Grid(folder, reader, edits, counts, cells, perturbations, panel, shard_size, gene_shifts > 0)
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


def _choose_cells(
    obs: pd.DataFrame,
    known_counts: sparse.csr_matrix,
    goal_key: str | None,
    goal: str | None,
    start: str | None,
    donor_key: str | None,
) -> Cells:
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
    return Cells(np.flatnonzero(perturbed & full), np.flatnonzero(in_goal & full), donors)


def _check_settings(
    kind: str, quantile: float | None, goal_key: str | None, goal: str | None, start: str | None, **numbers: int | None
) -> float | None:
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
