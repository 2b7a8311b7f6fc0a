"""The score of a trial, or of a checkpoint, among the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from ..genes.wrong_names import closest


def score_of(metrics: Mapping[str, float], metric: str) -> float:
    """Return the value of a metric; raise a ValueError if it is not among them."""
    if metric not in metrics:
        hint = closest(metric, metrics)
        raise ValueError(f"The evaluation has no metric {metric!r}{hint}; it has {', '.join(sorted(metrics))}.")
    return float(metrics[metric])
