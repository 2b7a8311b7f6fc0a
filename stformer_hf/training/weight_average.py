"""A moving average of the weights, which is evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "weight_average.safetensors"  # in a checkpoint


class WeightAverage:
    r"""Exponential moving average of a model's parameters.

    After each step :math:`a \leftarrow d a + (1 - d) w`; it starts at the weights before the first step. With the
    decay :math:`d`, above 0 and below 1, the average is over about :math:`1 / (1 - d)` steps.

    Notes
    -----
    Polyak and Juditsky 1992; with this decay, Tarvainen and Valpola 2017 (Mean Teacher).
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"ema is the decay of a moving average, above 0 and below 1, such as 0.999; got {decay}.")
        self.decay = decay
        self._average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Start at the weights of a model."""
        self._average = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step to the average."""
        for name, weight in model.named_parameters():
            self._average[name].lerp_(weight.detach().float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Replace the weights of a model by the average."""
        for name, weight in model.named_parameters():
            weight.copy_(self._average[name])

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Replace the weights of a model by the average within the context, then restore them."""
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: values.cpu().contiguous() for name, values in self._average.items()}, folder / FILE)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read the average of a checkpoint; raise a ValueError if it has none, or that of another model."""
        if not (folder / FILE).exists():
            raise ValueError(f"{folder} has no {FILE}: resume without ema, or start a new run.")
        found = load_file(folder / FILE)
        weights = dict(model.named_parameters())
        if found.keys() != weights.keys():
            raise ValueError(
                f"{folder / FILE} belongs to another model: the names of its {len(found)} weights and of the "
                f"{len(weights)} weights of this model differ."
            )
        self._average = {name: values.to(weights[name].device) for name, values in found.items()}


class AverageWeights(TrainerCallback):
    """Update the average after each step, and copy it to the model at the end of training."""

    def __init__(self, trainer: Trainer, average: WeightAverage):
        self.trainer, self.average = trainer, average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the average."""
        self.average.update(self.trainer.model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the average to the model; that of the best checkpoint if Trainer has loaded its weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.average.load(Path(state.best_model_checkpoint), self.trainer.model)
        self.average.copy_to(self.trainer.model)
