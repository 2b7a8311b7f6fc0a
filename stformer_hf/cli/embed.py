"""Write an embedding of every cell of a file.

stformer-hf embed --data cells.h5ad --model pretrained --output embedded.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class EmbedArguments:
    """Flags of `embed`."""

    data: str = field(metadata={"help": "h5ad file"})
    model: str = field(metadata={"help": "checkpoint"})
    output: str = field(metadata={"help": 'h5ad file to write, with obsm["X_stformer"]'})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    hidden_layer: int = field(default=-1, metadata={"help": "which hidden state: 0 is the embeddings, -1 the last"})
    pooling: str = field(default="cls", metadata={"help": "cls or mean"})
    batch_size: int = field(default=64, metadata={"help": "cells a batch"})
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, EmbedArguments, verb="embed", description=__doc__)
    adata = run(args)
    print(f"{args.output}: obsm['X_stformer'] {adata.obsm['X_stformer'].shape}")


def run(args: EmbedArguments):
    """Embed and write; returns the AnnData."""
    from ..inference.embed import embed
    from .files import read, write

    adata = read(args.data, args.output, args.overwrite)
    embed(
        adata,
        args.model,
        layer=args.layer,
        hidden_layer=args.hidden_layer,
        pooling=args.pooling,
        batch_size=args.batch_size,
    )
    write(adata, args.output)
    return adata
