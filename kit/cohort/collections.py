"""Read public collections as downloaded: FOMO60K, FOMO300K and OpenMind.

Layouts follow FGA-DIKU/fomo_mri_datasets (`FOMO60K_preprocessing/README.md`, `scripts/data_utils.py`) and
MIC-DKFZ/nnssl (`src/nnssl/data/raw_dataset.py`, `src/nnssl/dataset_conversion/Dataset001_OpenMind.py`) on GitHub, and
the file listing of huggingface.co/datasets/AnonRes/OpenMind:

- FOMO: `PT001_OASIS1/sub_1/ses_1/t1.nii.gz` and `t1_2.nii.gz`, `PT001_X/sub-1/ses-1/anat/FLAIR.nii.gz`, or
  `PT030_OpenNeuro/ds000001/sub-01/ses-01/anat/sub-01_ses-01_run-2_T1w.nii.gz`, with a `participants.tsv` that holds
  dataset, participant_id, session_id and labels. Scans of unknown contrast are named `scan`.
- OpenMind: `openneuro_metadata.csv` beside `OpenMind/ds000001/sub-01/anat/sub-01_T1w.nii.gz`, or nnssl's
  `pretrain_data.json`: datasets > subjects > sessions > images, with one age per subject, that of the first scan.

None of them has brain masks: OpenMind's anatomy masks cover everything but air. FOMO60K's scans are skull-stripped.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kit.cohort.tabular import COLUMNS, CohortError, TableError, read_foreign, say, trimmed, typed
from kit.runs import shown

IDENTITY = ["dataset", "participant", "session"]
# Rows of participants.tsv are matched to scans by whichever of these columns the file has. `visit` is the session's
# folder; `_row` appends acq-, run-, ... to `session`, to tell a visit's scans apart.
KEYS = ("dataset", "participant", "visit")
OPENMIND = ("openneuro_metadata.csv", "pretrain_data.json")  # the CSV first: it has each scan's own age
# Contrast names in lower case and their BIDS suffixes; a contrast-enhanced T1w is called T1ce here.
CONTRASTS = {"t1": "T1w", "t1w": "T1w", "t1weighted": "T1w", "mprage": "T1w", "t2": "T2w", "t2w": "T2w",
             "t2weighted": "T2w", "pd": "PDw", "pdw": "PDw", "flair": "FLAIR",
             **dict.fromkeys(("t1c", "t1ce", "t1wce", "t1gd", "t1post"), "T1ce")}
_SESSION = "sub[-_]*/ses[-_]*"
# Found only in BIDS: a pattern, and what becomes of it if such a folder is read as FOMO.
_BIDS_ALONE = {"sub[-_]*/anat": "participants without a session folder are left out",
               "sub[-_]*/sub*_sessions.tsv": "sessions.tsv is not read",
               "derivatives": "masks in derivatives/ are not used"}


def is_collection(path: Path) -> bool:
    """Return whether a path is one of these collections, or one dataset of FOMO, rather than a table or BIDS."""
    if path.is_file():
        return path.name in OPENMIND or path.suffix == ".json"
    if any((path / name).is_file() for name in OPENMIND):
        return True
    bids = (path / "dataset_description.json").is_file() and not any(path.glob("PT[0-9]*"))
    return path.is_dir() and not bids and next(_within(path, _SESSION), None) is not None


def read_collection(path: Path, contrast: str = "T1w") -> pd.DataFrame:
    """Read a collection's scans of one contrast, and print how many of other contrasts are left out.

    Args:
        path: the collection's folder, or OpenMind's `pretrain_data.json` or `openneuro_metadata.csv`.
        contrast: as in `kit.cohort.tables.read_cohort`.

    Returns:
        one scan a row: participant, session, dataset, image_path, mask_path (""), then the collection's labels.

    Raises:
        CohortError: a malformed file, no scan of this contrast, or sessions that are still zipped.
    """
    name = next((each for each in OPENMIND if (path / each).is_file()), None)
    file = path / name if name else path
    rows: Iterable[dict[str, Any]]
    if not file.is_file():
        rows = _fomo(path)
    elif file.suffix == ".json":
        rows = _nnssl(file)
    else:
        rows = _openmind(file)
    rows = list(rows)
    taken = set(pick([row["contrast"] for row in rows], contrast, shown(path)))
    table = pd.DataFrame([row for number, row in enumerate(rows) if number in taken])
    again = table.duplicated(IDENTITY)  # such as an MPRAGE and a T1w of one session
    table.loc[again, "session"] += "_" + table.loc[again, "image_path"].map(lambda image: _stem(Path(image).name))
    if file.suffix == ".json":
        table = _typed(table, [*COLUMNS, "contrast", "visit"], file)
    elif not file.is_file():
        table = _with_participants(path, table)
    return table.drop(columns=["contrast", "visit"])


def contrast_of(name: str) -> str:
    """Return a file name's contrast: "t1_2.nii.gz" is "T1w"; one not in CONTRASTS stays as written, "dwi_bval1000"."""
    parts = [part for part in _stem(name).split("_") if not part.isdigit()]
    words = [part for part in parts if "-" not in part] or [""]
    contrast = CONTRASTS.get(words[-1].lower(), "_".join(words))
    enhanced = any(part.startswith("ce-") for part in parts)
    return f"{contrast.removesuffix('w')}ce" if enhanced else contrast


def pick(contrasts: list[str], wanted: str, where: str) -> list[int]:
    """Return the positions of the wanted contrast, and print what is left out.

    Raises:
        CohortError: none has it.
    """
    wanted = contrast_of(wanted)
    taken = [number for number, contrast in enumerate(contrasts) if contrast == wanted]
    others = sorted(Counter(contrast for contrast in contrasts if contrast != wanted).items(),
                    key=lambda kind: (-kind[1], kind[0]))
    listed = ", ".join(f"{count} {contrast}" for contrast, count in others[:8])
    listed += f", {sum(count for _, count in others[8:])} of other kinds" if others[8:] else ""
    if not taken:
        raise CohortError(f"{where}: no {wanted} scans in it" + (f", but {listed}; ask for another contrast" if others
                                                                 else "; is it the right folder?"))
    if others:
        print(f"{where}: {len(taken)} {wanted} scans; left out: {listed}")
    return taken


def visible(files: Iterable[Path]) -> list[Path]:
    """Return the files that are not hidden: macOS puts `._t1.nii.gz`, which is no scan, beside `t1.nii.gz`."""
    return [file for file in files if not file.name.startswith(".")]


def _within(folder: Path, pattern: str) -> Iterator[Path]:
    """Find a pattern in a dataset's folder: this one, or one that lies one or two levels down."""
    made = {"derivatives", "sourcedata"}  # of BIDS: other files of the same people
    return (found for above in ("", "*/", "*/*/") for found in folder.glob(above + pattern)
            if not made & set(found.relative_to(folder).parent.parts))


def _fomo(folder: Path) -> Iterator[dict[str, Any]]:
    sessions = sorted(_within(folder, _SESSION))
    if lost := [words for pattern, words in _BIDS_ALONE.items() if next(_within(folder, pattern), None)]:
        say(f"{shown(folder)} is read as FOMO (sub-*/ses-*), so {', '.join(lost)}; if it is BIDS, read each dataset by "
            "itself, with its dataset_description.json")
    if zipped := sum(session.suffix == ".zip" and not session.with_suffix("").is_dir() for session in sessions):
        raise CohortError(f"{shown(folder)}: {zipped} of its sessions are still zipped; unzip each one in its folder")
    for session in [session for session in sessions if session.is_dir()]:
        dataset = session.parents[1].relative_to(folder).as_posix()
        for scan in sorted(each for ending in (".nii", ".nii.gz") for each in visible(session.rglob(f"*{ending}"))):
            yield _row(folder.name if dataset == "." else dataset, session.parent.name, session.name, scan,
                       contrast_of(scan.name))


def _nnssl(file: Path) -> Iterator[dict[str, Any]]:
    try:
        datasets = json.loads(file.read_text(encoding="utf-8"))["datasets"]
        for dataset, content in datasets.items():
            for participant, subject in content["subjects"].items():
                for session, images in subject["sessions"].items():
                    for image in images["images"]:
                        labels: dict[str, Any] = {}
                        for held in (subject.get("subject_info"), images.get("session_info"), image.get("image_info")):
                            labels |= held or {}
                        labels = {name: "" if value is None or value != value else trimmed(str(value))  # NaN != NaN
                                  for name, value in labels.items()}
                        scan = _resolved(image["image_path"], file)
                        yield _row(dataset, participant, session, scan, _contrast(image["modality"], scan), labels)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CohortError):
            raise
        raise CohortError(f"{shown(file)} is not an nnssl collection (datasets > subjects > sessions > images); "
                          "create it again with nnssl's conversion script") from error


def _openmind(file: Path) -> Iterator[dict[str, Any]]:
    table = _table(file, ("image_path", "modality"))
    if missing := {"image_path", "modality"} - set(table):
        raise CohortError(f"{shown(file)}: needs the columns {', '.join(sorted(missing))}; download it again")
    folder = file.parent / "OpenMind"
    drop = {"image_path", "modality", "unique_id", *(name for name in table if name.endswith("_path"))}
    for row in table.to_dict("records"):
        parts = row["image_path"].split("/")
        if len(parts) < 3 or not all(parts):
            raise CohortError(f"{shown(file)}: image_path is {row['image_path']!r}, not dataset/participant/.../scan; "
                              "download it again")
        dataset, participant, *inner = parts
        session = inner[0] if inner[0].startswith("ses-") else "ses-DEFAULT"
        scan = folder / row["image_path"]
        yield _row(dataset, participant, session, scan, _contrast(row["modality"], scan),
                   {name: value for name, value in row.items() if name not in drop})


def _row(dataset: str, participant: str, session: str, scan: Path, contrast: str,
         labels: dict[str, Any] | None = None) -> dict[str, Any]:
    parts = _stem(scan.name).split("_")
    others = [part for part in parts[:-1] if "-" in part and not part.startswith(("sub-", "ses-"))]  # acq-..., run-2
    others += [f"run-{parts[-1]}"] if parts[-1].isdigit() else []
    own = {"participant": _bare(participant), "session": "_".join([_bare(session), *others]), "dataset": dataset,
           "image_path": str(scan), "mask_path": "", "contrast": contrast, "visit": _bare(session)}
    return own | {name: value for name, value in (labels or {}).items() if name not in own}


def _contrast(modality: str, scan: Path) -> str:
    """Return the contrast named in a table; only the file name says whether a contrast agent was given."""
    modality = str(modality).replace("-", "")  # MP-RAGE: a hyphen would make it a BIDS entity
    return contrast_of(f"ce-agent_{modality}" if "_ce-" in scan.name else modality)


def _resolved(text: str, file: Path) -> Path:
    """Resolve a path from nnssl: absolute, relative to the file, or starting with a variable such as `$nnssl_raw`."""
    variable = re.match(r"\$(\w+)/?", text)
    if variable is None:
        return file.parent / text
    if variable[1] not in os.environ:
        raise CohortError(f"{shown(file)}: set the environment variable {variable[1]} to the folder that its paths "
                          "begin with")
    return Path(os.environ[variable[1]]) / text[variable.end():]


def _with_participants(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Add the labels of each `participants.tsv`: the collection's own and those of its datasets."""
    own, table = list(table), table.reset_index(drop=True)
    for place, dataset in ((folder, None), *((folder / name, name) for name in table["dataset"].unique())):
        labels = _participants(place, dataset)
        if labels is None:
            continue
        if dataset is None and "dataset" not in labels and table["dataset"].nunique() > 1:
            raise CohortError(f"{shown(place / 'participants.tsv')}: needs a column dataset, as the collection has "
                              "several, whose participants may have the same names; or give each dataset its own file")
        keys = [key for key in KEYS if key in labels]  # each table's own: only some have sessions
        found = table[keys].merge(labels.assign(**{" row": range(len(labels))}), on=keys, how="left")
        if without := len(labels) - found.pop(" row").nunique():
            say(f"{shown(place / 'participants.tsv')}: {without} of {len(labels)} rows are of no scan taken; their "
                "labels are not used")
        for name in [name for name in found if name not in own]:
            table[name] = table[name].replace("", None).fillna(found[name]) if name in table else found[name]
    return _typed(table, own, folder)  # only now, as types may differ between files


def _typed(table: pd.DataFrame, own: Sequence[str], path: Path) -> pd.DataFrame:
    """Return the table with its labels, all columns but `own`, typed as those of tables are."""
    table = table.fillna("")
    for name in [name for name in table if name not in own]:
        table[name] = typed(table[name], f"{shown(path)}: {name}")
    return table


def _participants(folder: Path, dataset: str | None) -> pd.DataFrame | None:
    file = folder / "participants.tsv"
    if not file.is_file():
        return None
    labels = _table(file, None)
    if "participant_id" not in labels:
        raise CohortError(f"{shown(file)}: needs a column participant_id; found {', '.join(labels.columns)}")
    labels["participant"] = labels.pop("participant_id").map(_bare)
    if "session_id" in labels:
        labels["visit"] = labels.pop("session_id").map(_bare)
    if dataset is not None:
        labels["dataset"] = dataset
    twice = labels.duplicated([key for key in KEYS if key in labels])
    if twice.any():
        raise CohortError(f"{shown(file)}: {labels['participant'][twice].iloc[0]} is listed twice; a row per session "
                          "needs a column session_id")
    return labels


def _table(file: Path, text: tuple[str, ...] | None) -> pd.DataFrame:
    try:
        return read_foreign(file, _names, text)
    except TableError as error:
        raise CohortError(f"{error}; download it again") from None


def _names(header: list[str]) -> list[str]:
    """Return the column names; a column without one (row numbers, for example) is named by its position."""
    return [trimmed(name) or f"column {place}" for place, name in enumerate(header, 1)]


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")


def _bare(name: str) -> str:
    """Return an identifier without sub-, sub_, ses- or ses_; unnamed sessions become 01, as for BIDS folders."""
    bare = re.sub(r"^(sub|ses)[-_]", "", str(name))
    return "01" if bare == "DEFAULT" else bare
