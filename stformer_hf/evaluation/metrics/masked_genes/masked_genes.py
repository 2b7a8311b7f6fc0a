"""Negative log likelihood and accuracy of masked genes, for `evaluate.load`."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """Mean negative log likelihood in nats, and accuracy, of masked tokens. It takes the predicted tokens
and their losses, never logits, so that memory does not grow with the vocabulary."""

_INPUTS = """
Args:
    predictions (list of int, or of lists): predicted token of each position.
    references (list of int, or of lists): true token; -100 where there is nothing to predict.
    nll (list of float, or of lists): negative log likelihood of the true token, in nats.

Returns:
    nll: mean over the positions with a true token, in nats; NaN without any.
    accuracy: share of correct predictions among them.
    perplexity: exp(nll).
    n_masked: their number.
"""


class MaskedGenes(evaluate.Metric):
    """Mean loss and accuracy of masked tokens."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": "int64", "references": "int64", "nll": "float64"}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
                datasets.Features({name: datasets.Sequence(datasets.Value(kind)) for name, kind in kinds.items()}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, nll: Any) -> dict[str, Any]:
        if len(references) and np.ndim(references[0]):  # rows, which may differ in length
            predictions, references, nll = (np.concatenate(rows) for rows in (predictions, references, nll))
        references = np.asarray(references)
        masked = references != -100
        if not masked.any():
            return {"nll": float("nan"), "accuracy": float("nan"), "perplexity": float("nan"), "n_masked": 0}
        mean = float(np.asarray(nll, np.float64)[masked].mean())
        return {
            "nll": mean,
            "accuracy": float((np.asarray(predictions)[masked] == references[masked]).mean()),
            "perplexity": float(np.exp(mean)),
            "n_masked": int(masked.sum()),
        }
