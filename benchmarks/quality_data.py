"""The cells of `benchmarks quality`: real data sets, their splits, draws of few labels, and simulated cells."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.model_selection import GroupShuffleSplit, StratifiedKFold

LABEL = "label"  # column of obs in all cells that are loaded here
GROUP = "group"
N_FOLDS = 5
N_PLATE_SEEDS = 3
PLATES_HELD_OUT = 0.2
N_DRAWS = 20
LABELS_PER_CLASS = (5, 20, 50)
SPARE_CELLS = 20  # that a class needs beyond its labelled cells
IFNB_CELLS = 3_000
OTHERS, OTHER_CELLS = ("pbmc_ifnb.h5ad", "geact_fetal.h5ad"), 15_000


@dataclass
class DataSet:
    """Where the cells and labels of a data set are.

    Attributes
    ----------
    load : callable
        Takes the path of the file; returns counts of genes with the labels in obs.
    label : str
        Column of obs.
    file : str or None
        Below the folder of the data; None where a package ships the cells.
    min_cells : int
        Types of fewer cells are left out. At least 5, so that each fold has one.
    groups : str or None
        Column of obs whose values are held out whole.
    subset : int or None
        Number of cells that are taken at random, unless all are asked for.
    few : bool
        Whether draws of few labels, and embeddings, are compared on it.
    transfer : bool
        Whether a start on the cells of other sets is compared on it.
    """

    load: Callable[[Path], AnnData]
    label: str
    file: str | None = None
    min_cells: int = 5
    groups: str | None = None
    subset: int | None = None
    few: bool = True
    transfer: bool = False


@dataclass
class Split:
    """Rows of the cells that have labels for training, that have none, and that are predicted.

    Attributes
    ----------
    labelled, unlabelled, test : ndarray of int
        They do not overlap. `unlabelled` is empty with full labels.
    n_absent : int
        Number of held-out cells whose type no training cell has; these are not in `test`.
    seed : int
    """

    labelled: np.ndarray
    test: np.ndarray
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    n_absent: int = 0
    seed: int = 0


# ---------------------------------------------------------------------- loading


def _load_demo(path: Path) -> AnnData:
    from stformer_hf.cli.demo import load_cells

    return load_cells()[0]


def _load_citeseq(path: Path) -> AnnData:
    from recipes.citeseq_types import labelled_cells

    with tempfile.TemporaryDirectory() as folder:
        return labelled_cells(str(path), Path(folder))


def _load_h5ad(path: Path) -> AnnData:
    return anndata.read_h5ad(path)


def _load_sympathetic(path: Path) -> AnnData:
    from stformer_hf import CellStore

    with tempfile.TemporaryDirectory() as folder:
        store = CellStore.build(Path(folder) / "store", path, obs=["Cell_cluster"])
        counts = sparse.csr_matrix(store.rows(range(len(store))).astype(np.float32))
        obs = pd.DataFrame({"Cell_cluster": store.obs["Cell_cluster"].astype(str).to_numpy()}).set_axis(
            [f"cell{i}" for i in range(len(store))]
        )
        return AnnData(counts, obs=obs, var=pd.DataFrame(index=list(store.gene_ids)))


SETS = {
    "demo": DataSet(_load_demo, "bulk_labels", transfer=True),
    "citeseq": DataSet(_load_citeseq, "cell_type", "tenx/1K_pbmc_citeseq.h5", transfer=True),
    "geact": DataSet(_load_h5ad, "cell_type", "geact_fetal.h5ad", min_cells=20),
    "geact_plates": DataSet(_load_h5ad, "cell_type", "geact_fetal.h5ad", min_cells=20, groups="batch", few=False),
    "ifnb": DataSet(_load_h5ad, "condition", "pbmc_ifnb.h5ad", subset=IFNB_CELLS),
    "starmap": DataSet(_load_h5ad, "cell_type", "starmap_cortex.h5ad", min_cells=20),
    "sympathetic": DataSet(_load_sympathetic, "Cell_cluster", "odd/sympathetic.loom"),
    "interaction": DataSet(lambda _: simulate_interaction(), LABEL, few=False),
}


def load(name: str, folder: Path | None, full: bool = False, names: str | None = None) -> AnnData:
    """Load the labelled cells of a data set.

    Parameters
    ----------
    name : str
        In `SETS`.
    folder : Path or None
        Folder of the data files.
    full : bool, default: False
        All cells, where a random subset is the default.
    names : str, optional
        Column of var that names the genes.

    Returns
    -------
    AnnData (n_cells, n_genes)
        Counts as CSR float32; `obs["label"]`, and `obs["group"]` where groups are held out whole, as categories.

    Raises
    ------
    FileNotFoundError
        The file is absent, or no folder is given; says which file is needed.
    """
    data = SETS[name]
    path = Path()
    if data.file is not None:
        if folder is None or not (path := folder / data.file).is_file():
            where = "--data_folder is not given" if folder is None else f"{path} is absent"
            raise FileNotFoundError(f"{where}: {name} needs {data.file}.")
    cells = data.load(path)
    labels = cells.obs[data.label]
    counts = labels.value_counts()
    rows = np.flatnonzero(labels.isin(counts.index[counts >= data.min_cells]).to_numpy())
    if data.subset and not full and data.subset < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, data.subset, replace=False))
    obs = pd.DataFrame({LABEL: labels.iloc[rows].astype(str).astype("category")}, index=cells.obs_names[rows])
    if data.groups:
        obs[GROUP] = cells.obs[data.groups].iloc[rows].astype(str).astype("category")
    var = cells.var[[]].copy() if names is None else pd.DataFrame(index=cells.var[names].astype(str))
    return AnnData(sparse.csr_matrix(cells.X[rows]).astype(np.float32), obs=obs, var=var)


def load_others(folder: Path) -> AnnData:
    """Load 15,000 cells of ifnb and geact, without labels, over the genes (by Ensembl id) that both measure."""
    parts = []
    for file in OTHERS:
        cells = _load_h5ad(folder / file)
        cells = AnnData(
            sparse.csr_matrix(cells.X).astype(np.float32),
            obs=pd.DataFrame(index=file + cells.obs_names),
            var=cells.var[["gene_symbol"]].astype(str).set_axis(cells.var["ensembl_id"].astype(str)),
        )
        parts.append(cells[:, ~cells.var_names.duplicated(keep=False)])
    cells = anndata.concat(parts, join="inner", merge="first")
    rows = np.sort(np.random.default_rng(0).choice(cells.n_obs, min(OTHER_CELLS, cells.n_obs), replace=False))
    return cells[rows].copy()


# ---------------------------------------------------------------------- splits


def full_splits(cells: AnnData) -> list[Split]:
    """Split into five stratified folds; where there are groups, hold out a fifth of them by each of three seeds."""
    labels = cells.obs[LABEL].to_numpy()
    if GROUP not in cells.obs:
        folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(labels, labels)
        return [Split(train, test, seed=seed) for seed, (train, test) in enumerate(folds)]
    splits = []
    for seed in range(N_PLATE_SEEDS):
        shuffle = GroupShuffleSplit(1, test_size=PLATES_HELD_OUT, random_state=seed)
        train, held_out = next(shuffle.split(labels, groups=cells.obs[GROUP].to_numpy()))
        test = held_out[np.isin(labels[held_out], labels[train])]
        splits.append(Split(train, test, n_absent=len(held_out) - len(test), seed=seed))
    return splits


def few_splits(cells: AnnData, n_labels: int) -> list[Split]:
    """Draw `n_labels` labelled cells of each class, 20 times; half of the other cells are test cells.

    Only classes of at least `n_labels` + 20 cells take part. The other half of the cells without labels is on the
    training side: what needs no labels may be fitted on it. Returns no split where fewer than two classes are left.
    """
    labels = cells.obs[LABEL].to_numpy()
    names, counts = np.unique(labels, return_counts=True)
    names = names[counts >= n_labels + SPARE_CELLS]
    if len(names) < 2:
        return []
    splits = []
    for seed in range(N_DRAWS):
        rng = np.random.default_rng([seed, n_labels])
        chosen = [rng.choice(np.flatnonzero(labels == name), n_labels, replace=False) for name in names]
        labelled = np.sort(np.concatenate(chosen))
        others = rng.permutation(np.setdiff1d(np.flatnonzero(np.isin(labels, names)), labelled))
        unlabelled, test = np.array_split(others, 2)
        splits.append(Split(labelled, np.sort(test), np.sort(unlabelled), seed=seed))
    return splits


# ---------------------------------------------------------------------- simulated cells


def simulate(n_cells: int = 2_100, n_types: int = 9, n_genes: int = 12_000, seed: int = 0) -> AnnData:
    """Simulate cells of about 850 expressed genes: negative binomial counts around the profiles of nine types.

    Shares of genes are log-normal; one in 40 genes of each type differs by a log-normal factor; totals are log-normal
    around 2,500; the inverse dispersion is 2. Types have unequal sizes.
    """
    rng = np.random.default_rng(seed)
    shares = np.exp(rng.normal(0, 2.57, n_genes))
    profiles = np.tile(shares, (n_types, 1))
    for profile in profiles:
        profile[rng.choice(n_genes, n_genes // 40, replace=False)] *= np.exp(rng.normal(0, 1, n_genes // 40))
    profiles /= profiles.sum(axis=1, keepdims=True)
    frequencies = 1 / np.arange(2, n_types + 2)
    types = rng.choice(n_types, n_cells, p=frequencies / frequencies.sum())
    totals = rng.lognormal(np.log(2_500), 0.35, n_cells)
    blocks = []
    for rows in np.array_split(np.arange(n_cells), max(1, n_cells // 500)):
        mean = profiles[types[rows]] * totals[rows, None]
        blocks.append(sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)))
    obs = pd.DataFrame(
        {LABEL: pd.Categorical([f"type {i}" for i in types])}, index=[f"cell{i}" for i in range(n_cells)]
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=var)


def simulate_interaction(n_cells: int = 2_000, n_genes: int = 1_000, seed: int = 0) -> AnnData:
    """Simulate cells with a label that no sum over genes tells: "one" of two programmes is on, or "both or none".

    Shares of genes are log-normal; each programme multiplies those of 60 genes by 3, in half of the cells; counts are
    Poisson with log-normal totals around 2,000.
    """
    rng = np.random.default_rng(seed)
    shares = np.exp(rng.normal(0, 1.5, n_genes))
    on = rng.integers(0, 2, (2, n_cells)).astype(bool)
    expected = np.tile(shares, (n_cells, 1))
    for cells in on:
        expected[np.ix_(cells, rng.choice(n_genes, 60, replace=False))] *= 3
    totals = rng.lognormal(np.log(2_000), 0.3, n_cells)
    counts = rng.poisson(expected / expected.sum(axis=1, keepdims=True) * totals[:, None])
    labels = np.where(on[0] ^ on[1], "one", "both or none")
    obs = pd.DataFrame({LABEL: pd.Categorical(labels)}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)
