"""How well `annotate` rejects cells of a type that it has not seen, and how well a query is mapped onto a reference.

python -m benchmarks annotate --data_folder data --output benchmark_annotate.json

"rejection": a type is left out of training, together with a quarter of the other cells (on geact_plates: with the
cells of a fifth of the plates). What is rejected at a nominal 5 % is counted among those known cells and among the
cells of the left-out type. `annotate` is compared with the highest probability of a logistic regression and with the
mean distance to 15 neighbours in 50 principal components; each with conformal thresholds per predicted class, from
five folds and from each training cell without itself. Types are those of at least 20 cells; where they are more than
--types, they are evenly spaced in the order of their size.

"calibration": the expected calibration error on the same known cells, without and with the temperature.

"mapping": geact, a fifth of the plates held out by three seeds; the other plates are the reference. `map_to_reference`
by a classifier of the reference and by a model that saw no labels is compared with 15 neighbours in 50 principal
components and with a logistic regression, all fitted to the reference.

"across": the same methods, the demo's cells onto the CITE-seq cells and back. Types of the demo get the names of
`CITESEQ_TYPES`; cells of other types are left out, and all methods read the genes that both data sets measure.

"mixing": stimulated cells of pbmc_ifnb, which have no types, are mapped onto unstimulated ones, half of these by three
seeds; so is the other half. The labels are Leiden clusters of the reference. Counted are the rejected cells, and how
well the query and as many cells of the reference mix (iLISI, 0 to 1), by a model that saw the reference without labels
and in 50 principal components of the reference. --picture draws the first seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neighbors import NearestNeighbors

from .quality_baselines import Baselines, LogView, log_normalise
from .quality_data import GROUP, LABEL, Split, full_splits, load
from .quality_models import spectral_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES = ("rejection", "mapping", "across", "mixing")
SETS = ("demo", "citeseq", "geact", "geact_plates", "ifnb")
REJECT = 0.05
LEAST_CELLS = 20
N_NEIGHBORS = 15
N_FOLDS = 5
N_SEEDS = 3
# Types of the demo, by the names of the CITE-seq types; written before any result was seen.
CITESEQ_TYPES = {
    "CD19+ B": "B",
    "CD14+ Monocyte": "CD14 monocyte",
    "CD4+/CD25 T Reg": "CD4 T",
    "CD4+/CD45RO+ Memory": "CD4 T",
    "CD4+/CD45RA+/CD25- Naive T": "CD4 T",
    "CD8+ Cytotoxic T": "CD8 T",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T",
    "CD56+ NK": "NK",
}


def run(arguments: list[str]) -> None:
    """Fill the tables, print them and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks annotate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_folder", type=Path, help="where the data files are; only the demo's cells without it")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="all by default")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--types", type=int, default=6, help="types of a set that are left out, one after the other")
    parser.add_argument(
        "--output", type=Path, default="benchmark_annotate.json", help="JSON file to write; other rows in it are kept"
    )
    parser.add_argument("--picture", type=Path, help="PNG to write: stimulated cells among the reference (mixing)")
    args = parser.parse_args(arguments)
    about = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "reject": REJECT}
    about |= {name: version(name) for name in ("stformer_hf", "torch", "scikit-learn")}
    found: dict[str, Any] = {"rejection": [], "mapping": [], "mixing": []}
    if args.output.exists():
        found |= json.loads(args.output.read_text(encoding="utf-8"))
    found["about"] = about
    for name in args.sets:
        try:
            cells = load(name, args.data_folder, full=name == "ifnb")
        except FileNotFoundError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        if name == "ifnb":  # it has no types
            for seed in range(N_SEEDS) if "mixing" in args.tables else ():
                _add(args.output, found, "mixing", mix(cells, seed, args.picture if seed == 0 else None))
            continue
        if "rejection" in args.tables:
            for left_out in choose_types(cells, args.types):
                _add(args.output, found, "rejection", leave_out(name, cells, left_out))
        if "mapping" in args.tables and GROUP in cells.obs:
            for split in full_splits(cells):
                _add(args.output, found, "mapping", map_split(name, cells, split))
    if "across" in args.tables and {"demo", "citeseq"} <= set(args.sets):
        _add(args.output, found, "mapping", map_across(args.data_folder))
    print(tables(found))


def _add(path: Path, found: dict[str, Any], table: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table, in place of those of an earlier run, and write the file."""

    def key(row: dict[str, Any]) -> tuple:
        return row["set"], row.get("left_out", row.get("seed")), row["method"]

    made = {key(row) for row in rows}
    found[table] = [row for row in found[table] if key(row) not in made] + rows
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def choose_types(cells: AnnData, n_types: int) -> list[str]:
    """Choose the types to leave out: all of at least 20 cells, or so many evenly spaced in the order of their size."""
    sizes = cells.obs[LABEL].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    sizes = sizes[sizes >= LEAST_CELLS]
    places = np.unique(np.linspace(0, len(sizes) - 1, min(n_types, len(sizes))).round().astype(int))
    return [str(sizes.index[i]) for i in places]


# ---------------------------------------------------------------------- rejection


def leave_out(name: str, cells: AnnData, left_out: str) -> list[dict[str, Any]]:
    """Train without a type, and reject cells: a record for each method."""
    labels = cells.obs[LABEL].astype(str).to_numpy()
    known = np.flatnonzero(labels != left_out)
    if GROUP in cells.obs:
        split = full_splits(cells)[0]
        train, test = split.labelled[labels[split.labelled] != left_out], split.test[labels[split.test] != left_out]
    else:
        train, test = train_test_split(known, test_size=0.25, random_state=0, stratify=labels[known])
    test = np.concatenate([test, np.flatnonzero(labels == left_out)])
    training = cells[train].copy()
    for column in set(training.obs) & {LABEL, GROUP}:
        training.obs[column] = training.obs[column].cat.remove_unused_categories()
    others = AnnData(cells.X[test], obs=cells.obs.iloc[test][[]], var=cells.var)
    records = []
    for method, reject in METHODS.items():
        if method == "annotate, folds by plate" and GROUP not in cells.obs:
            continue
        began = time.perf_counter()
        predicted, typical, rejected, figures = reject(training, others, labels[test])
        is_known = labels[test] != left_out
        per_class = {
            kind: {"n": int(of.sum()), "rejected": float(rejected[of].mean())}
            for kind in np.unique(labels[test][is_known])
            for of in [labels[test] == kind]
        }
        records.append(
            {
                "set": name,
                "left_out": left_out,
                "method": method,
                "n_train": len(train),
                "n_known": int(is_known.sum()),
                "n_unknown": int((~is_known).sum()),
                "auroc": float(roc_auc_score(is_known, typical)),
                "known_rejected": float(rejected[is_known].mean()),
                "unknown_accepted": float(1 - rejected[~is_known].mean()),
                "accuracy": float((predicted == labels[test])[is_known].mean()),
                "accuracy_of_accepted": float((predicted == labels[test])[is_known & ~rejected].mean()),
                "per_class": per_class,
                **figures,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        short = {key: value for key, value in records[-1].items() if key != "per_class"}
        print(json.dumps(short), file=sys.stderr, flush=True)
    return records


def _by_model(training: AnnData, others: AnnData, labels: np.ndarray, group_key: str | None = None) -> tuple:
    import stformer_hf
    from stformer_hf.evaluation.metrics import expected_calibration_error

    model = stformer_hf.finetune(training, LABEL, num_train_epochs=0, split_by=group_key)
    stformer_hf.annotate(others, model, reject=REJECT)
    probabilities = others.obsm["stformer_probabilities"]
    classes = np.array(others.uns["stformer_annotation"]["classes"])
    is_known = np.isin(labels, classes)
    codes = np.searchsorted(classes, labels[is_known])
    logs = np.log(np.maximum(probabilities[is_known], 1e-30)) * model.config.temperature
    plain = np.exp(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
    figures = {
        "temperature": model.config.temperature,
        "ece_without_temperature": expected_calibration_error(plain, codes),
        "ece": expected_calibration_error(probabilities[is_known], codes),
        "auroc_of_score": float(roc_auc_score(is_known, others.obs["stformer_score"])),
    }
    rejected = (others.obs["stformer_label"] == "unknown").to_numpy()
    return classes[probabilities.argmax(axis=1)], others.obs["stformer_typicality"].to_numpy(), rejected, figures


def _by_lr(training: AnnData, others: AnnData, labels: np.ndarray) -> tuple:
    train, test = log_normalise(training.X), log_normalise(others.X)
    train, test = _in_their_span(train, test)
    known = training.obs[LABEL].astype(str).to_numpy()
    classes = np.unique(known)
    out_of_fold = np.zeros((len(known), len(classes)))
    for rows, held_out in StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(train, known):
        fold = LogisticRegression(max_iter=500, tol=1e-3).fit(train[rows], known[rows])
        out_of_fold[np.ix_(held_out, np.searchsorted(classes, fold.classes_))] = fold.predict_proba(train[held_out])
    probabilities = LogisticRegression(max_iter=500, tol=1e-3).fit(train, known).predict_proba(test)
    return (*_reject(classes, out_of_fold.argmax(1), out_of_fold.max(1), probabilities), {})


def _in_their_span(train: sparse.csr_matrix, test: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Rotate cells into the span of the training cells, which no reader with an L2 penalty can tell apart."""
    products = (train @ train.T).toarray().astype(np.float64)
    spread, vectors = np.linalg.eigh(products)
    kept = spread > spread[-1] * 1e-6
    axes = vectors[:, kept] / np.sqrt(spread[kept])
    return products @ axes, (test @ train.T).toarray() @ axes


def _by_neighbors(training: AnnData, others: AnnData, labels: np.ndarray) -> tuple:
    view, known = LogView(training.X), training.obs[LABEL].astype(str).to_numpy()
    classes, codes = np.unique(known, return_inverse=True)
    index = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(view.project(training.X))
    shares = []
    for distances, rows in (index.kneighbors(), index.kneighbors(view.project(others.X))):
        votes = (codes[rows][:, :, None] == np.arange(len(classes))).mean(axis=1)
        shares.append((votes, -distances.mean(axis=1)))
    (own, own_scores), (votes, scores) = shares
    return (*_reject(classes, own.argmax(1), own_scores, votes, scores), {})


def _reject(
    classes: np.ndarray,
    groups: np.ndarray,
    known_scores: np.ndarray,
    predictions: np.ndarray,
    scores: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reject cells by conformal thresholds per predicted class, as `annotate` does."""
    from stformer_hf.inference.rejection import rejection_thresholds

    scores = predictions.max(axis=1) if scores is None else scores
    thresholds = rejection_thresholds(known_scores, groups, len(classes), REJECT)
    codes = predictions.argmax(axis=1)
    return classes[codes], scores, scores < thresholds[codes]


METHODS: dict[str, Callable[[AnnData, AnnData, np.ndarray], tuple]] = {
    "annotate": _by_model,
    "annotate, folds by plate": partial(_by_model, group_key=GROUP),
    "lr": _by_lr,
    "pca50_knn": _by_neighbors,
}


# ---------------------------------------------------------------------- mapping


def map_across(data_folder: Path | None) -> list[dict[str, Any]]:
    """Map the demo's cells onto the CITE-seq cells, and back: a record for each method and direction."""
    try:
        demo, citeseq = blood_cells(data_folder)
    except FileNotFoundError as error:
        print(f"skipped across: {error}", file=sys.stderr)
        return []
    return [
        *map_onto("demo onto citeseq", 0, reference=citeseq, query=demo),
        *map_onto("citeseq onto demo", 0, reference=demo, query=citeseq),
    ]


def blood_cells(data_folder: Path | None) -> tuple[AnnData, AnnData]:
    """Return the demo's cells with the types of the CITE-seq cells, and the latter, over the genes of both.

    Raises
    ------
    FileNotFoundError
        The CITE-seq file is absent.
    """
    demo = load("demo", data_folder)
    demo.obs[LABEL] = demo.obs[LABEL].astype(str).map(CITESEQ_TYPES).astype("category")
    demo = demo[demo.obs[LABEL].notna()]
    citeseq = load("citeseq", data_folder, names="gene_symbol")
    citeseq = citeseq[:, ~citeseq.var_names.duplicated(keep=False)]
    genes = demo.var_names[demo.var_names.isin(citeseq.var_names)]
    return demo[:, genes].copy(), citeseq[:, genes].copy()


def map_split(name: str, cells: AnnData, split: Split) -> list[dict[str, Any]]:
    """Map held-out plates onto the others: a record for each method."""
    return map_onto(name, split.seed, cells[split.labelled].copy(), cells[split.test])


def map_onto(name: str, seed: int, reference: AnnData, query: AnnData) -> list[dict[str, Any]]:
    """Map labelled cells onto a reference: a record for each method."""
    import stformer_hf

    reference.obs[LABEL] = reference.obs[LABEL].cat.remove_unused_categories()
    labels = query.obs[LABEL].astype(str).to_numpy()
    counts = sparse.csr_matrix(query.X)
    names, bare = query.obs_names, AnnData(reference.X, obs=reference.obs[[]], var=reference.var)

    def mapped(make: Callable[[], PreTrainedModel]) -> tuple[np.ndarray, np.ndarray]:
        query = AnnData(counts, obs=pd.DataFrame(index=names), var=reference.var)
        model = make()
        found = []
        for reject in (None, REJECT):
            stformer_hf.map_to_reference(
                query, reference, model, label_key=LABEL, n_neighbors=N_NEIGHBORS, reject=reject
            )
            found.append(query.obs["mapped_label"].astype(str).to_numpy())
        return found[0], found[1] == "unknown"

    baselines = Baselines(reference.X, reference.obs[LABEL].astype(str).to_numpy(), bare.X[:0])
    methods = {
        "map_to_reference, classifier": lambda: mapped(
            lambda: stformer_hf.finetune(reference, LABEL, num_train_epochs=0)
        ),
        "map_to_reference, no labels": lambda: mapped(lambda: spectral_start(bare, seed)),
        "pca50_knn": lambda: _by_neighbors(reference, AnnData(counts, var=reference.var), labels)[::2],
        "lr": lambda: (baselines.predict("lr", counts), None),
    }
    records = []
    for method, predict in methods.items():
        began = time.perf_counter()
        predicted, rejected = predict()
        records.append(
            {
                "set": name,
                "seed": seed,
                "method": method,
                "n_reference": reference.n_obs,
                "n_query": len(labels),
                "n_genes": reference.n_vars,
                "accuracy": float((predicted == labels).mean()),
                "balanced_accuracy": float(recall_score(labels, predicted, labels=np.unique(labels), average="macro")),
                "known_rejected": None if rejected is None else float(rejected.mean()),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


# ---------------------------------------------------------------------- mixing


def mix(cells: AnnData, seed: int, picture: Path | None = None) -> list[dict[str, Any]]:
    """Map stimulated cells, and as many others, onto half of the unstimulated cells: a record for each method."""
    import scanpy as sc

    import stformer_hf
    from stformer_hf.evaluation.integration import batch_ilisi

    rng = np.random.default_rng(seed)
    ctrl, stim = (rng.permutation(np.flatnonzero(cells.obs[LABEL] == name)) for name in ("ctrl", "stim"))
    n = min(len(ctrl) // 2, len(stim))
    reference = cells[np.sort(ctrl[:n])].copy()
    view, model = LogView(reference.X), spectral_start(AnnData(reference.X, var=reference.var), seed)
    reference.obsm["X_pca"] = view.project(reference.X)
    sc.pp.neighbors(reference, use_rep="X_pca", random_state=seed)
    sc.tl.leiden(reference, key_added=LABEL, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    records = []
    for name, rows in (("stim onto ctrl", stim[:n]), ("ctrl onto ctrl", ctrl[n : 2 * n])):
        query = AnnData(cells.X[np.sort(rows)], obs=cells.obs.iloc[np.sort(rows)][[]], var=cells.var)
        began = time.perf_counter()
        stformer_hf.map_to_reference(query, reference, model, label_key=LABEL, reject=REJECT)
        rejected = (query.obs["mapped_label"] == "unknown").to_numpy()
        seconds = time.perf_counter() - began
        is_query = np.repeat([0, 1], n)
        by_pca = _by_neighbors(reference, query, np.zeros(0))[2]
        for method, of, among in (
            ("map_to_reference, no labels", rejected, (reference.obsm["X_stformer"], query.obsm["X_stformer"])),
            ("pca50_knn", by_pca, (reference.obsm["X_pca"], view.project(query.X))),
        ):
            ilisi = batch_ilisi(np.concatenate(among), is_query)
            records.append({"set": name, "seed": seed, "method": method, "n": n, "ilisi": ilisi})
            records[-1] |= {"rejected": float(of.mean()), "seconds": round(seconds, 1)}
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        if picture is not None and name == "stim onto ctrl":
            title = "Stimulated cells (query) among unstimulated cells; clusters of the reference"
            stformer_hf.pl.mapping(query, reference, "mapped_label", reference_color=LABEL, title=title, save=picture)
    return records


# ---------------------------------------------------------------------- tables


def tables(found: dict[str, Any]) -> str:
    """Write the records as tables."""
    parts = [rejection_table(found["rejection"]), mapping_table(found["mapping"]), mixing_table(found["mixing"])]
    return "\n\n".join(parts)


def rejection_table(records: list[dict[str, Any]]) -> str:
    """Return means over the left-out types; "most in a class" is of the known classes with 20 test cells or more."""
    lines = [
        "| set | method | types | AUROC | known rejected | most in a class | unknown accepted | accuracy | "
        "ECE without -> with temperature |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method, of in _by_method(records):
        mean = {
            key: np.mean([one[key] for one in of])
            for key in ("auroc", "known_rejected", "unknown_accepted", "accuracy")
        }
        classes: dict[str, list] = {}
        for one in of:
            for kind, part in one["per_class"].items():
                classes.setdefault(kind, []).append(part)
        large = [
            np.mean([part["rejected"] for part in parts])
            for parts in classes.values()
            if np.mean([part["n"] for part in parts]) >= LEAST_CELLS
        ]
        ece = ""
        if "ece" in of[0]:
            ece = " -> ".join(f"{np.mean([one[key] for one in of]):.3f}" for key in ("ece_without_temperature", "ece"))
        most = f"{max(large):.3f}" if large else ""
        lines.append(
            f"| {name} | {method} | {len(of)} | {mean['auroc']:.3f} | {mean['known_rejected']:.3f} | {most} | "
            f"{mean['unknown_accepted']:.3f} | {mean['accuracy']:.3f} | {ece} |"
        )
    return "\n".join(lines)


def mapping_table(records: list[dict[str, Any]]) -> str:
    """Return means over the seeds."""
    lines = ["| set | method | accuracy | by seed | balanced | known rejected |", "|---|---|---|---|---|---|"]
    for name, method, of in _by_method(records):
        each = ", ".join(f"{one['accuracy']:.3f}" for one in of)
        rejected = [one["known_rejected"] for one in of if one["known_rejected"] is not None]
        lines.append(
            f"| {name} | {method} | {np.mean([one['accuracy'] for one in of]):.3f} | {each} | "
            f"{np.mean([one['balanced_accuracy'] for one in of]):.3f} | "
            f"{f'{np.mean(rejected):.3f}' if rejected else ''} |"
        )
    return "\n".join(lines)


def mixing_table(records: list[dict[str, Any]]) -> str:
    """Return means over the seeds, and the range of the mixing."""
    lines = ["| query | method | iLISI (range) | rejected |", "|---|---|---|---|"]
    for name, method, of in _by_method(records):
        each = [one["ilisi"] for one in of]
        lines.append(
            f"| {name} | {method} | {np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f}) | "
            f"{np.mean([one['rejected'] for one in of]):.3f} |"
        )
    return "\n".join(lines)


def _by_method(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for key in dict.fromkeys((one["set"], one["method"]) for one in records):
        yield *key, [one for one in records if (one["set"], one["method"]) == key]
