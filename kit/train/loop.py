"""The loop: read it from top to bottom.

One loop trains all objectives. Its state is (epoch, step, weights, optimiser); everything random is keyed by
(seed, epoch, step), so that a resumed run goes on bit for bit with the same workers and threads.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kit.data.loader import Batch, PreparedScans, in_order, load
from kit.models.encoder_file import device, on_device
from kit.runs import write_table
from kit.train import checkpoint
from kit.train.distributed import mean_over_processes, rank, set_threads, world_size
from kit.train.journal import Journal
from kit.train.optimizers import build_optimizer, learning_rate
from kit.train.step import cut, fitting, gradients, reads
from kit.train.stop import NAME as STOP
from kit.train.stop import Stopped


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass(frozen=True)
class Settings:
    """What the loop reads; the names are those of the notebooks' parameters."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: str
    schedule: str
    seed: int
    warmup_fraction: float = 0.0
    accumulate: int = 1  # batches whose mean gradient makes one step
    chunk: int = 0  # scans of a process that run at a time; 0: its whole share
    clip: float = 0.0  # largest norm of the gradient; 0: as it is
    ema: float = 0.0  # decay of the moving average of the weights that is kept; 0: none
    retry_rate: float = 0.0  # share of the rate to go on with, once, when the loss is not finite; 0: no retry
    checkpoint_minutes: float = 10.0
    retry_minutes: float = 30.0  # how long a full disk may last
    loader_workers: int = 0

    @classmethod
    def of(cls, params: Any, **changes: Any) -> Settings:
        """Take what the loop reads from a notebook's parameters."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: getattr(params, name) for name in names if hasattr(params, name)}, **changes})


def fit(objective: nn.Module, train: PreparedScans, batches: Callable[[int], list[list[int]]],
        held_out: PreparedScans, settings: Settings, folder: Path | None = None, *,
        params: dict[str, Any] | None = None, may_stop: bool = False,
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
        Stopped: the stop file was there; the checkpoint is written.
    """
    threads = set_threads()
    where = device()
    on_device(objective)
    # with `find_unused_parameters`, gradients are summed in one order from the first step on: a resumed run's bits
    model = (DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
             if world_size() > 1 else objective)
    optimizer = build_optimizer(objective, settings)
    average = (AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
               if settings.ema else None)
    params = params or {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    saver = checkpoint.Saver(folder if rank() == 0 else None, settings.checkpoint_minutes, settings.retry_minutes)
    twice = hasattr(objective, "compare")  # chunks are run, and so read, a second time
    per_item = 2 if getattr(objective, "paired", False) else 1  # two sessions stand for one scan

    def restore(but: dict[str, int] | None = None) -> tuple[list[dict], list[dict], float, float]:
        """Take up the newest checkpoint (`but` one whose next step failed): log, unfinished epoch, rate, its factor."""
        state = checkpoint.load(folder / "checkpoints") if folder else None
        if state and state["position"] == but:
            state = checkpoint.load(folder / "checkpoints", "previous")
        if state is None and but:
            raise TrainingError(f"{fault}; there is no earlier checkpoint to go on from")
        if state is None:
            return [], [], 0.0, 1.0
        checkpoint.check_same(state, params, folder)
        objective.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        _say_changes(state, threads)
        return state["log"], state["losses"], state["scheduler"]["rate"], state["scheduler"]["factor"]

    def state() -> dict[str, Any]:
        return {"model": objective.state_dict(), "optimizer": optimizer.state_dict(),
                "average": average.state_dict() if average else {}, "scaler": {},  # bfloat16 needs no scaling
                "scheduler": {"rate": rate, "factor": factor}, "position": {"epoch": len(rows), "step": len(losses)},
                "random": {"seed": settings.seed, "torch": torch.get_rng_state()}, "log": rows, "losses": losses,
                "params": params, "workers": world_size(), "threads": threads, "versions": versions()}

    def write_log() -> None:
        write_table(folder / "log.csv", pd.DataFrame(rows))

    rows, losses, rate, factor = restore()
    kept = average.module if average else objective
    best, best_weights = min((row["monitor"] for row in rows), default=math.inf), None
    if rows and rank() == 0:
        write_log()  # a run killed between the checkpoint and the log
    each = math.ceil(len(batches(0)) / settings.accumulate)
    journal = Journal(folder if may_stop else None, each * settings.epochs, each * len(rows) + len(losses))

    while len(rows) < settings.epochs:
        epoch, started = len(rows), time.monotonic()
        cuts = [cut(batch, settings.chunk * per_item) for batch in batches(epoch)]
        steps = [cuts[start:start + settings.accumulate] for start in range(0, len(cuts), settings.accumulate)]
        parts = [part for step in steps[len(losses):] for part in reads(step, twice)]
        stream = Waiting(load(train, parts, settings.loader_workers))
        objective.train()
        finite = True
        for number in range(len(losses), len(steps)):
            rate = factor * learning_rate(settings, (epoch + number / len(steps)) / settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with fitting(steps[number]):
                report = gradients(model, objective, stream, steps[number], epoch, number * settings.accumulate,
                                   settings.seed)
            asked = torch.tensor(float(may_stop and (folder / STOP).exists()), device=where)
            report = mean_over_processes({**report, "stop": asked})
            if not (finite := math.isfinite(report["loss"])):
                names = [train.scans[scan] for part in steps[number] for chunk in part for scan in chunk]
                break
            if settings.clip:
                norm = nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
                report["gradient_norm"] = float(norm)
            optimizer.step()
            if average:
                average.update_parameters(objective)
            stop = report.pop("stop") > 0
            losses.append(report)
            scans = world_size() * sum(len(chunk) for part in steps[number] for chunk in part)
            journal.note(epoch, report, rate, scans, stream.seconds / len(losses))
            if stop:
                saver.save(state(), wait=True)
                journal.close()
                raise Stopped(pd.DataFrame([*rows, {"epoch": epoch + 1, **_means(losses), "learning_rate": rate}]))
            if saver.due():
                saver.save(state())

        if not finite:
            fault = (f"the loss is {report['loss']} at epoch {epoch}, step {number}; scans: {', '.join(names)}; "
                     "lower learning_rate, or look at those scans")
            if not settings.retry_rate or factor < 1 or folder is None:
                raise TrainingError(fault)
            if world_size() > 1:
                dist.barrier()  # rank 0 may still be writing what all read now
            rows, losses, rate, _ = restore({"epoch": epoch, "step": number})
            factor = settings.retry_rate
            if rank() == 0:
                print(f"{fault}. Going on from the last checkpoint (epoch {len(rows)}, step {len(losses)}) with "
                      f"{factor:g} of the rate")
            continue

        row = {"epoch": epoch + 1, **_means(losses), "learning_rate": rate}
        if rank() == 0:
            row |= {f"validation_{name}": value for name, value in validate(kept, held_out, settings).items()}
            if monitor:
                row |= monitor(kept, epoch + 1)
        row["monitor"] = row.get("validation_loss", row["loss"])
        row["seconds"] = round(time.monotonic() - started, 2)
        journal.add(row, "epoch")
        rows, losses = [*rows, row], []
        if row["monitor"] < best or epoch == 0:
            best = row["monitor"]
            best_weights = None if folder else {key: value.clone() for key, value in kept.state_dict().items()}
        saver.save(state(), best=best == row["monitor"], wait=True, also=write_log)
    journal.close()
    if best_weights is not None:
        objective.load_state_dict(best_weights)
    elif average:
        objective.load_state_dict(average.module.state_dict())
    return pd.DataFrame(rows)


MAY_CHANGE = {"checkpoint_minutes", "retry_minutes", "loader_workers"}  # when a run is resumed


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
def validate(objective: nn.Module, scans: PreparedScans, settings: Settings) -> dict[str, float]:
    """Means of what the objective reports on held-out scans, in evaluation mode, the same draws each time."""
    if len(scans) < 2:
        return {}
    where = device()
    objective.eval()
    reports = []
    for number, batch in enumerate(load(scans, in_order(len(scans), settings.chunk or max(settings.batch_size, 2)))):
        torch.manual_seed(number)
        reports.append({name: float(value) for name, value in objective(batch.to(where), 0).items()})
    return _means(reports)


def versions() -> dict[str, str]:
    """What a run's bits depend on besides its parameters."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def _means(reports: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}


def _say_changes(state: dict[str, Any], threads: int) -> None:
    now = {"workers": world_size(), "threads": threads, **versions()}
    old = {"workers": state["workers"], "threads": state["threads"], **state["versions"]}
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in now.items() if old.get(name) != value]
    if changed and rank() == 0:
        print(f"resumed with {', '.join(changed)}: the results stay sound, their last digits differ")
