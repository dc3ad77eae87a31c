"""Participants into train, validation and test; never a participant on both sides.

A participant's place depends on its name and on who else is in the cohort, not on the order of rows. Who is tested
does not depend on a seed, so that pretraining can leave them out from the start.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import pandas as pd

from kit.cohort.identity import UNSAID, Aliases, check_people_known, known_as, participant_ids

SALT = "kit participants v1"
SPLITS = ("train", "validation", "test")
FRACTIONS = (0.6, 0.2, 0.2)


class LeakageError(ValueError):
    """A participant stands on both sides of a comparison."""


def participant_hash(participant: str, salt: str = SALT) -> str:
    """A name's hash of 16 hex digits; with the public salt it can be guessed, and it hides nothing."""
    return hashlib.blake2b(participant.encode(), key=salt.encode(), digest_size=8).hexdigest()


def salt() -> str:
    """What hashed ids are made with: the public salt, or one of the site's own, by `KIT_SALT`."""
    own = os.environ.get("KIT_SALT")
    return hashlib.blake2b(own.encode(), digest_size=32).hexdigest() if own else f"{SALT}, one form"


def hashed_ids(participant_id: str, aliases: Aliases | None = None) -> set[str]:
    """Hashed ids that a person may have in an encoder's record: by each known name, with its dataset and without."""
    names = known_as(participant_id, aliases)
    return {participant_hash(each, salt()) for name in names for each in (name, UNSAID + name[name.rfind("/"):])}


def shuffled(participants: Iterable[str], seed: int | str, purpose: str) -> list[str]:
    """Distinct participants in the order of their hashes for this seed and purpose."""
    return sorted(set(participants), key=lambda name: (participant_hash(name, f"{purpose} {seed}"), name))


def splits(index: pd.DataFrame, seed: int, fractions: tuple[float, float, float] = FRACTIONS,
           rows_are_people: bool = False) -> pd.Series:
    """The index's own column `split`, or participants shuffled into train, validation, test.

    The test participants are the same for every seed; it decides between train and validation.

    Raises:
        LeakageError: the column `split` puts one participant's scans into two splits.
        IdentityError: scans have no participant, and nobody said that `rows_are_people`.
    """
    check_people_known(index, rows_are_people)
    ids = participant_ids(index)
    if "split" in index:
        mixed = index["split"].fillna("").groupby(ids).nunique()
        if (mixed > 1).any():
            raise LeakageError(f"split: {int((mixed > 1).sum())} participants have scans in two splits")
        return index["split"]
    tested = left_out(ids, fractions)
    order = shuffled(set(ids) - tested, seed, "split")
    trained = round(fractions[0] * (len(order) + len(tested)))
    place = dict.fromkeys(tested, SPLITS[2]) | {name: SPLITS[rank >= trained] for rank, name in enumerate(order)}
    return ids.map(place).rename("split")


def left_out(ids: Iterable[str], fractions: tuple[float, float, float] = FRACTIONS) -> set[str]:
    """The participants that are tested where no column `split` says who: the first by hash."""
    order = shuffled(ids, "", "test")
    return set(order[:len(order) - round((fractions[0] + fractions[1]) * len(order))])


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


def check_unseen(ids: pd.Series, seen_hashes: Iterable[str], allow: bool = False,
                 aliases: Aliases | None = None) -> int:
    """Count the participants that an encoder was pretrained on.

    Args:
        ids: participants to be evaluated, from `participant_ids`.
        seen_hashes: the encoder's, hashed as here or (by an older kit) name by name.
        allow: only count.
        aliases: who is known under several names.

    Raises:
        LeakageError: there are any, and `allow` is false.
    """
    seen = set(seen_hashes)
    known = sum(participant_hash(name) in seen or not seen.isdisjoint(hashed_ids(name, aliases)) for name in set(ids))
    if known and not allow:
        raise LeakageError(f"{known} of {ids.nunique()} participants to be evaluated were seen in pretraining; "
                           "test on others, or set allow_seen_participants: true and say so")
    return known
