"""Run a network over scans: predictions of a head, features of an encoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from kit.device import device, evaluation, on_device, scans_at_a_time
from kit.evaluate.tasks import Task
from kit.models.heads import Predictor
from kit.runs import progress
from kit.store.dataset import PreparedScans, load_batches
from kit.store.sampler import in_order


@torch.no_grad()
def predict(model: nn.Module, scans: PreparedScans, batch_size: int | None = None) -> np.ndarray:
    """Run a model over scans in evaluation mode and float32; returns its raw output, (scans, width) float32.

    The default `batch_size` is `scans_at_a_time`.
    """
    on_device(model).eval()
    parts = []
    batches = in_order(len(scans), batch_size or scans_at_a_time(scans.store.grid.shape))
    for batch in progress(load_batches(scans, batches), total=len(batches), desc="reading scans"):
        with evaluation(device()):
            parts.append(model(batch.to(device()).images).float().cpu().numpy())
    return np.concatenate(parts)


def predict_tested(task: Task, predictor: Predictor) -> dict[str, np.ndarray]:
    """Predict each tested part: (scans,) log-odds or numbers, or (scans, K) logits of K > 2 classes."""
    return predict_parts(task, predictor, task.tested)


def predict_parts(task: Task, predictor: Predictor, parts: Iterable[str]) -> dict[str, np.ndarray]:
    """As `predict_tested`, for the given parts."""
    return {name: in_label_units(predictor, predict(predictor, task.parts[name].scans())) for name in parts}


def in_label_units(predictor: Predictor, raw: np.ndarray) -> np.ndarray:
    """Convert (scans, outputs) to (scans,) log-odds or numbers in the label's unit, or (scans, K) logits."""
    values = raw * float(predictor.sd) + float(predictor.mean)
    return values if predictor.outputs > 1 else values[:, 0]


def prediction_columns(predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Name predictions as table columns: `predicted`, or for K > 2 classes `predicted_0` to `predicted_{K-1}`."""
    if predictions.ndim == 1:
        return {"predicted": predictions}
    return {f"predicted_{number}": values for number, values in enumerate(predictions.T)}
