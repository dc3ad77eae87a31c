"""From a cohort's scans to a store.

Each scan: read upright, bias field, registration, brain mask, one resampling, intensity, quality figures, write.
Scans are prepared in parallel, one process and one thread each. One that fails is set aside with its reason;
one that is prepared already, from the same files with the same settings, is not prepared again. Where a setting
changed, scans are prepared anew, with the transforms found before if nothing changed that the search looks at.
"""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from kit.data import brain, intensity, quality
from kit.data.choices import BiasCorrection, Intensity, Mask, OrientationUnknown, Registration
from kit.data.grid import Grid
from kit.data.nifti import ScanError, read_mask
from kit.data.pool import run_all
from kit.data.register import KINDS, RegistrationError, find_transforms
from kit.data.resample import resample
from kit.data.scan_file import read_scan, scan_files
from kit.data.store import FORMAT, StoreError, claim, read_facts, remove_leftovers, scan_path, write_scan
from kit.data.table import check_cohort, scan_names, write_tables
from kit.data.template import TEMPLATE_NAME, white_matter_on
from kit.runs import progress


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared.

    Args:
        grid: where prepared arrays lie.
        registration: "affine", "rigid", or "none" for scans that already lie near MNI space.
        mask: "given" (the cohort's mask_path), "nonzero" (a skull-stripped scan's voxels above zero, holes
            filled), "template" (the template's brain carried back through an affine registration and fitted to the
            scan's edges), or the command "hd-bet" or "mri_synthstrip".
        bias_correction: "n4" or "none".
        intensity: "zscore" inside the mask, or "whitematter": the white-matter peak is 1.
        orientation_unknown: a scan whose header does not say where it lies is refused ("refuse"), or taken as
            stored in RAS order with its middle at the origin ("assume_ras").

    Raises:
        ValueError: a word that is none of these.
    """

    grid: Grid
    registration: Registration = "affine"
    mask: Mask = "given"
    bias_correction: BiasCorrection = "none"
    intensity: Intensity = "zscore"
    orientation_unknown: OrientationUnknown = "refuse"

    def record(self) -> dict[str, Any]:
        """Return what `preparation.json` says: what a store, and an encoder trained on it, must agree on."""
        return {
            "format": FORMAT, "axes": "zyx", "shape": list(self.grid.shape), "spacing_mm": self.grid.spacing_mm,
            "origin_mm": list(self.grid.origin_mm), "registration": self.registration, "mask": self.mask,
            "bias_correction": self.bias_correction, "intensity": self.intensity, "template": TEMPLATE_NAME,
            "versions": {name: version(name) for name in ("SimpleITK", "nibabel", "blosc2")},
        }


class Task(NamedTuple):
    """One scan to prepare."""

    scan: str
    image_path: str
    mask_path: str
    output: Path
    settings: Preparation


def prepare(cohort: pd.DataFrame, output_dir: str | Path, settings: Preparation,
            workers: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prepare a cohort's scans into a folder, going on from what is there.

    Args:
        cohort: a row a scan: participant, session, dataset, image_path, perhaps mask_path, and labels.
        output_dir: the folder, described in `kit.data.store`.
        settings: how.
        workers: processes, one scan each; 0 works in this process, for debugging.

    Returns:
        The index of prepared scans and the table of failed ones, both in the cohort's order and also written. The
        index has all the cohort's columns but those that end in `_path`, the figures of `kit.data.quality`,
        seconds (time taken), flags and pass (see `kit.data.quality.flagged`).

    Raises:
        PreparationError: the cohort cannot be prepared so, or none of its scans could be.
    """
    folder = Path(output_dir)
    names = scan_names(cohort)
    check_cohort(cohort, names, settings.mask)
    if changes := claim(folder, settings.record()):
        print(f"another preparation was here ({'; '.join(changes)}): its scans are prepared anew")
    remove_leftovers(folder)
    masks = cohort["mask_path"].fillna("") if settings.mask == "given" else [""] * len(cohort)
    tasks = [
        Task(name, str(image), str(mask), scan_path(folder, name), settings)
        for name, image, mask in zip(names, cohort["image_path"], masks, strict=True)
    ]
    outcomes = {task.scan: found for task in tasks if (found := _found(task))}
    with progress(total=len(tasks), initial=len(outcomes), desc="prepare", unit="scan") as bar:
        for task, outcome in run_all(prepare_scan, [task for task in tasks if task.scan not in outcomes], workers):
            outcomes[task.scan] = outcome or "its process was killed, twice: most likely not enough memory"
            bar.update()
    return write_tables(cohort, names, outcomes, folder)


def prepare_scan(task: Task) -> dict[str, float] | str:
    """Prepare one scan; return its quality numbers, or the reason why it failed."""
    start = perf_counter()
    try:
        search, source = _sources(task)
        image, mask, notes = _to_template_space(task, _known(task, search))
        notes["quality"]["seconds"] = round(perf_counter() - start, 2)
        notes |= {"search": search, "source": source}
        write_scan(task.output, image, mask, task.scan, task.settings.grid.affine, notes)
        return notes["quality"]
    except Exception as error:  # whatever one scan does, the others go on
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # but a full disk concerns them all
        if isinstance(error, ScanError | RegistrationError):
            return str(error)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _to_template_space(task: Task, known: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the image and the mask on the grid, and the transforms and quality figures as notes.

    `known` has the transforms that an earlier search found, by kind.
    """
    settings, grid = task.settings, task.settings.grid
    array, affine = _read(task)
    native_mask = _mask_before(task, array, affine)
    if settings.bias_correction == "n4":
        array = intensity.correct_bias(array, affine, native_mask)
    wanted = {settings.registration, *(["affine"] if settings.mask == "template" else [])}
    if settings.registration == "none":
        wanted = set()
    matrices = {kind: np.array(matrix) for kind, matrix in known.items()}
    if not wanted <= set(matrices):
        found = find_transforms(array, affine, tuple(kind for kind in KINDS if kind in wanted))
        matrices |= {kind: matrix for kind, (matrix, _) in found.items()}
    matrix = matrices.get(settings.registration, np.eye(4))
    if native_mask is None:  # an affine found before, under other settings, is no guide
        native_mask = brain.template_mask(array, affine, matrices["affine"] if "affine" in wanted else matrix)
    image = resample(array, affine, matrix, grid.shape, grid.affine)
    # Smoothed as the image is, then cut at a half: as many voxels on a coarse grid as volume.
    mask = resample(native_mask, affine, matrix, grid.shape, grid.affine) > 0.5
    figures = quality.figures(array, affine, native_mask, matrix, image, mask, grid)
    scaled = (intensity.z_score(image, mask) if settings.intensity == "zscore"
              else intensity.by_white_matter(image, mask, white_matter_on(grid)))
    transforms = {kind: each.tolist() for kind, each in matrices.items()}
    return scaled, mask, {"transform": matrix.tolist(), "transforms": transforms, "quality": figures}


def _read(task: Task) -> tuple[np.ndarray, np.ndarray]:
    return read_scan(task.image_path, no_codes_ok=task.settings.orientation_unknown == "assume_ras")


def _mask_before(task: Task, array: np.ndarray, affine: np.ndarray) -> np.ndarray | None:
    """Return the brain in the scan's own voxels, bool (z, y, x); None where registration must find it."""
    kind = task.settings.mask
    if kind == "template":
        return None
    if kind == "nonzero":
        return brain.nonzero_mask(array, affine)
    if kind in brain.COMMANDS:
        return brain.tool_mask(kind, array, affine)
    if not task.mask_path:
        raise ScanError("mask: no mask_path given for this scan")
    return read_mask(task.mask_path, array, affine, task.settings.orientation_unknown == "assume_ras")


def _sources(task: Task) -> tuple[str, str]:
    """Return digests of what a scan's transforms are searched in, and of all that it is made from.

    Both cover its files' paths, sizes and dates; the first the settings before the search, the second all settings.
    """
    files = []
    for path in filter(None, (task.image_path, task.mask_path)):
        try:
            stats = [(file.name, file.stat()) for file in scan_files(path)]
        except OSError as error:
            raise ScanError("no such file" if path == task.image_path else "mask: no such file") from error
        files.append([path, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
    settings = asdict(task.settings)
    before = [settings["orientation_unknown"], settings["bias_correction"],
              settings["mask"] if settings["bias_correction"] == "n4" else None]  # N4 fits inside the mask
    search, source = (hashlib.sha256(json.dumps([FORMAT, files, each]).encode()).hexdigest()
                      for each in (before, settings))
    return search, source


def _known(task: Task, search: str) -> dict[str, Any]:
    """Return the transforms, by kind, that an earlier preparation of these files found."""
    try:
        notes = read_facts(task.output)["notes"]
        return notes["transforms"] if notes.get("search") == search else {}
    except StoreError:
        return {}


def _found(task: Task) -> dict[str, float] | None:
    """Return the quality numbers of a scan that is prepared already from these files, else None."""
    try:
        notes = read_facts(task.output)["notes"]
        return notes["quality"] if notes["source"] == _sources(task)[1] else None
    except (StoreError, ScanError):
        return None
