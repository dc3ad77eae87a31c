"""The training loop, to be read from top to bottom.

One loop trains all objectives. Its state is (epoch, step, weights, optimiser). All randomness is keyed by (seed, epoch,
step), so with the same workers and threads a resumed run continues bit-exactly.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kit.device import autocast, device, evaluation, on_device, scans_at_a_time, set_threads
from kit.errors import KitError
from kit.runs import shown, write_table
from kit.store.dataset import Batch, PreparedScans, load_batches, loading_may_fail
from kit.store.store import StoreError
from kit.train import checkpoint
from kit.train.distributed import mean_over_processes, of_all_processes, of_first_process, rank, world_size
from kit.train.objectives import Objective, Report
from kit.train.optimizers import build_optimizer, learning_rate
from kit.train.progress import Progress
from kit.train.stop import Stopped

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]
Chunks = list[list[int]]  # this process's share of one batch, in chunks
# (epoch, batch in it) -> (pass over the scans, batch in that pass); views depend on the pass, dropout on both
Place = Callable[[int, int], tuple[int, int]]
MAY_CHANGE = {"checkpoint_minutes", "retry_minutes", "loader_workers"}  # may differ when a run is resumed


class TrainingError(KitError, RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass(frozen=True)
class Settings:
    """Settings of the loop, named like the notebooks' parameters."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: str
    schedule: str
    seed: int
    warmup_fraction: float = 0.0
    layer_decay: float = 1.0  # learning-rate factor from each stage of the encoder to the one before; 1: none
    patience: int = 0  # epochs without improvement after which training stops; 0: never
    beta2: float = 0.999  # of Adam and AdamW
    accumulate: int = 1  # batches averaged into one step
    chunk: int = 0  # scans of a process that run at a time (with session pairs: pairs); 0: its whole share
    clip: float = 0.0  # largest norm of the gradient; 0: no clipping
    ema: float = 0.0  # decay of the moving average of the weights, which is kept; 0: none; see `moving_average`
    checkpoint_minutes: float = 10.0
    retry_minutes: float = 30.0  # how long the disk may stay full
    loader_workers: int = 0
    precision: str = "fp32"  # of the network while it trains, see `kit.device`
    torch_compile: bool = False  # compile the encoder by torch.compile

    @classmethod
    def of(cls, params: Any, **changes: Any) -> Settings:
        """Take the loop's settings from a notebook's parameters."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: getattr(params, name) for name in names if hasattr(params, name)}, **changes})


def as_counted(epoch: int, number: int) -> tuple[int, int]:
    """The default `Place`, for epochs that take each scan at most once: each epoch is one pass."""
    return epoch, number


@loading_may_fail()
def fit(objective: Objective, train: PreparedScans, batches: Callable[[int], list[list[int]]],
        validation: PreparedScans, settings: Settings, folder: Path | None = None, *,
        params: dict[str, Any] | None = None, stop: Path | None = None, live: bool = False,
        monitor: Callable[[Any, int], dict[str, float]] | None = None,
        place: Place = as_counted) -> pd.DataFrame:
    """Train an objective; the best epoch has the lowest validation loss, or the lowest `monitor` if that is returned.

    An epoch is the interval between two validations: one pass over the scans, or whatever `batches` returns.

    Args:
        objective: see `kit.train.objectives.Objective`.
        train: scans to learn from.
        batches: the global batches of an epoch, as scan numbers.
        validation: scans of other participants. With fewer than two there is no validation loss, and the training loss
            decides which epoch is best and when patience ends.
        settings: see `Settings`.
        folder: of the run, for `log.csv` and `checkpoints/`, from which it resumes; None writes nothing.
        params: what must be the same when the run is resumed; by default the settings.
        stop: file that asks the run to stop.
        live: write `live.json` and TensorBoard's files.
        monitor: called by rank 0 after each epoch with the objective and the epoch's number from 1. The numbers
            it returns join the log's row; one named `monitor` is minimised instead of the validation loss.
        place: which pass over the scans a batch belongs to, and its number in that pass; see `Place`.

    Returns:
        one row per epoch: epoch, loss and whatever else the objective reports, gradient_norm (with `clip`),
        learning_rate, the same report on validation scans (`validation_loss`, ...) and what `monitor` returned (both on
        rank 0 only), monitor (the value to minimise), seconds (of a resumed epoch: since then). `objective` holds the
        last epoch's weights (their moving average with `ema`), and `best.pt` the best epoch's; without a folder,
        `objective` holds the best.

    Raises:
        TrainingError: the loss or its gradient is not finite; names the scans of that step. Or a batch has fewer scans
            than there are processes.
        StoreError: a scan could not be read. If rank 0 was reading it, a checkpoint was written first; if another rank
            was, the last regular checkpoint remains.
        MemoryError: a step does not fit into memory; names a chunk size to try.
        CheckpointError: the folder holds checkpoints of other parameters or only damaged ones, or the processes read
            different ones, or the disk was full for too long.
        LoaderError: loading processes cannot be started, or one died.
        Stopped: the stop file was there; a checkpoint was written.
    """
    state = State(objective, settings, folder, params)
    state.restore()
    if len(resumed := set(of_all_processes((len(state.log), len(state.reports))))) > 1:
        listed = ", ".join(f"epoch {epoch + 1} after {step} steps" for epoch, step in sorted(resumed))
        raise checkpoint.CheckpointError(
            f"{folder and shown(folder / 'checkpoints')}: the processes read different checkpoints ({listed}), so the "
            "nodes do not see the same files yet; start the run again in a minute")
    if state.log and rank() == 0:
        state.write_log()  # in case the run was killed between checkpoint and log
    saver = checkpoint.Saver(folder if rank() == 0 else None, settings.checkpoint_minutes, settings.retry_minutes)
    counts = {epoch: math.ceil(len(batches(epoch)) / settings.accumulate) for epoch in {0, settings.epochs - 1}}
    total = counts[0] * (settings.epochs - 1) + counts[settings.epochs - 1]  # the last epoch may be shorter
    progress = Progress(folder if live else None, total, min(state.step(counts[0]), total))
    best, best_weights = min(map(_monitored, state.log), default=math.inf), None

    while len(state.log) < settings.epochs and not state.out_of_patience():
        epoch, started = len(state.log), time.monotonic()
        first = len(state.reports)  # steps of this epoch before a resume
        steps, stream = _scans_of(objective, train, batches(epoch), settings, first)
        objective.train()
        for number in range(first, len(steps)):
            state.set_rate(epoch + number / len(steps))
            try:
                with explained_out_of_memory(steps[number], objective.scans_per_item):
                    places = [place(epoch, number * settings.accumulate + batch) for batch in range(len(steps[number]))]
                    own = state.gradients(stream, steps[number], places)
            except StoreError:
                saver.save(state.plain(), wait=True)
                raise
            asked = torch.tensor(float(stop is not None and stop.exists()), device=device())
            report = mean_over_processes({**own, "gradient_norm": state.gradient_norm(), "stop": asked})
            if not (math.isfinite(report["loss"]) and math.isfinite(report["gradient_norm"])):
                of_step = batches(epoch)[number * settings.accumulate:(number + 1) * settings.accumulate]
                names = [train.scans[scan] for batch in of_step for scan in batch]
                last = folder and folder / "checkpoints/last.pt"
                loss = report["loss"]
                what = (f"the loss is {loss}" if not math.isfinite(loss) else
                        f"the gradient is not finite (the loss is {loss:g})")
                raise TrainingError(
                    f"{what} in epoch {epoch + 1}, step {number + 1}; scans: {', '.join(names)}. "
                    "Look at those scans, lower learning_rate, or set clip: 1"
                    + (f"; {shown(last)} is from before that step" if last and last.exists() else ""))
            stopped = report.pop("stop") > 0
            state.update(report)
            scans = world_size() * sum(len(chunk) for chunks in steps[number] for chunk in chunks)
            progress.note(epoch, report, state.rate, scans, stream.seconds / (number + 1 - first))
            if stopped:
                saver.save(state.plain(), wait=True)
                progress.close()
                raise Stopped(pd.DataFrame([*state.log, state.row(epoch)]))
            if saver.due():
                saver.save(state.plain())
        row = state.row(epoch)
        if rank() == 0:
            try:
                validated = validate(state.kept, validation, settings.batch_size)
                row |= {f"validation_{name}": value for name, value in validated.items()}
                row |= monitor(state.kept, epoch + 1) if monitor else {}
            except StoreError:
                saver.save(state.plain(), wait=True)
                raise
        row["monitor"] = of_first_process(row.get("monitor", row.get("validation_loss", row["loss"])))
        row["seconds"] = round(time.monotonic() - started, 2)
        progress.add(row, "epoch")
        state.log, state.reports = [*state.log, row], []
        better = epoch == 0 or _monitored(row) < best
        if better:
            best = _monitored(row)
            best_weights = None if folder else {key: value.clone() for key, value in state.kept.state_dict().items()}
        saver.save(state.plain(), best=better, wait=True, also=state.write_log)
    progress.close()
    if best_weights is not None:
        objective.load_state_dict(best_weights)
    elif state.average:
        objective.load_state_dict(state.kept.state_dict())
    return pd.DataFrame(state.log)


def _monitored(row: dict[str, float]) -> float:
    """The value that decides which epoch is the best; nan counts as the worst."""
    return math.inf if math.isnan(row["monitor"]) else row["monitor"]


def _scans_of(objective: Objective, train: PreparedScans, batches: list[list[int]], settings: Settings,
              done: int) -> tuple[list[list[Chunks]], Waiting]:
    """Steps of an epoch (this process's chunks of each batch), and a loader stream for the steps not done yet."""
    chunked = [chunks_of(batch, settings.chunk, objective.compares, objective.scans_per_item) for batch in batches]
    steps = [chunked[start:start + settings.accumulate] for start in range(0, len(chunked), settings.accumulate)]
    chunks = [chunk for step in steps[done:] for chunk in reads(step, objective.compares)]
    return steps, Waiting(load_batches(train, chunks, settings.loader_workers))


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


class State:
    """State of a run: everything a checkpoint holds, and the methods that change it."""

    def __init__(self, objective: Objective, settings: Settings, folder: Path | None,
                 params: dict[str, Any] | None) -> None:
        self.threads = set_threads()
        self.objective, self.settings, self.folder = objective, settings, folder
        module = on_device(cast(nn.Module, objective))
        if settings.torch_compile:
            objective.encoder.compile(dynamic=False)
        # `find_unused_parameters` fixes DDP's bucket order from step 1, so resumed runs are bit-identical
        self.model: nn.Module = (
            DistributedDataParallel(module, find_unused_parameters=True, forward_sync_buffers=False)
            if world_size() > 1 else module)
        self.optimizer = build_optimizer(module, settings)
        self.average = (AveragedModel(module, multi_avg_fn=moving_average(settings.ema), use_buffers=True)
                        if settings.ema else None)
        self.kept = cast(Objective, self.average.module) if self.average else objective
        self.params = params or {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
        self.log: list[dict[str, float]] = []  # one row per epoch
        self.reports: list[dict[str, float]] = []  # one per step of the unfinished epoch
        self.rate = 0.0  # learning rate

    def step(self, steps_per_epoch: int) -> int:
        """Steps done so far."""
        return steps_per_epoch * len(self.log) + len(self.reports)

    def set_rate(self, epoch: float) -> None:
        """Set the learning rate for a (fractional) epoch."""
        self.rate = learning_rate(self.settings, epoch / self.settings.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("scale", 1.0)

    def out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought no improvement."""
        values = [_monitored(row) for row in self.log]
        return 0 < self.settings.patience <= len(values) - 1 - int(np.argmin(values)) if values else False

    def gradients(self, stream: Iterator[Batch], step: list[Chunks], places: list[tuple[int, int]]) -> Report:
        """Compute the gradients of a step afresh, see `gradients`.

        Raises:
            StoreError: a scan could not be read; the running statistics are as before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        buffers = list(cast(nn.Module, self.objective).buffers())
        several = sum(map(len, step)) > 1  # a single chunk is read before any statistics change
        before = [buffer.clone() for buffer in buffers] if several else []
        try:
            return gradients(self.model, self.objective, stream, step, places, self.settings.seed,
                             self.settings.precision)
        except StoreError:
            for buffer, value in zip(buffers, before, strict=False):
                buffer.copy_(value)
            raise

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the gradient over all parameters, a scalar; not finite if any of it is not."""
        given = [weight.grad for weight in self.objective.parameters()]
        return nn.utils.get_total_norm([gradient for gradient in given if gradient is not None])

    def update(self, report: dict[str, float]) -> None:
        """Clip the gradient if asked, step the optimiser and the moving average, and keep the report.

        Of the report, `gradient_norm` is kept only if the gradient is clipped.
        """
        if self.settings.clip:
            norm = torch.tensor(report["gradient_norm"], device=device())
            nn.utils.clip_grads_with_norm_(self.objective.parameters(), self.settings.clip, norm)
        else:
            report.pop("gradient_norm", None)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(cast(nn.Module, self.objective))
            buffers = zip(self.average.module.buffers(), cast(nn.Module, self.objective).buffers(), strict=True)
            for kept, now in buffers:
                if not kept.is_floating_point():  # torch averages indices in float32 and truncates them
                    kept.copy_(now)
        self.reports.append(report)

    def row(self, epoch: int) -> dict[str, float]:
        """Log row of an epoch: means over its steps so far."""
        means = {name: float(np.mean([report[name] for report in self.reports])) for name in self.reports[0]}
        return {"epoch": epoch + 1, **means, "learning_rate": self.rate}

    def write_log(self) -> None:
        """Write `log.csv` of the finished epochs."""
        assert self.folder is not None  # without one nothing is restored or saved
        write_table(self.folder / "log.csv", pd.DataFrame(self.log))

    def plain(self) -> dict[str, Any]:
        """The state as a checkpoint holds it."""
        # `restore` skips "scaler" and "random": bfloat16 needs no scaler, and all randomness is keyed
        return {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else {}, "scaler": {},
                "scheduler": {"rate": self.rate},
                "position": {"epoch": len(self.log), "step": len(self.reports)},
                "random": {"seed": self.settings.seed, "torch": torch.get_rng_state()},
                "log": self.log, "losses": self.reports, "params": self.params, "workers": world_size(),
                "threads": self.threads, "versions": versions()}

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            CheckpointError: it was made with other parameters, or none can be read.
        """
        if self.folder is None or (
                saved := checkpoint.read_checkpoint(self.folder / "checkpoints", set_aside=rank() == 0)) is None:
            return
        checkpoint.check_same(saved, self.params, self.folder)
        self.objective.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.log, self.reports = saved["log"], saved["losses"]
        self.rate = saved["scheduler"]["rate"]
        now = {"workers": world_size(), "threads": self.threads, **versions()}
        old = {"workers": saved["workers"], "threads": saved["threads"], **saved["versions"]}
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in now.items() if old.get(name) != value]
        if changed and rank() == 0:
            before, after = (self.normalised_together(workers) for workers in (saved["workers"], world_size()))
            effect = ("results stay valid, but may differ in their last digits" if before == after else
                      f"BatchNorm now sees up to {after} scans at a time instead of {before}, so results differ")
            print(f"resumed with {', '.join(changed)}: {effect}")

    def normalised_together(self, workers: int) -> int:
        """Most scans that BatchNorm sees at a time: one chunk of every process; 0 without BatchNorm."""
        if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.model.modules()):
            return 0
        chunk, items = self.settings.chunk, self.settings.batch_size
        return self.objective.scans_per_item * min(chunk * workers or items, items)


def moving_average(decay: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    """Make a `multi_avg_fn` of torch's `AveragedModel`, whose decay rises to `decay`: after n steps it is at most
    (1 + n) / (10 + n), as in TensorFlow's `ExponentialMovingAverage`, so that the first weights are soon forgotten."""
    def average(kept: Tensors, now: Tensors, steps: torch.Tensor | int) -> None:
        n = float(steps)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(kept, now, steps)

    return average


def chunks_of(batch: list[int], chunk: int, equal: bool = True, scans_per_item: int = 1) -> Chunks:
    """This process's share of a global batch, in chunks.

    Args:
        batch: scan numbers.
        chunk: items at a time; 0 takes the whole share.
        equal: give all processes equally many items, as objectives that compare scans need, and drop the rest. If
            false, shares may differ by one item. The rest is dropped even then if the extra item would need a chunk of
            its own: all processes must run equally many chunks, or synchronised BatchNorm waits forever.
        scans_per_item: neighbouring scans of the batch that stay together.

    Raises:
        TrainingError: there are more processes than items.
    """
    items = np.asarray(batch).reshape(-1, scans_per_item)
    each = len(items) // world_size()
    if not each:
        raise TrainingError(f"a batch of {len(items)} {'scans' if scans_per_item == 1 else 'pairs of scans'} (one per "
                            f"participant) for {world_size()} processes: use fewer workers, or more participants")
    own_chunk = chunk > 0 and each % chunk == 0  # an extra item would need a chunk of its own
    used = each * world_size() if equal or own_chunk else len(items)
    share = np.array_split(items[:used], world_size())[rank()]
    size = chunk or len(share)
    return [share[start:start + size].flatten().tolist() for start in range(0, len(share), size)]


def reads(step: list[Chunks], twice: bool) -> Chunks:
    """Order in which `gradients` takes scans from the loader; with `twice`, chunks that run twice are read twice."""
    return [chunk for chunks in step for chunk in (chunks * 2 if twice and len(chunks) > 1 else chunks)]


def gradients(model: nn.Module, objective: Objective, stream: Iterator[Batch], step: list[Chunks],
              places: Sequence[tuple[int, int]], seed: int, precision: str = "fp32") -> Report:
    """Accumulate the gradient of a step's loss, averaged over its batches.

    Batches may be split into chunks. An objective that compares scans (SimCLR) then embeds chunk by chunk without a
    graph, computes the loss's gradient with respect to the embeddings, and runs each chunk again to backpropagate it
    (gradient caching, Gao et al. 2021, arXiv 2101.06983). Memory is that of one chunk, and BatchNorm sees one chunk of
    every process at a time. Any other objective's loss is a mean over scans, so the gradients of its chunks add up.

    Args:
        model: `objective`, or its DistributedDataParallel.
        stream: batches in the order of `reads`.
        step: the batches, in chunks.
        places: (pass, number) of each batch, see `Place`. The pass keys the views; seed, pass, number and rank seed
            torch's random state.

    Returns:
        what the objective reports, averaged over the step on this process.
    """
    reports = []
    for index, (chunks, (epoch, number)) in enumerate(zip(step, places, strict=True)):
        seeds = np.random.SeedSequence([seed, epoch, number, rank()]).generate_state(len(chunks)).tolist()
        last = index == len(step) - 1
        if len(chunks) > 1 and objective.compares:
            reports.append(_cached(model, objective, stream, seeds, epoch, len(step), last, precision))
            continue
        own = torch.tensor(float(sum(len(chunk) for chunk in chunks)), device=device())
        scans = mean_over_processes({"scans": own})["scans"]  # a process's mean share: DDP averages over processes
        weighted = []
        for chunk, chunk_seed in zip(chunks, seeds, strict=True):
            weight = len(chunk) / scans
            with _exchange(model, last and chunk is chunks[-1]):
                out = run_model(model, next(stream), epoch, chunk_seed, precision)
                (out["loss"] * (weight / len(step))).backward()
            weighted.append({name: value.detach() * weight for name, value in out.items()})
        reports.append({name: torch.stack([report[name] for report in weighted]).sum() for name in weighted[0]})
    return {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}


def _cached(model: nn.Module, objective: Objective, stream: Iterator[Batch], seeds: list[int], epoch: int,
            batches: int, last: bool, precision: str) -> Report:
    with torch.no_grad(), _frozen_statistics(cast(nn.Module, objective)):
        of_chunks = [run_model(objective, next(stream), epoch, seed, precision, embed=True) for seed in seeds]
    embeddings = torch.cat(of_chunks, dim=1).requires_grad_()  # (2, items, width)
    out = objective.compare(*embeddings)
    (out["loss"] / batches).backward()
    assert embeddings.grad is not None  # they are a leaf, and the pass is done
    gradients_of_chunks = embeddings.grad.split([chunk.shape[1] for chunk in of_chunks], dim=1)
    for gradient, seed in zip(gradients_of_chunks, seeds, strict=True):
        with _exchange(model, last and gradient is gradients_of_chunks[-1]):
            run_model(model, next(stream), epoch, seed, precision, embed=True).backward(gradient)
    return {name: value.detach() for name, value in out.items()}


def run_model(model: nn.Module | Objective, batch: Batch, epoch: int, seed: int, precision: str,
              **options: bool) -> Any:
    """Run an objective on a batch in "fp32" or "bf16", with torch's random state seeded by `seed`."""
    torch.manual_seed(seed)
    where = next(model.parameters()).device
    with autocast(precision, where):
        return model(batch.to(where), epoch, **options)


def _exchange(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Let processes exchange gradients only in the last backward pass of a step."""
    return nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync()


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Freeze BatchNorm's running statistics, so that only the second pass over a chunk updates them."""
    norms = [(norm, norm.momentum, count, count.clone()) for norm in module.modules()
             if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (count := norm.num_batches_tracked) is not None]
    try:
        for norm, *_ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, count, before in norms:
            norm.momentum = momentum
            count.copy_(before)


@contextmanager
def explained_out_of_memory(step: list[Chunks], scans_per_item: int = 1) -> Iterator[None]:
    """If a step does not fit into memory, name the chunk size to try, which is in items.

    Raises:
        MemoryError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator has no own type
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        scans = max(len(chunk) for chunks in step for chunk in chunks)
        cure = (f"set `chunk: {scans // scans_per_item // 2}` (the loss stays that of the whole batch; BatchNorm then "
                "sees the chunk), or spread the batch over more workers"
                ) if scans > scans_per_item else "take a coarser grid or a smaller network"
        raise MemoryError(f"out of memory with {scans} scans at a time: {cure}") from error


@torch.no_grad()
def validate(objective: Objective, scans: PreparedScans, batch_size: int) -> dict[str, float]:
    """Average what the objective reports over validation scans, in evaluation mode and float32, with the same draws.

    `scans_at_a_time` of them run together. An objective that compares scans does so in near-equal groups of at most
    `batch_size`, so that no group is a single scan, which always finds its partner. Empty for fewer than two scans.
    """
    if len(scans) < 2:
        return {}
    objective.eval()
    size, compared = scans_at_a_time(scans.store.grid.shape), objective.compares
    count = math.ceil(len(scans) / (batch_size if compared else size))
    groups = np.array_split(np.arange(len(scans)), min(count, len(scans) // 2) if compared else count)
    chunked = [[group[start:start + size].tolist() for start in range(0, len(group), size)] for group in groups]
    stream = load_batches(scans, [chunk for chunks in chunked for chunk in chunks])
    total: dict[str, float] = {}
    options = {"embed": True} if compared else {}
    for group, chunks in zip(groups, chunked, strict=True):
        with evaluation(device()):
            out = [run_model(objective, next(stream), 0, 0, "fp32", **options) for _ in chunks]
            report = objective.compare(*torch.cat(out, dim=1)) if compared else out[0]
        for name, value in report.items():
            total[name] = total.get(name, 0.0) + float(value) * len(group) / len(scans)
    return total


def versions() -> dict[str, str]:
    """Versions that a run's exact bits depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
