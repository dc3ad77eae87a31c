"""Correct the bias field, and bring all scans to one intensity scale."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from kit.preprocess.nifti import ScanError
from kit.preprocess.resample import one_thread, to_image

# N4 runs on voxels of about this size: bias fields are smooth, and halving the size costs eight times as much.
N4_MM = 4.0
N4_ITERATIONS = [50, 50, 50, 50]  # maximum at each of four levels of ever finer splines; N4's own default
# N4 takes logarithms, and white-matter scaling keeps zero where it is. Ringing of cubic splines puts at most 1.1 % of a
# brain below zero (20 stripped scans, 13 heads); z-scoring inside the brain puts 45 % or more there (8 scans), over a
# whole head 1.9 to 4.7 % (13).
MOST_NEGATIVE = 0.015


def correct_bias(array: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Divide a scan by its bias field, estimated by N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    It runs on one thread, so the same scan gives the same bits. Returns float32 (z, y, x).

    Args:
        array: (z, y, x) intensities.
        affine: (4, 4), voxel (x, y, z) to the scan's millimetres, RAS+.
        mask: (z, y, x) bool, the brain, where the field is estimated.

    Raises:
        ScanError: more than `MOST_NEGATIVE` of the brain is below zero, or N4 did not find a field.
    """
    if not mask.any():
        raise ScanError("N4 found no bias field: the mask is empty")
    check_positive(array[mask], "N4", "bias_correction: none")
    positive = np.maximum(array, 0)  # N4 takes its logarithm
    with one_thread():
        image = to_image(positive, affine)
        where = to_image(mask.astype(np.uint8), affine)
        shrink = [max(1, round(N4_MM / size)) for size in image.GetSpacing()]
        filter_ = sitk.N4BiasFieldCorrectionImageFilter()
        filter_.SetMaximumNumberOfIterations(N4_ITERATIONS)
        try:
            filter_.Execute(sitk.Shrink(image, shrink), sitk.Shrink(where, shrink))
            field = sitk.GetArrayFromImage(filter_.GetLogBiasFieldAsImage(image))
        except RuntimeError as error:  # SimpleITK's message is a page of C++
            raise ScanError("N4 found no bias field: is there an image in the mask?") from error
    corrected = (array / np.exp(field)).astype(np.float32)
    if not np.isfinite(corrected).all():
        raise ScanError("N4 found a bias field that is not finite")
    return corrected


def check_positive(inside: np.ndarray, step: str, otherwise: str) -> None:
    """Refuse a scan whose zero was shifted, such as a z-scored one.

    Args:
        inside: (voxels,) intensities of the brain, not resampled: smoothing hides negative ones.
        step: what needs intensities above zero.
        otherwise: the setting that works without it.

    Raises:
        ScanError: more than `MOST_NEGATIVE` of the intensities are below zero.
    """
    if (negative := np.mean(inside < 0)) > MOST_NEGATIVE:
        raise ScanError(f"{step} needs intensities above zero, found {negative:.0%} of the brain below: was the scan "
                        f"z-scored? Give it as it was before, or set {otherwise}")


def z_score(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image (z, y, x) with mean 0 and standard deviation 1 inside the mask and 0 outside, float32.

    Raises:
        ScanError: the mask is empty, or the image is constant inside it.
    """
    inside = _inside(image, mask)
    scored = np.zeros(image.shape, np.float32)
    scored[mask] = (inside - inside.mean()) / inside.std()
    return scored


def by_white_matter(image: np.ndarray, mask: np.ndarray, white_matter: np.ndarray) -> np.ndarray:
    """Return an image (z, y, x) divided by its white-matter peak, 0 outside the mask, float32.

    The peak is the mode of the smoothed histogram of brain voxels where the template is white matter (of all brain
    voxels if those are fewer than 100). Lesions, and grey matter that imperfect registration puts there, do not move
    the peak. The image must not have been z-scored; see `check_positive`.

    Raises:
        ScanError: the mask is empty, the image is constant inside it, or the peak is not above zero.
    """
    inside = _inside(image, mask)
    values = image[mask & white_matter]
    values = values if len(values) >= 100 else inside
    counts, edges = np.histogram(values, bins=256, range=tuple(np.percentile(values, [0.5, 99.5])))
    peak = edges[:-1][np.argmax(ndimage.gaussian_filter1d(counts.astype(float), 6))] + (edges[1] - edges[0]) / 2
    if not peak > 0:
        raise ScanError(f"no white-matter peak above zero (found {peak:g}); use intensity zscore")
    return np.where(mask, image / peak, 0).astype(np.float32)


def _inside(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        raise ScanError("no brain inside the grid: check the registration and the mask")
    inside = image[mask].astype(np.float64)
    if inside.std() <= 1e-6 * np.abs(inside).max():
        raise ScanError("constant inside the brain mask: scan and mask do not overlap on the grid")
    return inside
