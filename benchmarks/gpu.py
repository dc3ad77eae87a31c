"""What a GPU does with the kit: `make gpu` runs the tests marked `gpu`, measures, and writes `outputs/bench/gpu.json`.

    python -m benchmarks.gpu                                # at the paper's size, where there is a CUDA device
    python -m benchmarks.gpu --device cpu --side 32         # the same code on a CPU, to see that it runs

Each line of the file is `{"name", "value", "unit", "what", "device"}`; a line that could not be measured has its reason
in place of a value.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import made_scans
from kit.augment.recipe import read_recipe
from kit.augment.views import make_views
from kit.device import autocast, on_device
from kit.models.encoders import build_encoder
from kit.runs import outputs_dir, shown, write_json
from kit.store.dataset import Batch, load_batches
from kit.store.grid import PAPER_GRID, Grid
from kit.train.distributed import mean_over_processes
from kit.train.loop import Waiting, gradients
from kit.train.objectives import SimCLR

BATCH, REPEATS = 6, 5  # of the paper's 72 scans on 12 devices; timed after two that are not
LOADERS = 8  # loading processes, as in params/paper; they prefetch two batches each
# Dense bfloat16 operations a second by the makers' data sheets, SXM form: a step's share of peak is of these.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
EPOCHS, SCANS, DEVICES = 1000, 44_958, 12  # the paper's scans, its code's epochs; devices of our choice
MODES = {"fp32": ("fp32", False), "bf16": ("bf16", False), "bf16 torch.compile": ("bf16", True)}


class Bench:
    """Lines of the file, and how they are timed.

    Attributes:
        where: the device.
        grid: of the made-up scans.
        lines: as they are measured; also printed.
    """

    def __init__(self, where: torch.device, grid: Grid) -> None:
        self.where, self.grid = where, grid
        self.device = torch.cuda.get_device_name() if where.type == "cuda" else "CPU"
        self.lines: list[dict[str, Any]] = []

    def note(self, name: str, value: float | str, unit: str, what: str) -> None:
        """Add a line; text in place of a value says why there is none."""
        value = value if isinstance(value, str) else float(f"{value:.4g}")
        self.lines.append({"name": name, "value": value, "unit": unit, "what": what, "device": self.device})
        print(f"  {name:44s} {value} {unit}", flush=True)

    def seconds(self, work: Callable[[int], object]) -> float:
        """Median seconds of a call, the device's queue emptied before and after."""
        spent = []
        for turn in range(REPEATS + 2):
            self._wait()
            begun = time.perf_counter()
            work(turn)
            self._wait()
            spent.append(time.perf_counter() - begun)
        return statistics.median(spent[2:])

    def _wait(self) -> None:
        if self.where.type == "cuda":
            torch.cuda.synchronize()

    def batch(self) -> Batch:
        """Noise in an ellipsoid, on the device."""
        axes = [torch.linspace(-1, 1, side, device=self.where) for side in self.grid.shape]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        mask = (z**2 + y**2 + x**2 < 0.9).expand(BATCH, 1, *self.grid.shape)
        return Batch(torch.randn(mask.shape, device=self.where) * mask, mask.contiguous(), list(range(BATCH)),
                     torch.zeros(BATCH, device=self.where))


def views(bench: Bench) -> None:
    """Views a second by recipe, beside one resampling of the image alone, and beside MONAI's on the same device."""
    from benchmarks.views import monai_views

    batch, size = bench.batch(), "x".join(map(str, bench.grid.shape))
    for name in ("paper", "weak", "physics"):
        recipe = read_recipe(name)

        def make(turn: int, recipe: Any = recipe) -> object:
            return make_views(batch.images, batch.masks, batch.keys, recipe, seed=0, epoch=turn, view=0,
                              spacing_mm=bench.grid.spacing_mm)

        bench.note(f"views {name}", BATCH / bench.seconds(make), "views/s",
                   f"image and mask, recipe {name}, {BATCH} scans of {size} at a time")
    turn = torch.eye(3, 4, device=bench.where)[None].repeat(BATCH, 1, 1) * 0.9
    grid = F.affine_grid(turn, list(batch.images.shape), align_corners=False)
    bench.note("views of one grid_sample", BATCH / bench.seconds(
        lambda _: F.grid_sample(batch.images, grid, align_corners=False)), "views/s",
        "one grid_sample of the image, its grid given: a bound for what resampling alone takes")
    if bench.grid == PAPER_GRID:  # whose pipeline has its size written in
        pipeline = monai_views()
        bench.note("views paper MONAI", 1 / bench.seconds(lambda _: pipeline(batch.images[0, 0], batch.masks[0, 0])),
                   "views/s", "the paper's view by MONAI's transforms on tensors of the device, one scan at a time")


def simclr(bench: Bench, architecture: str) -> SimCLR:
    """The paper's: views by its recipe, a projection to 64."""
    model = SimCLR(build_encoder(architecture, bench.grid), read_recipe("paper"), projection=[512, 512, 64],
                   temperature=0.1, seed=0, spacing_mm=bench.grid.spacing_mm)
    return (on_device(model) if bench.where.type == "cuda" else model).train()


def steps(bench: Bench, architecture: str) -> dict[str, float]:
    """A training step's seconds, memory and share of peak by mode; views are made once, outside.

    Returns:
        seconds by mode, of those that ran.
    """
    images, found = torch.randn(2 * BATCH, 1, *bench.grid.shape, device=bench.where), {}
    operations = operations_of(architecture, bench.grid)
    what = f"{architecture}, two views of {BATCH} scans of {'x'.join(map(str, bench.grid.shape))}, AdamW; views apart"
    for mode, (precision, compiled) in MODES.items():
        torch.compiler.reset()
        model = simclr(bench, architecture)
        if compiled:
            model.encoder.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step(_: int, model: SimCLR = model, optimizer: Any = optimizer, precision: str = precision) -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(precision, bench.where):
                loss = model.compare(*model.head(model.encoder(images)).chunk(2))["loss"]
            loss.backward()
            optimizer.step()

        try:
            if bench.where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found[mode] = bench.seconds(step)
        except (RuntimeError, AssertionError) as error:  # out of memory, or a compiler that is not there
            bench.note(f"step {mode}", f"not measured: {str(error).splitlines()[0][:100]}", "", what)
            continue
        bench.note(f"step {mode}", 1e3 * found[mode], "ms", what)
        if bench.where.type == "cuda":
            bench.note(f"memory {mode}", torch.cuda.max_memory_allocated() / 1e9, "GB", what)
        peak = next((value for name, value in PEAK.items() if name in bench.device), None)
        if peak:
            bench.note(f"share of peak {mode}", operations / found[mode] / peak, "",
                       f"{what}; counted operations over the data sheet's dense bfloat16 speed")
    return found


def operations_of(architecture: str, grid: Grid) -> float:
    """Multiplications and additions of a step's forward and backward pass, counted without computing anything."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        encoder = build_encoder(architecture, grid).train()
        encoder(torch.empty(2 * BATCH, 1, *grid.shape)).square().mean().backward()
    return counter.get_total_flops()


def whole(bench: Bench, architecture: str, found: dict[str, float], compiled: bool) -> None:
    """A step with its views and its loading, what share these are, and what the paper's run would take."""
    mode = "bf16 torch.compile" if compiled else "bf16"
    if mode not in found:
        return
    torch.compiler.reset()
    model = simclr(bench, architecture)
    if compiled:
        model.encoder.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        scans = made_scans(Path(folder), bench.grid.shape, 2 * BATCH)
        share, fetched = [[list(range(BATCH))]], 2 * LOADERS + 4
        stream = Waiting(load_batches(scans, [list(range(turn % 2 * BATCH, (turn % 2 + 1) * BATCH))
                                              for turn in range(2 * fetched)], LOADERS))
        for turn in range(2 * fetched):  # as `kit.train.loop.fit`; timed once what was prefetched at first is used up
            if turn == fetched:
                waited, begun = stream.seconds, time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            mean_over_processes(gradients(model, model, stream, share, [(0, turn)], 0, "bf16"))
            optimizer.step()
        seconds, waiting = ((end - start) / fetched for start, end in (
            (begun, time.perf_counter()), (waited, stream.seconds)))
    what = f"{architecture}, {mode}, {BATCH} scans, the paper's recipe, {LOADERS} loading processes"
    bench.note(f"whole step {mode}", 1e3 * seconds, "ms", what)
    bench.note(f"scans per second {mode}", BATCH / seconds, "scans/s", what)
    bench.note(f"share of waiting for scans {mode}", waiting / seconds, "", what)
    bench.note(f"share of views and loading {mode}", max(0.0, 1 - found[mode] / seconds), "",
               f"{what}, beside the bare step")
    hours = EPOCHS * SCANS / BATCH / DEVICES * seconds / 3600
    bench.note(f"hours of a long run {mode}", hours, "hours", f"{what}: {EPOCHS} epochs of {SCANS} scans on {DEVICES} "
               "such devices, the exchange of gradients not counted")


def main() -> int:
    """Test, measure, write; where there is no CUDA device, say so."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--side", type=int, default=0, help="cubes of so many voxels in place of the paper's grid")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--no-tests", action="store_true", help="only the figures")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: no CUDA device here, so nothing was tested or measured")
        return 0
    failed = 0
    if chosen.device == "cuda" and not chosen.no_tests:
        failed = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]).returncode
    grid = Grid((chosen.side,) * 3, 4.0) if chosen.side else PAPER_GRID
    bench = Bench(torch.device(chosen.device), grid)
    print(f"{bench.device}, torch {torch.__version__}")
    views(bench)
    found = steps(bench, chosen.architecture)
    for compiled in (False, True):
        whole(bench, chosen.architecture, found, compiled)
    path = outputs_dir() / "bench" / ("gpu.json" if chosen.device == "cuda" else "gpu_on_cpu.json")
    write_json(path, bench.lines)
    print(shown(path))
    return failed


if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    sys.exit(main())
