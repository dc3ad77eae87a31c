"""Predictions for scans without a label, with intervals calibrated on the validation scans.

Split conformal prediction (Vovk et al. 2005; Lei et al. 2018, doi:10.1080/01621459.2017.1307116): the interval covers
the true value for 90 % of people from the same population as the validation participants. Validation also chose when
training stopped, so the intervals are slightly too narrow. For scans from another population nothing is guaranteed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, softmax

COVERAGE = 0.9


def conformal_quantile(scores: np.ndarray) -> float:
    """Bound that a new score stays below with 90 % probability, from validation scores (rows,); infinite if too few."""
    rank = int(np.ceil((len(scores) + 1) * COVERAGE))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def number_columns(values: np.ndarray, validation: pd.DataFrame) -> pd.DataFrame:
    """Table of predicted numbers (scans,) with intervals: predicted, low, high, in the label's unit.

    The last two are nan if `validation` (columns true, predicted; a row per participant and label) is too small.
    """
    wide = conformal_quantile((validation["true"] - validation["predicted"]).abs().to_numpy())
    low, high = (values - wide, values + wide) if np.isfinite(wide) else (np.full(len(values), np.nan),) * 2
    return pd.DataFrame({"predicted": values, "low": low, "high": high})


def class_columns(logits: np.ndarray, classes: Sequence[str], validation: pd.DataFrame) -> pd.DataFrame:
    """Table of predicted classes: predicted, `probability_CLASS` for each class, and `possible`, those not ruled out.

    Args:
        logits: (scans,) log-odds of the second class, or (scans, classes).
        validation: columns true, and predicted or predicted_0 … in the same form.
    """
    names = [str(name) for name in classes]
    found = _probabilities(logits)
    columns = sorted((name for name in validation if name.startswith("predicted")),
                     key=lambda name: int(name.removeprefix("predicted").strip("_") or 0))
    known = _probabilities(validation[columns].to_numpy().squeeze(1) if len(columns) == 1
                           else validation[columns].to_numpy())
    worst = conformal_quantile(1 - known[np.arange(len(known)), validation["true"].astype(int)])
    possible = 1 - found <= worst
    possible[np.arange(len(found)), found.argmax(1)] = True  # the set is never empty
    table = pd.DataFrame({"predicted": [names[place] for place in found.argmax(1)]})
    for place, name in enumerate(names):
        table[f"probability_{name}"] = found[:, place]
    kept = [" or ".join(name for name, here in zip(names, row, strict=True) if here) for row in possible]
    return table.assign(possible=kept if np.isfinite(worst) else "")


def _probabilities(logits: np.ndarray) -> np.ndarray:
    """Convert (scans,) log-odds or (scans, classes) logits to probabilities (scans, classes)."""
    return np.stack([expit(-logits), expit(logits)], 1) if logits.ndim == 1 else softmax(logits, 1)
