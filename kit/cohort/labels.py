"""Read a label column as numbers, with its kind checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from kit.cohort.identity import normalised
from kit.cohort.tabular import CODES_FOR_MISSING, DATE, DECIMAL_COMMA, NUMBER, looks_missing, trimmed
from kit.errors import KitError

Kind = Literal["classification", "regression"]
# Whole numbers 0..n or 1..n without a gap look like class codes if there are at most this many distinct ones, with
# three or more rows for each on average.
MOST_CODES = 20
MOST_CLASSES = 20
OLDEST = 120  # years
CONTROLS = ("cn", "nc", "hc", "control", "controls", "con", "healthy", "normal")  # the negative class, ignoring case


class LabelError(KitError, ValueError):
    """A label column cannot be used as asked; the message says why."""


@dataclass(frozen=True)
class Labels:
    """One label per row of an index.

    Attributes:
        task: the column's name.
        kind: "classification" has two or more classes; "regression" predicts the number itself.
        values: (rows,) float64; class 0.0 to K - 1, or the number; nan where the scan has no label.
        classes: the names of classes 0 to K - 1; empty for regression.
    """

    task: str
    kind: Kind
    values: np.ndarray
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Number of network outputs needed: K logits for more than two classes, else one."""
        return len(self.classes) if len(self.classes) > 2 else 1


def read_labels(index: pd.DataFrame, task: str, kind: str = "auto", missing_codes: Iterable[str | float] = (),
                classes: Sequence[str] = (), beside: Sequence[float] | np.ndarray = ()) -> Labels:
    """Read a label column.

    With ``auto``, two distinct values or text mean classification, and many numbers mean regression. A few small whole
    numbers, or numbers or text next to a likely missing-value code, are ambiguous and raise an error. Classes are
    sorted; of two, the last is the positive one, and one of `CONTROLS` comes first: CN, AD. If there are more than
    two, each needs at least two scans. Empty cells and `missing_codes` mean no label.

    Args:
        index: one scan a row.
        task: the label column.
        kind: "auto", "classification" or "regression"; the last two are taken at their word, so that -9 is a value.
        missing_codes: values of the label that mean missing.
        classes: the classes of the cohort that a model learns from, if these labels only test it; some may be absent.
        beside: the training cohort's numbers, if ``auto`` made them a regression. Numbers here that look like codes
            for a missing value among these and those are then refused, although `kind` is "regression".

    Raises:
        LabelError: no such column, no values, text where numbers are needed, one class or more than `MOST_CLASSES`,
            a class of one scan among several, a class outside `classes`, classes that differ only by case or zeros, two
            classes of one sex, or values that are ambiguous under ``auto`` or `beside` others.
    """
    if task not in index:
        raise LabelError(f"{task}: no such label column; the index has {', '.join(map(str, index.columns))}")
    column = _without(index[task], missing_codes)
    present = column.dropna()
    if present.empty:
        raise LabelError(f"{task}: the column is empty")
    numeric = pd.api.types.is_numeric_dtype(present)
    is_number = pd.Series(True, present.index) if numeric else present.str.fullmatch(NUMBER)
    if auto := kind == "auto":
        kind = "regression" if is_number.mean() > 0.5 and present.nunique() > 2 else "classification"
        if is_number.all():
            _ask_about_codes(task, present)
    if kind == "regression":
        numbers = _numbers(task, column, present, is_number)
        if len(beside):
            _ask_about_odd_numbers(task, pd.to_numeric(present), beside)
        return Labels(task, "regression", numbers)
    known = tuple(classes) or _classes(task, present, ask=auto and not is_number.all())
    names = present.map(_name)
    if others := sorted(set(names) - set(known)):
        raise LabelError(f"{task}: the training classes are {', '.join(sorted(known))}, but here they are "
                         f"{', '.join(sorted(set(names)))}; rename {', '.join(others)}, empty the cells of scans "
                         "of other classes, or list codes for missing values in missing_codes")
    values = names.map({name: float(number) for number, name in enumerate(known)}).reindex(column.index)
    return Labels(task, "classification", values.to_numpy(np.float64), known)


def _without(column: pd.Series, codes: Iterable[str | float]) -> pd.Series:
    """Return the column with missing-value codes as nan; text columns are trimmed and hold only text.

    Codes are compared ignoring case, and numbers by value: na is also NA, and -9 also -9.0.
    """
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        column = column.map(lambda cell: trimmed(_name(cell)), na_action="ignore").astype("str")
        column = column.where(column != "")
        return column.where(~column.map(_as_code, na_action="ignore").isin([_as_code(code) for code in codes]))
    numbers = pd.to_numeric(pd.Series(list(codes), dtype=object), errors="coerce")
    column = column.astype(np.float64)
    return column.where(~column.isin(numbers.dropna()))


def _as_code(cell: object) -> str:
    """Return a cell's text in the form in which it is compared with codes."""
    text = trimmed(_name(cell)).casefold()
    return _name(float(text)) if re.fullmatch(NUMBER, text) else text


def _ask_about_codes(task: str, present: pd.Series) -> None:
    """Refuse a column of numbers that may be class codes, or hold codes for a missing value."""
    numbers = pd.to_numeric(present)
    values = numbers.unique()
    rest = [value for value in values if value not in CODES_FOR_MISSING]
    counts = ", ".join(f"{value:g} ({count})" for value, count in numbers.value_counts().sort_index().items())
    whole = bool(np.isfinite(values).all() and (values == np.round(values)).all())
    # Two values are two classes, unless just one of them looks like a code (0 and 9); -1 and 1 are classes, too.
    if len(values) <= 2 and (len(rest) != 1 or set(values) == {-1, 1}):
        return
    run = sorted(value for value in values if value in rest or 0 <= value <= MOST_CODES)
    counted = (len(run) <= MOST_CODES and len(present) >= 3 * len(run)
               and run in [list(range(first, first + len(run))) for first in (0, 1)])
    if whole and (counted or all(abs(value) < 10 for value in rest)):
        raise LabelError(f"{task}: are these class codes or numbers? Found {counts}. Set task_type: regression or "
                         "classification, and list codes for missing values in missing_codes")
    _ask_about_odd_numbers(task, numbers)


def _ask_about_odd_numbers(task: str, numbers: pd.Series, beside: Sequence[float] | np.ndarray = ()) -> None:
    """Refuse numbers that look like codes for a missing value among each other and those `beside` them."""
    values = {*numbers, *beside}
    odd = _unlikely(task, values)
    rest = [value for value in values if value not in CODES_FOR_MISSING and value not in odd]
    strange = [value for value in numbers.unique() if rest and (value in odd or value in CODES_FOR_MISSING
               and (value < 0 <= min(rest) or abs(value) > 2 * max(map(abs, rest))))]
    if strange:
        listed = ", ".join(f"{value:g}" for value in sorted(strange)[:5]) + ", ..." * (len(strange) > 5)
        raise LabelError(f"{task}: {listed} in {int(numbers.isin(strange).sum())} rows looks like a code for a missing "
                         f"value among numbers from {min(rest):g} to {max(rest):g}: list it in missing_codes, or, if "
                         "it is a real value (an age in months, a change since baseline), set task_type (5_benchmark: "
                         "task_types): regression")


def _unlikely(task: str, values: Collection[float]) -> list[float]:
    """Return those of distinct numbers that may be codes for a missing value, besides `CODES_FOR_MISSING`.

    Of ages, those below 0 or above `OLDEST`. Of other labels a negative whole number, if there is one only, or two or
    three beside five times as many others, if they leave gaps (-10, -3, -1 of UK Biobank; not -3, -2, -1).
    """
    if task.casefold() == "age":
        return [value for value in values if np.isfinite(value) and not 0 <= value <= OLDEST]
    negative = sorted(value for value in values if np.isfinite(value) and value < 0)
    below = [value for value in negative if value not in CODES_FOR_MISSING]
    gaps = negative != list(range(-len(negative), 0))
    few = len(below) == 1 or len(below) <= 3 and gaps and len(values) - len(negative) >= 5 * len(negative)
    return below if few and all(value == round(value) for value in below) else []


def _numbers(task: str, column: pd.Series, present: pd.Series, is_number: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    if not is_number.all():
        text = sorted(set(present[~is_number]))
        reason = ("decimal commas; write 63.5" if present[~is_number].str.fullmatch(DECIMAL_COMMA).any() else
                  "dates; write a number, such as years" if present[~is_number].str.fullmatch(DATE).any() else
                  "leave the cell empty where a scan has no label, or list its codes in missing_codes")
        raise LabelError(f"{task}: text where numbers are needed: {', '.join(text[:5])}; {reason}")
    if (infinite := np.isinf(numbers)).any():
        raise LabelError(f"{task}: {int(infinite.sum())} numbers are infinite or too large; leave such cells empty")
    return numbers


def _classes(task: str, present: pd.Series, ask: bool) -> tuple[str, ...]:
    """Return the classes in order; `ask`: refuse text that looks like a code for a missing value."""
    counts = present.value_counts().sort_index()
    listed = ", ".join(f"{_name(value)} ({count})" for value, count in counts.head(8).items())
    if not pd.api.types.is_numeric_dtype(present):
        alike = counts.groupby(counts.index.map(normalised)).agg(lambda group: list(group.index))
        several = [names for names in alike if len(names) > 1]
        if several:
            raise LabelError(f"{task}: {' and '.join(several[0])} differ only by case or zeros: one class or two? "
                             f"Found {listed}. Write each class in one way")
        if task.casefold() in ("sex", "gender"):  # M and Male; XX and XY are two
            same = [(one, other) for one in counts.index for other in counts.index
                    if one != other and normalised(other).startswith(normalised(one))]
            if same:
                raise LabelError(f"{task}: {' and '.join(same[0])}: one class or two? Found {listed}. Write each class "
                                 "in one way")
        if ask:
            _ask_about_words(task, counts)
    if len(counts) != 2 and not (2 < len(counts) <= MOST_CLASSES and counts.min() > 1):
        raise LabelError(f"{task}: classification needs two classes, or up to {MOST_CLASSES} with at least two scans "
                         f"each; found {len(counts)}: {listed}" + (" ..." * (len(counts) > 8))
                         + "; list codes for missing values in missing_codes")
    names = tuple(map(_name, counts.index))
    controls = [name for name in names if name.casefold() in CONTROLS]
    return names[::-1] if len(names) == 2 and controls == [names[1]] else names


def _ask_about_words(task: str, counts: pd.Series) -> None:
    odd = counts.index.map(looks_missing).to_numpy(bool)
    if odd.any():
        codes, others = (", ".join(f"{name} ({count})" for name, count in some.head(8).items())
                         for some in (counts[odd], counts[~odd]))
        raise LabelError(f"{task}: {codes} looks like a code for a missing value{f' among {others}' * bool(others)}: "
                         "list it in missing_codes, or, if it is a class, set task_type: classification")


def sexes(column: pd.Series) -> pd.Series:
    """Reduce each cell to its first letter in upper case, so that male, m and M are one; XX and XY stay whole.

    Number codes stay text ("1"), as cohorts number differently. Missing cells, and those that look so (`NA`, -9), are
    nan; where all cells are -1 or 1, these are the two sexes.
    """
    effect = set(column.dropna().map(_as_code)) <= {"-1", "1"}

    def sex(cell: object) -> object:
        name = normalised(cell).upper()
        if effect:
            return _as_code(cell)
        if looks_missing(cell) or not name:
            return np.nan
        return name if name in ("XX", "XY") else name[0]

    return column.map(sex, na_action="ignore").astype(object)


def _name(value: object) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)
