"""List the models of this package: in folders, in installed packages, or in the cache of the Hugging Face Hub.

stformer-hf models
stformer-hf models runs classifier
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from .arguments import flag, parse

_OWN_TYPES = ("gene_bert", "cell_neighborhood")
_COLUMNS = ("model", "type", "size", "genes", "tokens", "predicts")


@dataclass
class ModelsArguments:
    """Flags of `models`."""

    folders: list[str] | None = flag(
        "where to look, with all folders below (default: here, in packages and the Hub's cache)", None
    )


def main(argv: list[str]) -> None:
    """Parse and run."""
    if argv and not argv[0].startswith("-"):
        argv = ["--folders", *argv]
    args = parse(argv, ModelsArguments)
    found = run(args)
    if not found:
        where = ", ".join(args.folders or ["this folder", "the installed packages", "the Hub's cache"])
        print(f"No model of this package in {where}. stformer-hf pretrain and stformer-hf finetune make one.")
        return
    widths = [max(len(row.get(name, "")) for row in (*found, {name: name})) for name in _COLUMNS]
    for row in ({name: name for name in _COLUMNS}, *found):
        cells = (f"{row.get(name, ''):<{width}}" for name, width in zip(_COLUMNS, widths, strict=True))
        print("  ".join(cells).rstrip())


def run(args: ModelsArguments) -> list[dict[str, str]]:
    """Return the facts of each model, sorted by name."""
    for folder in args.folders or []:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
    models = [(str(path), path) for folder in args.folders or ["."] for path in _in_folder(Path(folder))]
    if args.folders is None:
        models += [*_in_packages(), *_in_cache()]
    return [_facts(name, path) for name, path in sorted(models)]


def _in_folder(folder: Path) -> Iterator[Path]:
    """Find the folders of models; hidden ones are left out."""
    for at, below, _ in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        if _is_own(Path(at)):
            yield Path(at)


def _in_packages() -> Iterator[tuple[str, Path]]:
    """Find the models that installed packages bring: their names, and their folders."""
    from ..training.loading import MODEL_PACKAGES, find_installed

    for name in sorted(point.name for point in entry_points(group=MODEL_PACKAGES)):
        if folder := find_installed(name):
            yield name, Path(folder)


def _in_cache() -> list[tuple[str, Path]]:
    """Find the models in the cache of the Hub: their names there, and their folders."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    newest = [(one.repo_id, max(one.revisions, key=lambda of: of.last_modified)) for one in repositories]
    return [(name, revision.snapshot_path) for name, revision in newest if _is_own(revision.snapshot_path)]


def _is_own(folder: Path) -> bool:
    """Return whether a folder has the configuration of a model of this package, or of one that an adapter is for."""
    for file in ("config.json", "model_config.json"):  # the latter is beside adapters that finetune wrote
        try:
            config = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("model_type") in _OWN_TYPES:
            return True
    return False


def _facts(name: str, path: Path) -> dict[str, str]:
    from .info import model_facts

    try:
        facts = model_facts(str(path))
    except (OSError, ValueError, ImportError) as error:
        return {"model": name, "predicts": f"cannot be read: {str(error).splitlines()[0]}"}
    kind = facts["type"].split(", ")[-1]
    return {**facts, "model": name, "type": f"adapter of {kind}" if "adapter" in facts else kind}
