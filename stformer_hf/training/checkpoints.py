"""Which checkpoints of a run are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

_STATE = "trainer_state.json"  # the last file that Trainer writes into a checkpoint
_NAME = re.compile(r"checkpoint-(\d+)")


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


def mark_unfinished(checkpoint: str | Path) -> None:
    """Take from a checkpoint what tells that it is whole, before it is written anew."""
    (Path(checkpoint) / _STATE).unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text()), dict)
    except (OSError, ValueError):
        return False


__all__ = ["last_whole_checkpoint", "mark_unfinished"]
