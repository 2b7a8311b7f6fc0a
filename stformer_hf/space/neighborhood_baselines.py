"""Baselines for the loss of a CellNeighborhood model: means of all cells, of a type, of the neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from tqdm.auto import tqdm

from ..models.cell_neighborhood.count_likelihoods import nb_log_likelihood, pearson_r
from .center_mask_sampler import CenterMaskSampler

_CELLS_AT_ONCE = 256
_VALUES_TO_FIT = 1_000_000  # cells x genes
_FEWEST_TO_FIT = 200  # cells
_LOG_DISPERSIONS = np.log([0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000])
_PSEUDO_CELLS = (1.0, 3.0, 10.0, 30.0, 100.0)
BASELINES = ("overall_mean", "type_mean", "neighbor_mean")


class MaskedCells(NamedTuple):
    """Masked cells, and the sums of the counts around them; n cells, G genes."""

    counts: sparse.csr_array  # (n, G)
    sums: sparse.csr_array  # (n, G)
    n_neighbors: np.ndarray  # int64 (n,)
    types: np.ndarray  # int64 (n,)


class CountBaseline:
    """Negative binomials with the mean of a group of cells, and one dispersion per gene.

    Pseudo-cells with the mean of all training cells are added to a group. Their number and the dispersions maximise
    the likelihood of training cells, each predicted without itself.

    Parameters
    ----------
    train : MaskedCells
        Training cells; the fit uses at least 200 of them, and up to a million values.
    kind : {"overall_mean", "type_mean", "neighbor_mean"}
        Group of cells: all training cells, those of the masked cell's type, or the cells around it.
    """

    def __init__(self, train: MaskedCells, kind: str):
        self._kind, self._n_cells = kind, len(train.types)
        n_cells = self._n_cells
        # Half a count is added, so that no count is impossible.
        self._total = np.asarray(train.counts.sum(axis=0)).ravel() + 0.5
        n_types = int(train.types.max()) + 1
        of_type = sparse.csr_array((np.ones(n_cells), (train.types, np.arange(n_cells))), shape=(n_types, n_cells))
        self._type_sums = (of_type @ train.counts).toarray()
        self._type_sizes = np.bincount(train.types, minlength=n_types)
        n_to_fit = min(n_cells, max(_FEWEST_TO_FIT, _VALUES_TO_FIT // train.counts.shape[1]))
        cells = np.unique(np.linspace(0, n_cells - 1, n_to_fit, dtype=np.int64))
        fits = []
        for pseudo_cells in _PSEUDO_CELLS if kind != "overall_mean" else (1.0,):
            nll = np.stack([self._nll(train, cells, pseudo_cells, value) for value in _LOG_DISPERSIONS])
            fits.append((nll.min(axis=0).sum(), pseudo_cells, _LOG_DISPERSIONS[nll.argmin(axis=0)]))
        _, self.pseudo_cells, self.log_dispersion = min(fits, key=lambda fit: fit[0])

    def _nll(self, train: MaskedCells, cells: np.ndarray, pseudo_cells: float, log_dispersion: float) -> np.ndarray:
        """Compute the negative log likelihood of training cells: float64 array (G,)."""
        total = np.zeros(train.counts.shape[1])
        for start in range(0, len(cells), _CELLS_AT_ONCE):
            rows = cells[start : start + _CELLS_AT_ONCE]
            counts = train.counts[rows].toarray()
            log_mean = np.log(self._means(train, rows, pseudo_cells, own=counts))
            total -= _log_likelihood(counts, log_mean, np.full(counts.shape[1], log_dispersion)).sum(axis=0)
        return total

    def _means(self, of: MaskedCells, rows: np.ndarray, pseudo_cells: float, own: Any = 0.0) -> np.ndarray:
        """Compute the expected counts of cells, without the `own` counts of training cells: float64 (len(rows), G)."""
        is_training = int(np.ndim(own) > 0)
        overall = (self._total - own) / (self._n_cells + 1 - is_training)
        if self._kind == "overall_mean":
            return np.broadcast_to(overall, (len(rows), len(self._total)))
        if self._kind == "neighbor_mean":
            sums, sizes = of.sums[rows].toarray(), of.n_neighbors[rows]
        else:
            known = of.types[rows] < len(self._type_sizes)
            types = np.where(known, of.types[rows], 0)
            sums = self._type_sums[types] * known[:, None] - own
            sizes = self._type_sizes[types] * known - is_training
        return (sums + pseudo_cells * overall) / (sizes + pseudo_cells)[:, None]

    def evaluate(self, of: MaskedCells) -> tuple[float, float]:
        """Return the negative log likelihood per gene in nats, and the mean Pearson r per cell of log1p counts."""
        nll, r = 0.0, []
        for start in range(0, len(of.types), _CELLS_AT_ONCE):
            rows = np.arange(start, min(start + _CELLS_AT_ONCE, len(of.types)))
            counts, means = of.counts[rows].toarray(), self._means(of, rows, self.pseudo_cells)
            nll -= _log_likelihood(counts, np.log(means), self.log_dispersion).sum()
            r.append(pearson_r(torch.from_numpy(np.log1p(means)), torch.from_numpy(np.log1p(counts))).numpy())
        return nll / np.prod(of.counts.shape), mean_of_defined(np.concatenate(r))


def neighborhood_baselines(
    train: CenterMaskSampler, evaluated: CenterMaskSampler, *, max_train_cells: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """Predict masked cells by means, as negative binomials with one dispersion per gene; see `CountBaseline`.

    Parameters
    ----------
    train, evaluated : CenterMaskSampler
        Samplers of counts (`normalize=None`). Random subsets of neighbours are those of their epochs.
    max_train_cells : int, default: 20,000
        If there are more training cells, this many are drawn.
    seed : int, default: 0
        Seed of the draw.

    Returns
    -------
    dict of str to float
        `overall_mean_nll`, `type_mean_nll`, `neighbor_mean_nll`: mean negative log likelihood of the counts of the
        evaluated cells, in nats per gene. `overall_mean_pearson_r` and so on: mean over these cells of Pearson's r,
        over genes, between log1p of the counts and of the mean; cells with undefined r are left out.

    Raises
    ------
    ValueError
        There are no cells; the genes differ.
    """
    if not (len(train) and len(evaluated)):
        raise ValueError(f"{len(train)} training cells and {len(evaluated)} evaluated cells: both are needed.")
    if train.n_genes != evaluated.n_genes:
        raise ValueError(f"Training cells have {train.n_genes} genes, but evaluated cells have {evaluated.n_genes}.")
    train_cells = _read(train, _draw(len(train), max_train_cells, seed), "training cells")
    cells = _read(evaluated, np.arange(len(evaluated)), "held-out cells")
    found: dict[str, float] = {}
    for kind in BASELINES:
        nll, r = CountBaseline(train_cells, kind).evaluate(cells)
        found |= {f"{kind}_nll": float(nll), f"{kind}_pearson_r": r}
    return found


def gene_moments(
    train: CenterMaskSampler, *, max_cells: int = 20_000, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and variance of each gene over the cells of a sampler, for `CountHead.start_at`.

    Parameters
    ----------
    train : CenterMaskSampler
        Sampler of counts (`normalize=None`).
    max_cells : int, default: 20,000
        If there are more cells, this many are drawn.
    seed : int, default: 0
        Seed of the draw.

    Returns
    -------
    mean, variance : float64 Tensor (G,)
    """
    items = _draw(len(train), max_cells, seed)
    sums, squares = np.zeros((2, train.n_genes))
    for start in range(0, len(items), _CELLS_AT_ONCE):
        counts = sparse.csr_array(train.expression_of(items[start : start + _CELLS_AT_ONCE])).astype(np.float64)
        sums += np.asarray(counts.sum(axis=0)).ravel()
        squares += np.asarray(counts.power(2).sum(axis=0)).ravel()
    mean = sums / len(items)
    return torch.from_numpy(mean), torch.from_numpy(squares / len(items) - mean**2)


def mean_of_defined(r: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    defined = r[~np.isnan(r)]
    return float(defined.mean()) if len(defined) else float("nan")


def _draw(n: int, most: int, seed: int) -> np.ndarray:
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _read(sampler: CenterMaskSampler, items: np.ndarray, desc: str) -> MaskedCells:
    counts, sums, n_neighbors, types = zip(*_blocks(sampler, items, desc), strict=True)
    return MaskedCells(
        sparse.csr_array(sparse.vstack(counts, format="csr")),
        sparse.csr_array(sparse.vstack(sums, format="csr")),
        np.concatenate(n_neighbors),
        np.concatenate(types),
    )


def _blocks(sampler: CenterMaskSampler, items: np.ndarray, desc: str) -> Iterator[tuple[Any, ...]]:
    for start in tqdm(range(0, len(items), _CELLS_AT_ONCE), desc=f"means of {desc}", unit="batch", disable=None):
        batch = sampler.__getitems__(items[start : start + _CELLS_AT_ONCE])
        expression = sparse.csr_array(batch.expression).astype(np.float64)
        n_observed = len(batch.observed_cell_type)
        shape = len(batch), n_observed
        # Row i has a 1 for each of its neighbours, which are adjacent.
        around = sparse.csr_array((np.ones(n_observed), np.arange(n_observed), batch.indptr), shape=shape)
        sums = around @ expression[:n_observed]
        yield expression[n_observed:], sums, np.diff(batch.indptr), batch.masked_cell_type


def _log_likelihood(counts: np.ndarray, log_mean: np.ndarray, log_dispersion: np.ndarray) -> np.ndarray:
    values = (torch.from_numpy(np.asarray(part, np.float64)) for part in (counts, log_mean, log_dispersion))
    return nb_log_likelihood(*values).numpy()
