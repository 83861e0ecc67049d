"""Numbers that look random and are functions of a key: what orders and rearranges documents, for ever the same.

NumPy promises no such thing of its generators (NEP 19), and a run of months outlives a version of NumPy.
"""

from __future__ import annotations

import hashlib

import numpy as np

_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key_of(*parts: object) -> int:
    """Return a key of 64 bits for what ``parts`` name: their text decides, and where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def hashed(key: int, numbers: np.ndarray) -> np.ndarray:
    """Return outputs ``numbers`` (from 0) of SplitMix64 seeded with ``key``: uint64, in the shape of ``numbers``.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014).
    """
    numbers = np.asarray(numbers)
    counted = np.atleast_1d(numbers).astype(np.uint64) + np.uint64(1)  # NumPy warns of scalars that wrap
    mixed = np.uint64(key & _MASK) + counted * np.uint64(_STEP)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).reshape(numbers.shape)


def uniform(key: int, numbers: np.ndarray) -> np.ndarray:
    """Return :func:`hashed` as float64 in [0, 1): its upper 53 bits."""
    return (hashed(key, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53
