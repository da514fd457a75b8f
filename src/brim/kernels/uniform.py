"""The one random number of a sampled token. Owns the counter-based hash every backend reproduces bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = state + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def uniform_from_seed(seed: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
    """Uniform float32 in [0, 1) per row: the top 24 bits of splitmix64(splitmix64(seed) + position) over 2^24.

    seed, position: [R] int64 (taken as uint64, wrapping). Source: Steele, Lea, Flood, OOPSLA 2014 (splitmix64).
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(_splitmix64(seed.astype(np.uint64)) + position.astype(np.uint64))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
