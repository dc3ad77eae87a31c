"""Preparing scans, and reading prepared ones."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from benchmarks.ratio import Ratio, memory_bytes, share, times_better
from kit.machine import keep_freed_memory
from kit.preprocess.nifti import write_nifti
from kit.preprocess.preprocess import ScanJob, prepare, prepare_scan
from kit.preprocess.settings import Preparation
from kit.preprocess.template import template, template_on
from kit.store.grid import PAPER_GRID
from kit.store.store import Store, scan_path, write_scan

# A whole head of one real person, where Debian's package mricron-data is installed.
HEAD = Path("/usr/share/mricron/templates/ch2.nii.gz")
EVERYTHING = Preparation(PAPER_GRID, "rigid", "deepbet", "n4")
CROP = (slice(43, 107), slice(64, 128), slice(64, 128))  # 64 voxels a side
SECONDS_A_SCAN, GIGABYTES_A_SCAN = 25.0, 2.0
SCANS = 12
IN_A_ROW = 5  # reads, as a loader does them


def measure() -> list[Ratio]:
    """Reading first, on a quiet process; then preparing."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_reading(Path(folder)), *_preparing(Path(folder))]


def _reading(folder: Path) -> list[Ratio]:
    image, mask = template_scan()
    files = [folder / name for name in ("image.nii.gz", "mask.nii.gz")]
    # nibabel's own writer at its own compression, as the peer's files would be made.
    for file, array in zip(files, (image, mask.astype(np.uint8)), strict=True):
        nib.save(nib.Nifti1Image(array.T, PAPER_GRID.affine), file)
    write_scan(scan_path(folder, "scan"), image, mask, "scan", PAPER_GRID.affine)
    store = Store(folder, None, {"shape": PAPER_GRID.shape, "spacing_mm": 1.0})
    # Each side in a process of its own, as it comes: a loading process of the kit keeps the memory that it frees.
    context = get_context("spawn")
    with (ProcessPoolExecutor(1, context, keep_freed_memory) as ours, ProcessPoolExecutor(1, context) as theirs):
        turns = [[pool.submit(_read, *what).result() for pool, what in
                  ((ours, (store, None)), (ours, (store, CROP)), (theirs, (files,)))] for _ in range(15)]
    whole, crop, peer = np.median(turns, axis=0)
    size, gzip = scan_path(folder, "scan").stat().st_size / 1e6, sum(file.stat().st_size for file in files) / 1e6
    data = f"image and mask of one 150x192x192 scan (the template with noise), {IN_A_ROW} times in a row"
    return [
        times_better("load_vs_nibabel", whole, peer, 30, "CPU-seconds",
                     f"{data}: the store in a loading process against nib.load().get_fdata() of two .nii.gz files; "
                     "one thread"),
        times_better("crop_vs_whole", crop, whole, 1.3, "CPU-seconds",
                     f"a 64x64x64 crop against the whole, both from the store; {data}"),
        share("store_vs_gzip", size, gzip, 0.5, "MB", f"{data}: a file of the store against float32 and uint8 .nii.gz"),
    ]


def _read(source: Store | list[Path], crop: tuple[slice, slice, slice] | None = None) -> float:
    """CPU-seconds of one read, of some in a row, after one unmeasured."""
    def read() -> object:
        if isinstance(source, Store):
            return source.read("scan", crop)
        return [nib.load(file).get_fdata() for file in source]

    read()
    begun = time.process_time()
    for _ in range(IN_A_ROW):
        read()
    return (time.process_time() - begun) / IN_A_ROW


def _preparing(folder: Path) -> list[Ratio]:
    heads = _heads(folder)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, gigabytes = pool.submit(_one_scan, heads[0], folder / "one" / "scans" / "scan.b2nd").result()
    walls = {workers: _wall_seconds(heads, folder / f"workers_{workers}", workers) for workers in (1, 2)}
    head = "Colin27, a whole head" if HEAD.is_file() else "the template with noise"
    what = f"{head}, 1 mm: deepbet, N4, rigid registration, 150x192x192, written; one process, one thread"
    return [
        share("preprocess_scan", seconds, SECONDS_A_SCAN, 1, "CPU-seconds", f"{what}; peer: the most that it may take"),
        share("preprocess_memory", gigabytes, GIGABYTES_A_SCAN, 1, "GB", f"{what}: peak resident memory, Python and "
              "libraries in it; peer: the most that it may take"),
        times_better("workers_2_vs_1", walls[2], walls[1], 1.8, "seconds",
                     f"wall time of {SCANS} scans, deepbet and rigid registration, 2 processes against 1, their start "
                     f"in it; {os.cpu_count()} cores"),
    ]


def template_scan() -> tuple[np.ndarray, np.ndarray]:
    """The template on the paper's grid with noise, so that it compresses as a scan does; image and mask."""
    image, mask = template_on(PAPER_GRID)
    noisy = image + np.random.default_rng(0).normal(0, 0.03, image.shape).astype(np.float32)
    return np.where(mask, (noisy - noisy[mask].mean()) / noisy[mask].std(), 0).astype(np.float32), mask


def _heads(folder: Path) -> list[str]:
    """Files to prepare: one real head, several times, or the template with noise."""
    path = HEAD
    if not HEAD.is_file():
        values, _, affine = template()
        noise = np.random.default_rng(0).normal(0, 0.03, values.shape)
        path = folder / "head.nii.gz"
        write_nifti(path, (100 * (values + noise)).clip(0).astype(np.float32), affine)
    return [str(path)] * SCANS


def _one_scan(path: str, output: Path) -> tuple[float, float]:
    """CPU-seconds (imports and template read before) and peak gigabytes of this process, for one scan."""
    template_on(PAPER_GRID)
    begun = time.process_time()
    done = prepare_scan(ScanJob("scan", path, "", output, EVERYTHING))
    if isinstance(done, str):
        raise RuntimeError(done)
    return time.process_time() - begun, memory_bytes("VmHWM") / 1e9


def _wall_seconds(heads: list[str], folder: Path, workers: int) -> float:
    cohort = pd.DataFrame({"participant": [str(row) for row in range(len(heads))], "session": "1", "dataset": "d",
                           "image_path": heads})
    begun = time.perf_counter()
    prepare(cohort, folder, Preparation(PAPER_GRID, "rigid", "deepbet"), workers)
    return time.perf_counter() - begun
