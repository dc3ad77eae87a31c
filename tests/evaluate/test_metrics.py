"""Metrics against scikit-learn, over participants, and intervals that cover or are not given."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    roc_auc_score,
)

from kit import device
from kit.device import scans_at_a_time
from kit.evaluate.metrics import (
    LEAST_PARTICIPANTS,
    auc,
    bias_corrected,
    further_metrics,
    matched,
    per_participant,
    predicted_of,
    score,
)
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


def three_classes(count=90, seed=0):
    """Class 0 to 2 and logits, of which one scan's may be far above another's as a whole: softmax does not see it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(float)
    logits = np.eye(3)[labels.astype(int)] + rng.normal(size=(count, 3)) + 3 * rng.normal(size=(count, 1))
    return labels, logits, rng.integers(1, 5, count).astype(float)


def test_of_several_classes_the_auc_is_scikit_learns_macro_one_vs_rest():
    labels, logits, weights = three_classes()
    right = roc_auc_score(labels, softmax(logits, axis=1), multi_class="ovr", average="macro")
    found = score(labels, logits, "classification", range(90))
    assert found["value"] == pytest.approx(right) and found["low"] < right < found["high"]
    of_each = [roc_auc_score(labels == each, softmax(logits, axis=1)[:, each], sample_weight=weights)
               for each in range(3)]
    assert auc(labels, logits, np.stack([np.ones(90), weights])) == pytest.approx([right, np.mean(of_each)])
    assert np.isnan(auc(labels[labels > 0], logits[labels > 0], np.ones((1, (labels > 0).sum())))[0])  # no class 0
    # two of three probabilities of class 1 round to 1, and would be a tie: .75 for the first 1
    sure = np.array([[0.0, 60, 0], [0, 50, 0], [0, 0, 0]])
    assert auc(np.array([1.0, 0, 2]), sure, np.ones((1, 3)))[0] == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_participants_logits_are_averaged_by_class():
    joined = per_participant([1, 1, 2], [[0.0, 1, 2], [2, 3, 7], [1, 1, 1]], ["p0", "p0", "p1"])
    assert predicted_of(joined).tolist() == [[1, 2, 4.5], [1, 1, 1]] and joined["weight"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="1 of 2 predictions are not finite"):
        per_participant([1, 2], [[0, 1, 2], [0, np.inf, 1]], ["p0", "p1"])


@pytest.mark.parametrize("several", [False, True])
def test_pairs_are_of_one_fold(several):
    labels, logits, weights = three_classes()
    labels, logits = (labels, logits) if several else ((labels > 0).astype(float), logits[:, 0].round())  # ties
    folds = np.random.default_rng(1).integers(0, 4, 90)

    def pairs(of, value):  # pair by pair, by the definition
        apart = [(weights[i] * weights[j], (value[i] > value[j]) + (value[i] == value[j]) / 2)
                 for i in range(90) for j in range(90) if of[i] > of[j] and folds[i] == folds[j]]
        return sum(weight * right for weight, right in apart) / sum(weight for weight, _ in apart)

    odds = softmax(logits, axis=1) if several else logits
    right = np.mean([pairs(labels == each, odds[:, each]) for each in range(3)]) if several else pairs(labels, odds)
    assert auc(labels, logits, weights[None], folds)[0] == pytest.approx(right)
    shifted = logits + 64 * (folds[:, None] if several else folds)
    turned = np.random.default_rng(2).permutation(90)
    found, again = (score(labels, each, "classification", range(90), folds=folds) for each in (logits, shifted))
    assert found == pytest.approx(again) and found["low"] < found["value"] < found["high"]
    assert found == score(labels[turned], logits[turned], "classification", np.arange(90)[turned], folds=folds[turned])


def test_people_whose_fold_has_one_class_are_not_enough_for_an_interval():
    """Two sites of patients or controls only, and one of two each: the AUC is of four people."""
    labels, folds = np.repeat([1.0, 0, 1, 0], [30, 30, 2, 2]), np.repeat(["A", "B", "C"], [30, 30, 4])
    found = score(labels, labels + np.random.default_rng(0).normal(size=64), "classification", range(64), folds=folds)
    assert np.isfinite(found["value"]) and np.isnan(found["low"]) and found["participants"] == 64
    assert np.isnan(score(labels[:60], labels[:60], "classification", range(60), folds=folds[:60])["value"])


def test_further_metrics_of_two_classes_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, weights = rng.integers(0, 2, 80).astype(float), rng.integers(1, 4, 80) / 2
    odds = (1.5 * labels + rng.normal(size=80)).round(1)
    found = further_metrics(labels, odds, weights, "classification")
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, odds > 0, sample_weight=weights))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, expit(odds), sample_weight=weights))
    assert found["average_precision"] == pytest.approx(average_precision_score(labels, odds, sample_weight=weights))
    healthy, ill = labels == 0, labels == 1
    reached = [weights[ill & (odds >= cut)].sum() / weights[ill].sum() for cut in [*np.unique(odds), np.inf]
               if weights[healthy & (odds >= cut)].sum() <= 0.1 * weights[healthy].sum()]
    assert found["sensitivity_at_90_specificity"] == pytest.approx(max(reached)) and 0 < max(reached) < 1


def test_calibration_is_found_as_it_was_planted():
    rng = np.random.default_rng(0)
    odds = 2 * rng.normal(size=100_000)
    labels, weights = (rng.random(100_000) < expit(odds)).astype(float), np.ones(100_000)
    fine = further_metrics(labels, odds, weights, "classification")
    assert fine["calibration_slope"] == pytest.approx(1, abs=0.03)
    assert fine["calibration_intercept"] == pytest.approx(0, abs=0.03)
    # overconfident by half, then a log-odds too high
    assert further_metrics(labels, 2 * odds, weights, "classification")["calibration_slope"] == pytest.approx(
        fine["calibration_slope"] / 2, rel=1e-4)
    high = further_metrics(labels, odds + 1, weights, "classification")
    assert high["calibration_intercept"] == pytest.approx(fine["calibration_intercept"] - 1, abs=1e-6)
    some = slice(0, 300)  # a model's slope, of weighted scans
    heavy = rng.integers(1, 5, 300).astype(float)
    fitted = LogisticRegression(C=1e12, tol=1e-10).fit(np.repeat(odds[some], heavy.astype(int))[:, None],
                                                       np.repeat(labels[some], heavy.astype(int)))
    found = further_metrics(labels[some], odds[some], heavy, "classification")
    assert found["calibration_slope"] == pytest.approx(fitted.coef_[0, 0], rel=1e-3)


def test_further_metrics_that_are_not_defined_are_nan():
    one = further_metrics(np.ones(5), np.arange(5.0), np.ones(5), "classification")
    assert np.isfinite(one.pop("brier")) and len(one) == 5 and all(np.isnan(each) for each in one.values())
    parted = further_metrics(np.array([0.0, 0, 1, 1]), np.array([-2.0, -1, 1, 2]), np.ones(4), "classification")
    assert np.isnan(parted["calibration_slope"]) and parted["sensitivity_at_90_specificity"] == 1
    wrong_way = further_metrics(np.array([1.0, 1, 0, 0]), np.array([-2.0, -1, 1, 2]), np.ones(4), "classification")
    assert np.isnan(wrong_way["calibration_slope"])
    same = further_metrics(np.array([0.0, 1, 2]), np.ones(3), np.ones(3), "regression")
    assert np.isnan(same["correlation"]) and same["bias_slope"] == -1  # as guessing does
    rounded = further_metrics(np.arange(7.0), np.full(7, 0.1), np.ones(7), "regression")  # its variance is 2e-34
    assert np.isnan(rounded["correlation"])


def test_further_metrics_of_several_classes():
    labels, logits, weights = three_classes()
    odds, found = softmax(logits, axis=1), further_metrics(labels, logits, weights, "classification")
    of_each = [brier_score_loss(labels == each, odds[:, each], sample_weight=weights) for each in range(3)]
    assert found == {"brier": pytest.approx(np.mean(of_each)), "balanced_accuracy": pytest.approx(
        balanced_accuracy_score(labels, logits.argmax(1), sample_weight=weights))}


def test_further_metrics_of_numbers():
    rng = np.random.default_rng(0)
    true, heavy = rng.normal(50, 15, 60), rng.integers(1, 4, 60)
    predicted = 20 + 0.6 * true + rng.normal(0, 4, 60)
    found = further_metrics(true, predicted, heavy / 2, "regression")
    often, guesses = np.repeat(true, heavy), np.repeat(predicted, heavy)
    assert found["rmse"] == pytest.approx(mean_squared_error(often, guesses) ** 0.5)
    assert found["r2"] == pytest.approx(r2_score(often, guesses))
    assert found["correlation"] == pytest.approx(np.corrcoef(often, guesses)[0, 1])
    assert found["bias_slope"] == pytest.approx(np.polyfit(often, guesses - often, 1)[0])


def test_bias_correction_takes_the_pull_to_the_mean_away():
    rng = np.random.default_rng(0)
    true = rng.normal(50, 15, 2000)
    predicted = 20 + 0.6 * true + rng.normal(0, 4, 2000)
    people = pd.Series(range(2000))
    corrected = bias_corrected(true[:1000], predicted[:1000], people[:1000], predicted[1000:])
    before, after = (further_metrics(true[1000:], each, np.ones(1000), "regression")
                     for each in (predicted[1000:], corrected))
    assert before["bias_slope"] == pytest.approx(-0.4, abs=0.03) and after["bias_slope"] == pytest.approx(0, abs=0.05)
    assert after["correlation"] == pytest.approx(before["correlation"])
    many = np.r_[:1000, [7] * 500]  # somebody with 501 scans counts once, too
    again = bias_corrected(true[many], predicted[many], people.iloc[many].reset_index(drop=True), predicted[1000:])
    assert np.allclose(again, corrected, rtol=1e-9)
    with pytest.raises(ValueError, match="do not rise with the truth"):
        bias_corrected(true, -true, people, predicted)


def test_matching_pairs_by_sex_and_age():
    names, case = list("abcdefgh"), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    age, sex = np.array([60.0, 61, 61.5, 59, 75, 70, 70, np.nan]), np.array(list("ffffffmf"))
    # the nearest of a, then b, would leave b with none within a year and a half: a-d and b-c are both
    keep = matched(names, case, age, sex, caliper=1.5)
    assert [name for name, kept in zip(names, keep, strict=True) if kept] == ["a", "b", "c", "d"]
    turned = np.random.default_rng(0).permutation(8)
    again = matched(np.array(names)[turned], case[turned], age[turned], sex[turned], caliper=1.5)
    assert (again == keep[turned]).all()
    table = pd.DataFrame({"name": names, "case": case, "age": age, "sex": sex}).iloc[turned]  # with its old index
    assert (matched(table["name"], table["case"], table["age"], table["sex"], caliper=1.5) == again).all()
    assert matched(names, case, age, sex, caliper=5).sum() == 6  # f and e of 70 and 75
    with pytest.raises(ValueError, match="a has several rows"):
        matched(["a", "a"], np.array([0, 1]), np.ones(2), np.ones(2))


def test_after_matching_age_alone_tells_nothing():
    rng = np.random.default_rng(0)
    ill = np.repeat([0.0, 1], [200, 100])
    age, sex = rng.normal(60 + 12 * ill, 8), rng.integers(0, 2, 300)
    keep = matched(range(300), ill, age, sex)
    assert (keep & (ill == 1)).sum() == (keep & (ill == 0)).sum() > 40
    assert score(ill, age, "classification", range(300))["value"] > 0.8
    left = score(ill[keep], age[keep], "classification", np.flatnonzero(keep))
    assert left["low"] < 0.5 < left["high"]


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


@pytest.mark.parametrize(("labels", "people", "word"), [([0.0, np.nan, 1], ["a", "b", "c"], "true"),
                                                        ([0.0, 1, 1], ["a", None, "c"], "participant")])
def test_a_missing_label_or_participant_is_not_left_out_unseen(labels, people, word):
    with pytest.raises(ValueError, match=f"predictions: empty cells in {word}; leave these scans out"):
        score(np.array(labels), np.zeros(3), "classification", people)


LARGE = """
import json, resource, time
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from kit.evaluate.metrics import score
rng = np.random.default_rng(0)
labels = np.repeat([0.0, 1.0], 10_000)
guess = labels + rng.normal(size=20_000)
right, before = roc_auc_score(labels, guess), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.process_time()
found = score(labels, guess, "classification", range(20_000))
print(json.dumps({**found, "right": right, "seconds": time.process_time() - begun,
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
