"""Read a cohort: a table with one scan a row (participant, session, dataset, image_path, mask_path, labels).

The source is a CSV or TSV (a column `image_path` is enough to prepare and pretrain; testing needs `participant` and
`dataset`), a BIDS folder, or a public collection (`kit.cohort.collections`).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pandas as pd

from kit.cohort.bids import read_bids
from kit.cohort.collections import is_collection, read_collection
from kit.cohort.identity import SPLITS, UNNAMED, check_names, headings, participant_ids, read_id, split_names
from kit.cohort.tabular import COLUMNS, CohortError, read_foreign, say, trimmed
from kit.runs import resolve, shown

PROCEDURAL = "procedural-"  # prefix of the dataset names of `kit.sample`; no other dataset uses it


def read_cohort(path: str | Path, contrast: str = "T1w") -> pd.DataFrame:
    """Read a cohort from a table, a BIDS folder, or a public collection: FOMO60K, FOMO300K, OpenMind.

    Args:
        path: the table or folder; for OpenMind also its `pretrain_data.json` or `openneuro_metadata.csv`.
        contrast: which scans of a folder to take, by BIDS suffix: "T1w", "T2w", "FLAIR", ... Contrast-enhanced
            T1-weighted scans are "T1ce", not "T1w". A printed line counts the scans left out. All scans of a
            table are taken.

    Returns:
        one scan a row: participant, session, dataset (str), image_path, mask_path (absolute; mask_path is "" if there
        is none), then the label columns: numeric if every cell is a number, else text; nan where a cell is missing.
        A dataset without a name is called `?` + the table's file name without suffix (or the folder's name), a
        participant without one `?` + the scan's file name; see `named_by_file`.

    Raises:
        CohortError: no such file, no column `image_path`, no scans, two rows with the same dataset, participant and
            session, or names that may or may not mean the same person.
    """
    path = resolve(path)
    if is_collection(path):
        table = read_collection(path, contrast)
    elif path.is_dir():
        table = read_bids(path, contrast)
    elif path.suffix.lower() in (".csv", ".tsv"):
        table = _read_table(path)
    else:
        raise CohortError(f"{shown(path)}: " + ("expected .csv, .tsv, a BIDS folder, FOMO or OpenMind" if path.exists()
                                                else "no such file or folder"))
    if table.empty:
        raise CohortError(f"{shown(path)}: no scans in it")
    check_names(table, shown(path))
    if "split" in table:
        table["split"] = split_names(table["split"].replace("", None))
        if strange := sorted(set(table["split"].dropna().astype(str)) - set(SPLITS)):
            say(f"{shown(path)}: split has {', '.join(map(repr, strange))}: 2_pretrain uses such rows if its parameter "
                "`split` names them; 3_finetune and 5_benchmark leave them out, except of a test set without rows of "
                f"test or out_of_distribution; known are {', '.join(SPLITS)}", level=3)
    if (doubled := table.duplicated(["dataset", "participant", "session"])).any():
        row = table[doubled].iloc[0]
        raise CohortError(f"{shown(path)}: {int(doubled.sum())} scans have the dataset, participant and session of "
                          f"another, the first: participant {row.participant}, session {row.session}; "
                          "give each its own session")
    return table.reset_index(drop=True)


def data_note(index: pd.DataFrame) -> str:
    """Return the label a figure of these scans must carry if some or all are procedural; otherwise ""."""
    procedural = index["dataset"].astype(str).str.startswith(PROCEDURAL)
    return "procedural data" if procedural.all() else "partly procedural data" if procedural.any() else ""


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise CohortError(f"{shown(path)}: " + ("a link to a file that is not there" if path.is_symlink()
                                                else "no such file"))
    table = read_foreign(path, headings, (*COLUMNS, "split"))
    if "image_path" not in table:
        raise CohortError(f"{shown(path)}: needs a column image_path; found {', '.join(table.columns)}")
    if empty := int((table["image_path"] == "").sum()):
        raise CohortError(f"{shown(path)}: image_path is empty in {empty} rows")
    if "participant" in table:
        table["participant"] = [read_id(name) for name in table["participant"]]
    else:
        table["participant"] = named_by_file(table["image_path"])
    if empty := int((table["participant"] == "").sum()):
        raise CohortError(f"{shown(path)}: participant is empty in {empty} rows")
    for name, default in (("session", "01"), ("dataset", UNNAMED + path.stem), ("mask_path", "")):
        table[name] = table[name].replace("", default) if name in table else default
    table["session"] = [read_id(name, "ses") for name in table["session"]]
    for name in ("image_path", "mask_path"):
        table[name] = [_beside(path, value) for value in table[name]]
    people = participant_ids(table).groupby(table["image_path"].map(os.path.realpath)).nunique()
    if (people > 1).any():
        say(f"{shown(path)}: {int((people > 1).sum())} files are the scans of several participants, the first: "
            f"{people.index[people > 1][0]}", level=4)
    return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def named_by_file(paths: pd.Series) -> list[str]:
    """Name scans without a participant by their file, and by a digest of its path if several files have that name.

    The order of rows does not matter, but adding a file of the same name renames the first.
    """
    names = paths.map(lambda path: re.sub(r"(\.nii|\.img)?(\.gz)?$", "", trimmed(Path(path).name)))
    digests = paths.map(lambda path: "-" + hashlib.blake2b(path.encode(), digest_size=4).hexdigest())
    return (UNNAMED + names + digests.where(names.map(str.casefold).duplicated(keep=False), "")).tolist()


def _beside(table: Path, value: str) -> str:
    """Make a path absolute, relative to its table's folder; symbolic links (of DVC, git-annex) are not resolved."""
    return os.path.abspath(table.parent / Path(value).expanduser()) if value else ""
