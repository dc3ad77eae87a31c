"""From a cohort's scans to a store.

Each scan: read, brain mask, orientation, bias field, registration, one resampling, intensity, QC metrics, write.
Scans are prepared in parallel, one process and one thread each. One that fails is set aside with its reason;
one that is prepared already, from the same files with the same settings, is not prepared again. Where a setting
changed, scans are prepared anew, with the transforms found before if nothing changed that the search looks at.
"""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from nibabel.affines import from_matvec

from kit.preprocess import intensity, quality
from kit.preprocess import skullstrip as brain
from kit.preprocess.index import check_cohort, scan_names, write_tables
from kit.preprocess.nifti import ScanError, other_form, upright
from kit.preprocess.pool import run_all
from kit.preprocess.register import (
    ORIENTATIONS,
    UPRIGHT,
    RegistrationError,
    Transforms,
    find_orientation,
    find_transforms,
    first_look,
    likeliest,
    rotation_angle,
)
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan, scan_files
from kit.preprocess.settings import Preparation
from kit.preprocess.template import tissue_on
from kit.runs import progress
from kit.store.store import FORMAT, StoreError, claim, read_facts, remove_leftovers, scan_path, write_scan

KINDS = Transforms._fields
# Beyond this rotation from the template's pose, deepbet is shown the head again, level: its masks of heads turned by 31
# to 35 degrees moved the pose by up to 1.3 mm. Half of all heads lie at 13 degrees, one in eight beyond 20.
LEVEL_DEG = 20.0
# What it is shown then: from below, behind and left of the brain's centre to above, before and right of it, (x, y, z).
LEVEL_BOX_MM = ((-95, -115, -110), (95, 115, 95))


class ScanTask(NamedTuple):
    """One scan to prepare."""

    scan: str
    image_path: str
    mask_path: str
    output: Path
    settings: Preparation


def prepare(cohort: pd.DataFrame, output_dir: str | Path, settings: Preparation, workers: int = 1,
            brain_ml: tuple[float, float] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prepare a cohort's scans into a folder, going on from what is there.

    Args:
        cohort: a row a scan: participant, session, dataset, image_path, perhaps mask_path, and labels.
        output_dir: the folder, described in `kit.store.store`.
        settings: how.
        workers: processes, one scan each; 0 works in this process, for debugging.
        brain_ml: volumes (ml) between which a brain is not flagged; None: those of adults.

    Returns:
        The index of prepared scans and the table of failed ones, both in the cohort's order and also written. The
        index has all the cohort's columns but those that end in `_path`, mask_source, the metrics of
        `kit.preprocess.quality`, seconds (time taken), header_note (where a header says two places; those scans are
        also printed), flags and unusable (see `kit.preprocess.quality.flagged`).

    Raises:
        PreparationError: the cohort cannot be prepared so, or none of its scans could be.
    """
    folder = Path(output_dir)
    names = scan_names(cohort)
    check_cohort(cohort, names, settings.mask)
    if changes := claim(folder, settings.record()):
        print(f"another preparation was here ({'; '.join(changes)}): its scans are prepared anew")
    remove_leftovers(folder)
    wanted = settings.mask in ("auto", "given") and "mask_path" in cohort
    masks = cohort["mask_path"].fillna("") if wanted else [""] * len(cohort)
    tasks = [
        ScanTask(name, str(image), str(mask), scan_path(folder, name), settings)
        for name, image, mask in zip(names, cohort["image_path"], masks, strict=True)
    ]
    outcomes = {task.scan: found for task in tasks if (found := _found(task))}
    with progress(total=len(tasks), initial=len(outcomes), desc="prepare", unit="scan") as bar:
        todo = [task for task in tasks if task.scan not in outcomes]
        for task, outcome in run_all(prepare_scan, todo, workers):
            outcomes[task.scan] = outcome or "its process was killed, twice: most likely not enough memory"
            bar.update()
    index, failed = write_tables(cohort, names, outcomes, folder, brain_ml)
    if len(noted := index[index["header_note"] != ""]):
        some = [f"{row.scan} ({row.header_note})" for row in noted.head(3).itertuples()]
        print(f"{len(noted)} scans whose headers say two places: {', '.join(some)}{', ...' * (len(noted) > 3)}")
    return index, failed


def prepare_scan(task: ScanTask) -> dict[str, Any] | str:
    """Prepare one scan; return its QC metrics and what they are made of, or the reason why it failed."""
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


def _to_template_space(task: ScanTask, known: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the image and the mask on the grid, and the transforms and QC metrics as notes.

    `known` has the transforms that an earlier search found, by kind, the orientation and the pose.
    """
    settings, grid = task.settings, task.settings.grid
    head = _upright_head(task, known)
    array, affine, native_mask = head.array, head.affine, head.brain.mask
    if settings.bias_correction == "n4":
        array = intensity.correct_bias(array, affine, native_mask)
    turn, transforms = head.orientation, None  # transforms are stored to the millimetres that the header says
    if settings.registration != "none":
        transforms = (Transforms(*(turn.T @ np.array(known[kind]) for kind in KINDS)) if known
                      else find_transforms(array, affine, native_mask))
    matrix = getattr(transforms, settings.registration, np.eye(4))
    image = resample(array, affine, matrix, grid.shape, grid.affine)
    # Smoothed as the image is, then cut at a half: as many voxels on a coarse grid as volume.
    mask = resample(native_mask, affine, matrix, grid.shape, grid.affine) > 0.5
    scaled = (intensity.z_score(image, mask) if settings.intensity == "zscore"
              else intensity.by_white_matter(image, mask, tissue_on(grid, "white")))
    metrics = quality.measure(array, affine, native_mask, transforms, turn)
    if transforms:
        known = {"orientation": turn.tolist(), "pose": None if head.pose is None else head.pose.tolist(),
                 **{kind: (turn @ getattr(transforms, kind)).tolist() for kind in KINDS}}
    return scaled, mask, {"transform": (turn @ matrix).tolist(), "transforms": known,
                          "quality": {"mask_source": head.brain.source, "header_note": head.brain.note, **metrics}}


class UprightScan(NamedTuple):
    """A scan, upright, and its brain."""

    array: np.ndarray  # float32 (z, y, x)
    affine: np.ndarray  # (4, 4), voxel (x, y, z) to mm, RAS+ once upright
    brain: brain.Brain
    orientation: np.ndarray = np.eye(4)  # (4, 4) rotation from these millimetres to those that the header says
    pose: np.ndarray | None = None  # as it was shown to deepbet again; see `_level`


def _upright_head(task: ScanTask, known: dict[str, Any]) -> UprightScan:
    """Read a scan, find its brain, and turn both upright where the header's orientation is wrong.

    deepbet looks for upright heads, and finds half a brain in others: where its brain is not much like the template's,
    it is shown all 24 orientations, and the one whose brain is most like it is taken. A tilted head it is shown again,
    level, and the mask that is more like the template's brain is taken.
    `known` is what an earlier preparation found; empty: look.
    """
    kind, no_codes_ok = task.settings.mask, task.settings.orientation_unknown == "assume_ras"
    array, affine = read_scan(task.image_path, no_codes_ok=no_codes_ok)
    found = brain.find_brain(kind, array, affine, task.mask_path, no_codes_ok, other_form(task.image_path))
    head = UprightScan(array, affine, found)
    if task.settings.registration == "none":
        return head
    if known:
        head = _turn(head, np.array(known["orientation"]))
        return _level(head, np.array(known["pose"])) if known["pose"] else head
    look = first_look(head.array, head.affine, head.brain.mask)
    if look.likeness < UPRIGHT and not np.array_equal(orientation := _orientation(head), np.eye(4)):
        head = _turn(head, orientation)
        look = first_look(head.array, head.affine, head.brain.mask)
    if head.brain.source == "deepbet" and (look.likeness < UPRIGHT or rotation_angle(look.rotation) > LEVEL_DEG):
        try:
            level = _level(head, from_matvec(look.rotation, look.centre))
            if first_look(level.array, level.affine, level.brain.mask).likeness > look.likeness:
                return level
        except (ScanError, RegistrationError):  # it finds none, or one outside the scan
            pass
    return head


def _orientation(head: UprightScan) -> np.ndarray:
    """Return the likeliest of 24 orientations, (4, 4)."""
    if head.brain.source != "deepbet":
        return find_orientation(head.array, head.affine, head.brain.mask)
    return from_matvec(likeliest(
        [_quick_look(*_turned(head.array, head.affine, from_matvec(turn))) for turn in ORIENTATIONS]))


def _quick_look(array: np.ndarray, affine: np.ndarray) -> float:
    """How much the brain that deepbet finds in such a head is like the template's; the higher the better."""
    try:
        return first_look(array, affine, brain.deepbet_mask(array, quick=True)).likeness
    except ScanError:  # it finds none
        return 0.0


def _turn(head: UprightScan, orientation: np.ndarray) -> UprightScan:
    """Undo a wrong orientation of a head; deepbet looks anew."""
    if np.array_equal(orientation, np.eye(4)):
        return head
    array, affine = _turned(head.array, head.affine, orientation)
    if head.brain.source == "deepbet":
        mask = brain.deepbet_mask(array)
    else:
        mask = _turned(head.brain.mask.astype(np.float32), head.affine, orientation)[0] > 0.5
    return UprightScan(array, affine, head.brain._replace(mask=mask), orientation)


def _level(head: UprightScan, pose: np.ndarray) -> UprightScan:
    """Let deepbet look again at a tilted head, level and cut out about the brain.

    `pose` (4, 4) takes the level box's millimetres, from the brain's centre, to the head's.

    Raises:
        ScanError: it finds no brain there.
    """
    to = from_matvec(np.eye(3), LEVEL_BOX_MM[0])
    sides = np.subtract(LEVEL_BOX_MM[1], LEVEL_BOX_MM[0]).astype(int) + 1
    mask = brain.deepbet_mask(resample(head.array, head.affine, pose, tuple(sides[::-1].tolist()), to))
    mask = resample(mask, to, np.linalg.inv(pose), head.array.shape, head.affine) > 0.5
    return head._replace(brain=head.brain._replace(mask=mask), pose=pose)


def _turned(array: np.ndarray, affine: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo a wrong orientation of an array (z, y, x) and its affine, voxels only flipped and swapped."""
    return upright(array.T, orientation.T @ affine)


def _sources(task: ScanTask) -> tuple[str, str]:
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
    before = [settings["orientation_unknown"], settings["bias_correction"], settings["mask"]]
    search, source = (hashlib.sha256(json.dumps([FORMAT, files, each]).encode()).hexdigest()
                      for each in (before, settings))
    return search, source


def _known(task: ScanTask, search: str) -> dict[str, Any]:
    """Return the transforms and the orientation that an earlier preparation of these files found, by name."""
    try:
        notes = read_facts(task.output)["notes"]
        return notes["transforms"] if notes.get("search") == search else {}
    except StoreError:
        return {}


def _found(task: ScanTask) -> dict[str, Any] | None:
    """Return the QC metrics of a scan that is prepared already from these files, else None."""
    try:
        notes = read_facts(task.output)["notes"]
        return notes["quality"] if notes["source"] == _sources(task)[1] else None
    except (StoreError, ScanError):
        return None
