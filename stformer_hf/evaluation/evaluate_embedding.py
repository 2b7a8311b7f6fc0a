"""Compare embeddings with simple baselines, on the same folds of the same cells."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from ..genes.wrong_names import must_have, some_of
from ..models.gene_bert.cell_tables import find_table
from ..sources.open_source import open_source
from ..sources.read_anndata import as_anndata
from ..store.engines import check_engine, run_tasks, runs_here
from .ceiling import Ceiling, cluster_agreement, measure_ceiling
from .cell_baselines import import_scvi, log_normalise
from .cell_baselines import scvi_embedding as scvi_embedding  # which benchmarks import from here
from .clusters import cluster_scores, silhouette
from .evaluation_result import CEILING, N_LABELS, EmbeddingEvaluation
from .integration import batch_kbet, integration_scores, scib_version
from .metrics import classification_metrics
from .readers import N_NEIGHBORS, fit_knn, fit_pca, fit_probe, fit_scaler
from .splits import Fold, draw_labelled, find_twins, make_folds

logger = logging.getLogger(__name__)

BASELINES = {"pca": "PCA of genes", "logistic_regression": "LR on genes", "scvi": "scVI"}
_MORE_CELLS = 20  # per class beyond the labelled ones, to enter the columns of few labels
_MOST_CELLS = 10_000  # for metrics that compare all cells with one another
_ROWS_PER_BLOCK = 4096


class Row(NamedTuple):
    """One row of the table."""

    name: str
    cells: np.ndarray | sparse.csr_array  # (n_cells, d), for readers of labels
    embedding: np.ndarray | None  # float64 (n_cells, d), for metrics over all cells; None for a mere classifier
    pca_seed: int | None = None  # if given, readers get principal components of `cells`

    def represent(self, train: np.ndarray) -> np.ndarray | sparse.csr_array:
        """Return all cells as readers get them, fitted to the training cells (int64 array)."""
        return self.cells if self.pca_seed is None else fit_pca(self.cells[train], self.pca_seed)(self.cells)


class _Evaluation(NamedTuple):
    """The evaluated cells, and how they are scored: what all tasks need."""

    rows: list[Row]
    labels: np.ndarray  # str (n_cells,)
    batches: np.ndarray | None  # str (n_cells,)
    counts: sparse.csr_array  # (n_cells, n_genes)
    folds: list[Fold]
    few: dict[int, list[list[str]]]  # see `_few_label_classes`
    subset: np.ndarray  # int64, the cells that are compared with one another
    clusters: bool  # whether cells can be clustered
    n_draws: int
    seed: int

    def tasks(self) -> list[Callable[[_Evaluation], list[dict[str, Any]]]]:
        """Return functions that each score a part, in the order of the results."""
        folds = range(len(self.folds))
        tasks: list[Callable] = []
        for row, of in enumerate(self.rows):
            tasks += [partial(_score_readers, row=row, number=fold) for fold in folds]
            tasks += [
                partial(_score_cells, row=row, number=fold) for fold in [None, *folds] if of.embedding is not None
            ]
        return [*tasks, _score_ceiling]


def evaluate_embedding(
    adata: AnnData,
    keys: Sequence[str],
    *,
    label_key: str,
    batch_key: str | None = None,
    split_by: str | None = None,
    baselines: Sequence[str] = ("pca", "logistic_regression"),
    layer: str | None = None,
    n_splits: int = 5,
    n_repeats: int = 1,
    n_draws: int = 4,
    min_cells: int | None = None,
    seed: int = 0,
    workers: int = 1,
    engine: str = "local",
) -> EmbeddingEvaluation:
    """Compare embeddings of cells with one another and with simple baselines, by cross-validation.

    Embeddings are used as given. One that was fitted to all cells of `adata` without their labels (a model pretrained
    on them, a PCA of all cells) is *transductive*: it has seen the held-out cells, which the baselines, refitted in
    each fold, have not. For a fair comparison, add a PCA of all cells to the `keys`. An embedding that was fitted with
    the labels leaks them, and no metric here reveals that.

    Everything fitted here (variable genes, components, scalers, probes, neighbours) sees only the training cells of a
    fold. Copies of a cell (equal barcode and counts) are on one side of every split. Cells without a label, classes
    with fewer than `min_cells` cells, and held-out cells whose class has no training cell (with `split_by`) are left
    out of every metric of every row; their numbers are in `notes`.

    Parameters
    ----------
    adata : AnnData
        Cells with raw counts in X, raw or a layer. It is not changed.
    keys : sequence of str
        Keys of `obsm`, float (n_obs, d) each; without keys only the baselines are evaluated.
    label_key : str
        Column of obs with the class of each cell.
    batch_key : str, optional
        Column of obs with batches: adds the integration metrics, see `integration.integration_scores`.
    split_by : str, optional
        Column of obs, such as the donor: cells of one group are on one side of every split. By default cells are
        split, stratified by class.
    baselines : sequence of str, default: ("pca", "logistic_regression")
        "pca": 50 components of 2,000 variable genes, log-normalised. "logistic_regression": on all log-normalised
        genes, C = 1; only metrics of the probe. "scvi": scVI with its defaults, fitted once to all cells without
        their labels, so it is transductive (extra `scvi`).
    layer : str, optional
        Location of the counts: X, raw or a layer; by default it is detected.
    n_splits, n_repeats : int, default: 5, 1
        Number of folds, and of repeats with new folds.
    n_draws : int, default: 4
        Draws of few labelled cells per fold; 4 in each of 5 folds are 20.
    min_cells : int, optional
        Minimum number of cells of a class; `n_splits` by default (copies count once).
    seed : int, default: 0
        Seed of folds, draws, components, clusters and the ceiling.
    workers : int, default: 1
        Number of tasks that run at once: one per row and fold. Each worker holds the cells.
    engine : {"local", "ray"}, default: "local"
        Where more than one worker runs, see `store.engines.run_tasks`. The figures do not depend on it.

    Returns
    -------
    EmbeddingEvaluation
        Its columns (larger is better in all of them):

        `knn_accuracy`: vote of the 15 nearest training cells. `probe_5`, `probe_20`, `probe_50`: accuracy of a
        logistic regression (C = 1, one scale for all dimensions) trained on this number n of labelled cells per class,
        on the held-out cells of classes with at least n + 20 cells (and n training cells in the fold). `probe_all`,
        `probe_all_macro_f1`: trained on all training labels; the F1 is averaged over the classes held out in the fold.
        `leiden_ari`, `leiden_nmi` (resolution 1), `leiden_ari_best`, `leiden_nmi_best` (best of one grid), and
        `silhouette` of the classes: over all cells, or 10,000 random ones. With `batch_key` also
        `batch_silhouette`, `batch_ilisi`, `batch_pcr`, `connectivity`; with scib-metrics (extra `scib`) `batch_kbet`.

        The row "ceiling (half depth)" shows how well one half of a cell's counts predicts the label of the other half,
        see `ceiling.measure_ceiling`.

    Raises
    ------
    ValueError
        There are no counts; a column or key is missing; an embedding has another shape or NaN; there are fewer than
        two classes with enough cells, or fewer than two batches; there are too few groups or cells; the engine is
        unknown.
    ImportError
        "scvi" or "ray" is requested without its extra.
    """
    check_engine(engine, workers)
    keys = [keys] if isinstance(keys, str) else list(keys)
    _check_settings(keys, baselines, n_splits, n_repeats, n_draws, n_splits if min_cells is None else min_cells)
    found = find_table(adata, layer)
    adata, layer = as_anndata(found), found.layer
    embeddings = {key: _read_embedding(adata, key) for key in keys}
    given = [key for key in (label_key, batch_key, split_by) if key is not None]
    columns: dict[str | None, np.ndarray] = {key: _column(adata, key) for key in given}
    labels = columns[label_key]
    for key, column in columns.items():
        if (column[labels != None] == None).any():  # noqa: E711  (arrays of objects)
            raise ValueError(f"Labelled cells have no value in obs[{key!r}]: remove them first.")
    counts = _read_counts(adata, layer)
    twins = find_twins(adata.obs_names, counts)
    notes: list[str] = []
    kept = _choose_cells(labels, twins, min_cells or n_splits, notes)
    cells = np.flatnonzero(kept)
    n_empty = int((np.diff(counts.indptr)[cells] == 0).sum())
    if n_empty:
        notes.append(f"{n_empty:,} cells have no counts: they are scored, but the baselines know nothing of them.")
    twins, counts = twins[cells], counts[cells]
    embeddings = {key: values[cells] for key, values in embeddings.items()}
    columns = {key: column[cells].astype(str) for key, column in columns.items()}
    labels, batches, groups = columns[label_key], columns.get(batch_key), columns.get(split_by)
    if batches is not None and len(np.unique(batches)) < 2:
        raise ValueError(f"obs[{batch_key!r}] has only one batch among the evaluated cells: leave batch_key out.")
    folds = make_folds(labels, twins, n_splits=n_splits, n_repeats=n_repeats, seed=seed, groups=groups)
    folds = [_without_unseen(fold, labels, notes) for fold in folds]
    few = _few_label_classes(labels, folds, notes)
    evaluation = _Evaluation(
        rows=list(_make_rows(embeddings, baselines, log_normalise(counts), counts, batches, seed)),
        labels=labels,
        batches=batches,
        counts=counts,
        folds=folds,
        few=few,
        subset=_subset(len(labels), seed, notes),
        clusters=_can_cluster(notes),
        n_draws=n_draws,
        seed=seed,
    )
    values = _score_all(evaluation, workers, engine)
    names, sizes = np.unique(labels, return_counts=True)
    settings = {
        "label_key": label_key,
        "batch_key": batch_key,
        "split_by": split_by,
        "n_cells": len(labels),
        "n_classes": len(names),
        "classes": dict(zip(names.tolist(), sizes.tolist(), strict=True)),
        "majority": float(sizes.max() / sizes.sum()),
        "classes_of_few_labels": {str(n): sorted(set().union(*of_fold)) for n, of_fold in few.items()},
        "n_splits": n_splits,
        "n_repeats": n_repeats,
        "n_draws": n_draws,
        "seed": seed,
        "test_to_train": float(np.mean([len(fold.test) / len(fold.train) for fold in folds])),
        "scib_metrics": None if batches is None else scib_version(),
        "baselines": [BASELINES[name] for name in baselines],
        "keys": keys,
    }
    notes = list(dict.fromkeys(notes))
    for note in notes:
        logger.info(note)
    return EmbeddingEvaluation(pd.DataFrame(values), settings, notes)


# ---------------------------------------------------------------------- inputs


def _check_settings(
    keys: list[str], baselines: Sequence[str], n_splits: int, n_repeats: int, n_draws: int, min_cells: int
) -> None:
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys contains a key twice: {', '.join(keys)}.")
    taken = {*BASELINES.values(), CEILING} & set(keys)
    if taken:
        raise ValueError(f"obsm[{min(taken)!r}] has the name of a baseline: copy it to another key.")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown or isinstance(baselines, str):
        raise ValueError(f"baselines must be a list of {', '.join(BASELINES)}; got {baselines!r}.")
    if not keys and not baselines:
        raise ValueError("Nothing to evaluate: pass keys of obsm, or baselines.")
    for name, value, least in (("n_splits", n_splits, 2), ("n_repeats", n_repeats, 1), ("n_draws", n_draws, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}.")
    if min_cells < n_splits:
        raise ValueError(f"min_cells={min_cells}: a class needs a cell in each of the {n_splits} folds.")
    if "scvi" in baselines:
        import_scvi()


def _read_embedding(adata: AnnData, key: str) -> np.ndarray:
    """Read and check an embedding: float64 array (n_obs, d)."""
    must_have(adata.obsm, "obsm", key)
    found = adata.obsm[key]
    found = found.toarray() if sparse.issparse(found) else np.asarray(found)
    if found.ndim != 2 or not found.shape[1]:
        raise ValueError(f"obsm[{key!r}] has the shape {found.shape}; an embedding is (n_obs, d) with d > 0.")
    try:
        found = found.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"obsm[{key!r}] does not hold numbers.") from None
    wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"obsm[{key!r}] is NaN or infinite for {len(wrong)} of {len(found)} cells, such as "
            f"{adata.obs_names[wrong[0]]}: remove them, or embed again."
        )
    return found


def _column(adata: AnnData, key: str) -> np.ndarray:
    """Read a column of obs: object array (n_obs,) of str, None where missing."""
    must_have(adata.obs, "obs", key)
    column = adata.obs[key]
    return np.array([None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)])


def _read_counts(adata: AnnData, layer: str | None) -> sparse.csr_array:
    """Read the counts of all cells: canonical int64 csr_array (n_obs, n_genes)."""
    if not adata.n_obs:
        raise ValueError("The AnnData has no cells.")
    source = open_source(adata, layer)
    counts = sparse.csr_array(sparse.vstack(list(source.blocks(_ROWS_PER_BLOCK)), format="csr")).astype(np.int64)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _choose_cells(labels: np.ndarray, twins: np.ndarray, least: int, notes: list[str]) -> np.ndarray:
    """Choose the cells of classes with enough cells, counting twins once: bool array (n_obs,)."""
    there = labels != None  # noqa: E711  (an array of objects)
    if not there.all():
        notes.append(f"{(~there).sum():,} cells without a label are left out.")
    firsts = np.zeros(len(labels), bool)
    firsts[np.unique(twins, return_index=True)[1]] = True
    if (~firsts).any():
        notes.append(f"{(~firsts).sum():,} cells are copies of others, and stay on the same side of every split.")
    sizes = pd.Series(labels[firsts & there]).value_counts()
    rare = sorted(sizes.index[sizes < least])
    if rare:
        notes.append(f"Classes with fewer than {least} cells are left out ({len(rare)}): {some_of(rare)}.")
    kept = there & np.isin(labels, sizes.index[sizes >= least])
    n_classes = (sizes >= least).sum()
    if n_classes < 2:
        found = "one" if n_classes else "none"
        raise ValueError(f"The evaluation needs two classes with at least {least} cells; there is {found}.")
    return kept


def _without_unseen(fold: Fold, labels: np.ndarray, notes: list[str]) -> Fold:
    """Leave out held-out cells whose class has no training cell, which no reader can predict."""
    seen = np.isin(labels[fold.test], labels[fold.train])
    if not seen.all():
        notes.append(
            f"Repeat {fold.repeat}, fold {fold.number}: {(~seen).sum():,} held-out cells are not scored, as their "
            f"classes have no training cell ({', '.join(np.unique(labels[fold.test[~seen]])[:5])})."
        )
    fold = fold._replace(test=fold.test[seen])
    n_classes = len(np.unique(labels[fold.train]))
    if len(fold.train) < N_NEIGHBORS or not len(fold.test) or n_classes < 2:
        raise ValueError(
            f"Fold {fold.number} has {len(fold.train)} training cells of {n_classes} classes and {len(fold.test)} "
            f"held-out cells that can be scored; it needs {N_NEIGHBORS} of two classes, and one held-out cell: use "
            "fewer folds, or split by cells."
        )
    return fold


def _few_label_classes(labels: np.ndarray, folds: list[Fold], notes: list[str]) -> dict[int, list[list[str]]]:
    """Choose the classes of each fold for the columns of few labels: number of labels -> classes per fold."""
    names, sizes = np.unique(labels, return_counts=True)
    chosen: dict[int, list[list[str]]] = {}
    for n in N_LABELS:
        large = names[sizes >= n + _MORE_CELLS]
        of_fold = [[name for name in large if (labels[fold.train] == name).sum() >= n] for fold in folds]
        tested = [np.isin(labels[fold.test], classes).any() for fold, classes in zip(folds, of_fold, strict=True)]
        if min(map(len, of_fold)) < 2 or not all(tested):
            notes.append(
                f"No column for {n} labels per class: a fold has fewer than two classes with {n + _MORE_CELLS} cells, "
                f"{n} of them for training."
            )
        else:
            chosen[n] = of_fold
    return chosen


def _make_rows(
    embeddings: dict[str, np.ndarray],
    baselines: Sequence[str],
    normalised: sparse.csr_array,
    counts: sparse.csr_array,
    batches: np.ndarray | None,
    seed: int,
) -> Iterator[Row]:
    for key, embedding in embeddings.items():
        yield Row(key, embedding, embedding)
    for name in baselines:
        if name == "pca":
            yield Row(BASELINES[name], normalised, fit_pca(normalised, seed)(normalised), pca_seed=seed)
        elif name == "logistic_regression":
            yield Row(BASELINES[name], normalised, None)
        else:
            embedding = scvi_embedding(counts, batches, seed)
            yield Row(BASELINES[name], embedding, embedding)


def _subset(n_cells: int, seed: int, notes: list[str]) -> np.ndarray:
    if n_cells <= _MOST_CELLS:
        return np.arange(n_cells)
    notes.append(f"Clusters, silhouette and batches are computed on {_MOST_CELLS:,} random cells of {n_cells:,}.")
    return np.sort(np.random.default_rng(seed).choice(n_cells, _MOST_CELLS, replace=False))


def _can_cluster(notes: list[str]) -> bool:
    if importlib.util.find_spec("igraph") is not None:
        return True
    notes.append("No Leiden clusters: they need igraph, pip install 'stformer_hf[plots]'.")
    logger.warning(notes[-1])
    return False


# ---------------------------------------------------------------------- metrics


def _score_all(evaluation: _Evaluation, workers: int, engine: str) -> list[dict[str, Any]]:
    """Compute the figures of all tasks, in the order of the tasks."""
    tasks = evaluation.tasks()
    found: dict[int, list[dict[str, Any]]] = {}
    with tqdm(total=len(tasks), desc="evaluate", unit="fit", disable=None) as bar:
        if runs_here(engine, workers):
            for number, task in enumerate(tasks):
                found[number] = task(evaluation)
                bar.update()
        else:
            with run_tasks(_run, tasks, shared=evaluation, workers=workers, engine=engine) as finished:
                for number, figures in finished:
                    found[number] = figures
                    bar.update()
    return [figure for number in range(len(tasks)) for figure in found[number]]


def _run(evaluation: _Evaluation, task: Callable[[_Evaluation], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return task(evaluation)


def _score_readers(evaluation: _Evaluation, row: int, number: int) -> list[dict[str, Any]]:
    """Score a row's readers of labels in a fold."""
    of, fold = evaluation.rows[row], evaluation.folds[number]
    few = {n: classes[number] for n, classes in evaluation.few.items()}
    scores = _read_labels(of, evaluation.labels, fold, few, evaluation.n_draws, [evaluation.seed, number])
    return _figures(of.name, fold, scores)


def _score_cells(evaluation: _Evaluation, row: int, number: int | None) -> list[dict[str, Any]]:
    """Compare all cells with one another in a row, or those outside a fold."""
    of, fold = evaluation.rows[row], None if number is None else evaluation.folds[number]
    here = _cells_to_compare(evaluation, fold)
    assert of.embedding is not None  # else it has no such task
    embedding, labels = of.embedding[here], evaluation.labels[here]
    batches = None if evaluation.batches is None else evaluation.batches[here]
    scores = _compare_cells(embedding, labels, batches, evaluation.clusters, evaluation.seed)
    if batches is not None and fold is None and scib_version():
        scores["batch_kbet"] = batch_kbet(embedding, labels, batches)
    return _figures(of.name, fold, scores)


def _score_ceiling(evaluation: _Evaluation) -> list[dict[str, Any]]:
    ceiling = measure_ceiling(evaluation.counts, evaluation.labels, evaluation.seed)
    found = []
    for fold in evaluation.folds:
        found += _figures(CEILING, fold, _read_ceiling(ceiling, evaluation.labels, fold))
    for part in [None, *evaluation.folds] if evaluation.clusters else []:
        here = _cells_to_compare(evaluation, part)
        halves = (ceiling.halves[0][here], ceiling.halves[1][here])
        found += _figures(CEILING, part, cluster_agreement(halves, evaluation.seed))
    return found


def _cells_to_compare(evaluation: _Evaluation, fold: Fold | None) -> np.ndarray:
    return evaluation.subset if fold is None else np.intersect1d(evaluation.subset, fold.train)


def _figures(name: str, fold: Fold | None, scores: dict[str, float]) -> list[dict[str, Any]]:
    """Return dicts of row, metric, repeat, fold (-1 for all cells) and value."""
    place = {"repeat": -1, "fold": -1} if fold is None else {"repeat": fold.repeat, "fold": fold.number}
    return [{"row": name, "metric": metric, **place, "value": value} for metric, value in scores.items()]


def _read_labels(
    row: Row, labels: np.ndarray, fold: Fold, few: dict[int, list[str]], n_draws: int, seed: list[int]
) -> dict[str, float]:
    """Score the readers of labels on the held-out cells of one fold."""
    cells = row.represent(fold.train)
    true = labels[fold.test]
    scores = {}
    if not sparse.issparse(cells):
        found = fit_knn(cells[fold.train], labels[fold.train]).predict(cells[fold.test])
        scores["knn_accuracy"] = float(np.mean(found == true))
        cells = fit_scaler(cells[fold.train])(cells)
    for n, classes in few.items():
        test = fold.test[np.isin(true, classes)]
        hits = []
        for draw in range(n_draws):
            drawn = draw_labelled(labels, fold.train, classes, n, np.random.default_rng([*seed, n, draw]))
            hits.append(np.mean(fit_probe(cells[drawn], labels[drawn]).predict(cells[test]) == labels[test]))
        scores[f"probe_{n}"] = float(np.mean(hits))
    found = fit_probe(cells[fold.train], labels[fold.train]).predict(cells[fold.test])
    return {**scores, **_probe_scores(true, found)}


def _probe_scores(true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    scores = classification_metrics(true, found, np.unique(true))
    return {"probe_all": scores["accuracy"], "probe_all_macro_f1": scores["macro_f1"]}


def _read_ceiling(ceiling: Ceiling, labels: np.ndarray, fold: Fold) -> dict[str, float]:
    true = labels[fold.test]
    knn = float(np.mean(ceiling.knn[fold.test] == true))
    return {"knn_accuracy": knn, **_probe_scores(true, ceiling.probe[fold.test])}


def _compare_cells(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray | None, clusters: bool, seed: int
) -> dict[str, float]:
    """Compute the metrics over all cells: clusters, silhouette, batches."""
    scores = cluster_scores(embedding, labels, seed) if clusters else {}
    scores["silhouette"] = silhouette(embedding, labels)
    if batches is not None:
        scores |= integration_scores(embedding, labels, batches)
    return scores
