"""Metrics over participants, with intervals: AUC, mean absolute error and what reviewers ask for beside them."""

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

METRICS = {"classification": "auc", "regression": "mean_absolute_error"}  # area under the ROC curve; label's unit
RESAMPLES = 2000
DRAWS = 100  # of these at a time; bounds memory
LEAST_PARTICIPANTS = 10  # of each class, or in all for a number, that an interval needs; see `score`


def score(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str], seed: int = 0,
          folds: Sequence[int] | None = None, draws: int = RESAMPLES) -> dict[str, float]:
    """A metric of `METRICS` over participants, with its 95 % interval by the bootstrap over participants.

    Each participant counts once, however many scans there are; see `per_participant`. For the interval see
    `interval`.

    There is no interval (low and high are nan) with fewer than `LEAST_PARTICIPANTS` of a class, or in all for a
    number. Nor is there one without width: an AUC of 1 stays 1 in every draw, which says nothing of other
    participants.

    Args:
        labels: (scans,) class 0 to classes - 1, or the number.
        predictions: (scans,) log-odds of class 1, or the predicted number; (scans, classes) logits of more classes.
        kind: "classification" or "regression".
        participants: (scans,) whose scan it is.
        folds: (scans,) by which fold's model each was predicted; see `auc`.
        draws: number of bootstrap draws.

    Returns:
        value (nan where a class is absent), low, high, participants.

    Raises:
        ValueError: a prediction is not finite.
    """
    joined = per_participant(labels, predictions, participants, folds)
    codes, names = pd.factorize(joined["participant"])
    true, predicted, weight = joined["true"].to_numpy(), predicted_of(joined), joined["weight"].to_numpy()
    within = None if folds is None else joined["fold"].to_numpy()

    def on(drawn: np.ndarray) -> np.ndarray:
        return statistic(true, predicted, drawn[:, codes] * weight, kind, within)

    value, low, high = on(np.ones((1, len(names))))[0], np.nan, np.nan
    if fewest(true, predicted, codes, kind) >= LEAST_PARTICIPANTS:
        drawn = np.concatenate([on(some) for some in bootstrap(len(names), draws, seed)])
        low, high = interval(value, *variance(drawn, len(names)), METRICS[kind])
    return {"value": float(value), "low": float(low), "high": float(high), "participants": float(len(names))}


def per_participant(labels: np.ndarray, predictions: np.ndarray, participants: Sequence[str],
                    folds: Sequence[int] | None = None) -> pd.DataFrame:
    """Join scans so that each participant counts once.

    Scans of a participant with the same label become one row with the mean of their predictions. A participant of
    several labels (age at two visits, a diagnosis that changed) has a row for each, in equal shares; so has one
    whom several folds' models predicted.

    Args:
        labels, participants, folds: (scans,) each.
        predictions: (scans,) or (scans, classes).

    Returns:
        participant, fold (where given), true, predicted or predicted_0 … of each class, weight (a participant's sum
        to 1).

    Raises:
        ValueError: a prediction is not finite.
    """
    values = np.asarray(predictions, np.float64)
    scans = pd.DataFrame({"participant": np.asarray(participants)})
    if folds is not None:
        scans["fold"] = np.asarray(folds)
    scans["true"] = np.asarray(labels, np.float64)
    names = ["predicted"] if values.ndim == 1 else [f"predicted_{each}" for each in range(values.shape[1])]
    scans[names] = values.reshape(len(scans), -1)
    return join_scans(scans, [])


def join_scans(scans: pd.DataFrame, tests: list[str]) -> pd.DataFrame:
    """As `per_participant` does, in each test that the columns `tests` tell apart.

    Args:
        scans: participant, fold (if there are folds to be kept apart within a test), true, predicted or predicted_0 …

    Raises:
        ValueError: a prediction is not finite.
    """
    names = predicted_columns(scans)
    finite = np.isfinite(scans[names]).all(axis=1)
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {len(scans)} predictions are not finite: there is no score; look for "
                         "nan in the encoder's weights or in the scans")
    keys = [*tests, "participant", *(["fold"] if "fold" in scans and "fold" not in tests else []), "true"]
    scans = scans[[*keys, *names]].sort_values([*keys, *names])  # rows in another order give the same bits
    joined = scans.groupby(keys, as_index=False, observed=True)[names].mean()
    return joined.assign(weight=1 / joined.groupby([*tests, "participant"])["true"].transform("size"))


def predicted_columns(table: pd.DataFrame) -> list[str]:
    """`predicted`, or with more than two classes `predicted_0` …; of a table of both, those that hold anything."""
    several = sorted((name for name in table.columns if str(name).startswith("predicted_")),
                     key=lambda name: int(name.removeprefix("predicted_")))
    several = [name for name in several if table[name].notna().any()]
    return several or ["predicted"]


def predicted_of(table: pd.DataFrame) -> np.ndarray:
    """(rows,) `predicted`, or (rows, classes) `predicted_0` … of a table."""
    names = predicted_columns(table)
    return table[names[0]].to_numpy() if names == ["predicted"] else table[names].to_numpy()


def statistic(true: np.ndarray, predicted: np.ndarray, weights: np.ndarray, kind: str,
              folds: np.ndarray | None = None) -> np.ndarray:
    """(draws,): the metric of `METRICS` under each draw's weights (draws, rows)."""
    if kind == "classification":
        return auc(true, predicted, weights, folds)
    return weights @ np.abs(true - predicted) / weights.sum(1)


def auc(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray,
        folds: np.ndarray | None = None) -> np.ndarray:
    """Share of pairs in the right order, ties half, each pair weighted: the Mann-Whitney form of the AUC, by ranks.

    Of more than two classes the mean over classes, each against the rest. Pairs are compared within a fold only, and
    summed over folds: two models' log-odds are not on one scale.

    Args:
        labels: (rows,) 0 to classes - 1.
        predictions: (rows,) log-odds of class 1, or (rows, classes) logits.
        weights: (draws, rows).
        folds: (rows,) whose pairs are apart; without it all are compared.

    Returns:
        (draws,), nan where a draw lacks one of the classes.
    """
    if predictions.ndim == 2:
        odds = one_vs_rest(predictions)
        return np.mean([auc(labels == each, odds[:, each], weights, folds) for each in range(odds.shape[1])], axis=0)
    folds = np.zeros(len(labels)) if folds is None else folds
    order = np.lexsort((predictions, folds))
    sorted_folds, ranked = folds[order], predictions[order]
    begins = np.r_[True, sorted_folds[1:] != sorted_folds[:-1]]  # a fold
    ties = np.flatnonzero(begins | np.r_[True, ranked[1:] != ranked[:-1]])  # where each group of equals starts
    sorted_weights, right = weights[:, order], labels[order] == 1
    positive, negative = (np.add.reduceat(sorted_weights * of, ties, axis=1) for of in (right, ~right))
    starts = np.flatnonzero(begins[ties])
    positives, negatives = (np.add.reduceat(each, starts, axis=1) for each in (positive, negative))  # of each fold
    earlier = np.repeat(negatives.cumsum(1) - negatives, np.diff(np.r_[starts, len(ties)]), axis=1)
    ranked_below = negative.cumsum(1) - negative / 2 - earlier
    pairs = (positives * negatives).sum(1)
    return (positive * ranked_below).sum(1) / np.where(pairs, pairs, np.nan)


def one_vs_rest(logits: np.ndarray) -> np.ndarray:
    """(rows, classes) log-odds of each class against all others: ordered as its probability, without rounding to 1."""
    return np.stack([logits[:, each] - logsumexp(np.delete(logits, each, axis=1), axis=1)
                     for each in range(logits.shape[1])], axis=1)


def fewest(true: np.ndarray, predicted: np.ndarray, participants: np.ndarray, kind: str) -> int:
    """Participants of the rarest class, or of a number all."""
    if kind == "regression":
        return len(np.unique(participants))
    classes = range(predicted.shape[1] if predicted.ndim == 2 else 2)
    return min(len(np.unique(participants[true == each])) for each in classes)


def bootstrap(participants: int, draws: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each participant is drawn, `DRAWS` draws at a time: (draws, participants).

    The same number of participants, draws and seed give the same draws: so statistics are paired.
    """
    rng, even = np.random.default_rng(seed), np.full(participants, 1 / participants)
    for begin in range(0, draws, DRAWS):
        yield rng.multinomial(participants, even, size=min(DRAWS, draws - begin))


def variance(drawn: np.ndarray, participants: int,
             replicates: Sequence[tuple[np.ndarray, np.ndarray]] = ()) -> tuple[float, float]:
    """Variance of a mean over seeds, in other participants and under other seeds, and its degrees of freedom.

    The bootstrap has the participants' part, and of the seeds' what differs from participant to participant. The
    spread between seeds has the whole of theirs: what it has beyond that noise is added. The degrees of freedom are
    Satterthwaite's: three seeds that differ a lot say little of how much seeds differ. (So do readers and cases in
    Obuchowski & Rockette 1995, Hillis 2007; with one seed only participants are in it.)

    Args:
        drawn: (draws,) the statistic, a mean over seeds, in each draw of participants.
        replicates: for each side that has several seeds the statistic by seed, of all participants (seeds,) and in
            each draw (seeds, draws). A difference of pairs by seed has one side.
    """
    whole = np.isfinite(drawn)  # one draw in 20,000 of 10 and 10 participants lacks a class
    people = drawn[whole].var(ddof=1) * participants / (participants - 1)
    total, unsure = people, people**2 / (participants - 1)
    for found, by_seed in replicates:
        seeds, spread = len(found), found.var(ddof=1)
        noise = (by_seed[:, whole] - found[:, None]).var(axis=0, ddof=1).mean()
        total += max(spread - noise, 0) / seeds
        unsure += (spread / seeds) ** 2 / (seeds - 1)
    return float(total), float(total**2 / unsure) if unsure else np.nan


def interval(value: float, variance: float, freedom: float, metric: str = "") -> tuple[float, float]:
    """Student's 95 % interval, of an AUC on the scale of its log-odds, of an error on that of its logarithm.

    On these scales it is near to symmetric, and keeps to what the metric can be. In simulations (1,500 each), what
    should hold the truth in 95 of 100 cases does so in 98 at an AUC of .95 with ten or twenty participants of each
    class, and in 95 with sixty, where the bootstrap's quantiles do in 98, 91 and 92; of an error with 10, 20 and 60
    participants in 95, 94 and 94, where quantiles do in 89, 91 and 93.

    Args:
        metric: of `METRICS`; any other, or none, such as a difference, is left on its own scale.

    Returns:
        low, high; nan where there is no variance.
    """
    if not variance > 1e-24:  # rounding
        return np.nan, np.nan
    to, back, slope = {"auc": (logit, expit, value * (1 - value)),
                       "mean_absolute_error": (np.log, np.exp, value)}.get(metric, (float, float, 1.0))
    half = student.ppf(0.975, freedom) * np.sqrt(variance) / slope
    return float(back(to(value) - half)), float(back(to(value) + half))


def further_metrics(true: np.ndarray, predicted: np.ndarray, weight: np.ndarray, kind: str) -> dict[str, float]:
    """What is asked for beside `METRICS`; nan where it is not defined, such as where a class is absent.

    Scans of several folds are taken as on one scale here (unlike in `auc`).

    - classes: balanced_accuracy (log-odds above 0, or the largest logit), brier (mean over classes where there are
      more than two); of two classes average_precision, sensitivity_at_90_specificity (on the ROC curve, no
      interpolation), calibration_slope and calibration_intercept (logistic recalibration: slope 1, and with the
      slope held at 1 intercept 0 are perfect; Van Calster et al. 2019)
    - numbers: rmse, r2, correlation (Pearson), bias_slope: by how much the error (predicted - true) changes with each
      unit of the truth; -1 is that of always guessing the mean, 0 is none

    Args:
        true, weight: (rows,); see `per_participant`.
        predicted: (rows,) log-odds of class 1 or the number, or (rows, classes) logits.
        kind: "classification" or "regression".
    """
    if kind == "regression":
        (spread, shared), (_, theirs) = np.cov(true, predicted, aweights=weight)
        return {"rmse": float(root_mean_squared_error(true, predicted, sample_weight=weight)),
                "r2": float(r2_score(true, predicted, sample_weight=weight)) if spread > 0 else np.nan,
                "correlation": float(shared / np.sqrt(spread * theirs)) if min(spread, theirs) > 0 else np.nan,
                "bias_slope": float(shared / spread - 1) if spread > 0 else np.nan}
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
    """Slope (nan where one log-odds parts the classes: it would be endless) and intercept."""
    slope = np.nan
    if predicted[true == 0].max() > predicted[true == 1].min() and np.ptp(predicted) > 0:
        spread = predicted.std()  # the solver wants numbers near 1
        model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        slope = float(model.fit(predicted[:, None] / spread, true, sample_weight=weight).coef_[0, 0] / spread)
    far = np.abs(predicted).max() + 50
    return slope, float(brentq(lambda shift: weight @ (expit(predicted + shift) - true), -far, far))


def bias_corrected(validation_true: np.ndarray, validation_predicted: np.ndarray,
                   predicted: np.ndarray) -> np.ndarray:
    """Predictions without their pull to the mean: predicted = a + b·true is fitted in validation, and undone.

    The form that needs no true age of those tested; see de Lange & Cole 2020, "Commentary: Correction procedures in
    brain-age prediction". It widens what noise there is: the error often grows.

    Args:
        validation_true, validation_predicted: (participants,) of whom nobody is tested.
        predicted: (rows,) to correct.

    Raises:
        ValueError: validation predictions do not rise with the truth.
    """
    slope, intercept = np.polyfit(validation_true, validation_predicted, 1)
    if slope <= 0:
        raise ValueError(f"bias correction: the validation predictions do not rise with the truth (slope {slope:.3g}); "
                         "such a model cannot be corrected")
    return (predicted - intercept) / slope


def within_bands(labels: np.ndarray, predictions: np.ndarray, kind: str, participants: Sequence[str],
                 covariate: np.ndarray, edges: Sequence[float], seed: int = 0,
                 folds: Sequence[int] | None = None) -> pd.DataFrame:
    """`score` within bands of a covariate, such as age: what is left of a diagnosis among people of one age.

    Args:
        covariate: (scans,); where it is nan, a scan is in no band.
        edges: ascending; a band is from one up to, and without, the next.

    Returns:
        a row a band that holds anybody: from, to, value, low, high, participants.
    """
    rows = []
    for lower, upper in zip(edges[:-1], edges[1:], strict=True):
        keep = (covariate >= lower) & (covariate < upper)
        if keep.any():
            inside = None if folds is None else np.asarray(folds)[keep]
            found = score(labels[keep], predictions[keep], kind, np.asarray(participants)[keep], seed, inside)
            rows.append({"from": lower, "to": upper, **found})
    return pd.DataFrame(rows, columns=["from", "to", "value", "low", "high", "participants"])


def matched(participants: Sequence[str], case: np.ndarray, age: np.ndarray, sex: np.ndarray,
            caliper: float = 2.0) -> np.ndarray:
    """Pair each case with a control of the same sex and about the same age; who has no partner is left out.

    As many pairs as there can be, and of these choices the one of the smallest sum of differences in age ("optimal"
    1:1 matching, Rosenbaum 1989).

    Args:
        participants: (people,) names, each once.
        case: (people,) 1 for cases, 0 for controls.
        age: (people,) years; who has none, or no sex, is left out.
        sex: (people,) any values.
        caliper: the largest difference of a pair's ages, in years.

    Returns:
        (people,) bool: who remains.

    Raises:
        ValueError: a participant has several rows.
    """
    people = pd.DataFrame({"participant": np.asarray(participants), "case": case, "age": age, "sex": sex})
    twice = people["participant"][people["participant"].duplicated()]
    if len(twice):
        raise ValueError(f"matching: {twice.iloc[0]} has several rows; give one row a participant")
    keep = np.zeros(len(people), bool)
    ordered = people.dropna().sort_values(["age", "participant"])  # rows in another order: the same pairs
    for _, group in ordered.groupby("sex"):
        cases, controls = group[group["case"] == 1], group[group["case"] == 0]
        apart = np.abs(cases["age"].to_numpy()[:, None] - controls["age"].to_numpy())
        # one pair less is worse than any sum of differences within the caliper
        first, second = linear_sum_assignment(np.where(apart <= caliper, apart, (caliper + 1) * (len(group) + 1)))
        near = apart[first, second] <= caliper
        keep[cases.index[first[near]]] = keep[controls.index[second[near]]] = True
    return keep
