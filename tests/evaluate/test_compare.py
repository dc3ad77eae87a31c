"""Scores over seeds and paired differences: against DeLong's test, by hand, and in simulations of known truth.

A simulated set is a label fraction of one table: so hundreds of them are compared in one call.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from kit.evaluate.compare import differences, holm, scores
from kit.evaluate.metrics import score, variance

KINDS = {"sex": "classification", "age": "regression", "stage": "classification"}
SETS, PER_CLASS = 500, 60
PEOPLE = 2 * PER_CLASS
DRAWS = 300


def table(true, predicted, encoder="SimCLR", task="sex", mode="probe", fraction=1.0, seed=0, fold=0,
          distribution="in_distribution", participant=None):
    """One model's predictions, a row a scan."""
    who = [f"p{each:03d}" for each in range(len(true))] if participant is None else participant
    rows = pd.DataFrame({"encoder": encoder, "mode": mode, "task": task, "label_fraction": fraction, "seed": seed,
                         "fold": fold, "distribution": distribution, "scan": [f"{each}_1" for each in who],
                         "participant": who, "true": true})
    names = "predicted" if np.ndim(predicted) == 1 else [f"predicted_{each}" for each in range(predicted.shape[1])]
    rows[names] = predicted
    return rows


def simulated(kind, seeds, better=0.0, sets=SETS, names=("SimCLR", "scratch"), seed=0):
    """Sets of two or more models, of which the first is `better`; seeds differ about as much as draws of participants.

    Log-odds or errors have a part of each participant that all share, one of each model, one of each of its seeds.

    Returns:
        the table, and (models,) the truth of each model's metric: over participants and over seeds.
    """
    rng = np.random.default_rng(seed)
    spread = {"classification": 0.22, "regression": 0.1}[kind] * (seeds > 1)
    shape = (sets, len(names), seeds, PEOPLE)
    gain = better * (np.arange(len(names)) == 0)
    of_seed = gain[:, None, None] + spread * rng.normal(size=(*shape[:3], 1))
    noise = sum(part * rng.normal(size=size) for part, size in (
        (0.6**0.5, (sets, 1, 1, PEOPLE)), (0.25**0.5, (*shape[:2], 1, PEOPLE)), (0.15**0.5, shape)))
    many = np.random.default_rng(1).normal(size=100_000)
    if kind == "classification":
        true = np.broadcast_to(np.repeat([1.0, 0], PER_CLASS), shape)
        predicted = noise + (1.19 + of_seed) * true
        truth = [stats.norm.cdf((1.19 + each + spread * many) / 2**0.5).mean() for each in gain]
    else:
        true = np.broadcast_to(rng.normal(50, 15, size=(sets, 1, 1, PEOPLE)), shape)
        predicted = true + 8 * (1 - of_seed) * noise
        truth = [8 * (2 / np.pi) ** 0.5 * np.abs(1 - each - spread * many).mean() for each in gain]
    places = np.indices(shape).reshape(4, -1)
    rows = pd.DataFrame({"encoder": np.array(names)[places[1]], "mode": "probe",
                         "task": "sex" if kind == "classification" else "age", "label_fraction": places[0],
                         "seed": places[2], "fold": 0, "distribution": "in_distribution", "participant": places[3],
                         "true": true.ravel(), "predicted": predicted.ravel()})
    return rows, np.array(truth)


def batches(rows, compute, count=10):
    """What `compute(rows, seed)` gives, with other bootstrap draws for each tenth of the sets."""
    parts = rows.groupby(rows["label_fraction"] % count)
    return pd.concat([compute(some, seed) for seed, (_, some) in enumerate(parts)])


def delong(true, ours, theirs):
    """Difference of two AUCs, its standard error and p (DeLong, DeLong & Clarke-Pearson 1988), from the definition."""
    shares = []
    for predicted in (ours, theirs):
        cases, controls = predicted[true == 1][:, None], predicted[true == 0][None]
        shares.append((cases > controls) + (cases == controls) / 2)
    apart = shares[0] - shares[1]
    error = np.sqrt(apart.mean(1).var(ddof=1) / apart.shape[0] + apart.mean(0).var(ddof=1) / apart.shape[1])
    return apart.mean(), error, 2 * stats.norm.sf(abs(apart.mean()) / error)


def test_paired_differences_agree_with_delong():
    rows, _ = simulated("classification", 1, better=0.25, sets=40)
    found = differences(rows, KINDS, ["SimCLR"]).set_index("label_fraction")
    ratios = []
    for number, scans in rows.groupby("label_fraction"):
        true = scans[scans["encoder"] == "SimCLR"]["true"].to_numpy()
        both = [scans[scans["encoder"] == name]["predicted"].to_numpy() for name in ("SimCLR", "scratch")]
        apart, error, p = delong(true, *both)
        ours = found.loc[number]
        assert ours["difference"] == pytest.approx(apart, abs=1e-12)
        ratios.append((ours["high"] - ours["low"]) / 2 / stats.t.ppf(0.975, PEOPLE - 1) / error)
        assert ours["p"] == pytest.approx(p, abs=0.04)
    assert np.mean(ratios) == pytest.approx(1, abs=0.02) and np.all(np.abs(np.array(ratios) - 1) < 0.08)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind, seeds):
    rows, truth = simulated(kind, seeds, better=0.8 if kind == "classification" else 0.25)
    of_each = batches(rows, lambda some, seed: scores(some, KINDS, DRAWS, seed))
    for name, right in zip(("SimCLR", "scratch"), truth, strict=True):
        one = of_each[of_each["encoder"] == name]
        assert len(one) == SETS and one["value"].mean() == pytest.approx(right, rel=0.01)
        assert 0.93 <= ((one["low"] <= right) & (right <= one["high"])).mean() <= 0.97, name
    found = batches(rows, lambda some, seed: differences(some, KINDS, ["SimCLR"], DRAWS, seed))
    right = truth[0] - truth[1]
    assert 0.93 <= ((found["low"] <= right) & (right <= found["high"])).mean() <= 0.97
    assert ((found["p"] < 0.05) == (found["low"] * found["high"] > 0)).all()  # p and interval say the same
    power = 0.8 if seeds == 1 else 0.3  # what was planted is found; of three seeds that spread so, not as often
    assert (found["p"] < 0.05).mean() > power and found["difference"].mean() == pytest.approx(right, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_what_is_no_difference_is_called_one_in_five_of_a_hundred(kind, seeds):
    rows, _ = simulated(kind, seeds, seed=2)
    found = batches(rows, lambda some, seed: differences(some, KINDS, ["SimCLR"], DRAWS, seed))
    assert len(found) == SETS and 0.03 <= (found["p"] < 0.05).mean() <= 0.07


@pytest.mark.slow
def test_any_false_difference_among_many_rivals_is_as_rare():
    rivals = [f"rival {each}" for each in range(6)]
    rows, _ = simulated("classification", 1, names=["SimCLR", *rivals], seed=3)
    of_set = rows["encoder"] == "SimCLR"  # an encoder of its own in each set: a family of rows
    rows.loc[of_set, "encoder"] = "SimCLR " + rows.loc[of_set, "label_fraction"].astype(str)
    encoders = rows.loc[of_set, "encoder"].unique()
    found = batches(rows, lambda some, seed: differences(some, KINDS, encoders, DRAWS, seed))
    assert len(found) == SETS * 6
    assert (found["p"] < 0.05).groupby(found["encoder"]).any().mean() > 0.1  # uncorrected, some are
    assert (found["p_holm"] < 0.05).groupby(found["encoder"]).any().mean() <= 0.065  # .05, and 1.5 standard errors


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, np.nan, 0.02, 0.7])) == pytest.approx([1, np.nan, 0.06, 1], nan_ok=True)
    assert len(holm(np.array([]))) == 0


def test_holm_counts_all_rows_of_an_encoder_and_none_of_another():
    rng, true = np.random.default_rng(0), np.repeat([0.0, 1], 40)
    rows = pd.concat([table(true, true * size + rng.normal(size=80), name, fraction=fraction)
                      for fraction in (0.2, 1.0) for name, size in (("SimCLR", 2), ("MAE", 1.5), ("scratch", 1))])
    found = differences(rows, KINDS, ["SimCLR", "MAE"])
    assert list(found["encoder"]) == ["SimCLR"] * 4 + ["MAE"] * 4
    for _, family in found.groupby("encoder"):
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"].to_numpy()))
        assert (family["p_holm"] > family["p"]).any()


def test_one_seed_is_the_score_of_its_scans():
    rng, true = np.random.default_rng(0), np.repeat([0.0, 1], 30)
    guess, who = true + rng.normal(size=60), [f"p{each // 2}" for each in range(60)]  # two scans each
    for task in ("sex", "age"):
        found = scores(table(true, guess, task=task, participant=who), KINDS).iloc[0]
        alone = score(true, guess, KINDS[task], who)
        assert dict(found[["value", "low", "high", "participants"]]) == alone and found["seeds"] == 1


def test_rows_in_another_order_give_the_same_bits():
    rows, _ = simulated("classification", 2, sets=2)
    rows["participant"] = "p" + (rows["participant"] // 2).astype(str)  # two scans each
    rows["fold"] = rows["participant"].str[-1].astype(int) % 3
    elsewhere = rows.assign(distribution="site")
    rows = pd.concat([rows, elsewhere, elsewhere.assign(fold=7, predicted=-rows["predicted"])], ignore_index=True)
    turned = rows.sample(frac=1, random_state=0)
    for found, again in ((scores(rows, KINDS), scores(turned, KINDS)),
                         (differences(rows, KINDS, ["SimCLR"]), differences(turned, KINDS, ["SimCLR"]))):
        pd.testing.assert_frame_equal(found, again, check_exact=True)
    assert not scores(rows, KINDS, seed=1)["low"].equals(scores(rows, KINDS)["low"])


def folds_of(rows, shift):
    return rows.assign(predicted=rows["predicted"] + shift * rows["fold"])


def test_folds_on_other_scales_change_no_auc_and_no_interval():
    rng, true = np.random.default_rng(0), np.tile([0.0, 1], 60)
    rows = pd.concat([table(true, true + rng.normal(size=120), name, fold=np.arange(120) // 24)
                      for name in ("SimCLR", "scratch")])
    pd.testing.assert_frame_equal(scores(rows, KINDS), scores(folds_of(rows, 64), KINDS))
    pd.testing.assert_frame_equal(differences(rows, KINDS, ["SimCLR"]),
                                  differences(folds_of(rows, 64), KINDS, ["SimCLR"]))
    ours = folds_of(rows[rows["encoder"] == "SimCLR"], 64)
    by_fold = pd.Series([roc_auc_score(one["true"], one["predicted"]) for _, one in ours.groupby("fold")])
    assert scores(ours, KINDS)["value"][0] == pytest.approx(by_fold.mean())  # folds of equal numbers
    assert roc_auc_score(ours["true"], ours["predicted"]) < by_fold.mean() - 0.1


def test_elsewhere_every_fold_tests_everybody_and_the_metric_is_their_mean():
    rng, true = np.random.default_rng(0), np.tile([0.0, 1], 30)
    guesses = [[true + rng.normal(size=60) for _ in range(3)] for _ in range(2)]
    rows = pd.concat([table(true, guess + 50 * fold, seed=seed, fold=fold, distribution="site")
                      for seed, folds in enumerate(guesses) for fold, guess in enumerate(folds)])
    found = scores(rows, KINDS).iloc[0]
    assert found["value"] == pytest.approx(np.mean([[roc_auc_score(true, one) for one in each] for each in guesses]))
    assert found["participants"] == 60 and found["seeds"] == 2


def test_seeds_widen_the_interval_by_what_they_differ_beyond_noise():
    # three seeds 0.2 apart, on every draw of participants by as much: Student's t by hand
    found, people = np.array([1.0, 1.2, 1.4]), np.random.default_rng(0).normal(0, 0.1, 1000)
    total, freedom = variance(1.2 + people, 100, [(found, found[:, None] + people)])
    alone = people.var(ddof=1) * 100 / 99
    assert total == pytest.approx(alone + 0.04 / 3)
    assert freedom == pytest.approx(total**2 / (alone**2 / 99 + (0.04 / 3) ** 2 / 2))
    # seeds that differ as much as their noise over participants add nothing: the mean's own draws have it
    noisy = found[:, None] + np.random.default_rng(1).normal(0, 0.2, size=(3, 1000))
    assert variance(1.2 + people, 100, [(found, noisy)])[0] == pytest.approx(alone, rel=0.2)


def test_a_baseline_of_one_seed_counts_for_all_and_another_side_of_one_seed_is_counted_as_one():
    rng, true = np.random.default_rng(0), np.repeat([0.0, 1], 30)
    def model(name, mode, seed, size):
        return table(true, size * true + rng.normal(size=60), name, mode=mode, seed=seed)
    rows = pd.concat([*(model("SimCLR", "probe", seed, 2 - seed / 2) for seed in range(3)),
                      *(model("random init", "probe", seed, 1) for seed in range(3)),
                      model("supervised", "probe", 0, 1), model("volumes", "baseline", 0, 1),
                      *(model("MAE", "probe", seed, 1) for seed in (0, 1)), model("SimCLR", "finetune", 0, 2),
                      model("tuned", "finetune", 0, 1)])
    found = differences(rows, KINDS, ["SimCLR"])
    probes = found[found["mode"] == "probe"].set_index("rival")
    assert dict(probes["seeds"]) == {"MAE": 2, "random init": 3, "supervised": 1, "volumes": 3}
    assert sorted(found[found["mode"] == "finetune"]["rival"]) == ["tuned", "volumes"]
    values = scores(rows, KINDS).set_index(["encoder", "mode"])["value"]
    for row in found.itertuples():
        theirs = values.get((row.rival, row.mode), values.get((row.rival, "baseline")))
        assert row.difference == pytest.approx(values[row.encoder, row.mode] - theirs)


def test_pairs_are_of_the_participants_whom_both_tested():
    rng, true = np.random.default_rng(0), np.tile([0.0, 1], 30)
    ours, theirs = (table(true, true + rng.normal(size=60), name) for name in ("SimCLR", "volumes"))
    theirs = theirs[:40].assign(mode="baseline")
    found = differences(pd.concat([ours, theirs]), KINDS, ["SimCLR"]).iloc[0]
    right = [roc_auc_score(each["true"][:40], each["predicted"][:40]) for each in (ours, theirs)]
    assert found["participants"] == 40 and found["difference"] == pytest.approx(right[0] - right[1])
    assert found["low"] < found["difference"] < found["high"]
    few = differences(pd.concat([ours, theirs[:19]]), KINDS, ["SimCLR"]).iloc[0]  # nine of a class
    assert np.isfinite(few["difference"]) and few[["low", "high", "p", "p_holm"]].isna().all()
    nobody = differences(pd.concat([ours[:20], theirs[20:]]), KINDS, ["SimCLR"]).iloc[0]
    assert nobody["participants"] == 0 and np.isnan(nobody["difference"]) and np.isnan(nobody["p"])


def test_a_table_may_mix_tasks_of_two_classes_of_more_and_of_numbers():
    rng, sex, stage = np.random.default_rng(0), np.tile([0.0, 1], 45), np.tile([0.0, 1, 2], 30)
    logits = [np.eye(3)[stage.astype(int)] * size + rng.normal(size=(90, 3)) for size in (1.5, 0)]
    rows = pd.concat([table(sex, sex + rng.normal(size=90)), table(sex, rng.normal(size=90), "scratch"),
                      table(50 + sex, 50 + rng.normal(size=90), task="age"),
                      table(stage, logits[0], task="stage"), table(stage, logits[1], "scratch", task="stage")])
    found = scores(rows, KINDS).set_index(["encoder", "task"])
    odds = np.exp(logits[0]) / np.exp(logits[0]).sum(1, keepdims=True)
    assert found.loc[("SimCLR", "stage"), "value"] == pytest.approx(roc_auc_score(stage, odds, multi_class="ovr"))
    assert found["metric"].value_counts().to_dict() == {"auc": 4, "mean_absolute_error": 1}
    assert (found["low"] < found["value"]).all() and (found["value"] < found["high"]).all()
    apart = differences(rows, KINDS, ["SimCLR"]).set_index("task")
    assert apart.loc["stage", "low"] > 0 and list(apart.index) == ["sex", "stage"]
    rows.loc[rows["task"] == "stage", "predicted_2"] = np.where(rows["encoder"] == "SimCLR", np.nan, 1)[90 * 3:]
    with pytest.raises(ValueError, match="stage: 90 of 180 predictions are not finite"):
        scores(rows, KINDS)


def test_what_never_varies_has_no_interval():
    true = np.repeat([0.0, 1], 30)
    rows = pd.concat([table(true, true), table(true, 2 * true, "MAE"), table(true, 0 * true, "guess", mode="baseline")])
    assert scores(rows, KINDS)["low"].isna().all() and list(scores(rows, KINDS)["value"]) == [1, 1, 0.5]
    found = differences(rows, KINDS, ["SimCLR"])
    assert list(found["difference"]) == [0, 0.5] and found["p_holm"].isna().all()
