"""The benchmark's main result in a few lines of text."""

from __future__ import annotations

import pandas as pd

MODES = {"probe": "Linear probe on frozen features", "finetune": "All weights trained"}
SIGNS = {"auc": "AUC, higher is better", "mean_absolute_error": "mean absolute error, lower is better"}


def summary(tidy: pd.DataFrame, note: str = "") -> str:
    """Scores of every encoder, a row a task and distribution; of each mode with the largest fraction of labels.

    Args:
        tidy: of `kit.train.benchmark.run_benchmark`.
        note: what must be said of the data.
    """
    about = f" ({note})" if note else ""
    lines = [f"Main result{about}: mean over seeds [95 % interval over test participants]"]
    for mode, group in tidy.groupby("mode", sort=False):
        fraction = group["label_fraction"].max()
        rows = group[group["label_fraction"] == fraction]
        names = list(rows["encoder"].unique())
        lines += ["", f"{MODES[mode]}, {fraction:.0%} of the labels, in and out of distribution", _row("", names)]
        for metric, scored in rows.groupby("metric", sort=False):
            lines.append(f"  {SIGNS[metric]}")
            lines += [_line(*place, scores, names, digits=2 if metric == "auc" else 1)
                      for place, scores in scored.groupby(["task", "distribution"], sort=False)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _line(task: str, distribution: str, scores: pd.DataFrame, names: list[str], digits: int) -> str:
    means = scores.groupby("encoder")[["value", "low", "high"]].mean().loc[names]
    cells = [f"{row.value:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]" for row in means.itertuples()]
    where = distribution.replace("_distribution", "").replace("_", " ")  # in, out of
    return _row(f"    {task + ', ' + where:22s} n = {scores['participants'].iloc[0]:.0f}", cells)


def _row(head: str, cells: list[str]) -> str:
    return f"{head:36s}" + "".join(f"{cell:20s}" for cell in cells)
