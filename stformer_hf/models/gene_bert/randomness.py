"""Random numbers that are a function of (seed, epoch, sample): the same on any number of workers and ranks."""

from __future__ import annotations

import math

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
    return (_draw(seed, epoch, stream, sample_ids, counters, samples) >> np.uint64(11)) * 2.0**-53


def happens(
    share: float,
    seed: int,
    epoch: int,
    stream: int,
    sample_ids: np.ndarray,
    counters: np.ndarray | int = 0,
    samples: np.ndarray | None = None,
) -> np.ndarray:
    """Tell where `uniforms(seed, …) < share`, in half the time: bool array (n,)."""
    drawn = _draw(seed, epoch, stream, sample_ids, counters, samples)
    if share >= 1:
        return np.ones(drawn.shape, bool)
    return drawn < np.uint64(math.ceil(share * 2**53) << 11)


def _draw(seed, epoch, stream, sample_ids, counters, samples) -> np.ndarray:
    """64 random bits an element."""
    key = np.array([_GOLDEN], np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key ^ np.uint64(int(part) & _MASK))
    key = _mix(key ^ np.asarray(sample_ids).astype(np.uint64))
    if samples is not None:
        key = key.take(samples)
    return _mix(key ^ np.asarray(counters).astype(np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    """Scramble, in place: a pass over fresh memory costs more than the arithmetic."""
    shifted = np.empty_like(z)
    z += np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        z *= np.uint64(factor)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z
