"""Splits are by participant, stay when the cohort grows, and find leakage."""

import re

import numpy as np
import pandas as pd
import pytest

from kit.cohort.identity import IdentityError, participant_ids
from kit.cohort.split import (
    LeakageError,
    SplitError,
    Splitting,
    check_unseen,
    fold_count,
    folds,
    hashed_ids,
    label_subset,
    left_out,
    participant_hash,
    salt,
    sites_of,
    splits,
)


@pytest.fixture
def index():
    names = np.repeat([f"{n:03d}" for n in range(100)], 2)
    return pd.DataFrame({"dataset": "a", "participant": names, "session": ["1", "2"] * 100})


def test_no_participant_on_two_sides(index):
    place = splits(index)
    assert place.groupby(index["participant"]).nunique().max() == 1
    assert place.value_counts().to_dict() == {"train": 120, "validation": 40, "test": 40}
    other = splits(index, Splitting(split_seed=1))
    assert ((other == "test") != (place == "test")).any()  # the split's own seed decides who is tested
    assert (splits(index, Splitting(validation_fraction=0.5)) == "validation").sum() == 80


def test_order_of_rows_does_not_matter(index):
    turned = index.iloc[::-1]
    assert splits(turned).sort_index().tolist() == splits(index).tolist()


def test_own_split_column_is_taken_and_checked(index):
    index["split"] = ["train", "train"] * 99 + ["train", "test"]
    with pytest.raises(LeakageError, match="1 participants have scans in two splits"):
        splits(index)


@pytest.fixture
def people():
    """300 people of four sites, ages and sexes, a third of them with a second scan."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"dataset": "a", "participant": [f"{n:03d}" for n in range(300)],
                         "age": rng.gamma(9, 5, 300).round(1),
                         "sex": rng.choice(["F", "M", None], 300, p=[.5, .45, .05]),
                         "site": rng.choice(list("ABCD"), 300, p=[.5, .3, .15, .05]), "ill": rng.integers(0, 2, 300)})
    again = rows[rows["ill"].eq(1) & (rows.index % 3 == 0)].assign(age=lambda rows: rows["age"] + 30)
    return pd.concat([rows.assign(session="1"), again.assign(session="2")], ignore_index=True)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_folds_partition_the_participants_and_are_balanced(people, seed):
    found = folds(people, 5, seed)
    assert found.groupby(people["participant"]).nunique().max() == 1
    first = people["session"] == "1"
    assert found[first].value_counts().between(59, 61).all()
    bands = pd.qcut(people["age"][first], 5, labels=False)
    for column in (bands, people["site"][first], people["sex"][first].fillna("none")):
        table = pd.crosstab(column, found[first])
        assert ((table - table.mean(axis=1).to_numpy()[:, None]).abs() < 3).all(axis=None), table  # of 60: 5 %
    assert folds(people.sample(frac=1, random_state=1), 5, seed).sort_index().equals(found)
    assert folds(people.assign(ill=0, note="x"), 5, seed).equals(found)  # labels that are not asked for
    assert folds(people[first], 5, seed).equals(found[first])  # nor a second scan
    assert (folds(people, 5, seed + 1) != found).mean() > 0.6
    sick = folds(people, 5, seed, ["ill"])[first]
    counts = pd.crosstab(people["ill"][first], sick)
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1


def test_a_fold_is_apart_from_what_is_learned_from(people):
    way = Splitting(folds=4, validation_fraction=0.2)
    places = [splits(people, way, fold) for fold in range(4)]
    assert (sum((place == "test").astype(int) for place in places) == 1).all()  # each scan is tested once
    ids = people["participant"]
    for fold, place in enumerate(places):
        sides = [set(ids[place == name]) for name in ("train", "validation", "test")]
        assert len(set.union(*sides)) == sum(map(len, sides)) == 300
        assert len(sides[1]) == round(0.2 * (300 - len(sides[2])))
        assert (place == "test").equals(left_out(people, way, fold))
    shared = set(ids[places[0] == "validation"]) & set(ids[places[1] == "validation"])
    assert len(shared) < 30  # of 45: folds do not keep the same people from training


def test_folds_of_a_column_split_leave_pretraining_and_elsewhere_alone(people):
    names = np.array(["pretrain", "train", "validation", "test", "out_of_distribution"])
    people["split"] = names[people["participant"].astype(int) % 5]
    divided = people["split"].isin(["train", "validation", "test"])
    for fold in range(3):
        place = splits(people, Splitting(folds=3), fold)
        assert place[~divided].tolist() == people["split"][~divided].tolist()
        assert set(place[divided]) == {"train", "validation", "test"}
    assert splits(people).equals(people["split"])


def test_leave_one_site_out_tests_each_site_and_never_learns_from_its_travellers(people):
    way = Splitting(leave_one_site_out=True)
    people.loc[people["session"] == "2", "site"] = "A"  # so that some were scanned at two sites
    assert fold_count(people, way) == 4
    for fold, site in enumerate("ABCD"):
        place = splits(people, way, fold)
        assert (place == "test").equals(people["site"] == site)
        learned = place.isin(["train", "validation"])
        assert not set(people["participant"][learned]) & set(people["participant"][place == "test"])
        assert (people["site"][learned] != site).all()
        assert place.isna().sum() == (~learned & (people["site"] != site)).sum()
    assert splits(people, way, 1).isna().any()
    assert splits(people.rename(columns={"site": "Site"}), way, 1).equals(splits(people, way, 1))
    for table, words in ((people.drop(columns="site"), "no column site"), (people.assign(site="A"), "of one site, A"),
                         (people.assign(site=people["site"].where(people.index > 2)), "3 of 3.. scans have no site")):
        with pytest.raises(SplitError, match=words):
            splits(table, way)


@pytest.mark.parametrize(("one", "other"), [("Oxford", "oxford"), ("02", "2"), ("site-01", "site-1")])
def test_a_site_spelled_in_two_ways_is_asked_about(people, one, other):
    sites = people["site"].replace("A", one).mask(people.index < 9, other)
    with pytest.raises(SplitError, match=f"leave_one_site_out: site: are '(a/)?{one}' and '(a/)?{other}' the same"):
        fold_count(people.assign(site=sites), Splitting(leave_one_site_out=True))


@pytest.mark.parametrize("code", ["NA", "-9", "unknown", "?", -9, -1])
def test_a_code_for_a_missing_site_is_no_site(people, code):
    sites = people["site"].map({"A": 7, "B": 9, "C": 99, "D": 999}) if isinstance(code, int) else people["site"]
    way = Splitting(leave_one_site_out=True)
    assert fold_count(people.assign(site=sites), way) == 4  # positive numbers are sites
    with pytest.raises(SplitError, match=rf"leave_one_site_out: 3 of {len(people)} scans have site "
                                         rf"{re.escape(str(code))}, which looks like a code for a missing value; name"):
        fold_count(people.assign(site=sites.where(people.index > 2, code)), way)


def test_site_1_of_two_datasets_is_two_sites(people):
    two = people.assign(dataset=np.where(people["site"] == "A", "a", "b"),
                        site=people["site"].map({"A": "1", "B": "1", "C": "2", "D": "2"}))
    way = Splitting(leave_one_site_out=True)
    assert sites_of(two) == ["a/1", "b/1", "b/2"] and fold_count(two, way) == 3
    assert (splits(two, way, 1) == "test").equals(people["site"] == "B")
    named = two.assign(site=two["site"].map({"1": "one", "2": "two"}))  # a name is one site in all datasets
    assert sites_of(named) == ["one", "two"]
    first = people["session"] == "1"
    table = pd.crosstab(people["site"][first].replace("D", "C"), folds(two, 5)[first])  # folds balance all three
    assert ((table - table.mean(axis=1).to_numpy()[:, None]).abs() < 3).all(axis=None), table


def test_folds_that_cannot_be_made_are_refused(people):
    with pytest.raises(SplitError, match="stratify: the index has no column diagnosis; it has dataset, participant"):
        folds(people, 5, 0, ["sex", "diagnosis"])
    with pytest.raises(SplitError, match="folds: 5 folds of only 4 participants"):
        folds(people[people["participant"] < "004"], 5)
    with pytest.raises(SplitError, match="folds would leave out the scans of 'val'; the names are pretrain, train"):
        splits(people.assign(split=np.where(people["participant"] < "100", "val", "train")), Splitting(folds=3))


def test_a_cell_of_text_among_ages_leaves_folds_balanced_by_age(people):
    written = people["age"].astype(str).mask(people["participant"] == "007", "NA")  # as R writes it
    known = people.assign(age=people["age"].mask(people["participant"] == "007"))
    assert folds(people.assign(age=written), 5).equals(folds(known, 5))
    coded = people["age"].mask(people["participant"] == "007", 999)
    assert folds(people.assign(age=coded), 5).equals(folds(known, 5))


def test_columns_balance_folds_whatever_their_case(people):
    people = people.assign(site=people["site"].map({"A": "1", "B": "2", "C": "1", "D": "2"}),
                           dataset=people["site"].map({"A": "a", "B": "a", "C": "b", "D": "b"}),
                           age=people["age"].mask(people["participant"] == "007", -9))  # two site 1; a code for missing
    named = people.rename(columns={"age": "Age", "sex": "SEX", "site": "Site"})
    assert folds(named, 5).equals(folds(people, 5))
    assert folds(named, 5, 0, ["Age", "Site"]).equals(folds(people, 5, 0, ["age", "site"]))
    assert folds(people.assign(Age=0, SEX="x"), 5).equals(folds(people, 5))  # the plain name first


def test_label_fractions_are_nested_and_keep_classes(index):
    labels = np.repeat(np.arange(100) < 30, 2).astype(float)
    ids = participant_ids(index)
    few, more = (label_subset(ids, labels, "classification", fraction, 0) for fraction in (0.2, 0.5))
    assert (few <= more).all()
    assert ids[few].nunique() == 20 and labels[few].mean() == pytest.approx(0.3)
    assert label_subset(ids, labels, "regression", 1.0, 0).all()


def test_label_fractions_keep_the_shares_of_three_classes(index):
    labels = np.repeat(np.arange(100) // 50 + (np.arange(100) >= 90), 2).astype(float)  # 50, 40 and 10 people
    ids = participant_ids(index)
    few = label_subset(ids, labels, "classification", 0.3, 0)
    assert np.bincount(labels[few].astype(int)).tolist() == [30, 24, 6]  # scans: two of each
    assert np.bincount(labels[label_subset(ids, labels, "classification", 0.01, 0)].astype(int)).tolist() == [4, 4, 4]


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
            splits(table)
        assert len(splits(table, rows_are_people=True)) == 200
