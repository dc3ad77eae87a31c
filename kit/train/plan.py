"""Estimate what a run needs before it starts: device memory, hours, and scans per second from the store."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kit.device import autocast, device, on_device
from kit.models.encoders import brain_patches
from kit.models.mae import masks_for, seen_tokens
from kit.params import Pretrain
from kit.store.dataset import Batch
from kit.store.store import Store
from kit.train.loop import explained_out_of_memory
from kit.train.objectives import VALIDATION_EPOCH, MaskedReconstruction
from kit.train.pretrain import OBJECTIVES, Pretext, batches_for, build_objective, choose_scans

# operations per second of resnet18 on an H200 at the paper's grid (docs/cluster.md), for where there is no CUDA device
SUSTAINED = {"fp32": 58e12, "bf16": 96e12}
DEVICES = (1, 4, 12)


class Need(NamedTuple):
    """What one training step needs; for SimCLR a scan means its two views."""

    parameters: int  # trainable
    operations: float  # multiplications and additions per scan, forward and backward, counted
    # float32 weights, their moving average, gradients, optimiser's state; with bf16 also a copy of the weights
    fixed_bytes: float
    scan_bytes: float  # activations that a scan keeps for the backward pass, counted in the run's precision

    def memory(self, scans: int) -> float:
        """Device memory in bytes with `scans` at a time, without cuDNN's workspace."""
        return self.fixed_bytes + scans * self.scan_bytes


def need(params: Pretrain, store: Store) -> Need:
    """Count operations and stored activations at the store's shape, without computing or allocating anything.

    Args:
        params: of the run.
        store: whose grid gives the shape.
    """
    parameters, operations, kept = _counted(params, store, 2)
    more = _counted(params, store, 4)[2]
    state = {"adam": 2, "adamw": 2, "lars": 1}[params.optimizer] + 2 + bool(params.ema)  # float32 copies
    copies = 2 if params.precision == "bf16" else 0  # bytes per weight
    # the difference between 4 scans and 2 leaves out what is kept once, such as these copies
    return Need(parameters, operations / 2, (4.0 * state + copies) * parameters, (more - kept) / 2)


def _counted(params: Pretrain, store: Store, scans: int) -> tuple[int, int, int]:
    """Trainable parameters, operations of a step of so many scans, and the bytes it keeps for the backward pass."""
    shape, mae = store.grid.shape, params.objective == "mae"
    if mae:
        seen = seen_tokens(masks_for(range(scans), len(brain_patches(store.grid)), params.mask_ratio, seed=0, epoch=0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = build_objective(params, store).train()
        parameters = sum(weight.numel() for weight in objective.parameters() if weight.requires_grad)
        own = {weight.untyped_storage()._cdata for weight in objective.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False)
        with counter, saved_tensors_hooks(keep, lambda tensor: tensor), autocast(params.precision, torch.device("cpu")):
            if isinstance(objective, MaskedReconstruction):
                out = objective.autoencoder.fill_in(torch.empty(scans, 1, *shape), seen)
            else:
                out = objective.head(objective.encoder(torch.empty(2 * scans, 1, *shape)))
            out.square().mean().backward()
    return parameters, counter.get_total_flops(), sum(kept.values())


def seconds_per_item(params: Pretrain, store: Store, wanted: Need, items: int) -> tuple[float, str]:
    """Return the seconds per item of a training step of `items` scans (with session pairs: pairs), and their source.

    Measured if there is a CUDA device, with fewer at a time if they do not fit into its memory; else estimated from the
    counted operations and an H200's speed.

    Raises:
        MemoryError: not even one scan (with session pairs: pair) fits.
    """
    where = device()
    if where.type != "cuda":
        speed = SUSTAINED[params.precision]
        return (wanted.operations / speed,
                f"ESTIMATED from counted operations at {speed / 1e12:g} Tflop/s a device, what resnet18 reaches on an "
                f"H200 in {params.precision}; nothing was measured here; views are not counted")
    objective = on_device(build_objective(params, store)).train()
    if params.torch_compile:
        objective.encoder.compile(dynamic=False)
    while True:
        scans = items * objective.scans_per_item
        try:
            with explained_out_of_memory([[list(range(scans))]], objective.scans_per_item):
                seconds = _measured(objective, scans, store.grid.shape, params.precision) / items
            return seconds, f"measured on {torch.cuda.get_device_name()}, {scans} scans at a time"
        except MemoryError:
            if items == 1:
                raise
        items //= 2


def _measured(objective: Pretext, scans: int, shape: Sequence[int], precision: str) -> float:
    """Seconds of a forward and backward pass of so many scans on the CUDA device."""
    where, size = device(), (scans, 1, *shape)
    batch = Batch(torch.randn(size, device=where), torch.ones(size, dtype=torch.bool, device=where),
                  list(range(scans)), torch.zeros(scans, device=where))
    for turn in range(6):
        if turn == 3:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        with autocast(precision, where):
            objective(batch, VALIDATION_EPOCH)["loss"].backward()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / 3


def plan(params: Pretrain) -> tuple[pd.DataFrame, str]:
    """Estimate hours of training on 1, 4 and 12 devices, and what else it needs.

    Args:
        params: of the run; with `epochs: 0` the plan is for 1000 epochs.

    Returns:
        one row per number of devices: devices, scans_at_a_time and memory_gb of each device (with session pairs: pairs
        at a time), hours, gpu_hours, scans_per_second (that the store must deliver); and a summary in words.

    Raises:
        MemoryError: see `seconds_per_item`.
    """
    store = Store.open(params.prepared)
    learned = choose_scans(params, store)[0]
    epochs, wanted = params.epochs or 1000, need(params, store)
    batches = batches_for(params, learned)(0)
    sizes = [len(batch) // (2 if params.session_pairs else 1) for batch in batches]
    size = max(sizes)  # a small cohort does not fill `batch_size`
    # shares are equal if scans are compared; otherwise they differ by one scan at most
    rounded = math.floor if OBJECTIVES[params.objective].compares else math.ceil
    shares = [max(rounded(size / devices), 1) for devices in DEVICES]
    at_a_time = [min(params.chunk or share, share) for share in shares]
    per_item, source = seconds_per_item(params, store, wanted, at_a_time[-1])
    read = sum(map(len, batches)) * epochs
    scans = read / 2 if params.session_pairs else read  # each of a pair's two sessions gives one view
    rows: list[dict[str, Any]] = []
    for devices, share, together in zip(DEVICES, shares, at_a_time, strict=True):
        twice = together < share and OBJECTIVES[params.objective].compares  # chunks are read and run forward twice
        seconds = scans * per_item * (4 / 3 if twice else 1) / devices
        rows.append({"devices": devices, "scans_at_a_time": together, "memory_gb": wanted.memory(together) / 1e9,
                     "hours": seconds / 3600, "gpu_hours": seconds / 3600 * devices,
                     "scans_per_second": read * (2 if twice else 1) / seconds})
    words = (f"{wanted.parameters / 1e6:.1f} million parameters; {wanted.operations / 1e12:.3g} Tflop a scan forward "
             f"and backward at {'x'.join(map(str, store.grid.shape))}\n"
             f"memory: {wanted.fixed_bytes / 1e9:.2f} GB for weights and optimiser, {wanted.scan_bytes / 1e9:.2f} GB a "
             f"scan at a time (counted in {params.precision}, without cuDNN's work space)\n"
             f"plan: {epochs} epochs of {len(batches)} batch{'es' * (len(batches) > 1)} of "
             f"{'up to ' * (min(sizes) < size)}{size} {'pairs' if params.session_pairs else 'scans'}; times {source}; "
             "loading, the optimiser's step, the exchange of gradients, and validation after each epoch (on one "
             "device, in float32, while the others wait) come on top")
    refused = [str(devices) for devices in DEVICES if params.batch_size % devices or min(sizes) < devices]
    if refused:
        words += (f"\n2_pretrain refuses these batches on {' or '.join(refused)} devices: batch_size must be a "
                  "multiple of their number, and no batch smaller than it")
    return pd.DataFrame(rows), words
