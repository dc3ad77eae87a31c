"""Slices the right way up, by points marked in MNI millimetres."""

import numpy as np
import pytest

from kit.show.planes import PLANES, cut, focus, footer, grey, slice_mm, slice_name, voxel_at, window
from kit.store.grid import Grid

GRID = Grid((7, 8, 9), 20.0)  # three different sides, so that swapped axes cannot hide


def mark(x: float, y: float, z: float) -> np.ndarray:
    at = np.rint(np.linalg.solve(GRID.affine, [x, y, z, 1])[:3]).astype(int)
    volume = np.zeros(GRID.shape, dtype=np.float32)
    volume[tuple(at[::-1])] = 1
    return volume


@pytest.mark.parametrize(("plane", "point", "row_half", "column_half"), [
    ("axial", (-60, 40, 6), "upper", "left"),  # left, anterior
    ("axial", (60, -70, 6), "lower", "right"),
    ("coronal", (-60, -10, 60), "upper", "left"),  # left, superior
    ("coronal", (60, -10, -50), "lower", "right"),
    ("sagittal", (0, 40, 60), "upper", "right"),  # anterior, superior
    ("sagittal", (0, -70, -50), "lower", "left"),
])
def test_marked_point_lands_where_it_should(plane, point, row_half, column_half):
    volume = mark(*point)
    picture = cut(volume, plane, voxel_at(GRID, point)[list(PLANES).index(plane)])
    assert picture.shape == {"axial": (8, 9), "coronal": (7, 9), "sagittal": (7, 8)}[plane]
    assert picture.sum() == 1
    row, column = np.argwhere(picture)[0]
    assert (row < picture.shape[0] / 2) == (row_half == "upper")
    assert (column < picture.shape[1] / 2) == (column_half == "left")


def test_voxel_and_millimetres_agree():
    for voxel in ((0, 0, 0), (6, 7, 8), (2, 5, 1)):
        point = GRID.affine @ [*voxel[::-1], 1]
        assert voxel_at(GRID, tuple(point[:3])) == voxel
        for plane, index, mm in zip(("axial", "coronal", "sagittal"), voxel, point[[2, 1, 0]], strict=True):
            assert slice_mm(GRID, plane, index) == pytest.approx(mm)
    assert voxel_at(GRID, (1e4, -1e4, 0)) == (3, 0, 8)
    assert voxel_at(GRID) == (3, 4, 4)
    assert slice_name(GRID, "coronal", 0) == "coronal, y = -87.5 mm"


def test_grey_keeps_the_outside_black_and_tissue_above_it():
    picture = np.array([[0.0, -9.0, -2.0, 0.5, 3.0, 9.0]], dtype=np.float16)
    shown = grey(picture, (-2, 3))
    assert shown[0, 0] == 0
    np.testing.assert_allclose(shown[0, 1:], [0.06, 0.06, 0.53, 1, 1], rtol=1e-3)


def test_window_ignores_the_outside():
    volume = np.zeros((40, 50, 60), dtype=np.float32)
    volume[10:30, 10:40, 10:50] = np.linspace(2, 4, 20 * 30 * 40).reshape(20, 30, 40)
    low, high = window(volume)
    assert (low, high) == (pytest.approx(2.01, abs=0.01), pytest.approx(3.99, abs=0.01))
    assert window(np.zeros((3, 4, 5))) == (0, 1)


def test_footer_says_both():
    assert footer("procedural data") == "procedural data · neurological view: left is on the left"
    assert footer("") == "neurological view: left is on the left"


def test_focus_is_the_place_of_a_mask_and_of_the_strongest_spot():
    assert voxel_at(GRID, focus(mark(-60, 40, 6), GRID)) == tuple(np.argwhere(mark(-60, 40, 6))[0])
    two = mark(60, 40, 6) - 2 * mark(-60, -70, 50)
    assert focus(two, GRID) == pytest.approx(focus(mark(-60, -70, 50), GRID))
