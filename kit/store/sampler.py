"""Decide which scans an epoch's batches hold, and in what order, from (seed, epoch) alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kit.seeding import rng_for

LEAST_SHARE = 0.9  # of an equal share; with less, the first epoch warns


def epoch_batches(participants: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the global batches of one epoch: each scan at most once, a participant at most once per batch.

    Two scans of one brain must not be negatives of each other. The order depends only on (seed, epoch), not on
    workers. Batches smaller than `batch_size` are dropped if there are full ones, and batches of one scan if there are
    larger ones; their scans come up in other epochs.

    Args:
        participants: each scan's participant.
        batch_size: scans in a global batch.

    Returns:
        lists of scan numbers.
    """
    order = rng_for(seed, epoch).permutation(len(participants))
    batches: list[list[int]] = []
    present: list[set[str]] = []
    first_open = 0
    for number in order.tolist():
        for place in range(first_open, len(batches)):
            if len(batches[place]) < batch_size and participants[number] not in present[place]:
                break
        else:
            place = len(batches)
            batches.append([])
            present.append(set())
        batches[place].append(number)
        present[place].add(participants[number])
        while first_open < len(batches) and len(batches[first_open]) == batch_size:
            first_open += 1
    full = [batch for batch in batches if len(batch) == batch_size]
    return full or [batch for batch in batches if len(batch) > 1] or batches


def balanced(datasets: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Draw the same number of scans from each dataset, about as many in total as exist; return their numbers.

    Large datasets are drawn without replacement. In small ones, each scan comes equally often, give or take one.
    """
    codes, names = pd.factorize(np.asarray(datasets))
    rng, chosen = rng_for(seed, epoch, 1), []
    for code in range(len(names)):
        own = np.flatnonzero(codes == code)
        wanted = len(codes) // len(names)
        chosen += np.concatenate([rng.permutation(own) for _ in range(-(-wanted // len(own)))])[:wanted].tolist()
    return chosen


def session_batches(participants: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of pairs: a scan, then another scan of its participant (the same one if there is no other).

    Each participant comes at most once in an epoch.

    Returns:
        lists of 2 x `batch_size` scan numbers (fewer if there are too few participants), a pair's two side by side.
    """
    codes, names = pd.factorize(np.asarray(participants))
    rng = rng_for(seed, epoch, 2)
    scans = [rng.permutation(np.flatnonzero(codes == code))[:2].tolist() for code in range(len(names))]
    return [[number for one in batch for number in (scans[one][0], scans[one][-1])]
            for batch in epoch_batches(list(names), batch_size, seed, epoch)]


def batches_of(participants: Sequence[str], datasets: Sequence[str], batch_size: int, seed: int, epoch: int,
               sampling: str = "all") -> list[list[int]]:
    """Return an epoch's batches of "all" scans, or "balanced" over datasets; a participant at most once per batch.

    Few participants cannot fill their dataset's share of large batches: then the first epoch warns of the real shares.
    """
    if sampling == "all":
        return epoch_batches(participants, batch_size, seed, epoch)
    chosen = balanced(datasets, seed, epoch)
    batches = [[chosen[place] for place in batch]
               for batch in epoch_batches([participants[number] for number in chosen], batch_size, seed, epoch)]
    if epoch == 0:
        _warn_of_shares([datasets[number] for batch in batches for number in batch], sorted(set(datasets)))
    return batches


def _warn_of_shares(drawn: Sequence[str], datasets: Sequence[str]) -> None:
    shares = pd.Series(drawn).value_counts(normalize=True).reindex(datasets, fill_value=0.0)
    if shares.min() * len(shares) < LEAST_SHARE:
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        warnings.warn(f"sampling: balanced: the scans of an epoch are really {listed}, since a participant comes at "
                      "most once per batch, and small datasets have too few participants; a smaller batch_size evens "
                      "this out",
                      stacklevel=3)


def all_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one pass over all scans, as even in size as possible; no scan is dropped.

    No batch has a single scan, on which BatchNorm cannot train, unless `count` is 1. A batch may hold several scans of
    a participant, and has three scans if `batch_size` is 2 and `count` odd.

    Args:
        count: scans, at least 1.
        batch_size: most scans in a batch, at least 2.

    Returns:
        lists of scan numbers; the same number of lists in every epoch.
    """
    batches = max(1, min(math.ceil(count / batch_size), count // 2))
    return [part.tolist() for part in np.array_split(rng_for(seed, epoch).permutation(count), batches)]


def batches_between(count: int, batch_size: int, seed: int, first: int, batches: int) -> list[list[int]]:
    """Return `batches` batches of an endless sequence of passes, starting at number `first`; see `all_batches`."""
    a_pass = len(all_batches(count, batch_size, seed, 0))
    numbers = [divmod(number, a_pass) for number in range(first, first + batches)]
    passes = {epoch: all_batches(count, batch_size, seed, epoch) for epoch in {epoch for epoch, _ in numbers}}
    return [passes[epoch][number] for epoch, number in numbers]


def in_order(count: int, batch_size: int) -> list[list[int]]:
    """Return batches of `0 … count - 1` in order; the last one may be smaller."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
