"""The brain in a scan's own voxels: a given mask, a stripped scan's, the template's, or another tool's."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from kit.data.nifti import ScanError, read_mask, write_nifti
from kit.data.resample import resample
from kit.data.template import template

# No brain is larger: where "nonzero" finds more, the scan still has its head or a background above zero.
MOST_BRAIN_ML = 2500.0

# The template's mask is fitted to a scan within these depths (mm): surely brain, and how far it may grow.
SURE_MM, GROWN_MM = 10.0, 3.0
# Brain's intensities as shares of the inside's median; grey matter of a T1-weighted scan has 0.65 to 0.8 of it.
# On Colin27 the plain mask overlaps ch2bet with a Dice of 0.948, the fitted one with 0.971; 0.7 would reach
# 0.977 there, and cost other scans their grey matter.
DARKEST, BRIGHTEST = 0.6, 1.6
LEAST_LEFT = 0.8  # share of the template's brain

# Tools that are not Python packages of this kit: how to call them on IMAGE so that they write MASK.
COMMANDS = {
    "hd-bet": ["hd-bet", "-i", "IMAGE", "-o", "BRAIN", "-device", "cpu", "--disable_tta", "--save_bet_mask",
               "--no_bet_image"],
    "mri_synthstrip": ["mri_synthstrip", "-i", "IMAGE", "-m", "MASK"],
}
INSTALL = {
    "hd-bet": "pip install hd-bet (https://github.com/MIC-DKFZ/HD-BET)",
    "mri_synthstrip": "install FreeSurfer 7.3 or newer, or SynthStrip's own script "
                      "(https://surfer.nmr.mgh.harvard.edu/docs/synthstrip)",
}
TOOL_MINUTES = 60.0


def missing_tool(mask: str) -> str | None:
    """Return what to install where a mask needs a command that is not there; None where nothing is missing."""
    if mask not in COMMANDS or shutil.which(COMMANDS[mask][0]):
        return None
    return f"mask: no command {COMMANDS[mask][0]!r} on the PATH; {INSTALL[mask]}, or choose another mask"


def nonzero_mask(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a skull-stripped scan's voxels above zero, holes filled, bool (z, y, x).

    Raises:
        ScanError: there are more of them than a brain has.
    """
    mask = ndimage.binary_fill_holes(array > 0)
    if (volume := millilitres(mask, affine)) > MOST_BRAIN_ML:
        raise ScanError(f"{volume:.0f} ml above zero, more than a brain: is the scan skull-stripped?")
    return mask


def tool_mask(tool: str, array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the mask that an installed command finds, bool (z, y, x).

    The scan (z, y, x) is handed over as a new NIfTI file in a temporary folder: nothing of its own header goes along.

    Raises:
        ScanError: the command failed, took longer than an hour, or wrote no mask of this scan.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {"IMAGE": "scan.nii.gz", "BRAIN": "brain.nii.gz", "MASK": "mask.nii.gz"}
        paths = {name: str(Path(folder) / file) for name, file in paths.items()}
        write_nifti(paths["IMAGE"], array, affine)
        command = [paths.get(part, part) for part in COMMANDS[tool]]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60 * TOOL_MINUTES, check=False)
        except OSError as error:
            raise ScanError(f"{tool} did not start: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ScanError(f"{tool} took longer than {TOOL_MINUTES:g} minutes") from error
        written = [Path(folder) / name for name in ("mask.nii.gz", "brain_bet.nii.gz")]
        found = next((path for path in written if path.is_file()), None)
        if done.returncode or found is None:
            last = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-1:]
            raise ScanError(f"{tool} ended with code {done.returncode} and "
                            f"{'a' if found else 'no'} mask: {''.join(last)[:200]}".replace(folder, ""))
        return read_mask(found, array, affine)


def template_mask(array: np.ndarray, affine: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the template's brain carried back to a scan, fitted to the scan's own edges, bool (z, y, x).

    Within a few millimetres of the template's edge, voxels stay that are as bright as brain and hang together with
    its inside; dark fluid, and what only thin bridges join, goes. Where that would take away much of the brain,
    the scan's intensities are no guide, and the template's mask stays as it is.

    Args:
        array: (z, y, x) intensities.
        affine: (4, 4), voxel (x, y, z) to the scan's millimetres, RAS+.
        matrix: (4, 4), MNI millimetres to the scan's; an affine fits better than a rigid transform.
    """
    depth, to_mm = _template_depth()
    image = ndimage.gaussian_filter(resample(array, affine, matrix, depth.shape, to_mm), 0.7)
    level = float(np.median(image[depth > SURE_MM]))
    bright = (image > DARKEST * level) & (image < BRIGHTEST * level) & (depth > -GROWN_MM)
    mask = _connected(bright | (depth > SURE_MM - 2))
    if np.count_nonzero(mask) < LEAST_LEFT * np.count_nonzero(depth > 0):
        mask = depth > 0
    return resample(mask, to_mm, np.linalg.inv(matrix), array.shape, affine) > 0.5


def _connected(mask: np.ndarray) -> np.ndarray:
    """Take thin bridges of a 1 mm mask away, keep the largest piece, close narrow clefts and holes."""
    pieces, _ = ndimage.label(ndimage.binary_erosion(mask, iterations=2))
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel(), minlength=2)[1:])
    opened = ndimage.binary_dilation(largest, iterations=3) & mask
    closed = ndimage.binary_erosion(ndimage.binary_dilation(opened, iterations=4), iterations=4) | opened
    return ndimage.binary_fill_holes(closed)


@lru_cache(maxsize=1)
def _template_depth() -> tuple[np.ndarray, np.ndarray]:
    """Return how deep in the template's brain a voxel lies (mm, negative outside), with room around it."""
    _, brain, to_mm = template()
    low, high = (np.array([edge(places) for places in np.nonzero(brain)]) for edge in (np.min, np.max))
    low, high = np.maximum(low - 8, 0), high + 9
    brain = brain[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    to_mm = to_mm.copy()
    to_mm[:3, 3] += to_mm[:3, :3] @ low[::-1]
    depth = np.where(brain, ndimage.distance_transform_edt(brain), -ndimage.distance_transform_edt(~brain))
    return depth.astype(np.float32), to_mm


def millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    """Return a mask's volume in ml."""
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000)
