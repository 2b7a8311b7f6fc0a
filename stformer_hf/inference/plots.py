"""Pictures, in scanpy's manner: each takes data, gives back axes, and writes a file if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import confusion_matrix

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def loss_curves(histories: dict[str, list[dict]], *, title: str = "", save: str | Path | None = None) -> Axes:
    """Draw training (line) and held-out (dots) losses against the step.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run -> its `trainer.state.log_history`.
    title : str, default: ""
        Of the picture.
    save : str or Path, optional
        PNG to write.

    Returns
    -------
    Axes
    """
    ax = _axes(6, 4)
    for name, history in histories.items():
        train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        (line,) = ax.plot(*np.array(train).reshape(-1, 2).T, label=f"{name}, training")
        if held_out:
            ax.plot(*np.array(held_out).T, "o--", color=line.get_color(), label=f"{name}, held out", markersize=4)
    ax.set(xlabel="step", ylabel="cross entropy (nats)", title=title)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return _save(ax, save)


def confusion(
    true: Sequence, predicted: Sequence, labels: Sequence[str], *, title: str = "", save: str | Path | None = None
) -> Axes:
    """Draw a confusion matrix: rows are true classes, columns predicted ones; colour is the share of the row.

    Parameters
    ----------
    true, predicted : sequence (n,)
        Classes.
    labels : sequence of str
        Order of rows and columns.
    title : str, default: ""
        Of the picture.
    save : str or Path, optional
        PNG to write.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        Cells of a class that is not in `labels`.
    """
    unknown = {*true, *predicted} - set(labels)
    if unknown:
        raise ValueError(f"{len(unknown)} classes are not in labels, such as {min(map(str, unknown))}: add them.")
    counts = confusion_matrix(true, predicted, labels=list(labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.45 * len(labels)
    ax = _axes(size + 1, size)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="predicted", ylabel="true", title=title)
    ax.figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    return _save(ax, save)


def umap(
    adata: AnnData,
    color: str,
    *,
    use_rep: str = "X_stformer",
    title: str = "",
    random_state: int = 0,
    save: str | Path | None = None,
) -> Axes:
    """Draw a UMAP of an embedding, coloured by a column of obs.

    Neighbours and UMAP are scanpy's, with its defaults; `obsm["X_umap"]` is computed if `adata` has none of this
    `use_rep`.

    Parameters
    ----------
    adata : AnnData
        With `obsm[use_rep]`.
    color : str
        Column of obs.
    use_rep : str, default: "X_stformer"
        Which embedding.
    title : str, default: ""
        Of the picture.
    random_state : int, default: 0
        Of the UMAP.
    save : str or Path, optional
        PNG to write.

    Returns
    -------
    Axes
    """
    import scanpy as sc

    if adata.uns.get("neighbors", {}).get("params", {}).get("use_rep") != use_rep or "X_umap" not in adata.obsm:
        sc.pp.neighbors(adata, use_rep=use_rep, random_state=random_state)
        sc.tl.umap(adata, random_state=random_state)
    ax = _axes(8, 5)
    sc.pl.umap(adata, color=color, ax=ax, show=False, title=title or color, frameon=False)
    return _save(ax, save)


def _axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _save(ax: Axes, save: str | Path | None) -> Axes:
    """Write the picture and take it off the screen's list; unsaved ones stay for a notebook to show."""
    if save is not None:
        import matplotlib.pyplot as plt

        ax.figure.savefig(save, dpi=120)
        plt.close(ax.figure)
    return ax


__all__ = ["confusion", "loss_curves", "umap"]
