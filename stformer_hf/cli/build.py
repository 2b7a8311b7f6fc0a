"""Build a CellStore from files of cells: h5ad, zarr, 10x h5 and mtx, loom, folders of other pipelines, other stores.

stformer-hf build --data a.h5ad b.h5ad --output atlas --obs cell_type donor
stformer-hf build --data downloads --output atlas --obs all --workers 4
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class BuildArguments:
    """Flags of `build`."""

    data: list[str] = field(metadata={"help": "files, folders of files, or patterns, in the order of the cells"})
    output: str = field(metadata={"help": "folder to create"})
    obs: list[str] | None = field(default=None, metadata={"help": "columns of obs to keep, or all"})
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "columns of obs to keep as classes although they hold integers or booleans"},
    )
    layer: str | None = field(
        default=None, metadata={"help": "location of the counts: X, raw, a layer; for 10x a feature type or genome"}
    )
    fractional: bool = field(default=False, metadata={"help": "allow fractional counts (RSEM, SoupX)"})
    neighbors: str | None = field(
        default=None, metadata={"help": "graph in obsp to keep, such as spatial_connectivities"}
    )
    aliases: str | None = field(
        default=None, metadata={"help": "csv, tsv, json or parquet file of old and new gene ids"}
    )
    unify: str | None = field(
        default=None, metadata={"help": "symbol: merge genes with the same symbol but different ids"}
    )
    species: str | None = field(default=None, metadata={"help": "species that all files must have, such as human"})
    compact: bool = field(
        default=False, metadata={"help": "write half the bytes or less: faster from a slow disk, slower from memory"}
    )
    shuffle: bool = field(default=False, metadata={"help": "store all cells in random order"})
    seed: int = field(default=0, metadata={"help": "seed of the shuffle"})
    part: list[int] | None = field(
        default=None, metadata={"help": "i n: build only part i (from 0) of n equal parts; see CellStore.join"}
    )
    workers: int = field(default=1, metadata={"help": "number of processes that read files"})
    engine: str = field(default="local", metadata={"help": "where workers run: local, or ray (on a cluster)"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing store"})
    allow_duplicates: bool = field(
        default=False, metadata={"help": "accept files with the same cells, such as raw and filtered ones of a run"}
    )


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, BuildArguments, verb="build", description=__doc__)
    print(run(args))


def run(args: BuildArguments):
    """Build and return the store."""
    from ..store.cell_store import CellStore

    if args.part is not None and len(args.part) != 2:
        raise ValueError(f"--part takes two numbers, such as 0 4 for the first of four; got {args.part}.")
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "output")}
    settings["obs"] = "all" if args.obs == ["all"] else args.obs
    settings["part"] = None if args.part is None else tuple(args.part)
    return CellStore.build(args.output, args.data, **settings)
