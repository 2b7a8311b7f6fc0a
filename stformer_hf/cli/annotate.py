"""Label the cells of a file with a classifier.

stformer-hf annotate --data cells.h5ad --model classifier --output labelled.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class AnnotateArguments:
    """Flags of `annotate`."""

    data: str = field(metadata={"help": "h5ad or h5mu file, or zarr of an AnnData, MuData or SpatialData"})
    model: str = field(metadata={"help": "checkpoint of a classifier"})
    output: str = field(metadata={"help": 'h5ad file to write, with obs["stformer_label"], obs["stformer_score"]'})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    fractional: bool = field(default=False, metadata={"help": "allow fractions, as estimated counts are"})
    batch_size: int = field(default=64, metadata={"help": "cells a batch"})
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, AnnotateArguments, verb="annotate", description=__doc__)
    adata = run(args)
    print(adata.obs["stformer_label"].value_counts().to_string())


def run(args: AnnotateArguments):
    """Label and write; returns the AnnData."""
    from ..inference.annotate import annotate
    from .files import read, write

    adata, layer = read(args.data, args.output, args.overwrite, args.layer)
    annotate(adata, args.model, layer=layer, fractional=args.fractional, batch_size=args.batch_size)
    write(adata, args.output)
    return adata
