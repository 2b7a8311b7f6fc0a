"""Random numbers that are a function of (seed, epoch, sample): the same on any number of workers and ranks."""

from __future__ import annotations

import math
from functools import lru_cache

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
    """Return uniform numbers in [0, 1), one per element, without state.

    Parameters
    ----------
    seed, epoch : int
        Seed and epoch of the run.
    stream : int
        Number of the use, so that different uses of the same sample are independent.
    sample_ids : int array (n_samples,)
        Ids of the samples (cells).
    counters : int array (n,) or int, default: 0
        Number of each element within its sample.
    samples : int array (n,), optional
        Index in `sample_ids` of each element's sample; element i belongs to sample i by default.

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
    """Return `uniforms(seed, …) < share`, bool array (n,), in half the time."""
    drawn = _draw(seed, epoch, stream, sample_ids, counters, samples)
    if share >= 1:
        return np.ones(drawn.shape, bool)
    return drawn < np.uint64(math.ceil(share * 2**53) << 11)


def _draw(
    seed: int,
    epoch: int,
    stream: int,
    sample_ids: np.ndarray,
    counters: np.ndarray | int,
    samples: np.ndarray | None,
) -> np.ndarray:
    """Return 64 random bits per element."""
    key = mix(_key_of(int(seed), int(epoch), int(stream)) ^ np.asarray(sample_ids).astype(np.uint64))
    if samples is not None:
        key = key.take(samples)
    return mix(key ^ np.asarray(counters).astype(np.uint64))


@lru_cache(64)  # for a few cells, this takes longer than all else
def _key_of(*parts: int) -> np.ndarray:
    key = np.array([_GOLDEN], np.uint64)
    for part in parts:
        key = mix(key ^ np.uint64(part & _MASK))
    return key


def mix(z: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers in place, and return them: a pass over new memory costs more than the arithmetic."""
    shifted = np.empty_like(z)
    z += np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        z *= np.uint64(factor)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z
