"""Modules of version 0.1.0 under their old paths: importing one warns, and returns the new module.

To be removed in version 0.3.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {
        "sources": ("formats", "matrices"),
        "store": ("cell_batch", "cell_store", "gene_medians"),
        "batches": ("iterable_ann_dataset",),
        "space": ("center_mask_sampler", "prepare_metadata", "spatial_graph"),
        "compat": ("ann_dataset", "scdl", "scdl_batches", "scdl_collection", "transforms"),
    },
    "training": {
        "batches": (
            "collators",
            "length_sampler",
            "lengths",
            "precollator",
            "samplers",
            "stream_batches",
            "token_budget",
        ),
        "compat": ("run_setup",),
        "search": ("search", "search_space"),
        "space": ("neighborhood_collator",),
        "training.starts": ("gene_embeddings", "spectral_start"),
    },
    "inference": {"space": ("domains",)},
    "models.gene_bert": {"compat": ("legacy_weights",), "training": ("extension",)},
}
_PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    f"{_PACKAGE}.{old}.{name}": f"{_PACKAGE}.{new}.{name}"
    for old, rooms in _ROOMS.items()
    for new, names in rooms.items()
    for name in names
} | {
    f"{_PACKAGE}.data.sources": f"{_PACKAGE}.sources.open_source",
    f"{_PACKAGE}.inference.neighborhoods": f"{_PACKAGE}.space.embed_neighborhoods",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finder of the old paths; it comes last, after all others have found nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == f"{_PACKAGE}.data":
            return ModuleSpec(name, self, is_package=True)
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name not in MOVED:
            return None  # a package that no longer exists: left empty
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} has moved to {new}; the old path will be removed in version 0.3.",
            FutureWarning,
            stacklevel=2,
        )
        module = ModuleType(spec.name)
        module.__dict__.update({k: v for k, v in vars(importlib.import_module(new)).items() if k[:2] != "__"})
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is already complete."""


def register() -> None:
    """Make the old paths importable."""
    sys.meta_path.append(_MovedModules())
