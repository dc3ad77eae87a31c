"""Training curves. `title` and `note`: see `kit.show.figure.blank`."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kit.show.figure import LEGEND, blank, label
from kit.show.wording import need, readable

IN_A_ROW = 3


def training_curves(log: pd.DataFrame, title: str = "", note: str = "", chance: float | None = None) -> Figure:
    """Plot a training log against epochs, a panel for each kind of measure that the log has.

    Args:
        log: one row per epoch: `epoch`, at least one column ending in `loss` (with gaps for validation), and optionally
            top-1 accuracies, `rank`, `alignment` and `uniformity`, probes (see `kit.train.monitor`), `learning_rate`
            and `seconds`. `mean_scan_loss`, the loss of predicting the mean training scan, is dashed.
        chance: SimCLR's top-1 accuracy by guessing; it is drawn dotted, and so is the loss -log(chance).
    """
    losses = [name for name in log.columns if name.endswith("loss")]
    need(log, "log", ["epoch", *(losses or ["loss"])])
    panels = {"loss": losses, "top-1 accuracy": [name for name in log.columns if name.endswith("top1")],
              "effective rank": ["rank"], "alignment and uniformity": ["alignment", "uniformity"],
              "probes": [name for name in log.columns if name.startswith("probe_")],
              "learning rate": ["learning_rate"], "seconds per epoch": ["seconds"]}
    panels = {name: known for name, columns in panels.items()
              if (known := [column for column in columns if column in log and log[column].notna().any()])}
    rows = -(-len(panels) // IN_A_ROW)
    figure = blank(300 * min(IN_A_ROW, len(panels)), 240 * rows + 20, title, note)
    grid = figure.subplots(rows, min(IN_A_ROW, len(panels)), squeeze=False).ravel()
    for axes in grid[len(panels):]:
        axes.remove()
    by_chance = {} if chance is None else {"loss": -math.log(chance), "top-1 accuracy": chance}
    for axes, (name, columns) in zip(grid, panels.items(), strict=False):
        for column in columns:
            known = log[["epoch", column]].dropna()
            constant = {"linestyle": "--", "color": "0.4"} if column == "mean_scan_loss" else {"marker": "."}
            axes.plot(known["epoch"], known[column], markersize=4, label=readable(column), **constant)
        if name in by_chance:
            axes.axhline(by_chance[name], linestyle=":", color="0.4", label="chance (training)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        label(axes, "epoch", name)
        if len(columns) > 1 or name in by_chance:
            axes.legend(**LEGEND)
        if name == "seconds per epoch":
            axes.set_ylim(bottom=0)
    return figure
