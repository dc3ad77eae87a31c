"""Downstream tasks: a label with its participant-level split or folds, checked for leakage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import (
    TRAVELLING,
    Aliases,
    check_datasets_known,
    check_people_known,
    joined,
    normalised,
    participant_ids,
    plain_name,
)
from kit.cohort.labels import LabelError, Labels, read_labels, sexes
from kit.cohort.split import Splitting, fold_count, label_subset, sites_of, splits
from kit.cohort.tabular import ages, spelled
from kit.evaluate.metrics import score
from kit.params import Tuning
from kit.preprocess.quality import usable
from kit.runs import shown
from kit.store.dataset import PreparedScans
from kit.store.leakage import (
    ORIGIN_COLUMNS,
    TRAINING_PARTS,
    check_apart,
    check_encoder,
    datasets_seen,
    origins_of,
    unnamed_scans,
)
from kit.store.store import Store

# a part added to a task: validation scans once more, predicted like tested ones, to fit the bias correction
CORRECTION = "validation, to correct the bias"


@dataclass(frozen=True)
class Part:
    """Labelled scans: rows of a store's index with their labels and participants.

    Attributes:
        rows: this part's rows of `store.index`.
        labels: (rows,) float64, never nan: the number, or the class from 0.
        participants: (rows,) `dataset/participant`, or the joined name (`kit.cohort.identity.joined`).
    """

    store: Store
    rows: pd.DataFrame
    labels: np.ndarray
    participants: pd.Series

    def scans(self) -> PreparedScans:
        """The scans as a torch dataset; see `PreparedScans`."""
        return PreparedScans(self.store, self.rows, self.labels)

    def only(self, keep: np.ndarray) -> Part:
        """Select the rows where `keep` (rows,) is true."""
        return Part(self.store, self.rows[keep], self.labels[keep], self.participants[keep])


@dataclass(frozen=True)
class Task:
    """A label and its split by participant.

    Attributes:
        parts: train, validation, test, and further test sets by their names.
        fold: number of the cross-validation fold; 0 for a single split.
        labelled: after `with_labels_for`, train and validation with all their labels; empty before.
    """

    labels: Labels
    parts: dict[str, Part]
    fold: int = 0
    labelled: dict[str, Part] = field(default_factory=dict)

    @property
    def tested(self) -> dict[str, str]:
        """The tested parts with the name of their distribution: `in_distribution`, or the test set's name."""
        return {name: "in_distribution" if name == "test" else name
                for name in self.parts if name not in TRAINING_PARTS}

    def with_labels_for(self, fraction: float, seed: int) -> Task:
        """The task with labels for only a fraction of the training and of the validation participants."""
        learned = {name: part for name, part in self.parts.items() if name in TRAINING_PARTS}
        few = {name: part.only(label_subset(part.participants, part.labels, self.labels.kind, fraction, seed))
               for name, part in learned.items()}
        return replace(self, parts=self.parts | few, labelled=self.labelled or learned)


def tasks_of(params: Tuning, stores: Mapping[str, Store], task: str, kind: str = "auto",
             missing_codes: Iterable[str | float] = (), aliases: Aliases | None = None,
             only: Collection[int] | None = None) -> list[Task]:
    """Read a label's tasks as a notebook's parameters specify; see `read_tasks`.

    A test set without this label column, or with an empty one, is left out, with a line that says so, unless its
    parameters list its tasks. One that holds nothing but `missing_codes` is refused.

    Args:
        stores: see `kit.evaluate.finetune.open_stores`.
    """
    tests, here = params.test_sets(), {}
    for name, store in stores.items():
        if name in tests:
            listed = tests[name].tasks
            tested = task in listed if listed else task in store.index and store.index[task].notna().any()
        else:  # `prepared`, or its own rows of another distribution
            of_other = name == "out_of_distribution" and task in store.index
            tested = not of_other or store.index.loc[store.index["split"] == name, task].notna().any()
        if tested:
            here[name] = store
        elif name not in tests or not tests[name].tasks:
            print(f"{task}: {name} has no such label, so it is not tested there")
    return read_tasks(here, task, kind, Splitting.of(params), accept_flags=params.accept_flags,
                      missing_codes=missing_codes, rows_are_people=params.rows_are_people, aliases=aliases, only=only)


def read_tasks(stores: Mapping[str, Store], task: str, kind: str = "auto", splitting: Splitting | None = None, *,
               accept_flags: Sequence[str] = (), missing_codes: Iterable[str | float] = (),
               rows_are_people: bool = False, aliases: Aliases | None = None,
               only: Collection[int] | None = None) -> list[Task]:
    """Split the labelled scans of `prepared` by participant, once or in folds; other stores become test sets.

    Scans that quality control calls unusable are left out of all parts; flagged scans, often pathology, are kept.
    From a test set whose index has a column `split`, rows of `out_of_distribution` and `test` are used; if there
    are none, all rows but those of `travelling`. If the test set is `prepared` itself, only its `out_of_distribution`
    rows are used.

    Args:
        stores: `prepared`, and test sets by their names.
        accept_flags: see `kit.preprocess.quality.usable`.
        missing_codes: values of the label that mean missing.
        rows_are_people: treat each scan without a participant as another person.
        aliases: people known under several names.
        only: folds to return; None: all. A fold asked for by number must have a scan with this label.

    Returns:
        one task per fold; folds or sites without a scan with this label are skipped.

    Raises:
        LabelError: the label cannot be used, a test set has other classes, a part lacks scans or a class, or training
            has fewer than two participants.
        IdentityError: participants have no name, or with two stores, datasets have none; or see
            `kit.cohort.identity.joined`.
        LeakageError: a participant, or a scan under two names, is in two parts.
        SplitError: the requested folds cannot be made.
    """
    splitting, store = splitting or Splitting(), stores["prepared"]
    tests = {name: other for name, other in stores.items() if name != "prepared"}
    for one in stores.values() if any(other.folder != store.folder for other in tests.values()) else ():
        check_datasets_known(one.index, "another cohort")
    codes = list(missing_codes)
    labels = read_labels(store.index, task, kind, codes)
    beside = labels.values[~np.isnan(labels.values)] if kind == "auto" else ()
    kept, index = usable(store.index, accept_flags), joined(store.index, aliases or {})
    fixed = {}
    for name, other in tests.items():
        check_people_known(other.index, rows_are_people)
        keep = _tested_rows(other, of_itself=other.folder == store.folder) & usable(other.index, accept_flags)
        fixed[name] = _part(other, _labels_like(labels, name, other, codes, beside), keep, aliases)
    tasks = []
    for fold in range(fold_count(index, splitting)) if only is None else sorted(only):
        place = splits(index, splitting, fold, rows_are_people, np.where(kept, labels.values, np.nan), labels.kind)
        own = {name: _part(store, labels, (place == name).to_numpy() & kept, aliases)
               for name in ("train", "validation", "test")}
        if splitting.cross_validated and not len(own["test"].rows):
            which = f"site {sites_of(index)[fold]}" if splitting.leave_one_site_out else f"fold {fold}"
            words = f"{task}: {which} has no usable scan with this label"
            if only is not None:
                raise LabelError(words)
            print(words)
            continue
        found = Task(labels, own | fixed, fold)
        for name in found.parts:
            _check_part(found, name, splitting.cross_validated)
        check_apart({name: (part.store, part.rows, part.participants) for name, part in found.parts.items()}, aliases)
        tasks.append(found)
    return tasks


def _labels_like(labels: Labels, name: str, store: Store, missing_codes: Sequence[str | float],
                 beside: Sequence[float] | np.ndarray) -> Labels:
    """Read the same label from a test set, with the classes of training; `beside` as in `read_labels`."""
    try:
        return read_labels(store.index, labels.task, labels.kind, missing_codes, labels.classes, beside)
    except LabelError as error:
        raise LabelError(f"{name}, {shown(store.folder)}: {error}") from None


def _tested_rows(store: Store, of_itself: bool) -> np.ndarray:
    """Rows of a test set's store to test on, (rows,) bool."""
    if "split" not in store.index:
        return np.ones(len(store.index), bool)
    rows = store.index["split"].isin(["out_of_distribution"] if of_itself else ["out_of_distribution", "test"])
    return (rows if rows.any() or of_itself else store.index["split"] != TRAVELLING).to_numpy()


def _part(store: Store, labels: Labels, keep: np.ndarray, aliases: Aliases | None) -> Part:
    keep = keep & ~np.isnan(labels.values)
    rows = store.index[keep]
    return Part(store, rows, labels.values[keep], participant_ids(joined(rows, aliases or {})))


def _check_part(task: Task, name: str, cross_validated: bool) -> None:
    """Check a part's size: training needs all classes, other parts two; a fold's test set, scored jointly, one scan."""
    part, labels = task.parts[name], task.labels
    people, present, names = part.participants.nunique(), set(part.labels), labels.classes
    scans = 1 if cross_validated and name == "test" else 2
    classes = len(names) if name == "train" else min(len(names), scans)  # needed; 0 for regression
    if len(part.rows) >= scans and len(present) >= max(classes, 1) and (name != "train" or people >= 2):
        return
    found = f", all of class {names[int(part.labels[0])]}" if names and len(present) == 1 else (
        f", none of class {', '.join(each for number, each in enumerate(names) if number not in present)}"
        if len(present) < classes else "")
    wanted = {0: "", 1: "", 2: " of two classes"}.get(classes, f" of all {classes} classes")
    raise LabelError(
        f"{labels.task}: the {name} split{f' of fold {task.fold}' * cross_validated} has {len(part.rows)} usable scans "
        f"with this label, of {people} participants{found}; it needs {'two scans' if scans == 2 else 'one scan'}"
        f"{wanted}"
        f"{' and two participants' * (name == 'train')}. In {shown(part.store.folder)} {part.store.contents()}")


def check_tested(task: Task, record: dict[str, Any], allow: bool, aliases: Aliases) -> list[str]:
    """Check by an encoder's record that it saw none of the tested participants and scans.

    Returns:
        warnings about what cannot be checked: published weights trained on a tested part's dataset, or scans of
        nameless people in a dataset that the encoder saw.

    Raises:
        LeakageError, IdentityError: see `kit.store.leakage.check_encoder`.
    """
    warnings = []
    for name, distribution in task.tested.items():
        part = task.parts[name]
        check_encoder(record, part.store, part.rows, part.participants, allow, aliases)
        if unnamed := unnamed_scans(record, part.store, part.rows):
            warnings.append(f"MAYBE SEEN IN PRETRAINING: {unnamed} of {len(part.rows)} scans ({distribution}) have no "
                            "participant, and the encoder saw scans of the same dataset: another scan of a person that "
                            "it saw is not recognised")
        if seen := datasets_seen(record, part.rows):
            warnings.append(f"MAYBE SEEN IN PRETRAINING: {record['format']} was trained on {' and '.join(seen)}, on "
                            f"which it is tested ({distribution}); no list of its participants was published, so "
                            "whether any of those tested were among them cannot be checked")
    return warnings


def score_tested(task: Task, predictions: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Score each tested part's predictions; see `kit.evaluate.metrics.score`."""
    return {name: score(task.parts[name].labels, values, task.labels.kind, task.parts[name].participants, seed)
            for name, values in predictions.items()}


def overlap(task: Task, record: Mapping[str, Any]) -> pd.DataFrame:
    """Report each test set's origin and what it shares with the data that trained the head and the encoder.

    Names are compared ignoring case and leading zeros (`kit.cohort.identity.normalised`), dataset names also
    punctuation.

    Args:
        record: the encoder's; random weights saw nothing.

    Returns:
        One row per tested part: `distribution`; `dataset`, `site`, `scanner`, `manufacturer` (names, "" if not
        stated); `shares`, such as "site A (train), dataset ixi (pretraining)", "" for nothing; `unknown`, what could
        not be compared, such as "site (pretraining)".
    """
    learned = {"train": {column: set(names) for column, names in origins_of(task.parts["train"].rows).items()}}
    if record.get("participants") or {"seen", "datasets"} & set(record):
        learned["pretraining"] = {column: set(names) for column, names in record.get("seen", {}).items()} | (
            {"dataset": set(record["datasets"])} if record.get("datasets") else {})
    rows = []
    for name, distribution in task.tested.items():
        here = {column: sorted(set(names)) for column, names in origins_of(task.parts[name].rows).items()}
        shared, unknown = [], []
        for column in ORIGIN_COLUMNS:
            alike = plain_name if column == "dataset" else normalised
            for where, there in learned.items():
                known = set(map(alike, there.get(column, ())))
                both = [each for each in here.get(column, ()) if alike(each) in known]
                shared += [f"{column} {' and '.join(both)} ({where})"] * bool(both)
                if column in ("dataset", "site") and not (here.get(column) and known):
                    unknown.append(f"{column} ({where})")
        rows.append({"distribution": distribution, **{name: ", ".join(here.get(name, ())) for name in ORIGIN_COLUMNS},
                     "shares": ", ".join(shared), "unknown": ", ".join(unknown)})
    return pd.DataFrame(rows)


def covariates(part: Part) -> pd.DataFrame:
    """Age and sex of a part's scans, for age bands and matching.

    The columns are age, and sex or else gender, ignoring case (`Age`, `GENDER`).

    Returns:
        One row per scan: `scan`, `participant` (the joined id), `age` (float, nan if unknown, see
        `kit.cohort.tabular.ages`), `sex` (None if unknown, see `kit.cohort.labels.sexes`).
    """
    age = pd.to_numeric(ages(_column(part.rows, "age")), errors="coerce").astype(float)
    sex = sexes(_column(part.rows, "sex", "gender"))
    return pd.DataFrame({"scan": part.rows["scan"], "participant": part.participants, "age": age,
                         "sex": sex.where(sex.notna(), None)}).reset_index(drop=True)


def _column(rows: pd.DataFrame, *names: str) -> pd.Series:
    """The first of these columns there is, whatever its case; nan everywhere if there is none."""
    found = [each for name in names if (each := spelled(rows, name)) is not None]
    return rows[found[0]] if found else pd.Series(np.nan, rows.index, dtype=object)
