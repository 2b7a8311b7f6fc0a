"""Objectives that train `[CLS]` beside masked genes, one file each; `ObjectiveTrainer.compute_loss` calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping

OBJECTIVES = ("mlm", "contrast", "decode", "cross_correlation")


def check_objectives(objectives: Mapping[str, float] | None) -> dict[str, float]:
    """Check objectives and their weights, {"mlm": 1.0} by default; return those above 0, in the order of `OBJECTIVES`.

    Raise a ValueError if a name is unknown, a weight is negative or not a number, or there is no objective.
    """
    given = dict({"mlm": 1.0} if objectives is None else objectives)
    unknown = [name for name in given if name not in OBJECTIVES]
    if unknown:
        raise ValueError(f"Unknown objective {', '.join(map(repr, unknown))}; valid ones are {', '.join(OBJECTIVES)}.")
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"The weight of an objective must be 0 or more; got {name}: {weight!r}.")
    chosen = {name: float(given[name]) for name in OBJECTIVES if given.get(name)}
    if not chosen:
        raise ValueError(f"No objective has a weight above 0; valid ones are {', '.join(OBJECTIVES)}.")
    return chosen
