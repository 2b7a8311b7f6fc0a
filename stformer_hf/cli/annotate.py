"""Label the cells of a file with a classifier, or predict numbers with a regression model.

stformer-hf annotate --data cells.h5ad --model classifier --output labelled.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import OnCells, parse


@dataclass(kw_only=True)
class AnnotateArguments(OnCells):
    """Flags of `annotate`."""

    model: str = field(metadata={"help": "checkpoint or adapter of a classifier or regression model"})
    output: str = field(
        metadata={
            "help": 'h5ad file to write, with obs["stformer_label"] and obs["stformer_score"], or '
            'obs["stformer_NAME"] for multiple labels and for numbers'
        }
    )
    top_k: int = field(default=1, metadata={"help": "classes: number of most probable classes to write"})
    reject: float | None = field(
        default=None,
        metadata={"help": 'classes: nominal share of known cells to label "unknown", such as 0.05 (default: none)'},
    )
    parents: str | None = field(
        default=None,
        metadata={"help": "classes: CSV of child and parent labels; rejected cells get a parent (with --reject)"},
    )
    over: str | None = field(
        default=None,
        metadata={"help": "classes: column of obs with clusters, whose most frequent label is also written"},
    )


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, AnnotateArguments, verb="annotate", description=__doc__)
    from .files import is_first_process

    adata = run(args)
    if not is_first_process():
        return
    for column in adata.uns["stformer_annotation"]["columns"]:
        values = adata.obs[column]
        summary = values.value_counts() if hasattr(values, "cat") else values.describe().rename_axis(column)
        print(summary.to_string())


def run(args: AnnotateArguments):
    """Label the cells and write the file; return the AnnData."""
    from ..inference.annotate import annotate
    from .files import read, several_processes, write

    adata, layer = read(args.data, args.output, args.overwrite, args.layer, blockwise=True)
    found = annotate(adata, args.model, layer=layer, distributed=several_processes(), **args.options())
    adata = adata if found is None else found
    write(adata, args.output)
    return adata
