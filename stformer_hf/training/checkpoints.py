"""Find complete checkpoints, and those from which a run can resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig

from .cell_heads import read_numbers
from .loading import MODEL_CONFIG, holds_model

_STATE = "trainer_state.json"  # the last file that Trainer writes into a checkpoint
_NAME = re.compile(r"checkpoint-\d+")
_MEANING = ("vocabulary_fingerprint", "problem_type", "gene_ids", "cell_types")  # fields of a configuration
_MOST = 200  # characters of a value in an error
# Files and folders of torch, FSDP and DeepSpeed; DeepSpeed's include the schedule.
_OPTIMIZER, _DEEPSPEED = re.compile(r"(rank\d+-of-\d+-)?optimizer"), re.compile(r"global_step\d+")


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """Return the complete checkpoint with the most steps in the `output_dir` of a run; None if there is none."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and _is_whole(path)]
    return max(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def checkpoint_to_resume(folder: str | Path) -> Path | None:
    """Find the checkpoint from which a run resumes: its newest complete one, or None if the run has to start.

    Raise a FileExistsError if the folder holds a model but no checkpoint, since a new run would replace the model.
    """
    found = last_whole_checkpoint(folder)
    if found is None and holds_model(folder):
        raise FileExistsError(
            f"{folder} holds a model but no checkpoint to resume from: a new run would replace the model. "
            "Choose another folder, or start from the model's weights."
        )
    return found


def check_complete(checkpoint: str | Path) -> None:
    """Raise a ValueError for a checkpoint that lacks part of the state of its run, which Trainer would silently reset.

    That is the state of the trainer, the optimizer or the schedule.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a checkpoint folder.")
    names = [path.name for path in checkpoint.iterdir()]
    of_deepspeed = any(_DEEPSPEED.match(name) for name in names)
    found = {
        _STATE: _STATE in names,
        "optimizer.pt": of_deepspeed or any(_OPTIMIZER.match(name) for name in names),
        "scheduler.pt": of_deepspeed or "scheduler.pt" in names,
    }
    missing = [name for name, is_there in found.items() if not is_there]
    if missing:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)} (save_only_model, or the file was deleted): the run cannot "
            "resume from it. Resume from another checkpoint, or load its weights with from_pretrained and start a new "
            "run."
        )


def check_same_meaning(checkpoint: str | Path, config: PreTrainedConfig | None) -> None:
    """Raise a ValueError if the weights of a checkpoint mean other genes, classes or neighbourhoods than the model's.

    Only what the configurations of both know is compared; default names of outputs (LABEL_0, …) are unknown.
    """
    files = [Path(checkpoint) / name for name in (MODEL_CONFIG, "config.json")]  # the first is that of an adapter
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return
    saved = _meaning(SimpleNamespace(**json.loads(file.read_text(encoding="utf-8"))))
    for name, now in _meaning(config).items():
        if None not in (saved[name], now) and saved[name] != now:
            raise ValueError(
                f"{checkpoint} and the model differ in {name}: {_short(saved[name])} and {_short(now)}. Its weights "
                "would change their meaning: resume with the same tokenizer, classes and columns."
            )


def _meaning(config: Any) -> dict[str, Any]:
    names = SimpleNamespace(**{name: getattr(config, name, None) for name in ("id2label", "label2id")})
    return {**{name: getattr(config, name, None) for name in _MEANING}, "label2id": read_numbers(names)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def mark_unfinished(checkpoint: str | Path) -> None:
    """Remove the file that marks a checkpoint as complete, before it is overwritten."""
    (Path(checkpoint) / _STATE).unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text()), dict)
    except (OSError, ValueError):
        return False
