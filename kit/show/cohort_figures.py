"""Who is in a cohort: scans by dataset and split, what its labels hold, and what became of the scans."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.cohort.tabular import COLUMNS
from kit.show.figure import LEGEND, TEXT, blank, label

FEW = 8  # distinct values of a label that are drawn as classes
MOST = 8  # labels drawn


def cohort_figure(scans: pd.DataFrame, note: str = "") -> Figure:
    """Draw a cohort. Left: scans by dataset and split. Right: the classes or range of its first `MOST` labels.

    Args:
        scans: one scan per row, as `kit.cohort.tables.read_cohort` returns it.
    """
    others = (*COLUMNS, "split", "scan")
    every = [name for name in scans if name not in others and not name.endswith("_path")]
    labels = every[:MOST]
    datasets = scans["dataset"].unique()
    figure = blank(900, 70 + 26 * max(len(datasets), len(labels)), "The cohort", note)
    left, right = figure.subplots(1, 2)
    split = scans["split"].fillna("").replace("", "no split") if "split" in scans else pd.Series("scans", scans.index)
    counts = scans.groupby(["dataset", split], sort=False).size().unstack(fill_value=0).loc[datasets[::-1]]
    _stacked(left, counts)
    label(left, "scans", "")
    left.legend(**LEGEND, loc="upper left", bbox_to_anchor=(1, 1))
    for row, name in enumerate(reversed(labels)):
        _label_row(right, row, scans[name])
    right.set(yticks=range(len(labels)), yticklabels=labels[::-1], xlim=(0, 1))
    some = f"; the first {MOST} of {len(every)} labels" if len(every) > MOST else ""
    label(right, f"share of scans; grey: missing{some}", "")
    return figure


def outcome_figure(index: pd.DataFrame, failed: pd.DataFrame, note: str = "") -> Figure:
    """Draw what became of the scans by dataset: prepared, flagged, unusable, refused.

    Args:
        index: of the prepared scans, with columns dataset, flags and unusable.
        failed: of the refused ones, with a column dataset.
    """
    fate = pd.Series("prepared", index.index).mask(index["flags"] != "", "flagged").mask(index["unusable"] != "",
                                                                                       "unusable")
    rows = pd.concat([pd.DataFrame({"dataset": index["dataset"], "fate": fate}),
                      pd.DataFrame({"dataset": failed["dataset"], "fate": "refused"})])
    counts = rows.groupby(["dataset", "fate"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["prepared", "flagged", "unusable", "refused"], fill_value=0).iloc[::-1]
    figure = blank(620, 70 + 26 * len(counts), "What became of the scans", note)
    axes = figure.subplots()
    _stacked(axes, counts)
    label(axes, "scans; flagged ones are kept, unusable and refused ones are not learned from", "")
    axes.legend(**LEGEND, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _stacked(axes: Axes, counts: pd.DataFrame) -> None:
    """Draw a horizontal bar per row, stacked by column."""
    start = pd.Series(0, counts.index)
    for name in counts:
        bars = axes.barh([str(each) for each in counts.index], counts[name], left=start, label=str(name), height=0.7)
        axes.bar_label(bars, [str(value) if value else "" for value in counts[name]], label_type="center",
                       fontsize=TEXT - 2)
        start = start + counts[name]


def _label_row(axes: Axes, row: int, values: pd.Series) -> None:
    """Draw one label: shares of its classes, or a bar with the range of a number, and what is missing in grey."""
    known = values[values.notna() & (values.astype(str) != "")]
    numbers = pd.api.types.is_numeric_dtype(known) and known.nunique() > FEW
    if numbers:
        parts = {f"{known.min():g} to {known.max():g}, median {known.median():g}": len(known)}
    elif known.nunique() > FEW:
        parts = {f"{known.nunique()} values": len(known)}
    else:
        parts = {f"{name:g}" if isinstance(name, float) else str(name): count
                 for name, count in known.value_counts().items()}
    start = 0.0
    for number, (name, count) in enumerate([*parts.items(), ("", len(values) - len(known))]):
        share = count / len(values)
        axes.barh(row, share, left=start, height=0.7, color=f"C{number}" if name else "0.85")
        if share > 0.08:
            axes.text(start + share / 2, row, name, ha="center", va="center", fontsize=TEXT - 2)
        start += share
