"""LogLines: one readable line per log of a trainer, beside the progress bar; and lines about the time that is left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

logger = logging.getLogger(__name__)

_SHARES = ("share", "accuracy", "f1", "mfu")
# Numbers that nobody looks at while a run is going on; they stay in trainer_state.json and the reports.
_LEFT_OUT = ("total_flos", "grad_norm", "epoch")
_SHORT = 20  # seconds: a shorter wait needs no line
_LEFT_OUT_ENDS = (
    *("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time", "peak_memory_gb"),
    *("uniform_nll", "b0_nll", "own_context_nll", "swapped_context_nll"),  # the gap of the last two is shown
)
_NOT_OF_A_CLASS = ("eval_loss", "train_loss", "uniform_nll", "marginal_nll", "context_nll")
_SMALL = 0.05  # shares of padding and of waiting for data below this are not shown


class LogLines(ProgressCallback):
    """Progress bar of Trainer that writes `step 20/300 | loss 1.234 | 640 cells/s | 1 min left` for each log.

    It takes the place of Trainer's ProgressCallback and PrinterCallback, which write dicts. Without a bar
    (`disable_tqdm`) the lines are printed.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, and start the clock."""
        self._start, self._first_step, self.current_step = time.monotonic(), state.global_step, state.global_step
        if state.max_steps and not args.disable_tqdm:  # a classifier may be left at its start
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Advance the bar of an evaluation."""
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line."""
        if not state.is_world_process_zero or not logs or ("train_loss" in logs and not state.global_step):
            return  # no step was taken
        parts = [f"step {state.global_step}/{state.max_steps}" if state.max_steps else "", *describe_logs(logs)]
        n_steps = state.global_step - self._first_step if hasattr(self, "_first_step") else 0
        if n_steps > 0 and state.global_step < state.max_steps:
            left = (time.monotonic() - self._start) / n_steps * (state.max_steps - state.global_step)
            parts.append(f"{_duration(left)} left")
        line = " | ".join(filter(None, parts))
        bar = self.prediction_bar if self.training_bar is None else self.training_bar
        bar.write(line) if bar is not None else print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def without_details(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log without what few people look at; it stays in trainer_state.json and the reports.

    Small shares of padding and waiting are left out, and the losses of a single class of tokens, which are the loss.
    """
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, Real)}
    total = numbers.get("loss", numbers.get("eval_loss", math.nan))
    of_classes = [name for name in logs if name.endswith(("_loss", "_nll")) and not name.endswith(_NOT_OF_A_CLASS)]
    one_class = len({name.rsplit("_", 1)[0] for name in of_classes}) == 1
    found = {}
    for name, value in logs.items():
        number = numbers.get(name, math.nan)
        is_small = name.endswith(("padding_share", "wait_share")) and number < _SMALL
        is_total = one_class and name in of_classes and math.isclose(number, total, rel_tol=1e-2)
        if not (name in _LEFT_OUT or name.endswith(_LEFT_OUT_ENDS) or is_small or is_total):
            found[name] = value
    return found


def describe_logs(logs: Mapping[str, Any]) -> list[str]:
    """Return the entries of a log as text, such as `loss 1.234` and `640 cells/s`, without details."""
    found = []
    for name, value in without_details(logs).items():
        text = name.removesuffix("_per_second").replace("_", " ")
        if name.endswith("_per_second") and isinstance(value, Real):
            found.append(f"{float(value):,.0f} {text}/s")
        elif name.endswith(_SHARES) and isinstance(value, float):
            found.append(f"{text} {value:.1%}")
        else:
            found.append(f"{text} {value:.4g}" if isinstance(value, float) else f"{text} {value}")
    return found


def log_wait(what: str, seconds: float) -> None:
    """Log about how long something takes, if it takes long: where there is no terminal, no progress bar shows it."""
    if seconds > _SHORT:
        logger.info(f"{what} takes about {_duration(seconds)}.")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
