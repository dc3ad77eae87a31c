"""Make the views of a whole batch at once, on a GPU: the number of launches does not grow with the batch.

`kit.augment.views` uses this off the CPU; `kit.augment.contrast`, `spatial` and `physics` state what each step does,
and make the same views one scan at a time, in a brain's voxels only, which suits a CPU's cache. Here every step acts on
the box, (batch, depth, height, width), zero outside the masks, and a view without a transform gets its neutral value.

Noise differs: a CPU draws it with torch's generator, and this with Philox (`normal`). So may voxels that fall exactly
between two of the scan's, as coordinates are rounded differently. A view does not depend on the rest of the batch, but
for rounding: the order of a sum depends on the batch's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kit.augment import physics
from kit.augment.contrast import between_points, bias_control_points
from kit.augment.draws import Draw, detail, histogram_levels
from kit.augment.masking import masked_patches
from kit.augment.recipe import Recipe
from kit.augment.spatial import LARGEST, bend, cropped_box, spline, view_to_scan
from kit.device import upload

SPATIAL = (1, 2, 3)  # the dimensions of a volume
PHILOX = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))  # multipliers, key increments (Salmon et al. 2011)
LOW = 0xFFFFFFFF  # the low 32 bits


def geometry(images: torch.Tensor, masks: torch.Tensor, draws: Sequence[Draw], recipe: Recipe,
             spacing_mm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample scans and masks through each view's map, as `kit.augment.spatial.warp` does.

    Args:
        images: (batch, depth, height, width) of any floating type.
        masks: (batch, depth, height, width) bool.

    Returns:
        values (batch, depth, height, width) float32 (float64 if the scans are), zero outside the mask; the masks.
    """
    shape = tuple(images.shape[1:])
    kind = torch.promote_types(images.dtype, torch.float32)
    boxes = [cropped_box(drawn, shape) if any(drawn.rotation_degrees)
             and recipe.setting("rotate", "padding") == "border" else None for drawn in draws]
    apart_mm = recipe.setting("elastic", "apart_mm")
    grid = _grid([view_to_scan(drawn, shape, spacing_mm) for drawn in draws], shape, kind, images.device,
                 bent=[bend(drawn, shape, spacing_mm, apart_mm) for drawn in draws], apart=apart_mm / spacing_mm,
                 boxes=boxes)
    inside = _sample(masks.to(kind), grid, "nearest") > 0.5
    return _sample(images.to(kind), grid, "bilinear").clamp_(-LARGEST, LARGEST).mul_(inside), inside


def fill(values: torch.Tensor, inside: torch.Tensor, draws: Sequence[Draw], recipe: Recipe, spacing_mm: float,
         zscored: bool) -> torch.Tensor:
    """Apply everything after the geometry.

    Args:
        values, inside: from `geometry`.

    Returns:
        the views, (batch, depth, height, width), zero outside the masks.
    """
    count = inside.sum(SPATIAL, keepdim=True).clamp_(min=1)
    if not zscored:
        mean = values.sum(SPATIAL, keepdim=True) / count
        sd = (values.sub(mean).mul_(inside).square_().sum(SPATIAL, keepdim=True) / count).sqrt_()
        values = _z_score(values, inside, count)
    lowest = values.masked_fill(~inside, math.inf).amin(SPATIAL, keepdim=True)
    values = values.sub(lowest.masked_fill(lowest == math.inf, 0)).mul_(inside)  # magnitude: darkest at zero
    values = _contrast(values, inside, count, draws, recipe, spacing_mm)
    values = _acquisition(values, draws, recipe, spacing_mm).mul_(inside)
    values = _noise(values, inside, draws)
    values = _occlusion(_z_score(values, inside, count), draws, recipe, spacing_mm)
    return values if zscored else values.mul_(sd).add_(mean).mul_(inside)


def normal(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return standard normal numbers, (batch, *shape) float32: Philox4x32-10 and Box-Muller, one seed per scan.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". torch's own generator would need a call
    for each seed.
    """
    count = math.prod(shape)
    bits = philox(-(-count // 4), seeds, device)
    first, second = (bits.float().add_(0.5).mul_(2.0**-32) for bits in (torch.stack(bits[:2]), torch.stack(bits[2:])))
    radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
    drawn = torch.cat([radius * angle.cos(), radius * angle.sin()])  # (4, batch, blocks)
    return drawn.movedim(0, -1).reshape(len(seeds), -1)[:, :count].reshape(len(seeds), *shape)


def philox(blocks: int, seeds: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Return four random 32-bit words for each of the counters 0 to `blocks` - 1, each (batch, blocks) int64."""
    counter = torch.arange(blocks, device=device)[None]
    words = [counter, *[counter.new_zeros(1, 1)] * 3]  # the rounds broadcast them
    keys = [upload(np.array([[seed >> shift & LOW] for seed in seeds], np.int64), device) for shift in (0, 32)]
    for _ in range(10):
        # a product's low 64 bits suffice: both factors have 32
        products = [word * factor for word, factor in zip(words[::2], PHILOX[0], strict=True)]
        high, low = [product >> 32 & LOW for product in products], [product & LOW for product in products]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [key + step & LOW for key, step in zip(keys, PHILOX[1], strict=True)]
    return words


def _each(draws: Sequence[Draw], name: str, like: torch.Tensor) -> torch.Tensor:
    """Return a field of every draw, (batch, 1, 1, 1)."""
    return upload(np.array([getattr(drawn, name) for drawn in draws], float), like.device, like.dtype).view(-1, 1, 1, 1)


def _any(draws: Sequence[Draw], name: str) -> bool:
    return any(getattr(drawn, name) != getattr(Draw, name) for drawn in draws)


def _grid(maps: Sequence[np.ndarray], shape: tuple[int, ...], kind: torch.dtype, device: torch.device,
          bent: Sequence[np.ndarray | None] = (), apart: float = 1.0,
          boxes: Sequence[np.ndarray | None] = ()) -> torch.Tensor:
    """Locate the views' voxels in the scans: (batch, depth, height, width, 3), from -1 to 1, (x, y, z) last.

    `bent` (displacements), `apart` and `boxes` are in voxels (z, y, x), as `bend` and `cropped_box` return them.
    """
    back, side = np.stack(maps)[:, ::-1], np.asarray(shape, float)  # (batch, 3 of x y z, 4 of z y x 1)
    axes = [upload(back[:, None, :, axis] * ((2 * np.arange(count) + 1) / count - 1)[None, :, None]
                   + (back[:, None, :, 3] if axis == 0 else 0), device, kind) for axis, count in enumerate(shape)]
    grid = axes[0][:, :, None, None] + axes[1][:, None, :, None] + axes[2][:, None, None]
    if any(points is not None for points in bent):
        like = next(points for points in bent if points is not None)
        points = np.stack([np.zeros_like(like) if one is None else one for one in bent])
        points *= (2 / side)[:, None, None, None]
        splines = [upload(spline(count, apart), device, kind) for count in shape]
        moved = upload(np.einsum("bcd,bdkij->bkijc", back[..., :3], points), device, kind)
        moved = torch.einsum("zk,bkijc->bzijc", splines[0], moved)
        moved = torch.einsum("yi,bzijc->bzyjc", splines[1], moved)
        grid += torch.einsum("xj,bzyjc->bzyxc", splines[2], moved)
    if any(box is not None for box in boxes):
        open_ends = np.array([[-np.inf] * 3, [np.inf] * 3])
        ends = np.stack([open_ends if box is None else (2 * box + 1) / side - 1 for box in boxes])
        low, high = upload(ends[:, :, ::-1], device, kind).unbind(1)
        grid = torch.clamp(grid, low[:, None, None, None], high[:, None, None, None])
    return grid


def _sample(volumes: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """Interpolate (batch, depth, height, width) at a grid's points; zero outside the scan."""
    return F.grid_sample(volumes[:, None], grid, mode=mode, padding_mode="zeros", align_corners=False)[:, 0]


def _z_score(values: torch.Tensor, inside: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """As `kit.augment.contrast.z_score`."""
    mean = values.sum(SPATIAL, keepdim=True) / count
    values = values.sub(mean).mul_(inside)
    sd = (values.square().sum(SPATIAL, keepdim=True) / count).sqrt_()
    return values.mul_(torch.where(sd > 1e-6 * mean.abs().clamp(min=1), 1 / sd, 0))


def _contrast(values: torch.Tensor, inside: torch.Tensor, count: torch.Tensor, draws: Sequence[Draw], recipe: Recipe,
              spacing_mm: float) -> torch.Tensor:
    """What tissue and coil do to magnitude values, as in `kit.augment.contrast`; zero stays zero outside the masks."""
    if _any(draws, "scale"):
        values = values * _each(draws, "scale", values)
    for name, turned in (("gamma", False), ("gamma_inverted", True)):
        if _any(draws, name):
            span = values.amax(SPATIAL, keepdim=True).clamp_(min=1e-7)
            unit = 1 - values / span if turned else values / span
            unit = unit.clamp_(min=1e-30).log2_().mul_(_each(draws, name, values)).exp2_()
            values = (1 - unit if turned else unit).mul_(span).mul_(inside)
    if _any(draws, "contrast"):
        high, mean = values.amax(SPATIAL, keepdim=True), values.sum(SPATIAL, keepdim=True) / count
        stretched = values.sub(mean).mul_(_each(draws, "contrast", values)).add_(mean).clamp_(min=0)
        values = torch.minimum(stretched, high).mul_(inside)
    if _any(draws, "histogram_sd"):
        knots = recipe.setting("histogram", "knots")
        levels = upload(np.stack([histogram_levels(drawn, knots) for drawn in draws]), values.device, values.dtype)
        span, steps = values.amax(SPATIAL, keepdim=True).clamp_(min=1e-7), knots + 1
        place = (values * (steps / span)).flatten(1)
        index = place.long().clamp_(0, steps - 1)
        place = (place - index) * levels.diff().gather(1, index) + levels.gather(1, index)
        values = place.view_as(values).mul_(span).mul_(inside)
    if _any(draws, "bias_sd"):
        apart = recipe.setting("bias", "spacing_mm") / spacing_mm
        points = [max(2, math.ceil(side / apart) + 1) for side in values.shape[1:]]
        drawn_points = [bias_control_points(points, drawn.bias_sd, drawn.field_seed).numpy() for drawn in draws]
        field = upload(np.stack(drawn_points), values.device, values.dtype)
        for letter, side, number in zip("zyx", values.shape[1:], points, strict=True):
            axis = "zyx".replace(letter, "k")
            field = torch.einsum(f"{letter}k,b{axis}->bzyx",
                                 upload(between_points(side, number), values.device, values.dtype), field)
        values = values * field.exp_()
    return values


def _acquisition(images: torch.Tensor, draws: Sequence[Draw], recipe: Recipe, spacing_mm: float) -> torch.Tensor:
    """What the scanner does, as in `kit.augment.physics`, to the views that have it."""
    shape = tuple(images.shape[1:])

    def on(name: str, change: Callable[..., torch.Tensor], above: float = 0.0, axis: str = "") -> None:
        """Change, in place, the views whose draw has `name` above a bound; with `axis`, those of one axis at a time."""
        for along in range(3) if axis else [0]:
            chosen = [number for number, drawn in enumerate(draws) if getattr(drawn, name) > above
                      and (not axis or getattr(drawn, axis) == along)]
            if chosen:
                where = upload(np.array(chosen), images.device)
                images.index_copy_(0, where, change(images.index_select(0, where), [draws[i] for i in chosen],
                                                    *([along] if axis else [])))

    def along_all(part: torch.Tensor, matrices: Callable[[int, Draw], np.ndarray],
                  drawn: Sequence[Draw]) -> torch.Tensor:
        for axis, side in enumerate(shape):
            part = physics.along(part, np.stack([matrices(side, one) for one in drawn]), axis)
        return part

    def blur(part: torch.Tensor, drawn: Sequence[Draw], fwhm_mm: float | None = None) -> torch.Tensor:
        return along_all(part, lambda side, one: physics.gaussian(side, (fwhm_mm or one.blur_mm) / spacing_mm), drawn)

    def sharpen(part: torch.Tensor, drawn: Sequence[Draw]) -> torch.Tensor:
        blurred = blur(part, drawn, recipe.setting("sharpen", "fwhm_mm"))
        return torch.lerp(blurred, part, 1 + _each(drawn, "sharpen", part)).clamp_(min=0)

    def gibbs(part: torch.Tensor, drawn: Sequence[Draw]) -> torch.Tensor:
        return along_all(part, lambda side, one: physics.truncation(side, one.gibbs_mm / spacing_mm), drawn).abs_()

    def thick(part: torch.Tensor, drawn: Sequence[Draw], axis: int) -> torch.Tensor:
        return physics.along(part, np.stack([physics.slice_profile(shape[axis], one.slice_mm / spacing_mm)
                                             for one in drawn]), axis)

    def ghosts(part: torch.Tensor, drawn: Sequence[Draw], axis: int) -> torch.Tensor:
        number = recipe.setting("ghosting", "ghosts")
        return physics.along(part, np.stack([physics.ghost_filter(shape[axis], one.ghosting, number)
                                             for one in drawn]), axis).abs_()

    def motion(part: torch.Tensor, drawn: Sequence[Draw], axis: int) -> torch.Tensor:
        moves = [physics.poses(one, recipe.setting("motion", "movements")) for one in drawn]
        line = torch.fft.fftfreq(shape[axis], device=part.device).abs()
        line = line.view([-1 if number == axis else 1 for number in range(3)])
        k_space = torch.fft.fft(part, dim=axis + 1)
        for starts_and_poses in zip(*moves, strict=True):  # one movement of every view
            starts, poses = zip(*starts_and_poses, strict=True)
            grid = _grid([view_to_scan(pose, shape, spacing_mm) for pose in poses], shape, part.dtype, part.device)
            later = line >= upload(np.array(starts, np.float32), part.device).view(-1, 1, 1, 1)
            moved = _sample(part, grid, "bilinear") * _sample(torch.ones_like(part), grid, "nearest")
            k_space = torch.where(later, torch.fft.fft(moved, dim=axis + 1), k_space)
        return torch.fft.ifft(k_space, dim=axis + 1).abs().to(part.dtype)

    def spike(part: torch.Tensor, drawn: Sequence[Draw]) -> torch.Tensor:
        waves = [np.stack(one) for one in zip(*(physics.plane_wave(one, shape) for one in drawn), strict=True)]
        z, y, x = (upload(wave, part.device, torch.complex64) for wave in waves)
        plane = y[:, None, :, None] * x[:, None, None]
        return (part + (z[:, :, None, None] * plane).real * _each(drawn, "spike", part)).abs_().to(part.dtype)

    images = images.clone()
    on("motion_mm", motion, axis="motion_axis")
    on("ghosting", ghosts, axis="ghosting_axis")
    on("spike", spike)
    on("gibbs_mm", gibbs, above=spacing_mm)
    on("slice_mm", thick, above=spacing_mm, axis="slice_axis")
    on("blur_mm", blur)
    on("sharpen", sharpen)
    return images


def _noise(values: torch.Tensor, inside: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Rician noise on magnitude values, then Gaussian noise; each keyed by the view's `field_seed`."""
    def field(name: str, after: int) -> torch.Tensor:
        return normal(values.shape[1:], [drawn.field_seed + after for drawn in draws],
                      values.device).to(values.dtype).mul_(_each(draws, name, values))

    if _any(draws, "rician_sd"):
        values = torch.hypot(values + field("rician_sd", 2), field("rician_sd", 3)).mul_(inside)
    if _any(draws, "noise_sd"):
        values = values.add(field("noise_sd", 1)).mul_(inside)
    return values


def _occlusion(views: torch.Tensor, draws: Sequence[Draw], recipe: Recipe, spacing_mm: float) -> torch.Tensor:
    """Set boxes and patches to zero, as in `kit.augment.physics`."""
    shape = tuple(views.shape[1:])
    if _any(draws, "cutout_mm"):
        boxes = recipe.setting("cutout", "boxes")
        edges = np.stack([physics.cutout_boxes(drawn, drawn.cutout_mm / spacing_mm, boxes, shape) for drawn in draws])
        covers = [upload((np.arange(side) >= edges[..., 0, axis, None]) & (np.arange(side) < edges[..., 1, axis, None]),
                         views.device, views.dtype) for axis, side in enumerate(shape)]  # (batch, boxes, side)
        views = views.masked_fill(torch.einsum("bnz,bny,bnx->bzyx", *covers) > 0.5, 0)
    if _any(draws, "patches"):
        width = max(1, round(recipe.setting("patches", "size_mm") / spacing_mm))
        counts = [-(-side // width) for side in shape]
        masked = np.stack([masked_patches(math.prod(counts), drawn.patches, detail(drawn, "patches"))
                           for drawn in draws])
        covered = upload(masked.reshape(-1, *counts), views.device)
        for axis, side in enumerate(shape, 1):
            covered = covered.repeat_interleave(width, axis).narrow(axis, 0, side)
        views = views.masked_fill(covered, 0)
    return views
