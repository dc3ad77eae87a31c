"""What training carries from step to step, and how a checkpoint gives it back."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kit.data.loader import Batch
from kit.models.encoder_file import on_device
from kit.runs import write_table
from kit.train import checkpoint
from kit.train.distributed import rank, set_threads, world_size
from kit.train.optimizers import build_optimizer, learning_rate
from kit.train.step import Cuts, gradients


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
    precision: str = "fp32"  # of the network while it trains, see `kit.models.precision`

    @classmethod
    def of(cls, params: Any, **changes: Any) -> Settings:
        """Take what the loop reads from a notebook's parameters."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: getattr(params, name) for name in names if hasattr(params, name)}, **changes})


MAY_CHANGE = {"checkpoint_minutes", "retry_minutes", "loader_workers"}  # when a run is resumed


class State:
    """One run of the loop: all that a checkpoint holds, and what changes it."""

    def __init__(self, objective: nn.Module, settings: Settings, folder: Path | None,
                 params: dict[str, Any] | None, defaults: dict[str, Any] | None = None) -> None:
        self.threads = set_threads()
        self.objective, self.settings, self.folder = on_device(objective), settings, folder
        # with `find_unused_parameters`, gradients are summed in one order from the first step on: a resumed run's bits
        self.model = (DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
                      if world_size() > 1 else objective)
        self.optimizer = build_optimizer(objective, settings)
        self.average = (AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
                        if settings.ema else None)
        self.kept: nn.Module = self.average.module if self.average else objective
        self.params = params or {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
        self.defaults = defaults or {field.name: field.default for field in fields(Settings)
                                     if field.default is not MISSING}  # of what a checkpoint of an older kit lacks
        self.log: list[dict[str, float]] = []  # a row an epoch
        self.reports: list[dict[str, float]] = []  # of the steps of the unfinished epoch
        self.rate, self.factor = 0.0, 1.0  # learning rate; what a retry left of it

    def step(self, an_epoch: int) -> int:
        """Steps that are done, of so many an epoch."""
        return an_epoch * len(self.log) + len(self.reports)

    def set_rate(self, epoch: float) -> None:
        """The learning rate at so many epochs, of which a retry may have left a share."""
        self.rate = self.factor * learning_rate(self.settings, epoch / self.settings.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def gradients(self, stream: Iterator[Batch], step: list[Cuts], epoch: int, number: int) -> dict[str, torch.Tensor]:
        """Fresh gradients of a step, see `kit.train.step.gradients`."""
        self.optimizer.zero_grad(set_to_none=True)
        return gradients(self.model, self.objective, stream, step, epoch, number, self.settings.seed,
                         self.settings.precision)

    def update(self, report: dict[str, float]) -> None:
        """One step down the gradients."""
        if self.settings.clip:
            report["gradient_norm"] = float(nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.clip))
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.objective)
        self.reports.append(report)

    def row(self, epoch: int) -> dict[str, float]:
        """Of the log: the means over an epoch's steps so far."""
        means = {name: float(np.mean([report[name] for report in self.reports])) for name in self.reports[0]}
        return {"epoch": epoch + 1, **means, "learning_rate": self.rate}

    def write_log(self) -> None:
        """`log.csv` of the finished epochs."""
        write_table(self.folder / "log.csv", pd.DataFrame(self.log))

    def plain(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else {}, "scaler": {},  # bfloat16 needs none
                "scheduler": {"rate": self.rate, "factor": self.factor},
                "position": {"epoch": len(self.log), "step": len(self.reports)},
                "random": {"seed": self.settings.seed, "torch": torch.get_rng_state()},
                "log": self.log, "losses": self.reports, "params": self.params, "workers": world_size(),
                "threads": self.threads, "versions": versions()}

    def restore(self, but: dict[str, int] | None = None) -> bool:
        """Take up the newest checkpoint, `but` one at that position; whether there is one.

        Raises:
            CheckpointError: it is of other parameters.
        """
        found = checkpoint.load(self.folder / "checkpoints") if self.folder else None
        if found and found["position"] == but:
            found = checkpoint.load(self.folder / "checkpoints", "previous")
        if found is None:
            return False
        checkpoint.check_same(found, self.params, self.folder, self.defaults)
        self.objective.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self.average:
            self.average.load_state_dict(found["average"])
        self.log, self.reports = found["log"], found["losses"]
        self.rate, self.factor = found["scheduler"]["rate"], found["scheduler"]["factor"]
        now = {"workers": world_size(), "threads": self.threads, **versions()}
        old = {"workers": found["workers"], "threads": found["threads"], **found["versions"]}
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in now.items() if old.get(name) != value]
        if changed and rank() == 0:
            print(f"resumed with {', '.join(changed)}: the results stay sound, their last digits differ")
        return True

    def go_back(self, fault: str, position: dict[str, int]) -> None:
        """Once, take up a checkpoint before `position`, whose step failed, at `retry_rate` of the learning rate.

        Raises:
            TrainingError: the fault, where no retry is asked for, was made, or can be.
        """
        if not self.settings.retry_rate or self.factor < 1 or self.folder is None:
            raise TrainingError(fault)
        if world_size() > 1:
            dist.barrier()  # rank 0 may still be writing what all read now
        if not self.restore(position):
            raise TrainingError(f"{fault}; there is no earlier checkpoint to go on from")
        self.factor = self.settings.retry_rate
        if rank() == 0:
            print(f"{fault}. Going on from the last checkpoint (epoch {len(self.log)}, step {len(self.reports)}) with "
                  f"{self.factor:g} of the rate")


def versions() -> dict[str, str]:
    """What a run's bits depend on besides its parameters."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
