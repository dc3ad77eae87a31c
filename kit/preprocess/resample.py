"""Resample and smooth arrays, and wrap arrays as SimpleITK images.

SimpleITK works in whatever millimetres its images are given. Images here are built from arrays and their RAS+
affine, so points, transforms and matrices are RAS+ (x, y, z) throughout and LPS never appears. SimpleITK must not
write any of these images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import SimpleITK as sitk
from scipy import ndimage


def resample(array: np.ndarray, affine: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int],
             to_affine: np.ndarray) -> np.ndarray:
    """Resample an array once, linearly, through a transform onto another grid.

    If the new grid is coarser, the array is smoothed first to avoid aliasing: a Gaussian with a full width at half
    maximum of sqrt(new^2 - old^2) mm along each of the array's axes, where new is the smallest new voxel size.

    Args:
        array: (z, y, x) numbers; `affine` takes its voxel (x, y, z) to its millimetres.
        matrix: (4, 4), the new grid's millimetres to the array's.
        shape: the new grid's voxels (z, y, x); `to_affine` takes one (x, y, z) to its millimetres.

    Returns:
        Float32 (z, y, x), zero outside the array.
    """
    old, new = (np.linalg.norm(each[:3, :3], axis=0) for each in (affine, to_affine))
    sigma = np.sqrt(np.maximum(new.min() ** 2 - old**2, 0)) / np.sqrt(8 * np.log(2)) / old
    smooth = np.asarray(array, np.float32)
    if sigma.any():
        smooth = ndimage.gaussian_filter(smooth, sigma[::-1], mode="nearest", truncate=3)
    moved = sitk.Resample(
        to_image(smooth, affine), [int(side) for side in shape[::-1]], to_transform(matrix), sitk.sitkLinear,
        to_affine[:3, 3].tolist(), new.tolist(), (to_affine[:3, :3] / new).ravel().tolist())
    return sitk.GetArrayFromImage(moved)


def to_transform(matrix: np.ndarray) -> sitk.AffineTransform:
    return sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())


def to_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """Return a (z, y, x) array as a SimpleITK image whose points are the affine's RAS+ millimetres."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


@contextmanager
def one_thread() -> Iterator[None]:
    """Restrict SimpleITK to one thread: with more, the order of summation changes from run to run."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def smoothed_inside(values: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth by a Gaussian over a mask's voxels alone: float32, zero outside; a uniform array stays as it is.

    Args:
        values, mask: (depth, height, width); what lies outside the mask does not count.
        sigma: standard deviation, voxels.
    """
    total, weight = (ndimage.gaussian_filter(each.astype(np.float32), sigma)
                     for each in (np.where(mask, values, 0), mask))
    return np.where(mask, total / np.maximum(weight, 1e-6), 0).astype(np.float32)
