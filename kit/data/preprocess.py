"""From a cohort's scans to a store: read, register, mask, resample once, z-score, write.

Scans are prepared in parallel, one process and one thread each. One that fails is set aside with its reason;
one that is prepared already, from the same files with the same settings, is not prepared again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

from kit.data import register
from kit.data.grid import Grid
from kit.data.nifti import ScanError, read_mask, read_nifti
from kit.data.store import FORMAT, StoreError, claim, read_facts, scan_path, write_scan
from kit.runs import progress, write_table

REGISTRATIONS = ("none", *register.KINDS)
MASKS = ("given", "nonzero", "template")
QUALITY_COLUMNS = ("brain_ml", "template_similarity", "seconds")
# No brain is larger: where "nonzero" finds more, the scan still has its head or a background above zero.
MOST_BRAIN_ML = 2500.0


class PreparationError(ValueError):
    """A preparation that cannot start or that prepared nothing. Its message lists all that is wrong."""


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared.

    Args:
        grid: where prepared arrays lie.
        registration: "affine", "rigid", or "none" for scans that already lie near MNI space.
        mask: "given" (the cohort's mask_path), "nonzero" (a skull-stripped scan's voxels above zero, holes
            filled) or "template" (the template's brain, moved with the registration).

    Raises:
        ValueError: a word that is none of these.
    """

    grid: Grid
    registration: str = "affine"
    mask: str = "given"

    def __post_init__(self) -> None:
        for name, choices in (("registration", REGISTRATIONS), ("mask", MASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def record(self) -> dict[str, Any]:
        """Return what `preparation.json` says: what a store, and an encoder trained on it, must agree on."""
        return {
            "format": FORMAT,
            "axes": "zyx",
            "shape": list(self.grid.shape),
            "spacing_mm": self.grid.spacing_mm,
            "origin_mm": list(self.grid.origin_mm),
            "registration": self.registration,
            "mask": self.mask,
            "intensity": "zscore",
            "template": register.TEMPLATE_NAME,
            "versions": {name: version(name) for name in ("SimpleITK", "nibabel", "blosc2")},
        }


class Task(NamedTuple):
    """One scan to prepare."""

    scan: str
    image_path: str
    mask_path: str
    output: Path
    settings: Preparation


def prepare(
    cohort: pd.DataFrame, output_dir: str | Path, settings: Preparation, workers: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prepare a cohort's scans into a folder, going on from what is there.

    Args:
        cohort: a row a scan: participant, session, dataset, image_path, perhaps mask_path, and labels.
        output_dir: the folder, described in `kit.data.store`.
        settings: how.
        workers: processes, one scan each; 0 works in this process, for debugging.

    Returns:
        The index of prepared scans and the table of failed ones, both in the cohort's order and also written. The
        index has all the cohort's columns but those that end in `_path`, brain_ml (the brain's volume in
        the scan, millilitres), template_similarity (correlation with the template inside its brain mask on the
        grid) and seconds (time taken).

    Raises:
        PreparationError: the cohort cannot be prepared so, or none of its scans could be.
        StoreError: the folder holds another preparation.
    """
    folder = Path(output_dir)
    names = _scan_names(cohort)
    _check(cohort, names, settings)
    claim(folder, settings.record())
    masks = cohort["mask_path"].fillna("") if settings.mask == "given" else [""] * len(cohort)
    tasks = [
        Task(name, str(image), str(mask), scan_path(folder, name), settings)
        for name, image, mask in zip(names, cohort["image_path"], masks, strict=True)
    ]
    outcomes = {task.scan: found for task in tasks if (found := _found(task))}
    with progress(total=len(tasks), initial=len(outcomes), desc="prepare", unit="scan") as bar:
        for task, outcome in _run(prepare_scan, [task for task in tasks if task.scan not in outcomes], workers):
            outcomes[task.scan] = outcome or "its process was killed, twice: most likely not enough memory"
            bar.update()
    index, failed = _tables(cohort, names, outcomes)
    write_table(folder / "failed.csv", failed)
    write_table(folder / "index.csv", index)
    if index.empty:
        raise PreparationError(
            f"none of {len(failed)} scans could be prepared; the first, {failed.scan[0]}: {failed.reason[0]}"
        )
    return index, failed


def prepare_scan(task: Task) -> dict[str, float] | str:
    """Prepare one scan; return its quality numbers, or the reason why it failed."""
    start = perf_counter()
    try:
        source = _source(task)
        image, mask, notes = _to_template_space(task)
        notes["quality"]["seconds"] = round(perf_counter() - start, 2)
        write_scan(task.output, image, mask, task.scan, task.settings.grid.affine, notes | {"source": source})
        return notes["quality"]
    except Exception as error:  # whatever one scan does, the others go on
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # but a full disk concerns them all
        if isinstance(error, ScanError | register.RegistrationError):
            return str(error)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def z_score(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image with mean 0 and deviation 1 inside the mask and 0 outside, float32.

    Raises:
        ScanError: the mask is empty, or the image constant inside it.
    """
    if not mask.any():
        raise ScanError("no brain inside the grid: check the registration and the mask")
    inside = image[mask].astype(np.float64)
    if inside.std() <= 1e-6 * np.abs(inside).max():
        raise ScanError("constant inside the brain mask: scan and mask do not overlap on the grid")
    scored = np.zeros(image.shape, np.float32)
    scored[mask] = (inside - inside.mean()) / inside.std()
    return scored


def _to_template_space(task: Task) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the z-scored image and the mask on the grid, and the transform and quality numbers as notes."""
    settings, grid = task.settings, task.settings.grid
    array, affine = read_nifti(task.image_path)
    native_mask = _native_mask(task, array, affine)
    matrix = np.eye(4)
    if settings.registration != "none":
        matrix, _ = register.find_transform(array, affine, settings.registration)
    image = register.resample(array, affine, matrix, grid.shape, grid.affine)
    like, like_mask = register.template_on(grid)
    if native_mask is None:
        mask = like_mask
        brain_ml = _millilitres(register.template()[1], register.template()[2]) * abs(np.linalg.det(matrix))
    else:
        # Smoothed as the image is, then cut at a half: as many voxels on a coarse grid as volume.
        mask = register.resample(native_mask, affine, matrix, grid.shape, grid.affine) > 0.5
        brain_ml = _millilitres(native_mask, affine)
    quality = {
        "brain_ml": round(float(brain_ml), 1),
        "template_similarity": round(register.correlation(image, like, like_mask), 4),
    }
    return z_score(image, mask), mask, {"transform": matrix.tolist(), "quality": quality}


def _native_mask(task: Task, array: np.ndarray, affine: np.ndarray) -> np.ndarray | None:
    """Return the brain in the scan's own voxels, bool (z, y, x); None where the template's brain serves."""
    if task.settings.mask == "template":
        return None
    if task.settings.mask == "nonzero":
        mask = ndimage.binary_fill_holes(array > 0)
        if (volume := _millilitres(mask, affine)) > MOST_BRAIN_ML:
            raise ScanError(f"{volume:.0f} ml above zero, more than a brain: is the scan skull-stripped?")
        return mask
    if not task.mask_path:
        raise ScanError("mask: no mask_path given for this scan")
    return read_mask(task.mask_path, array, affine)


def _millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def _scan_names(cohort: pd.DataFrame) -> list[str]:
    """Return a name a row that any file system takes: dataset_participant_session."""
    parts = cohort[["dataset", "participant", "session"]].fillna("").astype(str)
    safe = parts.map(lambda part: re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-."))
    return ["_".join(filter(None, row)) for row in safe.itertuples(index=False)]


def _check(cohort: pd.DataFrame, names: list[str], settings: Preparation) -> None:
    wrong = []
    if cohort.empty:
        wrong.append("the cohort has no scans")
    folded = pd.Series(names, dtype=str).str.casefold()
    if folded.duplicated().any():
        twice = sorted({names[row] for row in np.flatnonzero(folded.duplicated())})
        some = ", ".join(twice[:5]) + " ..." * (len(twice) > 5)
        wrong.append(f"several rows are called {some}: each needs its own dataset, participant and session")
    taken = sorted({"scan", *QUALITY_COLUMNS} & set(cohort))
    if taken:
        wrong.append(f"columns that the index adds itself: {', '.join(taken)}; rename them in the cohort")
    if settings.mask == "given" and ("mask_path" not in cohort or not cohort["mask_path"].fillna("").any()):
        wrong.append("mask: 'given' needs a column mask_path; otherwise use 'nonzero' or 'template'")
    if wrong:
        raise PreparationError("; ".join(wrong))


def _source(task: Task) -> str:
    """Return a digest of what a scan is made from: its files' paths, sizes and dates, and the settings."""
    files = []
    for path in filter(None, (task.image_path, task.mask_path)):
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise ScanError("no such file" if path == task.image_path else "mask: no such file") from error
        files.append([path, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([FORMAT, files, asdict(task.settings)]).encode()).hexdigest()


def _found(task: Task) -> dict[str, float] | None:
    """Return the quality numbers of a scan that is prepared already from these files, else None."""
    try:
        notes = read_facts(task.output)["notes"]
        return notes["quality"] if notes["source"] == _source(task) else None
    except (StoreError, ScanError):
        return None


def _tables(cohort: pd.DataFrame, names: list[str], outcomes: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the index and the failed scans; the index says nothing of where files lay."""
    table = cohort.reset_index(drop=True)
    table.insert(0, "scan", names)
    good = np.array([isinstance(outcomes[name], dict) for name in names], dtype=bool)
    index = table[good].drop(columns=[name for name in table if name.endswith("_path")]).reset_index(drop=True)
    for column in QUALITY_COLUMNS:
        index[column] = [outcomes[name][column] for name in index["scan"]]
    failed = table[~good].reset_index(drop=True)
    failed["reason"] = [outcomes[name] for name in failed["scan"]]
    return index, failed[["scan", "participant", "session", "image_path", "reason"]]


def _run(function: Callable[[Task], Any], tasks: list[Task], workers: int) -> Iterator[tuple[Task, Any]]:
    """Yield each task with its result, in the order they end; with None if it kills its process, twice.

    A killed process breaks its whole pool. Tasks in flight are then tried again one by one, so that the one at
    fault is known, and the others go on together.
    """
    if workers == 0:
        yield from ((task, function(task)) for task in tasks)
        return
    waiting, suspects = deque(tasks), deque()
    while waiting or suspects:
        queue, together = (suspects, 1) if suspects else (waiting, workers)
        flying: dict = {}
        with ProcessPoolExecutor(together, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                while queue or flying:
                    # A few in flight are enough: the rest of a large cohort waits here, not in the pool.
                    while queue and len(flying) < (1 if queue is suspects else together + 1):
                        flying[pool.submit(function, queue[0])] = queue[0]
                        queue.popleft()
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield flying.pop(future), result
            except BrokenProcessPool:
                if queue is suspects:
                    yield from ((task, None) for task in flying.values())
                else:
                    suspects.extend(flying.values())
