"""Wording and checks shared by figures and tables: readable names, units, scores with intervals, missing columns."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

UNITS = {"age": "years"}  # of numeric labels; others are shown without a unit


def readable(name: str) -> str:
    return str(name).replace("_", " ")


def in_units(words: str, task: str) -> str:
    return f"{words} ({UNITS[task]})" if task in UNITS else words


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 2, sign: str = "") -> str:
    """Format a score as text: `0.73 [0.65, 0.79]`, or `0.73 [–]` without an interval, `– [–]` without a score
    (None or nan).

    Args:
        sign: "+" for a difference, to always write its sign.
    """
    known = not pd.isna(low) and not pd.isna(high)
    form = f"{sign}.{digits}f"
    return ("– " if pd.isna(value) else f"{value:{form}} ") + (f"[{low:{form}}, {high:{form}}]" if known else "[–]")


def need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Raise ValueError if a table lacks columns, or has no rows."""
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        lacks = f"lacks {', '.join(missing)}" if missing else "has no rows"
        raise ValueError(f"{name} {lacks}; its columns are {', '.join(map(str, table.columns))}")


def need_one(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Raise ValueError if a column holds several values, which should not be mixed in one figure."""
    for column in [name for name in columns if name in table.columns]:
        if len(values := table[column].unique()) > 1:
            raise ValueError(f"{name} holds several of {column}: {', '.join(map(str, values))}; select one")
