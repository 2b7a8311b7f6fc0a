"""Plots in the style of scanpy: each function takes data, returns axes, and can write a file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import confusion_matrix

from ..genes.wrong_names import must_have

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from networkx import DiGraph

    from .gene_states import GeneNetwork

_MISSING = "lightgray"
_OWN_UMAP = "stformer_umap"  # in uns: checksum of the obsm["X_umap"] that `umap` wrote
_MOST_COLUMNS = 4
_LEGEND_ROWS = 20
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
    ax = _axes(6, 4)
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
    return _save(ax, save)


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
    ax = _axes(size + 1, size)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    accuracy = f"accuracy {np.trace(counts) / max(counts.sum(), 1):.3f} ({np.trace(counts)} of {counts.sum()})"
    ax.set(xlabel="predicted", ylabel="true", title=f"{title}: {accuracy}" if title else accuracy)
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
    """Plot a UMAP of an embedding, coloured by a column of obs.

    Neighbours and UMAP are computed by scanpy with its defaults, at each call, so that the plot shows the current
    `obsm[use_rep]`. Coordinates are written to `obsm[f"{use_rep}_umap"]`, and also to `obsm["X_umap"]` if there is
    none, or if it was written by this function; any other `obsm["X_umap"]`, `obsp` and `uns["neighbors"]` are not
    changed.

    Parameters
    ----------
    adata : AnnData
        Cells with `obsm[use_rep]`.
    color : str
        Column of obs, or gene; coloured as scanpy does.
    use_rep : str, default: "X_stformer"
        Key of the embedding in obsm.
    random_state : int, default: 0
        Seed of the UMAP.
    title, save
        As for `loss_curves`.

    Raises
    ------
    ValueError
        The key, or the column or gene, is missing.
    """
    import scanpy as sc
    from anndata import AnnData

    genes = adata.var_names if adata.raw is None else adata.raw.var_names  # where scanpy looks
    if color not in adata.obs and color not in genes:
        raise _unknown_color(adata, color)
    own = "X_umap" not in adata.obsm or adata.uns.get(_OWN_UMAP) == _checksum(adata.obsm["X_umap"])
    places = _write_umap(adata, use_rep, random_state)
    if own:
        adata.obsm["X_umap"], adata.uns[_OWN_UMAP] = places, _checksum(places)
    ax = _axes(8, 5)
    # scanpy calls missing values "NA" in the legend, and refuses them beside a category of this name.
    named = color in adata.obs and "NA" in pd.Categorical(adata.obs[color]).categories
    how = {"color": color, "title": title or color, "na_in_legend": not named}
    shown, key = adata, f"{use_rep}_umap"
    if color in adata.obs and pd.api.types.infer_dtype(adata.obs[color], skipna=True) == "boolean":
        # scanpy takes booleans that may be missing for numbers.
        labels = pd.DataFrame({color: adata.obs[color].map(str, na_action="ignore").astype("category")})
        colours = {name: of for name, of in adata.uns.items() if name == f"{color}_colors"}
        shown = AnnData(obs=labels, obsm={key: places}, uns=colours)
    sc.pl.embedding(shown, key, ax=ax, show=False, **how)
    if shown is not adata:
        adata.uns.update(shown.uns)
    _name_axes(ax)
    return _save(ax, save)


def _name_axes(ax: Axes) -> None:
    """Name the axes of a UMAP, whose numbers mean nothing."""
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    ax.spines[:].set_color("lightgray")  # separates distant clusters from the next panel


def _checksum(places: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(places).tobytes())


def _write_umap(adata: AnnData, key: str, random_state: int) -> np.ndarray:
    """Compute the UMAP of `obsm[key]` into `obsm[f"{key}_umap"]`, and return it: float32 (n_cells, 2)."""
    import scanpy as sc
    from anndata import AnnData

    must_have(adata.obsm, "obsm", key)
    bare = AnnData(obs=adata.obs[[]], obsm={key: np.asarray(adata.obsm[key])})
    sc.pp.neighbors(bare, use_rep=key, random_state=random_state)
    sc.tl.umap(bare, random_state=random_state)
    adata.obsm[f"{key}_umap"] = bare.obsm["X_umap"]
    return bare.obsm["X_umap"]


def umaps(
    adata: AnnData,
    color: str,
    use_reps: Mapping[str, str],
    *,
    outlined: str | None = None,
    title: str = "",
    random_state: int = 0,
    save: str | Path | None = None,
) -> np.ndarray:
    """Plot UMAPs of multiple embeddings of the same cells side by side, with one legend.

    Neighbours and UMAP are computed by scanpy with its defaults; coordinates are written to `obsm[f"{key}_umap"]`.

    Parameters
    ----------
    adata : AnnData
        Cells with the embeddings in obsm.
    color : str
        Column of obs, or gene; coloured as by `sections`.
    use_reps : dict of str to str
        Title of a panel -> key of obsm.
    outlined : str, optional
        Boolean column of obs: these cells get a black edge, and are drawn last; missing values are False.
    random_state : int, default: 0
        Seed of the UMAPs.
    title, save
        As for `loss_curves`.

    Returns
    -------
    array of Axes (n_embeddings,)

    Raises
    ------
    ValueError
        A key or column is missing.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    for key in use_reps.values():
        must_have(adata.obsm, "obsm", key)
    must_have(adata.obs, "obs", outlined)
    edged = np.zeros(adata.n_obs, bool) if outlined is None else adata.obs[outlined].to_numpy(bool, na_value=False)
    name_of_colours, colours, order, legend = _colours(adata, color)
    figure, panels = plt.subplots(
        1, len(use_reps), figsize=(4.5 * len(use_reps) + 3, 4.8), layout="constrained", squeeze=False
    )
    panels = panels[0]
    size = float(np.clip(20_000 / max(adata.n_obs, 1), 1, 40))
    for panel, (name, key) in zip(panels, use_reps.items(), strict=True):
        places = _write_umap(adata, key, random_state)
        for cells, edge in ((order[~edged[order]], "none"), (order[edged[order]], "black")):
            panel.scatter(*places[cells].T, c=colours[cells], s=size, linewidths=0.7, edgecolors=edge, rasterized=True)
        panel.set_title(name)
        _name_axes(panel)
    if isinstance(legend, list) and edged.any():
        legend.append(Line2D([], [], color="none", marker="o", markeredgecolor="black", markersize=8, label=outlined))
    _add_legend(figure, panels, legend, name_of_colours, title)
    _save(panels[0], save)
    return panels


def mapping(
    query: AnnData,
    reference: AnnData,
    color: str,
    *,
    reference_color: str | None = None,
    use_rep: str = "X_stformer",
    title: str = "",
    random_state: int = 0,
    save: str | Path | None = None,
) -> np.ndarray:
    """Plot a query and its reference in one UMAP, coloured by origin, and by label.

    Neighbours and UMAP are computed by scanpy with its defaults, on the cells of both.

    Parameters
    ----------
    query, reference : AnnData
        Cells with `obsm[use_rep]` of the same model, as `map_to_reference` writes.
    color : str
        Column of the query's obs, such as "mapped_label".
    reference_color : str, optional
        Column of the reference's obs; `color` by default.
    use_rep : str, default: "X_stformer"
        Key of the embeddings in obsm.
    random_state : int, default: 0
        Seed of the UMAP.
    title, save
        As for `loss_curves`.

    Returns
    -------
    array of Axes (2,)

    Raises
    ------
    ValueError
        A key or column is missing.
    """
    import anndata
    import matplotlib.pyplot as plt

    parts = {}
    for name, cells, column in (("reference", reference, reference_color or color), ("query", query, color)):
        must_have(cells.obsm, f"{name}.obsm", use_rep, " See map_to_reference.")
        must_have(cells.obs, f"{name}.obs", column)
        obs = pd.DataFrame({color: cells.obs[column].astype(object)}, index=cells.obs_names)
        parts[name] = anndata.AnnData(obs=obs, obsm={use_rep: np.asarray(cells.obsm[use_rep])})
    joint = anndata.concat(parts, label="cells", index_unique=" ")
    places = _write_umap(joint, use_rep, random_state)
    size = float(np.clip(20_000 / joint.n_obs, 1, 40))
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for panel, column in zip(panels, ("cells", color), strict=True):
        _, colours, _, legend = _colours(joint, column)
        panel.scatter(*places.T, c=colours, s=size, linewidths=0, rasterized=True)  # the query is on top
        panel.set_title(column)
        _name_axes(panel)
        assert isinstance(legend, list)  # both columns hold categories
        columns = -(-len(legend) // _LEGEND_ROWS)
        panel.legend(handles=legend, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, ncols=columns)
    if title:
        figure.suptitle(title)
    _save(panels[0], save)
    return panels


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
    ax = _axes(6, 4)
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
    return _save(ax, save)


def sections(
    adata: AnnData,
    color: str,
    *,
    spatial_key: str = "spatial",
    section_key: str | None = None,
    size: float | None = None,
    n_columns: int | None = None,
    title: str = "",
    save: str | Path | None = None,
) -> Axes | np.ndarray:
    """Plot the cells of tissue sections at their coordinates, one panel per section, coloured by a column or a gene.

    As in the spatial plots of scanpy and squidpy, y points down, and x and y have the same scale. A bar below each
    panel shows it, in the units of the coordinates.

    Parameters
    ----------
    adata : AnnData
        Cells with coordinates in obsm; for 3-D coordinates, x and y are plotted.
    color : str
        Column of obs, or gene in var_names, whose values in X are plotted. Numbers are coloured in viridis, from the
        smallest to the largest over all sections. Other values are categories, in the colours of
        `uns[f"{color}_colors"]`, a list or a dict by category; if a list is too short, it is replaced by scanpy's
        default colours. Missing and infinite values are grey.
    spatial_key : str, default: "spatial"
        Key of obsm.
    section_key : str, optional
        Column of obs; by default all cells form one section.
    size : float, optional
        Area of a point in square points; by default it depends on the extent and number of cells of the largest
        section.
    n_columns : int, optional
        Panels per row; at most 4 by default.
    title, save
        As for `loss_curves`.

    Returns
    -------
    Axes, or array of Axes (n_sections,)
        An array if `section_key` is given: its categories in their order, else its values, sorted.

    Raises
    ------
    ValueError
        There are no cells; a key, column or gene is missing; a gene is repeated in var_names; cells have no section or
        coordinates; a dict of colours lacks a category.
    """
    from ..sources.read_anndata import coordinates_of

    if not adata.n_obs:
        raise ValueError("The AnnData has no cells.")
    points = coordinates_of(adata, spatial_key, n_axes=2)
    section_of_cell = _sections_of(adata, section_key)
    if n_columns is not None and n_columns < 1:
        raise ValueError(f"n_columns={n_columns}: must be at least 1.")
    name, colours, order, legend = _colours(adata, color)

    import matplotlib.pyplot as plt

    names, numbers = section_of_cell.categories, section_of_cell.codes
    largest = points[numbers == np.bincount(numbers).argmax()]
    sides = np.maximum(np.ptp(largest, axis=0), 1e-9)
    width, height = np.maximum(4 * sides / sides.max(), 1.5)
    if size is None:
        size = float(np.clip(7_500 * width * height / len(largest), 0.1, 60))
    n_columns = min(n_columns or _MOST_COLUMNS, len(names))
    n_rows = -(-len(names) // n_columns)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=(width * n_columns + 2, height * n_rows + 0.5), layout="constrained", squeeze=False
    )
    panels = grid.ravel()[: len(names)]
    for unused in grid.ravel()[len(names) :]:
        unused.remove()
    for number, panel in enumerate(panels):
        cells = order[numbers[order] == number]
        panel.scatter(*points[cells].T, c=colours[cells], s=size, linewidths=0, rasterized=True)
        panel.set(xticks=[], yticks=[], aspect="equal")
        panel.invert_yaxis()
        _add_scale(panel, np.ptp(points[cells, 0]))
        if section_key is not None:
            panel.set_title(str(names[number]))
    figure.supxlabel(f"bars: units of obsm[{spatial_key!r}]", fontsize="small")
    _add_legend(figure, panels, legend, name, title)
    _save(panels[0], save)
    return panels[0] if section_key is None else panels


def _add_scale(panel: Axes, width: float) -> None:
    """Add a bar below a panel whose length is 1, 2 or 5 times a power of ten, at most half the width of its cells."""
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

    if not width > 0:  # one cell
        return
    power = 10.0 ** np.floor(np.log10(width / 2))
    length = power * max(times for times in (1, 2, 5) if times == 1 or times * power <= width / 2)
    below = {"bbox_to_anchor": (0.5, 0), "bbox_transform": panel.transAxes, "borderpad": 0.3, "sep": 4}
    panel.add_artist(AnchoredSizeBar(panel.transData, length, f"{length:g}", "upper center", frameon=False, **below))


def _sections_of(adata: AnnData, section_key: str | None) -> pd.Categorical:
    """Return the section of each cell; only sections with cells are categories."""
    if section_key is None:
        return pd.Categorical(np.zeros(adata.n_obs, np.int64))
    must_have(adata.obs, "obs", section_key)
    found = pd.Categorical(adata.obs[section_key]).remove_unused_categories()
    if (found.codes < 0).any():
        raise ValueError(f"{(found.codes < 0).sum()} of {len(found)} cells have no section in obs[{section_key!r}].")
    return found


class _Colours(NamedTuple):
    """What cells are coloured by."""

    name: str  # of the column, or of the gene with what X holds
    colours: np.ndarray  # RGBA: float (n_cells, 4)
    order: np.ndarray  # in which to draw the cells, missing values first, the largest numbers last: int (n_cells,)
    legend: list[Line2D] | ScalarMappable  # a list for categories, a mappable for numbers


def _colours(adata: AnnData, color: str) -> _Colours:
    """Choose the colours of cells by a column or a gene."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba, to_rgba_array
    from matplotlib.lines import Line2D

    name, values = _values_of(adata, color)
    if not isinstance(values, pd.Categorical):
        there = np.isfinite(values)
        limits = (values[there].min(), values[there].max()) if there.any() else (0, 1)
        scale = ScalarMappable(Normalize(*limits), "viridis")
        colours = scale.to_rgba(np.where(there, values, limits[0]))
        colours[~there] = to_rgba(_MISSING)
        return _Colours(name, colours, np.argsort(np.where(there, values, -np.inf), kind="stable"), scale)
    # Missing values have the code -1.
    palette = to_rgba_array([*_palette(adata, f"{color}_colors", values), _MISSING])

    def entry(label: str, colour: Any) -> Line2D:
        return Line2D([], [], color=colour, linestyle="", marker="o", markersize=8, label=label)

    used = np.unique(values.codes)
    legend = [entry(str(values.categories[code]), palette[code]) for code in used if code >= 0]
    if used[0] < 0:
        legend.append(entry("missing", palette[-1]))
    return _Colours(name, palette[values.codes], np.argsort(values.codes >= 0, kind="stable"), legend)


def _palette(adata: AnnData, key: str, values: pd.Categorical) -> Sequence:
    """Return the colour of each category from uns[key]; if it has too few, default colours are written there."""
    stored, n = adata.uns.get(key, []), len(values.categories)
    if not isinstance(stored, Mapping):
        if len(stored) < n:
            adata.uns[key] = _default_colours(n)
        return adata.uns[key][:n]
    # Keys read from a file are strings, whatever the categories are.
    colours = [stored.get(name, stored.get(str(name))) for name in values.categories]
    lacking = [code for code in np.unique(values.codes) if code >= 0 and colours[code] is None]
    if lacking:
        raise ValueError(
            f"uns[{key!r}] has no colour for {len(lacking)} of {n} categories, such as "
            f"{str(values.categories[lacking[0]])!r}: add them, or delete uns[{key!r}]."
        )
    return [_MISSING if colour is None else colour for colour in colours]


def _values_of(adata: AnnData, color: str) -> tuple[str, np.ndarray | pd.Categorical]:
    """Return a name, and the numbers or the categories of a column of obs, or the numbers of a gene."""
    if color in adata.obs:
        column = adata.obs[color]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            return color, column.to_numpy(np.float64, na_value=np.nan)
        return color, pd.Categorical(column)
    n_genes = (adata.var_names == color).sum()
    if n_genes > 1:
        raise ValueError(f"{n_genes} genes are named {color!r}: call adata.var_names_make_unique().")
    if not n_genes:
        raise _unknown_color(adata, color)
    values = adata[:, adata.var_names == color].X
    values = np.asarray(values.todense() if sparse.issparse(values) else values, np.float64).ravel()
    whole = np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all()
    return f"{color} ({'counts' if whole else 'values'} in X)", values


def _unknown_color(adata: AnnData, color: str) -> ValueError:
    return ValueError(
        f"There is no column or gene {color!r}; obs has {', '.join(map(repr, adata.obs)) or 'no columns'}, and genes "
        f"have names like {', '.join(adata.var_names[:3])}."
    )


def _default_colours(n: int) -> list[str]:
    """Return scanpy's colours for n categories; without scanpy, or for more than 102, some repeat."""
    import matplotlib
    from matplotlib.colors import to_hex

    palette = matplotlib.rcParams["axes.prop_cycle"].by_key().get("color", [])
    if n > len(palette):
        try:
            from scanpy.plotting import palettes
        except ImportError:
            palette = matplotlib.color_sequences["tab20"]
        else:
            known = (palettes.default_20, palettes.default_28, palettes.default_102)
            palette = next((palette for palette in known if n <= len(palette)), known[-1])
    return [to_hex(palette[i % len(palette)]) for i in range(n)]


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
    ax = _axes(6, 4.5)
    for of, colour in ((~significant, "gray"), (significant, "C3")):
        ax.plot(found[effect].to_numpy()[of], heights[of], ".", color=colour, markersize=6, alpha=0.7)
    for i in np.flatnonzero(significant)[:n_names]:
        at = (found[effect].iloc[i], heights[i])
        ax.annotate(str(found.index[i]), at, xytext=(3, 3), textcoords="offset points", fontsize=8)
    ax.axvline(0, color=_MISSING, linewidth=1, zorder=0)
    found_title = f"{significant.sum()} of {len(found)} below a false discovery rate of {fdr:g}"
    ax.set(xlabel=f"mean {effect.replace('_', ' ')}", ylabel="-log10 p", title=title or found_title)
    ax.spines[["top", "right"]].set_visible(False)
    return _save(ax, save)


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
    colours = [scale.to_rgba(r) if np.isfinite(r) else _MISSING for r in coexpression]
    places = _places_of(graph)
    names = {node: symbol or node for node, symbol in graph.nodes(data="symbol")}
    width, height = np.clip(np.ptp([*places.values()], axis=0) * _INCHES_PER_EDGE, 4, 14)
    ax = _axes(width + 2, height + 1)
    networkx.draw_networkx_edges(graph, places, ax=ax, edge_color=colours, width=(3 * score / score.max()).tolist())
    networkx.draw_networkx_labels(graph, places, names, ax=ax, font_size=8)
    ax.figure.colorbar(scale, ax=ax, label="co-expression (Pearson's r)", shrink=0.6)
    group = group if group is not None else next(iter(genes.scores))
    ax.figure.suptitle(title or f"{group}: {len(score)} edges by {genes.method}")
    ax.margins(0.1)
    ax.axis("off")
    return _save(ax, save)


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


def _add_legend(figure: Figure, panels: np.ndarray, legend: list[Line2D] | ScalarMappable, name: str, title: str):
    """Add the legend of all panels, see `_colours`, its name, and the title."""
    if isinstance(legend, list):
        columns = -(-len(legend) // _LEGEND_ROWS)
        figure.legend(handles=legend, loc="outside right center", frameon=False, title=name, ncols=columns)
    else:
        figure.colorbar(legend, ax=list(panels), label=name, shrink=0.6)
    if title:
        figure.suptitle(title)


def _axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _save(ax: Axes, save: str | Path | None) -> Axes:
    """Write and close the figure if `save` is given; otherwise it stays open for a notebook to show."""
    if save is not None:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure

        figure = ax.figure
        assert isinstance(figure, Figure)  # made by these plots, and no part of another
        figure.savefig(save, dpi=120)
        plt.close(figure)
    return ax
