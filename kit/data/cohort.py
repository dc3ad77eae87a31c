"""A cohort is a table with one scan a row: participant, session, dataset, image_path, mask_path, labels.

Read from a CSV or TSV (columns `image_path, mask_path, label` alone are enough), from a BIDS folder, or from a
public collection (`kit.data.collections`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from kit.data.collections import CohortError, contrast_of, is_collection, pick, read_collection
from kit.runs import resolve, shown

COLUMNS = ("participant", "session", "dataset", "image_path", "mask_path")
PROCEDURAL = "procedural-"  # begins the dataset names of `kit.data.sample`, and of no others


def read_cohort(path: str | Path, contrast: str = "T1w") -> pd.DataFrame:
    """Read a cohort from a table, a BIDS folder, or a public collection: FOMO60K, FOMO300K, OpenMind.

    Args:
        path: the table or folder; of OpenMind also its `pretrain_data.json`.
        contrast: which of a folder's scans, in BIDS's words: "T1w", "T2w", "FLAIR", ... T1-weighted scans after
            contrast agent are none of "T1w" but "T1ce". What is left out is counted in a printed line. A table's
            scans are all taken.

    Returns:
        one scan a row: participant, session, dataset (str), image_path, mask_path (absolute, mask_path ""
        where there is none), then the label columns as they came.

    Raises:
        CohortError: no such file, no column `image_path`, no scan, or a scan listed twice.
    """
    path = resolve(path)
    if is_collection(path):
        table = read_collection(path, contrast)
    elif path.is_dir():
        table = _read_bids(path, contrast)
    elif path.suffix in (".csv", ".tsv"):
        table = _read_table(path)
    else:
        raise CohortError(f"{shown(path)}: " + ("expected .csv, .tsv, a BIDS folder, FOMO or OpenMind" if path.exists()
                                                else "no such file or folder"))
    if table.empty:
        raise CohortError(f"{shown(path)}: no scans in it")
    if (doubled := table.duplicated(["dataset", "participant", "session"])).any():
        row = table[doubled].iloc[0]
        raise CohortError(f"{shown(path)}: {int(doubled.sum())} scans are listed twice, the first: "
                          f"participant {row.participant}, session {row.session}; give each its own session")
    return table.reset_index(drop=True)


def data_note(index: pd.DataFrame) -> str:
    """What a figure must say of these scans: that they are procedural, where they are; else nothing."""
    procedural = index["dataset"].astype(str).str.startswith(PROCEDURAL)
    return "procedural data" if procedural.all() else "partly procedural data" if procedural.any() else ""


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise CohortError(f"{shown(path)}: no such file")
    table = _tsv_or_csv(path, dict.fromkeys(COLUMNS, str))
    if "image_path" not in table:
        raise CohortError(f"{shown(path)}: needs a column image_path; found {', '.join(table.columns)}")
    if empty := int(table["image_path"].isna().sum()):
        raise CohortError(f"{shown(path)}: image_path is empty in {empty} rows")
    if "participant" not in table:
        table["participant"] = [f"{row:05d}" for row in range(1, len(table) + 1)]
    if empty := int(table["participant"].isna().sum()):
        raise CohortError(f"{shown(path)}: participant is empty in {empty} rows")
    for name, default in (("session", "01"), ("dataset", path.stem), ("mask_path", "")):
        table[name] = table[name].fillna(default) if name in table else default
    for name in ("image_path", "mask_path"):
        table[name] = [_beside(path, value) for value in table[name]]
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _tsv_or_csv(path: Path, types: dict[str, type]) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=types, na_values=["n/a"])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CohortError(f"{shown(path)} is no table: {error}") from None


def _beside(table: Path, value: str) -> str:
    """Relative paths in a table mean the folder that the table lies in."""
    return str((table.parent / Path(value).expanduser()).resolve()) if value else ""


def _read_bids(folder: Path, contrast: str) -> pd.DataFrame:
    description = folder / "dataset_description.json"
    if not description.is_file():
        raise CohortError(f"{shown(folder)}: a BIDS folder needs dataset_description.json")
    scans = sorted(folder.glob("sub-*/ses-*/anat/*.nii*")) + sorted(folder.glob("sub-*/anat/*.nii*"))
    scans = [scans[place] for place in pick([contrast_of(scan.name) for scan in scans], contrast, shown(folder))]
    try:
        name = str(json.loads(description.read_text(encoding="utf-8")).get("Name", folder.name))
    except (ValueError, AttributeError):  # AttributeError: JSON, but no object
        raise CohortError(f"{shown(description)} is no JSON object; mend it") from None
    rows = [_bids_row(folder, scan, name) for scan in scans]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    labels = folder / "participants.tsv"
    if labels.is_file():
        table = _with_labels(table, _label_file(labels, "participant_id", "participant"))
    return _with_session_labels(folder, table)


def _bids_row(folder: Path, scan: Path, dataset: str) -> tuple[str, str, str, str, str]:
    entities = dict(part.partition("-")[::2] for part in scan.name.split("_")[:-1])
    if "sub" not in entities:
        raise CohortError(f"{shown(scan)}: its name must begin with {scan.relative_to(folder).parts[0]}_; rename it")
    stem = scan.name.removesuffix(".gz").removesuffix(".nii").rpartition("_")[0]
    masks = sorted(folder.glob(f"derivatives/*/{scan.parent.relative_to(folder)}/{stem}_desc-brain_mask.nii*"))
    others = [f"{key}-{value}" for key, value in entities.items() if key not in ("sub", "ses")]  # run-2, acq-...
    session = "_".join([entities.get("ses", "01"), *others])
    return (entities["sub"], session, dataset, str(scan), str(masks[0]) if masks else "")


def _label_file(path: Path, key: str, name: str) -> pd.DataFrame:
    """Labels of a BIDS file, a row a `key` (such as participant_id), which is renamed and loses its prefix."""
    labels = _tsv_or_csv(path, {key: str})
    if key not in labels:
        raise CohortError(f"{shown(path)}: needs a column {key}; found {', '.join(labels.columns)}")
    if taken := sorted(set(labels) & set(COLUMNS) - {"dataset"}):
        raise CohortError(f"{shown(path)}: a column {taken[0]} of its own has no meaning beside BIDS's file names; "
                          "rename or remove it (labels of sessions belong into sub-*/sub-*_sessions.tsv)")
    labels[name] = labels.pop(key).str.replace(r"^(sub|ses)-", "", regex=True)
    if (doubled := labels[name].duplicated()).any():
        raise CohortError(f"{shown(path)}: {key} {labels[name][doubled].iloc[0]} is listed twice; "
                          f"keep one row a {name}")
    return labels


def _with_labels(table: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    if "dataset" in labels:  # one folder may hold several datasets: its participants say which
        table = table.drop(columns="dataset")
    table = table.merge(labels, on="participant", how="left")
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _with_session_labels(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Labels of `sub-*/sub-*_sessions.tsv` go over those of participants.tsv."""
    files = sorted(folder.glob("sub-*/sub-*_sessions.tsv"))
    if not files:
        return table
    sessions = pd.concat([_label_file(file, "session_id", "session").assign(
        participant=file.parent.name.removeprefix("sub-")) for file in files], ignore_index=True)
    table = table.merge(sessions, on=["participant", "session"], how="left", suffixes=("", " of session"))
    for name in [name for name in table if name.endswith(" of session")]:
        table[name.removesuffix(" of session")] = table[name].fillna(table[name.removesuffix(" of session")])
    return table.drop(columns=[name for name in table if name.endswith(" of session")])
