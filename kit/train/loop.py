"""The loop: read it from top to bottom.

One loop trains all objectives. Its state is (epoch, step, weights, optimiser); everything random is keyed by
(seed, epoch, step), so that a resumed run goes on bit for bit with the same workers and threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from kit.data.loader import Batch, PreparedScans, load, loading_may_fail
from kit.models.encoder_file import device
from kit.models.precision import evaluation
from kit.train import checkpoint
from kit.train.distributed import mean_over_processes, rank, world_size
from kit.train.evaluate import scans_at_a_time
from kit.train.journal import Journal
from kit.train.state import Settings, State
from kit.train.step import Cuts, cut, fitting, reads, run_model
from kit.train.stop import NAME as STOP
from kit.train.stop import Stopped


@loading_may_fail()
def fit(objective: nn.Module, train: PreparedScans, batches: Callable[[int], list[list[int]]],
        held_out: PreparedScans, settings: Settings, folder: Path | None = None, *,
        params: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None, may_stop: bool = False,
        monitor: Callable[[nn.Module, int], dict[str, float]] | None = None) -> pd.DataFrame:
    """Train an objective; the best epoch is that of the lowest loss on the held-out scans.

    Args:
        objective: `forward(batch, epoch) -> {"loss": scalar, ...}`, from `kit.train.objectives`.
        train: scans to learn from.
        batches: the global batches of an epoch, as scan numbers.
        held_out: scans of other participants; may be empty.
        settings: see `Settings`.
        folder: of the run: `log.csv` and `checkpoints/`, which are resumed; None keeps nothing on disk.
        params: what must be the same when the run is resumed; the settings if not given.
        defaults: of `params`, for checkpoints of an older kit.
        may_stop: heed the stop file in the folder, write `live.json` and TensorBoard's files.
        monitor: called by rank 0 after each epoch with the objective and the epoch's number from 1; what it
            returns joins the log's row.

    Returns:
        one row an epoch: epoch, loss, validation_loss, what else the objective reports, learning_rate, seconds.
        `objective` holds the last epoch's weights (their moving average with `ema`); `best.pt` the best's
        (without a folder, `objective` does).

    Raises:
        TrainingError: the loss is not finite; the scans of that batch are named.
        MemoryError: a step does not fit; the chunk to try is named.
        CheckpointError: checkpoints of other parameters lie there, or the disk was full for too long.
        LoaderError: loading processes cannot be started, or one died.
        Stopped: the stop file was there; the checkpoint is written.
    """
    state = State(objective, settings, folder, params, defaults)
    state.restore()
    if state.log and rank() == 0:
        state.write_log()  # a run killed between the checkpoint and the log
    saver = checkpoint.Saver(folder if rank() == 0 else None, settings.checkpoint_minutes, settings.retry_minutes)
    an_epoch = math.ceil(len(batches(0)) / settings.accumulate)
    journal = Journal(folder if may_stop else None, an_epoch * settings.epochs, state.step(an_epoch))
    best, best_weights = min((row["monitor"] for row in state.log), default=math.inf), None

    while len(state.log) < settings.epochs:
        epoch, started = len(state.log), time.monotonic()
        steps, stream = _scans_of(objective, train, batches(epoch), settings, len(state.reports))
        objective.train()
        for number in range(len(state.reports), len(steps)):
            state.set_rate(epoch + number / len(steps))
            with fitting(steps[number]):
                report = state.gradients(stream, steps[number], epoch, number * settings.accumulate)
            asked = torch.tensor(float(may_stop and (folder / STOP).exists()), device=device())
            report = mean_over_processes({**report, "stop": asked})
            if not math.isfinite(report["loss"]):
                scans = [train.scans[scan] for part in steps[number] for chunk in part for scan in chunk]
                state.go_back(f"the loss is {report['loss']} at epoch {epoch}, step {number}; scans: "
                              f"{', '.join(scans)}; lower learning_rate, or look at those scans",
                              {"epoch": epoch, "step": number})
                journal.go_back(state.step(an_epoch))
                break
            stop = report.pop("stop") > 0
            state.update(report)
            scans = world_size() * sum(len(chunk) for part in steps[number] for chunk in part)
            journal.note(epoch, report, state.rate, scans, stream.seconds / len(state.reports))
            if stop:
                saver.save(state.plain(), wait=True)
                journal.close()
                raise Stopped(pd.DataFrame([*state.log, state.row(epoch)]))
            if saver.due():
                saver.save(state.plain())
        else:
            row = state.row(epoch)
            if rank() == 0:
                validated = validate(state.kept, held_out, settings.batch_size)
                row |= {f"validation_{name}": value for name, value in validated.items()}
                row |= monitor(state.kept, epoch + 1) if monitor else {}
            row["monitor"] = row.get("validation_loss", row["loss"])
            row["seconds"] = round(time.monotonic() - started, 2)
            journal.add(row, "epoch")
            state.log, state.reports = [*state.log, row], []
            if row["monitor"] < best or epoch == 0:
                best = row["monitor"]
                best_weights = None if folder else {key: value.clone()
                                                    for key, value in state.kept.state_dict().items()}
            saver.save(state.plain(), best=best == row["monitor"], wait=True, also=state.write_log)
    journal.close()
    if best_weights is not None:
        objective.load_state_dict(best_weights)
    elif state.average:
        objective.load_state_dict(state.kept.state_dict())
    return pd.DataFrame(state.log)


def _scans_of(objective: nn.Module, train: PreparedScans, batches: list[list[int]], settings: Settings,
              done: int) -> tuple[list[list[Cuts]], Waiting]:
    """This process's scans of an epoch's steps, batches of chunks each; and those not done yet, as they are loaded."""
    twice = hasattr(objective, "compare")  # chunks are run, and so read, a second time
    per_item = 2 if getattr(objective, "paired", False) else 1  # two sessions stand for one scan
    cuts = [cut(batch, settings.chunk * per_item) for batch in batches]
    steps = [cuts[start:start + settings.accumulate] for start in range(0, len(cuts), settings.accumulate)]
    parts = [part for step in steps[done:] for part in reads(step, twice)]
    train.batches = batches  # a damaged scan's substitute must be in none of its chunks and processes
    return steps, Waiting(load(train, parts, settings.loader_workers))


class Waiting:
    """A stream of batches that counts the seconds spent waiting for the next one."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begun = time.monotonic()
        batch = next(self._batches)
        self.seconds += time.monotonic() - begun
        return batch


@torch.no_grad()
def validate(objective: nn.Module, scans: PreparedScans, batch_size: int) -> dict[str, float]:
    """Means over held-out scans of what the objective reports, in evaluation mode and float32, with the same draws.

    As many run at a time as fit (`scans_at_a_time`); those of SimCLR are then compared in equal groups of at most
    `batch_size`, so that no group is a lone scan, which always finds its partner.
    """
    if len(scans) < 2:
        return {}
    objective.eval()
    size, compared = scans_at_a_time(scans.store.grid.shape), hasattr(objective, "compare")
    groups = np.array_split(np.arange(len(scans)), math.ceil(len(scans) / (max(batch_size, 2) if compared else size)))
    cuts = [[group[start:start + size].tolist() for start in range(0, len(group), size)] for group in groups]
    stream, total = load(scans, [part for parts in cuts for part in parts]), {}
    options = {"embed": True} if compared else {}
    for group, parts in zip(groups, cuts, strict=True):
        with evaluation(device()):
            out = [run_model(objective, next(stream), 0, 0, "fp32", **options) for _ in parts]
            report = objective.compare(*torch.cat(out, dim=1)) if compared else out[0]
        for name, value in report.items():
            total[name] = total.get(name, 0.0) + float(value) * len(group) / len(scans)
    return total
