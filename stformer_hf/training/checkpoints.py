"""Which checkpoints of a run are whole, and what a run can be resumed from."""

from __future__ import annotations

import json
import re
from pathlib import Path

_STATE = "trainer_state.json"  # the last file that Trainer writes into a checkpoint
_NAME = re.compile(r"checkpoint-(\d+)")
# Files and folders of torch, FSDP and DeepSpeed; the last has the schedule in it.
_OPTIMIZER, _DEEPSPEED = re.compile(r"(rank\d+-of-\d+-)?optimizer"), re.compile(r"global_step\d+")


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint of a run that was written to its end.

    Parameters
    ----------
    folder : str or Path
        `output_dir` of a run.

    Returns
    -------
    Path or None
        The checkpoint of the most steps; None without any.
    """
    whole = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and _is_whole(path)]
    return max(whole, key=lambda path: int(_NAME.fullmatch(path.name)[1]), default=None)


def checkpoint_to_resume(folder: str | Path) -> Path | None:
    """Find what a run is resumed from: its newest whole checkpoint, or None where it is to begin.

    Raises
    ------
    FileExistsError
        The folder holds a finished model and no checkpoint: a run that begins would replace the model.
    """
    found = last_whole_checkpoint(folder)
    if found is None and (Path(folder) / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds a model and no checkpoint to resume from: a new run would replace the model. "
            "Choose another folder, or train on from the model's weights."
        )
    return found


def check_complete(checkpoint: str | Path) -> None:
    """Refuse a checkpoint from which Trainer would resume without what the run had.

    Raises
    ------
    ValueError
        It is no folder; the state of the trainer, the optimizer or the schedule is missing.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not the folder of a checkpoint.")
    names = [path.name for path in checkpoint.iterdir()]
    missing = [] if _STATE in names else [_STATE]
    if not any(_DEEPSPEED.match(name) for name in names):
        missing += [] if any(_OPTIMIZER.match(name) for name in names) else ["optimizer.pt"]
        missing += [] if "scheduler.pt" in names else ["scheduler.pt"]
    if missing:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)} (save_only_model, or the file was deleted): the run cannot be "
            "resumed from it. Resume from another checkpoint, or load its weights with from_pretrained and begin a "
            "new run."
        )


def mark_unfinished(checkpoint: str | Path) -> None:
    """Take from a checkpoint what tells that it is whole, before it is written anew."""
    (Path(checkpoint) / _STATE).unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text()), dict)
    except (OSError, ValueError):
        return False


__all__ = ["check_complete", "checkpoint_to_resume", "last_whole_checkpoint", "mark_unfinished"]
