"""Who is who: the one place that reads the identity of a person, a session and a dataset.

`sub-001`, ` 001` and `001` are one person. `001` beside `1` in one dataset is a question that the table must answer.
What a table does not say is marked: `?` begins the name of a dataset that is only the table's file name, and of a
person who is only a scan.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kit.cohort.tabular import CohortError, TableError, read_foreign, trimmed
from kit.runs import shown

UNSAID = "?"
# A column's name: the headings that stand for it, the first that is there.
HEADINGS = {"participant": ("participant", "participant_id", "subject", "subject_id"),
            "session": ("session", "session_id"), "dataset": ("dataset",), "image_path": ("image_path",),
            "mask_path": ("mask_path",), "split": ("split",)}
SPLITS = ("pretrain", "train", "validation", "test", "out_of_distribution")
SPREADSHEETS_OWN = r"\d(?:\.\d+)?E\+\d+|\d{1,2}-[A-Z][a-z]{2}(?:-\d{2})?|[A-Z][a-z]{2}-\d{2}"  # 1.2E+11, 02-Jan, Jan-02

Aliases = dict[str, tuple[str, ...]]  # a person's key: all keys of that person


class IdentityError(CohortError):
    """It cannot be told who is who; the message asks what is needed."""


def headings(names: list[str], known: dict[str, tuple[str, ...]] = HEADINGS) -> list[str]:
    """Columns' names without space around them; those that say who, when and where in one spelling, whatever the case.

    Where two headings may name the participant, such as participant and subject, the second is a column like others.
    """
    names = [trimmed(name) for name in names]
    folded = [re.sub(r"[ -]+", "_", name.casefold()) for name in names]
    for wanted, spellings in known.items():
        taken = next((spelling for spelling in spellings if spelling in folded), None)
        names = [wanted if spelling == taken else name for name, spelling in zip(names, folded, strict=True)]
    return names


def split_names(column: pd.Series) -> pd.Series:
    """A column `split` with the kit's own names in lower case; others as they are."""
    return column.map(lambda name: name.casefold() if str(name).casefold() in SPLITS else name, na_action="ignore")


def read_id(text: object, prefix: str = "sub") -> str:
    """A participant's name without space around it and without BIDS's `sub-`; with `ses` a session's."""
    return re.sub(rf"^{prefix}-", "", trimmed(str(text)), flags=re.IGNORECASE)


def loose(text: object) -> str:
    """What names have in common that are likely to mean the same: without case, leading zeros, `.0` at the end."""
    plain = re.sub(r"^(\d+)\.0+$", r"\1", trimmed(str(text)).casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain)


def key(participant_id: str) -> str:
    """`dataset/participant` in the form that is compared between tables, stores and encoders; of no dataset `?/...`."""
    dataset, _, participant = participant_id.rpartition("/")
    return f"{UNSAID if dataset.startswith(UNSAID) else loose(dataset)}/{loose(read_id(participant))}"


def known_as(participant_id: str, aliases: Aliases | None = None) -> tuple[str, ...]:
    """All keys of a person, in order."""
    own = key(participant_id)
    return (aliases or {}).get(own, (own,))


def participant_ids(index: pd.DataFrame) -> pd.Series:
    """Participants with their dataset's name before them: `01` of one dataset is not `01` of another.

    Where `joined` has noted that two of them are one person, both have one name.
    """
    if "alias_of" in index:
        return index["alias_of"]
    return index["dataset"].astype(str) + "/" + index["participant"].astype(str)


def joined(index: pd.DataFrame, aliases: Aliases) -> pd.DataFrame:
    """The index with a column `alias_of`, if there are aliases: one name a person, the first of those in the index."""
    if not aliases:
        return index
    ids = participant_ids(index)
    first: dict[tuple[str, ...], str] = {}
    for name in sorted(set(ids)):
        first.setdefault(known_as(name, aliases), name)
    return index.assign(alias_of=[first[known_as(name, aliases)] for name in ids])


def read_aliases(path: Path | None) -> Aliases:
    """Read who is known under several names: a table with the columns dataset, participant and person.

    Rows of the same `person` are one.

    Raises:
        IdentityError: no such table, a column is missing, or one participant is two persons.
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
    people = table["person"].groupby(keys).nunique()
    if (several := people > 1).any():
        raise IdentityError(f"{shown(path)}: {people.index[several][0]} is several persons; keep one row for each "
                            "participant")
    groups = keys.groupby(table["person"].to_numpy()).unique()
    return {name: tuple(sorted(group)) for group in groups for name in group}


def check_names(cohort: pd.DataFrame, where: str) -> None:
    """Ask about names that may be one person's, and refuse those that a spreadsheet has spoilt.

    Raises:
        IdentityError: two names of one dataset, or two datasets, differ by leading zeros, case or `.0` alone.
    """
    if taken := sorted({name for name in cohort["participant"] if re.fullmatch(SPREADSHEETS_OWN, name)})[:3]:
        raise IdentityError(f"{where}: participant {', '.join(taken)}: a spreadsheet made a date or a rounded number "
                            "of this name; write the names anew, in a column of text")
    alike(cohort["dataset"].unique(), f"{where}: dataset")
    for dataset, rows in cohort.groupby("dataset", sort=False):
        alike(rows["participant"].unique(), f"{where}: participant" + (f" in {dataset}" if dataset else ""))


def alike(names: Iterable[str], what: str) -> None:
    """Raises IdentityError where two names are likely to mean the same."""
    names = pd.Series(sorted(names), dtype=str)
    several = [group.tolist() for _, group in names.groupby(names.map(loose)) if len(group) > 1]
    if several:
        more = f" (and {len(several) - 1} more such)" if len(several) > 1 else ""
        raise IdentityError(f"{what}: are {' and '.join(map(repr, several[0]))} one or several?{more} Write one name "
                            "for one, or names that differ by more than zeros and case")


def check_people_known(index: pd.DataFrame, rows_are_people: bool) -> None:
    """Raises IdentityError where rows have no participant, unless each is said to be a person."""
    if rows_are_people:
        return
    unsaid = int(index["participant"].astype(str).str.startswith(UNSAID).sum())
    if unsaid:
        raise IdentityError(f"{unsaid} of {len(index)} scans have no participant, so nobody can tell whether one "
                            "stands on two sides: add a column participant to the cohort and run 1_preprocess again, "
                            "or, if each is of another person, set rows_are_people: true")


def check_datasets_known(index: pd.DataFrame, beside: str) -> None:
    """Raises IdentityError where the dataset is only a file's name, which says nothing `beside` other scans."""
    unsaid = sorted({name for name in index["dataset"].astype(str) if name.startswith(UNSAID)})
    if unsaid:
        name = unsaid[0].removeprefix(UNSAID)
        raise IdentityError(f"the cohort {name} has no column dataset (a BIDS folder: no Name), so its people cannot "
                            f"be told from those of {beside}: add one, the same wherever the same study is meant (with "
                            f"{name!r} nothing is prepared anew), and run 1_preprocess again")
