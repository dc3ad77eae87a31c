"""Changes of the grey levels of one scan, in place, inside its mask; what lies outside stays zero.

Every function takes the image (depth, height, width) float32, which it changes and returns; `inside` is its mask as
zeros and ones of type int8 (`mask.view(torch.int8)`, which multiplies faster than bool). Those whose text says
"magnitude" want what `magnitude` makes: no voxel below zero, the darkest at zero, as a scanner's image has it. The
last z-score undoes that shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def magnitude(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Move the darkest value inside the mask to zero, where the outside is."""
    low = image.amin()
    if low >= 0:  # of the outside
        low = image.masked_fill(inside == 0, 1e30).amin()  # finite: an empty mask must not give nan
    return keep(image.sub_(low), inside)


def gamma(image: torch.Tensor, inside: torch.Tensor, exponent: float, inverted: bool = False) -> torch.Tensor:
    """Raise a magnitude image to a power over its own range, which stays what it was.

    `x -> (x / max) ** exponent * max`, as MONAI's AdjustContrast does; `inverted`: of the negative, as nnU-Net does.
    """
    span = image.amax().clamp(min=1e-7)
    unit = image.div_(span)
    if inverted:
        unit.neg_().add_(1)
    unit.clamp_(min=1e-30).log2_().mul_(exponent).exp2_()  # half the time of `pow`, and as exact
    if inverted:
        keep(unit.neg_().add_(1), inside)
    return unit.mul_(span)


def contrast(image: torch.Tensor, inside: torch.Tensor, factor: float) -> torch.Tensor:
    """Stretch a magnitude image about the mean inside the mask, then cut to the range that was there."""
    high, mean = image.amax(), image.sum() / count(inside)
    image.sub_(mean).mul_(factor).add_(mean).clamp_(min=0)
    return keep(torch.minimum(image, high, out=image), inside)


def histogram(image: torch.Tensor, inside: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """Bend a magnitude image's grey levels: the broken line through `levels` at equal steps of its range.

    Args:
        levels: rising, from 0 to 1; equal steps change nothing.
    """
    span = image.amax().clamp(min=1e-7)
    steps = len(levels) - 1
    knots = torch.tensor(levels, dtype=torch.float32, device=image.device)
    place = image.mul_(steps / span)
    index = place.to(torch.int32).clamp_(0, steps - 1)
    place -= index
    index = index.view(-1)
    rise = knots.diff().index_select(0, index).view_as(place)
    return keep(place.mul_(rise).add_(knots.index_select(0, index).view_as(place)).mul_(span), inside)


def bias_field(image: torch.Tensor, inside: torch.Tensor, sd: float, seed: int, points: Sequence[int]) -> torch.Tensor:
    """Multiply a magnitude image by exp(smooth field), as the sensitivity of a receive coil does.

    Args:
        sd: standard deviation of the log field at its control points; between them it is interpolated linearly.
        seed: of the field.
        points: how many control points along (z, y, x).
    """
    drawn = normal((1, 1, *points), seed, image).mul_(sd)
    log_field = F.interpolate(drawn, size=image.shape, mode="trilinear", align_corners=True)[0, 0]
    return image.mul_(log_field.exp_())


def noise(image: torch.Tensor, inside: torch.Tensor, sd: float, seed: int) -> torch.Tensor:
    """Add Gaussian noise of standard deviation `sd` inside the mask."""
    return image.add_(keep(normal(image.shape, seed, image), inside), alpha=sd)


def rician(image: torch.Tensor, inside: torch.Tensor, sd: float, seed: int) -> torch.Tensor:
    """Noise of a magnitude image: |x + n1 + i n2|, both normal (Gudbjartsson and Patz 1995, eq. 1)."""
    image.add_(normal(image.shape, seed, image), alpha=sd)
    return keep(torch.hypot(image, normal(image.shape, seed + 1, image).mul_(sd), out=image), inside)


def z_score(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 inside the mask; the image is zero outside, and a constant one becomes zero."""
    voxels = count(inside)
    mean = image.sum() / voxels
    keep(image.sub_(mean), inside)
    flat = image.view(-1)
    sd = (torch.dot(flat, flat) / voxels).sqrt()
    return image.mul_(torch.where(sd > 1e-6 * mean.abs().clamp(min=1), 1 / sd, 0))


def mean_and_sd(image: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation inside the mask, tensors without axes; the image stays as it is."""
    voxels = count(inside)
    mean = image.sum() / voxels
    return mean, ((image - mean) * inside).square().sum().div(voxels).sqrt()


def keep(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Set what lies outside the mask to zero, in place; a few slices at a time, which a CPU's cache holds."""
    for part, here in zip(image.split(8), inside.split(8), strict=True):
        part.mul_(here)
    return image


def count(inside: torch.Tensor) -> torch.Tensor:
    """Voxels inside the mask, at least 1, as a tensor without axes."""
    return torch.count_nonzero(inside).clamp(min=1)


def normal(shape: Sequence[int], seed: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers from a generator of the device, keyed by the seed alone."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=like.device, dtype=torch.float32)
