"""A batch of scans in, one random view of each out, on the device where the batch lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kit.augment import intensity
from kit.augment.draws import Draw, draw
from kit.augment.recipe import Recipe
from kit.augment.spatial import resample, view_to_scan

ATTEMPTS = 8  # draws of a view before it is centred on the brain
LEAST_BRAIN = 0.01  # share of the box that must be brain


@torch.no_grad()
def make_views(images: torch.Tensor, masks: torch.Tensor, keys: Sequence[int], recipe: Recipe, *, seed: int,
               epoch: int, view: int, spacing_mm: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, list[Draw]]:
    """Make one view of each scan.

    A view whose box misses the brain is drawn again, at most `ATTEMPTS` times, then centred on the brain.

    Args:
        images: (batch, 1, depth, height, width) float32, zero outside the mask.
        masks: (batch, 1, depth, height, width) bool.
        keys: (batch,) the scans' keys, see `kit.data.loader.scan_key`.
        recipe: what to draw.
        seed, epoch, view: with each scan's key they decide everything that is random.
        spacing_mm: of the grid, for ranges in mm.

    Returns:
        views (batch, 1, depth, height, width) float32, z-scored inside the mask, zero outside;
        their masks; and what was drawn, which `apply` repeats.
    """
    draws = [draw(recipe, seed, epoch, key, view) for key in keys]
    moved, moved_masks = _geometry(images, masks, draws)
    for attempt in range(1, ATTEMPTS + 1):
        least = np.minimum(LEAST_BRAIN, 0.5 * _brain_share(masks))
        empty = np.flatnonzero(_brain_share(moved_masks) < least).tolist()
        if not empty:
            break
        for item in empty:
            again = draw(recipe, seed, epoch, keys[item], view, attempt)
            draws[item] = _centred(again, masks[item, 0]) if attempt == ATTEMPTS else again
        some, some_masks = _geometry(images[empty], masks[empty], [draws[item] for item in empty])
        moved[empty], moved_masks[empty] = some, some_masks
    return _intensity(moved, moved_masks, draws, recipe, spacing_mm), moved_masks, draws


@torch.no_grad()
def apply(images: torch.Tensor, masks: torch.Tensor, draws: Sequence[Draw], recipe: Recipe,
          spacing_mm: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the views that these draws describe; the arguments as for `make_views`."""
    moved, moved_masks = _geometry(images, masks, draws)
    return _intensity(moved, moved_masks, draws, recipe, spacing_mm), moved_masks


def _geometry(images: torch.Tensor, masks: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(images.shape[2:])
    maps = np.stack([view_to_scan(item, shape) for item in draws])
    if np.array_equal(maps, np.broadcast_to(np.eye(3, 4), maps.shape)):
        return images.clone(), masks.clone()
    return resample(images, masks, maps)


def _intensity(images: torch.Tensor, masks: torch.Tensor, draws: Sequence[Draw], recipe: Recipe,
               spacing_mm: float) -> torch.Tensor:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(item, name) for item in draws], device=images.device, dtype=torch.float32)

    seeds = [item.field_seed for item in draws]
    if recipe.shift:
        images = intensity.shift(images, masks, column("shift"))
    if recipe.gamma:
        images = intensity.gamma(images, masks, column("gamma"))
    if recipe.bias:
        images = intensity.bias_field(images, masks, column("bias_sd"), seeds, recipe.bias.spacing_mm / spacing_mm)
    if recipe.noise:
        images = intensity.noise(images, masks, column("noise_sd"), seeds)
    return intensity.z_score(images, masks)


def _brain_share(masks: torch.Tensor) -> np.ndarray:
    return masks.float().mean((1, 2, 3, 4)).cpu().numpy()


def _centred(item: Draw, mask: torch.Tensor) -> Draw:
    """The same draw with its crop moved to the brain's centre, as far as the scan reaches."""
    points = mask.nonzero().float().mean(0).cpu().numpy() if mask.any() else np.asarray(mask.shape) / 2
    size = np.asarray(item.crop_size)
    start = np.clip((points + 0.5) / np.asarray(mask.shape) - size / 2, 0, 1 - size)
    return Draw(**{**item.__dict__, "crop_start": tuple(start.tolist())})
