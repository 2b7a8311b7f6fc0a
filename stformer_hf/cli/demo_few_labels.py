"""The demo's curve of few labels: the start of a classifier and baselines, from the same few labelled cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..evaluation.cell_baselines import log_normalise, predict_logistic_regression
from ..evaluation.readers import GenePca, fit_probe
from ..evaluation.splits import draw_labelled
from ..inference.annotate import annotate
from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
from ..models.gene_bert.modeling_gene_bert import GeneBertModel
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..training.defaults import MAX_LENGTH
from ..training.finetuning import finetune
from ..training.starts.spectral_start import initialise_from_store
from .demo_rows import GENES, LABEL, PCA, START

if TYPE_CHECKING:
    from anndata import AnnData

    from ..store.cell_store import CellStore


def label_few(
    store: CellStore,
    train: AnnData,
    held_out: AnnData,
    pca: GenePca,
    *,
    seed: int,
    n_labels: Sequence[int],
    n_draws: int,
) -> pd.DataFrame:
    """Label held-out cells with classifiers trained on the same few labelled cells.

    The other training cells are unlabelled here; the components of the PCA and of the model's start come from all
    training cells (`store` and `train`, in the same order). For each number of labelled cells per class in `n_labels`,
    there are `n_draws` draws.

    Returns
    -------
    DataFrame
        `n_labels`, `draw`, `classifier`, `accuracy`; `attrs["classes"]` are the classes with enough training cells
        for every number of labels. Cells of other classes are left out.
    """
    torch.manual_seed(seed)
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, max_length=MAX_LENGTH)
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    initialise_from_store(model, tokenizer, store)

    labels = train.obs[LABEL].astype(str).to_numpy()
    sizes = train.obs[LABEL].value_counts()
    classes = sorted(sizes.index[sizes >= max(n_labels)])
    test = held_out[held_out.obs[LABEL].isin(classes)].copy()
    true, components = test.obs[LABEL].astype(str).to_numpy(), pca(log_normalise(train.X))
    test_components = pca(log_normalise(test.X))
    rows = []
    for n in n_labels:
        for draw in range(n_draws):
            drawn = np.sort(
                draw_labelled(labels, np.arange(len(labels)), classes, n, np.random.default_rng([seed, n, draw]))
            )
            classifier = finetune(
                train[drawn].copy(), LABEL, model=model, tokenizer=tokenizer, num_train_epochs=0, seed=seed
            )
            annotate(test, classifier, tokenizer=classifier.tokenizer)
            found = {
                START: test.obs["stformer_label"].astype(str).to_numpy(),
                GENES: predict_logistic_regression(train.X[drawn], labels[drawn], test.X),
                PCA: fit_probe(components[drawn], labels[drawn]).predict(test_components),
            }
            rows += [
                {"n_labels": n, "draw": draw, "classifier": name, "accuracy": float(np.mean(of == true))}
                for name, of in found.items()
            ]
    points = pd.DataFrame(rows)
    points.attrs["classes"] = classes
    return points


def summarise(few: pd.DataFrame) -> dict[str, dict[int, tuple[float, float]]]:
    """Compute the mean and standard deviation over draws: classifier -> number of labels -> both."""
    of_draws = few.pivot(index="draw", columns=["classifier", "n_labels"], values="accuracy").agg(["mean", "std"])
    return {name: {n: tuple(of_draws[name, n]) for n in of_draws[name]} for name in few["classifier"].unique()}
