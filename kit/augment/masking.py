"""Mask patches of a regular grid, for a recipe's transform `patches` and for the masked autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def masked_patches(count: int, share: float, stream: np.random.Generator) -> np.ndarray:
    """Return which of `count` patches are masked, (count,) bool: `share` of them, rounded, but never all."""
    masked = np.zeros(count, dtype=bool)
    masked[stream.permutation(count)[:min(round(share * count), count - 1)]] = True
    return masked


def over_voxels(masked: np.ndarray, widths: tuple[int, int, int], shape: Sequence[int]) -> np.ndarray:
    """Expand a patch mask to voxels.

    Args:
        masked: (patches,) along z, then y, then x; the last patch of each axis is cropped to the volume.
        widths: voxels of a patch along (z, y, x).
        shape: voxels (z, y, x).

    Returns:
        (depth, height, width), with the dtype of `masked`.
    """
    masked = masked.reshape([-(-side // width) for side, width in zip(shape, widths, strict=True)])
    for axis, (side, width) in enumerate(zip(shape, widths, strict=True)):
        masked = np.repeat(masked, width, axis=axis).take(range(side), axis=axis)
    return masked
