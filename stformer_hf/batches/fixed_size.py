"""Packed batches of one size, so that a compiled training step is compiled once for a whole run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.gene_bert.configuration_gene_bert import IGNORE

_MULTIPLE = 64  # of a row's length, and of the number of label positions


class FixedSize(NamedTuple):
    """Size of a packed batch."""

    n_tokens: int  # at most
    n_cells: int  # at most
    longest: int  # maximum number of tokens of a cell
    n_labels: float  # expected in a full batch
    pad_token_id: int  # of a dead token


def to_fixed_size(batch: dict[str, Any], size: FixedSize) -> dict[str, Any]:
    """Fill up a packed batch with dead tokens in segments of their own, so that all batches have the same shapes.

    The row is as long as the smallest multiple of 64 above `size.n_tokens`: its last token is always dead. A dead
    segment is at most as long as a cell may be; most batches have one. Further segments are empty.

    Parameters
    ----------
    batch : dict
        Output of `pack`, of n cells.
    size : FixedSize

    Returns
    -------
    dict
        The same keys. Dead tokens have the id `size.pad_token_id`, type and value 0, label -100, and -1 in `seq_idx`.
        `cu_seq_lens_q`, `cu_seq_lens_k` and `cell_indptr` have the cells first, then the dead and the empty segments.
        `cell_genes` and `cell_counts` are filled up with counts of 0 to `size.n_tokens`, or twice, four times … as
        many. `max_length_q` and `max_length_k` are `size.longest`. `predicted_positions` are filled up with the last
        position.

    Raises
    ------
    ValueError
        There are more tokens or cells than the size admits.
    """
    cuts = batch["cu_seq_lens_q"].numpy()
    n_cells, n_tokens = len(cuts) - 1, int(cuts[-1])
    if n_tokens > size.n_tokens or n_cells > size.n_cells:
        raise ValueError(
            f"A batch has {n_tokens} tokens in {n_cells} cells, more than pad_packed_to=({size.n_tokens}, "
            f"{size.n_cells}): raise it, or limit the sampler (max_tokens_per_batch, max_cells)."
        )
    length = (size.n_tokens // _MULTIPLE + 1) * _MULTIPLE
    longest = max(min(size.longest, length), batch["max_length_q"])
    n_segments = size.n_cells + -(-length // max(1, min(size.longest, length)))  # enough if all tokens are dead
    ends = np.minimum(n_tokens + longest * np.arange(1, n_segments - n_cells + 1), length)
    cuts = torch.from_numpy(np.concatenate([cuts, ends]).astype(np.int32))
    dead = {"input_ids": size.pad_token_id, "labels": IGNORE, "seq_idx": -1}
    full = dict(batch)
    for name in ("input_ids", "token_type_ids", "expression_values", "labels", "seq_idx"):
        if name in batch:
            full[name] = _filled(batch[name], length, dead.get(name, 0), dim=1)
    full.update(cu_seq_lens_q=cuts, cu_seq_lens_k=cuts, max_length_q=longest, max_length_k=longest)
    if "predicted_positions" in batch:
        # Labels are drawn independently: six standard deviations above their mean are hardly ever too few.
        room = math.ceil((size.n_labels + 6 * math.sqrt(size.n_labels) + 1) / _MULTIPLE) * _MULTIPLE
        room *= max(1, -(-len(batch["predicted_positions"]) // room))
        full["predicted_positions"] = _filled(batch["predicted_positions"], room, length - 1)
    if "cell_indptr" in batch:
        n_entries = size.n_tokens
        while n_entries < batch["cell_genes"].shape[1]:
            n_entries *= 2
        for name in ("cell_genes", "cell_counts"):
            full[name] = _filled(batch[name], n_entries, 0, dim=1)
        full["cell_indptr"] = _filled(batch["cell_indptr"], n_segments + 1, n_entries)
    if "measured_genes" in batch:
        full["measured_genes"] = _filled(batch["measured_genes"], n_segments, True)
    return full


def fill_labels(labels: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Return labels of cells with -100 for the dead and the empty segments of a batch."""
    return _filled(labels, len(batch["cu_seq_lens_q"]) - 1, IGNORE)


def _filled(values: torch.Tensor, length: int, value: Any, dim: int = 0) -> torch.Tensor:
    shape = list(values.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([values, values.new_full(shape, value)], dim=dim)
