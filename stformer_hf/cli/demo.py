"""Pretrain, fine-tune, annotate and embed 700 cells, and write plots and a report.

stformer-hf demo --output demo_output

700 labelled cells of human blood, shipped with the scanpy package, go through the commands build, pretrain, finetune,
annotate and embed. Results are compared with simple baselines. No network is used.
"""

from __future__ import annotations

import base64
import json
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import __version__
from .arguments import check_free, flag, parse
from .demo_rows import GENES, LABEL, MAJORITY, PCA, START, TRAINED

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from ..evaluation.readers import GenePca

HELD_OUT = 0.25
# Most counts in these data are 0 to 8; each bin is about twice as wide as the previous one.
PRETRAINING: dict[str, Any] = {
    "bin_edges": [0.5, 1.5, 2.5, 4.5, 8.5],
    "max_length": 128,
    "mlm_probability": 0.3,
    "baselines": True,
}
PRETRAINING_STEPS = {
    "max_steps": 100,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "eval_strategy": "steps",
    "eval_steps": 25,
}
STEPS = {"save_strategy": "no", "eval_on_start": True, "logging_steps": 10}  # for both
EPOCHS = 4  # of the fine-tuning shown if the classifier chose none
N_LABELS = (5, 10, 20)
N_DRAWS = 3
VERSIONS = ("torch", "transformers", "datasets", "anndata", "scanpy")

MODELS = ("pretrained", "classifier", "classifier_start", "classifier_trained")
MADE = (
    *("demo.json", "train.h5ad", "held_out.h5ad", "cells.h5ad", "store", "plots", "report.html", *MODELS),
    *(f"held_out_by_{name}.h5ad" for name in MODELS),
    "cells_embedded_by_pretrained.h5ad",
)


@dataclass
class DemoArguments:
    """Flags of `demo`."""

    output: str = flag("folder for all output", "demo_output")
    seed: int = flag("seed of the split, the weights, the masks, the draws of labels and the UMAP", 0)
    overwrite: bool = flag("replace the folder of an earlier demo", False)


class Classifiers(NamedTuple):
    """The two classifiers of the demo, of which inner cross-validation chose the one in the folder "classifier"."""

    start: str  # folder of the linear models
    trained: str  # folder of those trained further
    epochs: float  # of the trained one
    facts: dict[str, Any]  # of the choice: `fine_tuning.json`
    figures: dict[str, float]  # of the run that made the chosen one


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, DemoArguments)
    from .files import writing

    with writing(args.output):
        run(args)


def run(args: DemoArguments) -> dict[str, dict[str, float]]:
    """Run the demo; return its table: name of a classifier -> accuracy and macro F1, with their intervals."""
    began = time.monotonic()
    try:
        import matplotlib
        import scanpy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The demo needs its extra: pip install 'stformer_hf[demo]' ({error}).") from error
    matplotlib.use("agg")
    import torch
    from transformers.utils import logging

    # The last digits of sums depend on the threads: MKL chooses their number until torch sets it, as `_draw` does.
    torch.set_num_threads(torch.get_num_threads())
    logging.set_verbosity_error()
    folder = _make_folder(Path(args.output), args.overwrite)

    with _step(1, "cells: 700 PBMCs shipped with the scanpy package"):
        cells, residual = load_cells()
        train, held_out = split_cells(cells, args.seed)
        train.write_h5ad(folder / "train.h5ad")
        held_out.write_h5ad(folder / "held_out.h5ad")
        print(f"{len(train)} cells to train on, {len(held_out)} held out; counts recovered to within {residual:.3f}")
    with _step(2, "build: a CellStore from the cells"):
        from . import build

        store = build.run(build.BuildArguments([str(folder / "train.h5ad")], str(folder / "store"), obs=[LABEL]))
        print(store)
    with _step(3, "pretrain: start at principal components of the training cells, and predict masked genes"):
        pretraining = _pretrain(folder, args.seed)
    with _step(4, "finetune: start at linear models of the cells, and train further if that helps"):
        classifiers = _finetune(folder, args.seed)
        print(f"inner accuracy of the start {classifiers.facts['inner_score_of_the_start']:.3f}")
    with _step(5, f"few labels: {', '.join(map(str, N_LABELS))} cells per class"):
        from ..evaluation.cell_baselines import log_normalise
        from ..evaluation.readers import fit_pca
        from .demo_few_labels import label_few

        pca = fit_pca(log_normalise(train.X), args.seed)
        few = label_few(store, train, held_out, pca, seed=args.seed, n_labels=N_LABELS, n_draws=N_DRAWS)
        print(few.groupby(["n_labels", "classifier"], sort=False)["accuracy"].mean().unstack(0).round(3).to_string())
    with _step(6, "annotate the held-out cells, and compare with simple baselines"):
        predictions = _predict(folder, train, held_out, pca, classifiers)
        table = score(held_out, predictions, args.seed)
        for name, row in table.items():
            print(f"{name:<30} accuracy {row['accuracy']:.3f}  macro F1 {row['macro_f1']:.3f}")
    with _step(7, "embed all cells, and draw"):
        from ..evaluation.classifier_scores import order_classes, score_classes

        order = order_classes(pca(log_normalise(train.X)), train.obs[LABEL].astype(str))
        chosen = START if classifiers.start == "classifier" else TRAINED
        pictures = _draw(folder, cells, held_out, pca, predictions[chosen], order, few, classifiers, pretraining, args)
    with _step(8, "report"):
        from .demo_few_labels import summarise

        true = held_out.obs[LABEL].astype(str).tolist()
        per_class = score_classes(true, predictions[chosen], order, seed=args.seed).drop(columns="precision")
        own = {name: "its own choice" if name == chosen else "not its choice" for name in (START, TRAINED)}
        own[TRAINED] = f"{classifiers.epochs:g} epochs, {own[TRAINED]}"
        report = _write_report(
            folder,
            table=table,
            best=max(table, key=lambda name: (table[name]["accuracy"], table[name]["macro_f1"])),
            chosen=chosen,
            notes={name: own.get(name, "") for name in table},
            per_class=[{"name": name, **row} for name, row in per_class.to_dict("index").items()],
            pictures=pictures,
            few=summarise(few),
            few_classes=few.attrs["classes"],
            n_train=len(train),
            n_held_out=len(held_out),
            seed=args.seed,
            classifiers=classifiers,
            figures={"pretraining": pretraining, "classifier": classifiers.figures},
            seconds=time.monotonic() - began,
        )
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {report}")
    return table


def load_cells() -> tuple[Any, float]:
    """Read scanpy's 700 PBMCs (10x PBMC 68k, Zheng et al. 2017) and recover their counts.

    The package ships ln(1 + 10,000 count / total), which is inverted and rounded. Return the AnnData (700, 765), CSR
    float32 with ten cell types in `obs["bulk_labels"]`, and the largest distance of a recovered count to an integer.
    """
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData
    from scipy import sparse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old layout of the shipped file
        shipped = sc.datasets.pbmc68k_reduced()
    totals = shipped.obs["n_counts"].to_numpy(np.float64)[:, None]
    exact = np.expm1(shipped.raw.X.toarray().astype(np.float64)) * totals / 1e4
    counts = np.rint(exact)
    residual = float(np.abs(exact - counts).max())
    if residual > 0.1:
        raise ValueError(f"scanpy {version('scanpy')} ships other PBMCs: recovered counts are off by {residual:.2f}.")
    cells = AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=shipped.obs[[LABEL]].copy(),
        var=pd.DataFrame(index=shipped.raw.var_names),
    )
    return cells, residual


def split_cells(cells: AnnData, seed: int) -> tuple[AnnData, AnnData]:
    """Split cells into a training and a held-out part, stratified by type and determined by the seed."""
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(cells)), test_size=HELD_OUT, random_state=seed, stratify=cells.obs[LABEL]
    )
    return cells[np.sort(train)].copy(), cells[np.sort(held_out)].copy()


def _make_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and any(folder.iterdir()):
        check_free(folder, overwrite)
        if not (folder / "demo.json").exists():
            raise FileExistsError(f"{folder} holds something other than a demo, and is not changed.")
        for name in MADE:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text("{}")
    return folder


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    print(f"\n[{number}/8] {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"      {time.monotonic() - began:.0f} s", flush=True)


def _pretrain(folder: Path, seed: int) -> dict[str, float]:
    from . import pretrain

    args = pretrain.PretrainArguments(
        data=[str(folder / "store")], output=str(folder / "pretrained"), held_out=0.1, **PRETRAINING
    )
    return pretrain.run(args, {**pretrain.TRAINING_DEFAULTS, **PRETRAINING_STEPS, **STEPS, "seed": seed})


def _finetune(folder: Path, seed: int) -> Classifiers:
    """Make the classifier that cross-validation chooses, and the other one of start and fine-tuned."""
    from ..training.defaults import FINETUNING
    from . import finetune

    def make(name: str, **epochs: Any) -> dict[str, float]:
        # Held-out cells are evaluated only for the curves; nothing is chosen or stopped by them.
        args = finetune.FinetuneArguments(
            data=[str(folder / "train.h5ad")],
            eval_data=[str(folder / "held_out.h5ad")],
            label_key=[LABEL],
            output=str(folder / name),
            model=str(folder / "pretrained"),
        )
        return finetune.run(args, {**FINETUNING, **STEPS, **epochs, "seed": seed})

    figures = make("classifier")
    facts = json.loads((folder / "classifier" / "fine_tuning.json").read_text())
    chosen = facts["num_train_epochs"]
    if chosen:
        make("classifier_start", num_train_epochs=0)
        return Classifiers("classifier_start", "classifier", chosen, facts, figures)
    make("classifier_trained", num_train_epochs=EPOCHS)
    return Classifiers("classifier", "classifier_trained", EPOCHS, facts, figures)


def _predict(
    folder: Path, train: AnnData, held_out: AnnData, pca: GenePca, classifiers: Classifiers
) -> dict[str, np.ndarray]:
    """Label the held-out cells with each classifier."""
    from ..evaluation.cell_baselines import log_normalise, predict_logistic_regression, predict_majority
    from ..evaluation.readers import fit_probe
    from . import annotate

    labels = train.obs[LABEL].astype(str)
    probe = fit_probe(pca(log_normalise(train.X)), labels)
    predictions = {
        MAJORITY: predict_majority(labels, len(held_out)),
        GENES: predict_logistic_regression(train.X, labels, held_out.X),
        PCA: probe.predict(pca(log_normalise(held_out.X))),
    }
    for name, model in ((START, classifiers.start), (TRAINED, classifiers.trained)):
        output = folder / f"held_out_by_{model}.h5ad"
        args = annotate.AnnotateArguments(
            data=str(folder / "held_out.h5ad"), model=str(folder / model), output=str(output)
        )
        predictions[name] = annotate.run(args).obs["stformer_label"].astype(str).to_numpy()
    return predictions


def score(held_out: AnnData, predictions: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """Score predictions of the held-out cells over the same classes: name -> result of `score_predictions`."""
    from ..evaluation.classifier_scores import score_predictions

    true = held_out.obs[LABEL].astype(str)
    classes = list(held_out.obs[LABEL].cat.categories)
    return {name: score_predictions(true, labels, classes, seed=seed) for name, labels in predictions.items()}


def _draw(
    folder: Path,
    cells: AnnData,
    held_out: AnnData,
    pca: GenePca,
    predicted: np.ndarray,
    order: list[str],
    few: pd.DataFrame,
    classifiers: Classifiers,
    pretraining: dict[str, float],
    args: DemoArguments,
) -> dict[str, Path]:
    """Plot losses with their baselines, the confusion matrix, the curve of few labels, and the embeddings."""
    import torch

    from ..evaluation.cell_baselines import log_normalise
    from ..inference import plots
    from . import embed

    plot_folder = folder / "plots"
    plot_folder.mkdir()
    names = ("pretraining", "fine_tuning", "confusion", "few_labels", "umap")
    pictures = {name: plot_folder / f"{name}.png" for name in names}

    def history(name: str) -> list[dict]:
        return json.loads((folder / name / "trainer_state.json").read_text())["log_history"]

    plots.loss_curves(
        {"masked genes": history("pretrained")},
        baselines={
            "marginal of the cell": pretraining["eval_cell_marginal_nll"],
            "marginal of the gene": pretraining["eval_gene_marginal_nll"],
        },
        title="Pretraining",
        save=pictures["pretraining"],
    )
    trained = history(classifiers.trained)
    start = next(entry["eval_loss"] for entry in trained if "eval_loss" in entry)
    plots.loss_curves(
        {"cell types": trained},
        baselines={"start, held out": start},
        title=f"Fine-tuning, {classifiers.epochs:g} epochs",
        save=pictures["fine_tuning"],
    )
    true = held_out.obs[LABEL].astype(str).tolist()
    plots.confusion(true, predicted, order, title=f"{len(held_out)} held-out cells", save=pictures["confusion"])
    plots.label_curve(few, title="Few labels", emphasised=START, save=pictures["few_labels"])

    cells.write_h5ad(folder / "cells.h5ad")
    output = folder / "cells_embedded_by_pretrained.h5ad"
    embedded = embed.run(
        embed.EmbedArguments(data=str(folder / "cells.h5ad"), model=str(folder / "pretrained"), output=str(output))
    )
    embedded.obsm["X_pca"] = pca(log_normalise(cells.X))
    embedded.obs["held out"] = embedded.obs_names.isin(held_out.obs_names)
    embedded.obs[LABEL] = embedded.obs[LABEL].cat.reorder_categories(order)
    n_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns that a seed means one thread
        plots.umaps(
            embedded,
            LABEL,
            {"GeneBert, pretrained": "X_stformer", "PCA50": "X_pca"},
            outlined="held out",
            seed=args.seed,
            save=pictures["umap"],
        )
    torch.set_num_threads(n_threads)  # umap sets torch's threads to one
    return pictures


def _write_report(folder: Path, *, pictures: dict[str, Path], **facts: Any) -> Path:
    import jinja2

    def picture(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode(pictures[name].read_bytes()).decode()

    from ..training.defaults import FINETUNING

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("stformer_hf.cli").joinpath("demo_report.html.jinja").read_text("utf-8"))
    settings = {
        "pretraining": PRETRAINING | PRETRAINING_STEPS,
        "fine-tuning": FINETUNING,
        "versions": {
            "python": platform.python_version(),
            "stformer_hf": __version__,
            **{name: version(name) for name in VERSIONS},
        },
    }
    report = folder / "report.html"
    config = json.loads((folder / "pretrained" / "config.json").read_text())
    report.write_text(
        template.render(picture=picture, folder=folder, settings=settings, config=config, **facts), encoding="utf-8"
    )
    kept = {name: facts[name] for name in ("table", "best", "per_class", "few", "few_classes", "seed")}
    kept["classifier"] = facts["classifiers"].facts
    (folder / "demo.json").write_text(json.dumps(kept, indent=1))
    return report
