"""What the models are worth: accuracy beside simple baselines, on real data, with paired intervals.

python -m benchmarks quality --data_folder data --output benchmark_quality.json

"full": all labels, five stratified folds; on geact_plates three times a fifth of the plates, held out whole, where
cells of types absent from training are counted apart. "few": 5, 20 and 50 labels per class, 20 draws, the same for all
rows; half of the other cells are test cells, and components are fitted on all cells of the training side. "zero":
embeddings that saw no label, made of all cells of a set, by 15 neighbours and a linear probe in five folds, and the
adjusted Rand index of Leiden clusters (mean of five seeds; resolution 1, and the best of five), with scVI beside them
if it is installed. `--simulated` times `stformer-hf finetune` on made cells instead, 2,100 or as many as it says, and
scores it on others; `--start` times the spectral start of 100,000 made cells, or as many as it says, beside that of a
tenth of them.

Nothing that is fitted with labels, and with full and few labels nothing that is fitted at all, sees a test cell. The
macro F1 is over the classes of the test cells, for all rows alike. Differences are paired by split and against the
better of logistic regression (`lr`) and 50 principal components + logistic regression (`pca50_lr`), chosen by its mean
over the splits, which favours the baseline. Their 95 % intervals are those of the corrected resampled t-test with full
labels and of probes (Nadeau and Bengio 2003); of a paired t over the draws with few labels, whose labels hardly
overlap (they say what other draws from the same cells would give), and over the folds for clusters, which are made of
all cells and scored in each fold. A set whose file is absent is skipped with a line that says so. Results that the
output file holds are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from stformer_hf import annotate
from stformer_hf.evaluation.evaluate_embedding import scvi_embedding

from . import quality_baselines, quality_models
from .data import _n_cores
from .harness import clock, print_table, private_mb, take_turns
from .quality_baselines import Baselines, LogView, ResidualView, log_normalise, logistic
from .quality_data import GROUP, LABEL, LABELS_PER_CLASS, SETS, Split, few_splits, full_splits, load, simulate
from .quality_statistics import interval, scores

BASELINES = ("lr", "pca50_lr")
TRIALS = ("trial_k30", "trial_k50")
ROWS = {
    "full": (*quality_baselines.ROWS, *quality_models.ROWS),
    "few": (*quality_baselines.ROWS[1:], *quality_models.FEW_ROWS),
    "zero": ("pca50", "scvi", "views_k30", "start"),
}
KEYS = ["table", "set", "labels", "split", "row"]
NOT_WORSE_THAN = -0.01  # what an interval is to exclude with few labels
RESOLUTIONS = (0.1, 0.25, 0.5, 1.0, 2.0)
N_CLUSTERINGS = 5
N_SIMULATED_TEST = 2_000
SIMULATED_SECONDS = 60  # what `stformer-hf finetune` may take on simulated cells and 2 cores


def run(arguments: list[str]) -> None:
    """Fill the tables that are asked for, print them and write them as JSON."""
    every = sorted({row for rows in ROWS.values() for row in rows})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_folder", type=Path, help="where the data files are; only the demo's cells without it")
    parser.add_argument("--tables", nargs="+", choices=list(ROWS), default=list(ROWS), help="all by default")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="all by default")
    parser.add_argument("--rows", nargs="+", choices=every, default=every, help="all by default")
    parser.add_argument("--full", action="store_true", help="all cells of ifnb, instead of 3,000")
    parser.add_argument("--overwrite", action="store_true", help="compute again what the output file holds")
    parser.add_argument(
        "--simulated",
        nargs="?",
        type=int,
        const=2_100,
        metavar="CELLS",
        help="time `stformer-hf finetune` on so many simulated cells instead (2,100 without a number)",
    )
    parser.add_argument(
        "--start",
        nargs="?",
        type=int,
        const=100_000,
        metavar="CELLS",
        help="time the spectral start of so many simulated cells instead (100,000 without a number)",
    )
    parser.add_argument(
        "--output", type=Path, default="benchmark_quality.json", help="JSON file to write, or to resume"
    )
    args = parser.parse_args(arguments)
    results = Results(args.output, args.overwrite)
    if args.simulated:
        results.about["simulated"] = time_simulated(n_cells=args.simulated)
        results.write()
        print(simulated_table(results.about["simulated"]))
        return
    if args.start:
        results.about["start"] = time_start(args.start)
        results.write()
        print_table("Spectral start of simulated cells", results.about["start"], f"{args.start:,} cells")
        return
    for name in args.sets:
        try:
            cells = load(name, args.data_folder, args.full)
        except FileNotFoundError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        title = f"{name}_full" if args.full and SETS[name].subset else name
        for table in args.tables:
            rows = [row for row in ROWS[table] if row in args.rows]
            if not (SETS[name].transfer and args.data_folder):
                rows = [row for row in rows if not row.endswith("elsewhere")]
            if "scvi" in rows and find_spec("scvi") is None:
                print("skipped scvi: it is not installed, pip install 'stformer_hf[scvi]'", file=sys.stderr)
                rows.remove("scvi")
            if table == "full" or SETS[name].few:
                FILL[table](title, cells, rows, results, args.data_folder)
    results.write()
    print(results.tables())
    print(f"\nwritten to {args.output}")


# ---------------------------------------------------------------------- the tables


def fill_full(name: str, cells: AnnData, rows: Sequence[str], results: Results, folder: Path | None = None) -> None:
    """Fill the table of full labels for one data set."""
    for split in full_splits(cells):
        _fill_split("full", name, cells, split, 0, rows, results, quality_models.classify)


def fill_few(name: str, cells: AnnData, rows: Sequence[str], results: Results, folder: Path | None = None) -> None:
    """Fill the table of few labels for one data set."""
    classify = functools.partial(quality_models.classify_few, folder=folder)
    for n_labels in LABELS_PER_CLASS:
        for split in few_splits(cells, n_labels):
            _fill_split("few", name, cells, split, n_labels, rows, results, classify)


def fill_zero(name: str, cells: AnnData, rows: Sequence[str], results: Results, folder: Path | None = None) -> None:
    """Fill the table of embeddings for one data set."""
    splits = full_splits(cells)
    for row in rows:
        key = ("zero", name, 0)
        missing = [split for split in splits if results.lacks((*key, split.seed, row))]
        if not missing:
            continue
        began = time.perf_counter()
        labels, states = cells.obs[LABEL].astype(str).to_numpy(), _embed(row, cells)
        seconds = round(time.perf_counter() - began, 2)
        clusterings = cluster(states)
        for split in missing:
            found = {**score_embedding(states, labels, split, clusterings), "seconds": seconds}
            results.add((*key, split.seed, row), {**found, **_sizes(cells, split)})
        results.write()


FILL: dict[str, Callable] = {"full": fill_full, "few": fill_few, "zero": fill_zero}


def _fill_split(
    table: str,
    name: str,
    cells: AnnData,
    split: Split,
    n_labels: int,
    rows: Sequence[str],
    results: Results,
    classify: Callable,
) -> None:
    """Predict the test cells of a split by the rows that are missing."""
    missing = [row for row in rows if results.lacks((table, name, n_labels, split.seed, row))]
    if not missing:
        return
    labelled, unlabelled, test = parts(cells, split)
    true = cells.obs[LABEL].astype(str).to_numpy()[split.test]
    baselines = Baselines(labelled.X, labelled.obs[LABEL].astype(str).to_numpy(), unlabelled.X)
    for row in missing:
        began = time.perf_counter()
        if row in quality_baselines.ROWS:
            predicted = baselines.predict(row, test.X)
        elif table == "few":
            predicted = classify(row, labelled, unlabelled, test, seed=split.seed)
        else:
            predicted = classify(row, labelled, test, seed=split.seed)
        found = {**scores(true, predicted), "seconds": round(time.perf_counter() - began, 2), **_sizes(cells, split)}
        results.add((table, name, n_labels, split.seed, row), found)
        print(f"{table} {name} {n_labels or 'all'} {split.seed} {row}: {found['accuracy']:.3f}", file=sys.stderr)
    results.write()


def parts(cells: AnnData, split: Split) -> tuple[AnnData, AnnData, AnnData]:
    """Return labelled cells, cells without labels and test cells; the last two have nothing in obs."""
    labelled = cells[split.labelled].copy()
    for column in (LABEL, GROUP):
        if column in labelled.obs:
            labelled.obs[column] = labelled.obs[column].cat.remove_unused_categories()
    bare = AnnData(cells.X, obs=cells.obs[[]], var=cells.var)
    return labelled, bare[split.unlabelled].copy(), bare[split.test].copy()


def _sizes(cells: AnnData, split: Split) -> dict[str, int]:
    return {
        "n_train": len(split.labelled),
        "n_test": len(split.test),
        "n_cells": len(split.labelled) + len(split.unlabelled) + len(split.test) + split.n_absent,
        "n_classes": int(cells.obs[LABEL].iloc[split.labelled].nunique()),
        "n_absent": split.n_absent,
    }


def _embed(row: str, cells: AnnData) -> np.ndarray:
    if row == "pca50":
        return LogView(cells.X).project(cells.X)
    if row == "views_k30":
        views = [view(cells.X).project(cells.X)[:, :30] for view in (LogView, ResidualView)]
        return np.hstack([view / np.maximum(np.linalg.norm(view, axis=1)[:, None], 1e-9) for view in views])
    if row == "scvi":
        return scvi_embedding(sparse.csr_array(cells.X), None, seed=0)
    return quality_models.embed(AnnData(cells.X, obs=cells.obs[[]], var=cells.var), seed=0)


def cluster(states: np.ndarray) -> dict[float, list[np.ndarray]]:
    """Cluster all cells by Leiden on their 15 neighbours: resolution -> arrays of str (n_cells,) by five seeds."""
    import scanpy as sc

    graph = AnnData(sparse.csr_matrix((len(states), 1)), obsm={"states": states})
    sc.pp.neighbors(graph, n_neighbors=15, use_rep="states", random_state=0)
    found: dict[float, list[np.ndarray]] = {resolution: [] for resolution in RESOLUTIONS}
    for resolution, clusterings in found.items():
        for seed in range(N_CLUSTERINGS):
            sc.tl.leiden(graph, resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
            clusterings.append(graph.obs["leiden"].astype(str).to_numpy())
    return found


def score_embedding(
    states: np.ndarray, labels: np.ndarray, split: Split, clusterings: dict[float, list[np.ndarray]]
) -> dict[str, float]:
    """Score an embedding in one fold.

    Parameters
    ----------
    states : ndarray (n_cells, n_dimensions)
    labels : array of str (n_cells,)
    split : Split
    clusterings : dict of float to list of arrays (n_cells,)
        Resolution -> clusterings of all cells.

    Returns
    -------
    dict of str to float
        On the test cells, the accuracies `knn` of 15 neighbours and `probe` of logistic regression (on states scaled
        to a mean square of 1) that learn from the other cells; the adjusted Rand index of the clusters, mean of the
        clusterings, at resolution 1 (`ari`) and at the resolution that is best on all cells (`ari_best`).
    """
    from sklearn.metrics import adjusted_rand_score
    from sklearn.neighbors import KNeighborsClassifier

    def index(resolution: float, rows: np.ndarray | slice) -> float:
        return float(np.mean([adjusted_rand_score(labels[rows], found[rows]) for found in clusterings[resolution]]))

    scaled = states / np.sqrt(np.mean(states**2))
    found = {}
    for name, classifier in (("knn", KNeighborsClassifier(15)), ("probe", quality_baselines.logistic())):
        classifier.fit(scaled[split.labelled], labels[split.labelled])
        found[name] = float(np.mean(classifier.predict(scaled[split.test]) == labels[split.test]))
    best = max(clusterings, key=lambda resolution: index(resolution, slice(None)))
    return {**found, "ari": index(1.0, split.test), "ari_best": index(best, split.test)}


# ---------------------------------------------------------------------- results


class Results:
    """Results by table, set, labels per class (0: all), split and row, in a JSON file.

    Parameters
    ----------
    path : Path
        What it holds is kept.
    overwrite : bool, default: False
        Compute again what is asked for, though the file holds it.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self.records: dict[tuple, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}
        if self.path.exists():
            held = json.loads(self.path.read_text())
            self.about = {name: value for name, value in held.items() if name != "results"}
            self.records = {tuple(record[key] for key in KEYS): record for record in held["results"]}

    def lacks(self, key: tuple) -> bool:
        """Whether a result is to be computed."""
        return self.overwrite or key not in self.records

    def add(self, key: tuple, found: dict[str, Any]) -> None:
        """Take a result."""
        self.records[key] = {**dict(zip(KEYS, key, strict=True)), **found}

    def write(self) -> None:
        """Write all results; a run that is killed meanwhile leaves the file as it was."""
        self.about |= {
            "date": time.strftime("%Y-%m-%d"),
            "cores": _n_cores(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "versions": {name: version(name) for name in ("stformer_hf", "scikit-learn", "scanpy", "torch")},
        }
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({**self.about, "results": list(self.records.values())}, indent=0))
        part.replace(self.path)

    def tables(self) -> str:
        """Return all tables as markdown."""
        frame = pd.DataFrame(list(self.records.values()), columns=None)
        if frame.empty:
            return "no results"
        made = [
            ("Full labels", "full", _full_rows),
            ("Few labels", "few", _few_rows),
            ("Embeddings that saw no label", "zero", _zero_rows),
        ]
        return "\n\n".join(
            f"### {title}\n\n" + _markdown([line for _, part in _groups(frame, table) for line in lines(part)])
            for title, table, lines in made
            if (frame["table"] == table).any()
        )


def _groups(frame: pd.DataFrame, table: str) -> Iterable[tuple[tuple, pd.DataFrame]]:
    return frame[frame["table"] == table].groupby(["set", "labels"], sort=False)


def _markdown(lines: list[dict[str, str]]) -> str:
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _by_row(part: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Split x row of one figure."""
    return part.pivot(index="split", columns="row", values=figure)


def _mean_sd(values: pd.Series) -> str:
    values = values.dropna()
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def _difference(
    table: pd.DataFrame, row: str, others: Sequence[str], find: Callable[[np.ndarray], tuple]
) -> tuple[str, float]:
    """Write the paired difference of a row to the best of others, and return the lower end of its interval.

    All splits that both have count; there is none for the others themselves, nor from fewer than two splits.
    """
    others = [other for other in others if other in table]
    if row in (*BASELINES, "majority") or row in others or not others:
        return "", np.nan
    best = max(others, key=lambda other: table[other].mean())
    differences = (table[row] - table[best]).dropna().to_numpy()
    if len(differences) < 2:
        return "", np.nan
    mean, low, high = find(differences)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {best}", low


def _order(part: pd.DataFrame, table: str) -> list[str]:
    return [row for row in ROWS[table] if row in set(part["row"])]


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _full_rows(part: pd.DataFrame) -> list[dict[str, str]]:
    accuracy, f1 = _by_row(part, "accuracy"), _by_row(part, "macro_f1")
    ratio = float((part["n_test"] / part["n_train"]).mean())

    def corrected(differences: np.ndarray) -> tuple:
        return interval(differences, ratio)

    about = f"{part['n_cells'].max():,} cells, {part['n_classes'].max()} types"
    if part["n_absent"].any():
        absent = part.groupby("split")["n_absent"].first()
        about += f" (absent from training: {', '.join(map(str, absent))} cells)"
    return [
        {
            "set": part["set"].iloc[0],
            "cells": about,
            "row": row,
            "accuracy": _bold(_mean_sd(accuracy[row]), row == accuracy.mean().idxmax()),
            "macro F1": _bold(_mean_sd(f1[row]), row == f1.mean().idxmax()),
            "accuracy, to the better baseline": _difference(accuracy, row, BASELINES, corrected)[0],
            "macro F1, to the better baseline": _difference(f1, row, BASELINES, corrected)[0],
            "accuracy, to the better trial": _difference(accuracy, row, TRIALS, corrected)[0],
        }
        for row in _order(part, "full")
    ]


def _few_rows(part: pd.DataFrame) -> list[dict[str, str]]:
    accuracy, f1 = _by_row(part, "accuracy"), _by_row(part, "macro_f1")
    lines = []
    for row in _order(part, "few"):
        difference, low = _difference(accuracy, row, BASELINES, interval)
        lines.append(
            {
                "set": part["set"].iloc[0],
                "labels per class": str(part["labels"].iloc[0]),
                "cells": f"{part['n_cells'].max():,} cells, {part['n_classes'].max()} types",
                "row": row,
                "accuracy": _bold(_mean_sd(accuracy[row]), row == accuracy.mean().idxmax()),
                "macro F1": _bold(_mean_sd(f1[row]), row == f1.mean().idxmax()),
                "accuracy, to the better baseline": difference,
                f"above {NOT_WORSE_THAN}": "" if np.isnan(low) else "yes" if low > NOT_WORSE_THAN else "no",
                "accuracy, to the better trial": _difference(accuracy, row, TRIALS, interval)[0],
            }
        )
    return lines


def _zero_rows(part: pd.DataFrame) -> list[dict[str, str]]:
    ratio = float((part["n_test"] / part["n_train"]).mean())
    figures = {
        "knn": ("15-NN", lambda differences: interval(differences, ratio)),
        "probe": ("probe", lambda differences: interval(differences, ratio)),
        "ari": ("ARI, resolution 1", interval),
        "ari_best": ("ARI, best resolution", interval),
    }
    lines = []
    for row in _order(part, "zero"):
        line = {"set": part["set"].iloc[0], "row": row}
        for figure, (title, find) in figures.items():
            table = _by_row(part, figure)
            line[title] = _bold(_mean_sd(table[row]), row == table.mean().idxmax())
            line[f"{title}, to pca50"] = _difference(table, row, ["pca50"], find)[0].removesuffix(" pca50")
        lines.append(line)
    return lines


# ---------------------------------------------------------------------- simulated cells


def time_simulated(flags: Sequence[str] = (), *, n_cells: int = 2_100, **settings: Any) -> dict[str, Any]:
    """Time `stformer-hf finetune` on simulated cells as a process, and logistic regression beside it.

    Both are scored on 2,000 cells more.

    Parameters
    ----------
    flags : sequence of str
        Further ones of the command, which has its defaults otherwise.
    n_cells : int, default: 2100
        Training cells; `finetune` holds a tenth of them out, logistic regression reads the others.
    **settings
        Other arguments of `simulate`.
    """
    cells = simulate(n_cells + N_SIMULATED_TEST, **settings)
    cells, test = cells[:n_cells].copy(), cells[n_cells:].copy()
    with tempfile.TemporaryDirectory() as folder:
        data, model = f"{folder}/cells.h5ad", f"{folder}/model"
        cells.write_h5ad(data)
        command = [sys.executable, "-m", "stformer_hf.cli", "finetune", "--data", data, "--label_key", LABEL]
        command += ["--output", model, *flags]
        with open(f"{folder}/log", "w+") as log:
            began, peak = time.perf_counter(), 0.0
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, private_mb(str(process.pid)))
                time.sleep(0.25)  # reading the memory holds the process up
            seconds = time.perf_counter() - began
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"stformer-hf finetune failed:\n{log.read()[-3000:]}")
        annotate(test, model)
    true = test.obs[LABEL].astype(str).to_numpy()
    trained = np.random.default_rng(0).permutation(n_cells)[: round(0.9 * n_cells)]
    began = time.perf_counter()
    values, labels = log_normalise(cells.X[trained]), cells.obs[LABEL].astype(str).to_numpy()[trained]
    predicted = logistic().fit(values, labels).predict(log_normalise(test.X))
    return {
        "cells": n_cells,
        "expressed genes": round(cells.X.nnz / n_cells),
        "types": int(cells.obs[LABEL].nunique()),
        "finetune seconds": round(seconds, 1),
        "finetune peak MB": round(peak),
        "finetune accuracy": float((test.obs["stformer_label"].astype(str) == true).mean()),
        "logistic regression seconds": round(time.perf_counter() - began, 1),
        "logistic regression accuracy": float((predicted == true).mean()),
        "cores": _n_cores(),
    }


def time_start(n_cells: int, n_genes: int = 12_000) -> dict[str, dict]:
    """Time the spectral start of so many simulated cells, and of a tenth of them: rows of `take_turns`."""
    contenders = {
        f"{n:,} cells": ("benchmarks.quality:cells_started", {"n_cells": n, "n_genes": n_genes})
        for n in (n_cells // 10, n_cells)
    }
    with tempfile.TemporaryDirectory() as folder:
        return take_turns(contenders, Path(folder), 1)


def cells_started(folder: Path, n_cells: int, n_genes: int) -> int:
    """Fit the spectral views of cells that are made block by block, in each of three passes; this is timed as well.

    A block has the cells of `simulate`, of whose counts another tenth is removed at random in each block.
    """
    from stformer_hf.training.starts.spectral_start import N_COMPONENTS
    from stformer_hf.training.starts.spectral_views import fit_spectral_views

    cells = sparse.csr_array(simulate(min(n_cells, 4_000), n_genes=n_genes).X)

    def blocks() -> Iterable[sparse.csr_array]:
        for start in range(0, n_cells, cells.shape[0]):
            block = cells[: n_cells - start].copy()
            block.data = np.random.default_rng(start).binomial(block.data.astype(np.int64), 0.9).astype(np.float64)
            block.eliminate_zeros()
            yield block

    with clock():
        return fit_spectral_views(blocks, N_COMPONENTS).n_cells


def simulated_table(found: dict[str, Any]) -> str:
    """Return the times as markdown."""
    wanted = f" (at most {SIMULATED_SECONDS} s wanted on 2)" if found["cells"] <= 2_100 else ""
    title = (
        f"### Simulated cells: {found['cells']:,} cells, {found['expressed genes']} expressed genes, {found['types']} "
        f"types, {found['cores']} cores{wanted}\n\n"
    )
    rows = {"finetune": "stformer-hf finetune", "logistic regression": "logistic regression"}
    return title + _markdown(
        [
            {
                "": name,
                "seconds": str(found[f"{row} seconds"]),
                "peak MB": str(found.get(f"{row} peak MB", "")),
                "accuracy": f"{found[f'{row} accuracy']:.4f}",
            }
            for row, name in rows.items()
        ]
    )
