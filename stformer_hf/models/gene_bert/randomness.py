"""Random numbers that are a function of (seed, epoch, sample): the same on any number of workers and ranks."""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def uniforms(
    seed: int,
    epoch: int,
    stream: int,
    sample_ids: np.ndarray,
    counters: np.ndarray | int = 0,
    samples: np.ndarray | None = None,
) -> np.ndarray:
    """Uniform numbers in [0, 1), one an element, with no state.

    Parameters
    ----------
    seed, epoch : int
        Of the run.
    stream : int
        Tells independent uses of the same sample apart.
    sample_ids : int array (n_samples,)
        Ids of the samples (cells).
    counters : int array (n,) or int, default: 0
        Which number of its sample each element is.
    samples : int array (n,), optional
        Position in `sample_ids` of each element's sample; element i belongs to sample i by default.

    Returns
    -------
    float64 array (n,)
        Multiples of 2**-53.

    Notes
    -----
    The finaliser of splitmix64 (Steele, Lea and Flood 2014), applied to each part of the key in turn.
    """
    key = np.array([_GOLDEN], np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key ^ np.uint64(part & _MASK))
    key = _mix(key ^ np.asarray(sample_ids).astype(np.uint64))
    if samples is not None:
        key = key[samples]
    key = _mix(key ^ np.asarray(counters).astype(np.uint64))
    return (key >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
