"""Build the ICBM152 template's tissue maps and what is needed to warp them, once, and cache them on disk.

The maps come with nilearn's wheel (Fonov et al. 2011, ICBM 2009a, 1 mm). Arrays are (z, y, x);
points are float32 (3, z, y, x) with components (x, y, z) in MNI152 millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from kit.runs import write_whole

# Mean T1 intensity of each tissue in the template, whose brightest voxel is 1.
TEMPLATE_CSF, TEMPLATE_GREY, TEMPLATE_WHITE = 0.281, 0.660, 0.879
MARGIN_MM = 6
DISTANCES_STEP_MM = 2  # spacing of `Atlas.distances`


@dataclass(frozen=True)
class Volume:
    """Channels on an axis-aligned grid."""

    values: torch.Tensor  # float32 (1, channel, z, y, x)
    spacing_mm: float
    origin_mm: tuple[float, float, float]  # the first voxel's centre (x, y, z)

    def at(self, points: torch.Tensor) -> torch.Tensor:
        """Interpolate linearly at points (3, z, y, x) in mm; returns (channel, z, y, x), edge values outside."""
        sides = torch.tensor(self.values.shape[:1:-1], dtype=torch.float32).view(3, 1, 1, 1)
        origin = torch.tensor(self.origin_mm, dtype=torch.float32).view(3, 1, 1, 1)
        relative = (points - origin) / self.spacing_mm / (sides - 1) * 2 - 1
        return torch.nn.functional.grid_sample(
            self.values, relative.permute(1, 2, 3, 0)[None],
            mode="bilinear", padding_mode="border", align_corners=True)[0]


@dataclass(frozen=True)
class Atlas:
    """The template, ready to be sampled.

    Args:
        tissue: CSF, grey and white matter (0 to 1), the intensity these do not explain, brain (0 to 1).
        distances: distance to the lateral ventricles' walls (mm, negative inside), its gradient (x, y, z), depth
            below the brain's surface (mm).
    """

    tissue: Volume
    distances: Volume


@lru_cache(maxsize=2)
def load_atlas(cache: Path | None = None) -> Atlas:
    """Return the atlas, from `cache` (an `.npz`, written if absent) or newly built (about 3 s)."""
    if cache is None:
        return _as_atlas(**_build())
    if not cache.exists():
        arrays: dict[str, Any] = _build()
        write_whole(cache, lambda aside: np.savez_compressed(aside, **arrays))
    with np.load(cache) as arrays:
        return _as_atlas(**arrays)


def _as_atlas(tissue: np.ndarray, shape: np.ndarray, origin_mm: np.ndarray) -> Atlas:
    """Convert the arrays from `_build` to float32 volumes; `shape` is what caches call the distances."""
    shares = torch.from_numpy(tissue).float() / 255
    shares[3] = 2 * shares[3] - 1
    x, y, z = (float(at) for at in origin_mm)
    return Atlas(Volume(shares[None], 1.0, (x, y, z)),
                 Volume(torch.from_numpy(shape).float()[None], float(DISTANCES_STEP_MM), (x, y, z)))


def _build() -> dict[str, np.ndarray]:
    """Build the maps: tissue uint8 (5, z, y, x), distances float16 (5, z, y, x), the first voxel's centre in mm.

    The residual channel is stored as (value + 1) / 2, so that all channels of `tissue` fit in 0 to 255.
    """
    template, grey, white, origin = _template()
    # Dark sulci and vessels belong to the brain, so the outline is closed and its holes filled.
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(template > 0.2, iterations=2))
    csf = np.clip(1 - grey - white, 0, 1) * brain
    csf[template < 0.12] = 0  # air and dura give no signal
    mixture = TEMPLATE_CSF * csf + TEMPLATE_GREY * grey + TEMPLATE_WHITE * white
    residual = np.where(brain, template - mixture, 0)
    depth = ndimage.distance_transform_edt(template > 0.2).astype(np.float32)  # dark sulci count as surface
    distance = _ventricle_distance(csf, depth, origin)
    gradient = [ndimage.gaussian_filter(slope, 2.0) for slope in np.gradient(distance)[::-1]]
    channels = [csf, grey, white, (residual + 1) / 2, brain.astype(np.float32)]
    tissue = np.stack([ndimage.gaussian_filter(channel, 0.6) for channel in channels])
    step = slice(None, None, DISTANCES_STEP_MM)
    distances = np.stack([distance, *gradient, depth])[:, step, step, step]
    return {"tissue": np.round(tissue.clip(0, 1) * 255).astype(np.uint8),
            "shape": distances.astype(np.float16), "origin_mm": origin}


def _template() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Load template, grey and white matter, float32 (z, y, x), cropped to the brain, and the first voxel in mm."""
    from nilearn import datasets  # slow to import and needed only once

    images = [load(resolution=1) for load in (
        datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)]
    maps = [np.asarray(image.dataobj, dtype=np.float32).T for image in images]
    inside = ndimage.find_objects((maps[0] > 0.2).astype(np.uint8))[0]
    # The template ends at z = -72 mm, inside the brainstem; padding lets it end in air.
    template, grey, white = (np.pad(values[inside], MARGIN_MM) for values in maps)
    first = [side.start - MARGIN_MM for side in inside[::-1]]
    return template, grey, white, images[0].affine[:3, 3] + first


def _ventricle_distance(csf: np.ndarray, depth: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return the signed distance to the lateral ventricles, float32 (z, y, x) in mm."""
    z, y, x = (np.arange(side) + start for side, start in zip(csf.shape, origin[::-1], strict=True))
    box = ((z > -20) & (z < 40))[:, None, None] & ((y > -65) & (y < 40))[:, None] & (np.abs(x) < 45)
    labels, count = ndimage.label((csf > 0.5) & box & (depth > 20))
    numbers = np.arange(1, count + 1)
    volume = ndimage.sum_labels(np.ones_like(csf), labels, numbers)
    centre_x = ndimage.mean(np.broadcast_to(x, csf.shape), labels, numbers)
    # The lateral ventricles are the two large components off the midline; the rest is cisterns and sulci.
    ventricles = np.isin(labels, numbers[(volume > 4000) & (np.abs(centre_x) > 5)])
    surface = ventricles & ~ndimage.binary_erosion(ventricles)
    distance = ndimage.distance_transform_edt(~surface).astype(np.float32)
    return ndimage.gaussian_filter(np.where(ventricles, -1 - distance, distance), 1.5)
