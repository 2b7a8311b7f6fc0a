"""A trainer whose runs resume where they stopped, from complete checkpoints of the same cells in the same order."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..batches.stream_batches import part_of
from ..models.gene_bert.modeling_gene_bert import GeneBertForPhenotypicMLM
from ..models.gene_bert.pretrained_gene_bert import GeneBertPreTrainedModel
from ..models.remote_code import is_a
from .calibration import OutOfFold, replace_out_of_fold, sign
from .callbacks import FillHubFolder, SaveOnSignal, take_back_signals
from .checkpoints import check_complete, check_same_meaning, checkpoint_to_resume, mark_unfinished
from .float_weights import keep_in_float32
from .loading import MODEL_CONFIG, unwrap
from .loss_trainer import LossTrainer
from .process_group import leave_gloo_at_exit

_ORDER = "CellOrder"  # among the states of callbacks in trainer_state.json


class ResumableTrainer(LossTrainer):
    """Trainer that resumes from complete checkpoints, and saves one when a signal stops it; see `CellTrainer`."""

    _train_batch_size: int  # set by Trainer

    _trains_cls = False  # whether an objective reads `[CLS]`

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        leave_gloo_at_exit()
        self.interrupted: signal.Signals | None = None
        self.out_of_fold: OutOfFold | dict[str, OutOfFold] | None = None  # of the trained model; saved beside it
        self._stream_mark: dict[str, Any] | None = None  # where the next batch of a stream is read from
        take_back_signals(self)
        self._on_signal = SaveOnSignal(self)
        self.add_callback(self._on_signal)
        self.add_callback(FillHubFolder(self))

    def _order(self) -> dict[str, Any]:
        """Return the arguments that decide which cells are in each step; for trainers of cells to override."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does; True resumes from the last complete checkpoint, or starts if there is none.

        Raises
        ------
        FileExistsError
            `resume_from_checkpoint` is True, and `output_dir` holds a model but no checkpoint.
        ValueError
            The checkpoint was made with other cells, or another order of them, or its weights mean other genes or
            classes; its optimizer is missing.
        """
        if resume_from_checkpoint is True:
            found = checkpoint_to_resume(self.args.output_dir)
            resume_from_checkpoint = None if found is None else str(found)
        self._stream_mark = None
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            check_complete(checkpoint)
            check_same_meaning(checkpoint, getattr(self.model, "config", None))
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            if self.args.auto_find_batch_size:  # as Trainer restores it
                self._train_batch_size = state.get("train_batch_size") or self._train_batch_size
            self._check_order(checkpoint, state.get("stateful_callbacks", {}))
            self._resume_cls_state(checkpoint)
            mark = checkpoint / self._stream_mark_file
            if mark.exists():
                self._stream_mark = json.loads(mark.read_text())
        if self.model_init is None:  # else call_model_init does it
            self._prepare_weights(self.model)
        if self.args.world_size > 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # An evaluation before marks the bare model, which accelerate then takes for one that is wrapped already:
            # each process would learn alone.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._on_signal.stop_listening()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        if resume_from_checkpoint is not None and self.args.auto_find_batch_size:  # which may have lowered it again
            self._check_order(resume_from_checkpoint, self.state.stateful_callbacks)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _resume_cls_state(self, checkpoint: Path) -> None:
        """Let the layers change `[CLS]` in a run whose checkpoint does not say that it is fixed."""
        config, file = getattr(self.model, "config", None), checkpoint / "config.json"
        if config is not None and getattr(config, "cls_state", "layers") is None and file.exists():
            config.cls_state = json.loads(file.read_text()).get("cls_state") or "layers"

    def _prepare_weights(self, model: PreTrainedModel) -> None:
        """Keep float32 weights, and a `[CLS]` that no loss reads."""
        if is_a(model, GeneBertPreTrainedModel) and model.config.cell_embedding:
            config, encoder = model.config, model.base_model
            is_masked = is_a(model, GeneBertForPhenotypicMLM)
            if is_masked and config.cls_state is None and not self._trains_cls and encoder.adds_nothing():
                config.cls_state = "fixed"
            if config.cls_state == "fixed":
                for name in ("cell_embedding", "final_norm"):  # or DDP would wait for their gradients
                    getattr(encoder, name, nn.Module()).requires_grad_(False)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # which keep float32 weights of their own
            keep_in_float32(model, autocast=self.args.bf16 or self.args.fp16)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them as Trainer does; say what to do if the run of the checkpoint trained other parameters."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint}: its run trained other parameters than this one ({error}). Resume with the same "
                "optimizer and frozen layers; if they are the same, the checkpoint is of an earlier version: load its "
                "weights with from_pretrained and start a new run."
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as Trainer does; a weight that is tied to another is not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as Trainer does; a resumed run that was finished makes no further step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _check_order(self, checkpoint: str | Path, states: Mapping[str, Any]) -> None:
        """Raise a ValueError for a checkpoint from which cells of the epoch would be repeated or skipped.

        It was made with other cells or arguments, as its states of callbacks say.
        """
        saved = states.get(_ORDER)
        if saved is None or self.args.ignore_data_skip:
            return
        order = self._order()
        if "train_dataset" not in saved:  # a checkpoint of an earlier version
            order.pop("train_dataset", None)
        other = [name for name in order if saved.get(name) != order[name]]
        if other:
            found = "; ".join(f"{name} was {saved.get(name)} and is {order[name]}" for name in other)
            raise ValueError(
                f"{checkpoint}: {found}. Cells of the epoch would be repeated or skipped: resume with the same, "
                "or pass ignore_data_skip=True to restart the epoch."
            )

    @property
    def _stream_mark_file(self) -> str:
        """File of the position in a stream, in a checkpoint: one for each process that reads a part of its own."""
        rank, n_parts = part_of(self.train_dataset)
        return "stream_mark.json" if n_parts == 1 else f"stream_mark_{rank}.json"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            self.state.stateful_callbacks[_ORDER] = self._order()
            mark_unfinished(checkpoint)
            self._save_more(checkpoint)
        self.accelerator.wait_for_everyone()
        if self._stream_mark is not None and (self.args.should_save or part_of(self.train_dataset)[1] > 1):
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / self._stream_mark_file).write_text(json.dumps(self._stream_mark))
        super()._save_checkpoint(model, trial)

    def _save_more(self, checkpoint: Path) -> None:
        """Write what a trainer adds to a checkpoint, in the process that saves; for subclasses to override."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as Trainer does, with the out-of-fold predictions; beside an adapter the configuration of its model.

        That configuration names the outputs. Out-of-fold predictions of an earlier model are removed.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(output_dir or self.args.output_dir)
        card = folder / "README.md"
        card_before = card.read_bytes() if card.exists() else None
        super()._save(output_dir, state_dict)
        if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            is_whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # else no process has all weights
            if self.out_of_fold is not None and is_whole:
                sign(self.out_of_fold, unwrap(self.model, merge=True))
            replace_out_of_fold(folder, self.out_of_fold)
        if hasattr(model, "peft_config"):
            model.config.to_json_file(folder / MODEL_CONFIG, use_diff=False)
            # PEFT writes an empty card, or changes the card of this package, which would then count as edited.
            if card_before is None:
                card.unlink(missing_ok=True)
            else:
                card.write_bytes(card_before)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process now marks the checkpoint as complete
