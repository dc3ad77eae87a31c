"""What is wrong with files that parameters name, looked at before any work; an empty list where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def alias_problems(aliases: Path | None) -> list[str]:
    """What is wrong with the table of people with several names."""
    from kit.cohort.identity import IdentityError, read_aliases

    try:
        read_aliases(aliases)
    except IdentityError as error:
        return [f"aliases: {error}"]
    return []


def label_problems(name: str, prepared: Path, task: str, task_type: str, missing_codes: list[Any]) -> list[str]:
    """What is wrong with a label column of prepared scans."""
    from kit.cohort.labels import LabelError, read_labels
    from kit.cohort.tabular import read_table

    try:
        read_labels(read_table(prepared / "index.csv"), task, task_type, missing_codes)
    except LabelError as error:
        return [f"{name}: {error}"]
    return []
