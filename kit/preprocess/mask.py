"""Brain masks from values: those of a mask file, or a skull-stripped scan's own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from kit.preprocess.nifti import ScanError, other_form, upright
from kit.preprocess.place import corners_apart, same_place
from kit.preprocess.scan_file import read_scan

# No brain is larger: where "nonzero" finds more, the scan still has its head.
MOST_BRAIN_ML = 2500.0
# Below this no brain is left to work with; the smallest newborn's has some 250 ml.
LEAST_BRAIN_ML = 100.0
# A background fills most of the border.
LEAST_BACKGROUND = 0.5
# Shares of the scan's brightness (see `own_voxels`) that voxels around a stripped brain stay below: of rounding, and of
# ringing and noise at the border and anywhere.
TINY = 1e-4
FAINT_AT_BORDER = 0.02
FAINT = 0.05
# So much of the border is faint around stripped brains that ring (at least 99.5 %); around heads up to 96 % is.
LEAST_FAINT = 0.98
# Faint voxels around a brain are its dark rim (at most 6 % of 36 stripped scans and 47 masks widened by 4 mm), or, of
# scans stripped before their high frequencies were cut off and they were rounded, ringing (22 % and more).
RINGING = 0.15
# Whole numbers up to this are labels. Higher ones are where neighbours are mostly equal below the highest value: of
# label maps 43 % (voxels of 6 mm) to 76 % (2 mm) are, of masks blurred by 2 to 10 mm at most 31 %.
MOST_LABELS = 20
LABELS_EQUAL = 0.35
# Of masks blurred by 10 mm even, 16 % lie near the highest value; of scans, clipped at their 98th percentile, 12 %.
SATURATED = 0.95
LEAST_SATURATED = 0.13
PROBABILITY_TOP = 1.5  # splines overshoot


class GivenMask(NamedTuple):
    """What a mask file holds."""

    mask: np.ndarray  # bool (z, y, x), on the scan's voxels
    by_other_form: bool  # it lies where the other one of sform and qform puts the scan, or itself


def read_mask(path: str | Path, array: np.ndarray, affine: np.ndarray, no_codes_ok: bool = False,
              other: np.ndarray | None = None) -> GivenMask:
    """Read a scan's mask, of any format that scans may have; `brain_of` says which values are brain.

    Args:
        path: the mask's.
        array: (z, y, x), the scan.
        affine: (4, 4), the scan's voxel (x, y, z) to millimetres, RAS+.
        no_codes_ok: see `kit.preprocess.scan_file.read_scan`.
        other: where the scan's other form puts its voxels; see `kit.preprocess.nifti.other_form`. A mask that lies
            there, or whose own other form lies where the scan does, was made by a program that goes by the other form:
            it is taken voxel by voxel.

    Raises:
        ScanError: as `read_scan` and `brain_of`, or the mask lies on other voxels than the scan.
    """
    try:
        values, mask_affine = read_scan(path, no_codes_ok)
    except ScanError as error:
        raise ScanError(f"mask: {error}") from error
    places = [mask_affine]
    if other is not None:
        places.append(affine @ np.linalg.inv(other) @ mask_affine)
    if (mask_other := other_form(path)) is not None:
        places.append(mask_other)
    for by_other_form, place in enumerate(places):
        turned, at = upright(values.T, place)
        if turned.shape == array.shape and same_place(at, affine, array.shape):
            return GivenMask(brain_of(turned, affine), by_other_form > 0)
    if values.shape != array.shape:
        raise ScanError(f"mask: its shape {values.shape} is not the scan's {array.shape} (z, y, x); "
                        "resample it onto the scan's voxels")
    raise ScanError("mask: it lies elsewhere in space than the scan (their affines differ, by up to "
                    f"{corners_apart(mask_affine, affine, array.shape):.1f} mm); is it another scan's? Else resample "
                    "it onto the scan's voxels")


def brain_of(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return which voxels of a mask are brain, bool, by what its values say.

    - probabilities up to 1: above one half
    - two values, such as 0 and 100: the higher one
    - a graded edge up to 100, 255 or another value: above its half
    - labels: above zero; so is a skull-stripped scan that is given as a mask

    Args:
        values: (z, y, x), finite, not all the same.
        affine: (4, 4), voxel (x, y, z) to millimetres.

    Raises:
        ScanError: values that are no mask's, no brain among them, or the mask is inverted.
    """
    levels = np.unique(values)
    low, top = float(levels[0]), float(levels[-1]) + 0.0  # no -0
    found = f"{len(levels)} different values from {low:g} to {top:g}"
    two, whole = len(levels) == 2, bool((levels == np.rint(levels)).all())
    saturated = np.count_nonzero(values >= SATURATED * top) / max(np.count_nonzero(values > 0.05 * top), 1)
    probability = not two and not whole and 0.5 < top <= PROBABILITY_TOP
    graded = (not two and not probability and not (whole and top <= MOST_LABELS) and saturated >= LEAST_SATURATED
              and _equal_neighbours(values, top, affine) < LABELS_EQUAL)
    if top <= 0 or (not two and not whole and low < -top / 4) or (probability and saturated < LEAST_SATURATED):
        raise ScanError(f"mask: no mask ({found}); give one that is 1 in the brain and 0 elsewhere")
    mask = values > ((low + top) / 2 if two else top / 2 if graded else 0.5)
    volume = millilitres(mask, affine)
    if volume >= LEAST_BRAIN_ML and _is_inverted(mask):
        raise ScanError(f"mask: inverted ({found}): its {volume:.0f} ml lie around a brain; make it 1 in the brain and "
                        "0 elsewhere")
    if volume > MOST_BRAIN_ML:
        raise ScanError(f"mask: no brain's ({found}): {volume:.0f} ml; is it a head's, inverted, or a scan? Give one "
                        "that is 1 in the brain and 0 elsewhere")
    return mask


def _equal_neighbours(values: np.ndarray, top: float, affine: np.ndarray) -> float:
    """Return how many voxels between zero and nearly the highest value equal the one about 1.5 mm on in x, a share."""
    stride = max(1, round(1.5 / float(np.linalg.norm(affine[:3, 0]))))
    here, there = values[..., stride:], values[..., :-stride]
    between = (here > 0) & (here < SATURATED * top)
    return float(np.mean(here[between] == there[between])) if between.any() else 1.0


def _is_inverted(mask: np.ndarray) -> bool:
    """Return whether a mask (z, y, x) has most of the twelve edges of the box around it.

    A brain never has them, not even in a slab cut close around it; an inverted mask does, in a padded scan too.
    """
    box = mask[tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(mask))]
    return bool(np.mean(box[_faces(box.shape) >= 2]) > 0.5)


def nonzero_mask(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a skull-stripped scan's voxels that are not its background, holes filled, bool (z, y, x).

    Raises:
        ScanError: it has no background, or there are more such voxels than a brain has.
    """
    mask = own_voxels(array)
    if mask is None:
        raise ScanError("zero is not its background: less than half of its border is zero, or any one value; give a "
                        "mask (mask: given)")
    if (volume := millilitres(mask, affine)) > MOST_BRAIN_ML:
        raise ScanError(f"{volume:.0f} ml are not background, more than a brain: is the scan skull-stripped? If not, "
                        "choose mask: deepbet")
    return mask


def own_voxels(array: np.ndarray) -> np.ndarray | None:
    """Return a scan's voxels that are not its background, holes filled, bool (z, y, x); None where it has none.

    The background is the one value that most of the border has: zero, or another where a stripped scan was z-scored
    as a whole. Values on both sides of it are brain. Where a scan was interpolated after it was stripped, its
    background is near that value, and ringing surrounds the brain: then only voxels that differ by more than `FAINT`
    of the scan's brightness (the 99.5th percentile of all distances from the background) count.
    """
    border = _faces(array.shape) >= 1
    background = np.quantile(array[border], 0.5, method="lower")
    apart = np.abs(array - background)
    bright = np.percentile(apart, 99.5)
    # The same value, or the same but for rounding.
    exact = next((tiny for tiny in (0.0, TINY * bright) if np.mean(apart[border] <= tiny) >= LEAST_BACKGROUND), None)
    if exact is None and np.mean(apart[border] <= FAINT_AT_BORDER * bright) < LEAST_FAINT:
        return None
    clear = ndimage.binary_fill_holes(apart > FAINT * bright)
    if exact is not None:
        every = ndimage.binary_fill_holes(apart > exact)
        if np.count_nonzero(clear) >= (1 - RINGING) * np.count_nonzero(every):
            return every
    return clear


def millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    """Return a mask's volume in ml."""
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def _faces(shape: tuple[int, ...]) -> np.ndarray:
    """Return how many faces of a box, of different axes, each of its voxels lies on."""
    ends = [np.isin(np.arange(side), (0, side - 1)).astype(np.uint8) for side in shape]
    return sum(np.meshgrid(*ends, indexing="ij", sparse=True))
