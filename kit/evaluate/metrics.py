"""Metrics over participants, with intervals: AUC, mean absolute error, and the others that reviewers ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq, linear_sum_assignment
from scipy.special import expit, logit, logsumexp, softmax
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    r2_score,
    roc_curve,
    root_mean_squared_error,
)

from kit.errors import KitError

METRICS = {"classification": "auc", "regression": "mean_absolute_error"}  # area under the ROC curve; label's unit
RESAMPLES = 2000
AT_ONCE = 100  # bootstrap draws computed at a time; bounds memory
LEAST_PARTICIPANTS = 10  # needed for an interval, per class (or in all for regression); see `score`
FLAT = 0.2  # ratio of standard deviations, predictions over labels, below which a model hardly tells people apart


class NotFiniteError(KitError, ValueError):
    """Predictions are not finite, so there is no score."""


def score(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str] | np.ndarray,
          seed: int = 0, folds: Sequence[int] | np.ndarray | None = None, draws: int = RESAMPLES) -> dict[str, float]:
    """Compute a metric of `METRICS` over participants, with its 95 % bootstrap interval.

    Each participant counts once, however many scans there are; see `per_participant`. For the interval see
    `interval`.

    The interval is nan with fewer than `LEAST_PARTICIPANTS` of a class (or in all for regression), counted as in
    `fewest`. It is also nan if it would have no width: an AUC of 1 stays 1 in every draw, which says nothing about
    other participants.

    Args:
        labels: (scans,) class 0 to classes - 1, or the number.
        predictions: (scans,) log-odds of class 1, or the predicted number; (scans, classes) logits of more classes.
        kind: "classification" or "regression".
        participants: (scans,) participant of each scan.
        folds: (scans,) fold whose model predicted each scan; see `auc`.
        draws: number of bootstrap draws.

    Returns:
        value (nan if no fold has both classes), low, high, participants (also those whose fold has one class only).

    Raises:
        NotFiniteError: a prediction is not finite.
        ValueError: a label or a participant is missing.
    """
    joined = per_participant(labels, predictions, participants, folds)
    codes, names = pd.factorize(joined["participant"])
    true, predicted, weight = joined["true"].to_numpy(), predicted_of(joined), joined["weight"].to_numpy()
    within = None if folds is None else joined["fold"].to_numpy()

    def statistic_on(drawn: np.ndarray) -> np.ndarray:
        return statistic(true, predicted, drawn[:, codes] * weight, kind, within)

    value, low, high = statistic_on(np.ones((1, len(names))))[0], np.nan, np.nan
    if fewest(true, predicted, codes, kind, within) >= LEAST_PARTICIPANTS:
        drawn = np.concatenate([statistic_on(some) for some in bootstrap(len(names), draws, seed)])
        low, high = interval(value, *variance(drawn, len(names)), METRICS[kind])
    return {"value": float(value), "low": float(low), "high": float(high), "participants": float(len(names))}


def per_participant(labels: np.ndarray, predictions: np.ndarray, participants: Sequence[str] | np.ndarray,
                    folds: Sequence[int] | np.ndarray | None = None) -> pd.DataFrame:
    """Average scans so that each participant counts once.

    A participant's scans with the same label become one row with their mean prediction. A participant with several
    labels (age at two visits, a changed diagnosis), or predicted by several folds' models, has one row for each, with
    equal weights.

    Args:
        labels, participants, folds: (scans,) each.
        predictions: (scans,) or (scans, classes).

    Returns:
        participant, fold (if given), true, predicted or predicted_0 … of each class, weight (summing to 1 per
        participant).

    Raises:
        NotFiniteError: a prediction is not finite.
        ValueError: a label, a participant or a fold is missing.
    """
    values = np.asarray(predictions, np.float64)
    scans = pd.DataFrame({"participant": np.asarray(participants)})
    if folds is not None:
        scans["fold"] = np.asarray(folds)
    scans["true"] = np.asarray(labels, np.float64)
    names = ["predicted"] if values.ndim == 1 else [f"predicted_{each}" for each in range(values.shape[1])]
    scans[names] = values.reshape(len(scans), -1)
    return join_scans(scans, [])


def join_scans(scans: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """As `per_participant`, separately for each combination of values in the columns `by`.

    Args:
        scans: `by`, participant, fold (if folds must stay apart), true, predicted or predicted_0 …

    Raises:
        NotFiniteError: a prediction is not finite.
        ValueError: a label, a participant or another key is missing.
    """
    names = predicted_columns(scans)
    finite = np.isfinite(scans[names]).all(axis=1)
    if not finite.all():
        raise NotFiniteError(f"{(~finite).sum()} of {len(scans)} predictions are not finite: there is no score; look "
                             "for nan in the encoder's weights or in the scans")
    keys = [*by, "participant", *(["fold"] if "fold" in scans and "fold" not in by else []), "true"]
    if empty := [name for name in keys if scans[name].isna().any()]:
        raise ValueError(f"predictions: empty cells in {', '.join(empty)}; leave these scans out, or fill them in")
    scans = scans[[*keys, *names]].sort_values([*keys, *names])  # bit-identical whatever the order of rows
    joined = scans.groupby(keys, as_index=False, observed=True)[names].mean()
    return joined.assign(weight=1 / joined.groupby([*by, "participant"])["true"].transform("size"))


def predicted_columns(table: pd.DataFrame) -> list[str]:
    """Names of the prediction columns: `predicted_0` … if any has values (more than two classes), else `predicted`."""
    several = sorted((name for name in table.columns if str(name).startswith("predicted_")),
                     key=lambda name: int(name.removeprefix("predicted_")))
    several = [name for name in several if table[name].notna().any()]
    return several or ["predicted"]


def predicted_of(table: pd.DataFrame) -> np.ndarray:
    """Predictions of a table: (rows,) `predicted`, or (rows, classes) `predicted_0` …"""
    names = predicted_columns(table)
    return table[names[0]].to_numpy() if names == ["predicted"] else table[names].to_numpy()


def statistic(true: np.ndarray, predicted: np.ndarray, weights: np.ndarray, kind: str,
              folds: np.ndarray | None = None) -> np.ndarray:
    """Compute the metric of `METRICS` (draws,) under each draw's weights (draws, rows)."""
    if kind == "classification":
        return auc(true, predicted, weights, folds)
    return weights @ np.abs(true - predicted) / weights.sum(1)


def auc(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray,
        folds: np.ndarray | None = None) -> np.ndarray:
    """Compute the AUC by ranks (Mann-Whitney): the weighted share of correctly ordered pairs, ties counting half.

    For more than two classes it is the mean over classes, each against the rest. Pairs are compared only within a
    fold and summed over folds, because two models' log-odds are not on one scale.

    Args:
        labels: (rows,) 0 to classes - 1.
        predictions: (rows,) log-odds of class 1, or (rows, classes) logits.
        weights: (draws, rows).
        folds: (rows,) fold of each row; None: all pairs are compared.

    Returns:
        (draws,), nan if no fold of a draw has both classes; a fold with one class has no pairs and does not count.
    """
    if predictions.ndim == 2:
        odds = one_vs_rest(predictions)
        return np.mean([auc(labels == each, odds[:, each], weights, folds) for each in range(odds.shape[1])], axis=0)
    folds = np.zeros(len(labels)) if folds is None else folds
    order = np.lexsort((predictions, folds))
    sorted_folds, ranked = folds[order], predictions[order]
    begins = np.r_[True, sorted_folds[1:] != sorted_folds[:-1]]  # start of a fold
    ties = np.flatnonzero(begins | np.r_[True, ranked[1:] != ranked[:-1]])  # start of each group of ties
    sorted_weights, right = weights[:, order], labels[order] == 1
    positive, negative = (np.add.reduceat(sorted_weights * of, ties, axis=1) for of in (right, ~right))
    starts = np.flatnonzero(begins[ties])
    positives, negatives = (np.add.reduceat(each, starts, axis=1) for each in (positive, negative))  # of each fold
    earlier = np.repeat(negatives.cumsum(1) - negatives, np.diff(np.r_[starts, len(ties)]), axis=1)
    ranked_below = negative.cumsum(1) - negative / 2 - earlier
    pairs = (positives * negatives).sum(1)
    return (positive * ranked_below).sum(1) / np.where(pairs, pairs, np.nan)


def one_vs_rest(logits: np.ndarray) -> np.ndarray:
    """Log-odds (rows, classes) of each class against the rest: the order of probabilities, without rounding to 1."""
    return np.stack([logits[:, each] - logsumexp(np.delete(logits, each, axis=1), axis=1)
                     for each in range(logits.shape[1])], axis=1)


def fewest(true: np.ndarray, predicted: np.ndarray, participants: np.ndarray, kind: str,
           folds: np.ndarray | None = None) -> int:
    """Count participants of the rarest class, or all participants for regression.

    A class's participants count where their fold has another class, too: the AUC compares pairs within folds.
    """
    if kind == "regression":
        return len(np.unique(participants))
    counts = []
    for each in range(predicted.shape[1] if predicted.ndim == 2 else 2):
        own = true == each
        paired = own if folds is None else own & np.isin(folds, folds[~own])
        counts.append(len(np.unique(participants[paired])))
    return min(counts)


def bootstrap(participants: int, draws: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each participant is drawn, `AT_ONCE` draws at a time: (draws, participants).

    The same number of participants, draws and seed give the same draws, which pairs statistics.
    """
    rng, even = np.random.default_rng(seed), np.full(participants, 1 / participants)
    for begin in range(0, draws, AT_ONCE):
        yield rng.multinomial(participants, even, size=min(AT_ONCE, draws - begin))


def variance(drawn: np.ndarray, participants: int,
             replicates: Sequence[tuple[np.ndarray, np.ndarray]] = ()) -> tuple[float, float]:
    """Estimate the variance of a score averaged over seeds, as participants and seeds are sampled.

    The bootstrap captures participant sampling and the interaction of seeds with participants. The variance between
    seeds contains that interaction too, so only its excess is added. Degrees of freedom follow Satterthwaite: three
    seeds that differ a lot say little about how much seeds vary. Obuchowski & Rockette 1995 and Hillis 2007 treat
    readers and cases in the same way.

    Args:
        drawn: (draws,) the score, a mean over seeds, in each draw of participants.
        participants: their number.
        replicates: for each independent set of several seeds, the score by seed on all participants (seeds,) and in
            each draw (seeds, draws). A score, or a difference paired by seed, has one set; an unpaired difference has
            two. With none, only participants contribute.

    Returns:
        the variance, and its degrees of freedom (nan if the variance is 0).
    """
    whole = np.isfinite(drawn)  # with 10 + 10 participants, one draw in 20,000 lacks a class
    people = drawn[whole].var(ddof=1) * participants / (participants - 1)
    total, unsure = people, people**2 / (participants - 1)
    for found, by_seed in replicates:
        seeds, spread = len(found), found.var(ddof=1)
        noise = (by_seed[:, whole] - found[:, None]).var(axis=0, ddof=1).mean()
        total += max(spread - noise, 0) / seeds
        unsure += (spread / seeds) ** 2 / (seeds - 1)
    return float(total), float(total**2 / unsure) if unsure else np.nan


def interval(value: float, variance: float, freedom: float, metric: str = "") -> tuple[float, float]:
    """Compute Student's 95 % interval: on the logit scale for an AUC, on the log scale for an error.

    On these scales it is nearly symmetric, and it stays in the metric's range. Coverage in simulations (1,500 each):
    for an AUC of .95 with 10, 20 and 60 participants per class 98, 98 and 95 % (bootstrap quantiles: 98, 91 and
    92 %); for an error with 10, 20 and 60 participants 95, 94 and 94 % (quantiles: 89, 91 and 93 %).

    Args:
        value, variance, freedom: on the metric's own scale; see `variance`.
        metric: one of `METRICS`; anything else, such as a difference, stays on its own scale.

    Returns:
        low, high; nan if there is no variance.
    """
    if not variance > 1e-24:  # zero but for rounding
        return np.nan, np.nan
    # delta method: on the new scale the standard error is divided by the derivative of `back`
    to, back, derivative = {"auc": (logit, expit, value * (1 - value)),
                            "mean_absolute_error": (np.log, np.exp, value)}.get(metric, (float, float, 1.0))
    half = student.ppf(0.975, freedom) * np.sqrt(variance) / derivative
    return float(back(to(value) - half)), float(back(to(value) + half))


def further_metrics(true: np.ndarray, predicted: np.ndarray, weight: np.ndarray, kind: str) -> dict[str, float]:
    """Compute metrics beyond `METRICS`; nan where undefined, such as when a class is absent.

    Scans of several folds are treated as on one scale (unlike in `auc`). In cross-validation this biases correlations
    downwards: the more high labels a fold tests, the lower the mean label of its training data. Guessing that mean has
    a correlation below 0.

    - classification: balanced_accuracy (log-odds above 0, or the largest logit), brier (mean over classes if there are
      more than two). For two classes also average_precision, sensitivity_at_90_specificity (on the ROC curve, no
      interpolation), calibration_slope and calibration_intercept (logistic recalibration; ideal is slope 1, and
      intercept 0 with the slope fixed at 1; Van Calster et al. 2019)
    - regression: rmse, r2, correlation (Pearson), bias_slope: change of the error (predicted - true) per unit of the
      truth; -1 for always guessing the mean, 0 for no bias

    Args:
        true, weight: (rows,); see `per_participant`.
        predicted: (rows,) log-odds of class 1 or the number, or (rows, classes) logits.
        kind: "classification" or "regression".
    """
    if kind == "regression":
        (spread, shared), (_, theirs) = np.cov(true, predicted, aweights=weight)
        differ, theirs_differ = np.ptp(true) > 0, np.ptp(predicted) > 0  # a constant's variance may be 1e-30
        return {"rmse": float(root_mean_squared_error(true, predicted, sample_weight=weight)),
                "r2": float(r2_score(true, predicted, sample_weight=weight)) if differ else np.nan,
                "correlation": float(shared / np.sqrt(spread * theirs)) if differ and theirs_differ else np.nan,
                "bias_slope": float(shared / spread - 1) if differ else np.nan}
    several = predicted.ndim == 2
    chosen = predicted.argmax(1) if several else (predicted > 0).astype(float)
    odds = softmax(predicted, axis=1) if several else expit(predicted)
    absent = len(np.unique(true)) < (predicted.shape[1] if several else 2)
    found = {"balanced_accuracy": np.nan if absent else float(balanced_accuracy_score(true, chosen,
                                                                                      sample_weight=weight))}
    if several:
        loss = brier_score_loss(true, odds, sample_weight=weight, labels=range(odds.shape[1]), scale_by_half=False)
        return {**found, "brier": float(loss / odds.shape[1])}
    found["brier"] = float(brier_score_loss(true, odds, sample_weight=weight, labels=[0, 1]))
    if absent:
        return {**found, **dict.fromkeys(("average_precision", "sensitivity_at_90_specificity", "calibration_slope",
                                          "calibration_intercept"), np.nan)}
    false_positives, sensitivity, _ = roc_curve(true, predicted, sample_weight=weight, drop_intermediate=False)
    slope, intercept = _calibration(true, predicted, weight)
    return {**found, "average_precision": float(average_precision_score(true, predicted, sample_weight=weight)),
            "sensitivity_at_90_specificity": float(sensitivity[false_positives <= 0.1 + 1e-9].max()),
            "calibration_slope": slope, "calibration_intercept": intercept}


def _calibration(true: np.ndarray, predicted: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Calibration slope and intercept; the slope is nan if a threshold separates the classes, as it would be infinite.

    That includes classes that are separated the wrong way round.
    """
    slope = np.nan
    cases, controls = predicted[true == 1], predicted[true == 0]
    if controls.max() > cases.min() and cases.max() > controls.min():
        spread = predicted.std()  # the solver needs values near 1
        model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        slope = float(model.fit(predicted[:, None] / spread, true, sample_weight=weight).coef_[0, 0] / spread)
    far = np.abs(predicted).max() + 50
    return slope, float(brentq(lambda shift: weight @ (expit(predicted + shift) - true), -far, far))


def bias_corrected(validation_true: np.ndarray, validation_predicted: np.ndarray, participants: pd.Series,
                   predicted: np.ndarray) -> np.ndarray:
    """Correct predictions for their pull to the mean: fit predicted = a + b·true on validation and invert it.

    Each validation participant counts once, whatever the number of scans.

    This form does not need the true age of tested participants; see de Lange & Cole 2020, "Commentary: Correction
    procedures in brain-age prediction". It amplifies noise, so the error often grows.

    Args:
        validation_true, validation_predicted, participants: (scans,), of people who are not tested.
        predicted: (rows,) to correct.

    Raises:
        ValueError: validation predictions do not rise with the truth, or there are fewer than three different labels.
    """
    if len(np.unique(validation_true)) < 3:
        raise ValueError("bias correction: validation has fewer than three different labels")
    weight = participants.groupby(participants.to_numpy()).transform("size").to_numpy() ** -0.5
    slope, intercept = np.polyfit(validation_true, validation_predicted, 1, w=weight)
    if slope <= 0:
        raise ValueError(f"bias correction: the validation predictions do not rise with the truth (slope {slope:.3g}); "
                         "such a model cannot be corrected")
    return (predicted - intercept) / slope


def matched(participants: Sequence[str], case: np.ndarray, age: np.ndarray, sex: np.ndarray,
            caliper: float = 2.0) -> np.ndarray:
    """Pair each case with a control of the same sex and about the same age; people without a partner are left out.

    Makes as many pairs as possible with the smallest total age difference ("optimal" 1:1 matching, Rosenbaum 1989).

    Args:
        participants: (people,) names, each once.
        case: (people,) 1 for cases, 0 for controls.
        age: (people,) years; people without an age or sex are left out.
        sex: (people,) any values.
        caliper: largest age difference within a pair, in years.

    Returns:
        (people,) bool: who is in a pair.

    Raises:
        ValueError: a participant has several rows.
    """
    people = pd.DataFrame({"participant": np.asarray(participants), "case": np.asarray(case), "age": np.asarray(age),
                           "sex": np.asarray(sex)})
    twice = people["participant"][people["participant"].duplicated()]
    if len(twice):
        raise ValueError(f"matching: {twice.iloc[0]} has several rows; give one row per participant")
    keep = np.zeros(len(people), bool)
    ordered = people.dropna().sort_values(["age", "participant"])  # the order of rows does not change the pairs
    for _, group in ordered.groupby("sex"):
        cases, controls = group[group["case"] == 1], group[group["case"] == 0]
        apart = np.abs(cases["age"].to_numpy()[:, None] - controls["age"].to_numpy())
        # losing a pair costs more than any sum of differences within the caliper
        first, second = linear_sum_assignment(np.where(apart <= caliper, apart, (caliper + 1) * (len(group) + 1)))
        near = apart[first, second] <= caliper
        keep[cases.index[first[near]]] = keep[controls.index[second[near]]] = True
    return keep
