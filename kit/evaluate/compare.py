"""Compare encoders with their rivals: scores over seeds and paired differences, from a table of predictions.

The table has one row per scan: encoder, mode, task, label_fraction, seed, fold, distribution, scan, participant, true
and predicted (log-odds of class 1, or the number; with more classes the logits predicted_0 …).

An entry is an encoder in one mode, on one task, with one label fraction, on one distribution. Its statistic is the
mean of the metric over seeds. In distribution, one fold's model tests each participant and the AUC compares pairs
within folds only. On other test sets every fold's model tests everyone, and the metric is averaged over folds too.

Intervals account for the sampling of participants and seeds, with the folds held fixed. They ignore that the training
sets of a cross-validation overlap; no unbiased estimate of that variance exists (Bengio & Grandvalet 2004).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.stats import t as student

from kit.evaluate.metrics import (
    LEAST_PARTICIPANTS,
    METRICS,
    RESAMPLES,
    bootstrap,
    fewest,
    interval,
    join_scans,
    predicted_of,
    statistic,
    variance,
)

ENTRY = ["encoder", "mode", "task", "label_fraction", "distribution"]
SCORES = ["encoder", "mode", "task", "label_fraction", "metric", "distribution", "value", "low", "high",
          "participants", "seeds"]
DIFFERENCES = ["encoder", "rival", "task", "mode", "label_fraction", "distribution", "metric", "difference", "low",
               "high", "p", "p_holm", "participants", "seeds"]

Key = tuple[str, str, str, float, str]  # the values of ENTRY
Names = tuple[str, ...]  # of participants, in order


def scores(predictions: pd.DataFrame, kinds: Mapping[str, str], draws: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Compute each entry's metric with its 95 % interval over participants and seeds.

    With one seed (column `seeds`) the interval covers participants only. With too few participants it is nan; see
    `kit.evaluate.metrics.score`, and `variance` and `interval` there for the method. In simulations with 60
    participants per class and seeds varying as much as participants, it covered the truth in 94 to 96 % of cases with
    three seeds and in 94 % with two. Where seeds varied half as much again as participants, coverage was 93 % and
    89 %: two seeds are too few to estimate how much seeds vary.

    Args:
        predictions: see the module's docstring; rows in any order.
        kinds: task -> "classification" or "regression".
        draws: number of bootstrap draws.

    Returns:
        one row per entry, sorted: encoder, mode, task, label_fraction, metric, distribution, value, low, high,
        participants (tested under every seed), seeds.

    Raises:
        NotFiniteError: a prediction is not finite; the message names the task.
        ValueError: a label or another key is missing.
    """
    entries = _entries(predictions, kinds)
    drawn = _resampled(((entry, entry.names) for entry in entries.values()), draws, seed)
    rows = []
    for key, entry in entries.items():
        sampled, metric = drawn[key, entry.names], METRICS[entry.kind]
        value, low, high = sampled.found.mean(), np.nan, np.nan
        if sampled.enough:
            replicates = [(sampled.found, sampled.drawn)] if len(entry.seeds) > 1 else []
            low, high = interval(value, *variance(sampled.drawn.mean(0), len(entry.names), replicates), metric)
        rows.append({**dict(zip(ENTRY, key, strict=True)), "metric": metric, "value": value, "low": low,
                     "high": high, "participants": len(entry.names), "seeds": len(entry.seeds)})
    return pd.DataFrame(rows, columns=SCORES)


def differences(predictions: pd.DataFrame, kinds: Mapping[str, str], encoders: Sequence[str], draws: int = RESAMPLES,
                seed: int = 0) -> pd.DataFrame:
    """Compare encoders with their rivals (all others of the same mode, and the baselines), paired by participant.

    The bootstrap draws the same participants for both, from those tested by both. Seeds are paired if both have the
    same ones. A one-seed baseline is deterministic and is paired with every seed. Any other side with one
    seed adds no variance between seeds, so the interval is too narrow; `seeds` is then 1. (It is the smaller number of
    the two; against a deterministic baseline, the encoder's.)

    p is two-sided, from Student's t with the bootstrap's standard error, and so is the interval. The share of draws
    beyond 0 would not do: it cannot be below 1 / draws, which is too coarse for Holm's correction. p_holm corrects over
    all rows of an encoder (all tasks, modes, distributions, label fractions and rivals with a p).

    With few seeds a very small p is approximate, as the degrees of freedom are estimated from them. In three million
    simulations of three seeds without a difference, p < .05 / 114 (Holm's first threshold for 114 comparisons) came up
    3 to 4 times too often where seeds added as much variance as participants, 16 to 19 times where they added four
    times as much, and less than half as often as it should where they added none. Where seeds vary much, run more of
    them before relying on a p.

    Args:
        encoders: the encoders to judge, such as the pretrained ones.
        predictions, kinds, draws: see `scores`.

    Returns:
        one row per pair: encoder (in the order given), rival, task, mode, label_fraction, distribution, metric,
        difference (encoder minus rival, in the metric's unit; for an error, below 0 means the encoder is better), low,
        high, p, p_holm, participants, seeds.

    Raises:
        NotFiniteError: a prediction is not finite; the message names the task.
        ValueError: a label or another key is missing.
    """
    entries = _entries(predictions, kinds)
    pairs = [(entry, rival, _common([entry.names, rival.names]))
             for encoder in encoders for entry in entries.values() if entry.key[0] == encoder
             for rival in entries.values() if _are_rivals(entry, rival)]
    drawn = _resampled(((each, names) for *both, names in pairs for each in both), draws, seed)
    rows = [_difference(entry, rival, drawn[entry.key, names], drawn[rival.key, names], len(names))
            for entry, rival, names in pairs]
    table = pd.DataFrame(rows, columns=DIFFERENCES)
    for _, places in table.groupby("encoder").groups.items():
        table.loc[places, "p_holm"] = holm(table.loc[places, "p"].to_numpy(float))
    return table


def holm(p: np.ndarray) -> np.ndarray:
    """Apply Holm's step-down correction to p values (Holm 1979); nan does not count and stays nan."""
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


@dataclass(frozen=True)
class _Test:
    """Predictions of one model, or of one seed's folds in cross-validation: one row per participant and label."""

    participants: np.ndarray  # (rows,)
    true: np.ndarray  # (rows,)
    predicted: np.ndarray  # (rows,) or (rows, classes)
    weight: np.ndarray  # (rows,)
    folds: np.ndarray | None  # (rows,) the AUC compares pairs within these


@dataclass(frozen=True)
class _Entry:
    key: Key
    kind: str
    seeds: dict[int, list[_Test]]  # by seed: one test; on another test set, one for each fold's model

    @cached_property
    def names(self) -> Names:
        """Participants in all tests."""
        return _common(np.unique(test.participants) for tests in self.seeds.values() for test in tests)

    @property
    def fixed(self) -> bool:
        """Whether it is deterministic: a one-seed baseline."""
        return self.key[1] == "baseline" and len(self.seeds) == 1


@dataclass(frozen=True)
class _Resampled:
    """An entry's statistic by seed, on given participants."""

    found: np.ndarray  # (seeds,)
    drawn: np.ndarray  # (seeds, draws)
    enough: bool  # whether there are enough participants for an interval


def _entries(predictions: pd.DataFrame, kinds: Mapping[str, str]) -> dict[Key, _Entry]:
    """Group predictions into entries, sorted by key so that the order of rows does not matter."""
    seeds: dict[Key, dict[int, list[_Test]]] = defaultdict(lambda: defaultdict(list))
    for task, scans in predictions.groupby("task"):
        try:
            joined = join_scans(scans, [*ENTRY, "seed", "fold"])
        except ValueError as error:
            raise type(error)(f"{task}: {error}") from error
        within = joined["distribution"] == "in_distribution"
        # cross-validation tests a participant in one fold; if in several, they share the weight
        shares = joined[within].groupby([*ENTRY, "seed", "participant"])["true"].transform("size")
        joined.loc[within, "weight"] = 1 / shares
        joined["test"] = np.where(within, 0, joined["fold"])
        names = [*ENTRY, "seed", "test"]
        for key, rows in joined.groupby(names, sort=True):
            folds = rows["fold"].to_numpy() if key[4] == "in_distribution" else None
            test = _Test(rows["participant"].to_numpy(), rows["true"].to_numpy(), predicted_of(rows),
                         rows["weight"].to_numpy(), folds)
            seeds[key[:5]][key[5]].append(test)
    return {key: _Entry(key, kinds[key[2]], dict(seeds[key])) for key in sorted(seeds)}


def _common(groups: Iterable[Iterable[str]]) -> Names:
    return tuple(sorted(set.intersection(*map(set, groups))))


def _are_rivals(entry: _Entry, rival: _Entry) -> bool:
    same_test = entry.key[2:] == rival.key[2:]
    return same_test and entry.key != rival.key and rival.key[1] in (entry.key[1], "baseline")


def _resampled(wanted: Iterable[tuple[_Entry, Names]], draws: int, seed: int) -> dict[tuple[Key, Names], _Resampled]:
    """Each entry's statistic on its participants and on bootstrap draws; equal sets of participants share draws."""
    by_names: dict[Names, dict[Key, _Entry]] = defaultdict(dict)
    for entry, names in wanted:
        by_names[names][entry.key] = entry
    found = {}
    for names, entries in by_names.items():
        chosen = {(key, trained): [_on(test, names) for test in tests]  # trained: the seed of training
                  for key, entry in entries.items() for trained, tests in entry.seeds.items()}
        enough = {key: bool(names) and all(
            fewest(test.true, test.predicted, test.participants, entry.kind, test.folds) >= LEAST_PARTICIPANTS
            for trained in entry.seeds for test in chosen[key, trained]) for key, entry in entries.items()}

        def statistics_on(drawn: np.ndarray, chosen=chosen, entries=entries) -> dict[tuple[Key, int], np.ndarray]:
            return {(key, trained): np.mean([
                statistic(test.true, test.predicted, drawn[:, test.participants] * test.weight, entries[key].kind,
                          test.folds) for test in tests], axis=0) for (key, trained), tests in chosen.items()}

        whole = statistics_on(np.ones((1, len(names)))) if names else {each: np.full(1, np.nan) for each in chosen}
        parts = [statistics_on(drawn) for drawn in bootstrap(len(names), draws, seed)] if any(enough.values()) else []
        for key, entry in entries.items():
            seeds = [(key, trained) for trained in entry.seeds]
            drawn = [np.concatenate([part[each] for part in parts] or [np.empty(0)]) for each in seeds]
            found[key, names] = _Resampled(np.concatenate([whole[each] for each in seeds]), np.stack(drawn),
                                           enough[key])
    return found


def _on(test: _Test, names: Names) -> _Test:
    """Select some participants' rows, with names replaced by positions in `names`."""
    places = pd.Index(names).get_indexer(test.participants) if names else np.full(len(test.participants), -1)
    keep = places >= 0
    return _Test(places[keep], test.true[keep], test.predicted[keep], test.weight[keep],
                 None if test.folds is None else test.folds[keep])


def _difference(entry: _Entry, rival: _Entry, ours: _Resampled, theirs: _Resampled, participants: int) -> dict:
    value, low, high, p = ours.found.mean() - theirs.found.mean(), np.nan, np.nan, np.nan
    if ours.enough and theirs.enough:
        if rival.fixed or entry.seeds.keys() == rival.seeds.keys():
            sides = [(ours.found - theirs.found, ours.drawn - theirs.drawn)]
        else:
            sides = [(each.found, each.drawn) for each in (ours, theirs)]
        sides = [side for side in sides if len(side[0]) > 1]
        size, freedom = variance(ours.drawn.mean(0) - theirs.drawn.mean(0), participants, sides)
        low, high = interval(value, size, freedom)
        most = 1.0 if METRICS[entry.kind] == "auc" else np.inf  # with few seeds intervals can exceed the possible range
        low, high = max(low, -most), min(high, most)
        p = np.nan if np.isnan(low) else 2 * student.sf(abs(value) / np.sqrt(size), freedom)
    seeds = len(entry.seeds) if rival.fixed else min(len(entry.seeds), len(rival.seeds))
    encoder, mode, task, fraction, distribution = entry.key
    return {"encoder": encoder, "rival": rival.key[0], "task": task, "mode": mode, "label_fraction": fraction,
            "distribution": distribution, "metric": METRICS[entry.kind], "difference": value, "low": low, "high": high,
            "p": p, "p_holm": np.nan, "participants": participants, "seeds": seeds}
