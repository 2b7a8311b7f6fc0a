"""Cells in, a pretrained and fine-tuned GeneBert, embeddings, plots and a report out.

stformer-hf demo --output demo_output

700 labelled cells of human blood, which the scanpy package ships, go through the verbs of this program: build,
pretrain, finetune, annotate, embed. No network is used.
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
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from .arguments import parse

LABEL = "bulk_labels"
HELD_OUT = 0.25
# Most counts of this data are 0 to 8; each bin is about twice as wide as the last.
BIN_EDGES = [0.5, 1.5, 2.5, 4.5, 8.5]
# Leaving out half of a cell's genes, other ones in each epoch, makes many cells of few, and steps cheap.
PRETRAINING = {"bin_edges": BIN_EDGES, "mlm_probability": 0.5, "gene_dropout": 0.5}
FINETUNING = {"pooling": "mean", "gene_dropout": 0.5}
PRETRAINING_STEPS = {
    "max_steps": 350,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 70,
}
STEPS = {"save_strategy": "no", "logging_steps": 20}  # of both
FINETUNING_STEPS = {"num_train_epochs": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 8}

MODELS = ("pretrained", "classifier", "classifier_from_scratch")
MADE = (
    *("demo.json", "train.h5ad", "held_out.h5ad", "cells.h5ad", "store", "plots", "report.html", *MODELS),
    *(f"held_out_by_{name}.h5ad" for name in MODELS),
    *(f"cells_embedded_by_{name}.h5ad" for name in MODELS),
)


@dataclass
class DemoArguments:
    """Flags of `demo`."""

    output: str = field(default="demo_output", metadata={"help": "folder for all that the demo makes"})
    seed: int = field(default=0, metadata={"help": "of the split, the weights, the masks and the UMAP"})
    overwrite: bool = field(default=False, metadata={"help": "replace the folder of an earlier demo"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, DemoArguments, verb="demo", description=__doc__)
    run(args)


def run(args: DemoArguments) -> dict[str, dict[str, float]]:
    """Run the demo; returns the figures of its table: name of a classifier -> accuracy and macro F1."""
    began = time.monotonic()
    try:
        import matplotlib
        import scanpy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The demo needs its extra: pip install 'stformer_hf[demo]' ({error}).") from error
    matplotlib.use("agg")
    import torch
    from transformers.utils import logging

    # Sums depend on the threads in their last digits: MKL chooses its own until torch is told, as `_draw` tells it.
    torch.set_num_threads(torch.get_num_threads())
    logging.set_verbosity_error()
    folder = _make_folder(Path(args.output), args.overwrite)

    with _step(1, "cells: 700 PBMCs that the scanpy package ships"):
        cells, residual = load_cells()
        train, held_out = split_cells(cells, args.seed)
        train.write_h5ad(folder / "train.h5ad")
        held_out.write_h5ad(folder / "held_out.h5ad")
        print(f"{len(train)} cells to train on, {len(held_out)} held out; counts recovered to within {residual:.3f}")
    with _step(2, "build: cells to a CellStore"):
        from . import build

        store = build.run(build.BuildArguments([str(folder / "train.h5ad")], str(folder / "store"), obs=[LABEL]))
        print(store)
    with _step(3, "pretrain: predict masked genes"):
        pretraining = _pretrain(folder, args.seed)
    with _step(4, "finetune: from the pretrained model"):
        fine_tuning = _finetune(folder, args.seed, "classifier", str(folder / "pretrained"))
    with _step(5, "finetune: the same without pretraining"):
        _finetune(folder, args.seed, "classifier_from_scratch", None)
    with _step(6, "annotate the held-out cells, and compare with simple baselines"):
        predictions = _predict(folder, train, held_out)
        table = _score(held_out, predictions)
        for name, row in table.items():
            print(f"{name:<46} accuracy {row['accuracy']:.3f}  macro F1 {row['macro_f1']:.3f}")
    with _step(7, "embed all cells, and draw"):
        pictures = _draw(folder, cells, held_out, predictions["GeneBert, pretrained and fine-tuned"], args.seed)
    with _step(8, "report"):
        report = _write_report(
            folder,
            table=table,
            pictures=pictures,
            n_train=len(train),
            n_held_out=len(held_out),
            n_rarest=int(held_out.obs[LABEL].value_counts().min()),
            seed=args.seed,
            figures={"pretraining": pretraining, "fine-tuning": fine_tuning},
            seconds=time.monotonic() - began,
        )
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {report}")
    return table


def load_cells() -> tuple[Any, float]:
    """Read scanpy's 700 PBMCs (10x PBMC 68k, Zheng et al. 2017) and recover their counts.

    The package ships ln(1 + 10,000 count / total); the count is what that gives back, rounded.

    Returns
    -------
    AnnData (700, 765)
        Counts as CSR float32; ten cell types in `obs["bulk_labels"]`.
    float
        The largest difference of a recovered count from a whole number.

    Raises
    ------
    ValueError
        The data that the installed scanpy ships do not give whole numbers.
    """
    import numpy as np
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
        raise ValueError(f"scanpy {version('scanpy')} ships other PBMCs: counts come out {residual:.2f} off.")
    cells = AnnData(
        sparse.csr_matrix(counts.astype(np.float32)), obs=shipped.obs[[LABEL]].copy(), var=shipped.raw.var[[]].copy()
    )
    return cells, residual


def split_cells(cells, seed: int):
    """Split cells into a training and a held-out part with like shares of each type, by the seed."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(cells)), test_size=HELD_OUT, random_state=seed, stratify=cells.obs[LABEL]
    )
    return cells[np.sort(train)].copy(), cells[np.sort(held_out)].copy()


def _make_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} exists. Choose another --output, or pass --overwrite.")
        if not (folder / "demo.json").exists():
            raise FileExistsError(f"{folder} holds something other than a demo; it is left as it is.")
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


def _finetune(folder: Path, seed: int, name: str, model: str | None) -> dict[str, float]:
    from . import finetune

    args = finetune.FinetuneArguments(
        data=[str(folder / "store")],
        label=LABEL,
        output=str(folder / name),
        model=model,
        held_out=0.0,
        **FINETUNING,
        **({} if model else {"bin_edges": BIN_EDGES}),
    )
    return finetune.run(args, {**finetune.TRAINING_DEFAULTS, **FINETUNING_STEPS, **STEPS, "seed": seed})


def _predict(folder: Path, train, held_out) -> dict[str, Any]:
    """Label the held-out cells by each classifier."""
    from ..evaluation.cell_baselines import predict_logistic_regression, predict_majority
    from . import annotate

    labels = train.obs[LABEL].astype(str)
    predictions = {
        "majority class": predict_majority(labels, len(held_out)),
        "logistic regression on log-normalised counts": predict_logistic_regression(train.X, labels, held_out.X),
    }
    for name, model in (
        ("GeneBert, pretrained and fine-tuned", "classifier"),
        ("GeneBert, fine-tuned without pretraining", "classifier_from_scratch"),
    ):
        output = folder / f"held_out_by_{model}.h5ad"
        args = annotate.AnnotateArguments(str(folder / "held_out.h5ad"), str(folder / model), str(output))
        predictions[name] = annotate.run(args).obs["stformer_label"].astype(str).to_numpy()
    return predictions


def _score(held_out, predictions: dict[str, Any]) -> dict[str, dict[str, float]]:
    from ..evaluation.metrics import classification_metrics

    true = held_out.obs[LABEL].astype(str)
    classes = held_out.obs[LABEL].cat.categories
    return {name: classification_metrics(true, labels, classes) for name, labels in predictions.items()}


def _draw(folder: Path, cells, held_out, predicted, seed: int) -> dict[str, Path]:
    """Draw losses, confusion matrix, and UMAPs of the embeddings before and after fine-tuning."""
    import torch

    from ..inference import plots
    from . import embed

    plot_folder = folder / "plots"
    plot_folder.mkdir()
    pictures = {
        name: plot_folder / f"{name}.png"
        for name in ("pretraining", "fine_tuning", "confusion", "umap", "umap_before")
    }
    history = {name: json.loads((folder / name / "trainer_state.json").read_text())["log_history"] for name in MODELS}
    plots.loss_curves({"masked genes": history["pretrained"]}, title="Pretraining", save=pictures["pretraining"])
    plots.loss_curves(
        {"pretrained": history["classifier"], "from scratch": history["classifier_from_scratch"]},
        title="Fine-tuning",
        save=pictures["fine_tuning"],
    )
    plots.confusion(
        held_out.obs[LABEL].astype(str),
        predicted,
        list(cells.obs[LABEL].cat.categories),
        title=f"{len(held_out)} held-out cells",
        save=pictures["confusion"],
    )

    cells.write_h5ad(folder / "cells.h5ad")
    n_threads = torch.get_num_threads()
    for picture, model, pooling, title in (
        ("umap_before", "pretrained", "mean", "pretrained only"),
        ("umap", "classifier", "mean", "pretrained and fine-tuned"),
    ):
        output = folder / f"cells_embedded_by_{model}.h5ad"
        args = embed.EmbedArguments(str(folder / "cells.h5ad"), str(folder / model), str(output), pooling=pooling)
        embedded = embed.run(args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # umap: one thread because of its seed
            plots.umap(embedded, LABEL, title=f"X_stformer, {title}", random_state=seed, save=pictures[picture])
        torch.set_num_threads(n_threads)  # umap sets torch's to one
    return pictures


def _write_report(folder: Path, *, pictures: dict[str, Path], **facts) -> Path:
    import jinja2

    def picture(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode(pictures[name].read_bytes()).decode()

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("stformer_hf.cli").joinpath("demo_report.html.jinja").read_text("utf-8"))
    settings = {
        "pretraining": PRETRAINING | PRETRAINING_STEPS,
        "fine-tuning": FINETUNING | FINETUNING_STEPS,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("stformer_hf", "torch", "transformers", "datasets", "anndata", "scanpy")
            },
        },
    }
    report = folder / "report.html"
    config = json.loads((folder / "pretrained" / "config.json").read_text())
    report.write_text(
        template.render(picture=picture, folder=folder, settings=settings, config=config, **facts), encoding="utf-8"
    )
    (folder / "demo.json").write_text(json.dumps({"table": facts["table"], "seed": facts["seed"]}, indent=1))
    return report
