"""Context manager for a model in evaluation mode, on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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


__all__ = ["evaluating"]
