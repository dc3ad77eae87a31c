"""Conformal prediction: intervals for numbers and sets of possible classes, calibrated on validation participants.

Split conformal prediction (Vovk et al. 2005; Lei et al. 2018, doi:10.1080/01621459.2017.1307116): an interval holds the
truth for at least 90 % of people from the validation participants' population, on average over all of them (not at each
age), and a set does for at least 90 % of each class. Validation also chose when training stopped, so both are too
narrow, by how much was not measured. For scans from another population nothing is guaranteed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, softmax

from kit.evaluate.metrics import predicted_of

COVERAGE = 0.9


def conformal_quantile(scores: np.ndarray) -> float:
    """Bound that a new score does not exceed with at least 90 % probability, from validation scores (rows,).

    Infinite with fewer than nine scores.
    """
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

    Each class has its own bound, so that at most 10 % of its members are wrongly ruled out, however rare it is ("label-
    conditional", Vovk et al. 2005, section 4.5). A class with fewer than nine validation rows is never ruled out; where
    that holds for all classes, `possible` is "".

    Args:
        logits: (scans,) log-odds of the second class, or (scans, classes).
        validation: columns true, and predicted or predicted_0 … in the same form; a row per participant and label.
    """
    names = [str(name) for name in classes]
    found, known = _probabilities(logits), _probabilities(predicted_of(validation))
    true = validation["true"].to_numpy().astype(int)
    worst = np.array([conformal_quantile(1 - known[true == place, place]) for place in range(len(names))])
    possible = 1 - found <= worst
    possible[np.arange(len(found)), found.argmax(1)] = True  # the set is never empty
    table = pd.DataFrame({"predicted": [names[place] for place in found.argmax(1)]})
    for place, name in enumerate(names):
        table[f"probability_{name}"] = found[:, place]
    kept = [" or ".join(name for name, here in zip(names, row, strict=True) if here) for row in possible]
    return table.assign(possible=kept if np.isfinite(worst).any() else "")


def _probabilities(logits: np.ndarray) -> np.ndarray:
    """Convert (scans,) log-odds or (scans, classes) logits to probabilities (scans, classes)."""
    return np.stack([expit(-logits), expit(logits)], 1) if logits.ndim == 1 else softmax(logits, 1)
