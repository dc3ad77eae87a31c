"""Check that no person or scan is on both sides: of a split, or of an encoder's training and its test.

People are compared by a hash of `dataset/participant` (see `kit.cohort.identity.key`), scans by a hash of their
voxels, which recognises scans that were copied, linked or renamed. An encoder's record holds both. The default salt is
public, so names can be guessed. A site that must prevent this sets its own salt in `KIT_SALT`, and must set the same
one wherever the encoder is evaluated.

The voxel hash covers the middle half, in y and x, of the eight central slices (the whole scan if they are empty): one
or two blocks of the file. With intensity `zscore`, the default, the scale depends on the mask: the same scan under
another mask has another hash and is not recognised; with `whitematter` it usually is. An encoder and its scans share a
preparation, which gives the same voxels from the same file. A tolerant fingerprint would also match across
preparations, but on coarse grids it would confuse different people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import (
    UNNAMED,
    Aliases,
    check_datasets_known,
    key,
    known_as,
    normalised,
    participant_ids,
    plain_name,
    site_names,
)
from kit.cohort.split import LeakageError, check_unseen, participant_hash, salt
from kit.cohort.tabular import spelled
from kit.store.store import Store, StoreError, in_threads, scan_path

SLICES = 8  # one or two blocks of the store
TRAINING_PARTS = ("pretrain", "train", "validation")  # parts used for training; all others are for testing
ORIGIN_COLUMNS = ("dataset", "site", "scanner", "manufacturer")  # columns that say where scans come from
_hashed: dict[tuple[str, int, str], str] = {}  # by file, its modification time (ns) and salt; folds ask again


def voxel_hashes(store: Store, scans: Iterable[str]) -> dict[str, str]:
    """Hash each scan's voxels; unreadable scans are left out, as nothing can be learned from them."""
    deep, high, wide = store.grid.shape
    middle = (slice(deep // 2 - SLICES // 2, deep // 2 + SLICES // 2), slice(high // 4, high - high // 4),
              slice(wide // 4, wide - wide // 4))

    def hashed(scan: str) -> str:
        path = scan_path(store.folder, scan)
        known = (str(path), path.stat().st_mtime_ns if path.exists() else 0, salt())
        if known in _hashed:
            return _hashed[known]
        try:
            values = store.read(scan, middle)[0]
            if values.min() == values.max():  # the centre is empty: use the whole scan
                values = store.read(scan)[0]
        except StoreError:
            return ""
        values = values + np.float16(0)  # turn -0 (inside the mask) into 0, as outside
        _hashed[known] = hashlib.blake2b(values.tobytes(), key=salt().encode(), digest_size=8).hexdigest()
        return _hashed[known]

    names = list(scans)
    found = in_threads(hashed, names, "comparing scans", hidden=len(names) < 1000)
    return {scan: each for scan, each in zip(names, found, strict=True) if each}


def seen_by(store: Store, rows: pd.DataFrame, ids: pd.Series, aliases: Aliases | None = None) -> dict[str, Any]:
    """Return what an encoder's record says of its training data: hashes of participants and voxels, salt, and counts.

    Participants of a cohort without a dataset name are hashed without one. `seen` counts the scans of each dataset,
    site, scanner and manufacturer by plain name, since these identify nobody.
    """
    keys = {each for name in set(ids) for each in known_as(name, aliases)}
    return {"participants": sorted(participant_hash(each, salt()) for each in keys),
            "voxels": sorted(set(voxel_hashes(store, rows["scan"]).values())),
            "salt": participant_hash("salt", salt()),
            "seen": {column: names.value_counts().to_dict() for column, names in origins_of(rows).items()}}


def origins_of(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the names in each column of `ORIGIN_COLUMNS` that the rows have, without empty cells.

    Sites are named as in `kit.cohort.identity.site_names`.
    """
    found = {column: (site_names(rows) if column == "site" else rows[name]).dropna().astype(str)
             for column in ORIGIN_COLUMNS if (name := spelled(rows, column)) is not None}
    return {column: names for column, names in found.items() if len(names)}


def as_recorded(ids: pd.Series, datasets: Iterable[str], aliases: Aliases | None) -> Aliases:
    """Return all names of these people, also with datasets punctuated as in an encoder's record (OASIS3, OASIS-3)."""
    written: dict[str, set[str]] = {}
    for dataset in datasets:
        written.setdefault(plain_name(dataset), set()).add(normalised(dataset))
    found = {}
    for each in set(ids):
        names = set(known_as(each, aliases))
        for dataset, _, participant in [name.rpartition("/") for name in names]:
            names |= {f"{other}/{participant}" for other in written.get(plain_name(dataset), ())}
        found[key(each)] = tuple(sorted(names))
    return found


def unnamed_scans(record: Mapping[str, Any], store: Store, rows: pd.DataFrame) -> int:
    """Count the scans without a participant in datasets that an encoder saw.

    0 if it saw other such scans of this store: then `rows_are_people` speaks for all of them.
    """
    def without(index: pd.DataFrame) -> pd.Series:
        return index["participant"].astype(str).str.startswith(UNNAMED)

    datasets = {plain_name(name) for name in record.get("seen", {}).get("dataset", ())}
    count = int((without(rows) & rows["dataset"].map(plain_name).isin(datasets)).sum())
    ids = participant_ids(store.index[without(store.index)])
    return 0 if not count or check_unseen(ids, record["participants"], allow=True) else count


def check_encoder(record: Mapping[str, Any], store: Store, rows: pd.DataFrame, ids: pd.Series, allow: bool = False,
                  aliases: Aliases | None = None) -> None:
    """Check that an encoder saw neither the people nor the scans it is to be tested on.

    Args:
        record: the encoder's record.
        store: the store of the tested scans.
        rows, ids: rows of its index, and their participants.
        allow: print what was seen instead of raising.

    Raises:
        LeakageError: it saw some of them, or its ids were hashed with another salt.
        IdentityError: the cohort has no column dataset, so its people cannot be looked up.
    """
    if not record.get("participants") and not record.get("voxels"):
        return
    if not allow:
        check_datasets_known(rows, "the encoder's pretraining")
    if record.get("salt") != participant_hash("salt", salt()):
        words = "the encoder's ids are hashed with another salt: set KIT_SALT to the one that it was trained with"
        if not allow:
            raise LeakageError(f"{words}, or set allow_seen_participants: true and report it")
        print(f"{words}; whom it saw is unknown")
        return
    datasets = record.get("seen", {}).get("dataset", ())  # an older kit's record has none
    people = check_unseen(ids, record["participants"], allow, as_recorded(ids, datasets, aliases))
    found, seen = voxel_hashes(store, rows["scan"]), set(record["voxels"])
    scans = sum(each in seen for each in found.values())
    if scans and not allow:
        raise LeakageError(f"{scans} of {len(found)} scans to be evaluated were seen in pretraining, under other "
                           "names of participant or dataset: give both cohorts the same names (or a table of "
                           "aliases), and test on others, or set allow_seen_participants: true and report it")
    if people or scans:
        # people of an unnamed dataset are hashed by name alone; the record of an older kit does not say
        unnamed = any(name.startswith(UNNAMED) for name in record.get("seen", {}).get("dataset", [UNNAMED]))
        alone = unnamed and not scans
        by_name = " (by name alone: without names of datasets these may be other people)" if alone else ""
        print(f"SEEN IN PRETRAINING: {people} of {ids.nunique()} participants, {scans} of {len(rows)} scans{by_name}")


def datasets_seen(record: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """Return the tested datasets that published weights were trained on; nobody published which participants.

    Args:
        record: the encoder's record; only that of published weights has `datasets`.
    """
    known = set(map(plain_name, record.get("datasets", ())))
    return sorted({name for name in origins_of(rows).get("dataset", ()) if plain_name(name) in known})


def check_apart(parts: Mapping[str, tuple[Store, pd.DataFrame, pd.Series]], aliases: Aliases | None = None) -> None:
    """Check that no person, and no scan under two names, is in two parts of a split.

    Test parts may share people with each other, but not with parts used for training. Datasets whose names differ only
    by case, zeros or punctuation count as one.

    Args:
        parts: by name (those of `TRAINING_PARTS` are learned from): a store, rows of its index, and the rows'
            participants from `participant_ids`.

    Raises:
        LeakageError: with the number on both sides, and the parts concerned.
    """
    def person(name: str) -> str:
        dataset, _, participant = known_as(name, aliases)[0].rpartition("/")
        return f"{plain_name(dataset)}/{participant}"

    people: dict[str, dict[str, str]] = {}
    scans: dict[str, dict[str, str]] = {}
    for name, (store, rows, ids) in parts.items():
        people[name] = {person(each): each for each in set(ids)}
        hashes = voxel_hashes(store, rows["scan"])
        scans[name] = {each: scan for scan, each in hashes.items()}
        if twice := len(hashes) - len(scans[name]):
            print(f"{name}: {twice} scans have exactly the voxels of another in their centre, so they are probably "
                  "duplicates")
    learned = [name for name in parts if name in TRAINING_PARTS]
    for one in learned:
        for other in (name for name in parts if name not in learned[:learned.index(one) + 1]):
            for what, sides, words in (("participants", people, ""), ("scans", scans, ", under two names")):
                if both := sorted(set(sides[one]) & set(sides[other])):
                    raise LeakageError(
                        f"{len(both)} {what} are both in {one} and in {other}{words}, the first: "
                        f"{sides[one][both[0]]} and {sides[other][both[0]]}; keep them in one part, or give one person "
                        "one name (or a table of aliases); names of two datasets must differ by more than punctuation")
