"""Whom a filter hits is found and said; chance is not."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from kit.preprocess.selection import selection_bias, warning


def people(count: int = 185, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    sex = rng.choice(["F", "M"], count)
    return pd.DataFrame({
        "sex": sex, "age": rng.uniform(20, 82, count),
        "brain_ml": 1350 + 150 * (sex == "M") + rng.normal(0, 90, count),
        "site": rng.choice(["A", "B", "C"], count), "visit": rng.integers(1, 4, count),
        "note": np.arange(count).astype(str),
        "same": "x",
    })


def test_a_filter_that_takes_women_is_named_with_sex_and_volume() -> None:
    table = people()
    hit = (table["sex"] == "F").to_numpy() & (np.random.default_rng(1).random(len(table)) < 0.43)
    found = selection_bias(table, hit)
    assert set(found.loc[found["differs"], "label"]) == {"sex", "brain_ml"}
    assert set(found["label"]) == {"sex", "age", "brain_ml", "site", "visit"}  # notes and constants say nothing
    line = warning("refused scans", hit.sum(), found)
    assert line.startswith(f"WARNING: {hit.sum()} refused scans differ from the rest in")
    assert "100% F, 0% M against" in line


def test_ages_with_text_and_codes_are_compared() -> None:
    table = people()
    hit = (table["age"] < 40).to_numpy()
    written = table["age"].round(1).astype(str).mask(table.index < 3, "NA").mask(table.index == 5, "-9")
    row = selection_bias(table.assign(age=written), hit).set_index("label").loc["age"]
    known = table["age"].round(1)[(table.index >= 3) & (table.index != 5) & hit]
    assert row["differs"] and row["hit"] == f"median {known.median():.4g}"
    capital = selection_bias(table.drop(columns="age").assign(Age=written), hit).set_index("label").loc["Age"]
    assert capital["hit"] == row["hit"]


def test_chance_is_called_chance() -> None:
    """Holm's correction keeps false alarms near one cohort in twenty, over all labels together."""
    alarms = 0
    for seed in range(40):
        hit = np.random.default_rng([seed, 1]).random(185) < 0.2
        alarms += selection_bias(people(seed=seed)[["sex", "age", "brain_ml"]], hit)["differs"].any()
    assert alarms <= 5
    for every, words in ((5, r"37 flagged scans: no difference .* found in age \(smallest p = [.\d]+\)"),
                         (50, r"4 flagged scans: no difference .* found in age \(.*; so few would hardly show one\)")):
        hit = np.arange(185) % every == 0
        assert re.fullmatch(words, warning("flagged scans", hit.sum(), selection_bias(people()[["age"]], hit)))


def test_scans_of_one_person_count_once() -> None:
    """Flags come with the person, so six sessions of each are no more evidence than one."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scans = pd.DataFrame({"person": np.arange(60), "sex": rng.choice(["F", "M"], 60), "flag": rng.random(60) < 0.2})
        scans = scans.loc[np.repeat(scans.index, 6)].sample(frac=1, random_state=seed)
        alarms += selection_bias(scans[["sex"]], scans["flag"].to_numpy(), scans["person"])["differs"].any()
    assert alarms <= 5
    labels = pd.DataFrame({"sex": [None, "F", "M", "M", "M", "F"]})
    hit = np.array([False, True, False, False, False, False])
    found = selection_bias(labels, hit, pd.Series(["a", "a", "b", "b", "c", "d"]))
    assert (found["hit"][0], found["rest"][0]) == ("100% F, 0% M", "33% F, 67% M")


def test_sites_may_be_numbers() -> None:
    site = pd.Series(np.random.default_rng(0).integers(1, 9, 400))
    hit = site.isin([4, 5]).to_numpy()
    named, numbered, some = (selection_bias(pd.DataFrame({"Site": each}), hit) for each in (
        site.astype(str), site, site.astype(float).mask(site.index < 3)))
    pd.testing.assert_frame_equal(numbered, named)
    assert named["differs"].all() and some["differs"].all() and "% 4" in some["hit"][0]


def test_missing_labels_and_nobody_hit() -> None:
    table = people()
    table.loc[:99, "age"] = np.nan
    assert set(selection_bias(table, np.arange(185) < 90)["label"]) == {"sex", "brain_ml", "site", "visit"}
    nobody = selection_bias(table, np.zeros(185, bool))
    assert nobody.empty and "too few" in warning("refused scans", 0, nobody)
