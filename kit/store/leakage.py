"""Nobody and no scan on both sides: between the parts of a split, and between an encoder's scans and those tested.

People are compared by the hash of `dataset/participant` (see `kit.cohort.identity.key`), scans by the hash of their
voxels, which finds a scan that was copied, linked or named anew. Both stand in an encoder's record as hashed ids.
The salt is public, so names can be guessed: a site whose names must not be guessed sets its own in `KIT_SALT`, and
then has to set the same wherever the encoder is evaluated.

What is hashed is the prepared scan's middle, eight slices. It lies inside any brain mask, so two masks of one scan give
one hash where the intensity does not depend on the mask; it is a block or two of the file; and an encoder and its scans
share a preparation, which gives the same voxels from the same file. A tolerant fingerprint would find a scan under
another preparation, too, and on coarse grids take two people for one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import Aliases, check_datasets_known, known_as, loose
from kit.cohort.split import LeakageError, check_unseen, participant_hash, salt
from kit.store.store import Store, StoreError, scan_path

SLICES = 8  # a block of the store, or two
LEARNED = ("pretrain", "train", "validation")  # parts that are learned from; all others are tested
PLACES = ("dataset", "site", "scanner", "manufacturer")  # columns that say where scans are from
_hashed: dict[tuple[str, int, str], str] = {}  # by file, its time and the salt: folds and tasks ask again


def voxel_hashes(store: Store, scans: Iterable[str]) -> dict[str, str]:
    """Each scan's hashed voxels; scans that cannot be read are left out, for nothing can be learned from them."""
    found = {}
    deep, high, wide = store.grid.shape
    middle = (slice(deep // 2 - SLICES // 2, deep // 2 + SLICES // 2), slice(high // 4, high - high // 4),
              slice(wide // 4, wide - wide // 4))
    for scan in scans:
        path = scan_path(store.folder, scan)
        known = (str(path), path.stat().st_mtime_ns if path.exists() else 0, salt())
        if known in _hashed:
            found[scan] = _hashed[known]
            continue
        try:
            values = store.read(scan, middle)[0]
            if values.min() == values.max():  # nothing in the middle: then all of it
                values = store.read(scan)[0]
        except StoreError:
            continue
        values = values + np.float16(0)  # -0, inside the mask, is the 0 outside
        found[scan] = _hashed[known] = hashlib.blake2b(values.tobytes(), key=salt().encode(),
                                                       digest_size=8).hexdigest()
    return found


def seen_by(store: Store, rows: pd.DataFrame, ids: pd.Series, aliases: Aliases | None = None) -> dict[str, Any]:
    """What an encoder's record says of whom it saw: hashed ids of participants and of scans' voxels, and the salt's.

    Where a cohort has no dataset's name, participants stand there without one. `seen` counts the scans of each
    dataset, site, scanner and manufacturer, by name: these names are nobody's.
    """
    keys = {each for name in set(ids) for each in known_as(name, aliases)}
    return {"participants": sorted(participant_hash(each, salt()) for each in keys),
            "voxels": sorted(set(voxel_hashes(store, rows["scan"]).values())),
            "salt": participant_hash("salt", salt()),
            "seen": {column: names.value_counts().to_dict() for column, names in places_of(rows).items()}}


def places_of(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Of each column of `PLACES` that rows have, the names in it, without empty cells.

    A site's name that is a number has its dataset's before it: 1 here and 1 there are two.
    """
    found = {column: rows[column].dropna().astype(str) for column in PLACES if column in rows}
    if "site" in found:
        numbered = found["site"].str.fullmatch(r"[\d.]+")
        datasets = rows["dataset"].astype(str).reindex(found["site"].index)
        found["site"] = found["site"].where(~numbered, datasets + "/" + found["site"])
    return {column: names for column, names in found.items() if len(names)}


def check_encoder(record: Mapping[str, Any], store: Store, rows: pd.DataFrame, ids: pd.Series, allow: bool = False,
                  aliases: Aliases | None = None) -> None:
    """Check that an encoder saw neither the people nor the scans on which it is to be tested.

    Args:
        record: the encoder's.
        store: of the tested scans.
        rows, ids: of its index, and their participants.
        allow: only print what was seen.

    Raises:
        LeakageError: it saw some, or its ids were hashed with another salt.
        IdentityError: the cohort has no column dataset, so that its people cannot be looked up.
    """
    if not record.get("participants") and not record.get("voxels"):
        return
    if not allow:
        check_datasets_known(rows, "the encoder's pretraining")
    if record.get("salt") != participant_hash("salt", salt()):
        words = "the encoder's ids are hashed with another salt: set KIT_SALT to the one that it was trained with"
        if not allow:
            raise LeakageError(f"{words}, or set allow_seen_participants: true and say so")
        print(f"{words}; whom it saw is unknown")
        return
    people = check_unseen(ids, record["participants"], allow, aliases)
    found, seen = voxel_hashes(store, rows["scan"]), set(record["voxels"])
    scans = sum(each in seen for each in found.values())
    if scans and not allow:
        raise LeakageError(f"{scans} of {len(found)} scans to be evaluated were seen in pretraining, under other "
                           "names of participant or dataset: give both cohorts the same names (or a table of "
                           "aliases), and test on others, or set allow_seen_participants: true and say so")
    if people or scans:
        print(f"SEEN IN PRETRAINING: {people} of {ids.nunique()} participants, {scans} of {len(rows)} scans tested")


def plain_name(name: object) -> str:
    """A dataset's name without case, leading zeros and punctuation: HABS-HD and habs_hd are one."""
    return re.sub(r"[\W_]+", "", loose(name))


def datasets_seen(record: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """The datasets of tested rows that published weights were trained on, of whom nobody listed the participants.

    Args:
        record: the encoder's; only that of published weights has `datasets`.
    """
    known = set(map(plain_name, record.get("datasets", ())))
    return sorted({name for name in places_of(rows).get("dataset", ()) if plain_name(name) in known})


def check_apart(parts: Mapping[str, tuple[Store, pd.DataFrame, pd.Series]], aliases: Aliases | None = None) -> None:
    """Check that nobody, and no scan under two names, stands in two parts of a split.

    Tested parts may share people with each other, not with those that are learned from.

    Args:
        parts: by name a store, rows of its index and their participants.

    Raises:
        LeakageError: how many are on both sides, and of which parts.
    """
    people: dict[str, dict[str, str]] = {}
    scans: dict[str, dict[str, str]] = {}
    for name, (store, rows, ids) in parts.items():
        people[name] = {known_as(each, aliases)[0]: each for each in set(ids)}
        hashes = voxel_hashes(store, rows["scan"])
        scans[name] = {each: scan for scan, each in hashes.items()}
        if twice := len(hashes) - len(scans[name]):
            print(f"{name}: {twice} scans are there twice, voxel by voxel")
    learned = [name for name in parts if name in LEARNED]
    for one in learned:
        for other in (name for name in parts if name not in learned[:learned.index(one) + 1]):
            for what, sides, words in (("participants", people, ""), ("scans", scans, ", under two names")):
                if both := sorted(set(sides[one]) & set(sides[other])):
                    raise LeakageError(
                        f"{len(both)} {what} are both in {one} and in {other}{words}, the first: "
                        f"{sides[one][both[0]]} and {sides[other][both[0]]}; keep them in one part, or give one person "
                        "one name (or a table of aliases)")
