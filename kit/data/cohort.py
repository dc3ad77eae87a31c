"""A cohort is a table with one scan a row: participant, session, dataset, image_path, mask_path, labels.

Read from a CSV or TSV (columns `image_path, mask_path, label` alone are enough), from a BIDS folder, or from a
public collection (`kit.data.collections`).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from kit.data.collections import CohortError, contrast_of, is_collection, pick, read_collection
from kit.data.identity import (
    UNSAID,
    IdentityError,
    alike,
    check_names,
    headings,
    loose,
    read_id,
    split_names,
)
from kit.data.tabular import TableError, read_foreign, trimmed, typed
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
        where there is none), then the label columns: numbers where all cells are, else text, nan where one is missing.
        A dataset that the table does not name is `?` and the file's name, a participant `?` and the scan's.

    Raises:
        CohortError: no such file, no column `image_path`, no scan, a scan listed twice, or names of which it cannot
            be told whether they are one person's.
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
    try:
        check_names(table, shown(path))
    except IdentityError as error:
        raise CohortError(str(error)) from None
    if "split" in table:
        table["split"] = split_names(table["split"].replace("", None))
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
        raise CohortError(f"{shown(path)}: " + ("a link to a file that is not there" if path.is_symlink()
                                                else "no such file"))
    table = _foreign(path, headings, (*COLUMNS, "split"))
    if "image_path" not in table:
        raise CohortError(f"{shown(path)}: needs a column image_path; found {', '.join(table.columns)}")
    if empty := int((table["image_path"] == "").sum()):
        raise CohortError(f"{shown(path)}: image_path is empty in {empty} rows")
    if "participant" in table:
        table["participant"] = [read_id(name) for name in table["participant"]]
    else:
        table["participant"] = _named_by_file(table["image_path"])
    if empty := int((table["participant"] == "").sum()):
        raise CohortError(f"{shown(path)}: participant is empty in {empty} rows")
    for name, default in (("session", "01"), ("dataset", UNSAID + path.stem), ("mask_path", "")):
        table[name] = table[name].replace("", default) if name in table else default
    table["session"] = [read_id(name, "ses") for name in table["session"]]
    for name in ("image_path", "mask_path"):
        table[name] = [_beside(path, value) for value in table[name]]
    people = table.groupby("image_path")["participant"].nunique()
    if (people > 1).any():
        _say(f"{shown(path)}: {int((people > 1).sum())} files are the scans of several participants, the first: "
             f"{people.index[people > 1][0]}")
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _foreign(path: Path, named: Callable[[list[str]], list[str]], text: tuple[str, ...] | None) -> pd.DataFrame:
    try:
        return read_foreign(path, named, text)
    except TableError as error:
        raise CohortError(str(error)) from None


def _named_by_file(paths: pd.Series) -> list[str]:
    """A name for each scan of nobody knows whom, which does not depend on the order of rows."""
    names = paths.map(lambda path: re.sub(r"(\.nii)?(\.gz)?$", "", Path(path).name))
    digests = paths.map(lambda path: "-" + hashlib.blake2b(path.encode(), digest_size=4).hexdigest())
    return (UNSAID + names + digests.where(names.map(str.casefold).duplicated(keep=False), "")).tolist()


def _beside(table: Path, value: str) -> str:
    """Relative paths in a table mean the folder that the table lies in."""
    return str((table.parent / Path(value).expanduser()).resolve()) if value else ""


def _say(words: str) -> None:
    warnings.warn(words, stacklevel=4)


def _read_bids(folder: Path, contrast: str) -> pd.DataFrame:
    description = folder / "dataset_description.json"
    if not description.is_file():
        raise CohortError(f"{shown(folder)}: a BIDS folder needs dataset_description.json")
    scans = sorted(folder.glob("sub-*/ses-*/anat/*.nii*")) + sorted(folder.glob("sub-*/anat/*.nii*"))
    scans = [scans[place] for place in pick([contrast_of(scan.name) for scan in scans], contrast, shown(folder))]
    try:
        name = trimmed(str(json.loads(description.read_text(encoding="utf-8")).get("Name") or ""))
    except (ValueError, AttributeError):  # AttributeError: JSON, but no object
        raise CohortError(f"{shown(description)} is no JSON object; mend it") from None
    table = pd.DataFrame([_bids_row(folder, scan, name or UNSAID + folder.name) for scan in scans],
                         columns=[*COLUMNS, "others"], dtype=str)
    table = _one_a_session(folder, table)
    labels = folder / "participants.tsv"
    if labels.is_file() or labels.is_symlink():  # a broken link is an error, not a folder without labels
        table = _with_labels(folder, table, _label_file(labels, "participant_id", "participant"))
    table = _with_session_labels(folder, table).fillna("")
    for name in [name for name in table if name not in (*COLUMNS, "split")]:
        table[name] = typed(table[name], decimal_comma=True)  # now, for one file of many may have numbers alone
    return table


def _bids_row(folder: Path, scan: Path, dataset: str) -> tuple[str, ...]:
    entities = dict(part.partition("-")[::2] for part in scan.name.split("_")[:-1])
    place = [part for part in scan.relative_to(folder).parts[:-1] if part.startswith(("sub-", "ses-"))]
    if place != [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]:
        raise CohortError(f"{shown(scan)}: its name must begin with {'_'.join(place)}_; rename it")
    stem = scan.name.removesuffix(".gz").removesuffix(".nii").rpartition("_")[0]
    masks = sorted(folder.glob(f"derivatives/*/{scan.parent.relative_to(folder)}/{stem}_desc-brain_mask.nii*"))
    others = "_".join(f"{key}-{value}" for key, value in entities.items() if key not in ("sub", "ses"))
    return (entities["sub"], entities.get("ses", "01"), dataset, str(scan), str(masks[0]) if masks else "", others)


def _one_a_session(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """One scan a session: of several the one of fewest entities (acq-, rec-), then of the first run."""
    ranks = table["others"].map(_rank)
    best = ranks.groupby([table["participant"], table["session"]]).transform("min")
    if (more := ranks != best).any():
        _say(f"{shown(folder)}: {int(more.sum())} further scans of a session (run-, acq-, rec-) are left out, one is "
             "taken; list them in a table, each with a session of its own, to take them all")
    return table[~more].drop(columns="others").reset_index(drop=True)


def _rank(others: str) -> str:
    """What sorts the scans of a session: few entities, then their text, then the number of the run."""
    parts = [part for part in others.split("_") if part]
    run = "".join(part.removeprefix("run-").zfill(9) for part in parts if part.startswith("run-"))
    rest = [part for part in parts if not part.startswith("run-")]
    return f"{len(rest):03d} {'_'.join(rest)} {run}"


def _label_file(path: Path, key: str, name: str) -> pd.DataFrame:
    """Labels of a BIDS file as text, a row a `key` (such as participant_id), which is renamed and loses its prefix."""
    labels = _foreign(path, lambda names: headings(names, {key: (key,), "split": ("split",)}), None)
    if key not in labels:
        raise CohortError(f"{shown(path)}: needs a column {key}; found {', '.join(labels.columns)}")
    if taken := sorted({other for other in labels if other.casefold() in COLUMNS} - {"dataset"}):
        raise CohortError(f"{shown(path)}: a column {taken[0]} of its own has no meaning beside BIDS's file names; "
                          "rename or remove it (labels of sessions belong into sub-*/sub-*_sessions.tsv)")
    labels[name] = [read_id(each, "ses" if name == "session" else "sub") for each in labels.pop(key)]
    if (doubled := labels[name].duplicated()).any():
        raise CohortError(f"{shown(path)}: {key} {labels[name][doubled].iloc[0]} is listed twice; "
                          f"keep one row a {name}")
    return labels


def _check_match(path: Path, folders: pd.Series, listed: pd.Series, prefix: str) -> None:
    """Refuse names in a table that are a folder's but for zeros or case: whose labels are they?"""
    strangers, lost = set(listed) - set(folders), set(folders) - set(listed)
    near = {loose(name): name for name in strangers}
    for name in sorted(lost):
        if loose(name) in near:
            raise CohortError(f"{shown(path)}: has {prefix}-{near[loose(name)]}, the folder is {prefix}-{name}: if "
                              "they are one, give them one name")
    try:
        alike(listed, f"{shown(path)}: {prefix}")
    except IdentityError as error:
        raise CohortError(str(error)) from None


def _with_labels(folder: Path, table: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    path = folder / "participants.tsv"
    _check_match(path, table["participant"], labels["participant"], "sub")
    unlabelled = len(set(table["participant"]) - set(labels["participant"]))
    without = len(set(labels["participant"]) - set(table["participant"]))
    if unlabelled or without:
        _say(f"{shown(path)}: {unlabelled} participants with scans are not listed and have no labels; "
             f"{without} who are listed have no T1-weighted scan")
    if "dataset" in labels:  # one folder may hold several datasets: its participants say which
        table = table.rename(columns={"dataset": "named"})
    table = table.merge(labels, on="participant", how="left")
    if "named" in table:
        table["dataset"] = table["dataset"].replace("", None).fillna(table.pop("named"))
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _with_session_labels(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Labels of `sub-*/sub-*_sessions.tsv` go over those of participants.tsv, for the sessions that they list."""
    parts, unlisted = [], 0
    for file in sorted(folder.glob("sub-*/sub-*_sessions.tsv")):
        participant = file.parent.name.removeprefix("sub-")
        labels = _label_file(file, "session_id", "session")
        sessions = table["session"][table["participant"] == participant]
        _check_match(file, sessions, labels["session"], "ses")
        unlisted += len(set(sessions) - set(labels["session"]))
        parts.append(labels.assign(participant=participant, listed=True))
    if not parts:
        return table
    if unlisted:
        _say(f"{shown(folder)}: {unlisted} sessions are not listed in their sessions.tsv: they have the labels of "
             "participants.tsv")
    both = table.merge(pd.concat(parts, ignore_index=True), on=["participant", "session"], how="left",
                       suffixes=("", " of session"))
    listed = both.pop("listed").notna()
    for name in [name for name in both if name.endswith(" of session")]:
        plain = name.removesuffix(" of session")
        given = {part["participant"].iloc[0] for part in parts if plain in part and len(part)}
        own = listed & both["participant"].isin(given)
        both[plain] = both.pop(name).where(own, both[plain])
    return both
