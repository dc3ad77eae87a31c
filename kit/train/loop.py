"""The loop: read it from top to bottom.

One loop trains all objectives. Its state is (epoch, step, weights, optimiser); everything random is keyed by
(seed, epoch, step), so that a resumed run goes on bit for bit with the same workers and threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kit.data.loader import PreparedScans, in_order, load
from kit.models.encoder_file import device, on_device
from kit.runs import progress, write_table
from kit.train import checkpoint
from kit.train.distributed import mean_over_processes, rank, set_threads, world_size


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
    checkpoint_minutes: float = 10.0
    loader_workers: int = 0

    @classmethod
    def of(cls, params: Any, **changes: Any) -> Settings:
        """Take what the loop reads from a notebook's parameters."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: getattr(params, name) for name in names if hasattr(params, name)}, **changes})


def fit(objective: nn.Module, train: PreparedScans, batches: Callable[[int], list[list[int]]],
        held_out: PreparedScans, settings: Settings, folder: Path | None = None) -> pd.DataFrame:
    """Train an objective; the best epoch is that of the lowest loss on the held-out scans.

    Args:
        objective: `forward(batch, epoch) -> {"loss": scalar, ...}`, from `kit.train.objectives`.
        train: scans to learn from.
        batches: the global batches of an epoch, as scan numbers.
        held_out: scans of other participants; may be empty.
        settings: see `Settings`.
        folder: of the run: `log.csv` and `checkpoints/`, which are resumed; None keeps nothing on disk.

    Returns:
        one row an epoch: epoch, loss, validation_loss, what else the objective reports, learning_rate, seconds.
        `objective` holds the last epoch's weights; `best.pt` the best's (without a folder, `objective` does).

    Raises:
        TrainingError: the loss is not finite; the scans of that batch are named.
    """
    threads = set_threads(world_size())
    where = device()
    on_device(objective)
    model = DistributedDataParallel(objective) if world_size() > 1 else objective
    optimizer = _optimizer(objective, settings)
    state = _resume(folder, objective, optimizer) if folder else {}
    rows, losses = state.get("log", []), state.get("losses", [])
    best, best_weights = min((row["monitor"] for row in rows), default=math.inf), None
    saved = time.monotonic()
    each = len(batches(0))
    bar = progress(total=each * settings.epochs, initial=each * len(rows) + len(losses), desc="training", unit="step",
                   disable=rank() > 0)

    for epoch in range(len(rows), settings.epochs):
        started = time.monotonic()
        todo = batches(epoch)
        shares = [_share(batch) for batch in todo]
        objective.train()
        for step, batch in enumerate(load(train, shares[len(losses):], settings.loader_workers), start=len(losses)):
            rate = learning_rate(settings, (epoch + step / len(todo)) / settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_step_seed(settings.seed, epoch, step))
            with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                out = model(batch.to(where), epoch)
            report = mean_over_processes(out)
            if not math.isfinite(report["loss"]):
                names = ", ".join(train.scans[number] for number in shares[step])
                raise TrainingError(f"the loss is {report['loss']} at epoch {epoch}, step {step}; scans: {names}; "
                                    "lower learning_rate, or look at those scans")
            optimizer.zero_grad(set_to_none=True)
            out["loss"].backward()
            optimizer.step()
            losses.append(report)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]['loss']:.3f}", refresh=False)
            if folder and rank() == 0 and time.monotonic() - saved > 60 * settings.checkpoint_minutes:
                checkpoint.save(folder / "checkpoints", _state(objective, optimizer, rows, losses, threads))
                saved = time.monotonic()

        row = {"epoch": epoch + 1, **_means(losses), "learning_rate": rate}
        if rank() == 0:
            row.update({f"validation_{name}": value for name, value in validate(objective, held_out, settings).items()})
        row["monitor"] = row.get("validation_loss", row["loss"])
        row["seconds"] = round(time.monotonic() - started, 2)
        rows, losses = [*rows, row], []
        if row["monitor"] < best or epoch == 0:
            best = row["monitor"]
            best_weights = None if folder else {key: value.clone() for key, value in objective.state_dict().items()}
        if folder and rank() == 0:
            checkpoint.save(folder / "checkpoints", _state(objective, optimizer, rows, losses, threads),
                            best=best == row["monitor"])
            write_table(folder / "log.csv", pd.DataFrame(rows))
            saved = time.monotonic()
    bar.close()
    if best_weights is not None:
        objective.load_state_dict(best_weights)
    return pd.DataFrame(rows)


@torch.no_grad()
def validate(objective: nn.Module, scans: PreparedScans, settings: Settings) -> dict[str, float]:
    """Means of what the objective reports on held-out scans, in evaluation mode, the same draws each time."""
    if len(scans) < 2:
        return {}
    where = device()
    objective.eval()
    reports = []
    for number, batch in enumerate(load(scans, in_order(len(scans), max(settings.batch_size, 2)))):
        torch.manual_seed(number)
        reports.append({name: float(value) for name, value in objective(batch.to(where), 0).items()})
    return _means(reports)


def learning_rate(settings: Settings, progress: float) -> float:
    """The rate at a share (0 to 1) of the run: linear warm-up, then constant or half a cosine to zero."""
    if progress < settings.warmup_fraction:
        return settings.learning_rate * max(progress, 1e-3) / settings.warmup_fraction
    if settings.schedule == "constant":
        return settings.learning_rate
    rest = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))


def _optimizer(objective: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases and norms."""
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    groups = [{"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
              {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(groups, lr=settings.learning_rate)


def _share(batch: list[int]) -> list[int]:
    """This process's part of a global batch: equal parts, so that each counts the same."""
    each = len(batch) // world_size()
    return batch[rank() * each:(rank() + 1) * each]


def _step_seed(seed: int, epoch: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, step, rank()]).generate_state(1)[0])


def _means(reports: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}


def _state(objective: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict], losses: list[dict],
           threads: int) -> dict[str, Any]:
    return {"model": objective.state_dict(), "optimizer": optimizer.state_dict(), "log": rows, "losses": losses,
            "workers": world_size(), "threads": threads, "torch": str(torch.__version__)}


def _resume(folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = checkpoint.load(folder / "checkpoints")
    if state is None:
        return {}
    objective.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    now = {"workers": world_size(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    if changed := [f"{name} {state[name]} -> {value}" for name, value in now.items() if state[name] != value]:
        print(f"resumed with {', '.join(changed)}: the results stay sound, their last digits differ")
    return state
