"""All perturbations in all cells, read by a model and by linear baselines, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from ..evaluation.cell_baselines import log_normalise
from ..evaluation.readers import fit_pca
from ..genes.whole_files import whole_file
from .gene_edits import GeneEdits, Panel, Perturbation
from .gene_shifts import GeneStates, ShiftSums
from .perturb_reader import OfGenes, Reader
from .perturb_statistics import CellGroups, DonorGroups, ShardScores, cell_statistics

_CELLS_AT_ONCE = 512  # edited and tokenized together
_CELLS_AT_ONCE_WITH_GENES = 64  # whose states of all tokens are in memory together


class Cells(NamedTuple):
    """Rows of the perturbed cells and of the goal's, int64 arrays, and the donor of every cell, -1 for none."""

    perturbed: np.ndarray
    goal: np.ndarray
    donors: np.ndarray | None

    def donors_of(self, group: int) -> np.ndarray | None:
        """Return the donors of the perturbed cells (0) or the goal's (1)."""
        return None if self.donors is None else self.donors[self[group]]


class _Linear:
    """The baselines: principal components, and a logistic regression of the goal, of log-normalised genes."""

    def __init__(self, counts: sparse.csr_matrix, known: np.ndarray, cells: Cells):
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


class Grid:
    """All perturbations in all cells, shard by shard."""

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        edits: GeneEdits,
        counts: sparse.csr_matrix,
        cells: Cells,
        perturbations: Sequence[Perturbation],
        panel: Panel,
        shard_size: int,
        with_genes: bool,
    ):
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
                    donors_of_starts = self.cells.donors_of(0)
                    assert donors is not None and donors_of_starts is not None
                    starts, of_starts = _mean_states(states.astype(np.float64), donors_of_starts)
                    of_goals = np.unique(donors)
                    self.groups = DonorGroups(
                        np.concatenate([starts, means]),
                        np.concatenate([of_starts, of_goals]),
                        np.repeat([False, True], [len(of_starts), len(of_goals)]),
                    )
            self._base.append(_Unperturbed(states, probabilities, classes, goal))

    def _read_all(self, reader: Reader | _Linear, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
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

    def _add_gene_shifts(self, sums: ShiftSums, cells: np.ndarray, of_pair: np.ndarray) -> OfGenes:
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
