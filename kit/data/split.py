"""Participants into train, validation and test; never a participant on both sides.

Each participant's place depends on (seed, participant) alone, so it stays when others join the cohort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd

SALT = "kit participants v1"
SPLITS = ("train", "validation", "test")


class LeakageError(ValueError):
    """A participant stands on both sides of a comparison."""


def participant_ids(index: pd.DataFrame) -> pd.Series:
    """Participants with their dataset's name before them: `01` of one dataset is not `01` of another."""
    return index["dataset"].astype(str) + "/" + index["participant"].astype(str)


def participant_hash(participant: str, salt: str = SALT) -> str:
    """Salted hash (16 hex digits) that stands for a participant in an encoder's file."""
    return hashlib.blake2b(participant.encode(), key=salt.encode(), digest_size=8).hexdigest()


def shuffled(participants: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Distinct participants in the order of their hashes for this seed and purpose."""
    return sorted(set(participants), key=lambda name: (participant_hash(name, f"{purpose} {seed}"), name))


def splits(index: pd.DataFrame, seed: int, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)) -> pd.Series:
    """The index's own column `split`, or participants shuffled by the seed into train, validation, test.

    Raises:
        LeakageError: the column `split` puts one participant's scans into two splits.
    """
    ids = participant_ids(index)
    if "split" in index:
        mixed = index["split"].groupby(ids).nunique()
        if (mixed > 1).any():
            raise LeakageError(f"split: {int((mixed > 1).sum())} participants have scans in two splits")
        return index["split"]
    order = shuffled(ids, seed, "split")
    edges = np.cumsum(fractions) * len(order)
    place = {name: SPLITS[int(np.searchsorted(edges[:2], rank, side="right"))] for rank, name in enumerate(order)}
    return ids.map(place).rename("split")


def label_subset(ids: pd.Series, labels: np.ndarray, kind: str, fraction: float, seed: int) -> np.ndarray:
    """Which rows remain when only a fraction of the participants has labels.

    Classes keep their shares, at least two participants of each remain, and smaller fractions are nested
    in larger ones of the same seed.

    Args:
        ids: (rows,) participants.
        labels: (rows,) float, of the `kind` "classification" or "regression".
    """
    keep: set[str] = set()
    for value in np.unique(labels) if kind == "classification" else [None]:
        order = shuffled(ids if value is None else ids[labels == value], seed, "label fraction")
        keep.update(order[:max(2, round(fraction * len(order)))])
    return ids.isin(keep).to_numpy()


def check_unseen(ids: pd.Series, seen_hashes: Iterable[str], allow: bool = False) -> int:
    """Count the participants that an encoder was pretrained on.

    Raises:
        LeakageError: there are any, and `allow` is false.
    """
    seen = set(seen_hashes)
    known = sum(participant_hash(name) in seen for name in set(ids))
    if known and not allow:
        raise LeakageError(f"{known} of {ids.nunique()} participants to be evaluated were seen in pretraining; "
                           "test on others, or set allow_seen_participants: true and say so")
    return known
