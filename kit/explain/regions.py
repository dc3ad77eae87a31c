"""How much of a saliency map falls into which part of the brain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template
from nilearn.image import resample_img

from kit.data.grid import Grid

COARSE_ATLAS = "coarse MNI regions"

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


class InsideShare(NamedTuple):
    """How a map favours a place: `ratio` 1 is what an even map gives, 3 means three times its share."""

    saliency: float  # share of the absolute map inside the place, 0-1
    brain: float  # share of the brain's voxels inside the place, 0-1
    ratio: float  # saliency / brain; nan if no voxel of the place is in the brain


def inside_share(saliency_map: np.ndarray, known_mask: np.ndarray, brain_mask: np.ndarray) -> InsideShare:
    """Measure how much of a map lies in a known place, such as a stroke's lesion.

    Args:
        saliency_map: (depth, height, width), signed or not; absolute values are summed.
        known_mask: (depth, height, width), true in the place; only its part inside the brain counts.
        brain_mask: (depth, height, width), true inside the brain.

    Raises:
        ValueError: if shapes differ, or the map is zero inside the brain.
    """
    weight, brain = _inside(saliency_map, brain_mask, np.shape(known_mask))
    known = np.asarray(known_mask, dtype=bool) & brain
    of_saliency, of_brain = float(weight[known].sum() / weight.sum()), float(known.sum() / brain.sum())
    return InsideShare(of_saliency, of_brain, of_saliency / of_brain if of_brain else float("nan"))


def region_table(
    saliency_map: np.ndarray, mask: np.ndarray, grid: Grid,
    atlas: tuple[str | Path, Mapping[int, str]] | None = None,
) -> pd.DataFrame:
    """Share a map out over regions, left and right apart: left is where a voxel's centre has x < 0 in MNI.

    Args:
        saliency_map: (depth, height, width) on the grid, signed or not; absolute values are summed.
        mask: (depth, height, width), true inside the brain; voxels outside count nowhere.
        grid: where the map lies in MNI152.
        atlas: a label image in MNI152 mm, and the name of each label. Without it "coarse MNI regions":
            grey matter, white matter and fluid of nilearn's ICBM152 maps, cut by a few boxes (`_BOXES`).

    Returns:
        A row per region and side that has voxels inside the mask: `region, side, voxels, volume_ml,
        share_of_saliency, share_of_brain, ratio` (shares 0-1, each summing to 1; ratio 1 is an even map).
        `.attrs["atlas"]` names the atlas. Voxels without a label are the region "outside the atlas".

    Raises:
        ValueError: if shapes differ, the map is zero inside the mask, or the grid holds none of the labels.
        FileNotFoundError: if the label image does not exist.
    """
    weight, brain = _inside(saliency_map, mask, grid.shape)
    labels, names = coarse_labels(grid) if atlas is None else _user_labels(grid, *atlas)
    left = np.broadcast_to(_axis_mm(grid)[0] < 0, brain.shape)
    rows = []
    for label in np.unique(labels[brain]):
        for side, on_side in (("left", left), ("right", ~left)):
            here = brain & on_side & (labels == label)
            if here.any():
                name, voxels = names.get(int(label), f"label {label}"), int(here.sum())
                shares = weight[here].sum() / weight.sum(), voxels / brain.sum()
                rows.append((name, side, voxels, voxels * grid.spacing_mm**3 / 1000, *shares))
    columns = ["region", "side", "voxels", "volume_ml", "share_of_saliency", "share_of_brain"]
    table = pd.DataFrame(rows, columns=columns)
    table["ratio"] = table["share_of_saliency"] / table["share_of_brain"]
    table.attrs["atlas"] = COARSE_ATLAS if atlas is None else Path(atlas[0]).name
    return table


@lru_cache(maxsize=4)
def coarse_labels(grid: Grid) -> tuple[np.ndarray, dict[int, str]]:
    """Make the coarse atlas on a grid: labels (depth, height, width) int64, read-only, and the name of each.

    A voxel takes the likeliest tissue at its centre; fluid is what is neither grey nor white matter, so that
    every voxel has a label. Source: ICBM 152 2009a symmetric maps (Fonov et al. 2011), as shipped by nilearn.
    """
    grey, white = (_on_grid(load(resolution=1), grid, "linear")
                   for load in (load_mni152_gm_template, load_mni152_wm_template))
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
    return labels, dict(enumerate(names))


def _user_labels(grid: Grid, path: str | Path, names: Mapping[int, str]) -> tuple[np.ndarray, dict[int, str]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"atlas {path}: no such file; give a label image in MNI152 millimetres")
    labels = np.rint(_on_grid(nib.load(path), grid, "nearest")).astype(int)
    if not labels.any():
        raise ValueError(f"atlas {path}: no label lies inside the grid's box; is it in MNI152 millimetres?")
    return labels, {0: "outside the atlas", **{int(label): name for label, name in names.items()}}


def _on_grid(image: nib.Nifti1Image, grid: Grid, interpolation: str) -> np.ndarray:
    """Resample a NIfTI image to (depth, height, width) float32 on the grid; 0 where the image ends."""
    there = resample_img(image, target_affine=grid.affine, target_shape=grid.shape[::-1],
                         interpolation=interpolation, force_resample=True, copy_header=True)
    return np.asarray(there.dataobj, dtype=np.float32).transpose(2, 1, 0)


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
