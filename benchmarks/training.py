"""Training: the loss against the paper's public code's, and what the loop costs beside the network itself."""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ratio import Ratio, share, times_better
from kit.augment.recipe import read_recipe
from kit.machine import keep_freed_memory
from kit.models.encoders import build_encoder
from kit.store.dataset import Batch, PreparedScans, load_batches
from kit.store.grid import Grid
from kit.store.store import Store, scan_path, write_scan
from kit.train import objectives
from kit.train.distributed import launch, mean_over_processes, process_group, rank, synchronise_batch_norm
from kit.train.loop import Waiting, gradients
from kit.train.loss import nt_xent
from kit.train.objectives import SimCLR

DEMO, CUBE = (36, 48, 40), (96, 96, 96)


class BroadcastNTXent(nn.Module):
    """NT-Xent as the paper's public code has it: a cosine similarity broadcast over (2N, 2N, width)."""

    def __init__(self, batch: int, temperature: float) -> None:
        super().__init__()
        self.batch, self.temperature = batch, temperature
        self.negatives = ~torch.eye(batch, dtype=torch.bool).repeat(2, 2)  # neither the view itself nor its partner
        self.similarity, self.criterion = nn.CosineSimilarity(dim=2), nn.CrossEntropyLoss(reduction="sum")

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        views = torch.cat([first, second])
        similarity = self.similarity(views.unsqueeze(1), views.unsqueeze(0)) / self.temperature
        positives = torch.cat([torch.diag(similarity, self.batch), torch.diag(similarity, -self.batch)])
        logits = torch.cat([positives[:, None], similarity[self.negatives].reshape(len(views), -1)], dim=1)
        return self.criterion(logits, torch.zeros(len(views), dtype=torch.long)) / len(views)


def measure() -> list[Ratio]:
    """The loss at the paper's global batch of 72 and at 512; data's share; the loop's cost; two processes."""
    keep_freed_memory()  # as the loop does; the bare step profits from it, too
    return [*_losses(), *_loop(DEMO, 16, 6, "demo"), *_loop(CUBE, 4, 4, "96"),
            _two_processes(DEMO, 16, 10, "demo"), _two_processes(CUBE, 4, 5, "96")]


def _losses() -> list[Ratio]:
    """In a process each, by turns: what one frees, and the other then pays for, is measured with neither."""
    ratios, context = [], get_context("spawn")
    for batch, goal, repeats, calls in ((72, 40, 15, 20), (512, 150, 3, 1)):
        with ProcessPoolExecutor(1, context) as ours, ProcessPoolExecutor(1, context) as theirs:
            turns = [[pool.submit(_loss_seconds, batch, calls, pool is theirs).result() for pool in (ours, theirs)]
                     for _ in range(repeats)]
        our_seconds, peer = np.median(turns, axis=0)
        ratios.append(times_better(f"ntxent_vs_paper_{batch}", our_seconds, peer, goal, "CPU-seconds",
                                   f"forward and backward of {batch} pairs of 64, {calls} in a row on a thread, "
                                   "against the public code's cosine similarity broadcast over (2N, 2N, 64)"))
    return ratios


def _loss_seconds(batch: int, calls: int, paper: bool) -> float:
    torch.set_num_threads(1)
    pair = [part.requires_grad_() for part in torch.randn(2, batch, 64).unbind()]
    theirs = BroadcastNTXent(batch, 0.5)

    def run(calls: int) -> float:
        begun = time.process_time()
        for _ in range(calls):
            (theirs(*pair) if paper else nt_xent(*pair, 0.5)[0]).backward()
        return (time.process_time() - begun) / calls

    run(1)  # warms up
    return run(calls)


def _objective(shape: tuple[int, int, int], recipe: str = "weak") -> SimCLR:
    return SimCLR(build_encoder("resnet18_narrow", Grid(shape, 4.0)), read_recipe(recipe), projection=[128, 128, 64],
                  temperature=0.1, seed=0, spacing_mm=4.0)


def made_scans(folder: Path, shape: tuple[int, int, int], count: int) -> PreparedScans:
    """Smooth made-up heads with noise, in a real store."""
    grid, rng = Grid(shape, 4.0), np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    mask = z**2 + y**2 + x**2 < 0.9
    names = [f"scan{number}" for number in range(count)]
    for name in names:
        write_scan(scan_path(folder, name), np.where(mask, rng.normal(size=shape), 0), mask, name, grid.affine)
    rows = pd.DataFrame({"scan": names, "participant": names, "dataset": "made"})
    return PreparedScans(Store(folder, None, {"shape": shape, "spacing_mm": 4.0}), rows)


def _loop(shape: tuple[int, int, int], batch: int, steps: int, name: str) -> list[Ratio]:
    """Steps of the loop, with one loading process, beside bare steps on views that lie in memory."""
    objective = _objective(shape).train()
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
    spent: dict[str, list[float]] = {"data": [], "step": [], "bare": []}
    making, real = [0.0], objectives.make_views

    def timed(*arguments, **options):
        begun = time.perf_counter()
        views = real(*arguments, **options)
        making[0] += time.perf_counter() - begun
        return views

    with tempfile.TemporaryDirectory() as folder:
        scans = made_scans(Path(folder), shape, 2 * batch)
        step = [[list(range(batch))]]
        stream = Waiting(load_batches(scans, [list(range(turn % 2 * batch, turn % 2 * batch + batch))
                                      for turn in range(steps + 2)], 1))
        images = torch.randn(2 * batch, 1, *shape)
        objectives.make_views = timed
        try:
            for turn in range(steps + 2):
                making[0], before, begun = 0.0, stream.seconds, time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                mean_over_processes(gradients(objective, objective, stream, step, [(0, turn)], 0))
                optimizer.step()
                middle = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                nt_xent(*objective.head(objective.encoder(images)).chunk(2), 0.1)[0].backward()
                optimizer.step()
                end = time.perf_counter()
                if turn >= 2:  # the loading process has started
                    spent["step"].append(middle - begun)
                    spent["data"].append(making[0] + stream.seconds - before)
                    spent["bare"].append(end - middle)
        finally:
            objectives.make_views = real
    data, whole, bare = (statistics.median(spent[kind]) for kind in ("data", "step", "bare"))
    what = f"a step of {batch} scans of {'x'.join(map(str, shape))}, resnet18_narrow, one thread, one loading process"
    return [share(f"data_share_{name}", data, whole, 0.10, "seconds", f"waiting for scans and views, within {what}"),
            share(f"step_vs_bare_{name}", whole, bare, 1.15, "seconds", f"{what}, against the same network, loss and "
                  "optimiser on views that lie in memory")]


def _step_seconds(objective: nn.Module, model: nn.Module, shape: tuple[int, int, int], batch: int,
                  steps: int) -> float:
    """Median seconds of a step on one batch that lies in memory."""
    torch.manual_seed(rank())
    images = torch.randn(batch, 1, *shape).half()
    held = Batch(images, torch.ones_like(images, dtype=torch.bool), list(range(batch)), torch.zeros(batch))
    optimizer, taken = torch.optim.AdamW(objective.parameters(), 1e-3), []
    for turn in range(steps + 2):
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        mean_over_processes(gradients(model, objective, iter([held]), [[list(range(batch))]], [(0, turn)], 0))
        optimizer.step()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[2:])


def _worker(shape: tuple[int, int, int], batch: int, steps: int) -> float:
    with process_group():
        torch.set_num_threads(1)
        objective = _objective(shape).train()
        synchronise_batch_norm(objective)
        model = DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
        return _step_seconds(objective, model, shape, batch, steps)


def _two_processes(shape: tuple[int, int, int], batch: int, steps: int, name: str) -> Ratio:
    torch.set_num_threads(1)
    alone = _objective(shape).train()
    turns = [(_step_seconds(alone, alone, shape, batch, steps), launch(_worker, (shape, batch, steps), 2))
             for _ in range(5)]
    one, two = np.median(turns, axis=0)
    return Ratio(f"ddp_efficiency_{name}", two, one, one / two, "higher", 0.85, "seconds",
                 f"a step of {batch} scans of {'x'.join(map(str, shape))} a process, one thread each: one process "
                 "alone over two together, which take twice the scans, with BatchNorm and NT-Xent over both")
