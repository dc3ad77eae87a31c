"""The benchmark's main result in a few lines of text."""

from __future__ import annotations

import pandas as pd

HIGHER_IS_BETTER = {"auc": True, "mean_absolute_error": False}


def summary(tidy: pd.DataFrame, note: str = "") -> str:
    """Each task's scores, encoder by encoder; of each mode with the largest fraction of labels.

    Args:
        tidy: of `kit.train.benchmark.run_benchmark`.
        note: what must be said of the data.
    """
    about = f" ({note})" if note else ""
    lines = [f"Main result{about}, mean over seeds [95 % interval over test participants]"]
    for mode, group in tidy.groupby("mode", sort=False):
        fraction = group["label_fraction"].max()
        what = {"probe": "linear probe on frozen features", "finetune": "all weights trained"}[mode]
        lines.append(f"{what}, {fraction:.0%} of the labels:")
        for (task, distribution), rows in group[group["label_fraction"] == fraction].groupby(
                ["task", "distribution"], sort=False):
            lines.append(f"  {task}, {distribution.replace('_', ' ')} ({rows.participants.iloc[0]:.0f} participants, "
                         f"{rows.metric.iloc[0].replace('_', ' ')}): " + _encoders(rows))
    return "\n".join(lines) + "\n"


def _encoders(rows: pd.DataFrame) -> str:
    means = rows.groupby("encoder", sort=False)[["value", "low", "high"]].mean()
    digits = 2 if HIGHER_IS_BETTER[rows["metric"].iloc[0]] else 1
    parts = [f"{name} {row.value:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"
             for name, row in means.iterrows()]
    return ", ".join(parts)
