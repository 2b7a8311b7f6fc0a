"""Write embeddings of the neighbourhoods of cells into `obsm`."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .. import __version__
from ..genes.wrong_names import closest, some_of
from ..inference.batches import at_work, check_cells
from ..models.gene_bert.gene_columns import strip_versions
from ..models.gene_bert.gene_matcher import MIN_COVERAGE, WARN_COVERAGE, GeneMatcher, check_coverage, coverage_of
from ..sources.open_source import Source, open_source
from ..sources.read_anndata import as_anndata, find_placed_table, section_of
from ..training.cell_heads import check_finite
from ..training.loading import is_model, load_config, load_model, name_of, unwrap
from .center_mask_sampler import CenterMaskSampler
from .neighborhood_collator import collate_neighborhoods
from .sampler_fit import DEFAULTS

logger = logging.getLogger(__name__)

_OPTIONS = (*DEFAULTS, "seed")  # options of neighbourhoods
_ROWS_PER_BLOCK = 4096


def embed_neighborhoods(
    adata: AnnData,
    model: str | PreTrainedModel,
    *,
    spatial_key: str = "spatial",
    section_key: str | None = None,
    cell_type_key: str | None = None,
    key_added: str = "X_neighborhood",
    cell_embedding_key: str | None = None,
    with_cell_type: bool = False,
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    **neighborhood: Any,
) -> None:
    """Write an embedding of the neighbourhood of every cell into `adata.obsm[key_added]`.

    The embedding depends on the cells around a cell, but not on the cell itself. All cells without neighbours get the
    same embedding.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with coordinates in obsm, and raw counts in X, raw or a layer. A backed AnnData is read batch by batch if
        the columns of X are the model's genes in their order; else the counts of these genes are read into memory,
        sparse. For a MuData, the gene modality is read and gets the embedding; for a SpatialData the table, which also
        gets coordinates if it has none, see `add_coordinates`.
    model : str or PreTrainedModel
        Checkpoint of a CellNeighborhood (its head, if any, is not used), or a model.
    spatial_key : str, default: "spatial"
        Key of obsm: coordinates, (n_cells, 2) or (n_cells, 3), in the units of the model's training data.
    section_key : str, optional
        Column of obs with the tissue section of each cell. By default the regions of a SpatialData's table, or the
        column that the model was trained with (`config.section_key`), if obs has it; else all cells form one section.
    cell_type_key : str, optional
        Column of obs with the type of each cell, by the names that the model knows (`config.cell_types`). If the model
        knows no names: categories, numbered in their order, or integers, used as they are. Not needed for a model with
        a single type.
    cell_embedding_key : str, optional
        Key of obsm, such as "X_stformer": the embedding of each cell, for a model with `cell_embedding_size`.
    key_added : str, default: "X_neighborhood"
        Key of `obsm` for the embedding, float32 (n_obs, hidden size); the settings are written to
        `uns["stformer_neighborhood"]`.
    with_cell_type : bool, default: False
        Write `typed_neighborhood_embedding` instead, from which the model predicts the cell's counts, and which also
        depends on the cell's own type. Domains and types are then no longer independent.
    layer : str, optional
        Location of the counts: X, raw or a layer; by default it is detected.
    fractional : bool, default: False
        Accept fractional counts, such as estimates.
    batch_size : int, default: 64
        Cells per batch.
    device : str, optional
        As for `embed`.
    **neighborhood
        `patch_size`, `shape`, `k_nearest`, `max_num_cells`, `discretize` and `seed` of `CenterMaskSampler`, which
        override those of the model's training (`config.neighborhood`).

    Raises
    ------
    ValueError
        The model is of another kind; options are unknown, or missing; counts are missing, or values are not counts;
        the data have less than a tenth of the model's genes; cell types are unknown to the model; and as for
        `CenterMaskSampler.from_anndata`: coordinates are missing or NaN, or columns are missing.

    Notes
    -----
    Columns are matched by Ensembl id without version or by symbol, whichever finds more of `config.gene_ids`; multiple
    columns of one gene are summed, and missing genes are 0. With `max_num_cells`, the neighbours are those of epoch 0,
    so that results do not depend on the batches.
    """
    check_cells(adata)
    name = name_of(model)
    encoder = _load(model)
    config = encoder.config
    options = _options(config.neighborhood, neighborhood)
    if (cell_embedding_key is None) != (config.cell_embedding_size == 0):
        raise ValueError(
            f"cell_embedding_key={cell_embedding_key!r}, but the model reads cell embeddings of size "
            f"{config.cell_embedding_size}: pass the key of obsm that holds them, or None if the size is 0."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    found = find_placed_table(adata, layer)
    adata, layer, cells = found.table, found.layer, as_anndata(found)
    section_key = section_key or section_of(adata) or _section_key(adata, config)
    if not adata.n_obs:
        raise ValueError(f"{found.name} has no cells.")
    if not adata.obs_names.is_unique:
        raise ValueError("obs_names are not unique: call adata.obs_names_make_unique() first.")
    types = _types(cells, cell_type_key, config)
    counts, source = _in_genes_of(cells, layer, fractional, config)
    sampler = CenterMaskSampler.from_anndata(
        counts,
        spatial_key=spatial_key,
        section_key=section_key,
        cell_type_key=cell_type_key,
        cell_embedding_key=cell_embedding_key,
        normalize=None if config.apply_log1p else "log1p",
        **options,
    )
    result = "typed_neighborhood_embedding" if with_cell_type else "neighborhood_embedding"
    adata.obsm[key_added] = _embed(encoder, sampler, types, result, batch_size, device)
    settings = {"spatial_key": spatial_key, "section_key": section_key, "cell_type_key": cell_type_key, **options}
    settings = {key: value for key, value in settings.items() if value is not None}  # None cannot be written to a file
    adata.uns["stformer_neighborhood"] = {
        "model": str(name),
        "embedding": result,
        "version": __version__,
        "counts_in": source.counts_in,
        **({} if cell_embedding_key is None else {"cell_embedding_key": cell_embedding_key}),
        **{key: np.asarray(value) if isinstance(value, tuple) else value for key, value in settings.items()},
    }


def _embed(
    encoder: PreTrainedModel,
    sampler: CenterMaskSampler,
    types: np.ndarray,
    result: str,
    batch_size: int,
    device: str | None,
) -> np.ndarray:
    """Return one of the model's outputs for all cells: float32 (n_cells, hidden).

    `types` maps the sampler's types to the model's.
    """
    embedding = np.empty((len(sampler), encoder.config.hidden_size), np.float32)
    read = ["observed_expression", "observed_indptr", "observed_genes", "observed_values"]
    read += ["observed_cell_type", "cell_embeds", "cu_seq_lens"]
    read += ["masked_cell_type"] if result == "typed_neighborhood_embedding" else []
    lengths = sampler.lengths
    with (
        at_work(encoder, device),
        tqdm(total=len(sampler), desc="embed neighbourhoods", unit="cell", disable=None) as bar,
    ):
        for start in range(0, len(sampler), _ROWS_PER_BLOCK):
            cells = np.arange(start, min(start + _ROWS_PER_BLOCK, len(sampler)))
            cells = cells[np.argsort(lengths[cells], kind="stable")]  # attention takes one call per length
            for first in range(0, len(cells), batch_size):
                chosen = cells[first : first + batch_size]
                items = sampler.__getitems__(chosen)
                items.observed_cell_type = types[items.observed_cell_type]
                items.masked_cell_type = types[items.masked_cell_type]
                batch = collate_neighborhoods(items, packed=True)
                outputs = encoder(
                    **{key: batch[key].to(encoder.device) for key in read if key in batch},
                    observed_neighboorhood_lens=batch["observed_neighboorhood_lens"],
                    return_dict=True,
                )
                embedding[chosen] = outputs[result].float().cpu().numpy()
                bar.update(len(chosen))
    check_finite(embedding, np.ones(len(embedding), bool))
    n_lonely = int((lengths == 1).sum())
    if n_lonely:
        logger.warning(
            f"{n_lonely} of {len(sampler)} cells have no neighbours, so their embedding carries no information."
        )
    return embedding


def _load(model: str | PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head."""
    of_object = is_model(model)
    config = unwrap(model).config if of_object else load_config(model)
    if config.model_type != "cell_neighborhood":
        raise ValueError(
            f"Neighbourhoods need a model of type cell_neighborhood, but this one is a {config.model_type}. To embed "
            "cells, use embed (stformer-hf embed --kind cells)."
        )
    model = unwrap(model) if of_object else load_model(model)
    return getattr(model, model.base_model_prefix, model)


# ---------------------------------------------------------------------- neighbourhoods


def _options(learnt: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the sampler's options: those given override those that the model was trained with."""
    for name in given:
        if name not in _OPTIONS:
            raise ValueError(
                f"No option {name!r} of neighbourhoods{closest(name, _OPTIONS)}. Valid ones are {', '.join(_OPTIONS)}."
            )
    learnt = learnt or {}
    known = inspect.signature(CenterMaskSampler.__init__).parameters
    unknown = [name for name in learnt if name not in known]
    if unknown:
        raise ValueError(
            f"The model was trained with an option {unknown[0]!r} of neighbourhoods that CenterMaskSampler does not "
            "have: it was made with a newer version."
        )
    options = {"patch_size": None, **{name: learnt[name] for name in _OPTIONS if name in learnt}, **given}
    if options["patch_size"] is None and options.get("k_nearest") is None:
        raise ValueError(
            "The model does not record the neighbourhoods of its training (config.neighborhood): pass patch_size, in "
            "the units of the coordinates, or k_nearest, and max_num_cells if there was one, as in training."
        )
    return options


def _section_key(adata: AnnData, config: PreTrainedConfig) -> str | None:
    """Return the column of sections that the model was trained with; None if there was none, or obs lacks it."""
    learnt = getattr(config, "section_key", None)
    if learnt is not None and learnt not in adata.obs:
        logger.warning(
            f"The model was trained with the sections of obs[{learnt!r}], which these cells do not have: all of them "
            "are treated as one section. Pass section_key to use another column."
        )
        return None
    return learnt


def _types(adata: AnnData, key: str | None, config: PreTrainedConfig) -> np.ndarray:
    """Return the model's number of each type, in the order of `CenterMaskSampler.from_anndata`: int64 array.

    Unused types may be -1. A missing column is left to the sampler.
    """
    if key is None:
        if config.n_cell_types > 1:
            raise ValueError(
                f"The model knows {config.n_cell_types} cell types{_known_types(config)}: pass the column of obs "
                "that holds them as cell_type_key."
            )
        return np.zeros(1, np.int64)
    if key not in adata.obs:
        return np.empty(0, np.int64)
    column = adata.obs[key]
    found = pd.Categorical(column)
    used = np.unique(found.codes[found.codes >= 0])
    n_missing = int((found.codes < 0).sum())
    if n_missing:
        raise ValueError(
            f"{n_missing} of {len(column)} cells have no type in obs[{key!r}]: fill in one that the model knows"
            f"{_known_types(config)}, or remove them."
        )
    if config.cell_types is not None:
        numbers = pd.Index(config.cell_types).get_indexer([str(name) for name in found.categories])
        unknown = [str(found.categories[i]) for i in used if numbers[i] < 0]
        if unknown:
            raise ValueError(
                f"obs[{key!r}] holds types that the model does not know, such as {', '.join(unknown[:3])}. Rename "
                f"them to types that it knows{_known_types(config)}, or remove their cells."
            )
        return numbers.astype(np.int64)
    if pd.api.types.is_integer_dtype(column.dtype):  # codes, such as those of prepare_metadata
        numbers = found.categories.to_numpy(np.int64)
    else:
        numbers = np.arange(len(found.categories))
    outside = numbers[used][(numbers[used] < 0) | (numbers[used] >= config.n_cell_types)]
    if len(outside):
        raise ValueError(
            f"obs[{key!r}] holds type number {outside[0]}, but the model knows only {config.n_cell_types} types, "
            "numbered from 0 without names: pass the types of its training, as a categorical with the same categories."
        )
    return numbers


def _known_types(config: PreTrainedConfig) -> str:
    """Return the names of the types that a model knows, in brackets."""
    return f" ({some_of(config.cell_types, 10)})" if config.cell_types else ""


# ---------------------------------------------------------------------- genes


def _in_genes_of(
    adata: AnnData, layer: str | None, fractional: bool, config: PreTrainedConfig
) -> tuple[AnnData, Source]:
    """Return the counts of the model's genes, in the model's order, as X of an AnnData; and their source.

    All counts are checked. A matrix that already has the model's columns is used as it is, else copied, sparse.
    """
    source = open_source(adata, layer, fractional)
    genes = _genes_of_columns(source, config)
    # Layers are in memory; genes next to antibodies are a part of a matrix.
    copied = genes is not None or source.is_part or (adata.isbacked and source.counts_in == "raw")
    totals, parts = np.zeros(source.shape[1]), []
    for block in source.blocks(_ROWS_PER_BLOCK):
        totals += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
        if copied:
            parts.append(block if genes is None else block @ _renaming(genes, config.n_genes))
    if genes is not None:
        _check_share(genes, totals, source, config)
    if not copied and source.counts_in == "X":
        return adata, source
    if copied:
        matrix = sparse.vstack(parts, format="csr")
    else:
        matrix = adata.raw.X if source.counts_in == "raw" else adata.layers[source.counts_in]
    return AnnData(matrix, obs=adata.obs, obsm=dict(adata.obsm)), source


def _genes_of_columns(source: Source, config: PreTrainedConfig) -> np.ndarray | None:
    """Return the model's gene of each column: int64 (n_columns,), -1 if unknown; None if column j is gene j."""
    if config.gene_ids is None:
        if source.shape[1] != config.n_genes:
            raise ValueError(
                f"{source.counts_in} has {source.shape[1]} genes, but the model reads {config.n_genes} genes without "
                "names (config.gene_ids): pass the columns of its training, in their order."
            )
        return None
    wanted = pd.Index(strip_versions(config.gene_ids))
    names = (source.genes.gene_ids, source.genes.symbols)
    if any(np.array_equal(some, wanted) for some in names):
        return None
    if not wanted.is_unique:
        raise ValueError(
            f"The model reads multiple columns named {wanted[wanted.duplicated()][0]}, which differ only in their "
            "order: pass the columns of its training, in their order."
        )
    return GeneMatcher(config.gene_ids, {}).find_columns(*names).astype(np.int64)


def _renaming(genes: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Return the matrix (n_columns, n_genes) that maps columns to genes, and sums columns of one gene."""
    columns = np.flatnonzero(genes >= 0)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), (columns, genes[columns])), (len(genes), n_genes))


def _check_share(genes: np.ndarray, totals: np.ndarray, source: Source, config: PreTrainedConfig) -> None:
    """Check that the data have the model's genes, and log what they lack; `totals` are those of the columns."""
    known = genes >= 0
    share = totals[known].sum() / totals.sum() if totals.any() else known.mean()
    found = np.unique(genes[known])
    n_found = len(found)
    coverage = {"counts": share, **coverage_of(found, config.n_genes)}
    limits = (MIN_COVERAGE, WARN_COVERAGE)
    check_coverage(coverage, n_found, config.gene_ids, source.genes.gene_ids, *limits, adjustable=False)
    if not known.all():
        logger.warning(
            f"The model knows {known.sum()} of {len(genes)} genes of the data ({share:.1%} of the counts); the others "
            "are left out."
        )
    if n_found < known.sum():
        logger.warning(f"{known.sum() - n_found} columns have the same gene as another column; they are summed.")
    if n_found < config.n_genes:
        logger.warning(
            f"{config.n_genes - n_found} of the model's {config.n_genes} genes are not in the data, and are set to 0."
        )
