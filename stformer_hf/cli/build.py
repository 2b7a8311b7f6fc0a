"""Build a CellStore from files of cells: h5ad, zarr, 10x h5 and mtx, loom, folders of other pipelines, other stores.

stformer-hf build --data a.h5ad b.h5ad --output atlas --obs cell_type donor
stformer-hf build --data downloads --output atlas --obs all --workers 4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import flag, options_of, parse

if TYPE_CHECKING:
    from ..store.cell_store import CellStore


@dataclass
class BuildArguments:
    """Flags of `build`."""

    data: list[str] = flag("files, folders of files, or patterns, in the order of the cells")
    output: str = flag("folder to create")
    obs: list[str] | None = flag("columns of obs to keep, or all", None)
    classes: list[str] = flag("columns of obs to keep as classes although they hold integers or booleans", [])
    layer: str | None = flag("location of the counts: X, raw, a layer; for 10x a feature type or genome", None)
    fractional: bool = False
    neighbors: str | None = flag("graph in obsp to keep, such as spatial_connectivities", None)
    aliases: str | None = None
    unify: str | None = None
    species: str | None = flag("species that all files must have, such as human", None)
    compact: bool = flag("write half the bytes or less: faster from a slow disk, slower from memory", False)
    shuffle: bool = flag("store all cells in random order", False)
    seed: int = flag("seed of the shuffle", 0)
    part: list[int] | None = flag("i n: build only part i (from 0) of n equal parts; see CellStore.join", None)
    workers: int = flag("number of processes that read files", 1)
    engine: str = "local"
    overwrite: bool = flag("replace an existing store", False)
    allow_duplicates: bool = flag("accept files with the same cells, such as raw and filtered ones of a run", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, BuildArguments)
    print(run(args))


def run(args: BuildArguments) -> CellStore:
    """Build and return the store."""
    from ..store.cell_store import CellStore

    if args.part is not None and len(args.part) != 2:
        raise ValueError(f"--part takes two numbers, such as 0 4 for the first of four; got {args.part}.")
    options = options_of(args, "data", "output")
    options["obs"] = "all" if args.obs == ["all"] else args.obs
    options["part"] = None if args.part is None else tuple(args.part)
    return CellStore.build(args.output, args.data, **options)
