"""A label column as numbers, with its kind checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Kind = Literal["classification", "regression"]


class LabelError(ValueError):
    """A label column cannot be used as asked; the message says why."""


@dataclass(frozen=True)
class Labels:
    """One label for each row of an index.

    Attributes:
        task: the column's name.
        kind: classification has two classes; regression predicts the number itself.
        values: (rows,) float64; class 0.0 or 1.0, or the number; nan where the scan has no label.
        classes: what 0 and 1 stand for, empty for regression.
    """

    task: str
    kind: Kind
    values: np.ndarray
    classes: tuple[str, ...] = ()


def read_labels(index: pd.DataFrame, task: str, kind: str = "auto") -> Labels:
    """Read a label column.

    With ``auto``, numbers of more than two values mean regression; two values, or text, classification.
    Classes are sorted; the last is the positive one. Empty cells are scans without the label.

    Raises:
        LabelError: no such column, no value, text where numbers are needed, or not two classes.
    """
    if task not in index:
        raise LabelError(f"{task}: no such label column; the index has {', '.join(map(str, index.columns))}")
    column = index[task]
    present = column.dropna()
    if present.empty:
        raise LabelError(f"{task}: the column is empty")
    numbers = pd.to_numeric(column, errors="coerce")
    text = sorted(set(map(str, present[numbers[present.index].isna()])))
    if kind == "auto":
        mostly_numbers = len(present) > 2 * len(present[numbers[present.index].isna()])
        kind = "regression" if mostly_numbers and present.nunique() > 2 else "classification"
    if kind == "regression":
        if text:
            raise LabelError(f"{task}: text where numbers are needed: {', '.join(text[:5])}; "
                             "leave the cell empty where a scan has no label")
        return Labels(task, "regression", numbers.to_numpy(np.float64))
    classes = sorted(present.unique()) if not text else sorted(present.astype(str).unique())
    if len(classes) != 2:
        raise LabelError(f"{task}: classification needs two classes, found {len(classes)}: "
                         f"{', '.join(map(str, classes[:6]))}")
    positive = (column if not text else column.astype(str)) == classes[1]
    values = np.where(column.isna(), np.nan, positive.astype(np.float64))
    return Labels(task, "classification", values, tuple(_class_name(name) for name in classes))


def _class_name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
