"""Which scans an epoch takes: balanced over datasets, two sessions of a participant as a pair.

The orders depend on (seed, epoch) alone. `kit.data.loader.epoch_batches` makes the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kit.data.loader import epoch_batches


def _random(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, purpose])))


def balanced(datasets: Sequence[str], seed: int, epoch: int) -> list[int]:
    """As many scans of each dataset, as many in all as there are: the chosen scans' numbers.

    A large dataset is drawn from without replacement; of a small one each scan comes as often as any other, give
    or take one.
    """
    codes, names = pd.factorize(np.asarray(datasets))
    rng, chosen = _random(seed, epoch, 1), []
    for code in range(len(names)):
        own = np.flatnonzero(codes == code)
        wanted = len(codes) // len(names)
        chosen += np.concatenate([rng.permutation(own) for _ in range(-(-wanted // len(own)))])[:wanted].tolist()
    return chosen


def session_batches(participants: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of twos: a scan, then another scan of the participant (itself where there is no other).

    Each participant comes once in an epoch.

    Returns:
        lists of 2 x `batch_size` scan numbers.
    """
    codes, names = pd.factorize(np.asarray(participants))
    rng = _random(seed, epoch, 2)
    scans = [rng.permutation(np.flatnonzero(codes == code))[:2].tolist() for code in range(len(names))]
    return [[number for one in batch for number in (scans[one][0], scans[one][-1])]
            for batch in epoch_batches(list(names), batch_size, seed, epoch)]


def batches_of(participants: Sequence[str], datasets: Sequence[str], batch_size: int, seed: int, epoch: int,
               sampling: str = "all") -> list[list[int]]:
    """An epoch's batches with a participant at most once in each.

    Args:
        participants, datasets: of each scan.
        batch_size: scans in a global batch.
        sampling: "all" takes every scan once, "balanced" as many of each dataset.
    """
    if sampling == "all":
        return epoch_batches(participants, batch_size, seed, epoch)
    chosen = balanced(datasets, seed, epoch)
    return [[chosen[place] for place in batch]
            for batch in epoch_batches([participants[number] for number in chosen], batch_size, seed, epoch)]
