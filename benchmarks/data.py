"""Reading prepared scans."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.ratio import Ratio, cpu_seconds, times_better
from kit.data.grid import PAPER_GRID
from kit.data.nifti import write_nifti
from kit.data.store import Store, scan_path, write_scan
from kit.data.template import template_on


def template_scan() -> tuple[np.ndarray, np.ndarray]:
    """The template on the paper's grid with noise, so that it compresses as a scan does; image and mask."""
    image, mask = template_on(PAPER_GRID)
    noisy = image + np.random.default_rng(0).normal(0, 0.03, image.shape).astype(np.float32)
    return np.where(mask, (noisy - noisy[mask].mean()) / noisy[mask].std(), 0).astype(np.float32), mask


def measure() -> list[Ratio]:
    """Reading image and mask of one 1 mm scan: this kit's store against gzipped NIfTI."""
    image, mask = template_scan()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("image.nii.gz", "mask.nii.gz")]
        for file, array in zip(files, (image, mask), strict=True):
            write_nifti(file, array, PAPER_GRID.affine)
        write_scan(scan_path(folder, "scan"), image, mask, "scan", PAPER_GRID.affine)
        store = Store(Path(folder), None, {"shape": PAPER_GRID.shape, "spacing_mm": 1.0})

        ours, peer = cpu_seconds(lambda _: store.read("scan"), lambda _: [nib.load(file).get_fdata() for file in files],
                                 repeats=15)
    return [times_better("load_vs_nibabel", ours, peer, 30, "CPU-seconds",
                         "image and mask of one 150x192x192 scan: blosc2 store against nib.load().get_fdata() of two "
                         ".nii.gz files, one thread")]
