"""Metrics of classification, from logits or from labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


__all__ = ["classification_metrics", "compute_classification_metrics"]
