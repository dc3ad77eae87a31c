"""5_benchmark: encoders against each other, as probes on cached embeddings and fine-tuned."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from torch import nn

from kit.data.identity import read_aliases
from kit.data.loader import PreparedScans
from kit.data.store import Store, read_facts, scan_path
from kit.data.tabular import read_table
from kit.models.encoder_file import load_encoder
from kit.params import Benchmark
from kit.runs import Run, progress, write_table, write_whole
from kit.train.evaluate import METRICS, outputs
from kit.train.finetune import TESTED, Task, check_tested, evaluate, finetune, predict, probe, read_task
from kit.train.state import Settings

KEYS = ["encoder", "mode", "task", "label_fraction", "seed"]  # one trained model; each is scored on every test set
TEXT = ("encoder", "mode", "task", "metric", "distribution")


def run_benchmark(params: Benchmark, run: Run) -> pd.DataFrame:
    """Fill the table, model by model; what `tidy.csv` holds already is not done again.

    Returns:
        one score a row: encoder, mode, task, label_fraction, seed, metric, distribution, value, low, high,
        participants (tested), train_participants.

    Raises:
        LabelError, EncoderError, IdentityError, LeakageError: before any training; each says what does not fit.
    """
    aliases = read_aliases(params.aliases)
    stores = {"prepared": Store.open(params.prepared)}
    if params.out_of_distribution:
        stores["out_of_distribution"] = Store.open(params.out_of_distribution)
    tasks = {name: read_task(stores["prepared"], stores.get("out_of_distribution"), name,
                             params.task_types.get(name, "auto"), params.seed, params.accept_flags,
                             params.missing_codes.get(name, ()), params.rows_are_people, aliases)
             for name in params.tasks}
    encoders = {name: load_encoder(spec, stores["prepared"].record, params.seed)
                for name, spec in params.encoders.items()}
    for _, record in encoders.values():
        for task in tasks.values():
            check_tested(task, record, params.allow_seen_participants, aliases)

    path = run / "tidy.csv"
    tidy = read_table(path, text=TEXT) if path.exists() else pd.DataFrame(columns=KEYS)
    done = set(tidy[KEYS].itertuples(index=False, name=None))
    features: dict[str, dict[str, np.ndarray]] = {}
    for model in progress([model for model in plan(params) if model not in done], desc="models"):
        name, mode, task_name, fraction, seed = model
        task = tasks[task_name].with_labels_for(fraction, seed)
        encoder = encoders[name][0]
        if mode == "probe":
            if name not in features:
                features[name] = embeddings(run, name, encoder, stores)
            predictions = probe(task, {part: _looked_up(features[name], task, part) for part in task.parts})
        else:
            predictor, _ = finetune(task, encoder, Settings.of(params, seed=seed), params.flip)
            predictions = predict(task, predictor)
        rows = _rows(model, task, evaluate(task, predictions, seed))
        tidy = pd.concat([tidy, pd.DataFrame(rows)], ignore_index=True) if len(tidy) else pd.DataFrame(rows)
        write_table(path, tidy)
    return tidy


def plan(params: Benchmark) -> list[tuple[str, str, str, float, int]]:
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
            values = outputs(encoder, PreparedScans(store, store.index))
            features = dict(zip(store.index["scan"], values, strict=True))
            write_whole(path, lambda aside, features=features: save_file(features, aside))
        known.update({f"{store.folder}/{scan}": value for scan, value in load_file(path).items()})
    return known


def _looked_up(features: dict[str, np.ndarray], task: Task, part: str) -> np.ndarray:
    folder = task.parts[part].store.folder
    return np.stack([features[f"{folder}/{scan}"] for scan in task.parts[part].rows["scan"]])


def _digest(encoder: nn.Module, store: Store) -> str:
    """Of the weights and the scans: other weights or scans have other embeddings."""
    scans = [(scan, read_facts(scan_path(store.folder, scan))["checksum"]) for scan in store.index["scan"]]
    digest = hashlib.blake2b(str(scans).encode(), digest_size=6)
    for weight in encoder.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rows(model: tuple, task: Task, scores: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [{**dict(zip(KEYS, model, strict=True)), "metric": METRICS[task.labels.kind], "distribution": TESTED[part],
             **values, "train_participants": task.parts["train"].participants.nunique()}
            for part, values in scores.items()]
