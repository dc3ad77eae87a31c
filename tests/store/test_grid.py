"""The grid lies where the paper's box lies, whatever its spacing."""

from __future__ import annotations

import numpy as np
import pytest

from kit.store.grid import PAPER_CENTRE_MM, PAPER_GRID, Grid


def last_centre(grid: Grid) -> np.ndarray:
    return (grid.affine @ [*(side - 1 for side in grid.shape[::-1]), 1])[:3]


def test_paper_grid_is_the_papers_box() -> None:
    # z -68..81, y -113..78, x -95..96 mm, in the paper's public code
    assert PAPER_GRID.origin_mm == (-95.0, -113.0, -68.0)
    np.testing.assert_allclose(last_centre(PAPER_GRID), (96, 78, 81))


@pytest.mark.parametrize("grid", [Grid((36, 48, 40), 4.0), Grid((7, 8, 9), 20.5), PAPER_GRID])
def test_each_grid_has_the_same_middle(grid: Grid) -> None:
    np.testing.assert_allclose((np.array(grid.origin_mm) + last_centre(grid)) / 2, PAPER_CENTRE_MM)


def test_affine_takes_the_last_array_axis_to_the_right() -> None:
    step = Grid((7, 8, 9), 2.0).affine[:3, :3]
    np.testing.assert_array_equal(step, np.diag([2.0, 2.0, 2.0]))


def test_list_from_yaml_means_the_same_grid() -> None:
    assert Grid([7, 8, 9], 2) == Grid((7, 8, 9), 2.0)
    assert hash(Grid([7, 8, 9], 2)) == hash(Grid((7, 8, 9), 2.0))


@pytest.mark.parametrize(
    ("shape", "spacing", "field"),
    [((7, 8), 1.0, "shape"), ((7, 8, 0), 1.0, "shape"), ((7, 8, 9.5), 1.0, "shape"), ((7, 8, 9), 0.0, "spacing_mm")],
)
def test_impossible_grid_is_refused(shape: tuple, spacing: float, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Grid(shape, spacing)
