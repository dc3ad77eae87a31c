"""Evaluation: what a probe saves by embedding scans once, and what embedding costs beside the network itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.ratio import Ratio, cpu_seconds, share, times_better
from benchmarks.training import DEMO, made_scans
from kit.device import evaluation, on_device, scans_at_a_time
from kit.evaluate.predict import predict
from kit.evaluate.probe import fit_probe
from kit.machine import keep_freed_memory
from kit.models.encoders import build_encoder
from kit.runs import write_whole

SCANS, EPOCHS = 64, 50


def measure() -> list[Ratio]:
    """A probe on kept features against a frozen encoder that embeds in each epoch; embedding against bare forwards."""
    keep_freed_memory()
    encoder = on_device(build_encoder("resnet18_narrow", DEMO)).eval()
    labels, size = np.arange(SCANS) % 2, scans_at_a_time(DEMO)
    batches = [torch.randn(size, 1, *DEMO) for _ in range(SCANS // size)]
    with tempfile.TemporaryDirectory() as folder:
        scans, path = made_scans(Path(folder), DEMO, SCANS), Path(folder) / "features.npy"

        def cached(repeat: int) -> None:
            write_whole(path, lambda aside: np.save(aside, predict(encoder, scans)))
            features = np.load(path)
            fit_probe(features, labels, features, labels, "classification")

        def an_epoch(repeat: int) -> None:
            predict(encoder, scans)

        @torch.no_grad()
        def bare(repeat: int) -> None:
            with evaluation(torch.device("cpu")):
                for images in batches:
                    encoder(images)

        ours, epoch, forwards = cpu_seconds(cached, an_epoch, bare, repeats=5)
    what = f"{SCANS} scans of {'x'.join(map(str, DEMO))}, resnet18_narrow, one thread"
    return [times_better("probe_cached", ours, EPOCHS * epoch, 20, "CPU-seconds",
                         f"{what}: embedded once, kept, and a probe fitted with each of its penalties, against "
                         f"{EPOCHS} epochs that embed with a frozen encoder again (their linear layer not counted)"),
            share("embed_vs_bare", epoch, forwards, 1.1, "CPU-seconds",
                  f"{what}: read and embedded, against the same network on scans that lie in memory")]
