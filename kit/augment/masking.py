"""Masked patches of a regular grid: a recipe's transform `patches`, and what the masked autoencoder must fill in."""

from __future__ import annotations

import numpy as np


def masked_patches(count: int, share: float, stream: np.random.Generator) -> np.ndarray:
    """Which of so many patches are masked: (count,) bool, a share of them to the nearest whole, never all."""
    masked = np.zeros(count, dtype=bool)
    masked[stream.permutation(count)[:min(round(share * count), count - 1)]] = True
    return masked


def over_voxels(masked: np.ndarray, widths: tuple[int, int, int], shape: tuple[int, int, int]) -> np.ndarray:
    """Spread a mask of patches over the voxels.

    Args:
        masked: (patches,) along z, then y, then x, the last of each axis cut off where the side ends.
        widths: voxels of a patch along (z, y, x).
        shape: voxels (z, y, x).

    Returns:
        (depth, height, width) of the mask's type.
    """
    masked = masked.reshape([-(-side // width) for side, width in zip(shape, widths, strict=True)])
    for axis, (side, width) in enumerate(zip(shape, widths, strict=True)):
        masked = np.repeat(masked, width, axis=axis).take(range(side), axis=axis)
    return masked
