"""Shares of a map by region and side, of one scan and over participants."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kit.explain.atlas import Atlas, load_atlas
from kit.explain.regions import COLUMNS, region_intervals, shares_of
from kit.preprocess.template import template_on
from kit.store.grid import Grid
from tests.conftest import GRID as SMALL
from tests.conftest import make_store

GRID = Grid((36, 48, 40), 4.0)


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    return template_on(GRID)[1]


def halves(grid: Grid = SMALL, names: tuple[str, str] = ("lower", "upper")) -> Atlas:
    """The lower and the upper half of a grid, left and right; the frontmost slices are no region."""
    z, y, x = np.indices(grid.shape)
    labels = 1 + (z >= grid.shape[0] // 2) + 2 * (x >= grid.shape[2] // 2)
    table = pd.DataFrame({"label": [1, 2, 3, 4], "region": [*names] * 2, "side": ["left"] * 2 + ["right"] * 2})
    return Atlas(np.where(y >= grid.shape[1] - 3, 0, labels).astype(np.int32), grid.affine, table, "halves", "", "")


def test_shares_sum_to_one_and_an_even_map_has_its_share_of_the_brain(brain):
    table = shares_of(np.full(GRID.shape, -2, np.float32), brain, load_atlas("tissues", GRID))
    assert table["share_of_saliency"].sum() == pytest.approx(1)
    there = table[table["share_of_brain"] > 0]
    np.testing.assert_allclose(there["share_of_saliency"], there["share_of_brain"])
    assert set(there.index.get_level_values("side")) == {"left", "right"} and len(there) == 6


def test_without_a_name_the_best_atlas_there_is(brain, deepmriprep):
    table = shares_of(np.ones(GRID.shape), brain, load_atlas(None, GRID)).reset_index()
    there = table[table["share_of_brain"] > 0]
    assert {"Hippocampus", "Precuneus", "in no region"} <= set(there["region"]) and len(there) > 150


def test_a_marked_left_hemisphere_is_left_and_unequal_sides_stay_unequal(brain):
    x = GRID.affine[0, 0] * np.arange(GRID.shape[2]) + GRID.affine[0, 3]
    marked = np.where(x < 0, 3.0, 1.0) * np.ones(GRID.shape)
    table = shares_of(marked, brain, load_atlas("tissues", GRID))
    shares = table.groupby("side")["share_of_saliency"].sum()
    left, right = (brain & (x < 0)).sum(), (brain & (x >= 0)).sum()
    assert shares["left"] == pytest.approx(3 * left / (3 * left + right))
    assert shares["left"] > 0.7


@pytest.mark.parametrize(("point", "region", "side"), [
    ((-26, -20, -16), "Hippocampus", "left"),
    ((26, -20, -16), "Hippocampus", "right"),
    ((-12, 10, 12), "Caudate", "left"),
    ((12, -18, 8), "Thalamus Proper", "right"),
    ((-26, -30, 30), "Cerebral White Matter", "left"),
    ((42, -64, -40), "Cerebellum Exterior", "right"),
    ((-2, -30, -40), "Brain Stem", "both"),
    ((-46, -72, 38), "AnG angular gyrus", "left"),
])
def test_known_places_fall_into_their_regions(brain, deepmriprep, point, region, side):
    found = np.zeros(GRID.shape, dtype=np.float32)
    found[tuple(np.rint(np.linalg.solve(GRID.affine, [*point, 1])[:3]).astype(int)[::-1])] = -5
    table = shares_of(found, brain, load_atlas("deepmriprep:neuromorphometrics", GRID)).reset_index()
    winner = table.loc[table["share_of_saliency"].idxmax()]
    assert (winner["region"], winner["side"], winner["share_of_saliency"]) == (region, side, 1)


def test_shares_by_a_slow_loop(brain):
    rng = np.random.default_rng(0)
    mask, values = rng.random(SMALL.shape) < 0.6, rng.normal(size=SMALL.shape)
    atlas = halves()
    table = shares_of(values, mask, atlas)
    for row in atlas.table.itertuples():
        voxels = [at for at in np.ndindex(*SMALL.shape) if mask[at] and atlas.labels[at] == row.label]
        share = sum(abs(values[at]) for at in voxels) / np.abs(values[mask]).sum()
        assert table.loc[(row.region, row.side), "share_of_saliency"] == pytest.approx(share)
        assert table.loc[(row.region, row.side), "share_of_brain"] == pytest.approx(len(voxels) / mask.sum())
    rest = mask & (atlas.labels == 0)
    assert table.loc[("in no region", "both"), "share_of_brain"] == pytest.approx(rest.sum() / mask.sum())


def test_a_map_that_says_nothing_or_lies_on_another_grid_is_refused():
    atlas, mask = halves(), np.ones(SMALL.shape, bool)
    with pytest.raises(ValueError, match="zero or not finite"):
        shares_of(np.zeros(SMALL.shape), mask, atlas)
    with pytest.raises(ValueError, match="zero or not finite"):
        shares_of(np.where(np.arange(mask.size).reshape(SMALL.shape) == 7, np.inf, 1), mask, atlas)
    with pytest.raises(ValueError, match="shapes differ: map"):
        shares_of(np.ones(SMALL.shape).transpose(0, 2, 1), mask, atlas)


def test_intervals_are_over_participants_and_a_participant_counts_once(tmp_path):
    store = make_store(tmp_path / "store", participants=9)
    atlas, rng = halves(), np.random.default_rng(1)
    scans = store.index["scan"].tolist()
    participants = dict(zip(scans, store.index["participant"], strict=True))
    assert len(scans) > len(set(participants.values()))  # some have two
    upper_left = atlas.labels == 2
    maps = {(scan, method): rng.random(SMALL.shape) * np.where(upper_left, weight * (1 + (scan > "made_004")), 1)
            for scan in scans for method, weight in (("strong", 4), ("even", 1))}
    table = region_intervals(maps, store, atlas, participants)
    assert list(table.columns) == COLUMNS and table["method"].unique().tolist() == ["strong", "even"]
    assert (table["participants"] == 9).all()
    sums = table.groupby("method")[["share_of_saliency", "share_of_brain"]].sum()
    np.testing.assert_allclose(sums, 1)
    assert ((table["low"] <= table["share_of_saliency"]) & (table["share_of_saliency"] <= table["high"])).all()

    first = table.iloc[0]
    assert (first["region"], first["side"]) == ("upper", "left") and first["ratio"] > 2
    place = (("upper", "left"), "share_of_saliency")
    alone = {scan: shares_of(maps[scan, "strong"], store.read(scan)[1], atlas).loc[place] for scan in scans}
    by_person = pd.Series(alone).groupby(pd.Series(participants)).mean()
    assert first["share_of_saliency"] == pytest.approx(by_person.mean())
    # The bootstrap's spread is that of the mean over nine people, near enough for 2,000 draws.
    spread = by_person.std(ddof=0) / 3
    assert first["high"] - first["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)

    again = region_intervals(maps, store, atlas, participants)
    pd.testing.assert_frame_equal(table, again)
    of_one = {key: values for key, values in maps.items() if key[0] == scans[0]}
    one = region_intervals(of_one, store, atlas, participants)
    assert one[["low", "high"]].isna().all().all() and (one["participants"] == 1).all()


def test_own_atlases_are_matched_by_name(tmp_path):
    store = make_store(tmp_path / "store", participants=2)
    scans = store.index["scan"].tolist()
    participants = dict(zip(scans, store.index["participant"], strict=True))
    maps = {(scan, "gradient"): np.ones(SMALL.shape) for scan in scans}
    other = halves(names=("lower", "only here"))
    own = {scans[0]: halves(), **dict.fromkeys(scans[1:], other._replace(
        labels=np.where(other.labels > 0, other.labels + 10, 0),
        table=other.table.assign(label=other.table["label"] + 10)))}
    table = region_intervals(maps, store, own, participants).set_index(["region", "side"])
    shared = region_intervals(maps, store, halves(), participants).set_index(["region", "side"])
    same = [("lower", "left"), ("lower", "right"), ("in no region", "both")]
    pd.testing.assert_frame_equal(table.loc[same], shared.loc[same])
    assert table.loc[("only here", "left"), "share_of_brain"] == pytest.approx(
        shared.loc[("upper", "left"), "share_of_brain"] / 2)
