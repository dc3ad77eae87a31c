"""What a mask's values say is read; what is no mask, or inverted, is refused by name; a stripped scan is its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from kit.preprocess.mask import brain_of, millilitres, nonzero_mask, read_mask
from kit.preprocess.nifti import ScanError, read_nifti, write_nifti
from kit.preprocess.skullstrip import dice
from kit.preprocess.template import template

FOUR_MM = np.diag([4, 4, 4, 1])


@cache
def stripped() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template's brain alone at 4 mm, (47, 59, 50), with grey matter and fluid; its voxels; its affine."""
    values, mask, affine = template()
    small = np.where(mask, 100 * values + 10, 0)[::4, ::4, ::4].astype(np.float32)
    return small, ndimage.binary_fill_holes(small > 0), affine @ FOUR_MM


def blurred(top: float, sigma: float = 0.8) -> np.ndarray:
    """The brain's mask with a graded edge, 0 to `top`."""
    return top * ndimage.gaussian_filter(stripped()[1].astype(np.float32), sigma)


def parcels() -> np.ndarray:
    """A label map like FreeSurfer's: white matter 2 and 41, cortex 1001 to 1035 on the left, 2001 to 2035 right."""
    _, brain, _ = stripped()
    z, y, x = np.indices(brain.shape)
    right = x > brain.shape[2] // 2
    white = ndimage.binary_erosion(brain, iterations=2)
    cortex = 1001 + 1000 * right + (z // 8 * 7 + y // 8) % 35
    return np.where(white, np.where(right, 41, 2), cortex) * brain


def normalised(white: float, top: float) -> np.ndarray:
    """The stripped brain with its white matter at about `white`, and a vessel of intensity `top`."""
    scan = stripped()[0] * np.float32(white / 100)
    scan[20:23, 30, 25] = top
    return scan


MASKS = {
    "0 and 1": lambda brain: brain * 1.0,
    "0 and 100": lambda brain: brain * 100.0,
    "0 and 255": lambda brain: 255 * brain,
    "-1 and 1": lambda brain: 2.0 * brain - 1, "2 and 3": lambda brain: brain + 2.0,
    "0 and 0.004": lambda brain: brain / 255,
    "probability": lambda brain: blurred(1.0),
    "percent": lambda brain: blurred(100.0),
    "percent, whole": lambda brain: np.rint(blurred(100.0)), "0 to 255, whole": lambda brain: np.rint(blurred(255.0)),
    "0 to 1000": lambda brain: np.rint(blurred(1000.0)),
    "splines overshoot": lambda brain: brain * 1.08 - 0.06 * ndimage.binary_dilation(brain) + 0.001,
    "FreeSurfer's labels": lambda brain: parcels(),
    "hemispheres 127 and 255": lambda brain: np.where(np.indices(brain.shape)[2] > 25, 127, 255) * brain,
    "tissues 1 to 3": lambda brain: brain * (1 + np.indices(brain.shape)[0] % 3),
    "the stripped scan": lambda brain: stripped()[0],
    "stripped, white matter at 0.6": lambda brain: normalised(0.6, 1.8),
    "stripped, a bright vessel": lambda brain: normalised(1, 10),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_masks_values_are_read(tmp_path: Path, kind: str) -> None:
    scan, brain, affine = stripped()
    write_nifti(tmp_path / "m.nii.gz", MASKS[kind](brain), affine)
    found = read_mask(tmp_path / "m.nii.gz", scan, affine).mask
    assert dice(found, brain) > 0.97
    assert millilitres(found, affine) == pytest.approx(millilitres(brain, affine), rel=0.03)
    if not any(word in kind for word in ("percent", "probability", "to 255", "to 1000")):
        np.testing.assert_array_equal(found, brain)


def framed(brain: np.ndarray) -> np.ndarray:
    """An inverted mask of a scan that was padded with zeros."""
    return np.pad(~brain[2:-2, 2:-2, 2:-2], 2)


NO_MASKS = {
    "inverted": (lambda brain: ~brain,
                 r"mask: inverted \(2 different values from 0 to 1\): its \d+ ml lie around a brain; make it 1 in"),
    "inverted, 255": (lambda brain: 255 * ~brain, "mask: inverted .2 different values from 0 to 255"),
    "inverted, graded": (lambda brain: 100 - np.rint(blurred(100.0)), "mask: inverted"),
    "inverted and padded": (framed, "mask: inverted"),
    "1 and 2": (lambda brain: 1 + 1.0 * brain + (np.indices(brain.shape)[0] == 0), "mask: inverted"),
    "z-scores": (lambda brain: np.where(brain, stripped()[0] / 30 - 2.3, 0),
                 "mask: no mask .*from -.*; give one that is 1"),
    "a scan from 0 to 1": (lambda brain: stripped()[0] / stripped()[0].max(), "mask: no mask .*from 0 to 1.; give one"),
    "a scan from 0 to 0.4": (lambda brain: 0.4 * stripped()[0] / stripped()[0].max(), "mask: no mask .*; give one"),
    "below zero": (lambda brain: -1.0 * brain, "mask: no mask .2 different values from -1 to 0"),
    "a head": (lambda brain: np.where(ndimage.binary_dilation(brain, iterations=5), stripped()[0] + 20, 0),
               r"mask: not a brain \(\d+ different values from 0 to .*\): \d+ ml; is it a head mask, inverted, or a "
               "scan"),
    "a head's mask": (lambda brain: ndimage.binary_dilation(brain, iterations=5),
                      r"mask: not a brain .*is it a head mask"),
    "inverted and turned": (lambda brain: ndimage.rotate(~brain, 20, (0, 2), reshape=False, order=0),
                            r"mask: not a brain .*inverted|mask: inverted"),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_what_is_no_mask_is_refused_with_its_values(tmp_path: Path, kind: str) -> None:
    scan, brain, affine = stripped()
    values, reason = NO_MASKS[kind]
    write_nifti(tmp_path / "m.nii.gz", values(brain), affine)
    with pytest.raises(ScanError, match=reason):
        read_mask(tmp_path / "m.nii.gz", scan, affine)


def test_a_slab_cut_close_around_the_brain_is_not_taken_for_inverted() -> None:
    _, brain, affine = stripped()
    box = brain[tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(brain))]
    for slab in (box, box[15:25], box[:, 20:26]):
        np.testing.assert_array_equal(brain_of(slab.astype(np.float32), affine), slab)


def scored(kind: str) -> np.ndarray:
    """The stripped brain after someone's normalisation."""
    scan, brain, _ = stripped()
    inside = scan[brain]
    low, middle, high = np.percentile(inside, [25, 50, 75])
    return {
        "z-scored inside": np.where(brain, (scan - inside.mean()) / inside.std(), 0),
        "robustly scaled inside": np.where(brain, (scan - middle) / (high - low), 0),
        "z-scored as a whole": (scan - scan.mean()) / scan.std(),
        "background below all": np.where(brain, (scan - inside.mean()) / inside.std(), -7),
        "from -1 to 1": 2 * scan / scan.max() - 1,
        "rounding noise": scan + np.random.default_rng(0).normal(0, 1e-5, scan.shape),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["z-scored inside", "robustly scaled inside", "z-scored as a whole",
                                  "background below all", "from -1 to 1", "rounding noise"])
def test_a_normalised_brain_keeps_all_its_voxels(tmp_path: Path, kind: str) -> None:
    _, brain, affine = stripped()
    write_nifti(tmp_path / "a.nii.gz", scored(kind), affine)
    found = nonzero_mask(*read_nifti(tmp_path / "a.nii.gz"))
    if kind == "robustly scaled inside":  # voxels on the surface that are the median are zero
        assert dice(found, brain) > 0.999
    else:
        np.testing.assert_array_equal(found, brain)


def rung(magnitude: bool, whole: bool) -> np.ndarray:
    """The stripped brain with the outer fifth of its frequencies cut off: it rings in all the field of view."""
    values, mask, _ = template()
    scan = np.where(mask, 100 * values + 10, 0)[::2, ::2, ::2]
    waves = np.fft.fftshift(np.fft.fftn(scan))
    kept = np.zeros(scan.shape, bool)
    kept[tuple(slice(side // 10, side - side // 10) for side in scan.shape)] = True
    back = np.fft.ifftn(np.fft.ifftshift(waves * kept))
    values = np.abs(back) if magnitude else back.real
    return (np.rint(values) if whole else values).astype(np.float32)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_ringing_around_a_stripped_brain_is_no_brain(magnitude: bool, whole: bool) -> None:
    values, mask, affine = template()
    brain = ndimage.binary_fill_holes(mask[::2, ::2, ::2])
    found = nonzero_mask(rung(magnitude, whole), affine @ np.diag([2, 2, 2, 1]))
    assert dice(found, brain) > 0.96
    assert np.count_nonzero(found) == pytest.approx(np.count_nonzero(brain), rel=0.08)


def test_a_dark_rim_is_no_ringing() -> None:
    scan, brain, affine = stripped()
    rim = ndimage.binary_dilation(brain) & ~brain
    np.testing.assert_array_equal(nonzero_mask(np.where(rim, 8, scan), affine), brain | rim)


def test_a_border_of_many_values_is_no_background() -> None:
    scan, brain, affine = stripped()
    noise = np.random.default_rng(0).uniform(0, 40, scan.shape).astype(np.float32)
    with pytest.raises(ScanError, match="zero is not its background: .*; give a mask .mask: given."):
        nonzero_mask(np.where(brain, scan, noise), affine)
