"""3_finetune: a label predicted from an encoder, as a probe on frozen features or with all weights trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kit.cohort.identity import (
    Aliases,
    read_aliases,
)
from kit.cohort.tabular import read_table
from kit.evaluate.metrics import METRICS
from kit.evaluate.predict import predict, predict_tested
from kit.evaluate.probe import probe_tested
from kit.evaluate.tasks import TESTED, Task, check_tested, read_task, score_tested
from kit.models.encoder_file import load_encoder, noted, side_of
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import Finetune, Tuning
from kit.provenance import MadeFrom, Side, Used, check_fit, made_from, remove_stale
from kit.runs import Run, write_json, write_table, write_whole
from kit.store.grid import Grid
from kit.store.sampler import epoch_batches
from kit.store.store import Store
from kit.train import checkpoint
from kit.train.loop import Settings, fit
from kit.train.objectives import Supervised

# of a table of predictions: text, whatever it looks like
NAMES = ("scan", "participant", "dataset", "alias_of", "fingerprint")
RESULTS = ("predictions.csv", "metrics.json", "log.csv", "task.json", "model.safetensors", "checkpoints/*.pt",
           "figures/*.png")  # that go when they are of other inputs


def sides_of(stores: dict[str, Store]) -> dict[str, Side]:
    """What stores bring to `kit.provenance.check_fit`; one store twice is one."""
    return {name: Side.of(store) for name, store in stores.items()
            if name == "prepared" or store.folder != stores["prepared"].folder}


def model_inputs(task: Task, encoder: dict[str, str], aliases: Aliases, allowed: Sequence[str],
                 memo: dict[Path, str] | None = None) -> MadeFrom:
    """What a model of this task is made from.

    Args:
        encoder: see `kit.models.encoder_file.noted`.
        allowed, memo: see `kit.provenance.made_from`.
    """
    used = [Used("out_of_distribution" if name == "out_of_distribution" else "prepared", name, part.store, part.rows,
                 part.participants, part.labels) for name, part in task.parts.items()]
    labels = {"task": task.labels.task, "kind": task.labels.kind, "classes": list(task.labels.classes)}
    return made_from(used, aliases, memo, encoder=encoder, labels=labels, allowed=list(allowed))


def finetune(task: Task, encoder: nn.Module, settings: Settings, flip: bool,
             folder: Path | None = None) -> tuple[Predictor, pd.DataFrame]:
    """Train a copy of the encoder with a new head on the task's training part.

    The epoch of the lowest loss on the validation part is kept; the test part is not looked at. A batch larger than
    the training part is cut to it. With `flip`, left and right are mirrored at random.

    Returns:
        the predictor and one row an epoch; see `kit.train.loop.fit`, for `folder` too.
    """
    train = task.parts["train"]
    number = task.labels.kind == "regression"
    mean, sd = (float(train.labels.mean()), float(train.labels.std()) or 1.0) if number else (0.0, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        predictor = Predictor(copy.deepcopy(encoder), mean, sd)
    objective = Supervised(predictor, task.labels.kind, flip=flip, seed=settings.seed, zscored=train.store.zscored)
    participants = train.participants.tolist()
    size = min(settings.batch_size, train.participants.nunique())
    log = fit(objective, train.scans(),
              lambda epoch: epoch_batches(participants, size, settings.seed, epoch),
              task.parts["validation"].scans(), settings, folder)
    if folder:
        objective.load_state_dict(checkpoint.read_checkpoint(folder / "checkpoints", "best")["model"])
    return predictor, log


def run_finetune(params: Finetune, run: Run) -> tuple[Task, pd.DataFrame, dict[str, float]]:
    """3_finetune: train, predict, score; a finished run is only read, if it was made from what is there now.

    Leaves `made_from.json`, `predictions.csv`, `metrics.json`, `task.json` and, where all weights are trained,
    `model.safetensors`, `log.csv` and `checkpoints/`. Those of other inputs go first, with a line that says what
    changed.

    Returns:
        the task, the predictions (one scan a row), the metrics (an interval that there is not is None).

    Raises:
        MisfitError, LabelError, EncoderError, IdentityError, LeakageError: before any training; each says what does
            not fit.
    """
    aliases = read_aliases(params.aliases)
    stores = open_stores(params)
    allowed = check_fit(side_of(params.encoder) | sides_of(stores), params.allow_differences)
    store = stores["prepared"]
    encoder, record = load_encoder(params.encoder, store.record, params.seed, params.allow_differences)
    task = read_task(store, stores.get("out_of_distribution"), params.task, params.task_type, params.seed,
                     params.accept_flags, params.missing_codes, params.rows_are_people, aliases)
    check_tested(task, record, params.allow_seen_participants, aliases)
    task = task.with_labels_for(params.label_fraction, params.seed)
    made = model_inputs(task, noted(params.encoder, encoder, record), aliases, allowed)
    remove_stale(run.folder, made, RESULTS)
    if (run / "predictions.csv").exists() and (run / "metrics.json").exists():
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        return task, read_table(run / "predictions.csv", text=NAMES), metrics
    predictions = _train_and_predict(params, run, task, encoder, record, made)
    table = pd.concat([_table(task, name, values) for name, values in predictions.items()], ignore_index=True)
    if aliases:  # the score counts people
        table["alias_of"] = np.concatenate([task.parts[name].participants for name in predictions])
    table["fingerprint"] = made.fingerprint
    scores = score_tested(task, predictions, params.seed)
    metric = METRICS[task.labels.kind]
    flat = {f"{TESTED[part]}_{metric if name == 'value' else f'{metric}_{name}'}": value
            for part, values in scores.items() for name, value in values.items()}
    metrics = run.metrics({**flat, "train_participants": task.parts["train"].participants.nunique()})
    write_table(run / "predictions.csv", table)
    return task, table, metrics


def open_stores(params: Tuning) -> dict[str, Store]:
    """The stores that the parameters name, by `prepared` and `out_of_distribution`.

    Where the second is not named, it is the first, if rows of that have the split out_of_distribution.
    """
    stores = {"prepared": Store.open(params.prepared)}
    index = stores["prepared"].index
    if params.out_of_distribution is not None:
        stores["out_of_distribution"] = Store.open(params.out_of_distribution)
    elif "split" in index and (index["split"] == "out_of_distribution").any():
        stores["out_of_distribution"] = stores["prepared"]
    return stores


def _train_and_predict(params: Finetune, run: Run, task: Task, encoder: nn.Module,
                       record: dict[str, Any], made: MadeFrom) -> dict[str, np.ndarray]:
    if params.mode == "probe":
        return probe_tested(task, {name: predict(encoder, part.scans()) for name, part in task.parts.items()})
    predictor, _ = finetune(task, encoder, Settings.of(params), params.flip, run.folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in predictor.state_dict().items()}
    write_json(run / "task.json", {"task": task.labels.task, "kind": task.labels.kind, "classes": task.labels.classes,
                                   "architecture": record["architecture"],
                                   "preparation": task.parts["train"].store.record,
                                   "made_from": made.record})
    write_whole(run / "model.safetensors", lambda aside: save_file(weights, aside))
    return predict_tested(task, predictor)


def load_predictor(folder: Path, preparation: dict[str, Any]) -> tuple[Predictor, dict[str, Any]]:
    """The model that a run of 3_finetune left, and its `task.json`."""
    record = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    predictor = Predictor(build_encoder(record["architecture"], Grid(preparation["shape"], preparation["spacing_mm"])))
    predictor.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return predictor.eval(), record


def _table(task: Task, part: str, values: np.ndarray) -> pd.DataFrame:
    rows = task.parts[part].rows
    return pd.DataFrame({"scan": rows["scan"], "participant": rows["participant"], "dataset": rows["dataset"],
                         "distribution": TESTED[part], "true": task.parts[part].labels, "predicted": values})
