"""Write the tokens of a store as a Hugging Face dataset, which `datasets.load_from_disk` opens.

stformer-hf tokenize --data atlas --tokenizer model --output tokens
stformer-hf tokenize --data atlas --scheme rank --medians gene_medians.json --output tokens --obs all --workers 4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import parse

# Flags of a new tokenizer, made from the store.
_OF_A_NEW_TOKENIZER = ("scheme", "medians", "bin_edges", "phenotypes", "max_length", "truncation")


@dataclass
class TokenizeArguments:
    """Flags of `tokenize`."""

    data: str = field(metadata={"help": "a store made by stformer-hf build (path or address)"})
    output: str = field(metadata={"help": "folder to create"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or checkpoint with a tokenizer (default: make one for the store)"}
    )
    scheme: str | None = field(default=None, metadata={"help": "new tokenizer: binned (default) or rank"})
    medians: str | None = field(
        default=None, metadata={"help": "new rank tokenizer: json or pkl file of gene ids and medians"}
    )
    bin_edges: list[float] | None = field(
        default=None, metadata={"help": "new binned tokenizer: edges of the expression bins"}
    )
    phenotypes: list[str] | None = field(
        default=None, metadata={"help": "new tokenizer: columns of obs that become tokens"}
    )
    max_length: int | None = field(default=None, metadata={"help": "new tokenizer: maximum number of tokens per cell"})
    truncation: str | None = field(
        default=None, metadata={"help": "new tokenizer: genes kept in longer cells: top, head or random"}
    )
    obs: list[str] | None = field(default=None, metadata={"help": "columns of obs to copy, or all"})
    workers: int = field(default=1, metadata={"help": "number of processes"})
    engine: str = field(default="local", metadata={"help": "where workers run: local, or ray (on a cluster)"})
    rows_per_shard: int | None = field(default=None, metadata={"help": "cells per file (default: 16384)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing tokenized dataset"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, TokenizeArguments, verb="tokenize", description=__doc__)
    dataset = run(args)
    print(f"{args.output}: {len(dataset):,} cells, columns: {', '.join(dataset.column_names)}")


def run(args: TokenizeArguments):
    """Tokenize the store; return the dataset."""
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..training.loading import load_tokenizer

    new = {name: getattr(args, name) for name in _OF_A_NEW_TOKENIZER if getattr(args, name) is not None}
    if args.tokenizer and new:
        raise ValueError(
            f"{', '.join('--' + name for name in new)}: only for a new tokenizer; the one at {args.tokenizer} has its "
            "own."
        )
    store = _open(args.data)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = GeneTokenizer.from_store(store, **new)
    if tokenizer.neighborhood:
        store = store.with_neighborhoods()
    shards = {} if args.rows_per_shard is None else {"rows_per_shard": args.rows_per_shard}
    obs = "all" if args.obs == ["all"] else args.obs
    return store.tokenize(
        tokenizer, args.output, obs=obs, workers=args.workers, engine=args.engine, overwrite=args.overwrite, **shards
    )


def _open(path: str):
    """Open the store, and refuse a file of cells."""
    from ..store.cell_store import CellStore

    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file, but tokenize needs a store. Build one first: stformer-hf build --data {path} "
            "--output STORE."
        )
    return CellStore(path)
