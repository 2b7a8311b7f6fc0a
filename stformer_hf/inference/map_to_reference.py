"""Map cells onto a labelled reference: nearest neighbours in the embedding of a model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from .. import __version__
from ..genes.wrong_names import warn_of_missing
from ..models.gene_bert.heads import default_pooling
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore
from .batches import load, table_of
from .embed import embed_and_count
from .nearest_cells import NearestCells, import_faiss
from .rejection import UNKNOWN, check_reject, rejection_thresholds

logger = logging.getLogger(__name__)

N_NEIGHBORS = 15
_HALF = ("bfloat16", "float16")
REFERENCE_FILE, _ARRAYS = "reference.json", "reference.safetensors"


class Reference(NamedTuple):
    """Labelled cells in the embedding of a model."""

    embedding: np.ndarray  # float32 (n_cells, d)
    labels: pd.Categorical  # (n_cells,), all known
    names: np.ndarray  # of the cells: str (n_cells,)
    fingerprint: str  # of the model, see `fingerprint_of`
    dtype: str | None  # in which the embedding was computed; None if a saved reference does not say it


def map_to_reference(
    query: AnnData | CellStore,
    reference: AnnData | CellStore | str | Path,
    model: str | PreTrainedModel,
    *,
    label_key: str | None = None,
    tokenizer: GeneTokenizer | None = None,
    n_neighbors: int = N_NEIGHBORS,
    approximate: bool = False,
    reject: float | None = None,
    key_added: str = "mapped",
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    min_coverage: float | None = None,
    distributed: bool = False,
) -> AnnData | None:
    """Label the cells of a query by their nearest neighbours in a labelled reference.

    Parameters
    ----------
    query : AnnData, MuData, SpatialData or CellStore
        Cells with raw counts in X, raw or a layer.
    reference : AnnData, MuData, SpatialData, CellStore, str or Path
        Cells with raw counts and labels; or a folder written by `save_reference`.
    model : str or PreTrainedModel
        As for `embed`.
    label_key : str, optional
        Column of the reference's obs, categories, text or whole numbers. Cells without a label or without a known
        gene are left out. A saved reference has its own labels.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    n_neighbors : int, default: 15
        Neighbours of each cell, at most the number of cells of the reference - 1.
    approximate : bool, default: False
        Search for neighbours in the nearest clusters of the reference alone, by faiss (extra `faiss`), which is faster
        for many cells; see `NearestCells`. By default neighbours are exact.
    reject : float, optional
        Nominal share of the known cells to label "unknown", such as 0.05. A cell is rejected if it is further from its
        neighbours than all but this share of the reference's own cells with the same label (from theirs, without
        themselves). By default no cell is rejected.
    key_added : str, default: "mapped"
        Prefix of the results. In `query.obs`: `mapped_label` (categorical), `mapped_score`, the share of the
        neighbours' weights that have this label, and `mapped_distance`, the mean distance to the neighbours (both
        float32). In `query.obsm`: `mapped_neighbors`, a DataFrame (n_obs, n_neighbors) of the names of the
        neighbours, the nearest first, and `mapped_neighbor_distances`, float32. They are missing (names: "") for a
        cell without a known gene. Settings go to `query.uns["mapped"]`.
    layer, fractional, batch_size, device, dtype, min_coverage, distributed
        As for `embed`. `layer` is that of the query. By default, `dtype` is that of a saved reference; with another
        one, a warning is logged.

    Returns
    -------
    AnnData or None
        For a store an AnnData with its obs and genes, without counts, that holds the results; otherwise None.

    Raises
    ------
    ValueError
        The reference belongs to another model; the column is missing, or holds fractions; fewer than two cells of
        the reference have a label and a known gene; as for `embed`.
    FileNotFoundError
        The checkpoint, or the folder of the reference, does not exist.
    ImportError
        `approximate`, and faiss is not installed.
    TypeError
        `query` or `reference` does not hold cells, or `model` is not a model.

    Notes
    -----
    Both embeddings are written to `obsm["X_stformer"]`. Neighbours are those by Euclidean distance, weighted by
    1 / distance; at distance 0, only the neighbours at distance 0 count. The share of rejected cells holds for
    cells that are exchangeable with the reference, which those of another donor, plate or protocol are not.
    """
    table = table_of(query, layer)
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors}: must be at least 1.")
    if approximate:
        import_faiss()  # before the cells are read
    encoder, tokenizer = load(model, tokenizer, AutoModel, min_coverage)
    settings: dict[str, Any] = {
        "fractional": fractional,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "distributed": distributed,
    }
    if isinstance(reference, (str, os.PathLike)):
        if label_key is not None:
            raise ValueError(f"{reference} already has labels: leave out label_key={label_key!r}.")
        known = _load_reference(Path(reference), encoder, tokenizer)
        settings["dtype"] = _precision_for(known, encoder, dtype)
    else:
        known = _embed_reference(reference, encoder, tokenizer, label_key, settings)
    classes = list(known.labels.categories)
    check_reject(reject, classes)
    found, n_genes = embed_and_count(query, encoder, tokenizer, layer=layer, **settings)
    table = table if found is None else found

    n_shared = _n_shared(table, known, n_genes > 0)
    if n_shared:
        logger.warning(
            f"{n_shared} of {table.n_obs} cells are in the reference too (same name and embedding). They find "
            "themselves and get their own label, which does not show how well other cells are mapped."
        )
    n_neighbors = min(n_neighbors, len(known.embedding) - 1)  # of the reference too, each cell without itself
    index = NearestCells(known.embedding, n_neighbors, approximate)
    distances, rows = index.nearest(table.obsm["X_stformer"])
    shares = vote(distances, known.labels.codes[rows], len(classes))
    codes, spread = shares.argmax(axis=1), distances.mean(axis=1)
    categories = classes
    if reject is not None:
        own, own_rows = index.nearest_others()
        own_codes = vote(own, known.labels.codes[own_rows], len(classes)).argmax(axis=1)
        thresholds = rejection_thresholds(-own.mean(axis=1), own_codes, len(classes), reject)
        categories = [*classes, UNKNOWN]
        codes = np.where(-spread < thresholds[codes], len(classes), codes)
    empty = n_genes == 0
    table.obs[f"{key_added}_label"] = pd.Categorical.from_codes(np.where(empty, -1, codes), categories)
    for name, values in (("score", shares.max(axis=1)), ("distance", spread)):
        table.obs[f"{key_added}_{name}"] = np.where(empty, np.nan, values).astype(np.float32)
    columns = [f"neighbor_{i + 1}" for i in range(n_neighbors)]
    names = np.where(empty[:, None], "", known.names[rows])
    table.obsm[f"{key_added}_neighbors"] = pd.DataFrame(names, index=table.obs_names, columns=columns)
    distances[empty] = np.nan
    table.obsm[f"{key_added}_neighbor_distances"] = distances.astype(np.float32)
    table.uns[key_added] = {
        "model": table.uns["stformer"]["model"],
        "model_fingerprint": known.fingerprint,
        "n_reference": len(known.names),
        "n_neighbors": n_neighbors,
        "approximate": approximate,
        **({} if reject is None else {"reject": reject}),
        "version": __version__,
    }
    return found


def save_reference(
    reference: AnnData | CellStore,
    model: str | PreTrainedModel,
    folder: str | Path,
    label_key: str,
    *,
    tokenizer: GeneTokenizer | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Embed a labelled reference, and write it to a folder for `map_to_reference`.

    The folder holds the embedding and its precision, the labels and the names of the cells, and the fingerprint of
    the model; not the counts. Parameters are those of `map_to_reference`.

    Raises
    ------
    FileExistsError
        The folder holds a reference, and `overwrite` is False.
    """
    folder = Path(folder)
    if (folder / REFERENCE_FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a reference: choose another folder, or pass overwrite (--overwrite).")
    encoder, tokenizer = load(model, tokenizer, AutoModel)
    settings = {"fractional": fractional, "batch_size": batch_size, "device": device, "dtype": dtype}
    found = _embed_reference(reference, encoder, tokenizer, label_key, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REFERENCE_FILE).unlink(missing_ok=True)  # written last: without it the folder is not a reference
    codes = np.ascontiguousarray(found.labels.codes.astype(np.int64))
    save_file({"embedding": np.ascontiguousarray(found.embedding), "labels": codes}, str(folder / _ARRAYS))
    facts = {
        "label_key": label_key,
        "classes": list(found.labels.categories),
        "cells": found.names.tolist(),
        "model_fingerprint": found.fingerprint,
        "dtype": found.dtype,
        "version": __version__,
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(facts), encoding="utf-8")


def _load_reference(folder: Path, encoder: PreTrainedModel, tokenizer: GeneTokenizer) -> Reference:
    if not (folder / REFERENCE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {REFERENCE_FILE}: make the reference with save_reference.")
    facts = json.loads((folder / REFERENCE_FILE).read_text(encoding="utf-8"))
    fingerprint = fingerprint_of(encoder, tokenizer)
    if facts["model_fingerprint"] != fingerprint:
        raise ValueError(
            f"The reference {folder} was embedded by another model (fingerprint {facts['model_fingerprint']}, not "
            f"{fingerprint}): embeddings of two models cannot be compared. Save the reference with this model."
        )
    arrays = load_file(str(folder / _ARRAYS))
    labels = pd.Categorical.from_codes(arrays["labels"], facts["classes"])
    names = np.array(facts["cells"], dtype=object)
    return Reference(arrays["embedding"], labels, names, fingerprint, facts.get("dtype"))


def _precision_for(known: Reference, encoder: PreTrainedModel, dtype: str | None) -> str | None:
    """Return the dtype in which to embed cells that are compared with a reference: its own, unless one is given."""
    if dtype is None and known.dtype in _HALF:
        return known.dtype
    own = _computed_in(encoder, dtype)
    if known.dtype not in (None, own):
        logger.warning(
            f"The reference was embedded in {known.dtype}, and the query is in {own}: their distances also hold the "
            f"difference of both. Leave out dtype, or save the reference with dtype={own!r}."
        )
    return dtype


def _computed_in(encoder: PreTrainedModel, dtype: str | None) -> str:
    """Return the precision of an embedding: half precision if it was asked for, else that of the weights."""
    return dtype if dtype in _HALF else str(encoder.dtype).removeprefix("torch.")


def _embed_reference(
    reference: AnnData | CellStore,
    encoder: PreTrainedModel,
    tokenizer: GeneTokenizer,
    label_key: str | None,
    settings: dict,
) -> Reference:
    table = table_of(reference, None)
    if label_key is None or label_key not in table.obs:
        asked = "label_key is not given" if label_key is None else f"The reference has no obs column {label_key!r}"
        raise ValueError(f"{asked}; its columns are {', '.join(map(str, table.obs)) or 'none'}.")
    column = table.obs[label_key]
    if column.dtype.kind == "f":
        if (column.dropna() % 1 != 0).any():
            raise ValueError(
                f"{label_key!r} of the reference holds fractions, not labels. If they are labels, make them "
                "categorical, adata.obs[key].astype('category')."
            )
        column = column.astype("Int64")  # whole numbers, some of them missing
    labels = pd.Categorical(column.astype(object).map(str, na_action="ignore"))
    kept = labels.codes >= 0
    if kept.sum() < 2:
        raise ValueError(f"{kept.sum()} cells of the reference have a {label_key!r}: at least two are needed.")
    warn_of_missing(labels.categories, f"{label_key!r} of the reference")
    found, n_genes = embed_and_count(reference, encoder, tokenizer, **settings)
    table = table if found is None else found
    kept &= n_genes > 0
    if kept.sum() < 2:
        raise ValueError(
            f"{kept.sum()} cells of the reference have a {label_key!r} and counts in genes that the model knows: at "
            "least two are needed."
        )
    names = table.obs_names.to_numpy(dtype=object)[kept]
    labels = labels[kept].remove_unused_categories()
    fingerprint, dtype = fingerprint_of(encoder, tokenizer), _computed_in(encoder, settings["dtype"])
    return Reference(table.obsm["X_stformer"][kept], labels, names, fingerprint, dtype)


def _n_shared(query: AnnData, known: Reference, there: np.ndarray) -> int:
    """Return the number of cells, bool (n,), that have the name and the embedding of a cell of the reference."""
    names = pd.Index(known.names).astype(str)
    first = np.flatnonzero(~names.duplicated())
    at = names[first].get_indexer(query.obs_names.astype(str))
    rows = np.flatnonzero((at >= 0) & there)
    own, other = query.obsm["X_stformer"][rows], known.embedding[first[at[rows]]]
    return int(np.isclose(own, other, rtol=1e-3, atol=1e-4).all(axis=1).sum())


def vote(distances: np.ndarray, codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Compute the share of each class among the k neighbours of each cell, weighted by 1 / distance: (n, n_classes).

    Distances and class codes are (n, k). Where neighbours are at distance 0, only these count.
    """
    same = distances == 0
    weights = np.where(same.any(axis=1, keepdims=True), same, 1 / np.where(same, 1, distances))
    shares = np.zeros((len(distances), n_classes))
    np.add.at(shares, (np.arange(len(distances))[:, None], codes), weights)
    return shares / shares.sum(axis=1, keepdims=True)


def fingerprint_of(model: PreTrainedModel, tokenizer: GeneTokenizer) -> str:
    """Return a checksum of what the embedding of a model depends on: its encoder, pooling and tokenizer."""
    encoder = model.base_model
    found = hashlib.blake2b(f"{tokenizer.fingerprint} {default_pooling(model.config)}".encode(), digest_size=8)
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()
