"""The score of a trial, or of a checkpoint, among the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches


def score_of(metrics: Mapping[str, float], metric: str) -> float:
    """Return the value of a metric.

    Raises
    ------
    ValueError
        It is not among the metrics.
    """
    if metric not in metrics:
        near = get_close_matches(metric, metrics, n=1, cutoff=0.5)
        hint = f"; the closest known one is {near[0]}" if near else ""
        raise ValueError(f"The evaluation has no metric {metric!r}{hint}; it has {', '.join(sorted(metrics))}.")
    return float(metrics[metric])


__all__ = ["score_of"]
