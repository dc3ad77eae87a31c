"""Saliency: noisy copies and occluded cubes many at a time, beside one pass each."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.ratio import Ratio, cpu_seconds, times_better
from kit.explain.saliency import Options, cubes, saliency
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.preprocess.template import template_on
from kit.store.grid import Grid

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
    return ratios
