"""Cut volumes into pictures the right way up: the one place that knows how slices lie on the page.

Neurological convention: the participant's left is on the picture's left. Points are (x, y, z) MNI mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from kit.store.grid import Grid

Point = tuple[float, float, float]
PLANES = {"axial": "z", "coronal": "y", "sagittal": "x"}  # each with the axis across it, in the arrays' order
EDGES = {"axial": "LRA", "coronal": "LRS", "sagittal": "PAS"}  # what lies left, right and at the top


@dataclass(frozen=True)
class Pair:
    """Two views of one scan, as explorer and sheet of views show them; volumes (depth, height, width)."""

    original: np.ndarray
    view_1: np.ndarray
    view_2: np.ndarray
    drawn: str = ""  # in words, what the random draws were
    seconds: float = float("nan")  # what making both views took


def cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Cut a slice out of a (depth, height, width) volume: rows from the picture's top, columns from its left.

    axial: anterior up, left to right; coronal: superior up, left to right; sagittal: superior up, posterior
    to anterior. `index` counts along z, y or x.
    """
    return np.take(volume, index, axis=list(PLANES).index(plane))[::-1]


def voxel_at(grid: Grid, position: Point | None = None) -> tuple[int, int, int]:
    """Return the (z, y, x) index of the voxel nearest to a point; of the grid's middle without one.

    A point outside the grid gives the nearest voxel inside it.
    """
    if position is None:
        return tuple(side // 2 for side in grid.shape)
    nearest = np.rint((np.asarray(position) - grid.origin_mm) / grid.spacing_mm).astype(int)[::-1]
    return tuple(int(at) for at in np.clip(nearest, 0, np.array(grid.shape) - 1))


def focus(volume: np.ndarray, grid: Grid) -> Point:
    """Return the point (x, y, z) in MNI mm to cut through: where a map or a mask, smoothed by 8 mm, is largest.

    Args:
        volume: (depth, height, width) on the grid; signs don't count.
    """
    smooth = ndimage.gaussian_filter(np.abs(volume).astype(np.float32), 8 / 2.355 / grid.spacing_mm)
    z, y, x = np.unravel_index(smooth.argmax(), smooth.shape)
    return tuple(float(at) for at in grid.affine[:3] @ (x, y, z, 1))


def slice_name(grid: Grid, plane: str, index: int) -> str:
    """Name a slice for its title: "axial, z = 8.5 mm"."""
    return f"{plane}, {PLANES[plane]} = {slice_mm(grid, plane, index):g} mm"


def slice_mm(grid: Grid, plane: str, index: int) -> float:
    """Return the MNI millimetres of a slice: z for axial, y for coronal, x for sagittal."""
    return grid.origin_mm["xyz".index(PLANES[plane])] + index * grid.spacing_mm


def window(volume: np.ndarray) -> tuple[float, float]:
    """Return the intensities to draw black and white: percentiles 0.5 and 99.5 of the voxels that are not 0.

    From at most about 100,000 voxels, evenly spread. (0, 1) for an empty volume.
    """
    sample = volume.ravel()[:: max(1, volume.size // 100_000)]
    sample = sample[sample != 0].astype(np.float32)
    if not sample.size:
        return 0.0, 1.0
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def grey(picture: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Scale a picture to 0-1 float32 between two limits; exact zeros, outside the mask, become black.

    After z-scoring 0 is a mid-grey: the air around the brain would be grey too. The darkest tissue is drawn a
    little above black, so that the brain's edge stays visible.
    """
    low, high = limits
    shown = 0.06 + 0.94 * np.clip((picture.astype(np.float32) - low) / (high - low), 0, 1)
    return np.where(picture == 0, np.float32(0), shown)


def footer(note: str) -> str:
    """Return the small print of every picture of slices: the note, and which side is left."""
    return " · ".join(filter(None, (note, "neurological view: left is on the left")))
