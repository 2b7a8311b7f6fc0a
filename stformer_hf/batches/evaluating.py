"""A model in evaluation mode, and the tokens that it needs to read then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..models.gene_bert.modeling_gene_bert import GeneBertModel
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a


@contextmanager
def evaluating(model: nn.Module, device: str | torch.device | None = None) -> Iterator[nn.Module]:
    """Put a model into evaluation mode, and on a device if one is given; restore both afterwards.

    The mode of each module is restored separately, so that a part that is kept in evaluation mode while the rest is
    trained stays in it. A model on multiple devices is never moved. Yields the model.
    """
    training = {module: module.training for module in model.modules()}
    before = {parameter.device for parameter in model.parameters()}
    moves = device is not None and len(before) == 1
    try:
        model.eval()
        if moves:
            model.to(device)
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode
        if moves:
            model.to(before.pop())


def length_to_read(encoder: nn.Module, tokenizer: GeneTokenizer, *poolings: str) -> int | None:
    """Return how many tokens of a cell to read: all (None), or as few as possible where `[CLS]` alone counts.

    It does if it is the only state to pool, and a function of the whole cell (`GeneBertModel.reads_cls_alone`).
    """
    if set(poolings) != {"cls"} or not is_a(encoder, GeneBertModel) or not encoder.reads_cls_alone():
        return None
    n_special = tokenizer.add_cls + tokenizer.add_eos + (tokenizer.separator is not None)
    n_genes = 1 + tokenizer.neighborhood  # one of the cell, and one of its neighbours
    return n_special + len(tokenizer.included_phenotypes) + n_genes
