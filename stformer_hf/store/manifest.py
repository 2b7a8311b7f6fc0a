"""The manifest of a store: written last, it makes a folder of shards a store, and a saved Hugging Face dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..genes.gene_table import GeneTable
from .shards import RowFormat, checksum, write_json

if TYPE_CHECKING:
    from datasets import Features

FORMAT_VERSION = 2
COMPACT_FORMAT_VERSION = 3  # of stores with compact rows, so that versions that cannot read them say so


def write_manifest(
    folder: Path, facts: Mapping[str, Any], genes: GeneTable, row_format: RowFormat, shards: list[dict]
) -> None:
    """Write the files that make a folder of shards a store, the manifest last."""
    table = folder / "genes.parquet"
    genes.to_parquet(table)
    write_dataset_files(folder, row_format.features(), shards)
    write_json(
        folder / "manifest.json",
        {
            "format_version": COMPACT_FORMAT_VERSION if row_format.compact else FORMAT_VERSION,
            "written_by": written_by(),
            **facts,
            "n_genes": len(genes),
            "n_counts": sum(source["n_counts"] for source in facts["sources"]),
            "gene_type": row_format.gene_type,
            "count_type": row_format.count_type,
            "compact": row_format.compact,
            "neighbors": row_format.neighbors,
            "obs": row_format.obs,
            "categories": row_format.categories,
            "shards": shards,
            "gene_table": {"file": table.name, "bytes": table.stat().st_size, "checksum": checksum(table)},
            "complete": True,
        },
    )


def write_dataset_files(folder: Path, features: Features, shards: list[dict]) -> None:
    """Write the files that make a folder of shards a saved Hugging Face dataset."""
    from datasets import DatasetInfo

    DatasetInfo(features=features).write_to_directory(str(folder))
    fingerprint = hashlib.sha256("".join(shard["checksum"] for shard in shards).encode()).hexdigest()[:16]
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": shard["file"]} for shard in shards],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def written_by() -> str:
    """Return name and version of this package."""
    return f"stformer_hf {__version__}"
