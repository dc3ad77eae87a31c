"""Saliency: noisy copies and occluded cubes many at a time, beside one pass each."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.ratio import Ratio, cpu_seconds, share, times_better
from kit.explain.saliency import Options, cubes, saliency
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.preprocess.template import template_on
from kit.store.grid import PAPER_GRID, Grid

DEMO = Grid((36, 48, 40), 4.0)


def measure() -> list[Ratio]:
    """On the demo's grid; at full size one scan runs at a time in any case."""
    model = Predictor(build_encoder("resnet18_narrow", DEMO)).eval()
    mask = template_on(DEMO)[1]
    image = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0).astype(np.float32)
    ratios = []
    for method, passes in (("smoothgrad", 16), ("occlusion", int(cubes(mask, 6).max()) + 1)):
        options = Options(samples=16, patch=6)

        def many(_: int, method: str = method, options: Options = options) -> np.ndarray:
            return saliency(model, image, mask, method, options=options)

        def one(_: int, method: str = method, options: Options = options) -> np.ndarray:
            return saliency(model, image, mask, method, options=options._replace(batch=1))

        ours, peer = cpu_seconds(many, one, repeats=3)
        ratios.append(times_better(f"{method}_batched", ours, peer, 1.0, "CPU-seconds",
                                   f"{method} of one scan of 36x48x40, resnet18_narrow, {passes} passes on "
                                   f"{torch.get_num_threads()} thread, against one pass at a time"))
    return [*ratios, full_size()]


def full_size() -> Ratio:
    """Integrated gradients of a full-size scan beside as many bare gradients: what the method itself costs."""
    torch.manual_seed(0)
    model, steps = Predictor(build_encoder("resnet18", PAPER_GRID)).eval(), 16
    mask = template_on(PAPER_GRID)[1]
    image = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0).astype(np.float32)

    def bare() -> None:
        scan = torch.from_numpy(image)[None, None].requires_grad_()
        torch.autograd.grad(model(scan).sum(), scan)

    spent = []
    for work in (bare, bare, bare, lambda: saliency(model, image, mask, "integrated_gradients",
                                                    options=Options(steps=steps))):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return share("integrated_gradients_full_size", spent[3] / steps, float(np.mean(spent[1:3])), 1.2, "CPU-seconds",
                 f"a step of integrated gradients of {steps} steps, one scan of 150x192x192, resnet18, on "
                 f"{torch.get_num_threads()} thread; the share of a bare gradient of the same network")
