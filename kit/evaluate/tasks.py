"""A downstream task: a label with its participants split, checked for leakage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import Aliases, check_datasets_known, check_people_known, joined, participant_ids
from kit.cohort.labels import LabelError, Labels, read_labels
from kit.cohort.split import label_subset, splits
from kit.evaluate.metrics import score
from kit.preprocess.quality import usable
from kit.runs import shown
from kit.store.dataset import PreparedScans
from kit.store.leakage import check_apart, check_encoder
from kit.store.store import Store

TESTED = {"test": "in_distribution", "out_of_distribution": "out_of_distribution"}


@dataclass(frozen=True)
class Part:
    """Some labelled scans: rows of a store's index with their labels and participants."""

    store: Store
    rows: pd.DataFrame
    labels: np.ndarray
    participants: pd.Series

    def scans(self) -> PreparedScans:
        """As a torch dataset; see there."""
        return PreparedScans(self.store, self.rows, self.labels)

    def only(self, keep: np.ndarray) -> Part:
        """The rows where `keep` (rows,) is true."""
        return Part(self.store, self.rows[keep], self.labels[keep], self.participants[keep])


@dataclass(frozen=True)
class Task:
    """A label with its participants split: train, validation, test and perhaps out_of_distribution."""

    labels: Labels
    parts: dict[str, Part]

    def with_labels_for(self, fraction: float, seed: int) -> Task:
        """The task with labels for a fraction of the training participants, and of those for validation."""
        few = {name: part.only(label_subset(part.participants, part.labels, self.labels.kind, fraction, seed))
               for name, part in self.parts.items() if name in ("train", "validation")}
        return replace(self, parts={**self.parts, **few})


def read_task(store: Store, out_of_distribution: Store | None, task: str, kind: str, seed: int,
              accept_flags: Sequence[str] = (), missing_codes: Iterable[str | float] = (),
              rows_are_people: bool = False, aliases: Aliases | None = None) -> Task:
    """Split the labelled scans of one store by participant, and take those of another as out of distribution.

    Scans that quality control calls unusable are left out of all parts; flagged ones, often pathology, are in all.
    Where the other store's index has a column `split`, its rows of `out_of_distribution` are taken, else all.

    Args:
        accept_flags: see `kit.preprocess.quality.usable`.
        missing_codes: values of the label that stand for a missing one.
        rows_are_people: scans without a participant are each of another person.
        aliases: who is known under several names.

    Raises:
        LabelError: the label cannot be used, the two stores' classes differ, or a part lacks scans or a class, or
            training a second participant.
        IdentityError: participants, or of two stores their datasets, have no name.
        LeakageError: somebody, or a scan under two names, stands in two parts.
    """
    other = out_of_distribution if out_of_distribution and out_of_distribution.folder != store.folder else None
    for one in (store, other) if other else ():
        check_datasets_known(one.index, "another cohort")
    labels = read_labels(store.index, task, kind, missing_codes)
    place = splits(joined(store.index, aliases or {}), seed, rows_are_people=rows_are_people)
    kept = usable(store.index, accept_flags)
    parts = {name: _part(store, labels, (place == name).to_numpy() & kept, aliases)
             for name in ("train", "validation", "test")}
    if out_of_distribution is not None:
        index = out_of_distribution.index
        check_people_known(index, rows_are_people)
        theirs = read_labels(index, task, labels.kind, missing_codes)
        if theirs.classes != labels.classes:  # both are sorted: 1 could stand for another class there
            raise LabelError(f"{task}: the classes are {', '.join(labels.classes)} in {shown(store.folder)}, but "
                             f"{', '.join(theirs.classes)} in {shown(out_of_distribution.folder)}; rename them there, "
                             "or empty the cells of scans of other classes")
        keep = (index["split"] == "out_of_distribution").to_numpy() if "split" in index else np.ones(len(index), bool)
        parts["out_of_distribution"] = _part(out_of_distribution, theirs, keep & usable(index, accept_flags), aliases)
    for name, part in parts.items():
        people, both, present = part.participants.nunique(), labels.kind == "classification", set(part.labels)
        if len(part.rows) < 2 or (both and len(present) < 2) or (name == "train" and people < 2):
            found = f", all of class {labels.classes[int(part.labels[0])]}" if both and len(present) == 1 else ""
            raise LabelError(f"{task}: the {name} split has {len(part.rows)} usable scans with this label, of {people} "
                             f"participants{found}; it needs two scans{' of both classes' * both}"
                             f"{' and two participants' * (name == 'train')}. In {shown(part.store.folder)} "
                             f"{part.store.contents()}")
    check_apart({name: (part.store, part.rows, part.participants) for name, part in parts.items()}, aliases)
    return Task(labels, parts)


def _part(store: Store, labels: Labels, keep: np.ndarray, aliases: Aliases | None) -> Part:
    keep = keep & ~np.isnan(labels.values)
    rows = store.index[keep]
    return Part(store, rows, labels.values[keep], participant_ids(joined(rows, aliases or {})))


def check_tested(task: Task, record: dict[str, Any], allow: bool, aliases: Aliases) -> None:
    """Check that an encoder, by its record, saw nobody and no scan that it is tested on.

    Raises:
        LeakageError, IdentityError: see `kit.store.leakage.check_encoder`.
    """
    for part in (task.parts[name] for name in TESTED if name in task.parts):
        check_encoder(record, part.store, part.rows, part.participants, allow, aliases)


def score_tested(task: Task, predictions: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Score each tested part's predictions; see `kit.evaluate.metrics.score`."""
    return {name: score(task.parts[name].labels, values, task.labels.kind, task.parts[name].participants, seed)
            for name, values in predictions.items()}
