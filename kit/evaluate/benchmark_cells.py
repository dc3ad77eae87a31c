"""The cells of 5_benchmark: their inputs, and how one process or many compute them.

A cell is one row of the table (an encoder in one mode, on one task, with one label fraction) on one fold. Its folder,
`cells/TASK/ENCODER/…`, holds each seed's predictions, and all tables are made from these (`kit.evaluate.benchmark`). A
finished cell with the same inputs and settings is not computed again, so a killed run resumes and the jobs of a Slurm
array share the cells; each job embeds all scans that any task uses, with the encoders of its own cells. Each cell has
one writer at a time, which holds its lock. Processes that fill one table at the same time must have the same
parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from kit.cohort.identity import read_aliases
from kit.cohort.tabular import read_table
from kit.device import check_gpu
from kit.evaluate.baselines import DEMOGRAPHICS, baseline_predictions, words_of
from kit.evaluate.finetune import model_inputs, open_stores, sides_of
from kit.evaluate.measured import key_in_file, measured, measured_file
from kit.evaluate.metrics import (
    bias_corrected,
)
from kit.evaluate.predict import predict, predict_tested, prediction_columns
from kit.evaluate.probe import probe_tested
from kit.evaluate.tasks import CORRECTION, Task, check_tested, covariates, overlap, tasks_of
from kit.evaluate.tune import Choice, gain, rules, stoppable, tune
from kit.evaluate.volumes import looked_up, read_volumes
from kit.machine import Lock
from kit.models.encoder import Encoder
from kit.models.encoder_file import encoder_at, load_encoder, noted, read_record, side_of, weights_digest
from kit.params import Benchmark
from kit.provenance import MadeFrom, changes, check_fit, read_made_from, write
from kit.runs import Run, RunError, other_parameters, progress, shown, write_json, write_table
from kit.store.dataset import PreparedScans
from kit.store.store import Store
from kit.train.loop import TrainingError
from kit.train.stop import NAME as STOP
from kit.train.stop import UNFINISHED, Stopped

UNTRAINED = "random init"  # probes on an untrained encoder
TEXT = ("scan", "participant", "distribution", "sex", "fingerprint")  # columns of a cell's table always read as text
# settings, besides the inputs, that determine a fine-tuned model
TUNING = ("steps", "check_steps", "patience", "warmup_steps", "learning_rates", "weight_decays", "layer_decay", "ema",
          "schedule", "optimizer", "batch_size", "accumulate", "chunk", "flip", "standardise", "select_by", "clip",
          "precision", "check_converged")
# Versions of baselines' rules; a cell made by an older one is computed again. demographics 3: neither words for missing
# values nor spelling hide an age, or that a column repeats the label; XX and XY are two sexes. site 2: scans without a
# site have their dataset's. volumes 3: a few bright voxels take no Gaussian of their own.
READING = {"demographics": 3, "site": 2, "volumes": 3}
LOCK_PAUSE = 2.0  # seconds for another shard that holds the lock to remove a stale cell and record its new inputs
RESULTS = ("metrics.json", "tidy.csv", "scores.csv", "differences.csv", "further.csv", "subgroups.csv", "table.*",
           "summary.txt")


class _Busy(Exception):
    """Another process computes this cell."""


class Cell(NamedTuple):
    """One row of the table on one fold, with all its seeds."""

    encoder: str
    mode: str  # probe, finetune, baseline
    task: str
    label_fraction: float
    fold: int

    @property
    def folder(self) -> Path:
        """Path within the run's folder, unique to this cell."""
        names = (quote(name, safe=" ") for name in (self.task, self.encoder))
        return Path("cells", *names, f"{self.mode} {100 * self.label_fraction:g}% fold {self.fold}")


def fill_cells(params: Benchmark, run: Run, bar: Mapping[str, Any] | None = None) -> Bench:
    """Compute this shard's cells, and no tables; return what they were computed from.

    Cells that another process computes at this moment are left to it.

    Args:
        bar: options of tqdm for the progress bar.

    Raises:
        Stopped: also between two cells; `unfinished.csv` then lists the cells that are not done.
        see `run_benchmark` for the others.
    """
    check_gpu()  # now: baselines need none and come first, so a missing GPU would be noticed only hours later
    bench = Bench(params)  # refuses inputs that do not fit: the run has not begun until then
    check_parameters(params, run)
    remove_stale_cells(bench)
    mine = bench.cells[params.shard::params.shards]
    todo = [cell for cell in mine if not bench.is_done(cell)]
    failed, busy = [], []
    with stoppable(run.folder):
        for cell in progress(todo, **{"desc": "cells", **(bar or {})}):
            if (run / STOP).exists():
                left = pd.DataFrame([each for each in todo if not bench.is_done(each)])
                write_table(run / UNFINISHED, left)
                raise Stopped(left)
            try:
                bench.fill(cell, run.folder)
            except TrainingError as error:
                print(f"not trained: {error}", flush=True)  # at once, as a stop would lose it
                failed.append(f"\n  {error}")
            except _Busy:
                busy.append(cell)
    if busy := [cell for cell in busy if not bench.is_done(cell)]:
        print(f"{len(busy)} of {len(mine)} cells are left to other processes, which compute them now; when they have "
              "ended, start this again: it fills what they did not finish")
    if failed:
        raise TrainingError(f"{shown(run.folder)}: {len(failed)} of {len(mine)} cells could not be trained; all others "
                            f"are done. Tables are made once these are, too:{''.join(failed)}")
    return bench


def cells_of(params: Benchmark, folds: Mapping[str, Iterable[int]]) -> list[Cell]:
    """List all cells, cheapest first.

    Args:
        folds: fold numbers by task.
    """
    pretrained = [name for name, spec in params.encoders.items() if not is_random(spec)]
    baselines = [(name, "probe" if name == UNTRAINED else "baseline") for name in params.baselines]
    probes = [(name, "probe") for name in pretrained]
    cells = [Cell(name, mode, task, fraction, fold) for name, mode in [*baselines, *probes] for task in params.tasks
             for fraction in params.label_fractions for fold in folds[task]]
    return cells + [Cell(name, "finetune", task, fraction, fold) for name in params.encoders
                    for task in params.finetune_tasks for fraction in params.finetune_fractions
                    for fold in folds[task]]


def is_random(spec: str) -> bool:
    """Whether an encoder starts from random weights; fine-tuned, such an encoder is a supervised baseline."""
    return spec.partition(":")[0] == "random"


class Bench:
    """The cells' inputs: stores, tasks by name and fold, encoders by name, fold and seed."""

    def __init__(self, params: Benchmark) -> None:
        self.params, self.aliases, self.stores = params, read_aliases(params.aliases), open_stores(params)
        if params.volumes is not None:
            read_volumes(params.volumes)  # so that a table that cannot be used is refused before work
        self.tasks = {(name, task.fold): task for name in params.tasks for task in tasks_of(
            params, self.stores, name, params.task_types.get(name, "auto"), params.missing_codes.get(name, ()),
            self.aliases)}
        if params.volumes is not None and "volumes" in params.baselines:
            rows = pd.concat([part.rows for task in self.tasks.values() for part in task.parts.values()])
            looked_up(read_volumes(params.volumes), rows)  # refuses now a table whose row fits several people or scans
        self.cells = cells_of(params, {name: [fold for task, fold in self.tasks if task == name]
                                       for name in params.tasks})
        self.allowed = check_fit(self._sides(), params.allow_differences)
        self._noted: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}  # provenance and record, by encoder
        self._features: dict[tuple[str, Path], dict[str, np.ndarray]] = {}  # of one encoder, by weights and store
        self._memo: dict[Path, str] = {}  # checksums of scans, by file
        self._said: set[str] = set()  # lines already printed
        self._check_leakage()

    @cached_property
    def made(self) -> dict[tuple[str, str, str, int], MadeFrom]:
        """What cells are made from, by encoder, mode, task and fold; lazy, as `reliabilities` does not need it."""
        return {(cell.encoder, cell.mode, cell.task, cell.fold): self._made_from(cell) for cell in self.cells}

    @cached_property
    def specs(self) -> dict[str, str]:
        """Encoders by name; the untrained one is built like the first pretrained encoder, or the first if none is."""
        first = next((spec for spec in self.params.encoders.values() if not is_random(spec)), None)
        untrained = (f"random:{read_record(encoder_at(first, 0, self.params.seeds[0]))['architecture']}" if first
                     else next(iter(self.params.encoders.values())))
        return {**self.params.encoders, UNTRAINED: untrained}

    def seeds_of(self, cell: Cell) -> list[int]:
        """Seeds of a cell: one where nothing is random (probes and baselines on all labels with one fixed encoder)."""
        spec = self.specs.get(cell.encoder, "")
        drawn = cell.mode == "finetune" or cell.label_fraction < 1 or "{seed}" in spec or is_random(spec)
        return self.params.seeds if drawn else self.params.seeds[:1]

    def encoder(self, name: str, fold: int, seed: int) -> tuple[Encoder, dict[str, Any]]:
        """Load an encoder with its record; the seed also determines random weights."""
        return load_encoder(encoder_at(self.specs[name], fold, seed), self.stores["prepared"].record, seed,
                            self.params.allow_differences)

    def folder(self, cell: Cell) -> Path:
        """A cell's folder, in the output folder that all shards share."""
        return self.params.output_dir / cell.folder

    def file(self, cell: Cell, seed: int) -> Path:
        """The file of a seed's predictions."""
        return self.folder(cell) / f"seed{seed}.csv"

    def is_done(self, cell: Cell) -> bool:
        """Whether all seeds have predictions; a baseline that does not apply leaves an empty table."""
        return all(self.file(cell, seed).exists() for seed in self.seeds_of(cell))

    def made_from(self, cell: Cell) -> MadeFrom:
        """Look up what a cell is made from; `_made_from` computes it."""
        return self.made[cell.encoder, cell.mode, cell.task, cell.fold]

    def fill(self, cell: Cell, home: Path) -> None:
        """Compute a cell seed by seed, skipping seeds already on disk; `home` is watched for a stop file.

        Raises:
            _Busy: another process computes it.
            RunError: another process has begun it with other inputs or settings since this one started.
        """
        with self.locked(cell):
            before, now = read_made_from(self.folder(cell)), self.made_from(cell)
            if before and (lines := changes(before, now)):
                raise RunError(_of_another(self.folder(cell), lines))
            self._fill(cell, home)

    @contextmanager
    def locked(self, cell: Cell) -> Iterator[None]:
        """Hold a cell's lock, a file outside its folder, so that it stays when the folder is removed.

        Raises:
            _Busy: another process holds it.
        """
        locks = self.params.output_dir / "cells" / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock.take(locks / quote(cell.folder.as_posix(), safe=" "))
        except BlockingIOError:
            raise _Busy from None
        try:
            yield
        finally:
            del lock  # a traceback may keep this frame

    def _fill(self, cell: Cell, home: Path) -> None:
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, self.made_from(cell)._replace(rows=None))
        for seed in self.seeds_of(cell):
            if self.file(cell, seed).exists():
                continue
            task = self.tasks[cell.task, cell.fold].with_labels_for(cell.label_fraction, seed)
            if corrects := self._corrects(cell):
                task = replace(task, parts={**task.parts, CORRECTION: task.parts["validation"]})
            if cell.mode == "baseline":
                found = baseline_predictions(
                    cell.encoder, task, demographics=self.params.demographics, volumes=self.params.volumes,
                    atlas=self.params.atlas, cache=self.params.output_dir / "measured", say=self._say)
            elif cell.mode == "probe":
                found = probe_tested(task, {part: self._features_of(cell, seed, task, part) for part in task.parts})
            else:
                try:
                    found = self._finetuned(cell, seed, task, folder, home)
                except TrainingError as error:
                    raise TrainingError(f"{_named(cell, seed)}: {error}") from error
            if corrects:
                found = self._corrected(cell, seed, task, found)
            write_table(self.file(cell, seed), _table(task, found or {}))
            shutil.rmtree(folder / f"seed{seed}", ignore_errors=True)  # its training, now that its result is written

    def _say(self, words: str) -> None:
        """Print a line once, however many cells and seeds give the same."""
        if words not in self._said:
            print(words)
        self._said.add(words)

    def _corrects(self, cell: Cell) -> bool:
        """Whether to correct predictions for their pull to the mean: regression only, if the parameters ask for it."""
        kind = self.tasks[cell.task, cell.fold].labels.kind
        return self.params.correct_bias and kind == "regression" and cell.encoder != "guess"

    def _corrected(self, cell: Cell, seed: int, task: Task,
                   found: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Correct test predictions for their pull to the mean, estimated on validation.

        If validation has fewer than three different labels, or its predictions do not rise with the truth, they are
        returned unchanged, with a printed line.
        """
        found = dict(found or {})
        validation = found.pop(CORRECTION, None)
        if validation is not None:
            there = np.isfinite(validation)  # a baseline's scans without its columns are no part of the fit
            part = task.parts[CORRECTION]
            known = part.labels[there], validation[there], part.participants[there]
            try:
                found = {name: bias_corrected(*known, values) for name, values in found.items()}
            except ValueError as error:
                self._say(f"{_named(cell, seed)}: bias not corrected, so that this row may mix corrected and "
                          f"uncorrected predictions: {error}")
        return found

    def _finetuned(self, cell: Cell, seed: int, task: Task, folder: Path, home: Path) -> dict[str, np.ndarray]:
        """Fine-tune; the first seed chooses learning rate and weight decay and checks whether training sufficed."""
        known, place = folder / "choice.json", folder / f"seed{seed}"
        notes = json.loads(known.read_text(encoding="utf-8")) if known.exists() else None
        choice = Choice(notes["learning_rate"], notes["weight_decay"]) if notes else None
        encoder, _ = self.encoder(cell.encoder, cell.fold, seed)
        tuned = tune(task, encoder, self.params, seed, place, choice, home,
                     check=choice is None and self.params.check_converged)
        kept = folder / f"tries_seed{seed}.csv"
        if choice is None or not kept.exists():  # a resumed first seed repeats its chosen try alone
            os.replace(place / "tries.csv", kept)
        if choice is None:
            write_json(known, {**tuned.choice._asdict(), "converged": tuned.converged,
                               "validation": tuned.validation_score, "standard_error": tuned.standard_error,
                               "longer": tuned.longer_score, "longer_steps": tuned.longer_steps,
                               "change_error": tuned.change_error})
        return predict_tested(task, tuned.predictor)

    def _features_of(self, cell: Cell, seed: int, task: Task, part: str) -> np.ndarray:
        """Features of a part's scans, computed once per encoder and store and kept in `embeddings/`."""
        store = task.parts[part].store
        known = self._noted_of(cell.encoder, cell.fold, seed)[0]
        if (key := (known["weights"], store.folder)) not in self._features:
            self._features = {each: value for each, value in self._features.items() if each[0] == known["weights"]}
            self._features[key] = self._embedded(cell.encoder, cell.fold, seed, store, known["weights"])
        return np.stack([self._features[key][scan] for scan in task.parts[part].rows["scan"]])

    def _embedded(self, name: str, fold: int, seed: int, store: Store, weights: str) -> dict[str, np.ndarray]:
        """Features of a store's scans that any task uses."""
        used = {scan for task in self.tasks.values() for part in task.parts.values()
                if part.store.folder == store.folder for scan in part.rows["scan"]}
        scans = {key_in_file(store, scan): scan for scan in store.index["scan"] if scan in used}

        def embed(some: list[str]) -> np.ndarray:
            rows = store.index[store.index["scan"].isin(some)]  # in the index's order, as `some` is
            return predict(self.encoder(name, fold, seed)[0], PreparedScans(store, rows))

        drawn = [weights_digest(self.encoder(name, fold, seed)[0])] if is_random(self.specs[name]) else []
        path = measured_file(self.params.output_dir / "embeddings", quote(name, safe=" "), weights, *drawn)
        found = measured(scans, embed, path)
        return {scan: found[key] for key, scan in scans.items()}

    def _noted_of(self, name: str, fold: int, seed: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Provenance of an encoder and its record; the weights are read only once."""
        spec = encoder_at(self.specs[name], fold, seed)
        key = f"{spec} {seed}" if is_random(spec) else spec
        if key not in self._noted:
            network, record = self.encoder(name, fold, seed)
            self._noted[key] = noted(spec, network, record), record
        return self._noted[key]

    def _made_from(self, cell: Cell) -> MadeFrom:
        settings: dict[str, Any]
        if cell.mode == "baseline":
            files = [path for path in (self.params.volumes, self.params.atlas) if path and cell.encoder == "volumes"]
            encoder = {"from": "", "weights": _digest(path.read_bytes() for path in files), "objective": "none"}
            settings = {"columns": self._columns_of(cell)} if cell.encoder in ("demographics", "site") else {}
            if cell.encoder in READING:
                settings["reading"] = READING[cell.encoder]
        else:
            each, records = zip(*(self._noted_of(cell.encoder, cell.fold, seed) for seed in self.seeds_of(cell)),
                                strict=True)
            encoder = {**each[0], "weights": weights_together([one["weights"] for one in each])}
            plain = self.params.plain()
            settings = {name: plain[name] for name in TUNING} | rules(self.params, records[0]["architecture"]) if (
                cell.mode == "finetune") else {}
        settings |= {"correct_bias": True} if self._corrects(cell) else {}
        return model_inputs(self.tasks[cell.task, cell.fold], {**encoder, "name": cell.encoder}, self.aliases,
                            self.allowed, self._memo, settings=settings)

    def _columns_of(self, cell: Cell) -> str:
        """Digest of the columns that a baseline reads; they are in no other record."""
        names = {"site": ("site", "dataset"), "demographics": self.params.demographics or DEMOGRAPHICS}[cell.encoder]
        wanted = [words_of(name) for name in names]  # as the baseline finds them: `Age` is `age` elsewhere
        rows = [part.rows[["scan", *(column for column in part.rows if words_of(column) in wanted)]]
                for part in self.tasks[cell.task, cell.fold].parts.values()]
        return _digest(each.to_csv(index=False).encode() for each in rows)

    def _sides(self) -> dict[str, Any]:
        sides = sides_of(self.stores)
        for cell in self.cells:
            for seed in self.seeds_of(cell) if cell.mode != "baseline" else ():
                spec = encoder_at(self.specs[cell.encoder], cell.fold, seed)
                if f"encoder {spec}" not in sides and (side := side_of(spec).get("encoder")):
                    sides[f"encoder {spec}"] = side
        return sides

    def _check_leakage(self) -> None:
        warnings: dict[str, None] = {}  # an ordered set
        for name in self.specs:
            for (_, fold), task in self.tasks.items():
                for record in {id(each): each for each in (self._noted_of(name, fold, seed)[1]
                                                           for seed in self.params.seeds)}.values():
                    found = check_tested(task, record, self.params.allow_seen_participants, self.aliases)
                    warnings |= dict.fromkeys(f"{name}: {warning}" for warning in found)
        for warning in warnings:
            print(warning)

    def overlap(self) -> pd.DataFrame:
        """One row per task, encoder and test set, more if folds differ; of `{seed}` encoders only the first seed's. See
        `kit.evaluate.tasks.overlap`."""
        seed = self.params.seeds[0]
        tables = [overlap(task, self._noted_of(name, fold, seed)[1]).assign(task=label, encoder=name)
                  for (label, fold), task in self.tasks.items() for name in self.params.encoders]
        table = pd.concat(tables, ignore_index=True)
        return table[["task", "encoder", *table.columns.drop(["task", "encoder"])]].drop_duplicates()

    def table_of(self, cell: Cell) -> pd.DataFrame:
        """Predictions of a cell's finished seeds, one row per scan and seed; none if no seed is finished.

        Added are age and sex, the cell's fields, `gain` and `gain_error` (of longer training; nan if not checked),
        train_participants and fingerprint.
        """
        tables = []
        for seed in self.seeds_of(cell):
            if self.file(cell, seed).exists():
                tables.append(read_table(self.file(cell, seed), text=TEXT).assign(seed=seed))
        choice, task = self.folder(cell) / "choice.json", self.tasks[cell.task, cell.fold]
        notes = json.loads(choice.read_text(encoding="utf-8")) if choice.exists() else {}
        better = error = np.nan
        if "longer_steps" in notes and notes["converged"] is not None:  # without `longer_steps`, an older rule judged
            better, error = gain(task.labels.kind, notes["validation"], notes["longer"]), notes["change_error"]
        people = task.with_labels_for(cell.label_fraction, self.params.seeds[0]).parts["train"].participants.nunique()
        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        if tables:  # age and sex are today's, whatever they were when the cell was computed
            people_of = [covariates(task.parts[name])[["scan", "age", "sex"]].assign(distribution=where)
                         for name, where in task.tested.items()]
            table = table.merge(pd.concat(people_of), on=["distribution", "scan"], how="left", validate="many_to_one")
        return table.assign(**cell._asdict(), gain=better, gain_error=error, train_participants=people,
                            fingerprint=self.made_from(cell).fingerprint)


def check_parameters(params: Benchmark, run: Run) -> None:
    """Refuse to fill a table that another process fills with other parameters at this moment.

    Raises:
        RunError: lists every difference.
    """
    for folder in (params.output_dir, *params.output_dir.glob("shards/*")):
        file, lock = folder / "params.yaml", folder / ".lock"
        if folder == run.folder or not file.exists() or not lock.exists() or not _is_locked(lock):
            continue
        if listed := other_parameters(file, params.plain(), params.may_change, params.defaults(), "it"):
            raise RunError(f"{shown(folder)} fills this table with other parameters now:\n  {listed}\n"
                           "wait until it has ended, or give another output_dir")


def _named(cell: Cell, seed: int) -> str:
    """A cell and seed in words, for messages."""
    return (f"{cell.encoder} on {cell.task}, {cell.mode}, label_fraction {cell.label_fraction:g}, fold {cell.fold}, "
            f"seed {seed}")


def _is_locked(path: Path) -> bool:
    """Whether another process holds a lock."""
    try:
        Lock.take(path)
    except BlockingIOError:
        return True
    return False


def _of_another(folder: Path, lines: Sequence[str]) -> str:
    return (f"{shown(folder)}: another process computes this cell from other inputs or settings:\n  "
            + "\n  ".join(lines) + "\nwait until it has ended, or give another output_dir")


def remove_stale_cells(bench: Bench) -> None:
    """Remove cells made from other inputs or settings, and all shards' tables of them; print what changed.

    Raises:
        RunError: another process computes such a cell now.
    """
    reasons: dict[str, list[str]] = {}
    for cell in bench.cells:
        folder = bench.folder(cell)
        now = bench.made_from(cell)  # takes a while for the first cell
        before = read_made_from(folder)
        if before is None and not any(folder.glob("*.csv")):  # another shard may have begun it just now
            continue
        lines = changes(before, now) if before else ["no record of what it was made from"]
        for line in lines:
            reasons.setdefault(line, []).append(f"{cell.encoder} on {cell.task}")
        if lines:
            try:
                with bench.locked(cell):
                    again = read_made_from(folder)  # another shard may have removed and filled it since
                    if again is None or changes(again, now):
                        shutil.rmtree(folder, ignore_errors=True)
            except _Busy:
                time.sleep(LOCK_PAUSE)  # a shard like this one removes it now
                again = read_made_from(folder)
                if again is not None and (lines := changes(again, now)):
                    raise RunError(_of_another(folder, lines)) from None
    if reasons:
        print("computed again, because the inputs or settings have changed:")
        for line, cells in reasons.items():
            names = [f"{name} ({cells.count(name)} cells)" for name in dict.fromkeys(cells)]
            print(f"  {line}: {', '.join(names)}")
        home = bench.params.output_dir  # all tables are made from all cells, whichever shard made them
        for old in [path for folder in (home, *home.glob("shards/*")) for name in RESULTS
                    for path in folder.glob(name)]:
            old.unlink(missing_ok=True)  # another shard may be doing the same


def _table(task: Task, predictions: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per tested scan: distribution, scan, participant, true, predicted."""
    tables = []
    for name, values in predictions.items():
        part = task.parts[name]
        tables.append(pd.DataFrame({"distribution": task.tested[name], "scan": part.rows["scan"].to_numpy(),
                                    "participant": part.participants.to_numpy(), "true": part.labels,
                                    **prediction_columns(values)}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(
        columns=["distribution", "scan", "participant", "true", "predicted"])


def weights_together(digests: Sequence[str]) -> str:
    """Combine the weight digests of several seeds' encoders: the digest itself if all are equal."""
    return digests[0] if len(set(digests)) == 1 else _digest(each.encode() for each in digests)


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.blake2b(b" ".join(parts), digest_size=8).hexdigest()
