"""Estimate the median of the non-zero values of each gene, which orders rank tokens.

stformer-hf medians --data a.h5ad b.h5ad --output gene_medians.json
stformer-hf medians --data a.h5ad --output a.npz       (on one machine, b on another; then merge the parts:)
stformer-hf medians --data a.npz b.npz --output gene_medians.json
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import changed_flags, check_free, flag, options_of, parse

if TYPE_CHECKING:
    from ..genes.statistics import GeneStatistics


@dataclass
class MediansArguments:
    """Flags of `medians`."""

    data: list[str] = flag("files of cells, stores, folders, patterns; or parts (.npz) written by this command")
    output: str = flag(".json file for the results, or .npz file for a part to merge with others")
    target_sum: float = flag("sum to which the values of each cell are scaled", 1e4)
    method: str = flag("exact; sketch: within 0.75 percent; auto: exact while it fits into max_memory", "auto")
    max_memory: float = flag("memory in GB for the counts that auto keeps", 1.0)
    layer: str | None = None
    fractional: bool = False
    aliases: str | None = None
    unify: str | None = None
    workers: int = flag("number of processes that read stores and files", 1)
    engine: str = "local"
    overwrite: bool = flag("replace an existing file", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, MediansArguments)
    from .files import writing

    with writing(args.output):
        statistics = run(args)
    print(f"{args.output}: {len(statistics.medians):,} medians; {statistics}")


def run(args: MediansArguments) -> GeneStatistics:
    """Estimate or merge medians, and write them; return the GeneStatistics."""
    from ..genes.statistics import GeneStatistics
    from ..store.gene_medians import estimate_gene_medians

    output, options = Path(args.output), options_of(args, "data", "output", "overwrite")
    if output.suffix not in (".json", ".npz"):
        raise ValueError(f"--output {output}: pass a .json file for the results, or a .npz file for a part.")
    check_free(output, args.overwrite)
    parts = [source for source in args.data if source.endswith(".npz")]
    if parts and len(parts) < len(args.data):
        raise ValueError("--data takes parts (.npz) or cells, not both: make a part from the cells first.")
    if parts:
        changed = changed_flags(args, options)
        if changed:
            raise ValueError(f"{', '.join(changed)}: not allowed when merging parts.")
        if len({Path(part).resolve() for part in parts}) < len(parts):
            raise ValueError("--data contains a part twice: its cells would count twice.")
    if parts:
        statistics = reduce(GeneStatistics.merge, map(GeneStatistics.load, parts))
    else:
        options["max_memory"] = int(args.max_memory * 1e9)
        statistics = estimate_gene_medians(args.data, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(output)
    return statistics
