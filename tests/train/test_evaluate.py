"""Metrics against scikit-learn, and intervals that cover."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, roc_auc_score

from kit.data.loader import PreparedScans
from kit.train import evaluate
from kit.train.evaluate import fit_probe, outputs, predict_probe, scans_at_a_time, score


def test_few_large_scans_or_many_small_ones_at_a_time(store, monkeypatch):
    assert scans_at_a_time((36, 48, 40)) == 32 and scans_at_a_time((150, 192, 192)) == 3
    assert scans_at_a_time((512, 512, 512)) == 2
    sizes = []

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return images.mean((2, 3, 4))

    monkeypatch.setattr(evaluate, "VOXELS", 5 * math.prod(store.grid.shape))
    assert outputs(Mean(), PreparedScans(store, store.index)).shape == (32, 1) and sizes == [5] * 6 + [2]


def test_values_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, guess = rng.integers(0, 2, 40).astype(float), rng.normal(size=40).round(1)  # with ties
    who = [f"p{number}" for number in range(40)]
    assert score(labels, guess, "classification", who)["value"] == pytest.approx(roc_auc_score(labels, guess))
    assert score(labels, guess, "regression", who)["value"] == pytest.approx(mean_absolute_error(labels, guess))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        truth = rng.normal(size=60)
        found = score(truth, truth + rng.normal(size=60), "regression", range(60))
        covered += found["low"] <= np.sqrt(2 / np.pi) <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99  # 95 %, give or take three standard errors and the bootstrap's bias


def test_scans_of_one_participant_are_drawn_together():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=30)
    guess = truth + rng.normal(size=30)
    alone = score(truth, guess, "regression", range(30))
    doubled = score(np.repeat(truth, 4), np.repeat(guess, 4), "regression", np.repeat(range(30), 4))
    assert doubled["participants"] == 30
    assert doubled["high"] - doubled["low"] == pytest.approx(alone["high"] - alone["low"], rel=1e-6)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_probe_finds_a_linear_label(kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    number = features[:, 0] - 2 * features[:, 3]
    labels = (number > 0).astype(float) if kind == "classification" else number
    probe = fit_probe(features[:60], labels[:60], features[60:90], labels[60:90], kind)
    found = score(labels[90:], predict_probe(probe, features[90:], kind), kind, range(30))["value"]
    assert found > 0.97 if kind == "classification" else found < 0.1
