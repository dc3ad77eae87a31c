"""Reliability: the published example, planted components, who is found again, and scans of a store."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from kit.cohort.identity import normalised
from kit.cohort.split import hashed_ids, participant_hash, salt
from kit.evaluate.reliability import (
    ReliabilityError,
    _sessions,
    found_again,
    reliability,
    reliability_of,
    variance_components,
)
from kit.store.store import Store

# Shrout and Fleiss (1979), table 2: six targets, four judges.
RATINGS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])


def crossed(people, sites):
    """(scans,) each person and site of a full table, in its flattened order."""
    return np.repeat(np.arange(people), sites), np.tile(np.arange(sites), people)


def planted(people, sites, width=8, sd=(1.0, 1.0, 1.0), seed=0):
    """Features with these spreads of person, site and the rest."""
    rng = np.random.default_rng(seed)
    person, site = crossed(people, sites)
    values = (sd[0] * rng.standard_normal((people, width))[person] + sd[1] * rng.standard_normal((sites, width))[site]
              + sd[2] * rng.standard_normal((len(person), width)))
    return values, person, site


def test_the_example_of_shrout_and_fleiss():
    parts = variance_components(RATINGS.reshape(-1, 1), *crossed(6, 4))
    assert parts.agreement()[0] == pytest.approx(0.29, abs=0.005)
    assert parts.consistency()[0] == pytest.approx(0.71, abs=0.005)
    # their table 3: mean squares between targets 11.24, judges 32.49, and 1.02 left
    mean_squares = [11.24, 32.49, 1.02]
    expected = [(mean_squares[0] - mean_squares[2]) / 4, (mean_squares[1] - mean_squares[2]) / 6, mean_squares[2]]
    assert [part[0] for part in parts] == pytest.approx(expected, abs=0.01)


def test_each_feature_is_estimated_by_itself():
    values, people, sites = planted(12, 3)
    together = variance_components(values, people, sites).agreement()
    alone = [variance_components(column[:, None], people, sites).agreement()[0] for column in values.T]
    assert together == pytest.approx(alone)


def test_components_are_unbiased_where_not_everybody_was_everywhere():
    rng = np.random.default_rng(0)
    values, people, sites = planted(400, 4, width=300, sd=(2.0, 1.5, 1.0))
    keep = rng.random(len(people)) < 0.6
    parts = variance_components(values[keep], people[keep], sites[keep])
    for found, sd in zip(parts, (2.0, 1.5, 1.0), strict=True):
        assert found.mean() == pytest.approx(sd**2, rel=0.1)


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_a_planted_icc_lies_in_its_interval(share):
    values, people, sites = planted(40, 4, width=16, sd=(share**0.5, 0, (1 - share) ** 0.5))
    row = reliability(values, people, sites, "SimCLR").iloc[0]
    assert row["icc_low"] < share < row["icc_high"]
    assert row["icc_low"] < row["icc"] < row["icc_high"] < row["icc_low"] + 0.25
    assert row["variance_person"] == pytest.approx(share, abs=0.1)
    assert (row["encoder"], row["what"], row["participants"], row["scans"]) == ("SimCLR", "features", 40, 160)


def test_features_of_the_site_alone():
    values, people, sites = planted(10, 4, sd=(0, 1, 0.05))
    row = reliability(values, people, sites).iloc[0]
    assert row["variance_site"] > 0.98 and row["variance_person"] < 0.01
    assert abs(row["icc"]) < 0.05 and row["found_again"] < row["chance"] + 0.1


def test_a_constant_shift_of_a_site_spoils_agreement_and_not_consistency():
    people, sites = crossed(20, 2)
    values = np.random.default_rng(0).standard_normal((20, 1))[people] + 3.0 * sites[:, None]
    parts = variance_components(values, people, sites)
    assert parts.consistency()[0] == pytest.approx(1)
    assert parts.agreement()[0] < 0.4


def test_found_again():
    people, _ = crossed(50, 4)
    rng = np.random.default_rng(0)
    same = rng.standard_normal((50, 16))[people]
    assert found_again(same, people) == (1.0, pytest.approx(3 / 199))
    again, chance = found_again(rng.standard_normal((200, 16)), people)
    assert again == pytest.approx(chance, abs=0.03)
    # a network that gives one vector for everything finds nobody, whatever the order of the scans
    assert found_again(np.ones((200, 16)), people)[0] == pytest.approx(chance)
    # length says nothing, direction does; of a prediction the number does
    assert found_again(same * rng.uniform(1, 9, (200, 1)), people)[0] == 1
    assert found_again(np.arange(50.0)[people][:, None], people)[0] == 1


def test_identical_scans_are_wholly_reliable():
    people, sites = crossed(12, 3)
    row = reliability(np.random.default_rng(0).standard_normal(12)[people], people, sites, what="age").iloc[0]
    assert row["icc"] == row["found_again"] == pytest.approx(1)
    assert row["variance_person"] == pytest.approx(1) and row["variance_site"] == pytest.approx(0)


def test_sites_that_nobody_changed_have_no_variance_of_their_own():
    people = np.repeat(np.arange(12), 2)
    values = np.random.default_rng(0).standard_normal(12)[people] + np.tile([0, 0.1], 12)
    row = reliability(values, people, people % 3).iloc[0]
    assert np.isnan(row["variance_site"]) and row["variance_person"] > 0.9


def test_only_people_with_several_scans_count():
    values, people, sites = planted(30, 3)
    keep = (people % 3 > 0) | (sites == people // 3 % 3)  # a third has one scan
    row, alone = (reliability(values[rows], people[rows], sites[rows]) for rows in (keep, people % 3 > 0))
    assert row["participants"].item() == 20 and row["scans"].item() == 60
    pd.testing.assert_frame_equal(row, alone)


def test_too_few_for_an_interval_or_for_anything():
    values, people, sites = planted(3, 2)
    row = reliability(values, people, sites).iloc[0]
    assert np.isfinite(row["icc"]) and np.isnan(row["icc_low"]) and np.isnan(row["icc_high"])
    with pytest.raises(ReliabilityError, match="6 scans of 1 participants with several scans"):
        reliability(values, np.zeros(6), np.arange(6))
    with pytest.raises(ReliabilityError, match="sites or sessions that several of them share"):
        reliability(values[:4], people[:4], np.arange(4))  # four sites, each once


class Mean(nn.Module):
    """Two features: the mean of the lower half, which is the store's `age`, and of the whole."""

    def forward(self, images):
        half = images.shape[2] // 2
        return nn.functional.pad(images[:, :, :half].mean((2, 3, 4)), (0, 1), value=1.0)


def test_scans_of_a_store(store):
    row = reliability_of(Mean(), store, "mean").iloc[0]
    assert (row["encoder"], row["participants"], row["scans"]) == ("mean", 8, 16)
    assert row["icc"] > 0.95 and row["variance_site"] < 0.05 < row["found_again"] / row["chance"]


@pytest.mark.parametrize("named", [lambda person, visit: f"2019-{10 * visit + 1}-{person:02d}",
                                   lambda person, visit: f"day{person + 97 * visit}"], ids=["dates", "days"])
def test_sessions_that_nobody_shares_are_each_persons_first_and_second(store, named):
    """Day 5 is before day 102."""
    persons, visits = store.index["participant"].astype(int), store.index["session"].map({"01": 0, "02": 1})
    index = store.index.assign(session=[named(*each) for each in zip(persons, visits, strict=True)])
    pd.testing.assert_frame_equal(reliability_of(Mean(), Store(store.folder, index, store.record)),
                                  reliability_of(Mean(), store))


def test_sessions_that_people_share_keep_their_names():
    sessions = pd.Series(["v1", "v2", "v3", "v2", "v3", "V2", ""])
    found = _sessions(sessions, pd.Series(["a", "a", "a", "b", "b", "c", "c"]))
    assert found.nunique() == 3 and found[1] == found[3] == found[5] and found[2] == found[4] and found.isna()[6]


def test_site_1_of_two_datasets_is_two_sites(store):
    second = store.index.duplicated("participant")
    index = store.index.assign(dataset=np.where(second, "b", "a"), site=1)
    aliases = {f"{name}/{each}": (f"a/{each}", f"b/{each}") for name in "ab"
               for each in index["participant"].map(normalised)}
    rows = [reliability_of(Mean(), Store(store.folder, index.assign(site=site), store.record), by="site",
                           aliases=aliases) for site in (1, index["dataset"])]
    assert rows[0]["participants"].item() == 8
    pd.testing.assert_frame_equal(rows[0], rows[1])


def test_travelling_heads_are_taken_and_those_seen_in_pretraining_left_out(store):
    index = store.index.assign(split=["travelling" if int(name) < 12 else "train" for name in
                                      store.index["participant"]])
    travelling = Store(store.folder, index, store.record)
    assert reliability_of(Mean(), travelling)["participants"].item() == 4
    seen = {"participants": sorted(hashed_ids("made/002")), "voxels": [],
            "salt": participant_hash("salt", salt())}
    assert reliability_of(Mean(), travelling, record=seen)["participants"].item() == 3
    with pytest.raises(ReliabilityError, match="0 participants with several usable scans"):
        reliability_of(Mean(), Store(store.folder, index.drop_duplicates("participant"), store.record))
