"""Metrics of classification and of masked tokens, and functions that reduce logits before they are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from ...models.gene_bert.configuration_gene_bert import IGNORE

if TYPE_CHECKING:
    from evaluate import EvaluationModule
    from transformers import EvalPrediction


def classification_metrics(
    true: Sequence | np.ndarray, predicted: Sequence | np.ndarray, labels: Sequence | np.ndarray | None = None
) -> dict[str, float]:
    """Compute `accuracy`, and `macro_f1`: the unweighted mean of the classes' F1, 0 for a class never predicted.

    The classes are `labels`; by default those that occur in `true` or `predicted`, sequences (n,).
    """
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, labels=labels, average="macro", zero_division=0)),
    }


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> float:
    """Compute the mean distance, 0 to 1, of the highest probability from the accuracy (Guo et al. 2017).

    Means are over bins of equal width of the highest of the probabilities (n, n_classes); each bin counts by its
    number of cells. `labels` (n,) are the true classes, int.
    """
    highest = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((highest * n_bins).astype(np.int64), n_bins - 1)
    return float(np.abs(np.bincount(bins, correct - highest, n_bins)).sum() / len(labels))


def compute_classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy and macro F1 of the highest logit, as `compute_metrics` of a Trainer for classification.

    For cells or tokens; those with the label -100 are left out, and without any label both metrics are NaN. The macro
    F1 is over the classes that occur among the labels, so that it can be compared with that of other predictions.
    """
    return _scores_of_labelled(_first(prediction.predictions), np.asarray(prediction.label_ids))


def _first(outputs: Any) -> Any:
    """Return the logits of a model, without the hidden states or attentions that may follow."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _scores_of_labelled(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    labelled = labels != IGNORE
    if not labelled.any():
        return {"accuracy": float("nan"), "macro_f1": float("nan")}
    true = labels[labelled]
    return classification_metrics(true, np.argmax(logits, axis=-1)[labelled], np.unique(true))


def compute_column_metrics(columns: Mapping[str, slice]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make `compute_metrics` for a class in each of several label columns, whose outputs are `columns`, in order.

    It returns `<column>_accuracy` and `<column>_macro_f1` over the cells that have the label, NaN if there are none;
    and `accuracy` and `macro_f1`, their means over the columns that have labels.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = _first(prediction.predictions), np.asarray(prediction.label_ids)
        found = {
            column: _scores_of_labelled(logits[:, outputs], of_column)
            for (column, outputs), of_column in zip(columns.items(), labels.T, strict=True)
        }
        metrics = {f"{column}_{name}": value for column, of in found.items() for name, value in of.items()}
        for name in ("accuracy", "macro_f1"):
            known = [of[name] for of in found.values() if not np.isnan(of[name])]
            metrics[name] = float(np.mean(known)) if known else float("nan")
        return metrics

    return compute


def compute_regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a Trainer for numbers per cell: mean absolute error, and R².

    R² is 1 - (sum of squared errors) / (sum of squared deviations from the mean of these cells): 0 is what their mean
    would score. It is NaN where all cells have the same number.
    """
    true = np.asarray(prediction.label_ids, np.float64)
    error = np.asarray(_first(prediction.predictions), np.float64).reshape(true.shape) - true
    spread = ((true - true.mean(axis=0)) ** 2).sum()
    r2 = 1 - (error**2).sum() / spread if spread else float("nan")
    return {"mae": float(np.abs(error).mean()), "r2": float(r2)}


def balanced_class_weights(values: Sequence, classes: Sequence) -> list[float]:
    """Compute class weights n / (n_classes * n of the class), so that the mean weight of the cells is 1.

    `values` (n,) are the classes of the cells, missing ones ignored; the weights, for `GeneBertConfig.class_weights`,
    are in the order of `classes`, and 1 for a class without cells.
    """
    counts = pd.Series(values).value_counts()
    counts = np.array([counts.get(name, 0) for name in classes])
    weights = counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
    return np.where(counts > 0, weights, 1.0).tolist()


# ---------------------------------------------------------------------- masked tokens


def preprocess_logits_for_metrics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits of masked tokens to the predicted tokens, before Trainer gathers them.

    Parameters
    ----------
    logits : Tensor (n, length, V), or (k, V)
        Logits of all positions, or of the k labelled ones in row-major order (`config.sparse_prediction`).
    labels : LongTensor (n, length)
        Labels; -100 where there is none.

    Returns
    -------
    LongTensor (n, length)
        Token with the highest logit; -100 where there is no label.
    """
    return _put(_at_labels(logits, labels).argmax(-1), labels, IGNORE)


def preprocess_logits_with_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits to predicted tokens as `preprocess_logits_for_metrics`, and to negative log likelihoods.

    Returns
    -------
    predictions : LongTensor (n, length)
    nll : float32 Tensor (n, length)
        In nats; 0 where there is no label.
    """
    return preprocess_logits_for_metrics(logits, labels), _put(masked_nll(logits, labels), labels, 0)


def masked_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the negative log likelihood of labels, in nats: float32 Tensor (k,), in row-major order.

    Parameters are those of `preprocess_logits_for_metrics`.
    """
    at_labels = _at_labels(logits, labels).float()
    return torch.nn.functional.cross_entropy(at_labels, labels[labels != IGNORE], reduction="none")


def _at_labels(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    logits = _first(logits)
    return logits[labels != IGNORE] if logits.ndim == 3 else logits


def _put(values: torch.Tensor, labels: torch.Tensor, elsewhere: float) -> torch.Tensor:
    """Put one value per label at its position: Tensor (n, length)."""
    placed = values.new_full(labels.shape, elsewhere)
    placed[labels != IGNORE] = values
    return placed


def compute_phenotype_metrics(tokenizer: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make `compute_metrics` for masked phenotypes and genes, to go with `preprocess_logits_for_metrics`.

    The `tokenizer`, a `GeneTokenizer`, defines the categories, and the tokens of each.

    Returns
    -------
    callable
        Takes the predictions, int arrays (n, length), and returns `accuracy`, `macro_precision`, `macro_recall` and
        `macro_f1`: for each phenotype category with a prefix, such as `<category>_accuracy`; for all phenotypes
        together without a prefix, if there are any; and `genes_accuracy`. Categories without masked tokens are left
        out. Macro averages are over the values of the category that occur among true or predicted ones; any other
        token predicted for a phenotype is wrong, but not a class of its own.

    Raises
    ------
    ValueError
        The predictions are logits.

    Examples
    --------
    >>> trainer = STFormerPretrainer(
    ...     ...,
    ...     compute_metrics=compute_phenotype_metrics(tokenizer),
    ...     preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    ... )  # doctest: +SKIP
    """
    values = {category: tokenizer.phenotype_token_ids(category) for category in tokenizer.phenotypes}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted = _first(prediction.predictions)
        if np.shape(predicted) != np.shape(prediction.label_ids):
            raise ValueError(
                f"Predictions of shape {np.shape(predicted)} for labels of shape {np.shape(prediction.label_ids)}: "
                "pass preprocess_logits_for_metrics to the trainer, else it gathers logits."
            )
        labelled = prediction.label_ids != IGNORE
        true, predicted = prediction.label_ids[labelled], predicted[labelled]
        metrics = {}
        for category, ids in values.items():
            metrics.update(_macro(true, predicted, ids, f"{category}_"))
        metrics.update(_macro(true, predicted, np.concatenate([*values.values(), np.empty(0, np.int64)])))
        genes = tokenizer.get_gene_tokens_mask(true)
        if genes.any():
            metrics["genes_accuracy"] = float((true[genes] == predicted[genes]).mean())
        return metrics

    return compute


def _macro(true: np.ndarray, predicted: np.ndarray, ids: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Score the labels that are in `ids`."""
    among = np.isin(true, ids)
    if not among.any():
        return {}
    true, predicted = true[among], predicted[among]
    classes = np.intersect1d(ids, np.union1d(true, predicted))
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, predicted, labels=classes, average="macro", zero_division=0
    )
    figures = {"accuracy": (true == predicted).mean(), "macro_precision": precision, "macro_recall": recall}
    return {f"{prefix}{name}": float(value) for name, value in {**figures, "macro_f1": f1}.items()}


# ---------------------------------------------------------------------- modules of evaluate


def load_metric(name: str, **kwargs: Any) -> EvaluationModule:
    """Load a metric of this package for the evaluate library, without network.

    `name` is "masked_genes" or "cell_classification", that of its folder (`evaluate.load` also takes the path of the
    folder), and another name raises a ValueError. The other arguments are those of `evaluate.load`, such as
    `keep_in_memory`.
    """
    import evaluate

    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py") if path.stem == path.parent.name)
    if name not in names:
        raise ValueError(f"Unknown metric {name!r}; available are {', '.join(names)}.")
    return evaluate.load(str(folder / name), **kwargs)
