"""Collate neighbourhoods of cells, with brainformr's masks or in a packed form without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..store.worker_slots import CollatedBatch
from .neighborhood_batch import NeighborhoodBatch, NeighborhoodMetadata


def collate_neighborhoods(
    items: NeighborhoodBatch | Sequence[NeighborhoodMetadata], packed: bool = False
) -> dict[str, Any]:
    """Collate neighbourhoods; also named `collate`.

    There are B items with N observed cells in total, and G genes. Any or all items may have no observed cells.

    Parameters
    ----------
    items : NeighborhoodBatch or sequence of NeighborhoodMetadata
        Batch from a `DataLoader` over a `CenterMaskSampler`, or a sequence of items.
    packed : bool, default: False
        Return the boundaries of neighbourhoods instead of masks, whose memory grows with the square of N, and keep the
        expression of observed cells sparse if it is stored sparse.

    Returns
    -------
    dict
        `observed_expression` (N, G) and `masked_expression` (B, G), float32; `observed_cell_type` (N,) and
        `masked_cell_type` (B,), int64; `observed_neighboorhood_lens`, list of B int; `bs`, B. `cell_embeds` (N, d),
        float32, if the sampler has them.

        If packed: `cu_seq_lens`, int32 (B + 1,): item i has the observed cells `cu_seq_lens[i]:cu_seq_lens[i + 1]`.
        `segment_ids`, int32 (N,): the item of each observed cell. `max_length`, int: cells of the largest item. From
        a `NeighborhoodBatch` with sparse expression, there is no `observed_expression`, but its rows, with E values
        that are not 0: `observed_indptr`, int32 (N + 1,): observed cell i has the values
        `observed_indptr[i]:observed_indptr[i + 1]`; `observed_genes`, int32 (E,), their genes; `observed_values`,
        float32 (E,); `n_genes`, int, G.

        Else: bool masks, True where attention is not allowed. They cover the N observed cells, then B cls tokens, then
        B queries; those of item i are in its segment. `full_mask` (N + 2B, N + 2B) allows attention within segments.
        `encoder_mask` (N + B, N + B) is its top left, as a view. `pooling_mask` (B, N + B): row i allows the observed
        cells of item i, or nothing if it has none. `decoder_mask` (2B, 2B), for cls tokens and queries: allows the
        other one of the same item, but not the token itself.

    Raises
    ------
    ValueError
        There are no items; items differ in their genes, or their arrays or numbers of cells do not fit. Expression has
        one row per cell, or is flat (n * G,), like the (0,) of no cells in brainformr.
    """
    if not len(items):
        raise ValueError("A batch needs at least one neighbourhood.")
    batch = _tensors(items, packed) if isinstance(items, NeighborhoodBatch) else _stacked(items)
    lengths = batch.pop("lengths")
    batch["observed_neighboorhood_lens"] = lengths.tolist()
    if packed:
        batch["cu_seq_lens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        batch["segment_ids"] = torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
        batch["max_length"] = int(lengths.max())
        return CollatedBatch({**batch, "bs": len(lengths)})
    return {**batch, **_masks(lengths), "bs": len(lengths)}  # masks are views of one, which a slot would copy


collate = collate_neighborhoods


def _tensors(batch: NeighborhoodBatch, packed: bool) -> dict[str, Any]:
    n_cells, rows = len(batch.observed_cell_type), batch.expression
    observed: dict[str, Any]
    if packed and not isinstance(rows, np.ndarray):
        n_values = rows.indptr[n_cells]
        observed = {
            "observed_indptr": torch.from_numpy(rows.indptr[: n_cells + 1].astype(np.int32)),
            "observed_genes": torch.from_numpy(rows.indices[:n_values].astype(np.int32, copy=False)),
            "observed_values": torch.from_numpy(rows.data[:n_values]),
            "n_genes": rows.shape[1],
        }
        masked = rows[n_cells:].toarray()
    else:
        dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
        observed, masked = {"observed_expression": torch.from_numpy(dense[:n_cells])}, dense[n_cells:]
    tensors = {
        # First, since Trainer takes the size of a batch from its first tensor.
        "masked_expression": torch.from_numpy(masked),
        **observed,
        "observed_cell_type": torch.from_numpy(batch.observed_cell_type),
        "masked_cell_type": torch.from_numpy(batch.masked_cell_type),
        "lengths": np.diff(batch.indptr),
    }
    if batch.cell_embeds is not None:
        tensors["cell_embeds"] = torch.from_numpy(batch.cell_embeds)
    return tensors


def _stacked(items: Sequence[NeighborhoodMetadata]) -> dict[str, Any]:
    masked = [np.asarray(item.masked_expression, np.float32).ravel() for item in items]
    observed = [np.asarray(item.observed_expression, np.float32) for item in items]
    types = [np.asarray(item.observed_cell_type, np.int64).ravel() for item in items]
    n_genes = len(masked[0])
    for number, (item, one, rows, own) in enumerate(zip(items, masked, observed, types, strict=True)):
        fits = rows.shape in ((len(own), n_genes), (len(own) * n_genes,))
        if len(one) != n_genes or not fits or item.num_cells_obs != len(own):
            raise ValueError(
                f"Item {number} has {len(own)} cell types, num_cells_obs={item.num_cells_obs}, an "
                f"observed_expression of shape {rows.shape} and a masked cell of {len(one)} genes; the first item has "
                f"{n_genes} genes."
            )
    of_cells = [rows.reshape(len(own), n_genes) for rows, own in zip(observed, types, strict=True)]
    masked_types = [np.asarray(item.masked_cell_type, np.int64).reshape(1) for item in items]
    return {
        "masked_expression": torch.from_numpy(np.stack(masked)),
        "observed_expression": torch.from_numpy(np.concatenate(of_cells)),
        "observed_cell_type": torch.from_numpy(np.concatenate(types)),
        "masked_cell_type": torch.from_numpy(np.concatenate(masked_types)),
        "lengths": np.array([len(own) for own in types], np.int64),
    }


def _masks(lengths: np.ndarray) -> dict[str, torch.Tensor]:
    """Make the masks of items from their numbers of observed cells."""
    n_items, n_cells = len(lengths), int(lengths.sum())
    n_tokens = n_cells + n_items
    full = np.ones((n_cells + 2 * n_items, n_cells + 2 * n_items), bool)
    pooling = np.ones((n_items, n_tokens), bool)
    stops = np.cumsum(lengths)
    for item, (start, stop) in enumerate(zip((stops - lengths).tolist(), stops.tolist(), strict=True)):
        own = slice(start, stop)
        pooling[item, own] = False
        for rows in (own, n_cells + item, n_tokens + item):
            for columns in (own, n_cells + item, n_tokens + item):
                full[rows, columns] = False
    decoder = np.ones((2 * n_items, 2 * n_items), bool)
    each = np.arange(n_items)
    decoder[each, n_items + each] = decoder[n_items + each, each] = False
    full = torch.from_numpy(full)
    return {
        "full_mask": full,
        "encoder_mask": full[:n_tokens, :n_tokens],
        "pooling_mask": torch.from_numpy(pooling),
        "decoder_mask": torch.from_numpy(decoder),
    }
