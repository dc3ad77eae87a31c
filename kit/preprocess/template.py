"""Load the ICBM152 2009a template from nilearn's wheel: a T1-weighted average, its brain, grey and white matter."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kit.preprocess.resample import resample
from kit.store.grid import Grid


@lru_cache(maxsize=1)
def template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nilearn's 1 mm template, its brain mask and their affine.

    Returns:
        Float32 (z, y, x) in 0..1, practically zero outside the brain; bool (z, y, x); (4, 4) from a voxel (x, y, z)
        to MNI millimetres, RAS+.
    """
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    image, mask = load_mni152_template(resolution=1), load_mni152_brain_mask(resolution=1)
    values = np.ascontiguousarray(image.get_fdata(dtype=np.float32).T)
    return values, np.ascontiguousarray(mask.get_fdata().T > 0), image.affine


@lru_cache(maxsize=2)
def template_on(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the template, float32 (z, y, x), and its brain mask, bool, resampled onto a grid."""
    values, brain, affine = template()
    image, mask = (resample(each, affine, np.eye(4), grid.shape, grid.affine) for each in (values, brain))
    return image, mask > 0.5


def correlation(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Return Pearson's correlation of two arrays inside a bool mask; 0.0 if either is constant."""
    one, other = (values[mask].astype(np.float64) for values in (one, other))
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / scale) if scale > 0 else 0.0


def tissue_on(grid: Grid, tissue: str) -> np.ndarray:
    """Return where the template is surely "grey" or "white" matter (probability above 0.9), bool (z, y, x)."""
    return tissue_share_on(grid, tissue) > 0.9


@lru_cache(maxsize=4)
def tissue_share_on(grid: Grid, tissue: str) -> np.ndarray:
    """Return the template's probability of "grey" or "white" matter, float32 (z, y, x), 0 outside its field of view."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    image = {"grey": load_mni152_gm_template, "white": load_mni152_wm_template}[tissue](resolution=1)
    values = np.ascontiguousarray(image.get_fdata(dtype=np.float32).T)
    return resample(values, image.affine, np.eye(4), grid.shape, grid.affine)
