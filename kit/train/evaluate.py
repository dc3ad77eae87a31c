"""Predictions, embeddings, linear probes on them, and metrics with intervals over participants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from kit.data.loader import PreparedScans, in_order, load
from kit.models.encoder_file import device, on_device
from kit.runs import progress

METRICS = {"classification": "auc", "regression": "mean_absolute_error"}  # area under the ROC curve; label's unit
RESAMPLES = 1000
PENALTIES = tuple(10.0 ** power for power in range(-4, 5))  # of probes
VOXELS = 2**24  # run at a time without gradients: resnet18 in bfloat16 then takes about 4 GB


def scans_at_a_time(shape: Sequence[int]) -> int:
    """How many scans of `shape` voxels run at a time without gradients: 3 of 150x192x192, 32 of small ones."""
    return min(32, max(2, VOXELS // math.prod(shape)))


def as_trained() -> torch.autocast:
    """The precision of a training step: bfloat16 on CUDA, else as it is."""
    where = device().type
    return torch.autocast(where, torch.bfloat16, enabled=where == "cuda")


@torch.no_grad()
def outputs(model: nn.Module, scans: PreparedScans, batch_size: int | None = None) -> np.ndarray:
    """(scans, width) float32: what a model gives for each scan, in evaluation mode.

    `batch_size` scans run at a time, if not given as many as `scans_at_a_time` says.
    """
    on_device(model).eval()
    parts = []
    batches = in_order(len(scans), batch_size or scans_at_a_time(scans.store.grid.shape))
    for batch in progress(load(scans, batches), total=len(batches), desc="reading scans"):
        with as_trained():
            parts.append(model(batch.to(device()).images).float().cpu().numpy())
    return np.concatenate(parts)


def score(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str],
          seed: int = 0) -> dict[str, float]:
    """A metric of `METRICS` with its 95 % interval, by drawing participants with replacement (percentile bootstrap).

    Args:
        labels: (scans,) class 0 or 1, or the number.
        predictions: (scans,) score that grows with class 1, or the predicted number.
        kind: "classification" or "regression".
        participants: (scans,) all scans of a participant are drawn together.

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


def fit_probe(features: np.ndarray, labels: np.ndarray, held_out_features: np.ndarray, held_out_labels: np.ndarray,
              kind: str) -> Pipeline:
    """Standardise, then logistic or ridge regression; the penalty is the best on held-out participants.

    Args:
        features, held_out_features: (scans, width) float.
        labels, held_out_labels: (scans,) class 0 or 1, or the number.
        kind: "classification" or "regression".
    """
    def fitted(penalty: float) -> Pipeline:
        last = (LogisticRegression(C=1 / penalty, max_iter=2000) if kind == "classification"
                else Ridge(penalty, solver="svd"))  # more features than scans: the default solver warns
        return make_pipeline(StandardScaler(), last).fit(features, labels)

    def loss(probe: Pipeline) -> float:
        guess = predict_probe(probe, held_out_features, kind)
        if kind == "classification":
            return -float(_auc(held_out_labels, guess, np.ones((1, len(guess))))[0])  # exact, so that ties are equal
        return float(np.square(held_out_labels - guess).mean())

    # among equals the stronger penalty: it comes first
    return min((fitted(penalty) for penalty in reversed(PENALTIES)), key=loss)


def predict_probe(probe: Pipeline, features: np.ndarray, kind: str) -> np.ndarray:
    """(scans,) log-odds of class 1, or the number."""
    return probe.decision_function(features) if kind == "classification" else probe.predict(features)
