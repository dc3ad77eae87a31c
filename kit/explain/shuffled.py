"""The same network fine-tuned on shuffled labels: how its maps look if there is nothing to learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kit.cohort.identity import read_aliases
from kit.device import on_device
from kit.evaluate.finetune import open_stores
from kit.evaluate.tasks import Task, tasks_of
from kit.evaluate.tune import Choice, tune
from kit.models.encoder_file import encoder_at, load_encoder
from kit.params import Finetune
from kit.reading import read_yaml
from kit.seeding import rng_for


def shuffled_model(model: Path, steps: int, seed: int = 0) -> nn.Module:
    """Fine-tune as a run of 3_finetune did, from the same encoder, but on shuffled labels.

    Args:
        model: that run, with its `params.yaml`; its stores and its encoder must still exist.
        steps: of training, at most the run's own; the warm-up is shortened in proportion. Learning rate and weight
            decay are those that the run chose.
        seed: of the shuffle.

    Raises:
        EncoderError, StoreError, LabelError: see `kit.evaluate.finetune.run_finetune`.
    """
    kept = read_yaml(model / "params.yaml")
    few = min(steps, kept["steps"])
    params = Finetune.model_validate(kept | {"steps": few, "check_converged": False, "workers": 1, "nodes": 1,
                                             "warmup_steps": kept.get("warmup_steps", 0) * few // kept["steps"]})
    stores, aliases = open_stores(params), read_aliases(params.aliases)
    spec = encoder_at(params.encoder, params.fold, params.seed)
    encoder, _ = load_encoder(spec, stores["prepared"].record, params.seed, params.allow_differences)
    task, = tasks_of(params, stores, params.task, params.task_type, params.missing_codes, aliases, [params.fold])
    task = with_shuffled_labels(task.with_labels_for(params.label_fraction, params.seed), seed)
    chosen = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    choice = Choice(chosen["learning_rate"], chosen["weight_decay"])
    return on_device(tune(task, encoder, params, params.seed, choice=choice, check=False).predictor).eval()


def with_shuffled_labels(task: Task, seed: int = 0) -> Task:
    """Shuffle labels among the participants of training, and of validation; all scans of a person keep one label.

    Test labels stay.
    """
    parts = dict(task.parts)
    for number, (name, part) in enumerate(task.parts.items()):
        if name in ("train", "validation"):
            person, people = pd.factorize(part.participants)
            first = part.labels[np.unique(person, return_index=True)[1]]
            parts[name] = replace(part, labels=rng_for(seed, number).permutation(first)[person])
    return replace(task, parts=parts)
