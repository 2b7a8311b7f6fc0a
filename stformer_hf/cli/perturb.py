"""Change the counts of genes in cells, and measure how far a model moves the cells.

stformer-hf perturb --data cells.h5ad --model model --goal_key condition --goal healthy --output folder
stformer-hf perturb --data cells.h5ad --model model --genes ISG15 IFI6 STAT1+STAT2 --kind overexpress --output folder
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from .arguments import parse


@dataclass
class PerturbArguments:
    """Flags of `perturb`."""

    data: str = field(metadata={"help": "file of cells (h5ad, h5mu, zarr, 10x, loom, …)"})
    model: str = field(metadata={"help": "checkpoint or adapter of an encoder or a classifier"})
    output: str = field(
        metadata={"help": "folder for table.csv, null.csv and the shards; the same command resumes a killed run"}
    )
    genes: list[str] | None = field(
        default=None,
        metadata={"help": "ids or symbols of genes; A+B edits both together (default: all genes that cells express)"},
    )
    pairs: bool = field(default=False, metadata={"help": "edit all pairs of the genes instead of each alone"})
    kind: Literal["delete", "inhibit", "activate", "overexpress"] = field(
        default="delete",
        metadata={"help": "set counts to 0, lower them to a low quantile, or raise them to a high or very high one"},
    )
    quantile: float | None = field(
        default=None, metadata={"help": "quantile over the cells that express the gene (default: .25, .75 and .99)"}
    )
    goal_key: str | None = field(default=None, metadata={"help": "column of obs with the goal group"})
    goal: str | None = field(default=None, metadata={"help": "value of goal_key in the goal's cells"})
    start: str | None = field(
        default=None, metadata={"help": "value of goal_key in the cells to perturb (default: all but the goal's)"}
    )
    donor_key: str | None = field(
        default=None, metadata={"help": "column of obs with the donor: tests are over donors"}
    )
    predicted: str | None = field(
        default=None, metadata={"help": "class whose probability is measured (default: the goal, or each cell's own)"}
    )
    n_null: int = field(default=25, metadata={"help": "genes of similar expression to compare with, per bin; 0: none"})
    layer: str | None = field(default=None, metadata={"help": "location of the counts: X, raw or a layer"})
    fractional: bool = field(default=False, metadata={"help": "allow fractional counts, such as estimates"})
    hidden_layer: int = field(
        default=-1, metadata={"help": "hidden state; 0 is the input embeddings, -1 the last layer"}
    )
    pooling: Literal["cls", "mean"] | None = field(
        default=None, metadata={"help": "cls or mean (default: as the model was trained)"}
    )
    max_tokens: int = field(default=4096, metadata={"help": "tokens per batch"})
    shard_size: int = field(
        default=20_000, metadata={"help": "edited cells per shard; a killed run loses at most one shard"}
    )
    min_coverage: float | None = field(
        default=None, metadata={"help": "minimum share of the model's genes in the cells (default: the model's)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the genes to compare with, and of permutations"})
    plot: str | None = field(default=None, metadata={"help": "PNG to write, a volcano plot"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, PerturbArguments, verb="perturb", description=__doc__)
    table = run(args)
    from accelerate import PartialState

    if PartialState().is_main_process:
        shown = table.reindex(table.iloc[:, 1].abs().sort_values(ascending=False).index)
        print(shown[[*table.columns[:4], "z", "fdr"]].head(10).to_string())
        n_cells = table.attrs["settings"]["n_cells"]
        print(f"{Path(args.output) / 'table.csv'}: {len(table)} perturbations of {n_cells} cells")


def run(args: PerturbArguments):
    """Perturb the cells, write the tables and the plot; return the table."""
    from ..inference.perturb import perturb
    from .files import read

    if args.pairs and not args.genes:
        raise ValueError("--pairs needs --genes: all pairs of a panel are too many.")
    if args.plot:
        import matplotlib  # noqa: F401  before the work

    adata, layer = read(args.data, layer=args.layer)
    own = ("data", "model", "output", "genes", "pairs", "layer", "plot")
    options = {name: value for name, value in vars(args).items() if name not in own}
    genes = None if args.genes is None else [tuple(group.split("+")) for group in args.genes]
    if args.pairs and genes is not None:
        genes = [one + other for one, other in combinations(genes, 2)]
    table = perturb(adata, args.model, genes, layer=layer, output=args.output, **options)
    if args.plot:
        from accelerate import PartialState

        from ..inference.plots import volcano

        if PartialState().is_main_process:
            Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
            try:
                volcano(table, save=args.plot)
            except ValueError as error:
                raise ValueError(f"The tables in {args.output} were written, but the plot was not: {error}") from error
    return table
