"""Callbacks of CellTrainer in Trainer's loop; `SetEpoch` is for transformers' Trainer too."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

logger = logging.getLogger(__name__)


class SetEpoch(TrainerCallback):
    """Set the epoch of a trainer or a collator before the batches of the epoch are read.

    With transformers' Trainer, `callbacks=[SetEpoch(collator)]` makes masks and gene dropout a function of (seed,
    epoch, `cell_id`), as `CellTrainer` does, independent of batches, workers, processes and resumption. `of` is any
    object with `set_epoch`.

    Trainer removes the column `cell_id` of tokenized cells, unless `TrainingArguments(remove_unused_columns=False)`
    keeps it. Without it, masks are drawn for a checksum of the tokens: as reproducible, but others than those of
    `CellTrainer`, and the same ones for cells with the same tokens. Cells of a store keep their `cell_id`.
    """

    def __init__(self, of: Any):
        self.of = of

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch; after a resumption `state.epoch` is a fraction within the current epoch."""
        self.of.set_epoch(math.floor(state.epoch + 1e-9))


class SaveOnSignal(TrainerCallback):
    """Save a checkpoint and stop after the step in which SIGTERM or SIGINT arrives.

    Schedulers send SIGTERM before they reclaim a machine; Ctrl-C sends SIGINT, and a second one interrupts at once.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._came: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._sent: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the handlers, in the main thread only; a trial of a search saves nothing, and keeps the defaults."""
        self._came = self._sent = self.trainer.interrupted = None
        if threading.current_thread() is threading.main_thread() and self.trainer.hp_search_backend is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers.setdefault(number, signal.signal(number, self._come))

    def _come(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._came is not None:
                raise KeyboardInterrupt
            logger.warning("Saving a checkpoint after this step. Press Ctrl-C again to stop without one.")
        self._came = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop all processes after the same step, whichever of them received the signal.

        Multiple processes stop one step later: they exchange signals in one step and read them in the next, so that
        none has to wait for its GPU.
        """
        came = int(self._came or 0)
        if args.world_size > 1:
            came = self._exchange(came, args.device)
        if came:
            self.trainer.interrupted = signal.Signals(came)
            control.should_save = control.should_training_stop = True

    def _exchange(self, came: int, device: torch.device) -> int:
        """Send a signal to all processes, and return the one that they sent in the step before; 0 is none."""
        of_all = self.trainer.accelerator.gather(torch.full((1,), came, device=device)).max()
        before, event = self._sent, torch.cuda.Event() if of_all.device.type == "cuda" else None
        self._sent = of_all.to("cpu", non_blocking=True), event
        if event is not None:
            event.record()
        if before is None:
            return 0
        sent, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return int(sent)

    def stop_listening(self) -> None:
        """Restore the previous handlers; called after training, however it ended."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def take_back_signals(trainer: Trainer) -> None:
    """Remove Trainer's `enable_jit_checkpoint` callback: `SaveOnSignal` saves in any case."""
    callback = trainer.pop_callback(JITCheckpointCallback)
    if callback is not None and callback.jit_manager is not None:
        signal.signal(signal.SIGTERM, callback.jit_manager._original_sigterm_handler)


class FillHubFolder(TrainerCallback):
    """Add the card and the model's code to a pushed checkpoint, which Trainer leaves out."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the code from the checkpoint, if there is one, and write the card."""
        if self.trainer.is_world_process_zero():
            for code in (Path(args.output_dir) / f"checkpoint-{state.global_step}").glob("*.py"):
                shutil.copy(code, args.output_dir)
            self.trainer.create_model_card()
