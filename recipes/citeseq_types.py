"""Fine-tune on cell types defined by antibodies, not by RNA: five folds, a new model and a pretrained one.

python recipes/citeseq_types.py --data 1K_pbmc_citeseq.h5 --model pretrained --output citeseq

Types are gated on the ten antibodies of 10x Genomics' 1k PBMC CITE-seq file, by ln(1 + count), at the valleys of their
histograms; the model, and logistic regression beside it, see the counts of genes only. Each fold is a run of
`stformer-hf finetune` with recipes/finetune_cell_type.yaml; nothing is chosen by the test cells; further flags go to
it. The new model begins at the principal components of the fold's training cells, the pretrained one (whole cells or
not) at what it has learned from other cells. Prints the figures and writes OUTPUT/folds.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.model_selection import StratifiedKFold

from stformer_hf import CellStore
from stformer_hf.cli import finetune
from stformer_hf.cli.arguments import parse_training
from stformer_hf.training.defaults import FINETUNING

RECIPE = Path(__file__).with_name("finetune_cell_type.yaml")
# A cell has a marker if ln(1 + count) of its antibody is above this.
VALLEYS = {"CD3": 5.0, "CD4": 5.6, "CD8": 4.4, "CD14": 6.2, "CD16": 4.8, "CD19": 5.4, "CD56": 5.2}
GATES = {
    "B": ("CD19", "not CD3", "not CD14"),
    "CD14 monocyte": ("CD14", "not CD3", "not CD19"),
    "CD4 T": ("CD3", "CD4", "not CD8", "not CD14", "not CD19"),
    "CD8 T": ("CD3", "CD8", "not CD4", "not CD14", "not CD19"),
    "NK": ("CD16 or CD56", "not CD3", "not CD14", "not CD19"),
}
EVALUATE_ONCE = "--eval_strategy no --save_strategy no".split()
FIGURES = ("eval_accuracy", "eval_macro_f1", "eval_logistic_regression_accuracy", "eval_logistic_regression_macro_f1")


def gate(antibodies: CellStore) -> pd.Series:
    """Return the type of each cell by its antibodies; missing if no gate, or more than one, contains it."""
    counts = antibodies.rows(range(len(antibodies))).toarray()
    levels = pd.DataFrame(np.log1p(counts), columns=list(antibodies.genes.symbols))

    def has(condition: str) -> np.ndarray:
        if condition.startswith("not "):
            return ~has(condition.removeprefix("not "))
        return np.logical_or.reduce([levels[name] > VALLEYS[name] for name in condition.split(" or ")])

    within = {name: np.logical_and.reduce([has(of) for of in conditions]) for name, conditions in GATES.items()}
    n_gates = np.sum(list(within.values()), axis=0)
    types = pd.Series(pd.NA, index=levels.index, dtype="object")
    for name, cells in within.items():
        types[cells & (n_gates == 1)] = name
    return types.astype(pd.CategoricalDtype(list(GATES)))


def labelled_cells(data: str, folder: Path) -> AnnData:
    """Read the genes of the cells that a gate takes; with `obs["cell_type"]`."""
    types = gate(CellStore.build(folder / "antibodies", data, layer="Antibody Capture", overwrite=True))
    genes = CellStore.build(folder / "genes", data, layer="X", overwrite=True)
    known = np.flatnonzero(types.notna())
    obs = pd.DataFrame({"cell_type": types.iloc[known].to_numpy()}, index=[f"cell{i}" for i in known])
    obs["cell_type"] = obs["cell_type"].astype(types.dtype)
    var = pd.DataFrame({"gene_symbol": genes.genes.symbols}, index=genes.genes.gene_ids)
    return AnnData(genes.rows(known).astype(np.float32).tocsr(), obs=obs, var=var)


def run(data: str, model: str, output: Path, flags: list[str], folds: int, seed: int) -> pd.DataFrame:
    """Run all folds; returns their figures, one row per fold and start."""
    output.mkdir(parents=True, exist_ok=True)
    cells = labelled_cells(data, output)
    print(
        f"{cells.n_obs} cells: "
        + ", ".join(f"{n} {name}" for name, n in cells.obs["cell_type"].value_counts().items())
    )
    rows, starts = [], {"new": [], "pretrained": ["--model", model]}
    split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(cells.X, cells.obs["cell_type"])
    for fold, (train, test) in enumerate(split):
        files = {}
        for name, part in (("train", train), ("test", test)):
            files[name] = str(output / f"{name}-{fold}.h5ad")
            cells[part].write_h5ad(files[name])
        for start, checkpoint in starts.items():  # flags
            argv = ["--config", str(RECIPE), "--data", files["train"], "--eval_data", files["test"], "--overwrite"]
            argv += [*checkpoint, "--output", str(output / f"{start}-{fold}"), *EVALUATE_ONCE]
            args, training = parse_training([*argv, *flags], finetune.FinetuneArguments, FINETUNING)
            figures = finetune.run(args, training)
            rows.append({"start": start, "fold": fold, **{name: figures[name] for name in FIGURES}})
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Parse, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="10x h5 file of genes and antibodies")
    parser.add_argument("--model", required=True, help="pretrained checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    table = run(args.data, args.model, args.output, flags, args.folds, args.seed)
    table.to_csv(args.output / "folds.csv", index=False)
    print(table.drop(columns="fold").groupby("start").agg(["mean", "std"]).T.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
