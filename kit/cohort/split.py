"""Split participants into train, validation and test, once or in folds, never one participant across two parts.

Who is tested depends only on the index and `split_seed`, not on row order, quality control, the training seed or the
task, so pretraining can leave out the same people. A single split follows the column `split`, or hashes of the names if
there is none. Folds are also balanced by age, sex, site, ... (see `STRATIFY`), or each tests one site.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import (
    SPLITS,
    UNNAMED,
    Aliases,
    IdentityError,
    check_people_known,
    check_spellings,
    known_as,
    participant_ids,
    site_names,
)
from kit.cohort.tabular import ages, looks_missing, spelled
from kit.errors import KitError

SALT = "kit participants v1"
DIVIDED = ("train", "validation", "test")  # rows with these names in a column `split` are divided anew by folds
TEST_FRACTION = 0.2  # of the participants, if neither folds nor a column `split` choose the test set
STRATIFY = ("age", "sex", "site", "diagnosis", "group")  # columns that folds are balanced by, ignoring case
MOST_LEVELS, BANDS = 10, 5  # a numeric column of more than 10 distinct values is cut into 5 quantile bands


class SplitError(KitError, ValueError):
    """A cohort cannot be split as asked; the message says why."""


class LeakageError(KitError, ValueError):
    """A participant is on both sides of a comparison."""


def participant_hash(participant: str, salt: str = SALT) -> str:
    """Hash a name to 16 hex digits; names can be guessed from hashes with the public salt, so it hides nothing."""
    return hashlib.blake2b(participant.encode(), key=salt.encode(), digest_size=8).hexdigest()


def salt() -> str:
    """Return the salt of hashed ids: the public one, or a site's own from `KIT_SALT`."""
    own = os.environ.get("KIT_SALT")
    # ", one form" marks hashes of normalised names (`key`); older kits hashed names as written, with SALT alone
    return hashlib.blake2b(own.encode(), digest_size=32).hexdigest() if own else f"{SALT}, one form"


def hashed_ids(participant_id: str, aliases: Aliases | None = None) -> set[str]:
    """Return the hashes to look up in an encoder's record: each name with its dataset, and as ?/name (no dataset)."""
    names = known_as(participant_id, aliases)
    return {participant_hash(each, salt()) for name in names for each in (name, UNNAMED + name[name.rfind("/"):])}


def shuffled(participants: Iterable[str], seed: int | str, purpose: str) -> list[str]:
    """Sort distinct participants by their hashes for this seed and purpose."""
    return sorted(set(participants), key=lambda name: (participant_hash(name, f"{purpose} {seed}"), name))


@dataclass(frozen=True)
class Splitting:
    """How participants are divided; attributes are named as in the notebooks' parameters.

    Attributes:
        folds: number of cross-validation folds; 0 means a single split.
        leave_one_site_out: each fold tests one site.
        split_seed: seed of the choice of test and validation participants.
        stratify: columns that folds are balanced by; None means those of `STRATIFY` that the index has, ignoring case.
        validation_fraction: fraction of the participants who are not tested.
    """

    folds: int = 0
    leave_one_site_out: bool = False
    split_seed: int = 0
    stratify: Sequence[str] | None = None
    validation_fraction: float = 0.25

    @classmethod
    def of(cls, params: Any) -> Splitting:
        """Take the fields of the split from a notebook's parameters."""
        return cls(**{field.name: getattr(params, field.name) for field in fields(cls)})

    @property
    def cross_validated(self) -> bool:
        """Whether there are folds."""
        return bool(self.folds) or self.leave_one_site_out


def splits(index: pd.DataFrame, splitting: Splitting | None = None, fold: int = 0, rows_are_people: bool = False,
           labels: np.ndarray | None = None, kind: str = "regression") -> pd.Series:
    """Assign each row to train, validation, test or another name in the index's column `split`; nan means none.

    A single split follows the column `split` if there is one, otherwise hashes. In a fold, the rows that `left_out`
    returns are tested and the others are for training and validation; a tested participant's other scans are nan.

    Args:
        fold: which fold of `splitting`, from 0.
        rows_are_people: treat each scan without a participant as another person.
        labels: (rows,) float of `kind`, nan for unused rows. The validation share is drawn from the participants with a
            label, class by class, at least two of each class; those without a label go to train. None: drawn from all
            participants. Not used if a single split follows the column `split`.

    Raises:
        LeakageError: the column `split` puts one participant's scans into two splits.
        IdentityError: scans have no participant, and `rows_are_people` is false.
        SplitError: as in `left_out`.
    """
    splitting = splitting or Splitting()
    check_people_known(index, rows_are_people)
    ids = participant_ids(index)
    if "split" in index:
        mixed = index["split"].fillna("").groupby(ids).nunique()
        if (mixed > 1).any():
            raise LeakageError(f"split: {int((mixed > 1).sum())} participants have scans in two splits, or in one and "
                               f"in none (an empty cell), the first: {mixed.index[mixed > 1][0]}; give all scans of a "
                               "participant the same split")
        if not splitting.cross_validated:
            return index["split"]
    test, divided = left_out(index, splitting, fold), _divided(index)
    values = np.zeros(len(index)) if labels is None else labels
    rest = divided & ~ids.isin(set(ids[test]))
    used = rest & ~np.isnan(values)
    held = label_subset(ids[used], values[used], kind, splitting.validation_fraction, splitting.split_seed,
                        f"validation {fold}")
    places = pd.Series(np.where(ids.isin(set(ids[used][held])), "validation", "train"), index.index).where(rest)
    if "split" in index:
        places = places.where(divided, index["split"])
    return places.where(~test, "test").rename("split")


def left_out(index: pd.DataFrame, splitting: Splitting, fold: int = 0) -> pd.Series:
    """Return a mask of the rows that a fold, or the single split, tests, (rows,) bool.

    Raises:
        SplitError: a column or a site is missing, `split` has other names, or there are more folds than participants.
    """
    divided = _divided(index)
    if splitting.cross_validated and "split" in index and (
            strange := sorted(set(index["split"].dropna()) - set(SPLITS) - {""})):
        raise SplitError(f"split: folds would leave out the scans of {', '.join(map(repr, strange))}; the names are "
                         f"{', '.join(SPLITS)}")
    if splitting.leave_one_site_out:
        return site_folds(index[divided]).reindex(index.index, fill_value=-1) == fold
    if splitting.folds:
        found = folds(index[divided], splitting.folds, splitting.split_seed, splitting.stratify)
        return found.reindex(index.index, fill_value=-1) == fold
    if "split" in index:
        return index["split"] == "test"
    ids = participant_ids(index)
    # seed 0 hashes as "": older kits had no seed, and their encoders left out that test set
    order = shuffled(ids, splitting.split_seed or "", "test")
    return ids.isin(order[:len(order) - round((1 - TEST_FRACTION) * len(order))])


def fold_count(index: pd.DataFrame, splitting: Splitting) -> int:
    """Return the number of folds; 1 for a single split."""
    return len(sites_of(index)) if splitting.leave_one_site_out else splitting.folds or 1


def sites_of(index: pd.DataFrame) -> list[str]:
    """Return the sites in the order of their folds; raises as `site_folds`."""
    rows = index[_divided(index)]
    return sorted(set(site_names(rows))) if len(site_folds(rows)) else []


def _divided(index: pd.DataFrame) -> pd.Series:
    """Return the rows that folds divide: all, or those whose `split` is train, validation or test."""
    return index["split"].isin(DIVIDED) if "split" in index else pd.Series(True, index.index)


def site_folds(index: pd.DataFrame) -> pd.Series:
    """Return each row's site as a number, in the order of the site names; see `kit.cohort.identity.site_names`.

    Raises:
        SplitError: there is no column `site`, it has empty cells or codes for missing values, two sites differ only by
            case or leading zeros, or there is only one site.
    """
    if (site := spelled(index, "site")) is None:
        raise SplitError("leave_one_site_out: the index has no column site")
    sites = site_names(index)
    if empty := int(sites.isna().sum()):
        raise SplitError(f"leave_one_site_out: {empty} of {len(index)} scans have no site; name it, or leave them out")
    odd = index[site].map(lambda cell: looks_missing(cell) and not str(cell)[0].isdigit())  # 7, 99 number real sites
    if odd.any():
        codes = ", ".join(sorted(set(index[site][odd].map(str))))
        raise SplitError(f"leave_one_site_out: {int(odd.sum())} of {len(index)} scans have site {codes}, which looks "
                         "like a code for a missing value; name the site, or leave them out")
    try:
        check_spellings(sites.unique(), "leave_one_site_out: site")
    except IdentityError as error:
        raise SplitError(str(error)) from None
    numbers, names = pd.factorize(sites, sort=True)
    if len(names) < 2:
        raise SplitError(f"leave_one_site_out: all scans are of one site, {', '.join(names)}")
    return pd.Series(numbers, index.index, name="fold")


def folds(index: pd.DataFrame, count: int, split_seed: int = 0, stratify: Sequence[str] | None = None) -> pd.Series:
    """Return each row's fold for K-fold cross-validation, 0 to `count` - 1; a participant's rows share one fold.

    Uses minimisation (Pocock & Simon, Biometrics 1975): in the order of their hashes, each participant goes to the
    fold with the fewest others of the same age band, sex, site, ...; hashes break ties. This balances each column
    separately, where strata over all columns would be too small. Row order, other columns and the number of scans a
    participant has do not matter. Who else is in the cohort does: when one participant joins 300, a third of the
    others change fold. So folds hold for one index; if it has changed since pretraining, `check_unseen` finds those
    whom the encoder saw.

    Args:
        stratify: columns to balance; a participant's smallest value counts. None means those of `STRATIFY` present.

    Raises:
        SplitError: such a column is missing, or there are fewer participants than folds.
    """
    ids = participant_ids(index)
    usual = [each for name in STRATIFY if (each := spelled(index, name)) is not None]
    columns = usual if stratify is None else list(stratify)
    if missing := [name for name in columns if name not in index]:
        raise SplitError(f"stratify: the index has no column {', '.join(missing)}; it has {', '.join(map(str, index))}")
    if ids.nunique() < count:
        raise SplitError(f"folds: {count} folds of only {ids.nunique()} participants; set fewer folds")
    levels = {name: _levels(site_names(index.assign(site=index[name])) if name.casefold() == "site" else
                            ages(index[name]) if name.casefold() == "age" else index[name], ids) for name in columns}
    counts: dict[tuple[str, str], np.ndarray] = {}
    found = {}
    for person in shuffled(ids, split_seed, "fold order"):
        own = [("", ""), *((name, level[person]) for name, level in levels.items())]  # the first counts the fold's size
        there = [counts.setdefault(level, np.zeros(count, int)) for level in own]
        excess = np.sum([row - row.min() for row in there], axis=0)
        best = np.flatnonzero(excess == excess.min())
        hashes = {fold: participant_hash(person, f"fold {split_seed} {fold}") for fold in best}
        found[person] = min(hashes, key=hashes.__getitem__)
        for row in there:
            row[found[person]] += 1
    return ids.map(found).astype(int).rename("fold")


def _levels(column: pd.Series, ids: pd.Series) -> dict[str, str]:
    """Return each participant's level in a column: many numbers become bands; "" where the value is missing."""
    known = column.dropna()
    if pd.api.types.is_numeric_dtype(known) and known.nunique() > MOST_LEVELS:
        levels = pd.qcut(known.groupby(ids).min(), BANDS, labels=False, duplicates="drop").astype(str)
    else:
        levels = known.astype(str).groupby(ids).min()
    return dict.fromkeys(ids, "") | levels.to_dict()


def label_subset(ids: pd.Series, labels: np.ndarray, kind: str, fraction: float, seed: int,
                 purpose: str = "label fraction") -> np.ndarray:
    """Draw a fraction of the participants, class by class; return which rows are theirs, (rows,) bool.

    Classes keep their proportions, with at least two participants each, and smaller fractions are nested in larger
    ones of the same seed.

    Args:
        ids: (rows,) participants.
        labels: (rows,) float, of the `kind` "classification" or "regression".
        purpose: salt of the draw; different purposes draw different participants.
    """
    keep: set[str] = set()
    for value in np.unique(labels) if kind == "classification" else [None]:
        order = shuffled(ids if value is None else ids[labels == value], seed, purpose)
        keep.update(order[:max(2, round(fraction * len(order)))])
    return ids.isin(keep).to_numpy()


def check_unseen(ids: pd.Series, seen_hashes: Iterable[str], allow: bool = False,
                 aliases: Aliases | None = None) -> int:
    """Count the participants that an encoder was pretrained on.

    Args:
        ids: participants to be evaluated, from `participant_ids`.
        seen_hashes: the encoder's hashes: of `hashed_ids`, or from an older kit `participant_hash` of each name.
        allow: count only, raise nothing.
        aliases: people known under several names.

    Raises:
        LeakageError: there are any, and `allow` is false.
    """
    seen = set(seen_hashes)
    known = sum(participant_hash(name) in seen or not seen.isdisjoint(hashed_ids(name, aliases)) for name in set(ids))
    if known and not allow:
        raise LeakageError(f"{known} of {ids.nunique()} participants to be evaluated were seen in pretraining; "
                           "test on others, or set allow_seen_participants: true and report it")
    return known
