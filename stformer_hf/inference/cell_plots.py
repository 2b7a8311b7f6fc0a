"""Plots of cells in two dimensions, embedded or in tissue, coloured by a column of obs or a gene."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from ..genes.wrong_names import must_have
from .figures import MISSING, new_axes, save_figure

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_OWN_UMAP = "stformer_umap"  # in uns: checksum of the obsm["X_umap"] that `umap` wrote
_MOST_COLUMNS = 4
_LEGEND_ROWS = 20


def umap(
    adata: AnnData,
    color: str,
    *,
    use_rep: str = "X_stformer",
    title: str = "",
    seed: int = 0,
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
    seed : int, default: 0
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
    places = _write_umap(adata, use_rep, seed)
    if own:
        adata.obsm["X_umap"], adata.uns[_OWN_UMAP] = places, _checksum(places)
    ax = new_axes(8, 5)
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
    return save_figure(ax, save)


def _name_axes(ax: Axes) -> None:
    """Name the axes of a UMAP, whose numbers mean nothing."""
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    ax.spines[:].set_color("lightgray")  # separates distant clusters from the next panel


def _checksum(places: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(places).tobytes())


def _write_umap(adata: AnnData, key: str, seed: int) -> np.ndarray:
    """Compute the UMAP of `obsm[key]` into `obsm[f"{key}_umap"]`, and return it: float32 (n_cells, 2)."""
    import scanpy as sc
    from anndata import AnnData

    must_have(adata.obsm, "obsm", key)
    bare = AnnData(obs=adata.obs[[]], obsm={key: np.asarray(adata.obsm[key])})
    sc.pp.neighbors(bare, use_rep=key, random_state=seed)
    sc.tl.umap(bare, random_state=seed)
    adata.obsm[f"{key}_umap"] = bare.obsm["X_umap"]
    return bare.obsm["X_umap"]


def umaps(
    adata: AnnData,
    color: str,
    use_reps: Mapping[str, str],
    *,
    outlined: str | None = None,
    title: str = "",
    seed: int = 0,
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
    seed : int, default: 0
        Seed of the UMAPs.
    title, save
        As for `loss_curves`.

    Returns
    -------
    array of Axes (n_embeddings,)

    Raises
    ------
    ValueError
        A key or column is missing, or `outlined` is not boolean.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    for key in use_reps.values():
        must_have(adata.obsm, "obsm", key)
    must_have(adata.obs, "obs", outlined)
    edged = np.zeros(adata.n_obs, bool)
    if outlined is not None:
        if pd.api.types.infer_dtype(adata.obs[outlined].astype(object), skipna=True) != "boolean":
            raise ValueError(f"obs[{outlined!r}] must be boolean, but it holds {adata.obs[outlined].dtype}.")
        edged = adata.obs[outlined].to_numpy(bool, na_value=False)
    name_of_colours, colours, order, legend = _colours(adata, color)
    figure, panels = plt.subplots(
        1, len(use_reps), figsize=(4.5 * len(use_reps) + 3, 4.8), layout="constrained", squeeze=False
    )
    panels = panels[0]
    size = float(np.clip(20_000 / max(adata.n_obs, 1), 1, 40))
    for panel, (name, key) in zip(panels, use_reps.items(), strict=True):
        places = _write_umap(adata, key, seed)
        for cells, edge in ((order[~edged[order]], "none"), (order[edged[order]], "black")):
            panel.scatter(*places[cells].T, c=colours[cells], s=size, linewidths=0.7, edgecolors=edge, rasterized=True)
        panel.set_title(name)
        _name_axes(panel)
    if isinstance(legend, list) and edged.any():
        legend.append(Line2D([], [], color="none", marker="o", markeredgecolor="black", markersize=8, label=outlined))
    _add_legend(figure, panels, legend, name_of_colours, title)
    save_figure(panels[0], save)
    return panels


def mapping(
    query: AnnData,
    reference: AnnData,
    color: str,
    *,
    reference_color: str | None = None,
    use_rep: str = "X_stformer",
    title: str = "",
    seed: int = 0,
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
    seed : int, default: 0
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
    places = _write_umap(joint, use_rep, seed)
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
    save_figure(panels[0], save)
    return panels


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
    save_figure(panels[0], save)
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
        colours[~there] = to_rgba(MISSING)
        return _Colours(name, colours, np.argsort(np.where(there, values, -np.inf), kind="stable"), scale)
    # Missing values have the code -1.
    palette = to_rgba_array([*_palette(adata, f"{color}_colors", values), MISSING])

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
    return [MISSING if colour is None else colour for colour in colours]


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


def _add_legend(
    figure: Figure, panels: np.ndarray, legend: list[Line2D] | ScalarMappable, name: str, title: str
) -> None:
    """Add the legend of all panels, see `_colours`, its name, and the title."""
    if isinstance(legend, list):
        columns = -(-len(legend) // _LEGEND_ROWS)
        figure.legend(handles=legend, loc="outside right center", frameon=False, title=name, ncols=columns)
    else:
        figure.colorbar(legend, ax=list(panels), label=name, shrink=0.6)
    if title:
        figure.suptitle(title)
