"""From a scan's file to its prepared array, then a whole cohort, in parallel, each scan whole or not at all.

Steps: read and turn to RAS, find where it lies in MNI152 (`registration`), find the brain (`mask`), resample once from
native space to the grid, z-score inside the mask, write.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from kit.data.cohort import COLUMNS
from kit.data.grid import Grid
from kit.data.nifti import ScanError, read_nifti
from kit.data.register import (
    TEMPLATE_NAME,
    RegistrationError,
    correlation,
    find_transform,
    resample,
    template,
)
from kit.data.store import FORMAT, read_meta, scan_path, write_scan
from kit.runs import progress, shown, write_json, write_table

LEAST_BRAIN_ML = 100.0  # less is no brain: a child's at birth has 350
IN_FLIGHT = 4  # scans handed to each process ahead


class PreparationError(RuntimeError):
    """A cohort cannot be prepared as asked; the message says why and what to do."""


class Preparation(BaseModel):
    """How every scan of a store is prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, int, int] = (150, 192, 192)  # voxels (z, y, x)
    spacing_mm: float = 1.0
    registration: Literal["none", "rigid", "affine"] = "rigid"
    mask: Literal["given", "nonzero", "template"] = "given"

    @property
    def grid(self) -> Grid:
        """Where the prepared arrays lie."""
        return Grid(self.shape, self.spacing_mm)

    def record(self) -> dict[str, Any]:
        """What `preparation.json` says of all scans of a store."""
        return {"format": FORMAT, "axes": "zyx", "shape": list(self.grid.shape), "spacing_mm": self.grid.spacing_mm,
                "origin_mm": list(self.grid.origin_mm), "registration": self.registration, "mask": self.mask,
                "intensity": "zscore", "template": TEMPLATE_NAME,
                "versions": {name: version(name) for name in ("SimpleITK", "nibabel", "blosc2")}}


def prepare(cohort: pd.DataFrame, output_dir: Path, settings: Preparation,
            workers: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prepare every scan of a cohort; a scan that fails is set aside with its reason, and the run goes on.

    Scans that were made from the same file by the same settings are not made again.

    Args:
        cohort: one scan a row, from `kit.data.cohort.read_cohort`.
        output_dir: of the store.
        settings: for all scans.
        workers: processes, one thread each.

    Returns:
        the index (scan, participant, session, dataset, labels, brain_ml, template_similarity, seconds, checksum) and
        the failed scans (scan, participant, session, reason).

    Raises:
        PreparationError: the folder holds scans prepared otherwise, or two scans would have one name.
    """
    _claim(output_dir, settings)
    names = scan_names(cohort)
    jobs = [(name, row["image_path"], row["mask_path"]) for name, row in zip(names, cohort.to_dict("records"), strict=True)]
    results: dict[str, dict[str, Any]] = {}
    for name, result in progress(_in_parallel(jobs, output_dir, settings, workers), total=len(jobs), desc="scans"):
        results[name] = result
    labels = cohort.drop(columns=["image_path", "mask_path"]).assign(scan=names)
    table = labels[["scan", *(column for column in labels if column != "scan")]].merge(
        pd.DataFrame([{"scan": name, **result} for name, result in results.items()]), on="scan")
    if "reason" not in table:
        table["reason"] = None
    good = table["reason"].isna()
    index = table[good].drop(columns="reason").reset_index(drop=True)
    failed = table.loc[~good, ["scan", *COLUMNS[:3], "reason"]].reset_index(drop=True)
    write_table(output_dir / "failed.csv", failed)
    write_table(output_dir / "index.csv", index)
    return index, failed


def scan_names(cohort: pd.DataFrame) -> list[str]:
    """A name for each scan that is safe as a file's: dataset, participant, session.

    Raises:
        PreparationError: two scans would have the same name.
    """
    joined = cohort["dataset"].astype(str) + "_" + cohort["participant"] + "_" + cohort["session"]
    names = [re.sub(r"[^\w.-]+", "-", name) for name in joined]
    if doubled := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise PreparationError(f"{len(doubled)} scan names are used twice, the first: {doubled[0]}; "
                               "give each scan its own participant and session")
    return names


def prepare_scan(image_path: str, mask_path: str, settings: Preparation) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Prepare one scan.

    Returns:
        image (depth, height, width) float32 and mask (depth, height, width) bool, on the grid; and brain_ml (of the
        native brain), template_similarity (correlation with the template inside the mask) and the transform
        (MNI millimetres to the scan's, 16 numbers in rows).

    Raises:
        ScanError, RegistrationError: the scan is set aside; the message is the reason.
    """
    grid = settings.grid
    array, affine = read_nifti(image_path)
    matrix = np.eye(4) if settings.registration == "none" else find_transform(array, affine, settings.registration)[0]
    mask, brain_ml = _brain(array, affine, mask_path, matrix, settings)
    if not mask.any():
        raise ScanError("the brain mask is empty on the grid: the scan lies elsewhere; register it")
    if brain_ml < LEAST_BRAIN_ML:
        raise ScanError(f"the brain mask holds {brain_ml:.0f} ml, no brain is smaller than {LEAST_BRAIN_ML:.0f} ml")
    image = resample(array, affine, matrix, grid.shape, grid.affine)
    inside = image[mask].astype(np.float64)
    if inside.std() == 0:
        raise ScanError("constant inside the brain mask")
    image = np.where(mask, (image - inside.mean()) / inside.std(), 0).astype(np.float32)
    similarity = correlation(image, _template_on(grid)[0], mask)
    return image, mask, {"brain_ml": round(brain_ml, 1), "template_similarity": round(similarity, 4),
                         "transform": matrix.ravel().tolist()}


def read_transform(folder: Path, scan: str) -> np.ndarray:
    """The (4, 4) matrix from MNI millimetres to the scan's own, RAS+, that a scan was prepared with."""
    return np.reshape(read_meta(scan_path(folder, scan))["transform"], (4, 4))


def _brain(array: np.ndarray, affine: np.ndarray, mask_path: str, matrix: np.ndarray,
           settings: Preparation) -> tuple[np.ndarray, float]:
    """The brain mask on the grid, and the native brain's volume in ml."""
    grid = settings.grid
    if settings.mask == "template":
        on_grid = _template_on(grid)[1]
        return on_grid, float(template()[1].sum()) / 1000 * abs(np.linalg.det(matrix[:3, :3]))
    native = _given_mask(mask_path, array.shape, affine) if settings.mask == "given" else _nonzero_mask(array)
    volume = float(native.sum()) * abs(np.linalg.det(affine[:3, :3])) / 1000
    return resample(native, affine, matrix, grid.shape, grid.affine) > 0.5, volume


def _given_mask(mask_path: str, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    if not mask_path:
        raise ScanError("mask is `given`, but the cohort names no mask_path for this scan")
    try:
        mask, mask_affine = read_nifti(mask_path)
    except ScanError as error:
        raise ScanError(f"its mask: {error}") from None
    if mask.shape != shape:
        raise ScanError(f"its mask has shape {mask.shape}, the scan {shape}, as (z, y, x)")
    if not np.allclose(mask_affine, affine, atol=0.01):
        raise ScanError("its mask lies elsewhere: the affines differ")
    return mask > 0.5


def _nonzero_mask(array: np.ndarray) -> np.ndarray:
    """What is above zero in a skull-stripped scan, its largest piece, holes filled."""
    above = array > 0
    if above.mean() > 0.9:
        raise ScanError("mask is `nonzero`, but the scan is not skull-stripped: it has hardly any zeros")
    pieces, count = ndimage.label(above)
    largest = pieces == np.argmax(np.bincount(pieces.ravel())[1:]) + 1 if count else above
    return ndimage.binary_fill_holes(largest)


_ON_GRID: dict[Grid, tuple[np.ndarray, np.ndarray]] = {}


def _template_on(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The template (depth, height, width) float32 and its brain mask, bool, on a grid; made once a process."""
    if grid not in _ON_GRID:
        values, mask, affine = template()
        on = [resample(part, affine, np.eye(4), grid.shape, grid.affine) for part in (values, mask)]
        _ON_GRID[grid] = (on[0], on[1] > 0.5)
    return _ON_GRID[grid]


def _claim(output_dir: Path, settings: Preparation) -> None:
    """Write the folder's record, or refuse a folder whose scans were prepared otherwise."""
    path, record = output_dir / "preparation.json", settings.record()
    if path.exists():
        old = json.loads(path.read_text())
        differences = [f"{name}: the folder has {old.get(name)}, asked for {value}" for name, value in record.items()
                       if name != "versions" and old.get(name) != value]
        if differences:
            raise PreparationError(f"{shown(output_dir)} holds scans prepared otherwise:\n  " + "\n  ".join(differences)
                                   + "\ngive another output_dir, or delete that folder")
    write_json(path, record)


def _one(name: str, image_path: str, mask_path: str, output_dir: Path, settings: Preparation) -> dict[str, Any]:
    """Prepare one scan into its file, unless it is there; what the index says of it, or the reason it failed."""
    started, path = time.monotonic(), scan_path(output_dir, name)
    try:
        source = _identity(image_path, mask_path, settings)
        meta = read_meta(path)
        if meta is None or meta.get("source") != source:
            image, mask, quality = prepare_scan(image_path, mask_path, settings)
            kept = {"scan": name, "source": source, **quality, "seconds": round(time.monotonic() - started, 2)}
            meta = {**kept, "checksum": write_scan(path, image, mask, kept)}
    except (ScanError, RegistrationError) as error:
        return {"reason": str(error)}
    except MemoryError:
        return {"reason": "not enough memory for this scan"}
    return {key: meta[key] for key in ("brain_ml", "template_similarity", "seconds", "checksum")}


def _identity(image_path: str, mask_path: str, settings: Preparation) -> str:
    """Changes when a scan's files or the settings do: a digest, so that no path is stored."""
    parts = [json.dumps({**settings.record(), "versions": None})]
    for path in filter(None, (image_path, mask_path if settings.mask == "given" else "")):
        if not Path(path).is_file():
            raise ScanError("no such file" if path == image_path else "its mask: no such file")
        stat = Path(path).stat()
        parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _in_parallel(jobs: list[tuple[str, str, str]], output_dir: Path, settings: Preparation,
                 workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each scan's result as it comes; a scan whose process is killed twice by the system is set aside."""
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            yield job[0], _one(*job, output_dir, settings)
        return
    waiting, suspects = list(reversed(jobs)), []
    while waiting:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            flying: dict[Future, tuple[str, str, str]] = {}
            try:
                while waiting or flying:
                    while waiting and len(flying) < workers * IN_FLIGHT:
                        job = waiting.pop()
                        flying[pool.submit(_one, *job, output_dir, settings)] = job
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield flying.pop(future)[0], result
            except BrokenProcessPool:
                suspects += [job for future, job in flying.items()]
    for job in suspects:  # one at a time, so that the scan that kills its process is known
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                yield job[0], pool.submit(_one, *job, output_dir, settings).result()
        except BrokenProcessPool:
            yield job[0], {"reason": "the process that prepared it was killed by the system, perhaps for its memory"}
