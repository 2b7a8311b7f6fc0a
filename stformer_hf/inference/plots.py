"""Plots in the style of scanpy: each function takes data, returns axes, and can write a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from .cell_plots import mapping, sections, umap, umaps
from .figures import MISSING, new_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from networkx import DiGraph

    from .gene_network import GeneNetwork

_INCHES_PER_EDGE = 1.1  # so that arrows are seen between the names of genes


def loss_curves(
    histories: dict[str, list[dict]],
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "",
    save: str | Path | None = None,
) -> Axes:
    """Plot training (line) and held-out (dots) losses against the step, with baselines as horizontal lines.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run -> its `trainer.state.log_history`.
    baselines : dict of str to float, optional
        Name of a baseline -> its loss on the held-out cells.
    title : str, default: ""
        Title of the plot.
    save : str or Path, optional
        PNG to write.
    """
    ax = new_axes(6, 4)
    for name, history in histories.items():
        train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        (line,) = ax.plot(*np.array(train).reshape(-1, 2).T, label=f"{name}, training")
        if held_out:
            ax.plot(*np.array(held_out).T, "o--", color=line.get_color(), label=f"{name}, held out", markersize=4)
    for number, (name, loss) in enumerate((baselines or {}).items()):
        ax.axhline(
            loss, color=f"C{len(histories) + number}", linestyle=":", linewidth=1.5, label=f"{name}: {loss:.3f}"
        )
    ax.set(xlabel="step", ylabel="cross entropy (nats)", title=title)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return save_figure(ax, save)


def confusion(
    true: Sequence | np.ndarray,
    predicted: Sequence | np.ndarray,
    labels: Sequence[str] | None = None,
    *,
    title: str = "",
    save: str | Path | None = None,
) -> Axes:
    """Plot a confusion matrix: rows are true classes, columns predicted ones; colour is the share of the row.

    The title ends with the accuracy.

    Parameters
    ----------
    true, predicted : sequence (n,)
        Classes. Cells that lack one of them are left out.
    labels : sequence of str, optional
        Order of rows and columns, for example from `order_classes`; by default all classes, sorted.
    title, save
        As for `loss_curves`.

    Raises
    ------
    ValueError
        A class of some cells is not in `labels`; `true` and `predicted` differ in length.
    """
    true, predicted = (np.asarray(of, dtype=object) for of in (true, predicted))
    if true.shape != predicted.shape:
        raise ValueError(f"There are {len(true)} true classes and {len(predicted)} predicted ones.")
    there = ~(pd.isna(true) | pd.isna(predicted))
    true, predicted = true[there], predicted[there]
    if labels is None:
        labels = sorted({*true, *predicted})
    unknown = {*true, *predicted} - set(labels)
    if unknown:
        raise ValueError(f"Not all classes are in labels, such as {min(map(str, unknown))}: add them.")
    counts = confusion_matrix(true, predicted, labels=list(labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.45 * len(labels)
    ax = new_axes(size + 1, size)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    accuracy = f"accuracy {np.trace(counts) / max(counts.sum(), 1):.3f} ({np.trace(counts)} of {counts.sum()})"
    ax.set(xlabel="predicted", ylabel="true", title=f"{title}: {accuracy}" if title else accuracy)
    ax.figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    return save_figure(ax, save)


def label_curve(
    points: pd.DataFrame, *, title: str = "", emphasised: str | None = None, save: str | Path | None = None
) -> Axes:
    """Plot accuracy against the number of labelled cells per class: the mean over draws, and each draw as a dot.

    Parameters
    ----------
    points : DataFrame
        One row per draw and classifier: `classifier`, `n_labels` and `accuracy`.
    emphasised : str, optional
        Classifier whose line is thick.
    title, save
        As for `loss_curves`.
    """
    ax = new_axes(6, 4)
    names = points["classifier"].unique()
    for number, name in enumerate(names):
        of = points[points["classifier"] == name]
        means = of.groupby("n_labels")["accuracy"].mean()
        width = 2.5 if name == emphasised else 1.2
        ax.plot(means.index, means.to_numpy(), "o-", color=f"C{number}", linewidth=width, markersize=5, label=name)
        shift = 1.03 ** (number - (len(names) - 1) / 2)  # side by side
        ax.plot(of["n_labels"] * shift, of["accuracy"], ".", color=f"C{number}", alpha=0.4, markersize=5)
    numbers = sorted(points["n_labels"].unique())
    ax.set_xscale("log")
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.minorticks_off()
    ax.set(xlabel="labelled cells per class", ylabel="accuracy on held-out cells", title=title)
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return save_figure(ax, save)


def volcano(
    table: pd.DataFrame,
    effect: str | None = None,
    *,
    fdr: float = 0.05,
    n_names: int = 10,
    title: str = "",
    save: str | Path | None = None,
) -> Axes:
    """Plot the effects of perturbations against their p-values; those below a false discovery rate are red.

    Parameters
    ----------
    table : DataFrame
        Result of `perturb`.
    effect : str, optional
        Score to plot, such as `pca_goal_shift`; by default the tested one.
    fdr : float, default: 0.05
        False discovery rate.
    n_names : int, default: 10
        Number of perturbations to name, those with the lowest p-values below the rate.
    title, save
        As for `loss_curves`.

    Raises
    ------
    ValueError
        The table has no such score, or no p-values of it.
    """
    tested = table.columns[1]
    effect = tested if effect is None else effect
    p_column, fdr_column = ("p", "fdr") if effect == tested else (f"{effect}_p_matched", f"{effect}_fdr")
    if not {effect, p_column, fdr_column} <= set(table.columns):
        scores = [name.removesuffix("_low") for name in table.columns if name.endswith("_low")]
        raise ValueError(f"The table has no score {effect!r}; it has {', '.join(scores) or 'none'}.")
    found = table[table[p_column].notna()].sort_values(p_column)
    if found.empty:
        raise ValueError(f"No perturbation has a p-value of {effect}: perturb with n_null=25, or all genes.")
    heights = -np.log10(np.maximum(found[p_column].to_numpy(np.float64), 1e-300))
    significant = (found[fdr_column] < fdr).to_numpy()
    ax = new_axes(6, 4.5)
    for of, colour in ((~significant, "gray"), (significant, "C3")):
        ax.plot(found[effect].to_numpy()[of], heights[of], ".", color=colour, markersize=6, alpha=0.7)
    for i in np.flatnonzero(significant)[:n_names]:
        at = (found[effect].iloc[i], heights[i])
        ax.annotate(str(found.index[i]), at, xytext=(3, 3), textcoords="offset points", fontsize=8)
    ax.axvline(0, color=MISSING, linewidth=1, zorder=0)
    found_title = f"{significant.sum()} of {len(found)} below a false discovery rate of {fdr:g}"
    ax.set(xlabel=f"mean {effect.replace('_', ' ')}", ylabel="-log10 p", title=title or found_title)
    ax.spines[["top", "right"]].set_visible(False)
    return save_figure(ax, save)


def network(
    genes: GeneNetwork, group: str | None = None, *, n_edges: int = 50, title: str = "", save: str | Path | None = None
) -> Axes:
    """Plot the edges with the largest scores as arrows from the gene that is read to the gene that reads it.

    The width of an arrow is its score, the colour the co-expression of the genes (gray if it is not defined): what the
    model adds to co-expression are the wide arrows that are pale.

    Parameters
    ----------
    genes : GeneNetwork
        Result of `gene_network`.
    group : str, optional
        Group of cells; needed if there are several.
    n_edges : int, default: 50
        Number of edges.
    title, save
        As for `loss_curves`.

    Raises
    ------
    ValueError
        The group is unknown, or not given although there are several; no pair of it was scored.
    """
    import networkx
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    graph = genes.graph(group, n_edges)
    if not graph.number_of_edges():
        raise ValueError("No pair of genes was scored in this group: lower min_cells of gene_network.")
    score, coexpression = (
        np.array(list(networkx.get_edge_attributes(graph, name).values())) for name in ("score", "coexpression")
    )
    scale = ScalarMappable(Normalize(-1, 1), "coolwarm")
    colours = [scale.to_rgba(r) if np.isfinite(r) else MISSING for r in coexpression]
    places = _places_of(graph)
    names = {node: symbol or node for node, symbol in graph.nodes(data="symbol")}
    width, height = np.clip(np.ptp([*places.values()], axis=0) * _INCHES_PER_EDGE, 4, 14)
    ax = new_axes(width + 2, height + 1)
    networkx.draw_networkx_edges(graph, places, ax=ax, edge_color=colours, width=(3 * score / score.max()).tolist())
    networkx.draw_networkx_labels(graph, places, names, ax=ax, font_size=8)
    ax.figure.colorbar(scale, ax=ax, label="co-expression (Pearson's r)", shrink=0.6)
    group = group if group is not None else next(iter(genes.scores))
    ax.figure.suptitle(title or f"{group}: {len(score)} edges by {genes.method}")
    ax.margins(0.1)
    ax.axis("off")
    return save_figure(ax, save)


def _places_of(graph: DiGraph) -> dict[Any, np.ndarray]:
    """Return the place of each node, float64 (2,): the median edge of each connected part has the length 1.

    Parts are laid out on their own (Kamada and Kawai 1989), and put in rows, the largest first.
    """
    import networkx

    parts = []
    for nodes in sorted(networkx.connected_components(graph.to_undirected()), key=len, reverse=True):
        part = graph.subgraph(node for node in graph if node in nodes).to_undirected()  # in the order of the edges
        around = networkx.circular_layout(part)
        found = networkx.kamada_kawai_layout(part, pos=around, weight=None)
        lengths = [np.linalg.norm(found[one] - found[other]) for one, other in part.edges if one != other]
        scale = np.median(lengths) if lengths else 1.0
        parts.append({node: place / scale for node, place in found.items()})
    sizes = [np.ptp([*part.values()], axis=0) + 1 for part in parts]  # with a margin
    row_width = max(np.sqrt(sum(size.prod() for size in sizes)) * 1.2, max(size[0] for size in sizes))
    places: dict[Any, np.ndarray] = {}
    corner, row_height = np.zeros(2), 0.0
    for part, size in zip(parts, sizes, strict=True):
        if corner[0] + size[0] > row_width and corner[0]:
            corner, row_height = np.array([0.0, corner[1] - row_height]), 0.0
        lowest, highest = np.min([*part.values()], axis=0), np.max([*part.values()], axis=0)
        shift = corner - np.array([lowest[0], highest[1]])
        places |= {node: place + shift for node, place in part.items()}
        corner, row_height = corner + np.array([size[0], 0]), max(row_height, size[1])
    return places


__all__ = ["confusion", "label_curve", "loss_curves", "mapping", "network", "sections", "umap", "umaps", "volcano"]
