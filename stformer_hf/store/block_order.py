"""The order of an epoch in shuffled blocks, as a function of the position: any part of it, without the whole."""

from __future__ import annotations

import numpy as np

from ..models.gene_bert.randomness import mix

ORDER = "by position (new in version 0.2)"  # in saved states: earlier versions had another order
_ROUNDS = 6  # with five, pairs of rows are not as random as those of a permutation that is drawn
_FEW = 4096  # up to so many blocks, for which six rounds are too few, the permutation is drawn as a whole
_STREAM = 0xB10C


def block_order(
    n: int, block_size: int, seed: int, epoch: int, start: int = 0, stop: int | None = None, *, window: int = 1
) -> np.ndarray:
    """Return part `start:stop` of n rows in a random order of blocks; other parameters: `CellStore.block_shuffle`.

    Returns
    -------
    int64 array (stop - start,)

    Notes
    -----
    Blocks are permuted by a Feistel network (Luby and Rackoff 1988) of six rounds on the smallest power of two that
    holds their numbers. A number outside is permuted again until it is inside (Black and Rogaway 2002). Up to 4,096
    blocks are permuted by numpy.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: a block needs at least one row.")
    if window < 1:
        raise ValueError(f"window={window}: a window needs at least one block.")
    stop = n if stop is None else min(stop, n)
    keys = mix(np.arange(_ROUNDS + 1, dtype=np.uint64) ^ mix(_key(seed) ^ mix(_key(epoch) ^ mix(_key(_STREAM)))))
    if window == 1:
        return _in_blocks(n, block_size, keys, start, stop)
    size = window * block_size
    parts = [np.empty(0, np.int64)]
    for number in range(start // size, -(-stop // size)):
        first = number * size
        rows = _in_blocks(n, block_size, keys, first, min(first + size, n))
        rows = np.random.default_rng([*keys.tolist(), number]).permutation(rows)
        parts.append(rows[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def _in_blocks(n: int, block_size: int, keys: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return a part of the order of blocks, whose rows stay together."""
    n_whole, n_rest = divmod(n, block_size)
    # The rows of the incomplete block come after so many rows of whole blocks.
    rest = int(keys[-1]) % (n_whole + 1) * block_size
    parts = []
    for begin, end in ((start, min(stop, rest)), (max(start, rest + n_rest) - n_rest, stop - n_rest)):
        if begin < end:
            first = begin // block_size
            blocks = _permuted(np.arange(first, -(-end // block_size), dtype=np.uint64), n_whole, keys)
            rows = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
            parts.append(rows[begin - first * block_size : end - first * block_size])
    incomplete = np.arange(max(start - rest, 0), min(stop - rest, n_rest)) + n_whole * block_size
    parts.insert(int(start < rest), incomplete)
    return np.concatenate(parts)


def _key(part: int) -> np.ndarray:
    return np.array([part & (1 << 64) - 1], np.uint64)


def _permuted(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return the images of numbers, uint64, in a random permutation of 0 to n - 1, int64."""
    if n <= _FEW:
        return np.random.default_rng(keys).permutation(n)[numbers]
    images = _feistel(numbers, n, keys)
    outside = np.flatnonzero(images >= n)
    while len(outside):
        images[outside] = _feistel(images[outside], n, keys)
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def _feistel(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers of as many bits as n - 1 has."""
    n_bits = (n - 1).bit_length()
    n_high = n_bits // 2
    n_low = n_bits - n_high
    high, low = numbers >> np.uint64(n_low), numbers & np.uint64((1 << n_low) - 1)
    for key in keys[:_ROUNDS]:
        high, low = low, high ^ (mix(low ^ key) & np.uint64((1 << n_high) - 1))
        n_high, n_low = n_low, n_high
    return high << np.uint64(n_low) | low
