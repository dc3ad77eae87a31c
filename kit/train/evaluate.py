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
from kit.models.precision import evaluation
from kit.runs import progress

METRICS = {"classification": "auc", "regression": "mean_absolute_error"}  # area under the ROC curve; label's unit
RESAMPLES = 1000
DRAWS = 100  # of these at a time; bounds memory
LEAST_PARTICIPANTS = 10  # of each class, or in all for a number, that an interval needs; see `score`
PENALTIES = tuple(10.0 ** power for power in range(-4, 5))  # of probes
VOXELS = 2**24  # run at a time without gradients: resnet18 then takes about 8 GB


def scans_at_a_time(shape: Sequence[int]) -> int:
    """How many scans of `shape` voxels run at a time without gradients: 3 of 150x192x192, 32 of small ones."""
    return min(32, max(2, VOXELS // math.prod(shape)))


@torch.no_grad()
def outputs(model: nn.Module, scans: PreparedScans, batch_size: int | None = None) -> np.ndarray:
    """(scans, width) float32: what a model gives for each scan, in evaluation mode and in float32 all through.

    `batch_size` scans run at a time, if not given as many as `scans_at_a_time` says.
    """
    on_device(model).eval()
    parts = []
    batches = in_order(len(scans), batch_size or scans_at_a_time(scans.store.grid.shape))
    for batch in progress(load(scans, batches), total=len(batches), desc="reading scans"):
        with evaluation(device()):
            parts.append(model(batch.to(device()).images).float().cpu().numpy())
    return np.concatenate(parts)


def score(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str],
          seed: int = 0) -> dict[str, float]:
    """A metric of `METRICS` over participants, with its 95 % interval by the percentile bootstrap over participants.

    Each participant counts once, however many scans there are; see `per_participant`.

    There is no interval (low and high are nan) with fewer than `LEAST_PARTICIPANTS` of a class, or in all for a
    number. In simulations at an AUC of 0.9, what should hold the truth in 95 of 100 cases does so in 27 with two
    participants of each class, 71 with five, 87 with ten and 91 with twenty. Nor is there one without width: an AUC
    of 1 stays 1 in every draw, which says nothing of other participants.

    Args:
        labels: (scans,) class 0 or 1, or the number.
        predictions: (scans,) log-odds of class 1, or the predicted number.
        kind: "classification" or "regression".
        participants: (scans,) whose scan it is.

    Returns:
        value (nan where a class is absent), low, high, participants.

    Raises:
        ValueError: a prediction is not finite.
    """
    joined = per_participant(labels, predictions, participants)
    codes, names = pd.factorize(joined["participant"])
    true, predicted, weight = (joined[name].to_numpy() for name in ("true", "predicted", "weight"))
    statistic = _auc if kind == "classification" else _absolute_error
    value, low, high = statistic(true, predicted, weight[None])[0], np.nan, np.nan
    fewest = min((true == 0).sum(), (true == 1).sum()) if kind == "classification" else len(names)
    if fewest >= LEAST_PARTICIPANTS:
        rng, even = np.random.default_rng(seed), np.full(len(names), 1 / len(names))
        draws = (rng.multinomial(len(names), even, size=DRAWS)[:, codes] * weight for _ in range(RESAMPLES // DRAWS))
        found = np.concatenate([statistic(true, predicted, drawn) for drawn in draws])
        found = np.nanquantile(found, [0.025, 0.975])  # one draw in 20,000 of 10 and 10 lacks a class
        low, high = found if found[0] < found[1] else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high), "participants": float(len(names))}


def per_participant(labels: np.ndarray, predictions: np.ndarray, participants: Sequence[str]) -> pd.DataFrame:
    """Join scans so that each participant counts once.

    Scans of a participant with the same label become one row with the mean of their predictions. A participant of
    several labels (age at two visits, a diagnosis that changed) has a row for each, in equal shares.

    Args:
        labels, predictions, participants: (scans,) each.

    Returns:
        participant, true, predicted, weight (a participant's sum to 1).

    Raises:
        ValueError: a prediction is not finite.
    """
    scans = pd.DataFrame({"participant": np.asarray(participants), "true": np.asarray(labels, np.float64),
                          "predicted": np.asarray(predictions, np.float64)})
    if not np.isfinite(scans["predicted"]).all():
        raise ValueError(f"{(~np.isfinite(scans['predicted'])).sum()} of {len(scans)} predictions are not finite: "
                         "there is no score; look for nan in the encoder's weights or in the scans")
    scans = scans.sort_values(["participant", "true", "predicted"])  # rows in another order give the same bits
    joined = scans.groupby(["participant", "true"], as_index=False)["predicted"].mean()
    return joined.assign(weight=1 / joined.groupby("participant")["true"].transform("size"))


def _auc(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs in the right order, ties half, each pair weighted: the Mann-Whitney form of the AUC, by ranks.

    Args:
        labels, predictions: (rows,) each.
        weights: (draws, rows).

    Returns:
        (draws,), nan where a draw lacks one of the classes.
    """
    order = np.argsort(predictions, kind="stable")
    ties = np.flatnonzero(np.diff(predictions[order], prepend=-np.inf))  # where each group of equal predictions starts
    positive, negative = (np.add.reduceat((weights * (labels == label))[:, order], ties, axis=1) for label in (1, 0))
    ranked_below = negative.cumsum(1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return (positive * ranked_below).sum(1) / np.where(pairs, pairs, np.nan)


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
