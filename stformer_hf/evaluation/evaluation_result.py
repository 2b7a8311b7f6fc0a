"""The result of an evaluation of embeddings: metrics, intervals, paired differences; as text, files and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .intervals import Interval, of_all_cells, of_folds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CEILING = "ceiling (half depth)"
N_LABELS = (5, 20, 50)
_SECTIONS = {
    "Labels of held-out cells": {
        "knn_accuracy": "15-NN",
        **{f"probe_{n}": f"probe, {n} labels" for n in N_LABELS},
        "probe_all": "probe, all",
        "probe_all_macro_f1": "probe, all\nmacro F1",
    },
    "Clusters of all cells": {
        "leiden_ari": "ARI",
        "leiden_nmi": "NMI",
        "leiden_ari_best": "best ARI",
        "leiden_nmi_best": "best NMI",
        "silhouette": "silhouette",
    },
    "Mixing of batches": {
        "batch_silhouette": "silhouette",
        "batch_ilisi": "iLISI",
        "batch_pcr": "PCR",
        "connectivity": "connectivity",
        "batch_kbet": "kBET",
    },
}
METRICS = [metric for section in _SECTIONS.values() for metric in section]
_COMPARED = ("knn_accuracy", *(f"probe_{n}" for n in N_LABELS), "probe_all")


@dataclass(frozen=True)
class EmbeddingEvaluation:
    """Metrics of multiple embeddings on the same cells and folds; made by `evaluate_embedding`.

    Attributes
    ----------
    values : DataFrame
        `row`, `metric`, `repeat`, `fold`, `value`. Metrics of labels have one value per fold. Metrics over all cells
        have one value over all (`fold` -1) and, except for kBET, one without the cells of each fold.
    settings : dict
        Settings, and numbers of cells and classes.
    notes : list of str
        What was left out, and why.
    """

    values: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per embedding or baseline, one column per metric; `classes_n` counts the classes of few labels."""
        wide = self.summary.pivot(index="row", columns="metric", values="value")
        wide = wide.loc[self._rows, [metric for metric in METRICS if metric in wide]]
        wide.columns.name = wide.index.name = None
        for n, classes in self.settings["classes_of_few_labels"].items():
            wide.insert(wide.columns.get_loc(f"probe_{n}") + 1, f"classes_{n}", len(classes))
        return wide

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One line per row and metric: `value`, `sd` over folds, `se`, and the 95 % interval `low` to `high`.

        Metrics of labels are means over the folds, with the interval of the corrected resampled t-test
        (`intervals.of_folds`). Metrics over all cells have that of the jackknife (`intervals.of_all_cells`), except
        for kBET, which has none (NaN), since it takes too long.
        """
        lines = []
        for (row, metric), (whole, folds) in self._scores.items():
            found = self._interval(whole, folds)
            sd = np.std(folds, ddof=1) if len(folds) else math.nan
            lines.append((row, metric, found.estimate, sd, found.se, found.low, found.high))
        return pd.DataFrame(lines, columns=["row", "metric", "value", "sd", "se", "low", "high"])

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Paired differences `row` - `other` of each metric on the same folds, with 95 % intervals and p values.

        They use the corrected resampled t-test (Nadeau & Bengio 2003) or the jackknife, see `summary`. The p values
        are not corrected for the number of comparisons.
        """
        lines = []
        rows = [row for row in self._rows if row != CEILING]
        for row, other in combinations(rows, 2):
            for metric in METRICS:
                if (row, metric) in self._scores and (other, metric) in self._scores:
                    (whole, folds), (whole_2, folds_2) = self._scores[row, metric], self._scores[other, metric]
                    difference = None if whole is None or whole_2 is None else whole - whole_2
                    found = self._interval(difference, folds - folds_2)
                    lines.append((row, other, metric, found.estimate, found.low, found.high, found.p))
        return pd.DataFrame(lines, columns=["row", "other", "metric", "difference", "low", "high", "p"])

    @cached_property
    def _rows(self) -> list[str]:
        return list(dict.fromkeys(self.values["row"]))

    @cached_property
    def _scores(self) -> dict[tuple[str, str], tuple[float | None, np.ndarray]]:
        """(row, metric) -> value over all cells (None for a metric of folds), and those of the folds in order."""
        ordered = self.values.sort_values(["repeat", "fold"], kind="stable")
        by_name = dict(list(ordered.groupby(["row", "metric"])))
        scores = {}
        for name in product(self._rows, METRICS):
            if name in by_name:
                is_fold, values = (by_name[name]["fold"] >= 0).to_numpy(), by_name[name]["value"].to_numpy()
                scores[name] = (None if is_fold.all() else float(values[~is_fold][0])), values[is_fold]
        return scores

    def _interval(self, whole: float | None, folds: np.ndarray) -> Interval:
        if whole is None:
            return of_folds(folds, self.settings["test_to_train"])
        return of_all_cells(whole, folds, self.settings["n_splits"])

    # ------------------------------------------------------------------ text

    def __str__(self) -> str:
        parts = [self._headline()]
        for title, (headings, *lines) in self._tables("{}*"):
            of_headings = zip_longest(*(name.split("\n") for name in headings), fillvalue="")
            parts.append(f"{title}\n{_align([*map(list, of_headings), *lines])}")
        parts.append("\n".join(["* best in its column.", *self._explanations(), *self.notes]))
        return "\n\n".join(parts)

    def to_markdown(self) -> str:
        """Return a section of a model card: tables with the best values in bold, and notes on the methods."""
        parts = ["## Evaluation of embeddings", self._headline()]
        for title, (headings, *lines) in self._tables("**{}**"):
            head = [[name.replace("\n", ", ") for name in headings], ["---"] * len(headings)]
            table = [*head, *([_escape(name), *cells] for name, *cells in lines)]
            parts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table))
        parts.append("\n".join(f"- {_escape(note)}" for note in [*self._explanations(), *self.notes]))
        return "\n\n".join(parts) + "\n"

    def _headline(self) -> str:
        facts = self.settings
        by = f"by {facts['split_by']}" if facts["split_by"] else "of cells, stratified"
        repeats = "" if facts["n_repeats"] == 1 else f", {facts['n_repeats']} times"
        return (
            f"{facts['n_cells']:,} cells, {facts['n_classes']} classes of {facts['label_key']} (the most frequent has "
            f"{facts['majority']:.3f} of the cells); {facts['n_splits']} folds {by}{repeats}."
        )

    def _explanations(self) -> list[str]:
        explanations = [
            "± is half of a 95 % interval: for metrics of labels by the corrected resampled t-test (Nadeau & Bengio "
            "2003), for metrics over all cells by a jackknife over folds.",
            "Baselines are fitted to training cells; embeddings are used as given: one that was fitted to all cells "
            "has seen the held-out ones.",
            "The ceiling shows how well one half of each cell's counts predicts the other half, or how well their "
            "clusters agree; a half has half the depth, so whole cells may exceed it.",
        ]
        if self.settings["batch_key"]:
            scib = self.settings["scib_metrics"]
            kbet = f"kBET is from scib-metrics {scib}" if scib else "kBET needs scib-metrics, which is not installed"
            explanations.append(
                f"Mixing of batches ({self.settings['batch_key']}): the metrics of scib-metrics, computed without it; "
                f"{kbet}."
            )
        return explanations

    def _tables(self, best: str) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield the title and the lines of each table, the headings first; `best` formats the best of a column."""
        for title, columns in self._sections():
            lines = [[row, *(self._cell(row, metric, best) for metric in columns)] for row in self._rows]
            yield title, [["", *columns.values()], *lines]
        if differences := self._differences():
            yield "Difference from the baselines, paired by fold", differences

    def _sections(self) -> list[tuple[str, dict[str, str]]]:
        """Return the titles of the tables with the columns that have values: metric -> heading."""
        found = []
        for title, columns in _SECTIONS.items():
            there = {metric: name for metric, name in columns.items() if metric in self.table}
            for n, classes in self.settings["classes_of_few_labels"].items():
                if f"probe_{n}" in there:
                    there[f"probe_{n}"] += f"\n{len(classes)} classes"
            if there:
                found.append((title, there))
        return found

    @cached_property
    def _lines(self) -> pd.DataFrame:
        return self.summary.set_index(["row", "metric"])

    @cached_property
    def _best(self) -> dict[str, float]:
        return self.table.drop(index=CEILING, errors="ignore").round(3).max().to_dict()

    def _cell(self, row: str, metric: str, best: str) -> str:
        if (row, metric) not in self._scores:
            return "-"
        line = self._lines.loc[(row, metric)]
        if math.isnan(line["value"]):
            return "NaN"
        text = f"{line['value']:.3f}"
        marked = best.format(text) if row != CEILING and round(line["value"], 3) == self._best[metric] else text
        return _with_half(marked, line["value"], line["high"])

    def _differences(self) -> list[list[str]]:
        """Return a table of keys against baselines: a heading, and a line for each pair."""
        found = self.comparisons
        baselines = self.settings["baselines"]
        found = found[~found["row"].isin(baselines) & found["other"].isin(baselines)]
        metrics = [metric for metric in _COMPARED if metric in set(found["metric"])]
        names = _SECTIONS["Labels of held-out cells"]
        cells: dict[str, dict[str, str]] = {}
        for line in found.to_dict("records"):
            text = _with_half(f"{line['difference']:+.3f}", line["difference"], line["high"])
            cells.setdefault(f"{line['row']} - {line['other']}", {})[line["metric"]] = text
        lines = [[pair, *(of.get(metric, "-") for metric in metrics)] for pair, of in cells.items()]
        return [["", *(names[metric] for metric in metrics)], *lines] if lines else []

    # ------------------------------------------------------------------ files

    def to_json(self, path: str | Path) -> None:
        """Write settings, notes, summary, comparisons and the values of the folds; NaN becomes null."""
        tables = {name: _records(getattr(self, name)) for name in ("summary", "comparisons", "values")}
        text = json.dumps({"settings": self.settings, "notes": self.notes, **tables}, indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_csv(self, path: str | Path) -> None:
        """Write `summary`, one line per row and metric."""
        self.summary.to_csv(path, index=False)

    def plot(self, *, save: str | Path | None = None) -> Figure:
        """Plot each metric in its own panel: values with their 95 % intervals, the ceiling as a dashed line.

        `save` is the path of a PNG to write.
        """
        import matplotlib.pyplot as plt

        columns = [(metric, name) for _, section in self._sections() for metric, name in section.items()]
        rows = [row for row in self._rows if row != CEILING]
        n_columns = min(4, len(columns))
        n_lines = -(-len(columns) // n_columns)
        size = (2 + 2.4 * n_columns, n_lines * (0.9 + 0.3 * len(rows)))
        figure, axes = plt.subplots(n_lines, n_columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
        for ax, (metric, name) in zip(axes.flat, columns, strict=False):
            for place, row in enumerate(rows):
                if (row, metric) in self._scores:
                    line = self._lines.loc[(row, metric)]
                    ax.plot(line["value"], place, "o", color=f"C{place}", markersize=5)
                    ax.plot([line["low"], line["high"]], [place, place], color=f"C{place}")
            if (CEILING, metric) in self._scores:
                ax.axvline(self._lines.loc[(CEILING, metric), "value"], color="gray", linestyle="--", linewidth=1)
            ax.set_title(name, fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes.flat[len(columns) :]:
            ax.set_visible(False)
        axes[0, 0].set_yticks(range(len(rows)), rows)
        axes[0, 0].invert_yaxis()
        if save is not None:
            figure.savefig(save, dpi=120)
            plt.close(figure)
        return figure


def _align(lines: list[list[str]]) -> str:
    """Align a table in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _with_half(text: str, value: float, high: float) -> str:
    """Append half of the interval to a value, if it has one."""
    return text if math.isnan(high) else f"{text} ±{high - value:.3f}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: plain(value) for name, value in line.items()} for line in table.to_dict("records")]
