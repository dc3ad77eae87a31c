"""Registration finds known moves, to the bit each time; resampling keeps places and amounts."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from kit.preprocess import register
from kit.preprocess.nifti import upright
from kit.preprocess.register import (
    ORIENTATIONS,
    RegistrationError,
    disagreement,
    find_orientation,
    find_transforms,
    initial_pose,
    rigid_part,
    rotation_angle,
)
from kit.preprocess.resample import resample
from kit.preprocess.template import correlation, template, template_on
from kit.store.grid import Grid

# Voxels of the moving scans: MNI space at 3 mm, three unequal sides, some room around the head.
SHAPE = (70, 86, 76)
AFFINE = nib.affines.from_matvec(np.diag([3.0, 3.0, 3.0]), [-114, -146, -95])


def move(turns_degrees: tuple, shift_mm: tuple, stretch: tuple = (1, 1, 1)) -> np.ndarray:
    turn = nib.eulerangles.euler2mat(*np.deg2rad(turns_degrees)[::-1])
    return nib.affines.from_matvec(turn @ np.diag(stretch), shift_mm)


def moved_template(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The template as a scan whose millimetres are `matrix` times MNI's, with noise; and its brain."""
    values, brain, affine = template()
    scan, mask = (resample(each, affine, np.linalg.inv(matrix), SHAPE, AFFINE) for each in (values, brain))
    return 500 * scan + np.random.default_rng(0).normal(scale=10, size=SHAPE).astype(np.float32), mask > 0.5


def errors_mm(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    _, brain, affine = template()
    points = nib.affines.apply_affine(affine, np.argwhere(brain)[::997, ::-1])
    return np.linalg.norm(nib.affines.apply_affine(found, points) - nib.affines.apply_affine(known, points), axis=1)


@pytest.mark.slow
def test_known_rigid_move_is_found_with_the_same_bits_each_time() -> None:
    known = move((15, -10, 18), (25, -20, 15))
    scan, mask = moved_template(known)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    found, again = (find_transforms(scan, AFFINE, mask).rigid for _ in range(2))
    assert np.percentile(errors_mm(found, known), 95) < 1.0
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert found.tobytes() == again.tobytes()
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.83, 1.1])
def test_the_rigid_pose_does_not_depend_on_the_brains_size(size: float) -> None:
    """With the scale held at 1, a brain of 0.83 of the template's size was found 8 mm away."""
    known = move((10, -6, 8), (12, -9, 6), stretch=(size, size, size))
    found = find_transforms(*(moved_template(known)[0], AFFINE, moved_template(known)[1]))
    expected = rigid_part(known)
    assert np.percentile(errors_mm(found.rigid, expected), 95) < 1.0
    assert disagreement(found.rigid, found.affine).rotation_deg < 0.5
    assert disagreement(found.rigid, found.affine).shift_mm < 0.5


@pytest.mark.slow
def test_known_affine_move_is_found() -> None:
    known = move((-12, 8, -15), (-20, 10, -5), stretch=(0.93, 1.06, 0.9))
    scan, mask = moved_template(known)
    assert np.percentile(errors_mm(find_transforms(scan, AFFINE, mask).affine, known), 95) < 1.0


def test_disagreement_is_of_the_rigid_parts_at_the_brains_centre() -> None:
    one, other = move((0, 0, 0), (0, 0, 0), stretch=(0.9, 0.9, 0.9)), move((0, 5, 0), (0, 0, 3))
    apart = disagreement(one, one @ np.diag([1.1, 1.1, 1.1, 1]))
    assert apart.rotation_deg == pytest.approx(0, abs=1e-5)
    assert disagreement(np.eye(4), other).rotation_deg == pytest.approx(5)
    assert disagreement(np.eye(4), move((0, 0, 0), (1, 2, 2))).shift_mm == pytest.approx(3)
    with pytest.raises(RegistrationError, match="mirrored"):
        rigid_part(np.diag([-1.0, 1, 1, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 9, 17])
def test_a_wrong_orientation_is_found(number: int) -> None:
    scan, mask = moved_template(move((8, 5, -6), (5, -8, 4)))
    header = nib.affines.from_matvec(ORIENTATIONS[number]) @ AFFINE
    turned, affine = upright(scan.T, header)
    turned_mask = upright(mask.astype(np.float32).T, header)[0] > 0.5
    found = find_orientation(turned, affine, turned_mask)
    np.testing.assert_array_equal(found[:3, :3], ORIENTATIONS[number])
    assert len(ORIENTATIONS) == 24 and np.allclose([np.linalg.det(turn) for turn in ORIENTATIONS], 1)
    assert (initial_pose(turned, affine, turned_mask).likeness > 0.45) == (number == 0)


def test_a_z_scored_brain_is_found_as_it_was_before() -> None:
    """Divided by local means around zero, its likeness was 0.25, less than an upright brain's; as it was: 1.40."""
    scan, mask = moved_template(move((8, 5, -6), (5, -8, 4)))
    inside = scan[mask]
    z_scored = np.where(mask, (scan - inside.mean()) / inside.std(), 0).astype(np.float32)
    before, found = initial_pose(scan, AFFINE, mask), initial_pose(z_scored, AFFINE, mask)
    assert found.likeness > 0.9 * before.likeness
    assert rotation_angle(found.rotation.T @ before.rotation) < 1  # 0.43, at 8 mm


def test_a_start_that_leaves_the_scan_gives_way_to_the_next_best(monkeypatch) -> None:
    """The search itself is made up: no scan is known whose best start leaves it at 4 mm and not at 8."""
    ended: list[tuple[float, str]] = []

    def search(_scan: object, size: float, start: str, _step_mm: float) -> tuple[str, float]:
        if (size, start) in leaves:
            raise RuntimeError("a page of C++")
        ended.append((size, start))
        return start, {"a": -3.0, "b": -2.0, "c": -1.0}[start]

    monkeypatch.setattr(register, "_climbed", lambda *_: [("c", -1.0), ("a", -3.0), ("b", -2.0)])
    monkeypatch.setattr(register, "_search", search)
    leaves = {(4.0, "a")}
    assert register._best_similarity(None, {8.0: 4, 4.0: 1, 2.0: 1}) == "b" and ended == [(4.0, "b"), (2.0, "b")]
    leaves = set()
    assert register._best_similarity(None, {8.0: 4, 4.0: 2, 2.0: 1}) == "a"
    assert ended[2:] == [(4.0, "a"), (4.0, "b"), (2.0, "a")]
    leaves = {(4.0, "a"), (4.0, "b"), (2.0, "c")}
    with pytest.raises(RegistrationError, match="the search left the brain"):
        register._best_similarity(None, {8.0: 4, 4.0: 1, 2.0: 1})


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(RegistrationError, match="the mask is empty"):
        find_transforms(np.ones(SHAPE, np.float32), AFFINE, np.zeros(SHAPE, bool))


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
