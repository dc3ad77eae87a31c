"""Keyed random numbers: a draw depends on its key, not on how many draws came before."""

from __future__ import annotations

import hashlib

import numpy as np


def scan_key(scan: str) -> int:
    """63-bit key of a scan's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(scan.encode(), digest_size=8).digest(), "big") >> 1


def rng_for(*numbers: int) -> np.random.Generator:
    """Random generator keyed by these numbers, the same on every machine.

    Keys of up to four numbers that differ only in trailing zeros are the same: numpy pads (5,) to (5, 0, 0, 0). A
    number of 2**32 or more counts as several.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
