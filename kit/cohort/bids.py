"""Read a BIDS folder as a cohort: scans, masks, and labels from participants.tsv and the sessions.tsv files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd

from kit.cohort.collections import contrast_of, pick, visible
from kit.cohort.identity import UNNAMED, check_spellings, headings, normalised, read_id
from kit.cohort.tabular import COLUMNS, CohortError, read_foreign, say, trimmed, typed
from kit.runs import shown


def read_bids(folder: Path, contrast: str) -> pd.DataFrame:
    """Read a BIDS folder's scans of one contrast and their labels; see `kit.cohort.tables.read_cohort`."""
    description = folder / "dataset_description.json"
    if not description.is_file():
        raise CohortError(f"{shown(folder)}: a BIDS folder needs dataset_description.json")
    scans = [scan for pattern in ("sub-*/ses-*/anat/*.nii*", "sub-*/anat/*.nii*")
             for scan in sorted(visible(folder.glob(pattern)))]
    scans = [scans[place] for place in pick([contrast_of(scan.name) for scan in scans], contrast, shown(folder))]
    try:
        name = trimmed(str(json.loads(description.read_text(encoding="utf-8")).get("Name") or ""))
    except (ValueError, AttributeError):  # AttributeError: valid JSON, but not an object
        raise CohortError(f"{shown(description)} is not a JSON object; correct it") from None
    table = pd.DataFrame([_bids_row(folder, scan, name or UNNAMED + folder.name) for scan in scans],
                         columns=[*COLUMNS, "others", "pipelines"], dtype=str)
    table = _own_masks(folder, _one_a_session(folder, table))
    _tell_of_pipelines(folder, table.pop("pipelines")[table["mask_path"] != ""])
    labels = folder / "participants.tsv"
    if labels.is_file() or labels.is_symlink():  # a broken link must raise an error, not pass as "no labels"
        table = _with_labels(folder, table, _label_file(labels, "participant_id", "participant"), contrast)
    table = _with_session_labels(folder, table).fillna("")
    for name in [name for name in table if name not in (*COLUMNS, "split")]:
        table[name] = typed(table[name], f"{shown(folder)}: {name}")  # only now, as types may differ between files
    return table


def _tell_of_pipelines(folder: Path, masked: pd.Series) -> None:
    """Warn if several pipelines in derivatives/ made masks; each scan gets that of the alphabetically first.

    Args:
        masked: (scans with a mask,) the pipelines with a mask of the scan, such as "fmriprep/synthstrip".
    """
    pipelines = [names.split("/") for names in masked]
    made, taken = sorted({name for each in pipelines for name in each}), Counter(each[0] for each in pipelines)
    if len(made) > 1:
        say(f"{shown(folder)}: derivatives/ has brain masks of {', '.join(made)}. Each scan has the first by name: "
            f"{', '.join(f'{name} for {count} scans' for name, count in sorted(taken.items()))}. Move the others away, "
            "or list image_path and mask_path in a table")


def _bids_row(folder: Path, scan: Path, dataset: str) -> tuple[str, ...]:
    stem = scan.name.removesuffix(".gz").removesuffix(".nii").rpartition("_")[0]
    masks = sorted(folder.glob(f"derivatives/*/{scan.parent.relative_to(folder)}/{stem}_desc-brain_mask.nii*"))
    pipelines = "/".join(mask.relative_to(folder).parts[1] for mask in masks)  # derivatives/PIPELINE/...
    entities = dict(part.partition("-")[::2] for part in scan.name.split("_")[:-1])
    place = [part for part in scan.relative_to(folder).parts[:-1] if part.startswith(("sub-", "ses-"))]
    if place != [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]:
        raise CohortError(f"{shown(scan)}: its name must begin with {'_'.join(place)}_; rename it")
    others = "_".join(f"{key}-{value}" for key, value in entities.items() if key not in ("sub", "ses"))
    return (entities["sub"], entities.get("ses", "01"), dataset, str(scan), str(masks[0]) if masks else "", others,
            pipelines)


def _one_a_session(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Keep one scan per session: the one with the fewest entities (acq-, rec-), then the lowest run number."""
    ranks = table["others"].map(_rank)
    best = ranks.groupby([table["participant"], table["session"]]).transform("min")
    if (more := ranks != best).any():
        say(f"{shown(folder)}: {int(more.sum())} further scans of a session (run-, acq-, rec-) are left out, one a "
            "session is taken; list them in a table, each with a session of its own, to take them all")
    return table[~more].drop(columns="others").reset_index(drop=True)


def _own_masks(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Drop masks of scans of another contrast beside a T1w: `sub-01_desc-brain_mask` is taken to be the T1w's."""
    others = (table["mask_path"] != "") & table["image_path"].map(_beside_t1w).astype(bool)
    if others.any():
        say(f"{shown(folder)}: {int(others.sum())} masks are not used, as they belong to a T1w scan of the same name, "
            f"the first: {table['mask_path'][others].iloc[0]}; if they fit these scans too, list both in a table "
            "(image_path, mask_path)")
    return table.assign(mask_path=table["mask_path"].mask(others, ""))


def _beside_t1w(image_path: str) -> bool:
    """Return whether a scan is of another contrast than a T1w scan of the same name beside it."""
    scan = Path(image_path)
    entities, _, ending = scan.name.rpartition("_")
    return not ending.startswith("T1w.") and any(scan.parent.glob(f"{entities}_T1w.nii*"))


def _rank(others: str) -> str:
    """Return the sort key of a session's scans: number of entities other than run-, their text, the run number."""
    parts = [part for part in others.split("_") if part]
    run = "".join(part.removeprefix("run-").zfill(9) for part in parts if part.startswith("run-"))
    rest = [part for part in parts if not part.startswith("run-")]
    return f"{len(rest):03d} {'_'.join(rest)} {run}"


def _label_file(path: Path, key: str, name: str) -> pd.DataFrame:
    """Read a BIDS label file as text, one row per `key` (such as participant_id), renamed and without its prefix."""
    labels = read_foreign(path, lambda names: headings(names, {key: (key,), "split": ("split",)}), None)
    if key not in labels:
        raise CohortError(f"{shown(path)}: needs a column {key}; found {', '.join(labels.columns)}")
    if taken := sorted({other for other in labels if other.casefold() in COLUMNS} - {"dataset"}):
        raise CohortError(f"{shown(path)}: its column {taken[0]} conflicts with BIDS's file names; "
                          "rename or remove it (labels of sessions belong in sub-*/sub-*_sessions.tsv)")
    labels[name] = [read_id(each, "ses" if name == "session" else "sub") for each in labels.pop(key)]
    if (doubled := labels[name].duplicated()).any():
        sessions = ("; rows of its sessions belong in sub-*/sub-*_sessions.tsv, or in a table of scans with a column "
                    "session" if name == "participant" else "")
        raise CohortError(f"{shown(path)}: {key} {labels[name][doubled].iloc[0]} is listed twice; "
                          f"keep one row a {name}{sessions}")
    return labels


def _check_match(path: Path, folders: pd.Series, listed: pd.Series, prefix: str) -> None:
    """Refuse names in a table that differ from a folder's name only by leading zeros, case or a final `.0`."""
    strangers, lost = set(listed) - set(folders), set(folders) - set(listed)
    near = {normalised(name): name for name in strangers}
    for name in sorted(lost):
        if normalised(name) in near:
            raise CohortError(f"{shown(path)}: has {prefix}-{near[normalised(name)]}, but the folder is "
                              f"{prefix}-{name}: if they are the same, use one name for both")
    check_spellings(listed, f"{shown(path)}: {prefix}")


def _with_labels(folder: Path, table: pd.DataFrame, labels: pd.DataFrame, contrast: str) -> pd.DataFrame:
    path = folder / "participants.tsv"
    _check_match(path, table["participant"], labels["participant"], "sub")
    unlabelled = len(set(table["participant"]) - set(labels["participant"]))
    without = len(set(labels["participant"]) - set(table["participant"]))
    if unlabelled or without:
        say(f"{shown(path)}: {unlabelled} participants with scans are not listed; "
            f"{without} who are listed have no {contrast_of(contrast)} scan")
    if "dataset" in labels:  # one folder may hold several datasets; participants.tsv names them
        table = table.rename(columns={"dataset": "named"})
    table = table.merge(labels, on="participant", how="left")
    if "named" in table:
        table["dataset"] = table["dataset"].replace("", None).fillna(table.pop("named"))
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _with_session_labels(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Let labels of `sub-*/sub-*_sessions.tsv` override those of participants.tsv, for the sessions they list."""
    parts, unlisted = [], 0
    for file in sorted(folder.glob("sub-*/sub-*_sessions.tsv")):
        participant = file.parent.name.removeprefix("sub-")
        labels = _label_file(file, "session_id", "session")
        sessions = table["session"][table["participant"] == participant]
        _check_match(file, sessions, labels["session"], "ses")
        unlisted += len(set(sessions) - set(labels["session"]))
        parts.append(labels.assign(participant=participant, listed=True))
    without_file = table[~table["participant"].isin({who for part in parts for who in part["participant"]})]
    several = int((without_file.groupby("participant")["session"].nunique() > 1).sum())
    if several and (names := [name for name in table if name not in (*COLUMNS, "split")]):
        say(f"{shown(folder)}: {several} participants have several sessions and no sessions.tsv: all their sessions "
            f"have the labels of participants.tsv ({', '.join(names)}); if any change, give those in "
            "sub-*/sub-*_sessions.tsv")
    if not parts:
        return table
    if unlisted:
        say(f"{shown(folder)}: {unlisted} sessions are not listed in their sessions.tsv: they have the labels of "
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
