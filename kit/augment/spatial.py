"""All geometry of a view as one affine map, so that a scan is resampled once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kit.augment.draws import Draw


def view_to_scan(draw: Draw, shape: tuple[int, int, int]) -> np.ndarray:
    """Map from a view's coordinates to the scan's, both running from -1 to 1 over the box (z, y, x).

    The view is made as crop, resize, flip, rotation, zoom; the map goes back that way. Rotation and zoom act in
    voxels about the box's middle, so they stay rigid where the sides differ.

    Args:
        draw: the view's numbers.
        shape: voxels (z, y, x).

    Returns:
        (3, 4) float64.
    """
    half = np.asarray(shape) / 2
    linear = _rotation(draw.rotation_degrees).T / draw.zoom
    linear = linear * half[None, :] / half[:, None]
    linear = np.where(draw.flip, -1.0, 1.0)[:, None] * linear
    size, start = np.asarray(draw.crop_size), np.asarray(draw.crop_start)
    return np.concatenate([size[:, None] * linear, (2 * start + size - 1)[:, None]], axis=1)


def _rotation(degrees: Sequence[float]) -> np.ndarray:
    """Rotation matrix on (z, y, x) vectors: about z, then y, then x."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def resample(images: torch.Tensor, masks: torch.Tensor, maps: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample images linearly and masks by nearest neighbour through one grid; zero outside the scan.

    Args:
        images: (batch, 1, depth, height, width) float.
        masks: (batch, 1, depth, height, width) bool.
        maps: (batch, 3, 4), from `view_to_scan`.

    Returns:
        images and masks, the same shapes and types; images are zero outside the masks.
    """
    order = [2, 1, 0]  # torch's grids count (x, y, z)
    theta = torch.from_numpy(maps[:, order][:, :, [*order, 3]].astype(np.float32)).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(masks.to(torch.float32), grid, mode="nearest", align_corners=False) > 0.5
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False) * moved, moved
