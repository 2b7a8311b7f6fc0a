"""Accuracy and macro precision, recall and F1 of classes of cells, for `evaluate.load`."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

_DESCRIPTION = """Accuracy, and the unweighted means over the classes of precision, recall and F1. The macro F1 is the
mean of the classes' F1, not the F1 of the mean precision and recall."""

_INPUTS = """
Args:
    predictions (list of int): predicted class of each cell.
    references (list of int): true class of each cell; -100 where there is none.
    labels (list of int, optional): classes to average over; by default those among true or predicted ones.

Returns:
    accuracy, macro_precision, macro_recall, macro_f1: floats from 0 to 1; NaN without any true class. A class that is
    never predicted has a precision of 0.
"""


class CellClassification(evaluate.Metric):
    """Accuracy and macro averages of a classification of cells."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, labels: Any = None) -> dict[str, float]:
        references, predictions = np.asarray(references), np.asarray(predictions)
        names, labelled = ("accuracy", "macro_precision", "macro_recall", "macro_f1"), references != -100
        if not labelled.any():
            return dict.fromkeys(names, float("nan"))
        references, predictions = references[labelled], predictions[labelled]
        *macro, _ = precision_recall_fscore_support(
            references, predictions, labels=labels, average="macro", zero_division=0
        )
        return dict(zip(names, map(float, (accuracy_score(references, predictions), *macro)), strict=True))
