"""3_finetune: predict a label with an encoder, by a probe on frozen features or by fine-tuning all weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save

from kit.cohort.identity import (
    Aliases,
    read_aliases,
)
from kit.cohort.tabular import read_table
from kit.evaluate.metrics import METRICS
from kit.evaluate.predict import predict, predict_parts, prediction_columns
from kit.evaluate.probe import probe_tested
from kit.evaluate.tasks import Task, check_tested, score_tested, tasks_of
from kit.evaluate.tune import TRIES, rules, tune
from kit.models.encoder import Encoder
from kit.models.encoder_file import encoder_at, load_encoder, noted, side_of
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.models.reference import FILE, SCANS, fit_reference, save_reference
from kit.params import Finetune, Tuning
from kit.provenance import MadeFrom, Side, Used, check_fit, made_from, remove_stale
from kit.runs import Run, write_json, write_table, write_whole
from kit.seeding import rng_for
from kit.store.dataset import PreparedScans
from kit.store.grid import Grid
from kit.store.leakage import TRAINING_PARTS
from kit.store.store import Store

# columns of a table of predictions always read as text
NAMES = ("scan", "participant", "dataset", "alias_of", "fingerprint")
VALIDATION = "validation.csv"  # predictions for the scans that selected the model but trained no weight
RESULTS = ("predictions.csv", VALIDATION, "metrics.json", "log.csv", "tries.csv", "task.json", "model.safetensors",
           FILE, f"{TRIES}/*/log.csv", f"{TRIES}/*/checkpoints/*.pt", "figures/*.png")  # removed if the inputs change


def sides_of(stores: dict[str, Store]) -> dict[str, Side]:
    """The stores as input to `kit.provenance.check_fit`, without test sets that are the `prepared` store itself."""
    return {name: Side.of(store) for name, store in stores.items()
            if name == "prepared" or store.folder != stores["prepared"].folder}


def model_inputs(task: Task, encoder: dict[str, str], aliases: Aliases, allowed: Sequence[str],
                 memo: dict[Path, str] | None = None, **more: Any) -> MadeFrom:
    """Record what a model of this task is made from.

    Args:
        encoder: see `kit.models.encoder_file.noted`.
        allowed, memo, more: see `kit.provenance.made_from`.
    """
    used = [Used("prepared" if name in TRAINING_PARTS or name == "test" else name, name, part.store, part.rows,
                 part.participants, part.labels) for name, part in task.parts.items()]
    labels = {"task": task.labels.task, "kind": task.labels.kind, "classes": list(task.labels.classes)}
    return made_from(used, aliases, memo, encoder=encoder, labels=labels, allowed=list(allowed), **more)


def run_finetune(params: Finetune, run: Run) -> tuple[Task, pd.DataFrame, dict[str, float]]:
    """Train, predict and score for 3_finetune; a finished run with unchanged inputs is only read back.

    Writes `made_from.json`, `predictions.csv`, `metrics.json` and, if all weights are trained, `task.json`,
    `model.safetensors`, `validation.csv`, `reference.safetensors`, `tries.csv` and the best try's `log.csv`. Results
    made from other inputs are removed first, and the changes printed. An unfinished run resumes from `tries/`.

    Returns:
        the task, the predictions (one row per scan), the metrics (None for a missing interval).

    Raises:
        MisfitError, LabelError, EncoderError, IdentityError, LeakageError: before any training; each says what does
            not fit.
        TrainingError, Stopped, and errors of reading and of worker processes: see `kit.evaluate.tune.tune`.
    """
    aliases = read_aliases(params.aliases)
    stores = open_stores(params)
    spec = encoder_at(params.encoder, params.fold, params.seed)
    allowed = check_fit(side_of(spec) | sides_of(stores), params.allow_differences)
    encoder, record = load_encoder(spec, stores["prepared"].record, params.seed, params.allow_differences)
    task, = tasks_of(params, stores, params.task, params.task_type, params.missing_codes, aliases, [params.fold])
    for warning in check_tested(task, record, params.allow_seen_participants, aliases):
        print(warning)
    task = task.with_labels_for(params.label_fraction, params.seed)
    changed = rules(params, record["architecture"]) if params.mode == "finetune" else {}
    more: dict[str, Any] = {"settings": changed} if changed else {}
    made = model_inputs(task, noted(spec, encoder, record), aliases, allowed, **more)
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
    flat = {f"{task.tested[part]}_{metric if name == 'value' else f'{metric}_{name}'}": value
            for part, values in scores.items() for name, value in values.items()}
    metrics = run.metrics({**flat, "train_participants": task.parts["train"].participants.nunique()})
    write_table(run / "predictions.csv", table)
    shutil.rmtree(run / TRIES, ignore_errors=True)
    return task, table, metrics


def open_stores(params: Tuning) -> dict[str, Store]:
    """Open the stores that the parameters name: `prepared`, and test sets by their names.

    If no test set is called `out_of_distribution` but `prepared` has rows of that split, they become that test set.
    """
    stores = {"prepared": Store.open(params.prepared)}
    stores |= {name: Store.open(test.prepared) for name, test in params.test_sets().items()}
    index = stores["prepared"].index
    if "out_of_distribution" not in stores and "split" in index and (index["split"] == "out_of_distribution").any():
        stores["out_of_distribution"] = stores["prepared"]
    return stores


def _train_and_predict(params: Finetune, run: Run, task: Task, encoder: Encoder,
                       record: dict[str, Any], made: MadeFrom) -> dict[str, np.ndarray]:
    if params.mode == "probe":
        return probe_tested(task, {name: predict(encoder, part.scans()) for name, part in task.parts.items()})
    tuned = tune(task, encoder, params, params.seed, run.folder)
    predictor, metric = tuned.predictor, METRICS[task.labels.kind]
    weights = {name: value.detach().cpu().contiguous() for name, value in predictor.state_dict().items()}
    run.metrics({**tuned.choice._asdict(), "converged": tuned.converged, f"validation_{metric}": tuned.validation_score,
                 f"validation_{metric}_error": tuned.standard_error, f"longer_{metric}": tuned.longer_score,
                 "longer_steps": tuned.longer_steps, f"longer_{metric}_error": tuned.change_error})
    write_table(run / "log.csv", tuned.log)
    write_json(run / "task.json", {"task": task.labels.task, "kind": task.labels.kind, "classes": task.labels.classes,
                                   "architecture": record["architecture"],
                                   "preparation": task.parts["train"].store.record,
                                   "made_from": made.record})
    found = predict_parts(task, predictor, ["validation", *task.tested])
    write_table(run / VALIDATION, _table(task, "validation", found.pop("validation")))
    drawn = rng_for(params.seed).permutation(len(task.parts["train"].rows))[:SCANS]
    seen = PreparedScans(task.parts["train"].store, task.parts["train"].rows.iloc[drawn])
    features = [predict(predictor.encoder, scans) for scans in (seen, task.parts["validation"].scans())]
    save_reference(run.folder, fit_reference(*features))
    values = save(weights)  # `save_file` on a full disk raises no OSError
    write_whole(run / "model.safetensors", lambda aside: aside.write_bytes(values))
    return found


def load_predictor(folder: Path, preparation: dict[str, Any]) -> tuple[Predictor, dict[str, Any]]:
    """Load the model of a 3_finetune run, and its `task.json`; `preparation`, of the scans to predict, gives its grid.

    Whether that preparation fits the model's is not checked here; see `kit.provenance.check_fit`.
    """
    record = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    encoder = build_encoder(record["architecture"], Grid(preparation["shape"], preparation["spacing_mm"]))
    predictor = Predictor(encoder, outputs=len(weights["head.bias"]))
    predictor.load_state_dict(weights, strict=True)
    return predictor.eval(), record


def _table(task: Task, part: str, values: np.ndarray) -> pd.DataFrame:
    rows = task.parts[part].rows
    return pd.DataFrame({"scan": rows["scan"], "participant": rows["participant"], "dataset": rows["dataset"],
                         "distribution": task.tested.get(part, part), "true": task.parts[part].labels,
                         **prediction_columns(values)})
