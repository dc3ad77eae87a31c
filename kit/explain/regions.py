"""How much of a saliency map falls into which part of the brain."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd

from kit.preprocess.template import tissue_share_on
from kit.store.grid import Grid

# Boxes in MNI mm (|x|, y, z, each from, to), drawn by eye on the ICBM152 2009a maps: coarse on purpose. A
# voxel belongs to the first that holds it. None takes every tissue in the box.
_BOXES = (
    ("medial temporal", None, ((14, 38), (-42, 4), (-34, -4))),  # hippocampus, amygdala, temporal horn
    ("cerebellum and brain stem", None, ((0, 50), (-92, -36), (-72, -22))),
    ("cerebellum and brain stem", None, ((0, 14), (-42, -8), (-72, -10))),
    ("ventricles", "fluid", ((0, 26), (-50, 34), (-8, 30))),  # bodies, frontal horns, third ventricle
    ("ventricles", "fluid", ((18, 36), (-56, -22), (-6, 26))),  # atria
    ("deep grey matter", "grey", ((0, 34), (-32, 24), (-10, 20))),  # thalamus, striatum, pallidum
)
_TISSUES = {"grey": "cortical and other grey matter", "white": "white matter", "fluid": "outer fluid"}


def inside_share(saliency_map: np.ndarray, known_mask: np.ndarray, brain_mask: np.ndarray) -> dict[str, float]:
    """How much of an absolute map lies in a known place, such as a lesion; all are (depth, height, width).

    Returns:
        share_of_saliency and share_of_brain, 0-1, of the place's part inside the brain; ratio of the two: 1 is what an
        even map gives, nan is a place outside the brain.

    Raises:
        ValueError: if shapes differ, or the map is zero inside the brain.
    """
    weight, brain = _inside(saliency_map, brain_mask, np.shape(known_mask))
    known = np.asarray(known_mask, dtype=bool) & brain
    saliency, voxels = float(weight[known].sum() / weight.sum()), float(known.sum() / brain.sum())
    return {"share_of_saliency": saliency, "share_of_brain": voxels,
            "ratio": saliency / voxels if voxels else float("nan")}


def region_table(saliency_map: np.ndarray, mask: np.ndarray, grid: Grid) -> pd.DataFrame:
    """Share an absolute map out over coarse regions, left (x < 0 in MNI at a voxel's centre) and right apart.

    Args:
        saliency_map, mask: (depth, height, width) on the grid; voxels outside the mask count nowhere.

    Returns:
        A row per region and side that has voxels inside the mask: `region, side, voxels, volume_ml,
        share_of_saliency, share_of_brain, ratio` (shares 0-1, each summing to 1; ratio 1 is an even map).

    Raises:
        ValueError: if shapes differ, or the map is zero inside the mask.
    """
    weight, brain = _inside(saliency_map, mask, grid.shape)
    labels, names = coarse_labels(grid)
    left = np.broadcast_to(_axis_mm(grid)[0] < 0, brain.shape)
    rows = []
    for label in np.unique(labels[brain]):
        for side, on_side in (("left", left), ("right", ~left)):
            here = brain & on_side & (labels == label)
            if voxels := int(here.sum()):
                shares = weight[here].sum() / weight.sum(), voxels / brain.sum()
                rows.append((names[label], side, voxels, voxels * grid.spacing_mm**3 / 1000, *shares))
    columns = ["region", "side", "voxels", "volume_ml", "share_of_saliency", "share_of_brain"]
    table = pd.DataFrame(rows, columns=columns)
    table["ratio"] = table["share_of_saliency"] / table["share_of_brain"]
    return table


@lru_cache(maxsize=4)
def coarse_labels(grid: Grid) -> tuple[np.ndarray, list[str]]:
    """Make the coarse atlas on a grid: labels (depth, height, width) int64, read-only, and their names.

    A voxel takes the likeliest tissue at its centre; fluid is what is neither grey nor white matter, so that
    every voxel has a label. Source: ICBM 152 2009a symmetric maps (Fonov et al. 2011), as shipped by nilearn.
    """
    grey, white = (tissue_share_on(grid, tissue) for tissue in ("grey", "white"))
    tissue_of = np.argmax([grey, white, 1 - grey - white], axis=0)  # in the order of _TISSUES
    names = [*dict.fromkeys(name for name, _, _ in _BOXES), *_TISSUES.values()]
    labels = len(names) - len(_TISSUES) + tissue_of
    x, y, z = _axis_mm(grid)
    for name, tissue, bounds in reversed(_BOXES):  # the first is written last, so that it wins
        inside = tissue_of == list(_TISSUES).index(tissue) if tissue else np.ones(labels.shape, dtype=bool)
        for along, (low, high) in zip((abs(x), y, z), bounds, strict=True):
            inside = inside & (along >= low) & (along <= high)
        labels[inside] = names.index(name)
    labels.flags.writeable = False  # shared by all callers
    return labels, names


def _axis_mm(grid: Grid) -> list[np.ndarray]:
    """MNI mm of the voxel centres along x, y and z, shaped to broadcast over (depth, height, width)."""
    return [(start + grid.spacing_mm * np.arange(length)).reshape(shape) for start, length, shape
            in zip(grid.origin_mm, grid.shape[::-1], ((1, 1, -1), (1, -1, 1), (-1, 1, 1)), strict=True)]


def _inside(saliency_map: np.ndarray, mask: np.ndarray, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Return the absolute map as float64, zero outside the mask, and the mask as booleans."""
    brain = np.asarray(mask, dtype=bool)
    if not saliency_map.shape == brain.shape == tuple(shape):
        raise ValueError(f"shapes differ: map {saliency_map.shape}, brain mask {brain.shape}, "
                         f"grid or known place {tuple(shape)}")
    weight = np.where(brain, np.abs(saliency_map.astype(np.float64)), 0)
    if not weight.sum() > 0:
        raise ValueError("the map is zero or not finite inside the mask: there is nothing to share out")
    return weight, brain
