"""Write the tables and figures of the documentation that are in benchmarks/results; `--check` only compares.

python docs/make_tables.py

A table is between `<!-- table: quality_2026-11-29 few -->` and `<!-- end of table -->`. A figure in a sentence is
followed by `<!-- quality_2026-11-29 full demo 0 start accuracy -->`: the file of results, then the table in it, the
set of cells, the labels per class (0 for all), the row, and a column, or `difference` to the better baseline.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "choosing.md", ROOT / "docs" / "benchmarks.md"]
WAYS = {
    "packed, flex": "packed, flex attention",
    "BERT, padded": "`BertForMaskedLM`, padded",
    "ModernBERT, padded": "`ModernBertForMaskedLM`, padded",
}


def gpu(results: dict) -> str:
    """Return the table of training steps; of rows that were measured again, the last measurement."""
    rows = {(step["size"], step["cells"], step["way"]): step for step in results["steps"] if "mfu" in step}
    lines = ["| model | way | tokens/s | cells/s | MFU | peak GB |", "|---|---|---|---|---|---|"]
    fastest = sorted(rows.items(), key=lambda row: (*row[0][:2], -row[1]["tokens_per_second"]))
    for (size, cells, way), step in fastest:
        model = size if cells == "mix" else f"{size}, cells of {cells} tokens"
        figures = f"{step['tokens_per_second']:,} | {step['cells_per_second']:,.0f} | {step['mfu']:.1%}".replace(
            "%", " %"
        )
        lines.append(f"| {model} | {WAYS.get(way, way)} | {figures} | {step['peak_gb']:.1f} |")
    return "\n".join(lines)


def commits(results: dict) -> str:
    """Return the table of two commits."""
    lines = ["| processor seconds | before | now | now / before (range) |", "|---|---|---|---|"]
    for part, found in results["parts"].items():
        low, high = found["range"]
        ratio = f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {part} | {found['old']:.3f} | {found['new']:.3f} | {ratio} |")
    return "\n".join(lines)


def gpu_attention(results: dict) -> str:
    """Return the table of the attention of one layer; kernels that failed are left out."""
    lines = ["| attention of one layer | forward, TFLOP/s | forward and backward, TFLOP/s |", "|---|---|---|"]
    for heads, found in results["attention"].items():
        if "failed" not in found:
            name = heads.replace(" x ", " heads of ")
            lines.append(f"| {name} | {found['forward_tflops']} | {found['both_tflops']} |")
    return "\n".join(lines)


def gpu_loader(results: dict) -> str:
    """Return the table of training through the trainer, by the number of worker processes."""
    lines = ["| workers | tokens/s | waiting for data |", "|---|---|---|"]
    for workers, row in results["loader"].items():
        way = workers.replace(" workers", "")  # "8", or "8, compiled"
        lines.append(f"| {way} | {row['tokens_per_second']:,.0f} | {100 * row['data_wait_share']:.1f} % |")
    return "\n".join(lines)


def objectives(results: dict) -> str:
    """Return the scores of the objectives, and their differences to step 0."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.objectives import table

    return table(results["runs"])


SETS = {
    "demo": "demo",
    "citeseq": "CITE-seq, gated by antibodies",
    "starmap": "STARmap cortex",
    "sympathetic": "sympathetic ganglia",
    "ifnb": "interferon, of pbmc_ifnb",
    "geact": "fetal tissues",
    "geact_plates": "fetal tissues, whole plates held out",
    "interaction": "simulated: one of two programmes is on, or both or none",
}
BASELINES = ("lr", "pca50_lr")
TRIALS = ("trial_k30", "trial_k50")


def quality_all_labels(results: dict) -> str:
    """Return accuracy / macro F1 with all labels (mean ± sd), and differences to the better baseline and trial."""
    names = {
        "lr": "LR",
        "pca50_lr": "PCA50 + LR",
        "trial": "two views + LR",
        "start": "GeneBert, start",
        "finetuned": "GeneBert, fine-tuned",
    }
    lines = [
        f"| cells, classes | {' | '.join(names.values())} | to LR or PCA50 + LR | to two views + LR |",
        "|---" * (len(names) + 3) + "|",
    ]
    for name, rows in _quality(results, "full"):
        rows["trial"] = rows[_best(rows, TRIALS)]
        best = max(np.mean(rows[row]["accuracy"]) for row in names)
        shown = []
        for row in names:
            figures = f"{_mean_sd(rows[row]['accuracy'])} / {_mean_sd(rows[row]['macro_f1'])}"
            shown.append(_bold(figures, np.mean(rows[row]["accuracy"]) > best - 5e-4))
        n_test, n_train = (np.mean(rows["lr"][key]) for key in ("n_test", "n_train"))
        about = f"{SETS[name]}: {max(rows['lr']['n_cells']):,}, {max(rows['lr']['n_classes'])}"
        differences = " | ".join(
            _difference(rows, "finetuned", others, n_test / n_train) for others in (BASELINES, TRIALS)
        )
        lines.append(f"| {about} | {' | '.join(shown)} | {differences} |")
    return "\n".join(lines)


def quality_other_models(results: dict) -> str:
    """Return accuracy / macro F1 of random weights and of the reference configuration (mean ± sd), and the start."""
    names = {"random_start": "random weights", "reference": "reference configuration", "start": "GeneBert, start"}
    lines = [f"| cells | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for name, rows in _quality(results, "full"):
        n_folds, shown = len(rows["lr"]["accuracy"]), []
        for row in names:
            if row not in rows:
                shown.append("not run")
                continue
            accuracies, scores = rows[row]["accuracy"], rows[row]["macro_f1"]
            part = "" if len(accuracies) == n_folds else f" ({len(accuracies)} of {n_folds} folds)"
            shown.append(f"{_mean_sd(accuracies)} / {_mean_sd(scores)}{part}")
        lines.append(f"| {SETS[name]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def quality_short(results: dict) -> str:
    """Return accuracies with all labels, mean ± standard deviation over the splits."""
    names = {"lr": "logistic regression", "pca50_lr": "PCA50 + LR"}
    names |= {"start": "GeneBert, start", "finetuned": "GeneBert, fine-tuned"}
    lines = [f"| cells, classes | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for name, rows in _quality(results, "full"):
        best = max(np.mean(rows[row]["accuracy"]) for row in names)
        accuracies = [rows[row]["accuracy"] for row in names]
        shown = " | ".join(_bold(_mean_sd(of), np.mean(of) > best - 5e-4) for of in accuracies)
        lines.append(f"| {SETS[name]}: {max(rows['lr']['n_cells']):,}, {max(rows['lr']['n_classes'])} | {shown} |")
    return "\n".join(lines)


def quality_figure(results: dict, table: str, name: str, labels: str, row: str, key: str) -> str:
    """Return the mean of a column over the splits, or the difference to the better baseline with few labels."""
    ((_, rows),) = _quality(results, table, name, int(labels))
    if key == "difference":
        best = rows[_best(rows, BASELINES)]["accuracy"]
        return _short(np.mean(rows[row]["accuracy"]) - np.mean(best), "+")
    return _short(np.mean(rows[row][key]))


def quality_few_labels(results: dict) -> str:
    """Return accuracy with few labels (mean ± sd), the paired difference to the better baseline, and the classes."""
    lines = ["| labels per class | 5 | 20 | 50 |", "|---|---|---|---|"]
    for name in SETS:
        shown = []
        for labels in (5, 20, 50):
            for _, rows in _quality(results, "few", name, labels):
                to_baseline = _difference(rows, "start", BASELINES, bold_below=-0.01)
                n_classes = max(rows["start"]["n_classes"])
                shown.append(f"{_mean_sd(rows['start']['accuracy'])}, {to_baseline}, {n_classes} classes")
        if shown:
            lines.append(f"| {SETS[name]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def quality_embeddings(results: dict) -> str:
    """Return 15-NN, probe and ARI of embeddings without labels, the best of a set in bold."""
    shown = {"pca50": "PCA50", "scvi": "scVI", "start": "GeneBert, start"}
    lines = [f"| cells | {' | '.join(shown.values())} |", "|---" * (1 + len(shown)) + "|"]
    for name, rows in _quality(results, "zero"):
        means = {row: [np.mean(rows[row][key]) for key in ("knn", "probe", "ari")] for row in shown if row in rows}
        best = np.max(list(means.values()), axis=0)
        cells = [
            " / ".join(_bold(_short(mean), mean == top) for mean, top in zip(means[row], best, strict=True))
            if row in means
            else "not run"
            for row in shown
        ]
        lines.append(f"| {SETS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quality_embedding_differences(results: dict) -> str:
    """Return the paired differences of GeneBert's start to PCA50 and scVI, with their 95 % intervals."""
    figures = {"knn": "15-NN", "probe": "probe", "ari": "ARI"}
    others = {"pca50": "PCA50", "scvi": "scVI"}
    titles = [f"{figure}, to {other}" for other in others.values() for figure in figures.values()]
    lines = [f"| cells | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name, rows in _quality(results, "zero"):
        # Clusters are made of all cells, so that the folds have no training cells.
        ratio = float(np.mean(np.divide(rows["start"]["n_test"], rows["start"]["n_train"])))
        ratios = {"knn": ratio, "probe": ratio, "ari": 0.0}
        shown = [
            _interval(np.subtract(rows["start"][figure], rows[other][figure]), ratios[figure], bold_apart=True)
            if other in rows
            else "not run"
            for other in others
            for figure in figures
        ]
        lines.append(f"| {SETS[name]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def quality_starts(results: dict) -> str:
    """Return accuracy with few labels (mean ± sd) of a start on other cells, of random weights, and of the start."""
    names = {
        "start": "start on the same set",
        "start_elsewhere": "start on other cells",
        "pretrained_elsewhere": "pretrained on other cells",
        "random_start": "random weights",
    }
    lines = [f"| cells, labels per class | {' | '.join(names.values())} |", "|---" * (1 + len(names)) + "|"]
    for name in ("demo", "citeseq"):
        for labels in (5, 20, 50):
            for _, rows in _quality(results, "few", name, labels):
                shown = [_mean_sd(rows[row]["accuracy"]) if row in rows else "not run" for row in names]
                lines.append(f"| {SETS[name]}, {labels} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _quality(
    results: dict, table: str, only: str | None = None, labels: int = 0
) -> Iterator[tuple[str, dict[str, dict[str, list]]]]:
    """Return the rows of each set: row -> figure -> values, in the order of the splits."""
    for name in SETS if only is None else [only]:
        records = [r for r in results["results"] if (r["table"], r["set"], r["labels"]) == (table, name, labels)]
        rows: dict[str, dict[str, list]] = {}
        for record in sorted(records, key=lambda record: record["split"]):
            for key, value in record.items():
                rows.setdefault(record["row"], {}).setdefault(key, []).append(value)
        if rows:
            yield name, rows


def _best(rows: dict, names: tuple[str, ...]) -> str:
    """Return which of some rows has the highest mean accuracy."""
    return max(names, key=lambda name: np.mean(rows[name]["accuracy"]))


def _difference(
    rows: dict, row: str, others: tuple[str, ...], test_to_train: float = 0, bold_below: float = -np.inf
) -> str:
    """Return the paired difference in accuracy to the best of other rows by its mean, with its 95 % interval."""
    best = rows[_best(rows, others)]["accuracy"]
    return _interval(np.subtract(rows[row]["accuracy"], best), test_to_train, bold_below)


def _interval(
    differences: np.ndarray, test_to_train: float, bold_below: float = -np.inf, bold_apart: bool = False
) -> str:
    """Return the mean of paired differences with its 95 % interval; bold if it is low, or if it excludes 0."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.quality_statistics import interval

    mean, low, high = interval(differences, test_to_train)
    text = " ".join((_short(mean, "+"), f"[{_short(low, '+')}, {_short(high, '+')}]"))
    return _bold(text, low < bold_below or (bold_apart and low * high > 0))


def _short(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def _mean_sd(values: list[float]) -> str:
    """Return mean ± standard deviation over splits."""
    return f"{_short(float(np.mean(values)))} ± {_short(float(np.std(values, ddof=1)))}"


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def scale_sizes(results: dict) -> str:
    """Return the cost per cell of a store, by its size."""
    parts = {
        "build": "build",
        "open": "open",
        "lengths": "lengths",
        "order": "order of an epoch",
        "random": "random batches",
        "copies": "their copies alone",
        "blocks": "blocks of 16",
        "tokens": "tokens",
    }
    lines = [f"| cells | {' | '.join(parts.values())} | most memory, MB |", "|---" * (len(parts) + 2) + "|"]
    for n_cells, row in results["tables"]["sizes"].items():
        shown = " | ".join(f"{row[part]['us_per_cell']:.3g}" for part in parts)
        lines.append(f"| {int(n_cells):,} | {shown} | {max(row[part]['peak_mb'] for part in parts):.0f} |")
    return "\n".join(lines)


def scale_memory(results: dict) -> str:
    """Return the speed of reading a store that is larger than memory, with the quality of the shuffle."""
    lines = ["| reader | cells/s | entropy | distance | peak MB |", "|---|---|---|---|---|"]
    for reader, row in results["tables"]["memory"]["rows"].items():
        quality = " | ".join("" if row[key] is None else f"{row[key]:.2f}" for key in ("entropy", "distance"))
        lines.append(f"| {reader} | {row['cells_per_second']:,.0f} | {quality} | {row['peak_mb']:.0f} |")
    return "\n".join(lines)


def scale_workers(results: dict) -> str:
    """Return the speed of a DataLoader by its number of workers."""
    rows = results["tables"]["workers"]["rows"]
    numbers = list(next(iter(rows.values())))
    lines = [f"| cells/s | {' | '.join(f'{n} workers' for n in numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    for batches, row in rows.items():
        speeds = " | ".join(f"{row[n]['cells_per_second']:,.0f}" for n in numbers)
        lines.append(f"| {batches} | {speeds} |")
    return "\n".join(lines)


def scale_codecs(results: dict) -> str:
    """Return the bytes per cell and the speed of reading, by codec and cells per record batch."""
    lines = ["| cells in | bytes per cell | random, cells/s | in order, cells/s |", "|---|---|---|---|"]
    for way, row in results["tables"]["codecs"]["rows"].items():
        speeds = " | ".join(f"{row[order]['cells_per_second']:,.0f}" for order in ("random", "in order"))
        lines.append(f"| {way} | {row['bytes_per_cell']:,.0f} | {speeds} |")
    return "\n".join(lines)


def perturb_speed(results: dict) -> str:
    """Return the table of edited cells per second, and of memory."""
    rows = results["speed"]["rows"]
    base = rows["one at a time"]["cells_per_second"]
    lines = ["| way | edited cells | cells/s | against one at a time | peak MB |", "|---|---|---|---|---|"]
    for way, row in rows.items():
        n, rate = row["runs"][0]["cells"], row["cells_per_second"]
        lines.append(f"| {way} | {n:,.0f} | {rate:,.1f} | {rate / base:,.1f} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines)


def perturb_simulation(results: dict) -> str:
    """Return recall and false positives at 5 % FDR, summed over draws."""
    lines = [
        "| drivers, donors' sd | model | PCA | logistic regression | others with p < .05 |",
        "|---|---|---|---|---|",
    ]
    draws = results["simulation"]
    for kind in dict.fromkeys((row["drivers"], row["donor_sd"]) for row in draws):
        of = [row for row in draws if (row["drivers"], row["donor_sd"]) == kind]
        cells = []
        for name in ("model", "pca", "linear"):
            false = sum(row[f"{name}_false"] for row in of) / sum(row["genes"] - row["drivers"] for row in of)
            recall = f"{sum(row[f'{name}_recall'] for row in of) / len(of):.2f}, " if kind[0] else ""
            cells.append(f"{recall}{100 * false:.1f} %")
        share = 100 * sum(row["share_p_05"] for row in of) / len(of)
        lines.append(f"| {kind[0]}, {kind[1]:g} | {' | '.join(cells)} | {share:.1f} % |")
    return "\n".join(lines)


def perturb_interferon(results: dict) -> str:
    """Return what deleting interferon genes does to stimulated cells."""
    lines = [
        "| score | all together | z | single genes that move to control | of these below 5 %, 10 % FDR | median z |",
        "|---|---|---|---|---|---|",
    ]
    names = {"model": "model", "pca": "PCA", "linear": "logistic regression, probability"}
    for key, name in names.items():
        row = results["interferon"][key]
        mean, low, high, z = row["all_genes"]
        below = f"{row['below_fdr_05']}, {row['below_fdr_10']}"
        counts = f"{row['to_control']} of {row['genes']} | {below} | {row['median_z']:.1f}"
        lines.append(f"| {name} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {z:.1f} | {counts} |")
    return "\n".join(lines)


def perturb_no_effect(results: dict) -> str:
    """Return which shares of genes are called where the groups do not differ: mean over splits, and the largest."""
    names = {
        "p": "p < .05",
        "p_matched": "p_matched < .05",
        "p_cells": "p_cells < .05",
        "fdr": "FDR < 5 %",
        "shift_fdr": "FDR of the shift",
        "pca_goal_shift_fdr": "FDR of PCA",
        "linear_probability_fdr": "FDR of logistic regression",
    }
    lines = [f"| compared with | {' | '.join(names.values())} |", "|---" * (1 + len(names)) + "|"]
    for way in dict.fromkeys(row["compared"] for row in results["no_effect"]):
        of = [row for row in results["no_effect"] if row["compared"] == way]
        shares = ([100 * row[name] for row in of] for name in names)
        cells = (f"{sum(each) / len(each):.1f} %, {max(each):.1f} %" for each in shares)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


METHODS = {
    "annotate": "`annotate(reject=0.05)`",
    "annotate, folds by plate": "the same, `split_by` the plate",
    "map_to_reference, classifier": "`map_to_reference`, embedding of a classifier of the reference",
    "map_to_reference, no labels": "`map_to_reference`, embedding that saw no labels",
    "lr": "logistic regression",
    "pca50_knn": "15-NN in 50 PCs",
}


def annotate_rejection(results: dict) -> str:
    """Return what is rejected of known cells, and accepted of cells of types that were left out."""
    return _of_annotate(results["rejection"], "rejection_table")


def annotate_mapping(results: dict, across: bool = False) -> str:
    """Return the accuracy of labels mapped from other plates, or from another experiment."""
    return _of_annotate([row for row in results["mapping"] if (" onto " in row["set"]) == across], "mapping_table")


def annotate_mixing(results: dict) -> str:
    """Return how stimulated cells mix with unstimulated ones, and how many are rejected."""
    return _of_annotate(results["mixing"], "mixing_table")


def _of_annotate(records: list[dict], table: str) -> str:
    sys.path.insert(0, str(ROOT))
    from benchmarks import annotate

    return getattr(annotate, table)([{**row, "method": METHODS[row["method"]]} for row in records])


def network(results: dict) -> str:
    """Return the agreement, stability and cost of networks of genes, means over models or pairs of them."""
    rows = {
        "pairs": ("n_pairs", "{:,.0f}"),
        "agreement, Spearman": ("spearman", "{:+.2f}"),
        "agreement, strongest 1 % of the pairs (chance: .01)": ("top_share", "{:.2f}"),
        "median absolute correlation, 1,000 strongest edges": ("of_edges", "{:.2f}"),
        "median absolute correlation, all pairs": ("of_all", "{:.2f}"),
        "stability, Spearman": ("stability_spearman", "{:.2f}"),
        "stability, strongest 1 % of the pairs": ("stability_top_share", "{:.2f}"),
        "stability, the same edges among the 100 strongest": ("stability_same_edges", "{:.0f}"),
        "processor time, s": ("cpu_seconds", "{:,.0f}"),
    }
    methods = results["methods"]
    lines = [f"| mean (range) | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for name, (key, shown) in rows.items():
        cells = []
        for of in methods.values():
            low, mean, high = (shown.format(value) for value in (min(of[key]), np.mean(of[key]), max(of[key])))
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    peaks = {
        method: max(row["peak_mb"] for way, row in results["scored"].items() if way.startswith(method))
        for method in methods
    }
    return "\n".join([*lines, f"| peak memory, MB | {' | '.join(f'{peak:,.0f}' for peak in peaks.values())} |"])


def training_whole_cells(results: dict) -> str:
    """Return cells per second and memory of training and `embed` with and without `cell_embedding`."""
    trained, embedded = (results["tables"][f"whole cells {work}"] for work in ("trained", "embedded"))
    lines = ["| model | training, cells/s | peak MB | `embed`, cells/s | peak MB |", "|---" * 5 + "|"]
    for name, row in trained.items():
        both = (f"{of['cells_per_second']:,.1f} | {of['peak_mb']:,.0f}" for of in (row, embedded[name]))
        lines.append(f"| {name} | {' | '.join(both)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict], str]] = {
    "annotate_2026-11-29": annotate_rejection,
    "annotate_2026-11-29 mapping": annotate_mapping,
    "annotate_2026-11-29 across": partial(annotate_mapping, across=True),
    "annotate_2026-11-29 mixing": annotate_mixing,
    "network_2026-11-29": network,
    "scale_2026-11-30": scale_sizes,
    "scale_cold_2026-11-29": scale_memory,
    "scale_workers_2026-11-30": scale_workers,
    "scale_codecs_2026-11-29": scale_codecs,
    "quality_2026-11-29": quality_all_labels,
    "quality_interaction_2026-11-29": quality_all_labels,
    "quality_2026-11-29 short": quality_short,
    "quality_2026-11-29 few": quality_few_labels,
    "quality_2026-11-29 others": quality_other_models,
    "quality_2026-11-29 embeddings": quality_embeddings,
    "quality_2026-11-29 embedding_differences": quality_embedding_differences,
    "quality_2026-11-29 starts": quality_starts,
    "perturb_2026-11-29 speed": perturb_speed,
    "perturb_2026-11-29 simulation": perturb_simulation,
    "perturb_2026-11-29 interferon": perturb_interferon,
    "perturb_2026-11-29 no_effect": perturb_no_effect,
    "training_2026-11-29": training_whole_cells,
    "commits_2026-11-30": commits,
    "gpu_h200_2026-11-28": gpu,
    "gpu_h200_2026-11-28 loader": gpu_loader,
    "gpu_h200_2026-11-29 attention": gpu_attention,
    "objectives_h200_2026-11-28": objectives,
}


def fill(text: str) -> str:
    """Return a page with its machine-written tables and figures replaced."""

    def results_of(file: str) -> dict:
        return json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())

    def table(match: re.Match) -> str:
        name = match["name"]
        return f"<!-- table: {name} -->\n\n{TABLES[name](results_of(name.split()[0]))}\n\n<!-- end of table -->"

    def figure(match: re.Match) -> str:
        return (
            f"{quality_figure(results_of(match['file']), *match['of'].split())}<!-- {match['file']} {match['of']} -->"
        )

    text = re.sub(r"<!-- table: (?P<name>.+?) -->.*?<!-- end of table -->", table, text, flags=re.DOTALL)
    return re.sub(r"[+-]?1?\.\d+<!-- (?P<file>quality_\S+) (?P<of>.+?) -->", figure, text)


def main() -> int:
    """Write the pages, or with `--check` return 1 where one is not what would be written."""
    changed = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = fill(text)
        changed |= made != text
        if "--check" not in sys.argv[1:]:
            page.write_text(made, encoding="utf-8")
    return changed if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
