"""What the loss of a CellNeighborhood model is to be compared with: means of the cell type, and of the neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from tqdm.auto import tqdm

from ..data.center_mask_sampler import CenterMaskSampler
from ..models.cell_neighborhood.count_likelihoods import nb_log_likelihood, pearson_r
from ..models.cell_neighborhood.modeling_cell_neighborhood import CellNeighborhoodForMaskedCell

_CELLS_AT_ONCE = 256
_VALUES_TO_FIT = 1_000_000  # cells x genes
_FEWEST_TO_FIT = 200  # cells
_LOG_DISPERSIONS = np.log([0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000])
_DISPERSION_BOUNDS = (0.05, 1000.0)
_FEW_EXCESS_ZEROS = -3.0  # log odds
_PSEUDO_CELLS = [1.0, 3.0, 10.0, 30.0]


class MaskedCells(NamedTuple):
    """Masked cells, and the sums of those around them; n cells, G genes.

    Attributes
    ----------
    counts, sums : csr_array (n, G)
    n_neighbors, types : int64 array (n,)
    """

    counts: sparse.csr_array
    sums: sparse.csr_array
    n_neighbors: np.ndarray
    types: np.ndarray


class CountBaseline:
    """Negative binomials whose mean is that of the type, or of the neighbours, with a dispersion a gene.

    Parameters
    ----------
    train : MaskedCells
        From which means are taken and settings are chosen.
    of_neighbors : bool
        False: the mean of the masked cell's type in the training cells, with one cell more that is the mean of all
        (of a type that is not among them it is that one). True: the mean of the cells around it, with so many
        pseudo-cells more that are the mean of all training cells as makes training cells likeliest.
    """

    def __init__(self, train: MaskedCells, of_neighbors: bool):
        self._of_neighbors = of_neighbors
        n_cells = len(train.types)
        # Half a count more, so that no count is impossible.
        self._overall = (np.asarray(train.counts.sum(axis=0)).ravel() + 0.5) / (n_cells + 1)
        n_types = int(train.types.max()) + 1
        of_type = sparse.csr_array((np.ones(n_cells), (train.types, np.arange(n_cells))), shape=(n_types, n_cells))
        self._type_sums = (of_type @ train.counts).toarray()
        self._type_sizes = np.bincount(train.types, minlength=n_types)
        n_to_fit = min(n_cells, max(_FEWEST_TO_FIT, _VALUES_TO_FIT // train.counts.shape[1]))
        cells = np.unique(np.linspace(0, n_cells - 1, n_to_fit, dtype=np.int64))
        fits = []
        for pseudo_cells in _PSEUDO_CELLS if of_neighbors else [1.0]:
            nll = np.stack([self._nll(train, cells, pseudo_cells, value) for value in _LOG_DISPERSIONS])
            fits.append((nll.min(axis=0).sum(), pseudo_cells, _LOG_DISPERSIONS[nll.argmin(axis=0)]))
        _, self.pseudo_cells, self.log_dispersion = min(fits, key=lambda fit: fit[0])

    def _nll(self, of: MaskedCells, cells: np.ndarray, pseudo_cells: float, log_dispersion: float) -> np.ndarray:
        """Give the negative log likelihood of cells: float64 array (G,)."""
        total = np.zeros(of.counts.shape[1])
        for start in range(0, len(cells), _CELLS_AT_ONCE):
            rows = cells[start : start + _CELLS_AT_ONCE]
            log_mean = np.log(self.means(of, rows, pseudo_cells))
            counts = of.counts[rows].toarray()
            total -= _log_likelihood(counts, log_mean, np.full(counts.shape[1], log_dispersion)).sum(axis=0)
        return total

    def means(self, of: MaskedCells, rows: np.ndarray, pseudo_cells: float | None = None) -> np.ndarray:
        """Give the expected counts of masked cells: float64 array (len(rows), G)."""
        pseudo_cells = self.pseudo_cells if pseudo_cells is None else pseudo_cells
        if self._of_neighbors:
            sums, sizes = of.sums[rows].toarray(), of.n_neighbors[rows]
        else:
            known = of.types[rows] < len(self._type_sizes)
            types = np.where(known, of.types[rows], 0)
            sums, sizes = self._type_sums[types] * known[:, None], self._type_sizes[types] * known
        return (sums + pseudo_cells * self._overall) / (sizes + pseudo_cells)[:, None]

    def evaluate(self, of: MaskedCells) -> tuple[float, float]:
        """Give the negative log likelihood a gene, in nats, and the mean Pearson r a cell of log1p of the counts."""
        nll, r = 0.0, []
        for start in range(0, len(of.types), _CELLS_AT_ONCE):
            rows = np.arange(start, min(start + _CELLS_AT_ONCE, len(of.types)))
            counts, means = of.counts[rows].toarray(), self.means(of, rows)
            nll -= _log_likelihood(counts, np.log(means), self.log_dispersion).sum()
            r.append(pearson_r(torch.from_numpy(np.log1p(means)), torch.from_numpy(np.log1p(counts))).numpy())
        return nll / np.prod(of.counts.shape), mean_of_defined(np.concatenate(r))


def neighborhood_baselines(
    train: CenterMaskSampler, evaluated: CenterMaskSampler, *, max_train_cells: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """Predict masked cells by means, as negative binomials with a dispersion a gene fitted to the training cells.

    Parameters
    ----------
    train, evaluated : CenterMaskSampler
        Of counts (`normalize=None`).
    max_train_cells : int, default: 20,000
        Of more, so many are drawn.
    seed : int, default: 0
        Of the draw.

    Returns
    -------
    dict of str to float
        `type_mean_nll`, `neighbor_mean_nll`: mean negative log likelihood of the counts of the evaluated cells, in
        nats a gene. `type_mean_pearson_r`, `neighbor_mean_pearson_r`: mean over these cells of Pearson's r of log1p
        of the counts and of the mean, over genes; cells for which r is not defined are left out.

    Raises
    ------
    ValueError
        No cells; other genes.
    """
    if not (len(train) and len(evaluated)):
        raise ValueError(f"{len(train)} training cells and {len(evaluated)} to evaluate on: both are needed.")
    if train.n_genes != evaluated.n_genes:
        raise ValueError(f"Training cells have {train.n_genes} genes, and those to evaluate on {evaluated.n_genes}.")
    train_cells = _read(train, _draw(len(train), max_train_cells, seed), "training cells")
    cells = _read(evaluated, np.arange(len(evaluated)), "held-out cells")
    found = {}
    for name, of_neighbors in (("type_mean", False), ("neighbor_mean", True)):
        nll, r = CountBaseline(train_cells, of_neighbors).evaluate(cells)
        found |= {f"{name}_nll": float(nll), f"{name}_pearson_r": r}
    return found


@torch.no_grad()
def start_at_means(
    model: CellNeighborhoodForMaskedCell, train: CenterMaskSampler, *, max_train_cells: int = 20_000, seed: int = 0
) -> None:
    """Let an untrained model predict the mean and dispersion of each gene in the training cells, and few excess zeros.

    Weights stay; the head's biases are set, which else take thousands of steps to come there.

    Parameters
    ----------
    model : CellNeighborhoodForMaskedCell
    train : CenterMaskSampler
        Of counts (`normalize=None`).
    max_train_cells : int, default: 20,000
        Of more, so many are drawn.
    seed : int, default: 0
        Of the draw.
    """
    counts = _read(train, _draw(len(train), max_train_cells, seed), "training cells").counts
    n_cells = counts.shape[0]
    mean = (np.asarray(counts.sum(axis=0)).ravel() + 0.5) / (n_cells + 1)
    variance = np.asarray(counts.power(2).sum(axis=0)).ravel() / n_cells - mean**2
    # By moments: variance = mean + mean ** 2 / dispersion.
    dispersion = (mean**2 / np.maximum(variance - mean, 1e-12)).clip(*_DISPERSION_BOUNDS)
    head = model.count_head
    for layer, values in ((head.log_mean, np.log(mean)), (head.log_dispersion, np.log(dispersion))):
        layer.bias.copy_(torch.from_numpy(values))
    if head.gate_logits is not None:
        head.gate_logits.bias.fill_(_FEW_EXCESS_ZEROS)


def _draw(n: int, most: int, seed: int) -> np.ndarray:
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def mean_of_defined(r: np.ndarray) -> float:
    """Give the mean of those that are no NaN; NaN where all are."""
    defined = r[~np.isnan(r)]
    return float(defined.mean()) if len(defined) else float("nan")


def _read(sampler: CenterMaskSampler, items: np.ndarray, desc: str) -> MaskedCells:
    parts = list(_blocks(sampler, items, desc))
    counts, sums = (sparse.vstack(column, format="csr") for column in list(zip(*parts, strict=True))[:2])
    n_neighbors, types = (np.concatenate(column) for column in list(zip(*parts, strict=True))[2:])
    return MaskedCells(sparse.csr_array(counts), sparse.csr_array(sums), n_neighbors, types)


def _blocks(sampler: CenterMaskSampler, items: np.ndarray, desc: str) -> Iterator[tuple[Any, ...]]:
    for start in tqdm(range(0, len(items), _CELLS_AT_ONCE), desc=f"means of {desc}", unit="batch", disable=None):
        batch = sampler.__getitems__(items[start : start + _CELLS_AT_ONCE])
        expression = sparse.csr_array(batch.expression).astype(np.float64)
        n_observed = len(batch.observed_cell_type)
        # Row i has a 1 for each of its neighbours, which lie side by side.
        around = sparse.csr_array(
            (np.ones(n_observed), np.arange(n_observed), batch.indptr), shape=(len(batch), n_observed)
        )
        yield (
            expression[n_observed:],
            around @ expression[:n_observed],
            np.diff(batch.indptr),
            batch.masked_cell_type,
        )


def _log_likelihood(counts: np.ndarray, log_mean: np.ndarray, log_dispersion: np.ndarray) -> np.ndarray:
    values = (torch.from_numpy(np.asarray(part, np.float64)) for part in (counts, log_mean, log_dispersion))
    return nb_log_likelihood(*values).numpy()


__all__ = ["CountBaseline", "MaskedCells", "mean_of_defined", "neighborhood_baselines"]
