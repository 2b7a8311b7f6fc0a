"""Estimate the median of the non-zero values of each gene, by which rank tokens are ordered.

stformer-hf medians --data a.h5ad b.h5ad --output gene_medians.json
stformer-hf medians --data a.h5ad --output a.npz       (on one machine, b on another; then merge the parts:)
stformer-hf medians --data a.npz b.npz --output gene_medians.json
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from .arguments import parse


@dataclass
class MediansArguments:
    """Flags of `medians`."""

    data: list[str] = field(
        metadata={"help": "files of cells, stores, folders, patterns; or parts (.npz) that this verb wrote"}
    )
    output: str = field(metadata={"help": "gene_medians.json: results, or a .npz: a part, to be merged with others"})
    target_sum: float = field(default=1e4, metadata={"help": "what the values of a cell add up to"})
    method: str = field(
        default="auto", metadata={"help": "exact; sketch: off by at most 0.75 percent; auto: exact while it fits"}
    )
    max_memory: float = field(default=1.0, metadata={"help": "GB that the counts kept by auto may take"})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    fractional: bool = field(default=False, metadata={"help": "allow fractions (RSEM, SoupX)"})
    aliases: str | None = field(
        default=None, metadata={"help": "csv, tsv, json or parquet file: old gene id, new gene id"}
    )
    unify: str | None = field(
        default=None, metadata={"help": "symbol: genes of one symbol under other ids in other files are one"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, MediansArguments, verb="medians", description=__doc__)
    statistics = run(args)
    print(f"{args.output}: {len(statistics.medians):,} medians; {statistics}")


def run(args: MediansArguments):
    """Estimate or merge, and write; returns the GeneStatistics."""
    output = Path(args.output)
    if output.suffix not in (".json", ".npz"):
        raise ValueError(f"--output {output}: name a .json file for the results, or a .npz for a part.")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists. Choose another --output, or pass --overwrite.")
    parts = [source for source in args.data if source.endswith(".npz")]
    if parts and len(parts) < len(args.data):
        raise ValueError("--data are parts (.npz), or cells, not both: make a part of the cells first.")
    if parts:
        changed = [
            f"--{option.name}"
            for option in fields(args)
            if option.name not in ("data", "output", "overwrite") and getattr(args, option.name) != option.default
        ]
        if changed:
            raise ValueError(f"{', '.join(changed)}: parts are merged as they were made, without settings.")
        if len({Path(part).resolve() for part in parts}) < len(parts):
            raise ValueError("--data names a part twice: its cells would count twice.")
    statistics = _merged(parts) if parts else _estimated(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(output)
    return statistics


def _merged(parts: list[str]):
    from functools import reduce

    from ..genes.statistics import GeneStatistics

    return reduce(GeneStatistics.merge, map(GeneStatistics.load, parts))


def _estimated(args: MediansArguments):
    from ..store.gene_medians import estimate_gene_medians

    return estimate_gene_medians(
        args.data,
        args.target_sum,
        method=args.method,
        max_memory=int(args.max_memory * 1e9),
        layer=args.layer,
        fractional=args.fractional,
        aliases=args.aliases,
        unify=args.unify,
    )
