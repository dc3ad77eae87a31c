"""Registration finds known moves, to the bit each time; resampling keeps places and amounts."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from kit.data.grid import Grid
from kit.data.register import RegistrationError, find_transforms
from kit.data.resample import resample
from kit.data.template import correlation, template, template_on

# Voxels of the moving scans: MNI space at 3 mm, three unequal sides, some room around the head.
SHAPE = (70, 86, 76)
AFFINE = nib.affines.from_matvec(np.diag([3.0, 3.0, 3.0]), [-114, -146, -95])


def move(turns_degrees: tuple, shift_mm: tuple, stretch: tuple = (1, 1, 1)) -> np.ndarray:
    turn = nib.eulerangles.euler2mat(*np.deg2rad(turns_degrees)[::-1])
    return nib.affines.from_matvec(turn @ np.diag(stretch), shift_mm)


def moved_template(matrix: np.ndarray) -> np.ndarray:
    """The template as a scan whose millimetres are `matrix` times MNI's, with noise."""
    values, _, affine = template()
    scan = resample(values, affine, np.linalg.inv(matrix), SHAPE, AFFINE)
    return 500 * scan + np.random.default_rng(0).normal(scale=10, size=SHAPE).astype(np.float32)


def errors_mm(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    _, brain, affine = template()
    points = nib.affines.apply_affine(affine, np.argwhere(brain)[::997, ::-1])
    return np.linalg.norm(nib.affines.apply_affine(found, points) - nib.affines.apply_affine(known, points), axis=1)


def test_known_rigid_move_is_found_with_the_same_bits_each_time() -> None:
    known = move((15, -10, 18), (25, -20, 15))
    scan = moved_template(known)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    (found, similarity), (again, _) = (find_transforms(scan, AFFINE, ("rigid",))["rigid"] for _ in range(2))
    assert np.percentile(errors_mm(found, known), 95) < 1.0
    assert similarity > 0.9
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert found.tobytes() == again.tobytes()
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads


def test_known_affine_move_is_found() -> None:
    known = move((-12, 8, -15), (-20, 10, -5), stretch=(0.93, 1.06, 0.9))
    found, similarity = find_transforms(moved_template(known), AFFINE, ("affine",))["affine"]
    assert np.percentile(errors_mm(found, known), 95) < 1.0
    assert similarity > 0.9


def test_noise_is_refused() -> None:
    noise = np.random.default_rng(1).normal(loc=5, size=SHAPE).astype(np.float32)
    with pytest.raises(RegistrationError, match="does not resemble the template"):
        find_transforms(noise, AFFINE, ("rigid",))["rigid"]


def test_resample_moves_a_voxel_where_the_matrix_says() -> None:
    array = np.zeros((7, 8, 9), np.float32)
    array[1, 2, 3] = 1  # z, y, x: at (-1, -3, 2) mm
    affine = nib.affines.from_matvec(np.diag([-1.0, 1.0, 1.0]), [2, -5, 1])  # x runs to the left
    out = resample(
        array, affine, move((0, 0, 0), (-2, -1, 1)), (5, 6, 4), nib.affines.from_matvec(np.eye(3), [0, -4, 0])
    )
    # a new point + (-2, -1, 1) is the old point: (-1, -3, 2) is found at (1, -2, 1), voxel (1, 2, 1)
    assert out.sum() == pytest.approx(1)
    assert np.argwhere(out > 0.5).tolist() == [[1, 2, 1]]


def test_coarser_grid_is_smoothed_before() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(48, 56, 64)).astype(np.float32)
    fine = nib.affines.from_matvec(np.eye(3), [0, 0, 0])
    coarse = nib.affines.from_matvec(np.diag([4.0] * 3), [8, 8, 8])
    out = resample(noise + 100, fine, np.eye(4), (8, 10, 12), coarse)
    assert out.mean() == pytest.approx(100, abs=0.1)
    assert out.std() < 0.15  # picked voxel by voxel it would stay near 1
    same = resample(noise, fine, np.eye(4), noise.shape, fine)
    np.testing.assert_allclose(same, noise, atol=1e-6)


def test_template_on_a_grid_keeps_its_volume_and_similarity() -> None:
    grid = Grid((45, 60, 52), 4.0)
    image, mask = template_on(grid)
    assert mask.sum() * 64 == pytest.approx(template()[1].sum(), rel=0.02)
    assert image[mask].mean() > 5 * image[~mask].mean()
    assert correlation(image, 3 * image + 7, mask) == pytest.approx(1)
    assert correlation(image, np.ones_like(image), mask) == 0.0
