"""Identify people, sessions and datasets by name.

`sub-001`, ` 001` and `001` are one person. `001` and `1` in one dataset are ambiguous: the table must be corrected.
A leading `?` marks what a table does not say: a dataset named only by its table's file, or a person named only by a
scan's file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kit.cohort.tabular import CohortError, TableError, read_foreign, spelled, trimmed
from kit.runs import shown

UNNAMED = "?"
# Column name: the headings accepted for it, in order of preference.
HEADINGS = {"participant": ("participant", "participant_id", "subject", "subject_id"),
            "session": ("session", "session_id"), "dataset": ("dataset",), "image_path": ("image_path",),
            "mask_path": ("mask_path",), "split": ("split",)}
TRAVELLING = "travelling"  # the split of people scanned at several sites; neither tasks nor pretraining use it
SPLITS = ("pretrain", "train", "validation", "test", "out_of_distribution", TRAVELLING)
_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"  # so that Pat-01 stays a name
SPREADSHEETS_OWN = rf"\d(?:\.\d+)?E\+\d+|\d{{1,2}}-{_MONTH}(?:-\d{{2}})?|{_MONTH}-\d{{2}}"  # 1.2E+11, 02-Jan, Jan-02

Aliases = dict[str, tuple[str, ...]]  # from each `key` of a person to all keys of that person, sorted


class IdentityError(CohortError):
    """Names leave open who is who; the message says what is needed."""


def headings(names: list[str], known: dict[str, tuple[str, ...]] = HEADINGS) -> list[str]:
    """Trim column headings, and map those of `known` to their standard names, ignoring case.

    If two headings could name the participant (participant and subject, say), the second stays an ordinary column.
    """
    names = [trimmed(name) for name in names]
    folded = [re.sub(r"[ -]+", "_", name.casefold()) for name in names]
    for wanted, spellings in known.items():
        taken = next((spelling for spelling in spellings if spelling in folded), None)
        names = [wanted if spelling == taken else name for name, spelling in zip(names, folded, strict=True)]
    return names


def split_names(column: pd.Series) -> pd.Series:
    """Write the kit's own split names in lower case; leave other names as they are."""
    return column.map(lambda name: name.casefold() if str(name).casefold() in SPLITS else name, na_action="ignore")


def read_id(text: object, prefix: str = "sub") -> str:
    """Return a participant's name without surrounding space or BIDS's `sub-`; with `ses`, a session's."""
    return re.sub(rf"^{prefix}-", "", trimmed(str(text)), flags=re.IGNORECASE)


def normalised(text: object) -> str:
    """Reduce a name to what its likely variants share.

    Lower case, no zeros before a number, no `.0` after a whole number.
    """
    plain = re.sub(r"^(\d+)\.0+$", r"\1", trimmed(str(text)).casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain)


def plain_name(name: object) -> str:
    """Strip case, leading zeros and punctuation from a dataset's name, so that HABS-HD and habs_hd are the same."""
    return re.sub(r"[\W_]+", "", normalised(name))


def key(participant_id: str) -> str:
    """Normalise `dataset/participant` to compare tables, stores and encoders; an unnamed dataset gives `?/...`."""
    dataset, _, participant = participant_id.rpartition("/")
    return f"{UNNAMED if dataset.startswith(UNNAMED) else normalised(dataset)}/{normalised(read_id(participant))}"


def known_as(participant_id: str, aliases: Aliases | None = None) -> tuple[str, ...]:
    """Return all keys of a person (see `key`), sorted; without aliases only the one of this name."""
    own = key(participant_id)
    return (aliases or {}).get(own, (own,))


def participant_ids(index: pd.DataFrame) -> pd.Series:
    """Return participants as `dataset/participant`, since `01` of one dataset is not `01` of another.

    If `joined` has found that two of them are one person, both get the same name.
    """
    if "alias_of" in index:
        return index["alias_of"]
    return index["dataset"].astype(str) + "/" + index["participant"].astype(str)


def site_names(index: pd.DataFrame) -> pd.Series:
    """Return each scan's site: its cell in the column `site` (ignoring case), nan if empty.

    Without such a column the site is the dataset. A number gets its dataset as a prefix, since site 1 of two datasets
    are different sites. Site 1 is also 1.0: a column of whole numbers with an empty cell is read as floats.
    """
    site = spelled(index, "site")
    names = index[site or "dataset"]
    text = names.astype(str).str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    numbered = text.str.fullmatch(r"[\d.]+") & (site is not None)
    return text.where(~numbered, index["dataset"].astype(str) + "/" + text).where(names.notna() & (text != ""))


def joined(index: pd.DataFrame, aliases: Aliases) -> pd.DataFrame:
    """Add a column `alias_of` if there are aliases: one `dataset/participant` per person.

    It is the alphabetically first of those in the index.

    Raises:
        IdentityError: no alias can be of the people of a dataset, as the index does not name it, or the aliases name
            it with other punctuation.
    """
    if not aliases:
        return index
    unnamed = index["dataset"].astype(str).str.startswith(UNNAMED)
    if len(index) and unnamed.all() and not any(name.startswith(UNNAMED) for name in aliases):
        raise IdentityError("aliases: the cohort has no column dataset, so nobody in the table of aliases is found in "
                            "it: add the column, or write the dataset there as in index.csv, with its leading ?")
    written = sorted({name.rpartition("/")[0] for name in aliases})
    for name in index["dataset"][~unnamed].unique():
        alike = [other for other in written if plain_name(other) == plain_name(name)]
        if alike and normalised(name) not in alike:
            raise IdentityError(f"aliases: dataset {name!r} of the cohort is {alike[0]!r} in the table of aliases, "
                                "where none of its people would be found; write it there as in the cohort")
    ids = participant_ids(index)
    first: dict[tuple[str, ...], str] = {}
    for name in sorted(set(ids)):
        first.setdefault(known_as(name, aliases), name)
    return index.assign(alias_of=[first[known_as(name, aliases)] for name in ids])


def read_aliases(path: Path | None) -> Aliases:
    """Read a table of people known under several names: columns dataset, participant and person.

    Rows with the same `person` are one person.

    Raises:
        IdentityError: no such table, a missing column or cell, persons whose names differ only by leading zeros, case
            or `.0`, or one participant listed as two persons.
    """
    if path is None:
        return {}
    columns = ("dataset", "participant", "person")
    try:
        table = read_foreign(path, headings, text=columns)
    except TableError as error:
        raise IdentityError(str(error)) from None
    if missing := [name for name in columns if name not in table or table[name].eq("").any()]:
        raise IdentityError(f"{shown(path)}: needs {', '.join(columns)} in each row; {missing[0]} is missing")
    keys = pd.Series([key(f"{row.dataset}/{row.participant}") for row in table.itertuples()], dtype=str)
    check_spellings(table["person"].unique(), f"{shown(path)}: person")
    people = table["person"].groupby(keys).nunique()
    if (several := people > 1).any():
        raise IdentityError(f"{shown(path)}: {people.index[several][0]} is listed as several persons; keep one row "
                            "per participant")
    groups = keys.groupby(table["person"].to_numpy()).unique()
    return {name: tuple(sorted(group)) for group in groups for name in group}


def check_names(cohort: pd.DataFrame, where: str) -> None:
    """Refuse names that may mean the same person or dataset, and names that a spreadsheet has corrupted.

    Raises:
        IdentityError: two participants of a dataset, or two datasets, differ only by leading zeros, case or `.0`; or
            a name looks like a spreadsheet's date or rounded number.
    """
    if taken := sorted({name for name in cohort["participant"] if re.fullmatch(SPREADSHEETS_OWN, name)})[:3]:
        raise IdentityError(f"{where}: participant {', '.join(taken)}: a spreadsheet has turned the name into a date "
                            "or a rounded number; enter the names again, in a column formatted as text")
    check_spellings(cohort["dataset"].unique(), f"{where}: dataset")
    for dataset, rows in cohort.groupby("dataset", sort=False):
        check_spellings(rows["participant"].unique(), f"{where}: participant" + (f" in {dataset}" if dataset else ""))


def check_spellings(names: Iterable[str], what: str) -> None:
    """Raise IdentityError if two names are likely to mean the same."""
    column = pd.Series(sorted(names), dtype=str)
    several = [group.tolist() for _, group in column.groupby(column.map(normalised)) if len(group) > 1]
    if several:
        more = f" (and {len(several) - 1} more such)" if len(several) > 1 else ""
        raise IdentityError(f"{what}: are {' and '.join(map(repr, several[0]))} the same?{more} If so, write them "
                            "alike; if not, use names that differ by more than zeros and case")


def check_people_known(index: pd.DataFrame, rows_are_people: bool) -> None:
    """Raise IdentityError if scans have no participant, unless the caller says each row is a different person."""
    if rows_are_people:
        return
    unsaid = int(index["participant"].astype(str).str.startswith(UNNAMED).sum())
    if unsaid:
        raise IdentityError(f"{unsaid} of {len(index)} scans have no participant, so one person's scans could be in "
                            "both training and test: add a column participant to the cohort and run 1_preprocess "
                            "again, or, if each scan is of a different person, set rows_are_people: true")


def _without_dataset(index: pd.DataFrame) -> list[str]:
    """Return the files or folders that stand for the datasets of scans without one."""
    return sorted({name.removeprefix(UNNAMED) for name in index["dataset"].astype(str) if name.startswith(UNNAMED)})


def unnamed_datasets(cohort: pd.DataFrame) -> str:
    """Return a warning of datasets named only by a file or folder, which `check_datasets_known` refuses; "" if none."""
    unsaid = _without_dataset(cohort)
    return (f"{', '.join(unsaid)}: the scans have no dataset name, and 3_finetune refuses to test pretrained encoders "
            "on them; add a column dataset (BIDS: the Name in dataset_description.json)") if unsaid else ""


def check_datasets_known(index: pd.DataFrame, beside: str) -> None:
    """Raise IdentityError if a dataset is named only by its file: its people may also be among `beside`."""
    if unsaid := _without_dataset(index):
        name = unsaid[0]
        raise IdentityError(f"the cohort {name} has no column dataset (a BIDS folder: no Name), so its people cannot "
                            f"be told from those of {beside}: add one, with one value per study in all cohorts (if "
                            f"that is {name!r}, finished scans are kept), and run 1_preprocess again")
