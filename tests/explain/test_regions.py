"""Shares of a map by region and side, of one scan and over participants."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kit.explain.atlas import Atlas, load_atlas
from kit.explain.regions import COLUMNS, inside_share, region_intervals, region_table
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


def test_shares_sum_to_one_and_an_even_map_has_ratio_one(brain):
    table = region_table(np.full(GRID.shape, -2, np.float32), brain, GRID, load_atlas("tissues", GRID))
    assert list(table.columns) == ["region", "side", "voxels", "volume_ml", "share_of_saliency", "share_of_brain",
                                   "ratio"]
    assert table["share_of_saliency"].sum() == pytest.approx(1)
    assert table["share_of_brain"].sum() == pytest.approx(1)
    np.testing.assert_allclose(table["ratio"], 1)
    assert table["voxels"].sum() == brain.sum()
    assert table["volume_ml"].sum() == pytest.approx(brain.sum() * 0.064)
    assert set(table["side"]) == {"left", "right"} and len(table) == 6


def test_without_a_name_the_best_atlas_there_is(brain, deepmriprep):
    table = region_table(np.ones(GRID.shape), brain, GRID)
    assert {"Hippocampus", "Precuneus", "in no region"} <= set(table["region"]) and len(table) > 150


def test_a_marked_left_hemisphere_is_left_and_unequal_sides_stay_unequal(brain):
    x = GRID.affine[0, 0] * np.arange(GRID.shape[2]) + GRID.affine[0, 3]
    marked = np.where(x < 0, 3.0, 1.0) * np.ones(GRID.shape)
    table = region_table(marked, brain, GRID, load_atlas("tissues", GRID))
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
    table = region_table(found, brain, GRID, load_atlas("deepmriprep:neuromorphometrics", GRID))
    winner = table.loc[table["share_of_saliency"].idxmax()]
    assert (winner["region"], winner["side"], winner["share_of_saliency"]) == (region, side, 1)


def test_region_table_by_a_slow_loop(brain):
    rng = np.random.default_rng(0)
    mask, values = rng.random(SMALL.shape) < 0.6, rng.normal(size=SMALL.shape)
    atlas = halves()
    table = region_table(values, mask, SMALL, atlas).set_index(["region", "side"])
    for row in atlas.table.itertuples():
        voxels = [at for at in np.ndindex(*SMALL.shape) if mask[at] and atlas.labels[at] == row.label]
        share = sum(abs(values[at]) for at in voxels) / np.abs(values[mask]).sum()
        assert table.loc[(row.region, row.side), "share_of_saliency"] == pytest.approx(share)
        assert table.loc[(row.region, row.side), "voxels"] == len(voxels)
    rest = mask & (atlas.labels == 0)
    assert table.loc[("in no region", "both"), "voxels"] == rest.sum()


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
    alone = {scan: region_table(maps[scan, "strong"], store.read(scan)[1], SMALL, atlas).set_index(["region", "side"])
             .loc[("upper", "left"), "share_of_saliency"] for scan in scans}
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


def test_inside_share_by_hand():
    brain = np.zeros((4, 5, 6), dtype=bool)
    brain[1:3, 1:4, 1:5] = True  # 24 voxels
    lesion = np.zeros_like(brain)
    lesion[1, 1, :3] = True  # 2 in the brain, 1 outside
    found = np.where(brain, 1.0, 50.0)
    found[1, 1, 1:3] = -11  # 22 of 44
    share = inside_share(found, lesion, brain)
    assert share == pytest.approx({"share_of_saliency": 0.5, "share_of_brain": 2 / 24, "ratio": 6})
    nowhere = inside_share(found, np.zeros_like(brain), brain)
    assert nowhere["share_of_saliency"] == nowhere["share_of_brain"] == 0 and np.isnan(nowhere["ratio"])
    with pytest.raises(ValueError, match="zero or not finite"):
        inside_share(np.zeros(brain.shape), lesion, brain)
    with pytest.raises(ValueError, match=r"\(4, 5, 6\).*\(4, 6, 5\)"):
        inside_share(found, lesion.transpose(0, 2, 1), brain)
