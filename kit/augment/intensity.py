"""Changes of the grey levels of one scan, in place, inside its mask; what lies outside stays zero.

Every function takes the image (depth, height, width) float32, which it changes and returns, and `inside`, the mask
as float32. Those whose text says "magnitude" want what `magnitude` makes: no voxel below zero, the darkest at
zero, as a scanner's image has it. The last z-score undoes that shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def extremes(image: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value inside the mask, as tensors without axes."""
    outside = (1 - inside).mul_(1e30)
    return (image + outside).amin(), outside.neg_().add_(image).amax()


def magnitude(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Move the darkest value inside the mask to zero, where the outside is."""
    low, _ = extremes(image, inside)
    return image.sub_(low).mul_(inside)


def shift(image: torch.Tensor, inside: torch.Tensor, amount: float) -> torch.Tensor:
    """Add `amount` inside the mask."""
    return image.add_(inside, alpha=amount)


def scale(image: torch.Tensor, inside: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a magnitude image."""
    return image.mul_(factor)


def gamma(image: torch.Tensor, inside: torch.Tensor, exponent: float, inverted: bool = False) -> torch.Tensor:
    """Raise a magnitude image to a power over its own range, which stays what it was.

    `x -> (x / max) ** exponent * max`, as MONAI's AdjustContrast does; `inverted`: of the negative, as nnU-Net does.
    """
    span = image.amax().clamp(min=1e-7)
    unit = image.div_(span)
    if inverted:
        unit.neg_().add_(1).clamp_(min=0)
    torch.pow(unit, exponent, out=unit)
    if inverted:
        unit.neg_().add_(1).mul_(inside)
    return unit.mul_(span)


def contrast(image: torch.Tensor, inside: torch.Tensor, factor: float) -> torch.Tensor:
    """Stretch about the mean inside the mask, then cut to the range that was there (Isensee et al. 2021)."""
    low, high = extremes(image, inside)
    mean = image.sum() / inside.sum().clamp(min=1)
    image.sub_(mean).mul_(factor).add_(mean)
    return torch.minimum(torch.maximum(image, low, out=image), high, out=image).mul_(inside)


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
    return place.mul_(rise).add_(knots.index_select(0, index).view_as(place)).mul_(span).mul_(inside)


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
    return image.add_(normal(image.shape, seed, image).mul_(inside), alpha=sd)


def rician(image: torch.Tensor, inside: torch.Tensor, sd: float, seed: int) -> torch.Tensor:
    """Noise of a magnitude image: |x + n1 + i n2|, both normal (Gudbjartsson and Patz 1995, eq. 1)."""
    image.add_(normal(image.shape, seed, image), alpha=sd)
    return torch.hypot(image, normal(image.shape, seed + 1, image).mul_(sd), out=image).mul_(inside)


def z_score(image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 inside the mask, zero outside; a constant image becomes zero."""
    count = inside.sum().clamp(min=1)
    mean = torch.dot(image.view(-1), inside.view(-1)) / count
    image.sub_(mean).mul_(inside)
    sd = (torch.dot(image.view(-1), image.view(-1)) / count).sqrt()
    return image.mul_(torch.where(sd > 1e-6 * mean.abs().clamp(min=1), 1 / sd, 0))


def normal(shape: Sequence[int], seed: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers from a generator of the device, keyed by the seed alone."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=like.device, dtype=torch.float32)
