"""Intensity transforms on a batch, each inside the mask; what lies outside stays zero.

Per-sample strengths come as (batch,) tensors; the value that changes nothing leaves the sample as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1, 1)


def shift(images: torch.Tensor, masks: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Add `amount` inside the mask. `images` (batch, 1, depth, height, width) float, `amount` (batch,)."""
    return images + _column(amount) * masks


def gamma(images: torch.Tensor, masks: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Raise to a power over each image's own range inside the mask, which stays what it was.

    `x -> ((x - min) / (max - min)) ** exponent * (max - min) + min`, as MONAI's AdjustContrast does.
    """
    low = images.masked_fill(~masks, math.inf).amin((1, 2, 3, 4), keepdim=True)
    span = images.masked_fill(~masks, -math.inf).amax((1, 2, 3, 4), keepdim=True) - low
    unit = ((images - low) / span.clamp(min=1e-7)).clamp(0, 1)
    changed = torch.where(masks, unit.pow(_column(exponent)) * span + low, images)
    return torch.where(_column(exponent == 1), images, changed)


def bias_field(images: torch.Tensor, masks: torch.Tensor, sd: torch.Tensor, seeds: Sequence[int],
               spacing_voxels: float) -> torch.Tensor:
    """Multiply by exp(smooth field), as the sensitivity of a receive coil does.

    The image is z-scored, so the field acts on it after its darkest value is moved to zero.

    Args:
        images, masks: (batch, 1, depth, height, width).
        sd: (batch,) standard deviation of the log field at its control points.
        seeds: one a sample.
        spacing_voxels: between control points; between them the field is interpolated linearly.
    """
    coarse = [max(2, math.ceil(side / spacing_voxels) + 1) for side in images.shape[2:]]
    points = torch.cat([_normal((1, 1, *coarse), seed, images) for seed in seeds])
    log_field = F.interpolate(points * _column(sd), size=images.shape[2:], mode="trilinear", align_corners=True)
    low = images.masked_fill(~masks, math.inf).amin((1, 2, 3, 4), keepdim=True)
    return torch.where(masks & _column(sd > 0), (images - low) * log_field.exp() + low, images)


def noise(images: torch.Tensor, masks: torch.Tensor, sd: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Add Gaussian noise of standard deviation `sd` (batch,) inside the mask, one seed a sample."""
    drawn = torch.cat([_normal((1, *images.shape[1:]), seed + 1, images) for seed in seeds])
    return images + drawn * _column(sd) * masks


def z_score(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 inside each mask, zero outside; a constant image becomes zero."""
    count = masks.sum((1, 2, 3, 4), keepdim=True).clamp(min=1)
    inside = images * masks
    mean = inside.sum((1, 2, 3, 4), keepdim=True) / count
    centred = (inside - mean) * masks
    sd = (centred.square().sum((1, 2, 3, 4), keepdim=True) / count).sqrt()
    return torch.where(sd > 1e-6, centred / sd.clamp(min=1e-6), torch.zeros_like(centred))


def _normal(shape: tuple[int, ...], seed: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)
