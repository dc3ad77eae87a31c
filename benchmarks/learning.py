"""What pretraining is worth: three seeds of the demo's SimCLR against encoders of random weights, procedural data."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.ratio import Ratio
from kit.cohort.tables import read_cohort
from kit.evaluate.finetune import run_finetune
from kit.execute import parameters
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.reading import Parameters, read_yaml
from kit.runs import ROOT, Run
from kit.sample import sample_cohort
from kit.store.grid import Grid
from kit.train.pretrain import pretrain

SEEDS = (0, 1, 2)
# Of each task: the metric, and how it becomes an error.
TASKS = {"age": ("mean_absolute_error", lambda value: value), "stroke": ("auc", lambda value: 1 - value)}


def measure() -> list[Ratio]:
    """The probe of each pretrained encoder beside that of its own random start."""
    torch.set_num_threads(2)  # as in the demo
    errors: dict[str, list[tuple[float, float]]] = {task: [] for task in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        asked = _demo("1_preprocess", output_dir=f"{folder}/prepared")
        cohort = read_cohort(sample_cohort(asked.sample_participants, asked.seed, asked.workers))
        prepare(cohort, asked.output_dir, Preparation(Grid(asked.shape, asked.spacing_mm), asked.registration,
                                                      asked.mask), asked.workers)
        for seed in SEEDS:
            run = _demo("2_pretrain", prepared=f"{folder}/prepared", seed=seed, monitor_epochs=0,
                        output_dir=f"{folder}/simclr_{seed}")
            pretrain(run, Run.of(run))
            for task in TASKS:
                errors[task].append(tuple(
                    _probe_error(task, encoder, seed, folder)
                    for encoder in (f"{folder}/simclr_{seed}", f"random:{run.architecture}")))
    return [_ratio(task, np.array(pairs)) for task, pairs in errors.items()]


def _demo(notebook: str, **changes: Any) -> Parameters:
    return parameters(notebook, {**read_yaml(ROOT / "params" / "demo" / f"{notebook}.yaml"), **changes})


def _probe_error(task: str, encoder: str, seed: int, folder: str) -> float:
    name = f"{task}_{seed}_{encoder.rpartition('/')[2].replace(':', '_')}"
    asked = parameters("3_finetune", {
        "prepared": f"{folder}/prepared", "out_of_distribution": f"{folder}/prepared", "encoder": encoder, "task": task,
        "mode": "probe", "seed": seed, "output_dir": f"{folder}/{name}"})
    metric, error = TASKS[task]
    return error(run_finetune(asked, Run.of(asked))[2][f"in_distribution_{metric}"])


def _ratio(task: str, errors: np.ndarray) -> Ratio:
    """(seeds, 2) errors of SimCLR and of random weights: the ratio is the worst seed's."""
    ratios = errors[:, 1] / errors[:, 0]
    unit = "years" if task == "age" else "1 - AUC"
    return Ratio(f"simclr_vs_random_{task}", float(errors[:, 0].mean()), float(errors[:, 1].mean()),
                 float(ratios.min()), "higher", 1.0, unit,
                 f"error of the linear probe for {task} on the test participants of the demo's procedural cohort, mean "
                 f"over {len(errors)} seeds of pretraining, against encoders of random weights; the ratio is that of "
                 f"the worst seed of {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
