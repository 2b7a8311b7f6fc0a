"""CenterMaskSampler: each cell with the cells around it in its tissue section, as a torch dataset."""

from __future__ import annotations

import copy
import logging
import operator
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..evaluation.gene_baselines import spread_rows
from ..genes.wrong_names import must_have
from ..models.gene_bert.gene_columns import resolve_genes
from ..models.gene_bert.randomness import uniforms
from ..sources.read_anndata import as_anndata, coordinates_of, find_placed_table, section_of
from ..store.cell_expression import CellExpression
from ..store.cell_store import CellStore
from ..store.row_numbers import check_mask, row_numbers
from ..training.cell_checksum import MOST, checksum
from .neighbor_index import NeighborIndex, first_of_each
from .neighborhood_batch import NeighborhoodBatch, NeighborhoodMetadata
from .sampler_fit import fit_sampler
from .spatial_metadata import (
    as_names,
    column_of,
    match_cells,
    read_embeds,
    read_points,
    read_sections,
    read_types,
    warn_of_sections,
    warn_of_units,
)

logger = logging.getLogger(__name__)

_CELLS_AT_ONCE = 1024  # to count neighbours
_CELLS_CHECKED = 256  # whose expression is read at once
_SUBSET = 0x5AB  # stream of the random numbers that choose neighbours


class CenterMaskSampler(Dataset):
    """Neighbourhoods of cells in tissue sections: item i is the masked cell `indices[i]`, and the cells around it.

    The cells around it are those of the same section in a box of size `patch_size` centred on it, borders included.

    Parameters
    ----------
    metadata : pandas or polars DataFrame
        One row per cell, with the columns named below.
    adata : AnnData or CellStore
        Expression: X of an AnnData, in memory or backed, or the counts of a store; rows are matched by the names of
        the cells, in any order.
    patch_size : float, sequence of float, or None
        Width and height of the box (and depth, with `z`), in the units of the coordinates; one number for all sides.
        None, with `k_nearest`, means no bounds.
    cell_id_colname : str, default: "cell_label"
        Column with the names of cells; they are compared as strings.
    cell_type_colname : str, default: "cell_type"
        Column of cell types, integers from 0 (made by `prepare_metadata`).
    tissue_section_colname : str or None, default: "brain_section_label"
        Column of sections; None means that all cells form one section.
    max_num_cells : int, optional
        Maximum number of neighbours of an item. If there are more, a uniform random subset is used, a function of the
        seed, the epoch and the names of the cells, but not of their rows.
    indices : int array or boolean mask (n_cells,), optional
        Rows of metadata of the cells that become items, such as training cells. All by default.
    shape : {"box", "disc"}, default: "box"
        A disc (in 3-D a ball) has diameter `patch_size`.
    k_nearest : int, optional
        Number of nearest neighbours to use; of equally distant ones, those whose names have the lowest hashes are
        used, independent of their rows.
    discretize : bool, default: False
        Truncate `patch_size` to integers and round the borders of boxes to integers, as brainformr does.
    neighbors_from : {"all", "indices"}, default: "all"
        Which cells may be neighbours: all cells of metadata, or only those of `indices`, so that held-out cells are
        excluded from training neighbourhoods.
    min_neighbors : int, default: 0
        Cells with fewer neighbours do not become items.
    normalize : {"log1p", None}, default: None
        "log1p" returns ln(1 + count) for all cells, including masked ones. None returns X unchanged, as losses for
        counts need it.
    seed : int, default: 0
        Seed of the random subsets.
    x, y : str, default: "x", "y"
        Columns of coordinates.
    z : str, optional
        Column of the third coordinate; neighbourhoods are then 3-D.
    cell_embeds : float array (n_cells, d), optional
        An embedding for each row of metadata, such as a GeneBert's, for a model with `cell_embedding_size`: batches
        include those of the observed cells.

    Attributes
    ----------
    indices : int64 array (len(self),)
        Rows of metadata of the items.
    cell_types : list of str or None
        Names of the cell types, in the order of their codes; set by `from_anndata`.
    gene_ids : list of str or None
        Gene of each column, see `resolve_genes`; None if columns are only numbered.
    section_key : str or None
        Column of obs from which `from_anndata` took the sections.
    has_sections : bool
        Whether a column says which section a cell is in; all cells form one section otherwise.
    n_cell_types, n_genes : int
        Number of cell types (codes are below it), and of columns of expression.

    Raises
    ------
    ValueError
        A column is missing; names are not in `adata`, or occur twice; cell types are not integers; coordinates are
        NaN; a cell has no section; X is missing; expression is not finite, or is not counts although it should be
        normalized; sizes and options do not fit. Expression is checked whenever it is read, and a part of it at once.
    IndexError
        `indices` are outside metadata, or of another type.

    Warns
    -----
    A warning is logged if nearly no cell has a neighbour in its box, or if boxes hold nearly all cells of their
    sections: patch_size and the coordinates are then most likely in different units.

    Notes
    -----
    A `DataLoader` reads a batch with one query of a KD-tree and one gather of rows (`__getitems__`), and passes its
    collate function a `NeighborhoodBatch`. Neighbours are in the order of metadata. Cells on a border are decided by
    |x_j - x_i| <= width / 2 in float64, so that i is a neighbour of j if j is one of i.

    References
    ----------
    Lee et al., CellTransformer; `brainformr.data.CenterMaskSampler`.
    """

    def __init__(
        self,
        metadata: Any,
        adata: AnnData | CellStore,
        patch_size: float | Sequence[float] | None,
        cell_id_colname: str = "cell_label",
        cell_type_colname: str = "cell_type",
        tissue_section_colname: str | None = "brain_section_label",
        max_num_cells: int | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        shape: str = "box",
        k_nearest: int | None = None,
        discretize: bool = False,
        neighbors_from: str = "all",
        min_neighbors: int = 0,
        normalize: str | None = None,
        seed: int = 0,
        x: str = "x",
        y: str = "y",
        z: str | None = None,
        cell_embeds: np.ndarray | None = None,
    ):
        if max_num_cells is not None and (max_num_cells != int(max_num_cells) or max_num_cells < 0):
            raise ValueError(f"max_num_cells={max_num_cells}: must be an integer of at least 0.")
        if neighbors_from not in ("all", "indices"):
            raise ValueError(f"neighbors_from={neighbors_from!r}: must be 'all' or 'indices'.")
        self.max_num_cells, self.seed = max_num_cells, operator.index(seed)
        self._lengths: np.ndarray | None = None
        self.cell_types: list[str] | None = None
        self.section_key: str | None = None
        self.has_sections = tissue_section_colname is not None
        self.normalize = normalize
        names = column_of(metadata, cell_id_colname)
        points = read_points(metadata, [x, y] if z is None else [x, y, z], names)
        sections = read_sections(metadata, tissue_section_colname, names)
        self._types = read_types(metadata, cell_type_colname)
        self._expression = CellExpression(adata, normalize)
        self._keys = pd.util.hash_array(as_names(names).to_numpy(), categorize=False)
        self._rows = match_cells(names, self._expression.names, cell_id_colname)
        self._cell_embeds = None if cell_embeds is None else read_embeds(cell_embeds, len(names))
        self.n_genes = self._expression.n_genes
        self.gene_ids = _gene_ids(adata)
        self.n_cell_types = int(self._types.max(initial=-1)) + 1
        check_mask(indices, len(points), lambda: getattr(metadata, "index", names), "metadata")
        self.indices = row_numbers(slice(None) if indices is None else indices, len(points), "metadata")
        candidates = np.unique(self.indices) if neighbors_from == "indices" else None
        self._index = NeighborIndex(
            points,
            sections,
            patch_size,
            shape=shape,
            k_nearest=1 if max_num_cells == 0 else k_nearest,  # find no more than needed
            discretize=discretize,
            candidates=candidates,
            keys=self._keys,
        )
        self._options = {"patch_size": patch_size, "shape": shape, "k_nearest": k_nearest}
        self._options |= {"max_num_cells": max_num_cells, "discretize": discretize}
        self._options |= {"neighbors_from": neighbors_from, "seed": self.seed}
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._expression.read(self._rows[:: max(1, len(self._rows) // _CELLS_CHECKED)])  # check some at once
        if patch_size is not None:
            warn_of_units(self._index, self.indices, patch_size)
        if min_neighbors:
            self._leave_out(min_neighbors)

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        patch_size: float | Sequence[float] | None,
        *,
        spatial_key: str = "spatial",
        section_key: str | None = None,
        cell_type_key: str | None = None,
        cell_embedding_key: str | None = None,
        **options: Any,
    ) -> CenterMaskSampler:
        """Make a sampler from the coordinates, sections and types in an AnnData.

        Parameters
        ----------
        adata : AnnData, MuData or SpatialData
            AnnData in memory or backed; for a MuData the gene modality is used, for a SpatialData the table, see
            `add_coordinates`.
        patch_size : float, sequence of float, or None
            As for the class.
        spatial_key : str, default: "spatial"
            Key of obsm: coordinates, (n_cells, 2) or (n_cells, 3).
        section_key : str, optional
            Column of obs; by default the regions of a SpatialData's table are the sections, and otherwise all cells
            form one section (with a warning if obs has a column with a usual name, such as "section" or "slide").
        cell_type_key : str, optional
            Column of obs; the types are the categories of a categorical column in their order, else the sorted values.
            By default all cells have type 0.
        cell_embedding_key : str, optional
            Key of obsm, such as "X_stformer", with the embeddings for `cell_embeds`.
        **options
            `max_num_cells`, `indices` and the keyword options of the class, except the names of columns.

        Returns
        -------
        CenterMaskSampler
            Rows of metadata are those of `adata`; `cell_types` holds the names of the types.

        Raises
        ------
        ValueError
            A key or column is missing; a cell has no type; and as for the class.
        """
        adata = as_anndata(find_placed_table(adata))
        section_key = section_key or section_of(adata)
        must_have(adata.obsm, "obsm", cell_embedding_key)
        coordinates = coordinates_of(adata, spatial_key)
        axes = list("xyz"[: coordinates.shape[1]])
        metadata = {"cell_label": adata.obs_names.to_numpy(), **dict(zip(axes, coordinates.T, strict=True))}
        for key in (section_key, cell_type_key):
            must_have(adata.obs, "obs", key)
        if section_key is None:
            warn_of_sections(adata.obs)
        else:
            missing = adata.obs[section_key].isna()
            if missing.any():
                raise ValueError(
                    f"{missing.sum()} of {len(missing)} cells have no section in obs[{section_key!r}], such as "
                    f"{missing.idxmax()}: remove them first."
                )
            metadata["section"] = adata.obs[section_key].to_numpy()
        types = pd.Categorical(np.full(adata.n_obs, "cell") if cell_type_key is None else adata.obs[cell_type_key])
        if (types.codes < 0).any():
            raise ValueError(
                f"{(types.codes < 0).sum()} of {len(types)} cells have no type in obs[{cell_type_key!r}]: remove "
                "them, or fill it in, for example with 'unknown', which a new model then learns as a type."
            )
        metadata["cell_type"] = types.codes.astype(np.int64)
        sampler = cls(
            pd.DataFrame(metadata),
            adata,
            patch_size,
            tissue_section_colname=None if section_key is None else "section",
            z="z" if len(axes) == 3 else None,
            cell_embeds=None if cell_embedding_key is None else adata.obsm[cell_embedding_key],
            **options,
        )
        sampler.cell_types = [str(name) for name in types.categories]
        sampler.n_cell_types = len(sampler.cell_types)
        sampler.section_key = section_key
        return sampler

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"CenterMaskSampler({len(self):,} of {len(self._rows):,} cells, {self.n_genes:,} genes)"

    @property
    def epoch(self) -> int:
        """The epoch for which random subsets are drawn."""
        return int(self._epoch)

    @property
    def description(self) -> str:
        """Options and cells in one line, which differs between samplers with different neighbourhoods."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"{options}, {len(self)} of {len(self._rows)} cells (checksum {zlib.crc32(self.indices.tobytes()):08x})"

    def describe_cells(self) -> str:
        """Return the number of cells, and a checksum of their names and of the counts of up to 64 of them."""
        some = sparse.csr_array(self.expression_of(spread_rows(len(self), MOST)))
        values = [self.gene_ids, self._keys[self.indices], some.indptr, some.indices, some.data]
        return f"{len(self)} cells (checksum {checksum(*values)})"

    @property
    def neighborhood(self) -> dict[str, Any]:
        """The options of neighbourhoods that a model keeps (`CellNeighborhoodConfig.neighborhood`)."""
        options = {name: self._options[name] for name in ("patch_size", "shape", "k_nearest", "max_num_cells")}
        if self._options["discretize"]:
            options["discretize"] = True
        if options["patch_size"] is not None:
            options["patch_size"] = np.asarray(options["patch_size"], np.float64).tolist()
        return {name: value for name, value in options.items() if value is not None}

    def fit_model(self, model: PreTrainedModel, name: str = "sampler", learn: bool = False) -> None:
        """Check that genes, cell types, options and values agree with those of a model; called by trainers.

        Parameters
        ----------
        model : PreTrainedModel
            Only models with a `CellNeighborhoodConfig` are checked.
        name : str, default: "sampler"
            Name of these cells in errors.
        learn : bool, default: False
            Whether to complete the model's configuration.

        Raises
        ------
        ValueError
            Genes, types or options differ, or their order; see `check_sampler_fits`.
        """
        fit_sampler(model, self, name, learn)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before the first batch of the epoch."""
        self._epoch.fill_(epoch)

    def select(self, items: Sequence[int]) -> CenterMaskSampler:
        """Choose items, without copying; their neighbours stay those that they have here.

        Parameters
        ----------
        items : sequence of int
            Numbers of items, as for `__getitems__`.

        Returns
        -------
        CenterMaskSampler
            These items, in this order, with a separate epoch.
        """
        chosen = copy.copy(self)
        chosen.indices, chosen._lengths = self._cells(items), None
        chosen._epoch = self._epoch.clone().share_memory_()
        return chosen

    def __getitem__(self, item: int) -> NeighborhoodMetadata:
        """Read one neighbourhood; a negative item counts from the end."""
        return self.__getitems__([item])[0]

    def __iter__(self) -> Iterator[NeighborhoodMetadata]:
        """Read all neighbourhoods, one by one."""
        return (self[item] for item in range(len(self)))

    def __getitems__(self, items: Sequence[int] | np.ndarray) -> NeighborhoodBatch:
        """Read many neighbourhoods (torch's `DataLoader` calls this with the numbers of a batch).

        Parameters
        ----------
        items : sequence of int
            Item numbers in any order, repeats allowed; negative ones count from the end.

        Raises
        ------
        IndexError
            An item is outside the dataset.
        TypeError
            An item is not an integer.
        """
        centres = self._cells(items)
        indptr, found = self._neighbors(centres)
        cells = np.concatenate([found, centres])
        types = self._types[cells]
        return NeighborhoodBatch(
            indptr,
            self._expression.read(self._rows[cells]),
            types[: len(found)],
            types[len(found) :],
            None if self._cell_embeds is None else self._cell_embeds[found],
        )

    def expression_of(self, items: Sequence[int] | np.ndarray) -> sparse.csr_matrix | sparse.csr_array | np.ndarray:
        """Read the expression of the masked cells of items, without their neighbours: (n_items, G), float32."""
        return self._expression.read(self._rows[self._cells(items)])

    def neighbors(self, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Find the neighbours of items, as in their neighbourhoods, without reading expression.

        Parameters
        ----------
        items : sequence of int
            As for `__getitems__`.

        Returns
        -------
        indptr : int64 array (n_items + 1,)
            Item i has the neighbours `found[indptr[i]:indptr[i + 1]]`.
        found : int64 array (indptr[-1],)
            Rows of metadata, ascending for each item.
        """
        return self._neighbors(self._cells(items))

    def _neighbors(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indptr, found = self._index.query(cells)
        sizes = np.diff(indptr)
        if self.max_num_cells is None or sizes.max(initial=0) <= self.max_num_cells:
            return indptr, found
        owners = np.repeat(np.arange(len(cells)), sizes)
        kept = np.ones(len(found), bool)
        crowded = (sizes > self.max_num_cells)[owners]
        own, others = self._keys[cells[owners[crowded]]], self._keys[found[crowded]]
        draws = uniforms(self.seed, self.epoch, _SUBSET, own, others)
        kept[crowded] = first_of_each(owners[crowded], draws, len(cells), self.max_num_cells)
        return np.concatenate([[0], np.cumsum(kept)])[indptr], found[kept]

    def _cells(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the cells of items, as rows of metadata."""
        positions = np.asarray(items if len(items) else np.empty(0, np.int64))
        if positions.dtype.kind not in "iu" or positions.ndim != 1:
            raise TypeError(f"Items must be integers, got {items!r}.")
        outside = (positions < -len(self)) | (positions >= len(self))
        if outside.any():
            raise IndexError(f"Item {positions[outside][0]} is outside the dataset of {len(self)} cells.")
        return self.indices[positions]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each item, its neighbours and itself: int64 array (len(self),).

        All neighbours are counted on first access.
        """
        if self._lengths is None:
            sizes = self._count_neighbors()
            most = sizes.max(initial=0) if self.max_num_cells is None else self.max_num_cells
            self._lengths = np.minimum(sizes, most) + 1
        return self._lengths

    def _count_neighbors(self) -> np.ndarray:
        sizes = [np.empty(0, np.int64)]
        for start in range(0, len(self.indices), _CELLS_AT_ONCE):
            indptr, _ = self._index.query(self.indices[start : start + _CELLS_AT_ONCE])
            sizes.append(np.diff(indptr))
        return np.concatenate(sizes)

    def _leave_out(self, min_neighbors: int) -> None:
        """Keep the cells that have at least this many neighbours."""
        kept = self._count_neighbors() >= min_neighbors
        if not kept.any():
            raise ValueError(f"None of {len(kept)} cells has {min_neighbors} neighbours: increase patch_size.")
        if not kept.all():
            logger.info(
                f"{(~kept).sum()} of {len(kept)} cells have fewer than {min_neighbors} neighbours and are left out."
            )
        self.indices = self.indices[kept]


def _gene_ids(adata: AnnData | CellStore) -> list[str] | None:
    """Return the gene of each column; None if columns are only numbered."""
    if isinstance(adata, CellStore):
        return adata.gene_ids.tolist()
    try:
        return resolve_genes(adata.var_names, adata.var).gene_ids.tolist()
    except ValueError:  # row numbers
        return None


__all__ = ["CenterMaskSampler", "NeighborhoodBatch", "NeighborhoodMetadata"]
