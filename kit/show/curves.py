"""Training curves. `title` and `note`: see `kit.show.figure.blank`."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kit.show.figure import LEGEND, blank, label
from kit.show.wording import need, readable


def training_curves(log: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw losses, learning rate and seconds against epochs.

    Args:
        log: one row per epoch: `epoch`, at least one column ending in `loss` (validation may have gaps;
            `mean_scan_loss` is dashed), and optionally `learning_rate` and `seconds`.
    """
    losses = [name for name in log.columns if name.endswith("loss")]
    need(log, "log", ["epoch", *(losses or ["loss"])])
    panels = {"loss": losses, "learning rate": ["learning_rate"], "seconds per epoch": ["seconds"]}
    panels = {name: columns for name, columns in panels.items() if set(columns) <= set(log.columns)}
    figure = blank(300 * len(panels), 260, title, note)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, columns) in zip(row, panels.items(), strict=True):
        for column in columns:
            known = log[["epoch", column]].dropna()
            constant = {"linestyle": "--", "color": "0.4"} if column == "mean_scan_loss" else {"marker": "."}
            axes.plot(known["epoch"], known[column], markersize=4, label=readable(column), **constant)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        label(axes, "epoch", name)
        if len(columns) > 1:
            axes.legend(**LEGEND)
        if name == "seconds per epoch":
            axes.set_ylim(bottom=0)
    return figure
