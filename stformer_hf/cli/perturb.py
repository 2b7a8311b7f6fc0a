"""Change the counts of genes in cells, and measure how far the cells move in the embedding of a model.

stformer-hf perturb --data cells.h5ad --model model --goal_key condition --goal healthy --output folder
stformer-hf perturb --data cells.h5ad --model model --genes ISG15 IFI6 STAT1+STAT2 --kind overexpress --output folder
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .arguments import flag, options_of, parse

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class PerturbArguments:
    """Flags of `perturb`."""

    data: str = flag("file of cells (h5ad, h5mu, zarr, 10x, loom, …)")
    model: str = flag("checkpoint or adapter of an encoder or a classifier")
    output: str = flag("folder for table.csv, null.csv and the shards; the same command resumes a killed run")
    genes: list[str] | None = flag(
        "ids or symbols of genes; A+B edits both together (default: all genes that cells express)", None
    )
    pairs: bool = flag("edit all pairs of the genes instead of each alone", False)
    kind: Literal["delete", "inhibit", "activate", "overexpress"] = flag(
        "set counts to 0, lower them to a low quantile, or raise them to a high or very high one", "delete"
    )
    quantile: float | None = flag("quantile over the cells that express the gene (default: .25, .75 and .99)", None)
    goal_key: str | None = flag("column of obs with the goal group", None)
    goal: str | None = flag("value of goal_key in the goal's cells", None)
    start: str | None = flag("value of goal_key in the cells to perturb (default: all but the goal's)", None)
    donor_key: str | None = flag("column of obs with the donor: tests are over donors", None)
    predicted: str | None = flag("class whose probability is measured (default: the goal, or that of each cell)", None)
    n_null: int = flag("genes of similar expression to compare with, per bin; 0: none", 25)
    gene_shifts: int = flag("for each perturbation, write this many genes that it moves most to gene_shifts.csv", 0)
    layer: str | None = None
    fractional: bool = False
    hidden_layer: int = flag("hidden state; 0 is the input embeddings, -1 the last layer", -1)
    pooling: Literal["cls", "mean"] | None = flag("cls or mean (default: as the model was trained)", None)
    max_tokens: int | None = flag("tokens per batch; by default 1,024 on a CPU, and 4,096 elsewhere", None)
    shard_size: int = flag("edited cells per shard; a killed run loses at most one shard", 20_000)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    min_coverage: float | None = None
    seed: int = flag("seed of the genes to compare with, and of permutations", 0)
    plot: str | None = flag("PNG to write, a volcano plot", None)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, PerturbArguments)
    from .files import is_first_process, writing

    with writing(args.output):
        table = run(args)
    if is_first_process():
        shown = table.reindex(table.iloc[:, 1].abs().sort_values(ascending=False).index)
        print(shown[[*table.columns[:4], "z", "fdr"]].head(10).to_string())
        n_cells = table.attrs["settings"]["n_cells"]
        print(f"{Path(args.output) / 'table.csv'}: {len(table)} perturbations of {n_cells} cells")


def run(args: PerturbArguments) -> pd.DataFrame:
    """Perturb the cells, write the tables and the plot; return the table."""
    from ..inference.perturb import perturb
    from .files import is_first_process, read, writing

    if args.pairs and not args.genes:
        raise ValueError("--pairs needs --genes: all pairs of a panel are too many.")
    if args.plot:
        import matplotlib  # noqa: F401  before the work

    adata, layer = read(args.data, layer=args.layer)
    options = options_of(args, "data", "model", "output", "genes", "pairs", "layer", "plot")
    genes = None if args.genes is None else [tuple(group.split("+")) for group in args.genes]
    if args.pairs and genes is not None:
        genes = [one + other for one, other in combinations(genes, 2)]
    table = perturb(adata, args.model, genes, layer=layer, output=args.output, **options)
    if args.plot and is_first_process():
        from ..inference.plots import volcano

        try:
            with writing(args.plot):
                volcano(table, save=args.plot)
        except ValueError as error:
            raise ValueError(f"The tables in {args.output} were written, but the plot was not: {error}") from error
    return table
