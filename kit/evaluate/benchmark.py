"""5_benchmark: encoders against each other, as probes on cached embeddings and fine-tuned."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from torch import nn

import kit
from kit.cohort.identity import read_aliases
from kit.cohort.tabular import read_table
from kit.evaluate.finetune import model_inputs, open_stores, sides_of
from kit.evaluate.metrics import METRICS
from kit.evaluate.predict import predict, predict_tested
from kit.evaluate.probe import probe_tested
from kit.evaluate.tasks import TESTED, Task, check_tested, read_task, score_tested
from kit.evaluate.tune import tune
from kit.models.encoder_file import load_encoder, noted, side_of, weights_digest
from kit.params import Benchmark
from kit.provenance import OLDER, MadeFrom, changes, check_fit, fingerprint, read_made_from
from kit.runs import MADE_FROM, Run, progress, write_json, write_table, write_whole
from kit.store.dataset import PreparedScans
from kit.store.store import Store

KEYS = ["encoder", "mode", "task", "label_fraction", "seed"]  # one trained model; each is scored on every test set
TEXT = ("encoder", "mode", "task", "metric", "distribution", "fingerprint")
RESULTS = ("metrics.json", "table.csv", "summary.txt")  # that go with rows of other inputs


def run_benchmark(params: Benchmark, run: Run) -> pd.DataFrame:
    """Fill the table, model by model; what `tidy.csv` holds already is not done again, if it is of the same inputs.

    Rows of other inputs go first, with a line that says what changed.

    Returns:
        one score a row: encoder, mode, task, label_fraction, seed, metric, distribution, value, low, high,
        participants (tested), train_participants, fingerprint (of what the model was made from).

    Raises:
        MisfitError, LabelError, EncoderError, IdentityError, LeakageError: before any training; each says what does
            not fit.
    """
    aliases = read_aliases(params.aliases)
    stores = open_stores(params)
    sides = sides_of(stores)
    for name, spec in params.encoders.items():
        sides |= {f"encoder {name}": side for side in side_of(spec).values()}
    allowed = check_fit(sides, params.allow_differences)
    tasks = {name: read_task(stores["prepared"], stores.get("out_of_distribution"), name,
                             params.task_types.get(name, "auto"), params.seed, params.accept_flags,
                             params.missing_codes.get(name, ()), params.rows_are_people, aliases)
             for name in params.tasks}
    encoders = {name: load_encoder(spec, stores["prepared"].record, params.seed, params.allow_differences)
                for name, spec in params.encoders.items()}
    for _, record in encoders.values():
        for task in tasks.values():
            check_tested(task, record, params.allow_seen_participants, aliases)

    memo: dict[Path, str] = {}
    known = {name: {**noted(params.encoders[name], *encoder), "name": name} for name, encoder in encoders.items()}
    made = {(name, task): model_inputs(tasks[task], known[name], aliases, allowed, memo)
            for name in params.encoders for task in params.tasks}
    tidy, order = current(run, made), {model: place for place, model in enumerate(models_of(params))}
    done = set(tidy[KEYS].itertuples(index=False, name=None))
    features: dict[str, dict[str, np.ndarray]] = {}
    for model in progress([model for model in order if model not in done], desc="models"):
        name, mode, task_name, fraction, seed = model
        task = tasks[task_name].with_labels_for(fraction, seed)
        encoder = encoders[name][0]
        if mode == "probe":
            if name not in features:
                features[name] = embeddings(run, name, encoder, stores)
            predictions = probe_tested(task, {part: _looked_up(features[name], task, part) for part in task.parts})
        else:
            predictions = predict_tested(task, tune(task, encoder, params, seed).predictor)
        scores = score_tested(task, predictions, seed)
        rows = pd.DataFrame(_rows(model, task, scores, made[name, task_name].fingerprint))
        tidy = pd.concat([tidy, rows], ignore_index=True) if len(tidy) else rows
        places = [order[each] for each in tidy[KEYS].itertuples(index=False, name=None)]
        tidy = tidy.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)
        write_table(run / "tidy.csv", tidy)
    return tidy


def current(run: Run, made: dict[tuple[str, str], MadeFrom]) -> pd.DataFrame:
    """The rows of `tidy.csv` that are of today's inputs; others are removed, with a line for each thing that changed.

    Leaves `made_from.json`: of each model's inputs the record, by fingerprint.

    Args:
        made: what models are made from, by encoder and task.
    """
    path, before = run / "tidy.csv", read_made_from(run.folder)
    tidy = read_table(path, text=TEXT) if path.exists() else pd.DataFrame(columns=[*KEYS, "fingerprint"])
    then = before.record["models"] if before else {}
    found = tidy.get("fingerprint", pd.Series("", tidy.index))
    wanted = [made[key].fingerprint for key in tidy[["encoder", "task"]].itertuples(index=False, name=None)]
    stale = tidy[(found != wanted).to_numpy()]
    reasons: dict[str, list[str]] = {}
    for (encoder, task, old), rows in stale.groupby([stale["encoder"], stale["task"], found[stale.index]], sort=False):
        lines = changes(MadeFrom(then[old]), made[encoder, task]) if old in then else [f"it is {OLDER}"]
        for line in lines:
            reasons.setdefault(line, []).append(f"{encoder} on {task} ({len(rows)} rows)")
    if reasons:
        print("computed anew, for what was there is of other inputs:")
        for line, models in reasons.items():
            print(f"  {line}: {', '.join(models)}")
        tidy = tidy.drop(stale.index).reset_index(drop=True)
        for old in [run / name for name in RESULTS if (run / name).exists()]:
            old.unlink()
        write_table(path, tidy)
    records = {each.fingerprint: each.record for each in made.values()}
    write_json(run / MADE_FROM, {"kit": kit.__version__, "fingerprint": fingerprint({"models": sorted(records)}),
                                 "models": records})
    return tidy


def models_of(params: Benchmark) -> list[tuple[str, str, str, float, int]]:
    """All models to train: encoder, mode, task, label fraction, seed.

    A probe on all labels has nothing random in it: it is fitted once, under the first seed.
    """
    probes = [(encoder, "probe", task, fraction, seed) for encoder in params.encoders for task in params.tasks
              for fraction in params.label_fractions for seed in (params.seeds if fraction < 1 else params.seeds[:1])]
    tuned = [(encoder, "finetune", task, fraction, seed) for encoder in params.encoders
             for task in params.finetune_tasks for fraction in params.finetune_fractions for seed in params.seeds]
    return probes + tuned


def embeddings(run: Run, name: str, encoder: nn.Module, stores: dict[str, Store]) -> dict[str, np.ndarray]:
    """Features of every scan, computed once an encoder and kept in `embeddings/`.

    Returns:
        scan -> (features,) float32.
    """
    known: dict[str, np.ndarray] = {}
    for store in {store.folder: store for store in stores.values()}.values():
        path = run / "embeddings" / f"{name}-{_digest(encoder, store)}.safetensors"
        if not path.exists():
            values = predict(encoder, PreparedScans(store, store.index))
            features = dict(zip(store.index["scan"], values, strict=True))
            write_whole(path, lambda aside, features=features: save_file(features, aside))
        known.update({f"{store.folder}/{scan}": value for scan, value in load_file(path).items()})
    return known


def _looked_up(features: dict[str, np.ndarray], task: Task, part: str) -> np.ndarray:
    folder = task.parts[part].store.folder
    return np.stack([features[f"{folder}/{scan}"] for scan in task.parts[part].rows["scan"]])


def _digest(encoder: nn.Module, store: Store) -> str:
    """Of the weights and the scans: other weights or scans have other embeddings."""
    scans = [(scan, store.checksum(scan)) for scan in store.index["scan"]]
    return hashlib.blake2b(f"{weights_digest(encoder)} {scans}".encode(), digest_size=6).hexdigest()


def _rows(model: tuple, task: Task, scores: dict[str, dict[str, float]], made_from: str) -> list[dict[str, Any]]:
    return [{**dict(zip(KEYS, model, strict=True)), "metric": METRICS[task.labels.kind], "distribution": TESTED[part],
             **values, "train_participants": task.parts["train"].participants.nunique(), "fingerprint": made_from}
            for part, values in scores.items()]
