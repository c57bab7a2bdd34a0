"""Seeded permutations that are the same on every machine and numpy version.

numpy promises stable bit streams (``Philox``) but not stable ``Generator.permutation`` (NEP 19), so the
shuffles sort raw random words.
"""

from __future__ import annotations

import hashlib

import numpy as np


def random_words(n: int, *key: int | str) -> np.ndarray:
    """``n`` random uint64, a pure function of ``n`` and ``key`` (counter-based, Salmon et al. 2011)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A permutation of ``0 .. n-1`` as int64, a pure function of ``n`` and ``key``."""
    return np.argsort(random_words(n, *key), kind="stable")
