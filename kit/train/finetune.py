"""3_finetune: a label predicted from an encoder, as a probe on frozen features or with all weights trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kit.data.identity import Aliases, check_datasets_known, check_people_known, joined, participant_ids, read_aliases
from kit.data.labels import LabelError, Labels, read_labels
from kit.data.leakage import check_apart, check_encoder
from kit.data.loader import PreparedScans, epoch_batches
from kit.data.quality import usable
from kit.data.split import label_subset, splits
from kit.data.store import Store
from kit.data.tabular import read_table
from kit.models.encoder_file import load_encoder, noted, side_of
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import Finetune, Tuning
from kit.provenance import MadeFrom, Side, Used, check_fit, made_from, renew
from kit.runs import Run, shown, write_json, write_table, write_whole
from kit.train import checkpoint
from kit.train.evaluate import METRICS, fit_probe, outputs, predict_probe, score
from kit.train.loop import fit
from kit.train.objectives import Supervised
from kit.train.state import Settings

# of a table of predictions: text, whatever it looks like
NAMES = ("scan", "participant", "dataset", "alias_of", "fingerprint")
RESULTS = ("predictions.csv", "metrics.json", "log.csv", "task.json", "model.safetensors", "checkpoints/*.pt",
           "figures/*.png")  # that go when they are of other inputs
TESTED = {"test": "in_distribution", "out_of_distribution": "out_of_distribution"}


@dataclass(frozen=True)
class Part:
    """Some labelled scans: rows of a store's index with their labels and participants."""

    store: Store
    rows: pd.DataFrame
    labels: np.ndarray
    participants: pd.Series

    def scans(self, skip_damaged: bool = False) -> PreparedScans:
        """As a torch dataset; see there."""
        return PreparedScans(self.store, self.rows, self.labels, skip_damaged)

    def only(self, keep: np.ndarray) -> Part:
        """The rows where `keep` (rows,) is true."""
        return Part(self.store, self.rows[keep], self.labels[keep], self.participants[keep])


@dataclass(frozen=True)
class Task:
    """A label with its participants split: train, validation, test and perhaps out_of_distribution."""

    labels: Labels
    parts: dict[str, Part]

    def with_labels_for(self, fraction: float, seed: int) -> Task:
        """The task with labels for a fraction of the training participants."""
        train = self.parts["train"]
        keep = label_subset(train.participants, train.labels, self.labels.kind, fraction, seed)
        return replace(self, parts={**self.parts, "train": train.only(keep)})


def read_task(store: Store, out_of_distribution: Store | None, task: str, kind: str, seed: int,
              accept_flags: Sequence[str] = (), missing_codes: Iterable[str | float] = (),
              rows_are_people: bool = False, aliases: Aliases | None = None) -> Task:
    """Split the labelled scans of one store by participant, and take those of another as out of distribution.

    Scans that quality control calls unusable are left out of all parts; flagged ones, often pathology, are in all.
    Where the other store's index has a column `split`, its rows of `out_of_distribution` are taken, else all.

    Args:
        accept_flags: see `kit.data.quality.usable`.
        missing_codes: values of the label that stand for a missing one.
        rows_are_people: scans without a participant are each of another person.
        aliases: who is known under several names.

    Raises:
        LabelError: the label cannot be used, the two stores' classes differ, or a part lacks scans or a class, or
            training a second participant.
        IdentityError: participants, or of two stores their datasets, have no name.
        LeakageError: somebody, or a scan under two names, stands in two parts.
    """
    other = out_of_distribution if out_of_distribution and out_of_distribution.folder != store.folder else None
    for one in (store, other) if other else ():
        check_datasets_known(one.index, "another cohort")
    labels = read_labels(store.index, task, kind, missing_codes)
    place = splits(joined(store.index, aliases or {}), seed, rows_are_people=rows_are_people)
    kept = usable(store.index, accept_flags)
    parts = {name: _part(store, labels, (place == name).to_numpy() & kept, aliases)
             for name in ("train", "validation", "test")}
    if out_of_distribution is not None:
        index = out_of_distribution.index
        check_people_known(index, rows_are_people)
        theirs = read_labels(index, task, labels.kind, missing_codes)
        if theirs.classes != labels.classes:  # both are sorted: 1 could stand for another class there
            raise LabelError(f"{task}: the classes are {', '.join(labels.classes)} in {shown(store.folder)}, but "
                             f"{', '.join(theirs.classes)} in {shown(out_of_distribution.folder)}; rename them there, "
                             "or empty the cells of scans of other classes")
        keep = (index["split"] == "out_of_distribution").to_numpy() if "split" in index else np.ones(len(index), bool)
        parts["out_of_distribution"] = _part(out_of_distribution, theirs, keep & usable(index, accept_flags), aliases)
    for name, part in parts.items():
        people, both, present = part.participants.nunique(), labels.kind == "classification", set(part.labels)
        if len(part.rows) < 2 or (both and len(present) < 2) or (name == "train" and people < 2):
            found = f", all of class {labels.classes[int(part.labels[0])]}" if both and len(present) == 1 else ""
            raise LabelError(f"{task}: the {name} split has {len(part.rows)} usable scans with this label, of {people} "
                             f"participants{found}; it needs two scans{' of both classes' * both}"
                             f"{' and two participants' * (name == 'train')}. In {shown(part.store.folder)} "
                             f"{part.store.contents()}")
    check_apart({name: (part.store, part.rows, part.participants) for name, part in parts.items()}, aliases)
    return Task(labels, parts)


def _part(store: Store, labels: Labels, keep: np.ndarray, aliases: Aliases | None) -> Part:
    keep = keep & ~np.isnan(labels.values)
    rows = store.index[keep]
    return Part(store, rows, labels.values[keep], participant_ids(joined(rows, aliases or {})))


def check_tested(task: Task, record: dict[str, Any], allow: bool, aliases: Aliases) -> None:
    """Check that an encoder, by its record, saw nobody and no scan that it is tested on.

    Raises:
        LeakageError, IdentityError: see `kit.data.leakage.check_encoder`.
    """
    for part in (task.parts[name] for name in TESTED if name in task.parts):
        check_encoder(record, part.store, part.rows, part.participants, allow, aliases)


def sides_of(stores: dict[str, Store]) -> dict[str, Side]:
    """What stores bring to `kit.provenance.check_fit`; one store twice is one."""
    return {name: Side.of(store) for name, store in stores.items()
            if name == "prepared" or store.folder != stores["prepared"].folder}


def inputs(task: Task, encoder: dict[str, str], aliases: Aliases, allowed: Sequence[str],
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


def evaluate(task: Task, predictions: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Score each tested part's predictions; see `kit.train.evaluate.score`."""
    return {name: score(task.parts[name].labels, values, task.labels.kind, task.parts[name].participants, seed)
            for name, values in predictions.items()}


def probe(task: Task, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fit a linear probe on the training part's features; predictions for each tested part."""
    kind, parts = task.labels.kind, task.parts
    fitted = fit_probe(features["train"], parts["train"].labels, features["validation"], parts["validation"].labels,
                       kind)
    return {name: predict_probe(fitted, features[name], kind) for name in TESTED if name in parts}


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
    log = fit(objective, train.scans(skip_damaged=True),
              lambda epoch: epoch_batches(participants, size, settings.seed, epoch),
              task.parts["validation"].scans(), settings, folder)
    if folder:
        objective.load_state_dict(checkpoint.load(folder / "checkpoints", "best")["model"])
    return predictor, log


def predict(task: Task, predictor: Predictor) -> dict[str, np.ndarray]:
    """A predictor's log-odds or numbers for each tested part."""
    raw = {name: outputs(predictor, task.parts[name].scans())[:, 0] for name in TESTED if name in task.parts}
    return {name: values * float(predictor.sd) + float(predictor.mean) for name, values in raw.items()}


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
    made = inputs(task, noted(params.encoder, encoder, record), aliases, allowed)
    renew(run.folder, made, RESULTS)
    if (run / "predictions.csv").exists() and (run / "metrics.json").exists():
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        return task, read_table(run / "predictions.csv", text=NAMES), metrics
    predictions = _train_and_predict(params, run, task, encoder, record, made)
    table = pd.concat([_table(task, name, values) for name, values in predictions.items()], ignore_index=True)
    if aliases:  # the score counts people
        table["alias_of"] = np.concatenate([task.parts[name].participants for name in predictions])
    table["fingerprint"] = made.fingerprint
    scores = evaluate(task, predictions, params.seed)
    metric = METRICS[task.labels.kind]
    flat = {f"{TESTED[part]}_{metric if name == 'value' else f'{metric}_{name}'}": value
            for part, values in scores.items() for name, value in values.items()}
    metrics = run.metrics({**flat, "train_participants": task.parts["train"].participants.nunique()})
    write_table(run / "predictions.csv", table)
    return task, table, metrics


def open_stores(params: Tuning) -> dict[str, Store]:
    """The stores that the parameters name, by `prepared` and `out_of_distribution`."""
    named = {"prepared": params.prepared, "out_of_distribution": params.out_of_distribution}
    return {name: Store.open(folder) for name, folder in named.items() if folder is not None}


def _train_and_predict(params: Finetune, run: Run, task: Task, encoder: nn.Module,
                       record: dict[str, Any], made: MadeFrom) -> dict[str, np.ndarray]:
    if params.mode == "probe":
        return probe(task, {name: outputs(encoder, part.scans()) for name, part in task.parts.items()})
    predictor, _ = finetune(task, encoder, Settings.of(params), params.flip, run.folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in predictor.state_dict().items()}
    write_json(run / "task.json", {"task": task.labels.task, "kind": task.labels.kind, "classes": task.labels.classes,
                                   "architecture": record["architecture"],
                                   "preparation": task.parts["train"].store.record,
                                   "made_from": made.record})
    write_whole(run / "model.safetensors", lambda aside: save_file(weights, aside))
    return predict(task, predictor)


def load_predictor(folder: Path, preparation: dict[str, Any]) -> tuple[Predictor, dict[str, Any]]:
    """The model that a run of 3_finetune left, and its `task.json`."""
    record = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    predictor = Predictor(build_encoder(record["architecture"], tuple(preparation["shape"])))
    predictor.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return predictor.eval(), record


def _table(task: Task, part: str, values: np.ndarray) -> pd.DataFrame:
    rows = task.parts[part].rows
    return pd.DataFrame({"scan": rows["scan"], "participant": rows["participant"], "dataset": rows["dataset"],
                         "distribution": TESTED[part], "true": task.parts[part].labels, "predicted": values})
