"""The procedural cohort on disk: participants and their scans as a BIDS folder, generated once and cached.

A scan's bits depend on the generator's version, the seed and its row in the table. The table depends on the seed and
the number of participants. Never mix cohorts of different sizes: `sub-0001` has the same head in both, but another age,
sex and diagnosis.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.identity import TRAVELLING
from kit.cohort.tables import PROCEDURAL
from kit.preprocess.nifti import read_nifti, write_nifti
from kit.preprocess.pool import DIED_TWICE, run_all
from kit.preprocess.resample import resample
from kit.runs import outputs_dir, progress, write_json, write_whole
from kit.sample.anatomy import GENERATOR_VERSION, stream
from kit.sample.atlas import load_atlas
from kit.sample.scan import SITES, make_scan
from kit.store.store import Store, read_transform, scan_path

# Fractions of the participants. Half of those in pretrain have a second session.
SPLITS = {"pretrain": 0.35, "train": 0.20, "validation": 0.10, "test": 0.21, "out_of_distribution": 0.14}
DIAGNOSES = ("CN", "AD", "stroke")
AGES = (20, 90)  # years; the same range for each diagnosis, or age alone would predict it
YEARS_TO_SECOND_SESSION = (1.0, 2.5)
MARKER = "complete.json"
NO_PERSON = "procedural: no person was scanned"
COLUMNS = {
    "age": "years, at the first session", "sex": "F or M", "diagnosis": "CN (healthy), AD or stroke",
    "alzheimers": "1: AD, 0: healthy", "stroke": "1: stroke, 0: healthy",
    "site": "scanner; OOD is in no split that is learned from",
    "split": "what the participant is for", "dataset": "one name a site, and one for travelling heads"}


def sample_cohort(
    participants: int = 60, seed: int = 0, workers: int = 2, cache_dir: Path | str | None = None,
    travelling: int = 8,
) -> Path:
    """Return the BIDS folder of the procedural cohort, generated now or found in the cache.

    If interrupted, generation continues where it stopped: each file appears whole or not at all, and the folder is
    finished once it holds `complete.json`.

    Args:
        participants: their number. From 30 on, each split has healthy participants and both diseases.
        seed: seed of the table and the scans.
        workers: processes that generate scans, one thread each; the result does not depend on their number.
        cache_dir: folder of all sample cohorts; `sample` under the outputs folder if not given.
        travelling: number of further participants, each scanned at every site; see `draw_travelling`.
    """
    cache = _cache(cache_dir)
    folder = cache / f"v{GENERATOR_VERSION}-seed{seed}-n{participants}-t{travelling}"
    if not (folder / MARKER).exists():
        scans = pd.concat([draw_participants(participants, seed), draw_travelling(travelling, seed)], ignore_index=True)
        make_scans(scans, folder, seed, workers, cache)
    return folder


def draw_participants(participants: int, seed: int) -> pd.DataFrame:
    """Draw the participants: one scan a row, in the order of the participants' names.

    Diagnoses have quotas within each split. Site, sex, age and number of sessions are balanced within each diagnosis,
    so that none of them predicts it.

    Returns:
        Columns participant, session, age (years at this session), sex, diagnosis, alzheimers and stroke
        (Int64, missing where the other disease is present), site, split, dataset.
    """
    rng = stream(seed, f"{participants} participants")
    ends = np.round(np.cumsum([0, *SPLITS.values()]) * participants).astype(int)
    people = []
    for split, count in zip(SPLITS, np.diff(ends), strict=True):
        sites = [site for site in SITES if (site == "OOD") == (split == "out_of_distribution")]
        for diagnosis, size in zip(*np.unique(_deal(DIAGNOSES, count, rng), return_counts=True), strict=True):
            strata = (rng.permutation(size) + rng.uniform(size=size)) / size
            people.append(pd.DataFrame({
                "age": (AGES[0] + (AGES[1] - AGES[0]) * strata).round(1), "sex": _deal("FM", size, rng),
                "diagnosis": str(diagnosis), "site": _deal(sites, size, rng), "split": split,
                "sessions": _deal([1, 2], size, rng) if split == "pretrain" else 1}))
    table = pd.concat(people).sample(frac=1, random_state=rng, ignore_index=True)
    table.insert(0, "participant", [f"sub-{number:04d}" for number in range(1, participants + 1)])
    for disease, column in (("AD", "alzheimers"), ("stroke", "stroke")):
        table[column] = table["diagnosis"].map({disease: 1, "CN": 0}).astype("Int64")
    table["dataset"] = PROCEDURAL + table["site"]
    again = table[table["sessions"] == 2].copy()
    again["age"] = (again["age"] + rng.uniform(*YEARS_TO_SECOND_SESSION, len(again))).round(1)
    scans = pd.concat([table.assign(session="ses-01"), again.assign(session="ses-02")])
    columns = ["participant", "session", *COLUMNS]
    return scans.sort_values(["participant", "session"], ignore_index=True)[columns]


def draw_travelling(participants: int, seed: int) -> pd.DataFrame:
    """Draw travelling heads: healthy participants with one session at each site, named after it.

    Head and age are the same in all sessions; pose, contrast, bias field, resolution and noise differ. They form a
    split of their own and do not depend on the rest of the cohort, not even on its size.

    Returns:
        columns as in `draw_participants`; a participant's scans are in the order of `SITES`.
    """
    rng = stream(seed, f"{participants} travelling")
    strata = (rng.permutation(participants) + rng.uniform(size=participants)) / max(participants, 1)
    people = pd.DataFrame({
        "participant": [f"sub-T{number:02d}" for number in range(1, participants + 1)],
        "age": (AGES[0] + (AGES[1] - AGES[0]) * strata).round(1), "sex": _deal("FM", participants, rng),
        "diagnosis": "CN", "alzheimers": 0, "stroke": 0, "split": TRAVELLING, "dataset": f"{PROCEDURAL}{TRAVELLING}"})
    scans = people.merge(pd.DataFrame({"site": list(SITES)}), how="cross").assign(
        session=lambda table: "ses-" + table["site"])
    return scans[["participant", "session", *COLUMNS]].astype({"alzheimers": "Int64", "stroke": "Int64"})


def make_scans(scans: pd.DataFrame, folder: Path, seed: int, workers: int, cache: Path) -> None:
    """Write a BIDS folder: its tables, each scan still missing, and finally the marker.

    `scans` has rows as in `draw_participants`; `cache` is the folder that holds the atlas.
    """
    write_bids_tables(scans, folder, seed)
    rows = scans.to_dict("records")
    missing = [row for row in rows if not _image_path(folder, row["participant"], row["session"]).exists()]
    atlas_path = cache / f"atlas-v{GENERATOR_VERSION}.npz"
    if missing:
        load_atlas(atlas_path)  # built here, so that the workers find it
    make = partial(_write_scan, folder=folder, seed=seed, atlas_path=atlas_path)
    workers = min(workers, len(missing))
    for row, image in progress(run_all(make, missing, workers if workers > 1 else 0), desc="procedural scans",
                               total=len(rows), unit="scan", initial=len(rows) - len(missing)):
        if image is None:
            raise RuntimeError(f"{row['participant']} {row['session']}: {DIED_TWICE}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    write_json(folder / MARKER, {"scans": len(rows), "megabytes": round(size / 1e6, 1)})


def effect_masks(bids_folder: Path | str, participant: str, session: str) -> dict[str, Path]:
    """Return the masks of where age, sex and disease change a scan most: file by name; see `ProceduralScan.effects`.

    The names are `ventricles`, `cortex`, `hippocampus`, `cerebellum`, and `lesion` after a stroke. Participant and
    session may be named as in BIDS (`sub-0001`, `ses-01`) or as in a cohort's table (`0001`, `01`).

    Raises:
        FileNotFoundError: the folder has no such masks: another cohort, or an unknown participant or session.
    """
    subject, visit = f"sub-{participant.removeprefix('sub-')}", f"ses-{session.removeprefix('ses-')}"
    folder = _derivatives(Path(bids_folder)) / subject / visit / "anat"
    masks = {path.name.split("_label-")[1].split("_")[0]: path
             for path in sorted(folder.glob("*_label-*_mask.nii.gz"))}
    if not masks:
        raise FileNotFoundError(f"{folder}: no masks of known effects; only a folder made by "
                                "kit.sample has them, for its own participants and sessions")
    return masks


def write_effects(bids_folder: Path | str, store: Store, rows: pd.DataFrame, folder: Path | str) -> int:
    """Write where age, sex and disease change prepared scans most, on their grid: `effects/<scan>_<effect>.nii.gz`.

    Args:
        bids_folder: the sample cohort's.
        store: the store of its prepared scans.
        rows: rows of the store's index to write.
        folder: the folder in which `effects` is created, usually that of the prepared scans.

    Returns:
        the number of files written; files newer than their prepared scan are kept.
    """
    written = 0
    for row in rows.itertuples():
        masks, prepared = effect_masks(bids_folder, row.participant, row.session), scan_path(store.folder, row.scan)
        if "lesion" not in masks:  # the scan may be another cohort's than when its effects were written
            (Path(folder) / "effects" / f"{row.scan}_lesion.nii.gz").unlink(missing_ok=True)
        for effect, path in masks.items():
            target = Path(folder) / "effects" / f"{row.scan}_{effect}.nii.gz"
            if not target.exists() or target.stat().st_mtime_ns < prepared.stat().st_mtime_ns:
                place, affine = read_nifti(path)
                place = resample(place, affine, read_transform(store.folder, row.scan), store.grid.shape,
                                 store.grid.affine) > 0.5
                write_nifti(target, place.astype(np.float32), store.grid.affine)
                written += 1
    return written


def write_bids_tables(scans: pd.DataFrame, folder: Path, seed: int) -> None:
    """Write participants.tsv and its column descriptions, sessions.tsv if age or site varies, and descriptions."""
    first = scans.drop_duplicates("participant").rename(columns={"participant": "participant_id"})
    columns = [name for name in COLUMNS if name in scans]
    _write_tsv(folder / "participants.tsv", first[["participant_id", *columns]])
    write_json(folder / "participants.json", {name: {"Description": COLUMNS[name]} for name in columns})
    for participant, sessions in scans.groupby("participant"):
        if varying := [name for name in ("age", "site") if sessions[name].nunique() > 1]:
            table = sessions.rename(columns={"session": "session_id"})[["session_id", *varying]]
            _write_tsv(folder / participant / f"{participant}_sessions.tsv", table)
    description: dict[str, Any] = {
        "Name": f"Sample cohort ({NO_PERSON})", "BIDSVersion": "1.10.0", "DatasetType": "raw",
        "Acknowledgements": "Shaped from the ICBM152 2009 maps (Fonov et al. 2011), as shipped with nilearn.",
        "GeneratedBy": [{"Name": "kit.sample", "Version": str(GENERATOR_VERSION),
                         "Description": f"{NO_PERSON}; seed {seed}, {len(first)} participants"}]}
    write_json(folder / "dataset_description.json", description)
    write_json(_derivatives(folder) / "dataset_description.json", description | {"DatasetType": "derivative"})
    write_whole(folder / ".bidsignore", lambda aside: aside.write_text(f"{MARKER}\n", encoding="utf-8"))


def _write_scan(row: dict[str, Any], folder: Path, seed: int, atlas_path: Path) -> Path:
    """Make one scan and write its files; the image comes last and is returned, so if it exists the scan is complete."""
    participant, session = row["participant"], row["session"]
    scan = make_scan(participant, session, seed=seed, age=row["age"], sex=row["sex"], diagnosis=row["diagnosis"],
                     site=row["site"], atlas=load_atlas(atlas_path))
    image = _image_path(folder, participant, session)
    masks = _derivatives(folder) / image.parent.relative_to(folder)
    write_nifti(masks / f"{participant}_{session}_desc-brain_mask.nii.gz", scan.brain, scan.affine)
    for label, mask in scan.effects.items():
        write_nifti(masks / f"{participant}_{session}_label-{label}_mask.nii.gz", mask, scan.affine)
    write_json(image.with_name(f"{participant}_{session}_T1w.json"), {"Procedural": True, "Latent": scan.latent})
    write_nifti(image, scan.image, scan.affine)
    return image


def _deal(levels: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return each level equally often, give or take one, in random order."""
    return rng.permutation(np.resize(rng.permutation(list(levels)), count))


def _cache(cache_dir: Path | str | None) -> Path:
    return outputs_dir() / "sample" if cache_dir is None else Path(cache_dir).resolve()


def _derivatives(folder: Path) -> Path:
    return folder / "derivatives" / "sample"


def _image_path(folder: Path, participant: str, session: str) -> Path:
    return folder / participant / session / "anat" / f"{participant}_{session}_T1w.nii.gz"


def _write_tsv(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda aside: table.to_csv(aside, sep="\t", index=False, na_rep="n/a"))
