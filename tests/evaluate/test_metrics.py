"""Metrics against scikit-learn, over participants, and intervals that cover or are not given."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, roc_auc_score

from kit import device
from kit.device import scans_at_a_time
from kit.evaluate.metrics import LEAST_PARTICIPANTS, score
from kit.evaluate.predict import predict
from kit.evaluate.probe import fit_probe, predict_probe
from kit.runs import ROOT
from kit.store.dataset import PreparedScans


def test_few_large_scans_or_many_small_ones_at_a_time(store, monkeypatch):
    assert scans_at_a_time((36, 48, 40)) == 32 and scans_at_a_time((150, 192, 192)) == 3
    assert scans_at_a_time((512, 512, 512)) == 2
    sizes = []

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return images.mean((2, 3, 4))

    monkeypatch.setattr(device, "VOXELS", 5 * math.prod(store.grid.shape))
    assert predict(Mean(), PreparedScans(store, store.index)).shape == (32, 1) and sizes == [5] * 6 + [2]


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


def test_who_came_often_counts_once():
    """Nine who are told right, and one who is not and came 91 times: 9 of 10 positives are right, not 9 of 100."""
    who = [f"p{number}" for number in range(20)] + ["p9"] * 90
    labels = np.array([1.0] * 10 + [0] * 10 + [1] * 90)
    guess = np.array([2.0] * 9 + [-2] + [0] * 10 + [-2] * 90)
    assert score(labels, guess, "classification", who)["value"] == pytest.approx(0.9)
    assert roc_auc_score(labels, guess) == pytest.approx(0.09)
    ages = np.array([50.0] * 20 + [50] * 90)
    found = score(ages, ages + np.where(np.array(who) == "p9", 20, 1), "regression", who)
    assert found["value"] == pytest.approx((19 * 1 + 20) / 20) and found["participants"] == 20


def test_a_participants_scans_are_joined_by_the_mean_of_their_log_odds():
    # p0's three scans: mean -1, below the one control; any vote or maximum would put it above
    found = score(np.array([1.0, 1, 1, 0]), np.array([1.0, 1, -5, 0]), "classification", ["p0", "p0", "p0", "p1"])
    assert found["value"] == 0 and found["participants"] == 2


def test_labels_that_change_between_visits_are_not_averaged_away():
    # 60 and 80 years, both predicted as 70: the error is 10, though the means agree
    assert score(np.array([60.0, 80]), np.array([70.0, 70]), "regression", ["p0", "p0"])["value"] == 10
    # p0 fell ill between two visits and is a half of each class: of 2 x 1.5 x 1.5 shared pairs, 1.75 are right
    found = score(np.array([0.0, 1, 1, 0]), np.array([0.0, 2, 1, 3]), "classification", ["p0", "p0", "p1", "p2"])
    assert found["value"] == pytest.approx((0.5 * 0.5 + 1 * 0.5) / (1.5 * 1.5)) and found["participants"] == 3


def test_the_order_of_scans_changes_no_number():
    rng = np.random.default_rng(0)
    who = np.sort(rng.integers(0, 60, 200))
    labels, guess = (who % 2).astype(float), rng.normal(size=200).round(1)
    turned = rng.permutation(200)
    assert score(labels, guess, "classification", who) == score(labels[turned], guess[turned], "classification",
                                                                who[turned])


@pytest.mark.parametrize(("kind", "few"), [("classification", LEAST_PARTICIPANTS - 1), ("regression", 1),
                                           ("classification", 1), ("classification", 2)])
def test_too_few_of_a_class_have_no_interval(kind, few):
    rng = np.random.default_rng(0)
    count = few + (40 if kind == "classification" else LEAST_PARTICIPANTS - 2)
    labels = np.r_[np.ones(few), np.zeros(count - few)]
    guess = labels + rng.normal(size=count)
    found = score(labels, guess, kind, range(count))
    assert np.isfinite(found["value"]) and np.isnan(found["low"]) and np.isnan(found["high"])
    # more scans of the same people are no more people
    often = score(np.repeat(labels, 20), np.repeat(guess, 20), kind, np.repeat(range(count), 20))
    assert np.isnan(often["low"]) and often["value"] == pytest.approx(found["value"])


def test_enough_of_each_class_have_an_interval_unless_it_has_no_width():
    rng = np.random.default_rng(0)
    labels = np.r_[np.ones(LEAST_PARTICIPANTS), np.zeros(LEAST_PARTICIPANTS)]
    found = score(labels, labels + rng.normal(size=len(labels)), "classification", range(len(labels)))
    assert 0 < found["low"] < found["value"] < found["high"] <= 1
    perfect = score(labels, labels, "classification", range(len(labels)))
    assert perfect["value"] == 1 and np.isnan(perfect["low"])  # [1.00, 1.00] would claim that 20 people prove it


def test_an_absent_class_and_predictions_that_are_no_numbers_have_no_score():
    assert np.isnan(score(np.ones(30), np.arange(30.0), "classification", range(30))["value"])
    with pytest.raises(ValueError, match="1 of 3 predictions are not finite: there is no score"):
        score(np.array([0.0, 1, 1]), np.array([0.0, np.nan, 1]), "classification", range(3))


LARGE = """
import json, resource, time
import numpy as np
from sklearn.metrics import roc_auc_score
from kit.evaluate.metrics import score
rng = np.random.default_rng(0)
labels = np.repeat([0.0, 1.0], 10_000)
guess = labels + rng.normal(size=20_000)
right, before = roc_auc_score(labels, guess), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.monotonic()
found = score(labels, guess, "classification", range(20_000))
print(json.dumps({**found, "right": right, "seconds": time.monotonic() - begun,
                  "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}))
"""


def test_ten_thousand_of_each_class_take_megabytes_and_seconds():
    found = json.loads(subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, check=True, capture_output=True,
                                      text=True).stdout)
    assert found["value"] == pytest.approx(found["right"], abs=1e-12) and found["high"] - found["low"] < 0.02
    assert found["megabytes"] < 400  # every pair of them would take 800 MB, and three times that to compare
    assert found["seconds"] < 60


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_probe_finds_a_linear_label(kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    number = features[:, 0] - 2 * features[:, 3]
    labels = (number > 0).astype(float) if kind == "classification" else number
    probe = fit_probe(features[:60], labels[:60], features[60:90], labels[60:90], kind)
    found = score(labels[90:], predict_probe(probe, features[90:], kind), kind, range(30))["value"]
    assert found > 0.97 if kind == "classification" else found < 0.1
