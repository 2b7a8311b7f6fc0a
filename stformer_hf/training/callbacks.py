"""What CellTrainer does at moments of Trainer's loop."""

from __future__ import annotations

import math
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .cell_trainer import CellTrainer


class SetEpoch(TrainerCallback):
    """Tells the trainer which epoch begins, before the epoch's batches are read."""

    def __init__(self, trainer: CellTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch; after a resumption `state.epoch` is a fraction into the epoch that goes on."""
        self.trainer.set_epoch(math.floor(state.epoch + 1e-9))


class SaveOnSigterm(TrainerCallback):
    """Saves and stops after the step in which SIGTERM comes, as schedulers send it before they take a machine away."""

    def __init__(self, trainer: CellTrainer):
        self.trainer, self._came, self._handler = trainer, False, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen; only the main thread may. A trial of a search has nothing to save: a signal ends it as ever."""
        self._came = self.trainer.interrupted = False
        if threading.current_thread() is threading.main_thread() and self.trainer.hp_search_backend is None:
            self._handler = signal.signal(signal.SIGTERM, self._come)

    def _come(self, *_) -> None:
        self._came = True

    def on_step_end(self, args, state, control, **kwargs):
        """Stop all processes after the same step, whichever of them was told."""
        came = self._came
        if args.world_size > 1:
            told = torch.tensor(int(came), device=args.device)
            came = bool(self.trainer.accelerator.reduce(told, "sum"))
        if came:
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True

    def stop_listening(self) -> None:
        """Listen no longer; called after the training, whichever way it ended."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None


class FillHubFolder(TrainerCallback):
    """Puts beside the weights what Trainer leaves out where it pushes a checkpoint: the card, and the model's code."""

    def __init__(self, trainer: CellTrainer):
        self.trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs):
        """Copy the code from the checkpoint, where there is one, and write the card."""
        if self.trainer.is_world_process_zero():
            for code in (Path(args.output_dir) / f"checkpoint-{state.global_step}").glob("*.py"):
                shutil.copy(code, args.output_dir)
            self.trainer.create_model_card()


__all__ = ["FillHubFolder", "SaveOnSigterm", "SetEpoch"]
