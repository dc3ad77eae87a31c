"""Derive brain masks from values: of a mask file, or of a skull-stripped scan itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from kit.preprocess.header import corners_apart, same_affine
from kit.preprocess.nifti import ScanError, other_form, upright
from kit.preprocess.scan_file import read_scan

# No brain is larger: if "nonzero" finds more, the scan is not skull-stripped.
MOST_BRAIN_ML = 2500.0
# Smaller masks are refused; the smallest newborn brain has some 250 ml.
LEAST_BRAIN_ML = 100.0
# A background value must fill at least this share of the border.
LEAST_BACKGROUND = 0.5
# Voxels around a stripped brain stay below these fractions of the scan's brightness (see `own_voxels`): TINY covers
# rounding, the others ringing and noise, at the border and anywhere.
TINY = 1e-4
FAINT_AT_BORDER = 0.02
FAINT = 0.05
# Around stripped brains with ringing at least 99.5 % of the border is faint, around whole heads up to 96 %.
LEAST_FAINT = 0.98
# Faint voxels around a brain are either its dark rim (at most 6 % of the voxels, in 36 stripped scans and 47 masks
# widened by 4 mm) or ringing (22 % and more), in scans low-pass filtered and rounded after stripping.
RINGING = 0.15
# Whole numbers up to 20 are labels. Higher ones are labels if enough neighbours below the highest value are equal:
# 43 % (6 mm voxels) to 76 % (2 mm) in label maps, at most 31 % in masks blurred by 2 to 10 mm.
MOST_LABELS = 20
LABELS_EQUAL = 0.35
# Of the voxels above 5 % of the highest value, 16 % reach 95 % of it even in masks blurred by 10 mm; 12 % do in scans
# clipped at their 98th percentile.
SATURATED = 0.95
LEAST_SATURATED = 0.13
PROBABILITY_TOP = 1.5  # splines overshoot


class GivenMask(NamedTuple):
    """The mask that a file holds."""

    mask: np.ndarray  # bool (z, y, x), on the scan's voxels
    by_other_form: bool  # mask and scan match only if the qform of one of them is used in place of its sform


def read_mask(path: str | Path, array: np.ndarray, affine: np.ndarray, no_codes_ok: bool = False,
             other: np.ndarray | None = None) -> GivenMask:
    """Read a scan's mask, in any format of scans; `brain_of` says which values are brain.

    Args:
        path: the mask file.
        array: (z, y, x), the scan.
        affine: (4, 4), the scan's voxel (x, y, z) to millimetres, RAS+.
        no_codes_ok: see `kit.preprocess.scan_file.read_scan`.
        other: where the scan's other form puts its voxels; see `kit.preprocess.nifti.other_form`. A mask that lies
            there, or whose own other form lies where the scan does, comes from a program that uses the other form.
            It is taken voxel by voxel.

    Raises:
        ScanError: as in `read_scan` and `brain_of`, or the mask is on another voxel grid than the scan.
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
        if turned.shape == array.shape and same_affine(at, affine, array.shape):
            return GivenMask(brain_of(turned, affine), by_other_form > 0)
    if values.shape != array.shape:
        raise ScanError(f"mask: its shape {values.shape} is not the scan's {array.shape} (z, y, x); "
                        "resample it onto the scan's voxels")
    raise ScanError("mask: it is not aligned with the scan (their affines differ by up to "
                    f"{corners_apart(mask_affine, affine, array.shape):.1f} mm); is it another scan's? If not, "
                    "resample it onto the scan's voxels")


def brain_of(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return which voxels of a mask are brain, bool, judged by the mask's values.

    - probabilities up to 1: above 0.5
    - two values, such as 0 and 100: the higher one
    - a graded edge up to 100, 255 or another maximum: above half the maximum
    - labels: above 0.5
    - a skull-stripped scan given as a mask: above 0.5, or `FAINT` of its brightness if that is less

    Args:
        values: (z, y, x), finite, not constant.
        affine: (4, 4), voxel (x, y, z) to millimetres.

    Raises:
        ScanError: the values are not those of a mask, none is above zero, or the mask is inverted or too large.
    """
    levels = np.unique(values)
    low, top = float(levels[0]), float(levels[-1]) + 0.0  # no -0
    found = f"{len(levels)} different values from {low:g} to {top:g}"
    two, whole = len(levels) == 2, bool((levels == np.rint(levels)).all())
    saturated = np.count_nonzero(values >= SATURATED * top) / max(int(np.count_nonzero(values > 0.05 * top)), 1)
    probability = not two and not whole and 0.5 < top <= PROBABILITY_TOP
    labels = not two and not probability and (
        (whole and top <= MOST_LABELS) or _equal_neighbours(values, top, affine) >= LABELS_EQUAL)
    graded = not two and not probability and not labels and saturated >= LEAST_SATURATED
    unlike = low < -top / 4 or (top <= PROBABILITY_TOP and saturated < LEAST_SATURATED)
    if top <= 0 or (unlike and not two and not whole):
        raise ScanError(f"mask: no mask ({found}); give one that is 1 in the brain and 0 elsewhere")
    if two or graded:
        threshold = (low + top) / 2 if two else top / 2
    elif whole or probability or labels:
        threshold = 0.5
    else:  # a skull-stripped scan
        threshold = min(0.5, FAINT * float(np.percentile(values, 99.5)))
    mask = values > threshold
    volume = millilitres(mask, affine)
    if volume >= LEAST_BRAIN_ML and _is_inverted(mask):
        raise ScanError(f"mask: inverted ({found}): its {volume:.0f} ml lie around a brain; make it 1 in the brain and "
                        "0 elsewhere")
    if volume > MOST_BRAIN_ML:
        raise ScanError(f"mask: not a brain ({found}): {volume:.0f} ml; is it a head mask, inverted, or a scan? Give "
                        "one that is 1 in the brain and 0 elsewhere")
    return mask


def _equal_neighbours(values: np.ndarray, top: float, affine: np.ndarray) -> float:
    """Return the share of voxels between zero and nearly the top that equal their neighbour about 1.5 mm away in x."""
    stride = max(1, round(1.5 / float(np.linalg.norm(affine[:3, 0]))))
    here, there = values[..., stride:], values[..., :-stride]
    between = (here > 0) & (here < SATURATED * top)
    return float(np.mean(here[between] == there[between])) if between.any() else 1.0


def _is_inverted(mask: np.ndarray) -> bool:
    """Return whether a mask (z, y, x) covers most of the twelve edges of its bounding box.

    A brain never does, not even in a slab cropped close to it; an inverted mask does, even in a padded scan.
    """
    box = mask[tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(mask))]
    return bool(np.mean(box[_faces(box.shape) >= 2]) > 0.5)


def nonzero_mask(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a skull-stripped scan's voxels outside its background, holes filled, bool (z, y, x).

    Raises:
        ScanError: there is no background, or more such voxels than a brain has.
    """
    mask = own_voxels(array)
    if mask is None:
        raise ScanError("zero is not its background: neither zero nor any other value fills half of its border; give a "
                        "mask (mask: given)")
    if (volume := millilitres(mask, affine)) > MOST_BRAIN_ML:
        raise ScanError(f"{volume:.0f} ml are not background, more than a brain: is the scan skull-stripped? If not, "
                        "choose mask: deepbet")
    return mask


def own_voxels(array: np.ndarray) -> np.ndarray | None:
    """Return a scan's voxels outside its background, holes filled, bool (z, y, x); None if there is no background.

    The background is the one value that fills most of the border: zero, or another if a stripped scan was z-scored as
    a whole. Values on both sides of it are brain. If a scan was interpolated after stripping, its background is only
    near that value, and ringing surrounds the brain: then only voxels count that differ by more than `FAINT` of the
    scan's brightness (the 99.5th percentile of all distances from the background).
    """
    border = _faces(array.shape) >= 1
    background = np.quantile(array[border], 0.5, method="lower")
    apart = np.abs(array - background)
    bright = np.percentile(apart, 99.5)
    # The background value exactly, or up to rounding.
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
    """Return for each voxel of a box how many faces (of different axes) it lies on."""
    ends = [np.isin(np.arange(side), (0, side - 1)).astype(np.uint8) for side in shape]
    return sum(np.meshgrid(*ends, indexing="ij", sparse=True), np.zeros((), np.uint8))
