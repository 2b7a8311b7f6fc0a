"""Write the tokens of a store as a Hugging Face dataset, which `datasets.load_from_disk` opens.

stformer-hf tokenize --data atlas --tokenizer model --output tokens
stformer-hf tokenize --data atlas --scheme rank --medians gene_medians.json --output tokens --obs all --workers 4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import parse

# Flags of a tokenizer that is made from the store.
_OF_A_NEW_TOKENIZER = ("scheme", "medians", "bin_edges", "phenotypes", "max_length", "truncation")


@dataclass
class TokenizeArguments:
    """Flags of `tokenize`."""

    data: str = field(metadata={"help": "a store, which stformer-hf build makes"})
    output: str = field(metadata={"help": "folder to make"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or checkpoint with a tokenizer; without it, one is made for the store"}
    )
    scheme: str | None = field(default=None, metadata={"help": "of a new tokenizer: binned (default) or rank"})
    medians: str | None = field(
        default=None, metadata={"help": "of a new rank tokenizer: json or pkl file of gene id and median"}
    )
    bin_edges: list[float] | None = field(
        default=None, metadata={"help": "of a new binned tokenizer: edges of the expression bins"}
    )
    phenotypes: list[str] | None = field(
        default=None, metadata={"help": "of a new tokenizer: columns of obs that become tokens"}
    )
    max_length: int | None = field(default=None, metadata={"help": "of a new tokenizer: most tokens a cell"})
    truncation: str | None = field(
        default=None, metadata={"help": "of a new tokenizer: which genes of longer cells stay: top, head or random"}
    )
    obs: list[str] | None = field(default=None, metadata={"help": "columns of obs to copy, or: all"})
    workers: int = field(default=1, metadata={"help": "processes that tokenize"})
    rows_per_shard: int | None = field(default=None, metadata={"help": "cells of a file (default: 16384)"})
    overwrite: bool = field(default=False, metadata={"help": "replace a tokenized dataset that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, TokenizeArguments, verb="tokenize", description=__doc__)
    dataset = run(args)
    print(f"{args.output}: {len(dataset):,} cells, columns: {', '.join(dataset.column_names)}")


def run(args: TokenizeArguments):
    """Tokenize the store; returns the dataset."""
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..training.loading import load_tokenizer

    new = {name: getattr(args, name) for name in _OF_A_NEW_TOKENIZER if getattr(args, name) is not None}
    if args.tokenizer and new:
        raise ValueError(
            f"{', '.join('--' + name for name in new)}: of a new tokenizer only; the one at {args.tokenizer} has its "
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
    return store.tokenize(tokenizer, args.output, obs=obs, workers=args.workers, overwrite=args.overwrite, **shards)


def _open(path: str):
    """Open the store; files of cells are no store yet."""
    from ..store.cell_store import CellStore

    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file; tokens are written from a store. Make one first: stformer-hf build --data {path} "
            "--output STORE."
        )
    return CellStore(path)
