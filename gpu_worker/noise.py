"""Randomness without a generator: a uniform number is a function of (seed, position).

Called by ``sampler.py``.  Nothing is kept between steps, so a resumed, preempted or
speculated token meets the same number again.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)      # 2**64 / golden ratio, odd: positions stay apart
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hash64(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64 [n] each → uint64 [n]: the seed is mixed before the position is added, so that
    streams of neighbouring seeds are not each other's shifted copies."""
    with np.errstate(over="ignore"):
        mixed = _mix(seeds.astype(np.uint64) + _GOLDEN)
        return _mix(_mix(mixed + _GOLDEN * (positions.astype(np.uint64) + np.uint64(1))))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1), 53 bits each."""
    return (hash64(seeds, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every input bit moves half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
