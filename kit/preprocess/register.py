"""Rigid and affine registration of a brain to the ICBM152 2009a template, by SimpleITK; RAS+ millimetres throughout.

Only the brain inside the mask is registered: neck, scalp and face play no part. The transform includes a scale from
the first step, because the template is larger than most brains: with the scale held at 1, the mutual information of
a small brain peaks at a pitched or shifted pose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
import SimpleITK as sitk
from nibabel.affines import apply_affine, from_matvec
from nibabel.eulerangles import euler2mat
from scipy import ndimage
from scipy.spatial.transform import Rotation

from kit.errors import KitError
from kit.preprocess.resample import one_thread, resample, to_image
from kit.preprocess.template import template

# Levels of the search. Halving the finest voxel size would cost eight times as much and change the result by less
# than two brains differ.
COARSE_MM, MIDDLE_MM, FINE_MM = 8.0, 4.0, 2.0
# At the finest level both images are smoothed by a Gaussian of this FWHM, so details in which brains differ, and blur
# from resampling, matter less (a rotated head was recovered within 0.2 mm instead of 0.4).
SMOOTH_MM = 4.0
# The search sees the template's brain and this margin: the rim shows where the brain ends.
RIM_MM = 4.0
# Zero padding around the brain. Without it voxels outside the array are ignored, which would reward little overlap.
MARGIN_MM = 30.0
# Sigma of the Gaussian that flattens intensities for the search. Without it, a coil weak at the vertex made the rigid
# and affine poses of 76 heads differ by up to 2.9 degrees; with it they differ no more than after N4.
FLATTEN_MM = 15.0
# Starting rotations about each axis, and how many starts are followed at each level.
START_ROTATIONS_DEG = (-20.0, 0.0, 20.0)
FOLLOWED = {COARSE_MM: 4, MIDDLE_MM: 1, FINE_MM: 1}
# A brain with at least this mutual information with the template at 8 mm is upright: see `initial_pose`.
UPRIGHT = 0.45

Affine = TypeVar("Affine", sitk.Similarity3DTransform, sitk.AffineTransform)
Starts = list[tuple[sitk.Similarity3DTransform, float]]  # each with minus its mutual information

SEARCH_LEFT_BRAIN = "the search left the brain: too little overlap with the template; look at the scan and its mask"


class RegistrationError(KitError, RuntimeError):
    """The scan matches the template nowhere; the message is the reason."""


class Transforms(NamedTuple):
    """Where a scan's brain lies: (4, 4) float64 matrices from MNI millimetres to the scan's, RAS+ (x, y, z)."""

    rigid: np.ndarray
    affine: np.ndarray


class InitialPose(NamedTuple):
    """A brain's approximate pose, from the search at 8 mm alone."""

    likeness: float  # mutual information with the template
    rotation: np.ndarray  # (3, 3), the template's directions to the scan's
    centre: np.ndarray  # (x, y, z) mm, of the brain


class Disagreement(NamedTuple):
    """Distance between the rigid parts of two transforms."""

    rotation_deg: float
    shift_mm: float  # at the brain's centre


class _Template(NamedTuple):
    """The target of the search: images and masks by voxel size."""

    images: dict[float, sitk.Image]
    masks: dict[float, sitk.Image]
    centre: np.ndarray  # (x, y, z) mm, of the brain
    brain_mm3: float


class _Scan(NamedTuple):
    images: dict[float, sitk.Image]
    centre: np.ndarray
    brain_mm3: float


def find_transforms(array: np.ndarray, affine: np.ndarray, mask: np.ndarray,
                    followed: Mapping[float, int] = FOLLOWED) -> Transforms:
    """Register a brain to the template.

    A similarity transform (rotation, translation, one scale) maximises Mattes mutual information (Mattes et al. 2003,
    doi:10.1109/TMI.2003.809072) from the best of 27 starts at 8, 4 and 2 mm; then an affine one at 4 and 2 mm. The
    rigid transform is the similarity without its scale, about the brain's centre. One thread is used, so the same
    scan gives bit-identical matrices.

    Args:
        array: (z, y, x) intensities.
        affine: (4, 4), voxel (x, y, z) to the scan's millimetres, RAS+.
        mask: (z, y, x) bool, the brain.
        followed: by voxel size in mm (8, 4, 2), from how many of the best starts the search goes on; more take longer.

    Raises:
        RegistrationError: the search left the brain.
    """
    with one_thread():
        scan = _scan(array, affine, mask)
        try:
            similarity = _best_similarity(scan, followed)
            freed = sitk.AffineTransform(similarity.GetMatrix(), similarity.GetTranslation(), similarity.GetCenter())
            for size in (MIDDLE_MM, FINE_MM):
                _search(scan, size, freed, step_mm=0.2)
        except RuntimeError as error:  # SimpleITK's message is a page of C++
            raise RegistrationError(SEARCH_LEFT_BRAIN) from error
    return Transforms(rigid_part(_matrix(similarity)), _matrix(freed))


def find_orientation(array: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the likeliest of the 24 orientations that a wrong header can give a brain.

    Reflections cannot be detected: a mirrored brain looks like a brain.

    Args:
        array, affine, mask: as in `find_transforms`.

    Returns:
        The (4, 4) rotation, with entries 0 and +-1, from the scan's true directions to those in its header; the
        identity if the header is right.
    """
    with one_thread():
        scan = _scan(array, affine, mask)
        # Turn the scan back, not the start: ITK's versor has no room to move around 180 degrees.
        return from_matvec(likeliest([_initial_pose(_turned(scan, turn.T)).likeness for turn in ORIENTATIONS]))


def likeliest(found: Sequence[float]) -> np.ndarray:
    """Return the likeliest of `ORIENTATIONS`, (3, 3); the identity (the header is right) if none reaches `UPRIGHT`.

    `found` has one likeness per orientation.
    """
    best = int(np.argmax(found))
    return ORIENTATIONS[best if found[best] >= UPRIGHT else 0]


def initial_pose(array: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> InitialPose:
    """Compare a brain with the template at 8 mm, from 27 starts near the header's orientation.

    Upright brains reach a likeness of 0.55 or more, even if the head is rotated by up to 20 degrees about each axis;
    in the 23 wrong orientations they reach at most 0.42 (docs/real_heads.md). From a single start, a rotated head
    reached only 0.27.
    """
    with one_thread():
        return _initial_pose(_scan(array, affine, mask))


def _initial_pose(scan: _Scan) -> InitialPose:
    try:
        best, value = min(_climbed(scan, FOLLOWED[COARSE_MM]), key=lambda start: start[1])
        return InitialPose(-value, rigid_part(_matrix(best))[:3, :3], scan.centre)
    except RuntimeError:  # every start leaves the scan
        return InitialPose(0.0, np.eye(3), scan.centre)


def rigid_part(matrix: np.ndarray) -> np.ndarray:
    """Return the rigid part of a (4, 4) affine matrix (polar decomposition) that maps the brain's centre as it does.

    Raises:
        RegistrationError: the matrix mirrors or flattens.
    """
    left, stretch, right = np.linalg.svd(matrix[:3, :3])
    rotation = left @ right
    if np.linalg.det(rotation) < 0 or stretch.min() < 1e-3:
        raise RegistrationError("the search mirrored or flattened the brain; look at the scan and its mask")
    centre = _template().centre
    return from_matvec(rotation, apply_affine(matrix, centre) - rotation @ centre)


def disagreement(one: np.ndarray, other: np.ndarray) -> Disagreement:
    """Return how far apart the rigid parts of two (4, 4) matrices, MNI to scan, are."""
    one, other, centre = rigid_part(one), rigid_part(other), _template().centre
    shift = apply_affine(one, centre) - apply_affine(other, centre)
    return Disagreement(rotation_angle(one[:3, :3].T @ other[:3, :3]), float(np.linalg.norm(shift)))


def rotation_angle(rotation: np.ndarray) -> float:
    """Return the angle of a (3, 3) rotation matrix, 0 to 180 degrees."""
    return float(np.degrees(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))))


# The 24 rotations that map axes to axes, (3, 3) each, the identity first.
ORIENTATIONS = sorted(np.rint(Rotation.create_group("O").as_matrix()), key=np.trace, reverse=True)


@lru_cache(maxsize=1)
def _template() -> _Template:
    values, brain, affine = template()
    levels = _levels(values * brain, affine, RIM_MM)
    fine, fine_affine = levels[FINE_MM]
    on_fine = resample(brain, affine, np.eye(4), fine.shape, fine_affine) > 0.5
    rim = ndimage.distance_transform_edt(~on_fine, sampling=FINE_MM) <= RIM_MM
    masks = {
        size: to_image((resample(rim, fine_affine, np.eye(4), each.shape, at) > 0.5).astype(np.uint8), at)
        for size, (each, at) in levels.items()
    }
    return _Template(_images(levels), masks, _centre(brain, affine), _mm3(brain, affine))


def _scan(array: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> _Scan:
    """Return the brain cropped out of its scan; the brightest 0.5 % (vessels, fat) are clipped.

    If more than 0.5 % of it is negative (z-scored, say), it is shifted to start at zero: `_levels` divides by local
    means. Z-scored copies of 12 stripped scans were turned by 1.4 to 50 degrees without the shift, by 0.05 with it.
    """
    if not mask.any():
        raise RegistrationError("the mask is empty: no brain to register")
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(mask))
    corner = affine.copy()
    corner[:3, 3] = apply_affine(affine, [side.start for side in box[::-1]])
    array, mask = array[box], mask[box]
    brain = np.minimum(array, np.percentile(array[mask], 99.5))
    if (low := np.percentile(array[mask], 0.5)) < 0:
        brain = np.maximum(brain, low) - low
    brain = np.where(mask, brain, 0).astype(np.float32)
    return _Scan(_images(_levels(brain, corner, MARGIN_MM, mask)), _centre(mask, corner), _mm3(mask, corner))


def _turned(scan: _Scan, rotation: np.ndarray) -> _Scan:
    """Return the brain at 8 mm with its millimetres rotated; voxels stay as they are."""
    image = sitk.Image(scan.images[COARSE_MM])
    image.SetDirection((rotation @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    image.SetOrigin((rotation @ image.GetOrigin()).tolist())
    return _Scan({COARSE_MM: image}, rotation @ scan.centre, scan.brain_mm3)


def _levels(array: np.ndarray, affine: np.ndarray, margin_mm: float,
            mask: np.ndarray | None = None) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Return the array and its affine at each level's voxel size, each made from the finer one, with a margin.

    With a mask, intensities are divided by their local mean inside it, which removes a bias field.
    """
    levels, affine_given = {}, affine
    for size in (FINE_MM, MIDDLE_MM, COARSE_MM):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        extent = np.array(array.shape[::-1]) * spacing
        sides = np.ceil((extent + 2 * margin_mm) / size).astype(int)
        margin_mm = 0.0  # coarser levels inherit it
        # The new grid keeps the old one's directions and centre.
        corner = (np.array(array.shape[::-1]) - 1 - (sides - 1) * size / spacing) / 2
        affine_before, affine = affine, affine @ from_matvec(np.diag(size / spacing), corner)
        array = resample(array, affine_before, np.eye(4), tuple(sides[::-1]), affine)
        if size == FINE_MM and mask is not None:
            inside = resample(mask, affine_given, np.eye(4), array.shape, affine)
            near, values = (ndimage.gaussian_filter(each, FLATTEN_MM / FINE_MM) for each in (inside, array))
            array = np.where(inside > 0.5, array * near / np.maximum(values, 1e-6 * array.max()), 0).astype(np.float32)
        levels[size] = (array, affine)
    return levels


def _images(levels: dict[float, tuple[np.ndarray, np.ndarray]]) -> dict[float, sitk.Image]:
    fine, fine_affine = levels[FINE_MM]
    smooth = ndimage.gaussian_filter(fine, SMOOTH_MM / np.sqrt(8 * np.log(2)) / FINE_MM)
    return {size: to_image(*level) for size, level in levels.items()} | {FINE_MM: to_image(smooth, fine_affine)}


def _similarity(scan: _Scan, rotation: np.ndarray) -> sitk.Similarity3DTransform:
    """Return the similarity with this rotation that maps the template brain's centre and volume to the scan's."""
    centre = _template().centre
    start = sitk.Similarity3DTransform()
    start.SetCenter(centre.tolist())
    start.SetTranslation((scan.centre - centre).tolist())
    scale = (scan.brain_mm3 / _template().brain_mm3) ** (1 / 3)
    start.SetMatrix((scale * rotation).ravel().tolist(), 1e-6)
    return start


def _best_similarity(scan: _Scan, followed: Mapping[float, int]) -> sitk.Similarity3DTransform:
    """Return the best similarity transform at 2 mm, searched from the most promising starts.

    Raises:
        RegistrationError: all of them leave the scan.
    """
    starts = _climbed(scan, followed[COARSE_MM])
    for size, step_mm in ((MIDDLE_MM, 4.0), (FINE_MM, 0.5)):
        starts = _searched(scan, size, sorted(starts, key=lambda start: start[1]), followed[size], step_mm)
    return min(starts, key=lambda start: start[1])[0]


def _climbed(scan: _Scan, followed: int) -> Starts:
    """Search at 8 mm from the most promising of 27 starts, and drop those that leave the scan.

    Raises:
        RegistrationError: all of them do.
    """
    turns = [euler2mat(*np.deg2rad(angles)) for angles in product(START_ROTATIONS_DEG, repeat=3)]
    starts = [(start, _value(scan, start)) for start in (_similarity(scan, turn) for turn in turns)]
    return _searched(scan, COARSE_MM, sorted(starts, key=lambda start: start[1])[:followed], followed, step_mm=8.0)


def _searched(scan: _Scan, size: float, starts: Starts, most: int, step_mm: float) -> Starts:
    """Search at one level from the first of these starts, best first, until `most` have stayed in the scan.

    Raises:
        RegistrationError: all of them leave it.
    """
    found: Starts = []
    for start, _ in starts:
        try:
            found.append(_search(scan, size, start, step_mm))
        except RuntimeError:
            continue
        if len(found) == most:
            break
    if not found:
        raise RegistrationError(SEARCH_LEFT_BRAIN)
    return found


def _search(scan: _Scan, size: float, start: Affine, step_mm: float) -> tuple[Affine, float]:
    """Optimise `start` at one level, in place; return it with minus the mutual information."""
    method = _method(size, start)
    # The first step is always taken in full: a long one, right for a distant start, would throw away a good affine.
    # With ITK's default gradient tolerance (1e-4) the search ended up to 0.7 degrees from the optimum.
    method.SetOptimizerAsRegularStepGradientDescent(
        step_mm, minStep=step_mm / 250, numberOfIterations=200, relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(_template().images[size], scan.images[size])
    return start, method.GetMetricValue()


def _value(scan: _Scan, start: sitk.Transform) -> float:
    """Return minus the mutual information of a start at 8 mm."""
    return _method(COARSE_MM, start).MetricEvaluate(_template().images[COARSE_MM], scan.images[COARSE_MM])


def _method(size: float, start: sitk.Transform) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(_template().masks[size])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(start, inPlace=True)
    return method


def _centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a mask's centre of mass (x, y, z) in millimetres."""
    return apply_affine(affine, np.array(ndimage.center_of_mass(mask))[::-1])


def _mm3(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])))


def _matrix(transform: sitk.Similarity3DTransform | sitk.AffineTransform) -> np.ndarray:
    return from_matvec(np.reshape(transform.GetMatrix(), (3, 3)), transform.TransformPoint((0.0, 0.0, 0.0)))
