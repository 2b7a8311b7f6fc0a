"""Label the cells of a file with a classifier, or predict numbers with a regression model.

stformer-hf annotate --data cells.h5ad --model classifier --output labelled.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from .arguments import OnCells, flag, parse

if TYPE_CHECKING:
    from anndata import AnnData

_SUFFIXES = (".h5ad", ".zarr", ".csv")


@dataclass(kw_only=True)
class AnnotateArguments(OnCells):
    """Flags of `annotate`."""

    model: str = flag("checkpoint or adapter of a classifier or regression model")
    output: str = flag(
        'file to write (.h5ad or .zarr), with obs["stformer_label"] and obs["stformer_score"], or '
        'obs["stformer_NAME"] for multiple labels and for numbers; or .csv, with these columns alone'
    )
    top_k: int = flag("classifiers: number of most probable classes to write", 1)
    reject: float | None = flag(
        'classifiers: nominal share of known cells to label "unknown", such as 0.05 (default: none)', None
    )
    parents: str | None = flag(
        "classifiers: CSV of child and parent labels; rejected cells get a parent (with --reject)", None
    )
    over: str | None = flag(
        "classifiers: column of obs with clusters; also writes the most frequent label of each", None
    )


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, AnnotateArguments)
    from .files import is_first_process, writing

    with writing(args.output):
        adata = run(args)
    if not is_first_process():
        return
    for line in summary(adata):
        print(f"{args.output}: {line}")


def summary(adata: AnnData) -> list[str]:
    """Return a line per label column, or one for numbers: how many cells were labelled, and rejected."""
    from ..inference.rejection import UNKNOWN

    facts = adata.uns["stformer_annotation"]
    columns = [str(name) for name in facts["columns"]]
    labels = [name for name in columns if name.endswith("_label")]
    if facts["problem_type"] != "single_label_classification" or not labels:
        return [f"{adata.n_obs:,} cells, obs: {', '.join(columns)}"]
    lines = []
    for name in labels:
        n_empty = adata.obs[name].isna().sum()
        n_rejected = (adata.obs[name] == UNKNOWN).sum() if "reject" in facts else 0
        line = f"obs[{name!r}]: {adata.n_obs - n_empty - n_rejected:,} of {adata.n_obs:,} cells labelled"
        line += f", {n_rejected:,} {UNKNOWN}" if "reject" in facts else ""
        lines.append(line + (f", {n_empty:,} without a known gene" if n_empty else ""))
    return lines


def run(args: AnnotateArguments) -> AnnData:
    """Label the cells and write the file; return the AnnData."""
    from ..inference.annotate import annotate
    from ..models.gene_bert.heads import problem_of
    from ..training.loading import load_config
    from .files import check_names, read, several_processes, write

    adata, layer = read(args.data, args.output, args.overwrite, args.layer, blockwise=True, suffixes=_SUFFIXES)
    config = load_config(args.model)
    if problem_of(config) != "single_label_classification":
        names = [f"stformer_{name}" for name in config.id2label.values()]
        check_names(names, "obs", args.output, "Write .csv")
    found = annotate(adata, args.model, layer=layer, distributed=several_processes(), **args.options())
    labelled = cast("AnnData", adata if found is None else found)  # of a store, another one is returned
    write(labelled, args.output, labelled.uns["stformer_annotation"]["columns"])
    return labelled
