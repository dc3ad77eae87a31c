"""5_benchmark: encoders, rivals and encoder-free baselines on several tasks, and the tables that compare them.

The cells of the table are computed in `kit.evaluate.benchmark_cells`; everything here is made from their predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

import kit
from kit.cohort.tabular import spelled
from kit.errors import KitError
from kit.evaluate.benchmark_cells import UNTRAINED, Bench, Cell, fill_cells, is_random
from kit.evaluate.compare import differences, scores
from kit.evaluate.metrics import (
    FLAT,
    METRICS,
    further_metrics,
    join_scans,
    matched,
    predicted_columns,
    predicted_of,
    score,
)
from kit.evaluate.reliability import ReliabilityError, reliability_of
from kit.params import Benchmark
from kit.provenance import fingerprint
from kit.runs import MADE_FROM, Run, shown, write_json, write_table

ROW = ["encoder", "mode", "task", "label_fraction"]


class BenchmarkError(KitError, RuntimeError):
    """There is nothing to make tables from; the message says which cells are awaited."""


class Results(NamedTuple):
    """The tables; see `run_benchmark`."""

    predictions: pd.DataFrame
    tidy: pd.DataFrame
    scores: pd.DataFrame
    differences: pd.DataFrame
    subgroups: pd.DataFrame
    missing: list[Cell]  # not finished yet by other shards


def run_benchmark(params: Benchmark, run: Run) -> Results:
    """Compute this shard's cells, then make all tables from the cells that exist.

    Written to the run's folder:
        tidy.csv: one score per row: encoder, mode, task, label_fraction, seed, metric, distribution, value, low, high,
            participants (tested), train_participants (mean over folds), converged (first seed: longer
            training gains no more than the gain's standard error, in the mean over folds), fingerprint.
        scores.csv: scores over seeds; see `kit.evaluate.compare.scores`. And converged; models (folds times seeds);
            flat: how many of these predict nearly one number, with a spread below `FLAT` of the labels' (both in
            distribution; empty for classes). `correct_bias` stretches predictions, and hides it.
        differences.csv: pretrained encoders minus their rivals; see `kit.evaluate.compare.differences`.
        further.csv: other metrics, a column each (empty for the other kind of task), and a row per encoder, mode, task,
            label_fraction, seed and distribution; see `kit.evaluate.metrics.further_metrics`.
        subgroups.csv: scores within age bands (`age_bands`; a band ends below its upper edge, the last one at it) and
            among cases and controls matched by age and sex (`match_age_sex`). The column `subgroup` names the subgroup;
            the others are those of tidy.csv up to `participants`.
        overlap.csv: what each test set shares with the training data; see `kit.evaluate.tasks.overlap`.
        made_from.json: what the models were made from, by fingerprint.

    Raises:
        MisfitError, LabelError, EncoderError, IdentityError, LeakageError, SplitError, TableError: before any
            training; each says what does not fit.
        RunError: another process fills this table with other parameters or inputs.
        DeviceError: torch does not see the GPUs of this Slurm job.
        TrainingError: the training of some cells diverged. It names each with its reason, once all other cells are
            done; no tables are made.
        BenchmarkError: no cell has predictions yet.
        Stopped: the run was asked to stop; the same parameters resume it.
    """
    bench = fill_cells(params, run)
    write_table(run / "overlap.csv", bench.overlap())
    return _tables(bench, run)


def _tables(bench: Bench, run: Run) -> Results:
    missing = [cell for cell in bench.cells if not bench.is_done(cell)]
    predictions = pd.concat([bench.table_of(cell) for cell in bench.cells], ignore_index=True)
    if predictions.empty:
        params, cells = bench.params, bench.cells
        raise BenchmarkError(f"{shown(run.folder)}: no cell has predictions yet ({len(cells) - len(missing)} of "
                             f"{len(cells)} cells are done, and shard {params.shard} of {params.shards} computes "
                             f"{len(cells[params.shard::params.shards])}): run it again when other shards are done, "
                             f"and set shards to at most {len(cells)}")
    kinds = {name: task.labels.kind for (name, _), task in bench.tasks.items()}
    folds = predictions.drop_duplicates([*ROW, "fold"]).groupby(ROW, sort=False)
    about = folds["train_participants"].mean().reset_index()
    about["converged"] = [_converged(each["gain"], each["gain_error"]) for _, each in folds]
    about[["models", "flat"]] = [_flat(rows) if kinds[row[2]] == "regression" else (np.nan, np.nan)
                                 for row, rows in predictions.groupby(ROW, sort=False)]
    seeds = [scores(rows, kinds).assign(seed=seed) for seed, rows in predictions.groupby("seed")]
    prints = predictions.groupby(ROW, sort=False)["fingerprint"].agg(lambda each: fingerprint(
        {"models": sorted(set(each))}) if each.nunique() > 1 else each.iloc[0]).reset_index()
    order = {tuple(row): place for place, row in enumerate(about[ROW].to_numpy().tolist())}

    def finished(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        table = table.merge(about, on=ROW).merge(prints, on=ROW)
        places = [order[row] for row in table[ROW].itertuples(index=False, name=None)]
        return table.iloc[np.argsort(places, kind="stable")][columns].reset_index(drop=True)

    tidy = finished(pd.concat(seeds, ignore_index=True), [
        *ROW, "seed", "metric", "distribution", "value", "low", "high", "participants", "train_participants",
        "converged", "fingerprint"])
    over_seeds = finished(scores(predictions, kinds), [
        *ROW, "metric", "distribution", "value", "low", "high", "participants", "seeds", "converged", "models",
        "flat", "fingerprint"])
    pretrained = [name for name, spec in bench.params.encoders.items() if not is_random(spec)]
    compared = differences(predictions, kinds, pretrained)
    subgroups = _subgroups(predictions, kinds, bench.params)
    for name, table in {"tidy": tidy, "scores": over_seeds, "differences": compared,
                        "further": _further(predictions, kinds), "subgroups": subgroups}.items():
        write_table(run / f"{name}.csv", table)
    records = {made.fingerprint: made.record for made in bench.made.values()}
    write_json(run / MADE_FROM, {"kit": kit.__version__, "fingerprint": fingerprint({"models": sorted(records)}),
                                 "models": records})
    return Results(predictions, tidy, over_seeds, compared, subgroups, missing)


def _further(predictions: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    rows = []
    for key, scans in predictions.groupby([*ROW, "seed", "distribution"], sort=False):
        joined = join_scans(scans, ["distribution"])
        found = further_metrics(joined["true"].to_numpy(), predicted_of(joined), joined["weight"].to_numpy(),
                                kinds[key[2]])
        rows.append({**dict(zip([*ROW, "seed", "distribution"], key, strict=True)), **found})
    return pd.DataFrame(rows)


def _subgroups(predictions: pd.DataFrame, kinds: Mapping[str, str], params: Benchmark) -> pd.DataFrame:
    """Scores among people of similar age, or matched by age and sex."""
    keys, rows = [*ROW, "seed", "distribution"], []
    asked = params.age_bands or params.match_age_sex
    for key, scans in predictions.groupby(keys, sort=False) if asked else ():
        task, kind = key[2], kinds[key[2]]
        for subgroup, inside in _alike(scans, task, kind, params):
            folds = inside["fold"].to_numpy()
            found = score(inside["true"].to_numpy(), predicted_of(inside), kind, inside["participant"].to_numpy(),
                          folds=folds if len(set(folds)) > 1 else None)
            rows.append({**dict(zip(keys, key, strict=True)), "subgroup": subgroup, "metric": METRICS[kind], **found})
    return pd.DataFrame(rows, columns=[*keys, "subgroup", "metric", "value", "low", "high", "participants"])


def _alike(scans: pd.DataFrame, task: str, kind: str, params: Benchmark) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each subgroup's name and its scans."""
    for lower, upper in pairwise(params.age_bands):
        inclusive = "both" if upper == params.age_bands[-1] else "left"  # 90 often means 90 and older
        inside = scans[scans["age"].between(lower, upper, inclusive)]
        if len(inside):
            yield f"age {lower:g} to {upper:g}", inside
    classes = sorted(set(scans["true"]))
    asked = params.match_age_sex and task.casefold() not in ("sex", "gender")
    two = kind == "classification" and len(classes) == 2 and predicted_columns(scans) == ["predicted"]
    if asked and two:
        one_class = scans.groupby("participant")["true"].transform("nunique") == 1  # no converters
        people = scans[one_class].drop_duplicates("participant").reset_index(drop=True)
        keep = matched(people["participant"], people["true"] == classes[1], people["age"], people["sex"])
        if keep.any():
            yield "pairs of one sex and age", scans[scans["participant"].isin(people["participant"][keep])]


def _flat(rows: pd.DataFrame) -> tuple[int, int]:
    """Count the models (a fold and seed each) that predicted these, and those whose predictions hardly differ."""
    inside = rows[rows["distribution"] == "in_distribution"]
    spread = inside.groupby(["seed", "fold"])[["predicted", "true"]].std(ddof=0)
    return len(spread), int((spread["predicted"] < FLAT * spread["true"]).sum())


def _converged(gains: pd.Series, errors: pd.Series) -> bool | None:
    """Whether the gain from longer training, in the mean over folds, is at most its standard error.

    None if a fold has none, unless the others show a gain. Folds count as independent, though they share people: the
    error is too small, so that False comes more often by chance than `kit.evaluate.tune.Tuned` says.
    """
    known = (gains.notna() & errors.notna()).to_numpy()
    if known.any() and gains[known].mean() > math.sqrt(np.square(errors[known]).sum()) / known.sum():
        return False
    return True if known.all() else None


def reliabilities(params: Benchmark, run: Run) -> pd.DataFrame:
    """Measure repeat-scan reliability of each pretrained encoder and the untrained one; writes `reliability.csv`.

    Each row leaves out the participants whom its encoder saw in pretraining; the untrained encoder saw nobody. Compare
    `found_again` only between rows of equal `participants`: among fewer scans the right one is found more easily.

    Returns:
        one row per encoder (first fold and seed); see `kit.evaluate.reliability.reliability`. An encoder for which too
        few participants have several scans has none, and the reason is printed.
    """
    bench, seed, rows = Bench(params), params.seeds[0], []
    index = bench.stores["prepared"].index
    site = spelled(index, "site")
    by = "site" if site and index[site].notna().any() else "session"
    names = [name for name in bench.specs if name == UNTRAINED or not is_random(bench.specs[name])]
    for name in names:
        network, record = bench.encoder(name, 0, seed)
        try:
            rows.append(reliability_of(network, bench.stores["prepared"], name, record=record, by=by,
                                       accept_flags=params.accept_flags, aliases=bench.aliases, seed=seed,
                                       allow_seen=params.allow_seen_participants))
        except ReliabilityError as error:
            print(f"{name}: no reliability: {error}")
    if not rows:
        (run / "reliability.csv").unlink(missing_ok=True)  # an older one
        return pd.DataFrame()
    table = pd.concat(rows, ignore_index=True)
    write_table(run / "reliability.csv", table)
    return table
