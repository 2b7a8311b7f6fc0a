"""Label the cells of a file with a classifier, or predict numbers with a regression.

stformer-hf annotate --data cells.h5ad --model classifier --output labelled.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class AnnotateArguments:
    """Flags of `annotate`."""

    data: str = field(metadata={"help": "h5ad or h5mu file, or zarr of an AnnData, MuData or SpatialData"})
    model: str = field(metadata={"help": "checkpoint of a classifier or regression, or an adapter of one"})
    output: str = field(
        metadata={
            "help": 'h5ad file to write: obs["stformer_label"] and obs["stformer_score"], or obs["stformer_NAME"] of '
            "several labels or of numbers"
        }
    )
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    fractional: bool = field(default=False, metadata={"help": "allow fractions, as estimated counts are"})
    batch_size: int = field(default=64, metadata={"help": "cells a batch"})
    min_coverage: float | None = field(
        default=None, metadata={"help": "least share of the model's genes that the cells must have (the model's own)"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, AnnotateArguments, verb="annotate", description=__doc__)
    adata = run(args)
    for column in adata.uns["stformer_annotation"]["columns"]:
        values = adata.obs[column]
        summary = values.value_counts() if hasattr(values, "cat") else values.describe().rename_axis(column)
        print(summary.to_string())


def run(args: AnnotateArguments):
    """Label and write; returns the AnnData."""
    from ..inference.annotate import annotate
    from .files import read, write

    adata, layer = read(args.data, args.output, args.overwrite, args.layer)
    annotate(
        adata,
        args.model,
        layer=layer,
        fractional=args.fractional,
        batch_size=args.batch_size,
        min_coverage=args.min_coverage,
    )
    write(adata, args.output)
    return adata
