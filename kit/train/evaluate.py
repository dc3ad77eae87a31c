"""Predictions, embeddings, and metrics with intervals over participants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from kit.data.loader import PreparedScans, in_order, load
from kit.models.encoder_file import device, on_device
from kit.runs import progress

METRICS = {"classification": "auc", "regression": "mean_absolute_error"}  # area under the ROC curve; label's unit
RESAMPLES = 1000


@torch.no_grad()
def outputs(model: nn.Module, scans: PreparedScans, batch_size: int = 32) -> np.ndarray:
    """What a model gives for each scan, in evaluation mode.

    Args:
        model: (batch, 1, depth, height, width) -> (batch, width).
        scans: in their order.
        batch_size: scans at a time.

    Returns:
        (scans, width) float32.
    """
    where = device()
    on_device(model).eval()
    parts = []
    batches = in_order(len(scans), batch_size)
    for batch in progress(load(scans, batches), total=len(batches), desc="reading scans"):
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            parts.append(model(batch.to(where).images).float().cpu().numpy())
    return np.concatenate(parts)


def score(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str],
          seed: int = 0) -> dict[str, float]:
    """A metric with its 95 % interval, by drawing participants with replacement (percentile bootstrap).

    Args:
        labels: (scans,) class 0 or 1, or the number.
        predictions: (scans,) score that grows with class 1, or the predicted number.
        kind: "classification" (area under the ROC curve) or "regression" (mean absolute error, label's unit).
        participants: (scans,) all scans of a participant are drawn together.
        seed: of the draws.

    Returns:
        value, low, high, participants.
    """
    codes, names = pd.factorize(np.asarray(participants))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)[:, codes]
    statistic = _auc if kind == "classification" else _absolute_error
    with np.errstate(invalid="ignore"):  # a draw without one of the classes has no AUC
        low, high = np.nanquantile(statistic(labels, predictions, drawn), [0.025, 0.975])
    value = statistic(labels, predictions, np.ones((1, len(labels))))[0]
    return {"value": float(value), "low": float(low), "high": float(high), "participants": float(len(names))}


def _auc(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs in the right order, ties half, each pair weighted: the Mann-Whitney form of the AUC."""
    positive, negative = labels == 1, labels == 0
    difference = predictions[positive][:, None] - predictions[negative][None, :]
    right = (difference > 0) + 0.5 * (difference == 0)
    pairs = weights[:, positive].sum(1) * weights[:, negative].sum(1)
    return ((weights[:, positive] @ right) * weights[:, negative]).sum(1) / np.where(pairs, pairs, np.nan)


def _absolute_error(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ np.abs(labels - predictions) / weights.sum(1)
