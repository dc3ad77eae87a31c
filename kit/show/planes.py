"""Cut volumes into pictures the right way up: the only module that defines how slices are oriented.

Neurological convention: the participant's left is on the picture's left. Points are (x, y, z) MNI mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from kit.store.grid import Grid

Point = tuple[float, float, float]
FULL_COLOUR = 0.4  # a difference of two views of this share of the original's grey range is drawn in full colour
PLANES = {"axial": "z", "coronal": "y", "sagittal": "x"}  # plane: axis across it, in the arrays' order
EDGES = {"axial": "LRA", "coronal": "LRS", "sagittal": "PAS"}  # letters at the left, right and top


@dataclass(frozen=True)
class Pair:
    """Two views of one scan, for the explorer and sheets of views; volumes (depth, height, width)."""

    original: np.ndarray
    view_1: np.ndarray
    view_2: np.ndarray
    drawn: str = ""  # the random draws in words
    seconds: float = float("nan")  # time to make both views


def cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Cut a slice out of a (depth, height, width) volume: rows from the picture's top, columns from its left.

    axial: anterior up, left to right; coronal: superior up, left to right; sagittal: superior up, posterior
    to anterior. `index` counts along z, y or x.
    """
    return np.take(volume, index, axis=list(PLANES).index(plane))[::-1]


def voxel_at(grid: Grid, position: Point | None = None) -> tuple[int, int, int]:
    """Return the (z, y, x) index of the voxel nearest to a point, or of the grid's middle if None.

    A point outside the grid gives the nearest voxel inside it.
    """
    if position is None:
        z, y, x = (side // 2 for side in grid.shape)
        return z, y, x
    nearest = np.rint((np.asarray(position) - grid.origin_mm) / grid.spacing_mm).astype(int)[::-1]
    z, y, x = (int(at) for at in np.clip(nearest, 0, np.array(grid.shape) - 1))
    return z, y, x


def focus(volume: np.ndarray, grid: Grid) -> Point:
    """Return the point (x, y, z) in MNI mm to cut through: where a map or mask, smoothed by 8 mm FWHM, is largest.

    Args:
        volume: (depth, height, width) on the grid, not smoothed yet; signs are ignored.
    """
    return strongest(ndimage.gaussian_filter(np.abs(volume).astype(np.float32), 8 / 2.355 / grid.spacing_mm), grid)


def strongest(volume: np.ndarray, grid: Grid) -> Point:
    """Return the point (x, y, z) in MNI mm of the largest absolute value; volume (depth, height, width)."""
    z, y, x = np.unravel_index(np.abs(volume).argmax(), volume.shape)
    right, front, up = (float(at) for at in grid.affine[:3] @ (x, y, z, 1))
    return right, front, up


def slice_name(grid: Grid, plane: str, index: int) -> str:
    """Name a slice for its title: "axial, z = 8.5 mm"."""
    return f"{plane}, {PLANES[plane]} = {slice_mm(grid, plane, index):g} mm"


def slice_mm(grid: Grid, plane: str, index: int) -> float:
    """Return a slice's MNI coordinate in mm: z for axial, y for coronal, x for sagittal."""
    return grid.origin_mm["xyz".index(PLANES[plane])] + index * grid.spacing_mm


def window(volume: np.ndarray) -> tuple[float, float]:
    """Return the intensities to draw black and white: percentiles 0.5 and 99.5 of the voxels that are not 0.

    Large volumes are subsampled to 100,000 to 200,000 evenly spaced voxels. Returns (0, 1) for an empty volume.
    """
    sample = volume.ravel()[:: max(1, volume.size // 100_000)]
    sample = sample[sample != 0].astype(np.float32)
    if not sample.size:
        return 0.0, 1.0
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def grey(picture: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Scale a picture to 0-1 float32 between two limits; exact zeros, which lie outside the mask, become black.

    After z-scoring, 0 is mid-grey, so the background would otherwise be grey. The darkest tissue is drawn slightly
    above black to keep the brain's edge visible.
    """
    low, high = limits
    shown = 0.06 + 0.94 * np.clip((picture.astype(np.float32) - low) / (high - low), 0, 1)
    return np.where(picture == 0, np.float32(0), shown)


def footer(note: str) -> str:
    """Return the small print under pictures of slices: the note, and which side is left."""
    return " · ".join(filter(None, (note, "neurological view: left is on the left")))
