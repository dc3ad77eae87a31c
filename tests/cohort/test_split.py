"""Splits are by participant, stay when the cohort grows, and find leakage."""

import numpy as np
import pandas as pd
import pytest

from kit.cohort.identity import IdentityError, participant_ids
from kit.cohort.split import LeakageError, check_unseen, hashed_ids, label_subset, participant_hash, salt, splits


@pytest.fixture
def index():
    names = np.repeat([f"{n:03d}" for n in range(100)], 2)
    return pd.DataFrame({"dataset": "a", "participant": names, "session": ["1", "2"] * 100})


def test_no_participant_on_two_sides(index):
    place = splits(index, seed=0)
    assert place.groupby(index["participant"]).nunique().max() == 1
    assert place.value_counts().to_dict() == {"train": 120, "validation": 40, "test": 40}
    other = splits(index, seed=1)
    assert (other != place).any() and ((other == "test") == (place == "test")).all()  # the tested stay


def test_order_of_rows_does_not_matter(index):
    turned = index.iloc[::-1]
    assert splits(turned, 0).sort_index().tolist() == splits(index, 0).tolist()


def test_own_split_column_is_taken_and_checked(index):
    index["split"] = ["train", "train"] * 99 + ["train", "test"]
    with pytest.raises(LeakageError, match="1 participants have scans in two splits"):
        splits(index, 0)


def test_label_fractions_are_nested_and_keep_classes(index):
    labels = np.repeat(np.arange(100) < 30, 2).astype(float)
    ids = participant_ids(index)
    few, more = (label_subset(ids, labels, "classification", fraction, 0) for fraction in (0.2, 0.5))
    assert (few <= more).all()
    assert ids[few].nunique() == 20 and labels[few].mean() == pytest.approx(0.3)
    assert label_subset(ids, labels, "regression", 1.0, 0).all()


def test_leakage_is_an_error_that_names_how_many(index):
    ids = participant_ids(index)
    seen = [participant_hash(name) for name in set(ids[:6])]
    with pytest.raises(LeakageError, match="3 of 100 participants to be evaluated were seen in pretraining"):
        check_unseen(ids, seen)
    assert check_unseen(ids, seen, allow=True) == 3
    assert check_unseen(ids.str.replace("a/", "b/"), seen) == 0  # the same label in another dataset


def test_a_person_is_found_under_any_spelling(index, monkeypatch):
    seen = {participant_hash(name, salt()) for name in ("adni/1", "adni/7")}
    for dataset, participant in (("adni", "001"), (" Adni", "1"), ("ADNI", " sub-001 "), ("ADNI", "1.0")):
        rows = pd.DataFrame({"dataset": [dataset] * 2, "participant": [participant, "2"]})
        assert check_unseen(participant_ids(rows), seen, allow=True) == 1
        assert check_unseen(participant_ids(rows.assign(dataset="OASIS")), seen) == 0
        nameless = [participant_hash("?/1", salt())]  # of a cohort whose dataset nobody named
        assert check_unseen(participant_ids(rows.assign(dataset="OASIS")), nameless, allow=True) == 1
    monkeypatch.setenv("KIT_SALT", "the site's own")
    assert hashed_ids("ADNI/1").isdisjoint(seen)


def test_rows_without_a_participant_are_not_split_unless_each_is_a_person(index):
    index["participant"] = [f"?scan{row}" for row in range(len(index))]
    for table in (index, index.assign(split="train")):
        with pytest.raises(IdentityError, match="200 of 200 scans have no participant.* rows_are_people: true"):
            splits(table, 0)
        assert len(splits(table, 0, rows_are_people=True)) == 200
