"""STFormer's helpers for setting up a run: seeds, folders, and the choice of a name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed


def setup_environment(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and set the related environment variables.

    Parameters
    ----------
    seed : int
        From 0 to 2**32 - 1 (else a ValueError is raised). Child processes get it as `PYTHONHASHSEED`; string hashes of
        this process do not change.

    Notes
    -----
    `TOKENIZERS_PARALLELISM` is set to "false", so that DataLoader workers can be forked, and `CUBLAS_WORKSPACE_CONFIG`
    to ":4096:8", which deterministic matrix products on CUDA need; existing values are kept.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed}.")
    os.environ["PYTHONHASHSEED"] = str(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_seed(seed)


def make_output_dirs(output_dir: str | Path, run_name: str) -> dict[str, Path]:
    """Make the folders of a run; existing ones are kept.

    Parameters
    ----------
    output_dir : str or Path
        Folder of all runs.
    run_name : str
        Name of this run. An empty name, or one that leads out of the folder, raises a ValueError.

    Returns
    -------
    dict of str to Path
        `training`, for checkpoints: OUTPUT_DIR/models/RUN_NAME. `logging`: OUTPUT_DIR/runs/RUN_NAME. `model`, for the
        final model: OUTPUT_DIR/models/RUN_NAME/final.
    """
    if not run_name or Path(run_name).is_absolute() or ".." in Path(run_name).parts or Path(run_name) == Path("."):
        raise ValueError(f"run_name must be the name of a folder, got {run_name!r}.")
    training = Path(output_dir) / "models" / run_name
    folders = {"training": training, "logging": Path(output_dir) / "runs" / run_name, "model": training / "final"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def choose_closest(
    name: str, supported: Sequence[str], unsupported: Sequence[str] | None = None, cutoff: float = 0.4
) -> str:
    """Choose the supported name that is closest to a given one, ignoring case.

    Parameters
    ----------
    name : str
        Name to look for.
    supported : sequence of str
        Supported names.
    unsupported : sequence of str, optional
        Names that are refused, even if they are close to a supported one.
    cutoff : float, default: 0.4
        Minimum similarity, `difflib.SequenceMatcher.ratio`, from 0 to 1.

    Returns
    -------
    str
        One of `supported`, in its spelling: the name itself if it is one of them, else the most similar.

    Raises
    ------
    ValueError
        The name is unsupported; none is close enough.
    """
    wanted = name.casefold()
    if wanted in {other.casefold() for other in unsupported or ()}:
        raise ValueError(f"{name!r} is not supported; choose one of {', '.join(supported)}.")
    known: dict[str, str] = {}
    for other in supported:
        known.setdefault(other.casefold(), other)
    if name in supported:
        return name
    if wanted in known:
        return known[wanted]
    found = difflib.get_close_matches(wanted, list(known), n=1, cutoff=cutoff)
    if not found:
        raise ValueError(f"{name!r} is not close to any of {', '.join(supported) or 'no names'}.")
    return known[found[0]]
