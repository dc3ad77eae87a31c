"""Shares of a map by region and side."""

import numpy as np
import pytest

from kit.explain.regions import coarse_labels, inside_share, region_table
from kit.preprocess.template import template_on
from kit.store.grid import Grid

GRID = Grid((36, 48, 40), 4.0)


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    return template_on(GRID)[1]


def voxel(x: float, y: float, z: float) -> tuple[int, int, int]:
    """The (z, y, x) index of a point in MNI millimetres, found through the affine alone."""
    at = np.linalg.solve(GRID.affine, [x, y, z, 1])[:3]
    return tuple(np.rint(at).astype(int)[::-1])


def test_shares_sum_to_one_and_an_even_map_has_ratio_one(brain):
    table = region_table(np.full(GRID.shape, -2, np.float32), brain, GRID)
    assert list(table.columns) == ["region", "side", "voxels", "volume_ml", "share_of_saliency", "share_of_brain",
                                   "ratio"]
    assert table["share_of_saliency"].sum() == pytest.approx(1)
    assert table["share_of_brain"].sum() == pytest.approx(1)
    np.testing.assert_allclose(table["ratio"], 1)
    assert table["voxels"].sum() == brain.sum()
    assert table["volume_ml"].sum() == pytest.approx(brain.sum() * 0.064)
    assert set(table["side"]) == {"left", "right"} and table["region"].nunique() == 7


def test_a_marked_left_hemisphere_is_left_and_unequal_sides_stay_unequal(brain):
    x = GRID.affine[0, 0] * np.arange(GRID.shape[2]) + GRID.affine[0, 3]
    marked = np.where(x < 0, 3.0, 1.0) * np.ones(GRID.shape)
    shares = region_table(marked, brain, GRID).groupby("side")["share_of_saliency"].sum()
    left, right = (brain & (x < 0)).sum(), (brain & (x >= 0)).sum()
    assert shares["left"] == pytest.approx(3 * left / (3 * left + right))
    assert shares["left"] > 0.7


@pytest.mark.parametrize(("point", "region", "side"), [
    ((-26, -20, -16), "medial temporal", "left"),  # hippocampus
    ((26, -20, -16), "medial temporal", "right"),
    ((26, -40, -26), "medial temporal", "right"),  # also in the cerebellum's box: the first box wins
    ((-10, -6, 22), "ventricles", "left"),
    ((12, -18, 8), "deep grey matter", "right"),  # thalamus
    ((-26, -30, 30), "white matter", "left"),  # corona radiata
    ((40, -64, -40), "cerebellum and brain stem", "right"),
    ((-2, -30, -40), "cerebellum and brain stem", "left"),  # pons
    ((-50, -62, 42), "cortical and other grey matter", "left"),  # angular gyrus
])
def test_known_places_fall_into_their_regions(brain, point, region, side):
    found = np.zeros(GRID.shape, dtype=np.float32)
    found[voxel(*point)] = -5
    table = region_table(found, brain, GRID)
    winner = table.loc[table["share_of_saliency"].idxmax()]
    assert (winner["region"], winner["side"], winner["share_of_saliency"]) == (region, side, 1)


def test_coarse_volumes_are_plausible(brain):
    table = region_table(np.ones(GRID.shape, np.float32), brain, GRID)
    volume = table.groupby("region")["volume_ml"].sum()
    assert 10 < volume["ventricles"] < 50
    assert 500 < volume["white matter"] < 700
    assert 120 < volume["cerebellum and brain stem"] < 260
    labels, names = coarse_labels(GRID)
    assert labels.shape == GRID.shape and set(np.unique(labels)) == set(range(len(names)))


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
