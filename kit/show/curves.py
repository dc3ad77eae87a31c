"""Curves and tables of what was trained and measured. `title` and `note`: see `kit.show.figure.blank`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.metrics import RocCurveDisplay, mean_absolute_error

from kit.cohort.identity import participant_ids
from kit.evaluate.metrics import LEAST_PARTICIPANTS, per_participant
from kit.show.figure import LEGEND, TEXT, blank, label, shared_legend

MODES = {"probe": "Linear probe on frozen features", "finetune": "All weights trained"}
SIGNS = {"auc": "AUC, higher is better", "mean_absolute_error": "mean absolute error, lower is better"}
UNITS = {"age": "years"}  # of labels that are numbers; of others nothing is said
_COMPARED = ["encoder", "mode", "task", "metric", "distribution", "label_fraction"]


def training_curves(log: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw losses, learning rate and seconds against epochs.

    Args:
        log: a row per epoch: `epoch`, at least one column that ends in `loss` (validation may have gaps;
            `mean_scan_loss` is dashed) and, drawn if present, `learning_rate` and `seconds`.
    """
    losses = [name for name in log.columns if name.endswith("loss")]
    _need(log, "log", ["epoch", *(losses or ["loss"])])
    panels = {"loss": losses, "learning rate": ["learning_rate"], "seconds per epoch": ["seconds"]}
    panels = {name: columns for name, columns in panels.items() if set(columns) <= set(log.columns)}
    figure = blank(300 * len(panels), 260, title, note)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, columns) in zip(row, panels.items(), strict=True):
        for column in columns:
            known = log[["epoch", column]].dropna()
            constant = {"linestyle": "--", "color": "0.4"} if column == "mean_scan_loss" else {"marker": "."}
            axes.plot(known["epoch"], known[column], markersize=4, label=_readable(column), **constant)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        label(axes, "epoch", name)
        if len(columns) > 1:
            axes.legend(**LEGEND)
        if name == "seconds per epoch":
            axes.set_ylim(bottom=0)
    return figure


def label_efficiency(tidy: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw each metric against the share of labels: a row per task and metric, a column per distribution.

    A line per encoder and mode (probe solid, others dashed): means over seeds of the value and of both ends
    of its interval.

    Args:
        tidy: `encoder, mode, task, metric, distribution, label_fraction` (0-1), `value`, `low` and `high` (of
            its 95 % interval).
    """
    means = _over_seeds(tidy)
    rows = list(means.groupby(["task", "metric"], sort=False))
    columns, encoders = sorted(means["distribution"].unique()), list(tidy["encoder"].unique())
    figure = blank(360 * len(columns) + 180, 220 * len(rows) + 20, title, note)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for ((task, metric), of_task), row in zip(rows, panels, strict=True):
        for distribution, axes in zip(columns, row, strict=True):
            here = of_task[of_task["distribution"] == distribution].sort_values("label_fraction", kind="stable")
            for (encoder, mode), line in here.groupby(["encoder", "mode"], sort=False):
                number = encoders.index(encoder)
                beside = 1 + 0.02 * (number - (len(encoders) - 1) / 2)  # so that bars do not hide each other
                reach = [(line["value"] - line["low"]).clip(0), (line["high"] - line["value"]).clip(0)]
                axes.errorbar(line["label_fraction"] * beside, line["value"], yerr=reach, color=f"C{number}",
                              linestyle="-" if mode == "probe" else "--", linewidth=1.2, marker="o",
                              markersize=3.5, capsize=2, label=f"{encoder}, {mode}")
            axes.set_xscale("log")
            axes.set_xticks(sorted(means["label_fraction"].unique()))
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
            height = "AUC" if metric == "auc" else _in_units(_readable(metric), task)
            label(axes, "labels used" if row is panels[-1] else "", height if axes is row[0] else "",
                  f"{_readable(task)}, {_readable(distribution)}")
    shared_legend(figure)
    return figure


def benchmark_table(tidy: pd.DataFrame) -> pd.DataFrame:
    """Pivot results to a row per comparison and a column per encoder, as text "mean [low, high]" or "mean [–]".

    Means over seeds of value and of both ends of the interval. The rows' index: task, metric, distribution, mode,
    share of labels, number of participants tested.

    Args:
        tidy: as for `label_efficiency`, with `participants`.
    """
    means = _over_seeds(tidy, "participants")
    means["participants"] = means["participants"].astype(int)
    rows = ["task", "metric", "distribution", "mode", "label_fraction", "participants"]
    table = means.pivot(index=rows, columns="encoder", values="text").fillna("")
    return table[list(means["encoder"].unique())]


def summary(tidy: pd.DataFrame, note: str = "") -> str:
    """The main result as text: of each mode, with the largest share of labels, a row a task and distribution.

    Args:
        tidy: as for `benchmark_table`.
        note: what must be said of the data.
    """
    about, means = f" ({note})" if note else "", _over_seeds(tidy, "participants")
    lines = [f"Main result{about}: mean over seeds [95 % interval over test participants]"]
    for mode, group in means.groupby("mode", sort=False):
        fraction = group["label_fraction"].max()
        rows = group[group["label_fraction"] == fraction]
        names = list(rows["encoder"].unique())
        lines += ["", f"{MODES[mode]}, {fraction:.0%} of the labels, in and out of distribution", _row("", names)]
        for metric, scored in rows.groupby("metric", sort=False):
            lines.append(f"  {SIGNS[metric]}")
            for (task, where, tested), scores in scored.groupby(["task", "distribution", "participants"], sort=False):
                where = _readable(where.replace("_distribution", ""))  # in, out of
                lines.append(_row(f"    {task + ', ' + where:22s} n = {tested:.0f}",
                                  scores.set_index("encoder")["text"].loc[names]))
    if means["low"].isna().any():
        lines += ["", f"[–]: no interval, as there are fewer than {LEAST_PARTICIPANTS} participants (of a class), or "
                      "as every draw gives the same"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _row(head: str, cells: Iterable[str]) -> str:
    return f"{head:36s}" + "".join(f"{cell:20s}" for cell in cells)


def predictions(table: pd.DataFrame, metric: str, task: str = "", note: str = "") -> Figure:
    """Draw predictions against the truth, titled by the task: a ROC curve for `auc`, else a scatter in its unit.

    Scans of a participant are joined, as `kit.evaluate.metrics.score` joins them, so that the figure's numbers are its.

    Args:
        table: `true` (0/1, or the number) and `predicted` (log-odds of class 1, or the number); `participant` and
            `dataset` (or `alias_of`) say whose scan it is, without them each row is a participant; with a column
            `distribution`, a curve or a colour for each.
        metric: of `kit.evaluate.metrics.METRICS`.
    """
    _need(table, "predictions", ["true", "predicted"])
    figure = blank(460, 410, task, note)
    axes = figure.subplots()
    for name, group in table.groupby("distribution") if "distribution" in table.columns else [("", table)]:
        who = participant_ids(group) if {"dataset", "participant"} <= set(group) else range(len(group))
        joined = per_participant(group["true"], group["predicted"], who)
        name = ", ".join(filter(None, (_readable(name), f"n = {joined['participant'].nunique()}")))
        true, predicted, weight = joined["true"], joined["predicted"], joined["weight"]
        if metric == "auc":  # scikit-learn adds the area to the name
            RocCurveDisplay.from_predictions(true, predicted, sample_weight=weight, ax=axes, name=name)
        else:
            error = mean_absolute_error(true, predicted, sample_weight=weight)
            name = f"{name}, error {error:.1f} {UNITS.get(task, '')}".rstrip()
            axes.scatter(true, predicted, s=12, alpha=0.7, label=name)
    if metric == "auc":
        ends = [0, 1]
        label(axes, "false positive rate", "true positive rate")
    else:
        ends = [table[["true", "predicted"]].min().min(), table[["true", "predicted"]].max().max()]
        label(axes, _in_units("true", task), _in_units("predicted", task))
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set_aspect("equal")
    axes.legend(**LEGEND)
    return figure


def embedding_map(
    embeddings: np.ndarray, values: Sequence, title: str = "", note: str = "", name: str = ""
) -> Figure:
    """Draw embeddings on their first two principal components, coloured by a number or a category.

    Args:
        embeddings: (scans, features).
        values: one per scan; more than two different numbers get a colour bar, anything else a legend.
        name: what the values are.
    """
    fit = PCA(n_components=2, random_state=0)
    points, values = fit.fit_transform(embeddings), pd.Series(list(values))
    figure = blank(540, 380, title, note)
    axes = figure.subplots()
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 2:
        bar = figure.colorbar(axes.scatter(*points.T, c=values, s=14), ax=axes)
        bar.set_label(name, fontsize=TEXT)
        bar.ax.tick_params(labelsize=TEXT - 1)
    else:
        for value, rows in values.groupby(values).groups.items():
            axes.scatter(*points[rows].T, s=14, label=str(value))
        axes.legend(title=name, **LEGEND)
    first, second = 100 * fit.explained_variance_ratio_
    label(axes, f"component 1 ({first:.0f} % of variance)", f"component 2 ({second:.0f} %)")
    return figure


def _over_seeds(tidy: pd.DataFrame, *more: str) -> pd.DataFrame:
    """Average value, low and high over seeds, also as `text` (two decimals of AUC, else one); rows as they came.

    No interval of one seed, no interval of all.
    """
    keys = [*_COMPARED, *more]
    _need(tidy, "tidy", [*keys, "value", "low", "high"])
    means = tidy.groupby(keys, sort=False, as_index=False)[["value", "low", "high"]].mean(skipna=False)
    digits = np.where(means["metric"] == "auc", 2, 1)
    return means.assign(text=[with_interval(row.value, row.low, row.high, d)
                              for row, d in zip(means.itertuples(), digits, strict=True)])


def with_interval(value: float, low: float | None, high: float | None, digits: int = 2) -> str:
    """A score as text: `0.73 [0.65, 0.79]`, or `0.73 [–]` where there is no interval (None or nan)."""
    known = not pd.isna(low) and not pd.isna(high)
    return f"{value:.{digits}f} " + (f"[{low:.{digits}f}, {high:.{digits}f}]" if known else "[–]")


def _need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        lacks = f"lacks {', '.join(missing)}" if missing else "has no rows"
        raise ValueError(f"{name} {lacks}; its columns are {', '.join(map(str, table.columns))}")


def _readable(name: str) -> str:
    return str(name).replace("_", " ")


def _in_units(words: str, task: str) -> str:
    return f"{words} ({UNITS[task]})" if task in UNITS else words
