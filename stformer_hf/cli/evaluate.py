"""Compare embeddings of the cells of a file with one another and with simple baselines.

stformer-hf evaluate --data embedded.h5ad --keys X_stformer X_pca --label_key cell_type --output evaluation
stformer-hf evaluate --data cells.h5ad --model pretrained --label_key cell_type --split_by donor --output evaluation
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import check_free, flag, options_of, parse

if TYPE_CHECKING:
    from anndata import AnnData

    from ..evaluation.evaluation_result import EmbeddingEvaluation

_KEY = "X_stformer"
_FILES = ("evaluation.json", "evaluation.csv", "evaluation.md", "evaluation.png")


@dataclass
class EvaluateArguments:
    """Flags of `evaluate`."""

    data: str = flag("file of cells (h5ad, h5mu, zarr, 10x, loom, …)")
    label_key: str = flag("column of obs with the classes", aliases=["--label"])
    output: str = flag("folder for evaluation.json, .csv, .md (a section of a model card) and .png")
    model: str | None = flag(f'checkpoint to embed the cells with first, into obsm["{_KEY}"]', None)
    keys: list[str] | None = flag("embeddings in obsm to compare", None)
    batch_key: str | None = flag("column of obs with batches: also score how well they are mixed", None)
    split_by: str | None = flag("column of obs, such as the donor: splits keep its groups whole", None)
    baselines: list[str] = flag(
        "baselines: pca, logistic_regression, scvi (needs its extra)", ["pca", "logistic_regression"]
    )
    layer: str | None = None
    n_splits: int = flag("number of folds", 5)
    n_repeats: int = flag("number of repeats with new folds", 1)
    min_cells: int | None = flag("minimum number of cells of a class (default: the number of folds)", None)
    seed: int = flag("seed of folds, draws and clusters", 0)
    workers: int = flag("number of tasks that run at once, one per row and fold", 1)
    engine: str = "local"
    batch_size: int = flag("cells per batch of the model", 64)
    overwrite: bool = flag("replace the files of an earlier evaluation", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, EvaluateArguments)
    from .files import writing

    with writing(args.output):
        print(run(args))
    print(f"\nWritten to {args.output}")


def run(args: EvaluateArguments) -> EmbeddingEvaluation:
    """Embed if there is a model, evaluate, and write the results; return the evaluation."""
    from ..evaluation.evaluate_embedding import evaluate_embedding
    from .files import read

    output = Path(args.output)
    if output.is_file():
        raise ValueError(f"--output {output} is a file; pass a folder.")
    for name in _FILES:
        check_free(output / name, args.overwrite)
    adata, args.layer = read(args.data, layer=args.layer)
    keys = list(args.keys or [])
    if args.model:
        if _KEY in keys:
            raise ValueError(
                f"--model writes the embedding {_KEY}: rename the one in the file, or leave it out of --keys."
            )
        _embed(adata, args)
        keys.insert(0, _KEY)
    options = options_of(args, "data", "output", "model", "keys", "batch_size", "overwrite")
    found = evaluate_embedding(adata, keys, **options)
    output.mkdir(parents=True, exist_ok=True)
    found.to_json(output / "evaluation.json")
    found.to_csv(output / "evaluation.csv")
    (output / "evaluation.md").write_text(found.to_markdown(), encoding="utf-8")
    if find_spec("matplotlib") is not None:
        import matplotlib

        matplotlib.use("agg")
        found.plot(save=output / "evaluation.png")
    return found


def _embed(adata: AnnData, args: EvaluateArguments) -> None:
    """Embed the cells without their obs, so that the model cannot read phenotypes such as the label."""
    from ..inference.embed import embed

    bare = adata.copy()
    bare.obs = bare.obs[[]]
    embed(bare, args.model, key_added=_KEY, layer=args.layer, batch_size=args.batch_size)
    adata.obsm[_KEY] = bare.obsm[_KEY]
