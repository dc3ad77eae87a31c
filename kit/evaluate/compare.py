"""Encoders against their rivals: scores over seeds and paired differences, from the table of predictions.

The table has a row a scan: encoder, mode, task, label_fraction, seed, fold, distribution, scan, participant, true and
predicted (log-odds of class 1, or the number; with more classes predicted_0 …, logits).

A cell is an encoder in one mode, on one task, with one share of the labels, on one distribution. Its statistic is the
mean of the metric over seeds. In distribution each participant is tested by one fold's model, and an AUC compares
within folds; elsewhere all folds' models test everybody, and the metric is their mean as well.

An interval covers other participants and other seeds, but the folds as they are: that training sets of a
cross-validation overlap is in none of it (Bengio & Grandvalet 2004 show that it cannot be, without bias).
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

CELL = ["encoder", "mode", "task", "label_fraction", "distribution"]
SCORES = ["encoder", "mode", "task", "label_fraction", "metric", "distribution", "value", "low", "high",
          "participants", "seeds"]
DIFFERENCES = ["encoder", "rival", "task", "mode", "label_fraction", "distribution", "metric", "difference", "low",
               "high", "p", "p_holm", "participants", "seeds"]

Key = tuple[str, str, str, float, str]  # the values of CELL
Names = tuple[str, ...]  # of participants, in order


def scores(predictions: pd.DataFrame, kinds: Mapping[str, str], draws: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Each cell's metric with its 95 % interval over participants and seeds.

    With one seed (column `seeds`) the interval covers participants alone. There is none (nan) with too few
    participants; see `kit.evaluate.metrics.score`, and `variance` and `interval` there for how it is made. In
    simulations with 60 of each class it holds the truth in 94 to 96 of 100 cases where seeds spread as much as
    participants do, with three seeds; with two in 94; where seeds spread half as much again as participants, in 93
    and 89: two seeds are too few to say how far seeds go.

    Args:
        predictions: see the module; rows in any order.
        kinds: task -> "classification" or "regression".
        draws: number of bootstrap draws.

    Returns:
        a row a cell, sorted: encoder, mode, task, label_fraction, metric, distribution, value, low, high,
        participants (whom every seed's model tested), seeds.

    Raises:
        ValueError: a prediction is not finite.
    """
    cells = _cells(predictions, kinds)
    drawn = _resampled(((cell, cell.names) for cell in cells.values()), draws, seed)
    rows = []
    for key, cell in cells.items():
        on, metric = drawn[key, cell.names], METRICS[cell.kind]
        low, high = np.nan, np.nan
        if on.enough:
            sides = [(on.found, on.drawn)] if len(cell.seeds) > 1 else []
            low, high = interval(on.found.mean(), *variance(on.drawn.mean(0), len(cell.names), sides), metric)
        rows.append({**dict(zip(CELL, key, strict=True)), "metric": metric, "value": on.found.mean(), "low": low,
                     "high": high, "participants": len(cell.names), "seeds": len(cell.seeds)})
    return pd.DataFrame(rows, columns=SCORES)


def differences(predictions: pd.DataFrame, kinds: Mapping[str, str], encoders: Sequence[str], draws: int = RESAMPLES,
                seed: int = 0) -> pd.DataFrame:
    """Each of some encoders against its rivals: all others of its mode, and the baselines; paired by participant.

    The same participants are drawn for both, of those that both tested, and seeds are paired where both have the
    same. A baseline of one seed has nothing random in it and counts for all seeds. Any other side of one seed leaves
    its spread out of the interval: `seeds`, the smaller number of the two, says so.

    p is two-sided by Student's t with the bootstrap's standard error, and the interval is of the same: the share of
    draws beyond 0 cannot fall below 1 / draws, and after Holm's correction nothing would be left. p_holm corrects for
    all rows of an encoder (all tasks, modes, distributions, label fractions and rivals that have a p): the chance
    that any of them is called a difference at .05, and is none, is at most 5 %.

    Args:
        encoders: whose worth is asked, such as the pretrained ones.
        predictions, kinds, draws: see `scores`.

    Returns:
        a row a pair: encoder (in the order given), rival, task, mode, label_fraction, distribution, metric,
        difference (encoder minus rival, in the metric's unit: of an error, below 0 the encoder is better), low, high,
        p, p_holm, participants, seeds.

    Raises:
        ValueError: a prediction is not finite.
    """
    cells = _cells(predictions, kinds)
    pairs = [(cell, rival, _common([cell.names, rival.names]))
             for encoder in encoders for cell in cells.values() if cell.key[0] == encoder
             for rival in cells.values() if _are_rivals(cell, rival)]
    drawn = _resampled(((each, names) for *both, names in pairs for each in both), draws, seed)
    rows = [_difference(cell, rival, drawn[cell.key, names], drawn[rival.key, names], len(names))
            for cell, rival, names in pairs]
    table = pd.DataFrame(rows, columns=DIFFERENCES)
    for _, places in table.groupby("encoder").groups.items():
        table.loc[places, "p_holm"] = holm(table.loc[places, "p"].to_numpy(float))
    return table


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p values for their number; nan is none of them and stays (Holm 1979)."""
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


@dataclass(frozen=True)
class _Test:
    """One model's, or in cross-validation one seed's, predictions: a row a participant and label."""

    participants: np.ndarray  # (rows,)
    true: np.ndarray  # (rows,)
    predicted: np.ndarray  # (rows,) or (rows, classes)
    weight: np.ndarray  # (rows,)
    folds: np.ndarray | None  # (rows,) within which an AUC compares


@dataclass(frozen=True)
class _Cell:
    key: Key
    kind: str
    seeds: dict[int, list[_Test]]  # several tests: of each fold's model

    @cached_property
    def names(self) -> Names:
        """Of the participants whom all tests hold."""
        return _common(np.unique(test.participants) for tests in self.seeds.values() for test in tests)

    @property
    def fixed(self) -> bool:
        """Whether it has nothing random in it."""
        return self.key[1] == "baseline" and len(self.seeds) == 1


@dataclass(frozen=True)
class _Resampled:
    """A cell's statistic by seed on some participants."""

    found: np.ndarray  # (seeds,)
    drawn: np.ndarray  # (seeds, draws)
    enough: bool  # participants for an interval


def _cells(predictions: pd.DataFrame, kinds: Mapping[str, str]) -> dict[Key, _Cell]:
    """Sorted by key: whatever the order of rows, the same."""
    seeds: dict[Key, dict[int, list[_Test]]] = defaultdict(lambda: defaultdict(list))
    for task, scans in predictions.groupby("task"):
        try:
            joined = join_scans(scans, [*CELL, "seed", "fold"])
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
        within = joined["distribution"] == "in_distribution"
        # cross-validation tests a participant in one fold; should it be several, they share
        shares = joined[within].groupby([*CELL, "seed", "participant"])["true"].transform("size")
        joined.loc[within, "weight"] = 1 / shares
        joined["test"] = np.where(within, 0, joined["fold"])
        names = [*CELL, "seed", "test"]
        for key, rows in joined.groupby(names, sort=True):
            folds = rows["fold"].to_numpy() if key[4] == "in_distribution" else None
            test = _Test(rows["participant"].to_numpy(), rows["true"].to_numpy(), predicted_of(rows),
                         rows["weight"].to_numpy(), folds)
            seeds[key[:5]][key[5]].append(test)
    return {key: _Cell(key, kinds[key[2]], dict(seeds[key])) for key in sorted(seeds)}


def _common(groups: Iterable[Sequence[str]]) -> Names:
    return tuple(sorted(set.intersection(*map(set, groups))))


def _are_rivals(cell: _Cell, rival: _Cell) -> bool:
    same_test = cell.key[2:] == rival.key[2:]
    return same_test and cell.key != rival.key and rival.key[1] in (cell.key[1], "baseline")


def _resampled(wanted: Iterable[tuple[_Cell, Names]], draws: int, seed: int) -> dict[tuple[Key, Names], _Resampled]:
    """Each cell's statistic on its participants and on draws of them; those of the same participants drawn together."""
    by_names: dict[Names, dict[Key, _Cell]] = defaultdict(dict)
    for cell, names in wanted:
        by_names[names][cell.key] = cell
    found = {}
    for names, cells in by_names.items():
        chosen = {(key, replicate): [_on(test, names) for test in tests]
                  for key, cell in cells.items() for replicate, tests in cell.seeds.items()}
        enough = {key: bool(names) and all(
            fewest(test.true, test.predicted, test.participants, cell.kind) >= LEAST_PARTICIPANTS
            for replicate in cell.seeds for test in chosen[key, replicate]) for key, cell in cells.items()}

        def on(drawn: np.ndarray, chosen=chosen, cells=cells) -> dict[tuple[Key, int], np.ndarray]:
            return {model: np.mean([statistic(test.true, test.predicted, drawn[:, test.participants] * test.weight,
                                              cells[model[0]].kind, test.folds) for test in tests], axis=0)
                    for model, tests in chosen.items()}

        whole = on(np.ones((1, len(names)))) if names else {model: np.full(1, np.nan) for model in chosen}
        parts = [on(drawn) for drawn in bootstrap(len(names), draws, seed)] if any(enough.values()) else []
        for key, cell in cells.items():
            models = [(key, replicate) for replicate in cell.seeds]
            drawn = [np.concatenate([part[model] for part in parts] or [np.empty(0)]) for model in models]
            found[key, names] = _Resampled(np.concatenate([whole[model] for model in models]), np.stack(drawn),
                                           enough[key])
    return found


def _on(test: _Test, names: Names) -> _Test:
    """The rows of some participants, whose places among them stand for their names."""
    places = pd.Index(names).get_indexer(test.participants) if names else np.full(len(test.participants), -1)
    keep = places >= 0
    return _Test(places[keep], test.true[keep], test.predicted[keep], test.weight[keep],
                 None if test.folds is None else test.folds[keep])


def _difference(cell: _Cell, rival: _Cell, ours: _Resampled, theirs: _Resampled, participants: int) -> dict:
    value, low, high, p = ours.found.mean() - theirs.found.mean(), np.nan, np.nan, np.nan
    if ours.enough and theirs.enough:
        if rival.fixed or cell.seeds.keys() == rival.seeds.keys():
            sides = [(ours.found - theirs.found, ours.drawn - theirs.drawn)]
        else:
            sides = [(each.found, each.drawn) for each in (ours, theirs)]
        sides = [side for side in sides if len(side[0]) > 1]
        size, freedom = variance(ours.drawn.mean(0) - theirs.drawn.mean(0), participants, sides)
        low, high = interval(value, size, freedom)
        most = 1.0 if METRICS[cell.kind] == "auc" else np.inf  # few seeds make intervals wider than a difference can be
        low, high = max(low, -most), min(high, most)
        p = np.nan if np.isnan(low) else 2 * student.sf(abs(value) / np.sqrt(size), freedom)
    seeds = len(cell.seeds) if rival.fixed else min(len(cell.seeds), len(rival.seeds))
    encoder, mode, task, fraction, distribution = cell.key
    return {"encoder": encoder, "rival": rival.key[0], "task": task, "mode": mode, "label_fraction": fraction,
            "distribution": distribution, "metric": METRICS[cell.kind], "difference": value, "low": low, "high": high,
            "p": p, "p_holm": np.nan, "participants": participants, "seeds": seeds}
