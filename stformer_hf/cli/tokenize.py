"""Write the tokens of a store as a Hugging Face dataset, which `datasets.load_from_disk` opens.

stformer-hf tokenize --data atlas --tokenizer model --output tokens
stformer-hf tokenize --data atlas --scheme rank --medians gene_medians.json --output tokens --obs all --workers 4
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import flag, parse, refuse_flags_of_new, some_flags

if TYPE_CHECKING:
    from datasets import Dataset

# Flags of a new tokenizer, made from the store.
_OF_A_NEW_TOKENIZER = ("scheme", "medians", "bin_edges", "phenotypes", "max_length", "truncation")


@dataclass
class TokenizeArguments:
    """Flags of `tokenize`."""

    data: str = flag("a store made by stformer-hf build (path or address)")
    output: str = flag("folder to create")
    tokenizer: str | None = flag("folder or checkpoint with a tokenizer (default: make one for the store)", None)
    scheme: str | None = flag("new tokenizer: binned (default) or rank", None)
    medians: str | None = flag("new rank tokenizer: json or pkl file of gene ids and medians", None)
    bin_edges: list[float] | None = flag("new binned tokenizer: edges of the expression bins", None)
    phenotypes: list[str] | None = flag("new tokenizer: columns of obs that become tokens", None)
    max_length: int | None = flag("new tokenizer: maximum number of tokens per cell", None)
    truncation: str | None = flag("new tokenizer: genes kept in longer cells: top, head or random", None)
    obs: list[str] | None = flag("columns of obs to copy, or all", None)
    workers: int = flag("number of processes", 1)
    engine: str = "local"
    rows_per_shard: int | None = flag("cells per file (default: 16384)", None)
    overwrite: bool = flag("replace an existing tokenized dataset", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, TokenizeArguments)
    dataset = run(args)
    print(f"{args.output}: {len(dataset):,} cells, columns: {', '.join(dataset.column_names)}")


def run(args: TokenizeArguments) -> Dataset:
    """Tokenize the store; return the dataset."""
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..store.cell_store import CellStore
    from ..training.loading import load_tokenizer

    refuse_flags_of_new("tokenizer", args, _OF_A_NEW_TOKENIZER)
    if Path(args.data).is_file():
        raise ValueError(
            f"{args.data} is a file, but tokenize needs a store. Build one first: stformer-hf build --data "
            f"{args.data} --output STORE."
        )
    store = CellStore(args.data)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = GeneTokenizer.from_store(store, **some_flags(args, *_OF_A_NEW_TOKENIZER))
    if tokenizer.neighborhood:
        store = store.with_neighborhoods()
    options = some_flags(args, "workers", "engine", "overwrite", "rows_per_shard")
    return store.tokenize(tokenizer, args.output, obs="all" if args.obs == ["all"] else args.obs, **options)
