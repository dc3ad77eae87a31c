"""Prepare a cohort's scans into a store.

Each scan: read, brain mask, orientation, bias field, registration, one resampling, intensity, QC metrics, write.
Scans are prepared in parallel, one process and one thread each. A scan that fails is set aside with its reason.
A scan already prepared from the same files with the same settings is skipped. If a setting has changed, scans are
prepared again, but keep their transforms unless the change affects the registration search.
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

from kit.preprocess import intensity, quality, skullstrip
from kit.preprocess.index import MISSING, PreparationError, check_cohort, scan_names, write_tables
from kit.preprocess.nifti import ScanError, other_form, upright
from kit.preprocess.pool import DIED_TWICE, run_all
from kit.preprocess.register import (
    ORIENTATIONS,
    UPRIGHT,
    RegistrationError,
    Transforms,
    find_orientation,
    find_transforms,
    initial_pose,
    likeliest,
    rotation_angle,
)
from kit.preprocess.resample import one_thread, resample
from kit.preprocess.scan_file import read_scan, scan_files
from kit.preprocess.settings import Preparation
from kit.preprocess.template import tissue_on
from kit.runs import link_whole, progress
from kit.store.store import FORMAT, StoreError, claim, read_facts, remove_leftovers, scan_path, write_scan

KINDS = Transforms._fields
# Increase this when the search, a metric or a refusal changes: scans prepared before are then prepared again.
METHOD = 3
# Heads rotated further than this from the template's pose are levelled and shown to deepbet again: its masks of heads
# turned by 31 to 35 degrees moved the pose by up to 1.3 mm. The median head lies at 13 degrees, one in eight beyond 20.
LEVEL_DEG = 20.0
# The levelled field of view around the brain's centre, (x, y, z): lower left posterior, upper right anterior corner.
LEVEL_BOX_MM = ((-95, -115, -110), (95, 115, 95))

# A full or read-only disk, or a file server that is away, fails every scan. EIO is not among these: it may be one
# damaged file.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
               errno.EHOSTDOWN, errno.ESHUTDOWN}


class ScanJob(NamedTuple):
    """One scan to prepare."""

    scan: str
    image_path: str
    mask_path: str
    output: Path
    settings: Preparation


def prepare(cohort: pd.DataFrame, output_dir: str | Path, settings: Preparation, workers: int = 1,
            brain_ml: tuple[float, float] | None = None, part: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prepare a cohort's scans into a folder, continuing from what is already there.

    Args:
        cohort: one scan a row: participant, session, dataset, image_path, optionally mask_path, and labels.
        output_dir: the folder; see `kit.store.store`.
        settings: how to prepare them.
        workers: number of processes, one scan each; 0 works in this process, for debugging.
        brain_ml: brain volumes (ml) between which a scan is not flagged; None means the limits for adults.
        part: whether the cohort is a shard of a larger one, so that it may have no good scan. The folder is then
            `<merged>/shards/<shard>`, and scans are also taken from `<merged>/scans`, where another number of shards
            may have left them; see `kit.preprocess.index.merge_shards`.

    Returns:
        The index of prepared scans and the table of failed ones, both in the cohort's order and also written. The
        index has scan (its name), the cohort's columns except those ending in `_path`, mask_source, the metrics
        of `kit.preprocess.quality`, seconds (time taken), header_note (if the sform and qform of the scan or of its
        mask disagree; those scans are also printed), flags and unusable (see `kit.preprocess.quality.flagged`).

    Raises:
        PreparationError: the cohort cannot be prepared with these settings, every scan failed (see
            `kit.preprocess.index.write_tables`), or the disk did (see `DISK_ERRORS`).
    """
    folder = Path(output_dir)
    names = scan_names(cohort)
    check_cohort(cohort, names, "auto" if part else settings.mask)  # a shard may have none of the masks
    if changes := claim(folder, settings.record()):
        print(f"the settings have changed ({'; '.join(changes)}): scans are prepared again")
    remove_leftovers(folder)
    wanted = settings.mask in ("auto", "given") and "mask_path" in cohort
    masks = cohort["mask_path"].fillna("") if wanted else [""] * len(cohort)
    jobs = [
        ScanJob(name, str(image), str(mask), scan_path(folder, name), settings)
        for name, image, mask in zip(names, cohort["image_path"], masks, strict=True)
    ]
    if part:
        _take_prepared(jobs, folder.parent.parent)
    outcomes: dict[str, dict[str, Any] | str] = {job.scan: found for job in jobs if (found := _found(job))}
    with progress(total=len(jobs), initial=len(outcomes), desc="prepare", unit="scan") as bar:
        todo = [job for job in jobs if job.scan not in outcomes]
        for job, outcome in run_all(prepare_scan, todo, workers):
            outcomes[job.scan] = outcome or DIED_TWICE
            bar.update()
    index, failed = write_tables(cohort, names, outcomes, folder, brain_ml, part)
    if len(noted := index[index["header_note"] != ""]):
        some = [f"{row.scan} ({row.header_note})" for row in noted.head(3).itertuples()]
        print(f"{len(noted)} scans whose sform and qform, or their mask's, disagree: "
              f"{', '.join(some)}{', ...' * (len(noted) > 3)}")
    return index, failed


def _take_prepared(jobs: list[ScanJob], merged: Path) -> None:
    """Link scans that this shard lacks from the merged folder or other shards; `_found` and `_known` check them."""
    homes = [*sorted((merged / "shards").glob("*-of-*"), reverse=True), merged]  # the last one's file wins
    there = {path.name: path for home in homes for path in scan_path(home, "any").parent.glob("*")}  # listed once
    for job in jobs:
        if not job.output.exists() and job.output.name in there:
            link_whole(there[job.output.name], job.output)


def prepare_scan(job: ScanJob) -> dict[str, Any] | str:
    """Prepare one scan; return its quality columns of the index, or the reason why it failed.

    Raises:
        PreparationError: the disk or its server fails, see `DISK_ERRORS`.
    """
    start = perf_counter()
    try:
        search_digest, full_digest = _digests(job)
        with one_thread():  # resampling too: else each worker's would take all cores
            image, mask, notes = _to_template_space(job, _known(job, search_digest))
        notes["quality"]["seconds"] = round(perf_counter() - start, 2)
        notes |= {"search": search_digest, "source": full_digest}
        write_scan(job.output, image, mask, job.scan, job.settings.grid.affine, notes)
        return notes["quality"]
    except Exception as error:  # one bad scan must not stop the others
        if disk := _disk_error(error):
            full = disk.errno in (errno.ENOSPC, errno.EDQUOT)
            where = disk.filename or (job.output if full else job.image_path)
            raise PreparationError(f"{job.scan}: {disk.strerror} ({where}); this affects all scans. Run it again once "
                                   "there is space, or the disk answers; finished scans are kept") from error
        if isinstance(error, ScanError | RegistrationError):
            return str(error)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of `DISK_ERRORS` that this one is or was raised from."""
    while error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _to_template_space(job: ScanJob, known: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the image and mask on the grid, and notes with the transforms and QC metrics.

    `known` holds what an earlier search found: the transforms by kind, the orientation and the pose.
    """
    settings, grid = job.settings, job.settings.grid
    head = _upright_head(job, known)
    array, affine, native_mask = head.array, head.affine, head.brain.mask
    if settings.bias_correction == "n4":
        array = intensity.correct_bias(array, affine, native_mask)
    if settings.intensity == "whitematter":
        intensity.check_positive(array[native_mask], "white-matter scaling", "intensity: zscore")
    # stored transforms map MNI millimetres to the header's; those used here map them to the upright head's
    turn, transforms = head.orientation, None
    if settings.registration != "none":
        transforms = (Transforms(*(turn.T @ np.array(known[kind]) for kind in KINDS)) if known
                      else find_transforms(array, affine, native_mask))
    matrix = getattr(transforms, settings.registration, np.eye(4))
    image = resample(array, affine, matrix, grid.shape, grid.affine)
    # Smoothed like the image, then cut at one half, so a coarse grid keeps the brain's volume.
    mask = resample(native_mask, affine, matrix, grid.shape, grid.affine) > 0.5
    scaled = (intensity.z_score(image, mask) if settings.intensity == "zscore"
              else intensity.by_white_matter(image, mask, tissue_on(grid, "white")))
    metrics = quality.measure(array, affine, native_mask, transforms, turn, head.array)
    found = known  # without a registration, what an earlier one found is kept for the next
    if transforms:
        found = {"orientation": turn.tolist(), "pose": None if head.pose is None else head.pose.tolist(),
                 **{kind: (turn @ getattr(transforms, kind)).tolist() for kind in KINDS}}
    return scaled, mask, {"transform": (turn @ matrix).tolist(), "transforms": found,
                          "quality": {"mask_source": head.brain.source, "header_note": head.brain.note, **metrics}}


class Head(NamedTuple):
    """A scan, upright once `_upright_head` is done with it, and its brain."""

    array: np.ndarray  # float32 (z, y, x)
    affine: np.ndarray  # (4, 4), voxel (x, y, z) to mm, RAS+ once upright
    brain: skullstrip.Brain
    orientation: np.ndarray = np.eye(4)  # (4, 4) rotation from these millimetres to those of the header
    pose: np.ndarray | None = None  # the pose in which deepbet saw it again; see `_level`


def _upright_head(job: ScanJob, known: dict[str, Any]) -> Head:
    """Read a scan, find its brain, and turn both upright if the header's orientation is wrong.

    deepbet expects upright heads and finds half a brain in others. If the brain is unlike the template's, all 24
    orientations are tried (deepbet segments each; other masks are turned along), and the likeliest is used. If deepbet
    made the mask and the head is tilted, it segments the levelled head too, and the mask more like the template's brain
    is kept. `known` holds what an earlier preparation found; if empty, everything is searched.
    """
    kind, no_codes_ok = job.settings.mask, job.settings.orientation_unknown == "assume_ras"
    array, affine = read_scan(job.image_path, no_codes_ok=no_codes_ok)
    found = skullstrip.find_brain(kind, array, affine, job.mask_path, no_codes_ok, other_form(job.image_path))
    head = Head(array, affine, found)
    if job.settings.registration == "none":
        return head
    if known:
        head = _turn(head, np.array(known["orientation"]))
        return _level(head, np.array(known["pose"])) if known["pose"] else head
    look = initial_pose(head.array, head.affine, head.brain.mask)
    if look.likeness < UPRIGHT and not np.array_equal(orientation := _orientation(head), np.eye(4)):
        head = _turn(head, orientation)
        look = initial_pose(head.array, head.affine, head.brain.mask)
    if head.brain.source == "deepbet" and (look.likeness < UPRIGHT or rotation_angle(look.rotation) > LEVEL_DEG):
        try:
            level = _level(head, from_matvec(look.rotation, look.centre))
            if initial_pose(level.array, level.affine, level.brain.mask).likeness > look.likeness:
                return level
        except (ScanError, RegistrationError):  # no brain found, or one outside the scan
            pass
    return head


def _orientation(head: Head) -> np.ndarray:
    """Return the likeliest of 24 orientations, (4, 4)."""
    if head.brain.source != "deepbet":
        return find_orientation(head.array, head.affine, head.brain.mask)
    return from_matvec(likeliest(
        [_quick_likeness(*_turned_back(head.array, head.affine, from_matvec(turn))) for turn in ORIENTATIONS]))


def _quick_likeness(array: np.ndarray, affine: np.ndarray) -> float:
    """Return how similar to the template the brain is that deepbet finds in this head; higher is better."""
    try:
        return initial_pose(array, affine, skullstrip.deepbet_mask(array, quick=True)).likeness
    except ScanError:  # no brain found
        return 0.0


def _turn(head: Head, orientation: np.ndarray) -> Head:
    """Undo a wrong orientation of a head; deepbet segments it again."""
    if np.array_equal(orientation, np.eye(4)):
        return head
    array, affine = _turned_back(head.array, head.affine, orientation)
    if head.brain.source == "deepbet":
        mask = skullstrip.deepbet_mask(array)
    else:
        mask = _turned_back(head.brain.mask.astype(np.float32), head.affine, orientation)[0] > 0.5
    return Head(array, affine, head.brain._replace(mask=mask), orientation)


def _level(head: Head, pose: np.ndarray) -> Head:
    """Let deepbet segment a tilted head again, levelled and cropped around the brain.

    `pose` (4, 4) maps the level box's millimetres, whose origin is the brain's centre, to the head's.

    Raises:
        ScanError: it finds no brain there.
    """
    to = from_matvec(np.eye(3), LEVEL_BOX_MM[0])
    sides = np.subtract(LEVEL_BOX_MM[1], LEVEL_BOX_MM[0]).astype(int) + 1
    mask = skullstrip.deepbet_mask(resample(head.array, head.affine, pose, tuple(sides[::-1].tolist()), to))
    mask = resample(mask, to, np.linalg.inv(pose), head.array.shape, head.affine) > 0.5
    return head._replace(brain=head.brain._replace(mask=mask), pose=pose)


def _turned_back(array: np.ndarray, affine: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo a wrong orientation of an array (z, y, x) and its affine by flipping and swapping axes only."""
    return upright(array.T, orientation.T @ affine)


def _digests(job: ScanJob) -> tuple[str, str]:
    """Return two digests: of the inputs of a scan's transform search, and of everything the scan is made from.

    Both cover `METHOD` and its files' paths, sizes and modification times; the first only the settings that affect the
    search, the second all settings.
    """
    files = []
    for path in filter(None, (job.image_path, job.mask_path)):
        try:
            stats = [(file.name, file.stat()) for file in scan_files(path)]
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = MISSING if missing else f"cannot be read: {error.strerror}"
            raise ScanError(reason if path == job.image_path else f"mask: {reason}") from error
        files.append([path, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
    settings = asdict(job.settings)
    before = [settings["orientation_unknown"], settings["bias_correction"], settings["mask"]]
    search, full = (hashlib.sha256(json.dumps([FORMAT, METHOD, files, each]).encode()).hexdigest()
                    for each in (before, settings))
    return search, full


def _known(job: ScanJob, search_digest: str) -> dict[str, Any]:
    """Return what an earlier preparation found in the same files: orientation, pose, rigid, affine; or nothing."""
    try:
        notes = read_facts(job.output)["notes"]
        return notes["transforms"] if notes.get("search") == search_digest else {}
    except StoreError:
        return {}


def _found(job: ScanJob) -> dict[str, Any] | None:
    """Return the QC metrics of a scan already prepared from these files and settings, else None."""
    try:
        notes = read_facts(job.output)["notes"]
        return notes["quality"] if notes["source"] == _digests(job)[1] else None
    except (StoreError, ScanError):
        return None
