"""Which prepared scans to distrust: figures of each, and flags against the cohort's own distribution."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import ndimage

from kit.data.brain import millilitres
from kit.data.grid import Grid
from kit.data.template import correlation, template, template_on

# A figure's name: what it is, which side is bad, and the least spread that counts: scans that are nearly all the
# same are no reason to flag one that differs by less.
FIGURES = {
    "template_similarity": ("correlation with the template inside its brain mask", "low", 0.02),
    "mask_overlap": ("Dice overlap of the brain mask with the template's", "low", 0.01),
    "brain_ml": ("volume of the brain mask in the scan, millilitres", "both", 30.0),
    "snr": ("median of the brain over the noise's deviation", "low", 1.0),
    "outside_share": ("share of the brain outside the scan's field of view", "high", 0.005),
}
# A scan is flagged beyond this many robust deviations (1.4826 times the median absolute deviation).
DEVIATIONS = 5.0
# Fewer scans have no distribution to speak of.
LEAST_SCANS = 8
# A scan without any noise, such as a smoothed one, has this ratio.
MOST_SNR = 1000.0


def figures(array: np.ndarray, affine: np.ndarray, native_mask: np.ndarray, matrix: np.ndarray, image: np.ndarray,
            mask: np.ndarray, grid: Grid) -> dict[str, float]:
    """Return a scan's quality figures; `FIGURES` says what each is.

    `array` and `native_mask` are the scan and its brain (z, y, x), `affine` their voxel to mm, RAS+; `matrix` takes MNI
    millimetres to the scan's; `image` and `mask` lie on the grid.
    """
    like, like_mask = template_on(grid)
    both = np.count_nonzero(mask & like_mask)
    return {
        "template_similarity": round(correlation(image, like, like_mask), 4),
        "mask_overlap": round(float(2 * both / (np.count_nonzero(mask) + np.count_nonzero(like_mask))), 4),
        "brain_ml": round(millilitres(native_mask, affine), 1),
        "snr": round(signal_to_noise(array, native_mask), 1),
        "outside_share": round(outside_share(array.shape, affine, matrix), 4),
    }


def signal_to_noise(array: np.ndarray, mask: np.ndarray) -> float:
    """Return the median inside a mask over the noise's standard deviation there.

    The noise of an array (z, y, x), which must not be resampled, is what a second difference along each of the three
    axes leaves (Immerkaer 1996, doi:10.1006/cviu.1996.0060, in three dimensions), by its median absolute deviation:
    edges count for little.
    """
    inside = ndimage.binary_erosion(mask, iterations=2)
    where = np.nonzero(inside)
    if len(where[0]) < 1000:
        return 0.0
    box = tuple(slice(places.min() - 1, places.max() + 2) for places in where)
    rest = array[box].astype(np.float32)
    for axis in range(3):
        rest = np.diff(rest, 2, axis)
    rest = np.abs(rest[inside[box][1:-1, 1:-1, 1:-1]])
    noise = 1.4826 * float(np.median(rest)) / 6**1.5  # the weights 1, -2, 1 have a norm of sqrt(6)
    signal = float(np.median(array[inside]))
    return float(np.clip(signal / noise, 0, MOST_SNR)) if noise > 0 else MOST_SNR


def outside_share(shape: tuple[int, int, int], affine: np.ndarray, matrix: np.ndarray) -> float:
    """Return the share of the template's brain that lies outside a scan's field of view; arguments as of `figures`."""
    _, brain, to_mm = template()
    z, y, x = np.nonzero(brain[::4, ::4, ::4])
    points = np.stack([4 * x, 4 * y, 4 * z, np.ones_like(x)])
    voxels = (np.linalg.inv(affine) @ matrix @ to_mm @ points)[:3]
    sides = np.array(shape[::-1])[:, None]
    return float(((voxels < -0.5) | (voxels > sides - 0.5)).any(0).mean())


def flagged(index: pd.DataFrame) -> pd.DataFrame:
    """Return an index with its columns `flags` (such as "snr low; brain_ml high") and `pass` made anew.

    A figure flags a scan when it lies more than `DEVIATIONS` robust deviations from the median of all scans, on
    its bad side. Fewer than `LEAST_SCANS` scans have no distribution, and are not flagged.
    """
    index = index.drop(columns=["flags", "pass"], errors="ignore")
    flags: list[list[str]] = [[] for _ in range(len(index))]
    for name, distance in distances(index).items():
        for row in np.flatnonzero(np.abs(distance) > DEVIATIONS):
            flags[row].append(f"{name} {'low' if distance.iloc[row] < 0 else 'high'}")
    return index.assign(flags=["; ".join(each) for each in flags], **{"pass": [not each for each in flags]})


def distances(index: pd.DataFrame) -> pd.DataFrame:
    """Return how far each scan's figures lie on their bad side, in robust deviations; 0 on the good side."""
    found = {}
    for name, (_, bad, least) in FIGURES.items():
        values = index[name].astype(float)
        middle = values.median()
        spread = max(1.4826 * (values - middle).abs().median(), least)
        distance = (values - middle) / spread if len(index) >= LEAST_SCANS else values * 0
        found[name] = distance.clip(*{"low": (None, 0), "high": (0, None), "both": (None, None)}[bad])
    return pd.DataFrame(found, index=index.index)


def worst_first(index: pd.DataFrame) -> pd.DataFrame:
    """Return an index sorted by each scan's worst figure, the most distrusted first; few scans by similarity."""
    worst = distances(index).abs().max(axis=1)
    order = pd.DataFrame({"worst": -worst, "similarity": index["template_similarity"]}, index=index.index)
    return index.loc[order.sort_values(["worst", "similarity"], kind="stable").index]


def passing(index: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an index that no figure flagged; all of an index without the column `pass`."""
    return index[index["pass"].astype(bool)] if "pass" in index else index
