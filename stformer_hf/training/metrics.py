"""Metrics of classification, from logits or from labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score


def classification_metrics(true: Sequence, predicted: Sequence, labels: Sequence | None = None) -> dict[str, float]:
    """Accuracy and macro F1.

    Parameters
    ----------
    true, predicted : sequence (n,)
        Classes.
    labels : sequence, optional
        Classes that the macro F1 averages over; those that occur in `true` or `predicted` by default.

    Returns
    -------
    dict
        `accuracy`, and `macro_f1`: the unweighted mean of the classes' F1, 0 for a class never predicted.
    """
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, labels=labels, average="macro", zero_division=0)),
    }


def compute_classification_metrics(prediction) -> dict[str, float]:
    """`compute_metrics` of a Trainer for classification: accuracy and macro F1 of the highest logit."""
    return classification_metrics(prediction.label_ids, np.argmax(prediction.predictions, axis=-1))


def balanced_class_weights(values: Sequence, classes: Sequence) -> list[float]:
    """Weigh classes by n / (n_classes * n of the class), so that the mean weight of the cells is 1.

    Parameters
    ----------
    values : sequence (n,)
        Class of each cell; missing ones are passed over.
    classes : sequence
        All classes, in the order of the model's labels.

    Returns
    -------
    list of float
        For `GeneBertConfig.class_weights`; a class without cells weighs 1.
    """
    counts = pd.Series(values).value_counts()
    counts = np.array([counts.get(name, 0) for name in classes])
    weights = counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
    return np.where(counts > 0, weights, 1.0).tolist()


__all__ = ["balanced_class_weights", "classification_metrics", "compute_classification_metrics"]
