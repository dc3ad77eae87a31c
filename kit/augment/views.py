"""Make one random view of each scan in a batch, on the batch's own device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from kit.augment import batched, contrast, physics
from kit.augment.draws import Draw, draw, histogram_levels
from kit.augment.recipe import Recipe
from kit.augment.spatial import bend, cropped_box, scatter, view_to_scan, warp

ATTEMPTS = 8  # times a view is drawn at random before its crop is centred on the brain
LEAST_OF_BOX = 0.01  # share of the box that must be brain
MAGNITUDE = ("scale", "gamma", "gamma_inverted", "contrast", "histogram_sd", "bias_sd", "rician_sd")  # darkest at 0
WHOLE_BOX = ("motion_mm", "ghosting", "spike", "gibbs_mm", "slice_mm", "blur_mm", "sharpen")  # act on the whole box

Views = tuple[torch.Tensor, torch.Tensor, list[Draw]]
DrawnFor = Callable[[int, int], Draw]  # (index in the batch, attempt) -> Draw


@torch.no_grad()
def make_views(images: torch.Tensor, masks: torch.Tensor, keys: Sequence[int], recipe: Recipe, *, seed: int,
               epoch: int, view: int, spacing_mm: float = 1.0,
               zscored: bool = True) -> tuple[torch.Tensor, torch.Tensor, list[Draw]]:
    """Make one view of each scan.

    A view with too little brain (below `LEAST_OF_BOX` of the box, and below half of what the scan has) is drawn again.
    After `ATTEMPTS` draws, one more is drawn and centred on the brain.

    Views keep the store's intensity scale, so encoders see one scale everywhere. Z-scored scans are z-scored again.
    Others are z-scored over the view's brain, augmented, z-scored again, and mapped back to the mean and SD that the
    view had before its grey levels changed.

    Ranges in standard deviations (noise, Rician noise, spikes) are of the scan's SD if it is z-scored, else of the
    view's, which differs after a crop. Ranges in mm are of the view: after a crop of half the side, a blur of 4 mm
    covers 2 mm of anatomy.

    Args:
        images: (batch, 1, depth, height, width) of any floating type, zero outside the mask; not modified.
        masks: (batch, 1, depth, height, width) bool.
        keys: (batch,) the scans' keys, see `kit.seeding.scan_key`.
        recipe: what to draw.
        seed, epoch, view: together with a scan's key, they determine all randomness.
        spacing_mm: grid spacing, for ranges in mm.
        zscored: whether the scans are z-scored, see `kit.preprocess.settings.Preparation.intensity`.

    Returns:
        views (batch, 1, depth, height, width) float32 (float64 if the scans are), zero outside the mask;
        their masks; and what was drawn, which `apply` can repeat (noise only on the same kind of device).
    """
    def drawn_for(number: int, attempt: int) -> Draw:
        drawn = draw(recipe, seed, epoch, keys[number], view, attempt)
        return _centred(drawn, masks[number, 0]) if attempt == ATTEMPTS else drawn

    make = _one_by_one if images.device.type == "cpu" else _together
    return make(images, masks, drawn_for, ATTEMPTS, recipe, spacing_mm, zscored)


@torch.no_grad()
def apply(images: torch.Tensor, masks: torch.Tensor, draws: Sequence[Draw], recipe: Recipe,
          spacing_mm: float = 1.0, zscored: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the views that these draws describe, one of each scan; other arguments as in `make_views`.

    Of the recipe only settings besides the ranges are used, such as `knots`.
    """
    make = _one_by_one if images.device.type == "cpu" else _together
    return make(images, masks, lambda number, _: draws[number], 0, recipe, spacing_mm, zscored)[:2]


def _one_by_one(images: torch.Tensor, masks: torch.Tensor, drawn_for: DrawnFor, redraws: int, recipe: Recipe,
                spacing_mm: float, zscored: bool) -> Views:
    """Make one view after the other, in the voxels of its brain only."""
    views, view_masks = _nothing(images, masks)

    def make(number: int) -> Draw:
        image, mask = images[number, 0], masks[number, 0]
        whole = int(torch.count_nonzero(mask))
        for attempt in range(redraws + 1):
            drawn = drawn_for(number, attempt)
            values, indices = _geometry(image, mask, drawn, recipe, spacing_mm)
            if _enough(len(indices), whole, mask.numel()):
                break
        _fill(views[number, 0], view_masks[number, 0], values, indices, drawn, recipe, spacing_mm, zscored)
        return drawn

    return views, view_masks, [make(number) for number in range(len(images))]


def _together(images: torch.Tensor, masks: torch.Tensor, drawn_for: DrawnFor, redraws: int, recipe: Recipe,
              spacing_mm: float, zscored: bool) -> Views:
    """Make all views at once, see `kit.augment.batched`; it waits for the device once for each attempt."""
    draws = [drawn_for(number, 0) for number in range(len(images))]
    views, view_masks = batched.geometry(images[:, 0], masks[:, 0], draws, recipe, spacing_mm)
    whole, voxels = masks.flatten(1).sum(1), masks[0].numel()
    for attempt in range(1, redraws + 1):
        counts = torch.stack([view_masks.flatten(1).sum(1), whole], dim=1).tolist()
        few = [number for number, (seen, has) in enumerate(counts) if not _enough(seen, has, voxels)]
        if not few:
            break
        for number in few:
            draws[number] = drawn_for(number, attempt)
        views[few], view_masks[few] = batched.geometry(images[few, 0], masks[few, 0], [draws[i] for i in few], recipe,
                                                       spacing_mm)
    views = batched.fill(views, view_masks, draws, recipe, spacing_mm, zscored)
    return views[:, None], view_masks[:, None], draws


def _enough(seen: int, whole: int, voxels: int) -> bool:
    """Whether `seen` brain voxels are `LEAST_OF_BOX` of the box's `voxels`, or half of the scan's `whole`."""
    return seen >= min(LEAST_OF_BOX * voxels, 0.5 * whole)


def _nothing(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty views, float32 (float64 if the scans are), and empty masks."""
    kind = torch.promote_types(images.dtype, torch.float32)
    return (torch.zeros(images.shape, dtype=kind, device=images.device),
            torch.zeros(masks.shape, dtype=torch.bool, device=masks.device))


def _geometry(image: torch.Tensor, mask: torch.Tensor, drawn: Draw, recipe: Recipe,
              spacing_mm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the view's brain, and their indices in the flattened view."""
    shape, apart = tuple(image.shape), recipe.setting("elastic", "apart_mm")
    repeats_border = _drawn(drawn, ["rotation_degrees"]) and recipe.setting("rotate", "padding") == "border"
    return warp(image, mask, view_to_scan(drawn, shape, spacing_mm), bend(drawn, shape, spacing_mm, apart),
                apart / spacing_mm, box=cropped_box(drawn, shape) if repeats_border else None)


def _fill(view: torch.Tensor, inside: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, drawn: Draw,
          recipe: Recipe, spacing_mm: float, zscored: bool) -> None:
    """Apply everything after the geometry; write the result into an empty view (depth, height, width) and its mask.

    `drawn.shift` needs no work, since subtracting the darkest voxel, or the z-score, undoes it.
    """
    if not len(indices):
        return
    shape = tuple(view.shape)
    if not zscored:
        sd, mean = torch.std_mean(values, correction=0)
        contrast.z_score(values)
    if _drawn(drawn, MAGNITUDE + WHOLE_BOX):
        contrast.magnitude(values)
        _contrast(values, indices, shape, drawn, recipe, spacing_mm)
        if _drawn(drawn, WHOLE_BOX):
            image = _acquisition(scatter(values, indices, shape), drawn, recipe, spacing_mm)
            values = image.reshape(-1).index_select(0, indices)
        if drawn.rician_sd:
            contrast.rician(values, indices, shape, drawn.rician_sd, drawn.field_seed + 2)
    if drawn.noise_sd:
        contrast.noise(values, indices, shape, drawn.noise_sd, drawn.field_seed + 1)
    view.view(-1).scatter_(0, indices, contrast.z_score(values))
    inside.view(-1).index_fill_(0, indices, True)
    if drawn.cutout_mm:
        physics.cutout(view, drawn.cutout_mm / spacing_mm, recipe.setting("cutout", "boxes"), drawn)
    if drawn.patches:
        physics.blank_patches(view, drawn.patches, recipe.setting("patches", "size_mm") / spacing_mm, drawn)
    if not zscored:
        view.mul_(sd).add_(mean).mul_(inside)


def _contrast(values: torch.Tensor, indices: torch.Tensor, shape: Sequence[int], drawn: Draw, recipe: Recipe,
              spacing_mm: float) -> None:
    """Apply what the tissue's grey levels and the coil do to magnitude values, in place."""
    if drawn.scale != 1:
        values.mul_(drawn.scale)
    if drawn.gamma != 1:
        contrast.gamma(values, drawn.gamma)
    if drawn.gamma_inverted != 1:
        contrast.gamma(values, drawn.gamma_inverted, inverted=True)
    if drawn.contrast != 1:
        contrast.contrast(values, drawn.contrast)
    if drawn.histogram_sd:
        contrast.histogram(values, histogram_levels(drawn, recipe.setting("histogram", "knots")).tolist())
    if drawn.bias_sd:
        apart = recipe.setting("bias", "spacing_mm") / spacing_mm
        points = [max(2, math.ceil(side / apart) + 1) for side in shape]
        contrast.bias_field(values, indices, shape, drawn.bias_sd, drawn.field_seed, points)


def _acquisition(image: torch.Tensor, drawn: Draw, recipe: Recipe, spacing_mm: float) -> torch.Tensor:
    """Apply what the scanner does to a magnitude image (depth, height, width), over the whole box."""
    if drawn.motion_mm:
        image = physics.motion(image, drawn, recipe.setting("motion", "movements"), spacing_mm)
    if drawn.ghosting:
        image = physics.ghosting(image, drawn.ghosting, recipe.setting("ghosting", "ghosts"), drawn.ghosting_axis)
    if drawn.spike:
        image = physics.spike(image, drawn.spike, drawn)
    if drawn.gibbs_mm > spacing_mm:
        image = physics.gibbs(image, drawn.gibbs_mm / spacing_mm)
    if drawn.slice_mm > spacing_mm:
        image = physics.thick_slices(image, drawn.slice_mm / spacing_mm, drawn.slice_axis)
    if drawn.blur_mm:
        image = physics.blur(image, drawn.blur_mm / spacing_mm)
    if drawn.sharpen:
        image = physics.sharpen(image, drawn.sharpen, recipe.setting("sharpen", "fwhm_mm") / spacing_mm)
    return image


def _drawn(drawn: Draw, names: Sequence[str]) -> bool:
    """Return whether any of these fields differs from its default."""
    return any(getattr(drawn, name) != getattr(Draw, name) for name in names)


def _centred(drawn: Draw, mask: torch.Tensor) -> Draw:
    """Move a draw's crop to the brain's centre, as far as the scan allows, and drop its translation."""
    centre = mask.nonzero().float().mean(0).cpu().numpy() if mask.any() else np.asarray(mask.shape) / 2
    size = np.asarray(drawn.crop_size)
    start = np.clip((centre + 0.5) / np.asarray(mask.shape) - size / 2, 0, 1 - size)
    return replace(drawn, crop_start=tuple(start.tolist()), translation_mm=(0.0, 0.0, 0.0))
