"""Change the grey levels of one scan's brain, in place.

Functions that take `values`, the brain's voxels (voxels,) float32 or float64, modify and return them. If positions
matter, `indices` (voxels,) int64 gives them in the flattened volume of `shape`. Functions on "magnitude" values expect
the darkest value at zero, as in a scanner's image; the final z-score removes that shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def magnitude(values: torch.Tensor) -> torch.Tensor:
    """Shift the darkest value to zero."""
    return values.sub_(values.amin())


def gamma(values: torch.Tensor, exponent: float, inverted: bool = False) -> torch.Tensor:
    """Raise magnitude values to a power, relative to their own range, which is preserved.

    `x -> (x / max) ** exponent * max`, as in MONAI's AdjustContrast; `inverted`: of the negative, as in nnU-Net.
    """
    span = values.amax().clamp(min=1e-7)
    unit = values.div_(span)
    if inverted:
        unit.neg_().add_(1)
    unit.clamp_(min=1e-30).log2_().mul_(exponent).exp2_()  # takes half the time of `pow`, and is as exact
    if inverted:
        unit.neg_().add_(1)
    return unit.mul_(span)


def contrast(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Stretch magnitude values about their mean, then clip to their original range."""
    high, mean = values.amax(), values.mean()
    values.sub_(mean).mul_(factor).add_(mean).clamp_(min=0)
    return torch.minimum(values, high, out=values)


def histogram(values: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """Remap magnitude values by the piecewise-linear curve through `levels`, at equal steps of their range.

    Args:
        levels: increasing, from 0 to 1; equal steps change nothing.
    """
    span = values.amax().clamp(min=1e-7)
    steps = len(levels) - 1
    knots = torch.tensor(levels, dtype=values.dtype, device=values.device)
    place = values.mul_(steps / span)
    index = place.to(torch.int32).clamp_(0, steps - 1)
    place -= index
    return place.mul_(knots.diff().index_select(0, index)).add_(knots.index_select(0, index)).mul_(span)


def bias_field(values: torch.Tensor, indices: torch.Tensor, shape: Sequence[int], sd: float, seed: int,
               points: Sequence[int]) -> torch.Tensor:
    """Multiply magnitude values by a bias field, like the sensitivity of a receive coil.

    Args:
        sd: standard deviation of the log field at its control points, between which it is interpolated linearly.
        seed: seed of the field.
        points: number of control points along (z, y, x); the outer ones are at the centres of the outer voxels.
    """
    along_z, along_y, along_x = (torch.from_numpy(between_points(*counts)).to(values)
                                 for counts in zip(shape, points, strict=True))
    drawn = bias_control_points(points, sd, seed).to(values)
    field = along_y @ torch.tensordot(along_z, drawn, 1) @ along_x.T
    return values.mul_(field.view(-1).index_select(0, indices).exp_())


def bias_control_points(points: Sequence[int], sd: float, seed: int) -> torch.Tensor:
    """Return the log field at its control points, (points z, y, x) float32 on the CPU: the same on every device."""
    return normal(points, seed, torch.empty(0)).mul_(sd)


def between_points(side: int, points: int) -> np.ndarray:
    """Return the (side, points) matrix that interpolates linearly between equally spaced control points."""
    at = np.linspace(0, points - 1, side)
    return np.clip(1 - np.abs(at[:, None] - np.arange(points)), 0, None)


def noise(values: torch.Tensor, indices: torch.Tensor, shape: Sequence[int], sd: float, seed: int) -> torch.Tensor:
    """Add Gaussian noise of standard deviation `sd`; a voxel's noise does not depend on the mask."""
    return values.add_(normal(shape, seed, values).view(-1).index_select(0, indices), alpha=sd)


def rician(values: torch.Tensor, indices: torch.Tensor, shape: Sequence[int], sd: float, seed: int) -> torch.Tensor:
    """Apply the noise of a magnitude image: |x + n1 + i n2|, both normal (Gudbjartsson and Patz 1995, eq. 1)."""
    noise(values, indices, shape, sd, seed)
    return torch.hypot(values, noise(torch.zeros_like(values), indices, shape, sd, seed + 1), out=values)


def z_score(values: torch.Tensor) -> torch.Tensor:
    """Scale to mean 0 and standard deviation 1; constant values become zero."""
    mean = values.mean()
    values.sub_(mean)
    sd = (torch.dot(values, values) / len(values)).sqrt()
    return values.mul_(torch.where(sd > 1e-6 * mean.abs().clamp(min=1), 1 / sd, 0))


def normal(shape: Sequence[int], seed: int, like: torch.Tensor) -> torch.Tensor:
    """Return float32 standard normal numbers from a generator on the device, keyed by the seed alone."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=like.device, dtype=torch.float32)
