"""Decide which prepared scans to distrust, by quality-control (QC) metrics, limits and the cohort's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

from kit.cohort.identity import site_names
from kit.preprocess.register import Transforms, disagreement, rotation_angle
from kit.preprocess.resample import resample
from kit.preprocess.settings import UNUSABLE
from kit.preprocess.skullstrip import dice, millilitres
from kit.preprocess.template import correlation, template, template_on, tissue_on
from kit.store.grid import Grid


class Metric(NamedTuple):
    """A QC metric: what it is, and when it counts against a scan.

    Attributes:
        what: description with its unit.
        bad: which tail of the cohort's distribution is bad: "low", "high" or "both"; "" means only limits count.
        least: smallest spread to assume, so that nearly identical scans do not flag each other.
        low, high: absolute limits; a scan beyond those of a metric in `UNUSABLE` is not used for training.
    """

    what: str
    bad: str = ""
    least: float = 0.0
    low: float = -np.inf
    high: float = np.inf


# docs/real_heads.md lists the real, corrupted and non-brain scans from which the limits were read off;
# `benchmarks/real_heads.py` measures them again.
QC_METRICS = {
    "template_similarity": Metric("correlation with the template inside its brain, after affine registration", "low",
                                  0.02, low=0.35),
    "mask_overlap": Metric("Dice of the brain mask with the template's, after affine registration", "low", 0.01,
                           low=0.9),
    "contrast": Metric("white less grey matter nearby, over the brain's standard deviation", "low", 0.1, low=0.15),
    "brain_ml": Metric("volume of the brain mask, ml", "both", 30.0, low=700.0, high=2100.0),
    "largest_piece": Metric("share of the brain mask in its largest piece", "", low=0.98),
    "bright_edge": Metric("share of voxels up to 4 mm outside the mask that are as bright as brain", "high", 0.05,
                          high=0.3),
    "snr": Metric("median of the brain over the noise's standard deviation", "low", 1.0, low=3.0, high=999.0),
    "grey_levels": Metric("distinct intensities in the brain", "", low=32),
    "outside_share": Metric("share of the template's brain outside the scan's field of view", "high", 0.005, high=0.05),
    "scale": Metric("size of the brain over the template's, geometric mean of three directions", "", low=0.7, high=1.2),
    "stretch": Metric("largest over smallest of the three directions' scales", "high", 0.02, high=1.5),
    "orientation_deg": Metric("rotation by which the header's orientation was wrong, degrees", "", high=1.0),
    "pose_deg": Metric("rotation between the rigid and the affine transform, degrees", "", high=4.0),
    "pose_mm": Metric("shift between the rigid and the affine transform at the brain's centre, mm", "", high=6.0),
}
# What to do about scans that are unusable by these metrics.
CURES = {
    "template_similarity": "no brain like the template's was found; look at the worst scans and at their masks",
    "contrast": "grey matter is not darker than white; are the scans T1-weighted? For other contrasts, the later "
                "notebooks have accept_flags",
    "grey_levels": "fewer than 32 intensities in the brain; are these the original scans, not label maps or converted "
                   "copies?",
}
# A scan is flagged beyond this many robust standard deviations (1.4826 times the median absolute deviation).
DEVIATIONS = 5.0
# Smaller sites are compared with the whole cohort; a smaller cohort is not compared at all.
LEAST_SCANS = 20
# The ratio given to scans without any noise, such as smoothed ones.
MOST_SNR = 1000.0
# Comparison with the template uses the paper's box at 2 mm, whatever the store's grid.
QC_GRID = Grid((75, 96, 96), 2.0)
EDGE_MM = 4.0
NEAR_MM = 12.0  # sigma of the Gaussian window within which grey and white matter are compared


def measure(array: np.ndarray, affine: np.ndarray, mask: np.ndarray, transforms: Transforms | None,
            orientation: np.ndarray, original: np.ndarray) -> dict[str, float]:
    """Return a scan's QC metrics; `QC_METRICS` says what each is.

    Args:
        array: the scan, (z, y, x), after bias correction if there is any.
        affine: (4, 4), voxel (x, y, z) to the scan's millimetres, RAS+.
        mask: (z, y, x) bool, its brain.
        transforms: MNI millimetres to the scan's; None for scans already in MNI space.
        orientation: (4, 4) rotation by which the header was wrong; see `kit.preprocess.register.find_orientation`.
        original: (z, y, x), the scan before bias correction, for grey_levels: N4 makes nearly all values distinct.
    """
    pose = transforms or Transforms(np.eye(4), np.eye(4))
    image = resample(array, affine, pose.affine, QC_GRID.shape, QC_GRID.affine)
    brain = resample(mask, affine, pose.affine, QC_GRID.shape, QC_GRID.affine) > 0.5
    like, like_brain = template_on(QC_GRID)
    scales = np.linalg.svd(pose.affine[:3, :3], compute_uv=False)
    apart = disagreement(pose.rigid, pose.affine)
    found = {
        "template_similarity": correlation(np.where(brain, image, 0), like, like_brain),
        "mask_overlap": dice(brain, like_brain),
        "contrast": t1_contrast(image, brain),
        "brain_ml": millilitres(mask, affine),
        "largest_piece": largest_piece(mask),
        "bright_edge": bright_edge(image, brain),
        "snr": signal_to_noise(array, mask),
        "grey_levels": grey_levels(original[mask]),
        "outside_share": outside_share(array.shape, affine, pose.affine),
        "scale": float(np.cbrt(scales.prod())),
        "stretch": float(scales.max() / scales.min()),
        "orientation_deg": rotation_angle(orientation[:3, :3]),
        "pose_deg": apart.rotation_deg,
        "pose_mm": apart.shift_mm,
    }
    return {name: round(float(found[name]), 4) for name in QC_METRICS}


def t1_contrast(image: np.ndarray, brain: np.ndarray) -> float:
    """Return white minus nearby grey matter, in standard deviations of the brain; on `QC_GRID`.

    Positive in T1-weighted scans of people older than about a year; negative in T2-weighted and FLAIR scans. Comparing
    means within some 12 mm cancels the bias field.
    """
    spread = float(image[brain].std()) if brain.any() else 0.0
    if spread == 0:
        return 0.0
    means, enough = [], brain.copy()
    for tissue in ("white", "grey"):
        where = (tissue_on(QC_GRID, tissue) & brain).astype(np.float32)
        near = _nearby(where)
        means.append(_nearby(image * where) / np.maximum(near, 1e-6))
        enough &= near > 0.02
    return float(np.median((means[0] - means[1])[enough])) / spread if enough.any() else 0.0


def _nearby(values: np.ndarray) -> np.ndarray:
    """Average values on `QC_GRID` within the window of `NEAR_MM`; as matrix products, a fifth of scipy's time."""
    for axis, side in enumerate(values.shape):
        values = np.moveaxis(np.tensordot(_window(side), values, (1, axis)), 0, axis)
    return values


@lru_cache
def _window(side: int) -> np.ndarray:
    """Return scipy's Gaussian filter along an axis as a matrix, (side, side) float32."""
    return ndimage.gaussian_filter1d(np.eye(side, dtype=np.float32), NEAR_MM / QC_GRID.spacing_mm, axis=0)


def bright_edge(image: np.ndarray, brain: np.ndarray) -> float:
    """Return the share of voxels just outside the brain within its intensity range; on `QC_GRID`.

    The range is the brain's 30th to 99th percentile. The share is high where the mask cuts off brain: around a whole
    brain lie fluid and bone, around a stripped one zeros.
    """
    if not brain.any():
        return 0.0
    around = ndimage.binary_dilation(brain, iterations=round(EDGE_MM / QC_GRID.spacing_mm)) & ~brain
    low, high = np.percentile(image[brain], [30, 99])
    return float(((image[around] > low) & (image[around] < high)).mean()) if around.any() else 0.0


def largest_piece(mask: np.ndarray) -> float:
    """Return the share of a mask's voxels in its largest component (connected by faces)."""
    pieces, _ = ndimage.label(mask)
    counts = np.bincount(pieces.ravel())[1:]
    return float(counts.max() / counts.sum()) if counts.size else 0.0


def grey_levels(values: np.ndarray) -> int:
    """Return the number of distinct values; of 200,000 values or more, that of an evenly spaced sample."""
    return len(np.unique(values[:: max(1, len(values) // 100_000)]))


def signal_to_noise(array: np.ndarray, mask: np.ndarray) -> float:
    """Return the median intensity inside a mask over the noise's standard deviation there.

    The array (z, y, x) must not be resampled. Noise is what remains after second differences along all three axes
    (Immerkaer 1996, doi:10.1006/cviu.1996.0060, extended to three dimensions). Its scale comes from the median
    absolute deviation, so edges hardly matter.
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
    """Return the share of the template's brain that lies outside a scan's field of view.

    `shape` is the scan's (z, y, x), `affine` takes its voxel (x, y, z) to its mm, `matrix` MNI mm to the scan's mm.
    """
    _, brain, to_mm = template()
    z, y, x = np.nonzero(brain[::4, ::4, ::4])
    points = np.stack([4 * x, 4 * y, 4 * z, np.ones_like(x)])
    voxels = (np.linalg.inv(affine) @ matrix @ to_mm @ points)[:3]
    sides = np.array(shape[::-1])[:, None]
    return float(((voxels < -0.5) | (voxels > sides - 0.5)).any(0).mean())


def flagged(index: pd.DataFrame, brain_ml: tuple[float, float] | None = None) -> pd.DataFrame:
    """Return an index with its columns `flags` and `unusable` recomputed, such as "contrast low; brain_ml high".

    A metric flags a scan beyond the metric's limits, or on the bad side of its site's median by more than `DEVIATIONS`
    robust standard deviations. Scans beyond the limits of a metric in `UNUSABLE` are unusable, and that column names
    it. A `header_note` is also a flag.

    Args:
        index: one scan a row, with the columns of `QC_METRICS`, and `site` or `dataset`.
        brain_ml: limits of the brain volume (ml), if not those for adults.
    """
    index = index.drop(columns=["flags", "unusable"], errors="ignore")
    flags: list[list[str]] = [[] for _ in range(len(index))]
    unusable: list[list[str]] = [[] for _ in range(len(index))]
    far = distances(index)
    for name, metric in QC_METRICS.items():
        low, high = brain_ml if brain_ml and name == "brain_ml" else (metric.low, metric.high)
        for row, (value, distance) in enumerate(zip(index[name], far[name], strict=True)):
            beyond = value < low or value > high or np.isnan(value)
            if beyond or abs(distance) > DEVIATIONS:
                # NaN counts as below the lower limit, if there is one
                below = value < low or (not value > high and distance < 0) or (np.isnan(value) and low > -np.inf)
                flags[row].append(f"{name} {'low' if below else 'high'}")
            if beyond and name in UNUSABLE:
                unusable[row].append(name)
    if "header_note" in index:
        for row, note in enumerate(index["header_note"].fillna("")):
            flags[row] += [note] * bool(note)
    return index.assign(flags=["; ".join(each) for each in flags], unusable=["; ".join(each) for each in unusable])


def distances(index: pd.DataFrame) -> pd.DataFrame:
    """Return each metric's signed distance from the site's median, in robust standard deviations.

    It is 0 on the metric's good side, and for metrics without a bad one. Sites are those of
    `kit.cohort.identity.site_names`; small sites, and scans without one, are compared with the whole cohort.
    """
    found = pd.DataFrame(0.0, index=index.index, columns=list(QC_METRICS))
    if len(index) < LEAST_SCANS:
        return found
    sites = site_names(index)
    large = sites.map(sites.value_counts()) >= LEAST_SCANS
    for name, metric in QC_METRICS.items():
        if not metric.bad:
            continue
        values = index[name].astype(float)
        for site in ["", *sites[large].unique()]:
            rows = (sites == site) & large if site else ~large
            compared = values[rows] if site else values
            middle = compared.median()
            spread = max(1.4826 * (compared - middle).abs().median(), metric.least)
            found.loc[rows, name] = (values[rows] - middle) / spread
        found[name] = found[name].clip(*{"low": (None, 0), "high": (0, None), "both": (None, None)}[metric.bad])
    return found


def worst_first(index: pd.DataFrame) -> pd.DataFrame:
    """Sort an index: unusable scans first, then flagged ones, then by the worst metric and by similarity."""
    order = pd.DataFrame({
        "unusable": -index["unusable"].astype(str).str.len().clip(upper=1),
        "flagged": -index["flags"].astype(str).str.len().clip(upper=1),
        "worst": -distances(index).abs().max(axis=1), "similarity": index["template_similarity"],
    }, index=index.index)
    return index.loc[order.sort_values(list(order), kind="stable").index]


def unusable_warning(index: pd.DataFrame, most: float, registration: str) -> str:
    """Return a warning if more than this share of an index is unusable, with the commonest reason and its cure, or "".

    Args:
        index: with the column `unusable` of `flagged`.
        most: share accepted, 0 to 1.
        registration: the preparation's.
    """
    reasons = index["unusable"].fillna("")
    reasons = reasons[reasons != ""]
    if len(reasons) <= most * len(index):
        return ""
    counts = reasons.str.split("; ").explode().value_counts()
    reason = str(counts.index[0])
    cure = CURES[reason]
    if reason == "template_similarity" and registration == "none":
        cure = ("registration: none is for scans that already lie in MNI152 space; set registration: rigid or affine "
                "for all others")
    return (f"WARNING: {len(reasons)} of {len(index)} scans are unusable and will not be used for training, most often "
            f"because of {reason} ({counts.iloc[0]}): {cure}")


def usable(index: pd.DataFrame, accept: Sequence[str] = ()) -> np.ndarray:
    """Return which rows of an index to train on, (rows,) bool: all except unusable ones.

    Args:
        index: without a column `unusable`, all its rows are usable.
        accept: metrics, such as "contrast", that should not exclude a scan here.
    """
    if "unusable" not in index:
        return np.ones(len(index), bool)
    reasons = index["unusable"].fillna("").astype(str).str.split("; ")
    return np.array([not set(each) - {"", *accept} for each in reasons], bool)
