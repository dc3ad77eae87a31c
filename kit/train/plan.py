"""What a run would need, before it is started: memory of a device, hours, and scans a second from the store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kit.data.loader import Batch
from kit.data.store import Store
from kit.models.encoder_file import count_parameters, device
from kit.params import Pretrain
from kit.train.objectives import HELD_OUT_EPOCH
from kit.train.pretrain import batches_for, build_objective, choose_scans

SUSTAINED = 50e12  # operations a second that a device is ASSUMED to sustain where none could be measured
DEVICES = (1, 4, 12)


@dataclass(frozen=True)
class Need:
    """What one training step of some scans takes.

    Attributes:
        parameters: of the objective.
        operations: multiplications and additions of a forward and backward pass of one scan, counted.
        fixed_bytes: weights, gradients and the optimiser's state, float32.
        scan_bytes: what the forward pass of one scan keeps for the backward pass, counted in bfloat16 autocast.
    """

    parameters: int
    operations: float
    fixed_bytes: float
    scan_bytes: float

    def memory(self, scans: int) -> float:
        """Bytes of a device that runs `scans` at a time, without what cuDNN takes as work space."""
        return self.fixed_bytes + scans * self.scan_bytes


def need(params: Pretrain, store: Store, scans: int = 2) -> Need:
    """Count operations and kept memory at the store's own shape, without computing or allocating either.

    Args:
        params: of the run.
        store: whose grid gives the shape.
        scans: of the counted step; what one of them takes is a share of it.
    """
    objective = build_objective(params, store).train()
    parameters = count_parameters(objective)
    state = {"adam": 2, "adamw": 2, "lars": 1}[params.optimizer] + 2 + bool(params.ema)  # in float32 copies
    kept: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in objective.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(weight), weight.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = mode.from_tensor(buffer)
        own = {weight.untyped_storage()._cdata for weight in objective.parameters()}

        def keep_fake(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        views = 1 if params.objective == "mae" else 2
        images = torch.empty(views * scans, 1, *store.grid.shape)
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep_fake, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16):
            out = objective.autoencoder(images)[0] if views == 1 else objective.head(objective.encoder(images))
            out.float().square().mean().backward()
    return Need(parameters, counter.get_total_flops() / scans, 4.0 * parameters * state, sum(kept.values()) / scans)


def seconds_per_scan(params: Pretrain, store: Store, wanted: Need) -> tuple[float, str]:
    """Seconds of training a scan takes on one device, and where the number is from.

    Measured where there is a CUDA device; else the counted operations over an assumed speed.
    """
    where = device()
    if where.type != "cuda":
        return (wanted.operations / SUSTAINED,
                f"ESTIMATED from counted operations at an assumed {SUSTAINED / 1e12:g} Tflop/s a device; nothing was "
                "measured here")
    objective = build_objective(params, store).to(where).train()
    scans = params.chunk or max(params.batch_size // params.processes(), 2)
    shape = (scans, 1, *store.grid.shape)
    batch = Batch(torch.randn(shape, device=where), torch.ones(shape, dtype=torch.bool, device=where),
                  list(range(scans)), torch.zeros(scans, device=where))
    for turn in range(6):
        if turn == 3:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            objective(batch, HELD_OUT_EPOCH)["loss"].backward()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / 3
    return seconds / scans, f"measured on {torch.cuda.get_device_name()}, {scans} scans at a time"


def plan(params: Pretrain, epochs: int = 1000) -> tuple[pd.DataFrame, str]:
    """Hours of the whole run on 1, 4 and 12 devices, and what else it needs.

    Args:
        params: of the run; with `epochs: 0` the plan is for the number given here.
        epochs: see above.

    Returns:
        a row a number of devices: devices, scans_at_a_time, memory_gb, hours, gpu_hours, scans_per_second (that the
        store must give); and what is known in words.
    """
    store = Store.open(params.prepared)
    learned = choose_scans(params, store)[0]
    epochs, wanted = params.epochs or epochs, need(params, store)
    each, source = seconds_per_scan(params, store, wanted)
    again = 4 / 3 if params.chunk and params.objective == "simclr" else 1.0  # chunks go forward twice
    batches = batches_for(params, learned)(0)
    scans = sum(map(len, batches)) * epochs
    rows: list[dict[str, Any]] = []
    for devices in DEVICES:
        share = max(params.batch_size // devices, 1)
        at_a_time = min(params.chunk or share, share)
        seconds = scans * each * again / devices
        rows.append({"devices": devices, "scans_at_a_time": at_a_time, "memory_gb": wanted.memory(at_a_time) / 1e9,
                     "hours": seconds / 3600, "gpu_hours": seconds / 3600 * devices,
                     "scans_per_second": devices / (each * again) * (2 if again > 1 else 1)})
    words = (f"{wanted.parameters / 1e6:.1f} million parameters; {wanted.operations / 1e12:.3g} Tflop a scan forward "
             f"and backward at {'x'.join(map(str, store.grid.shape))}\n"
             f"memory: {wanted.fixed_bytes / 1e9:.2f} GB for weights and optimiser, {wanted.scan_bytes / 1e9:.2f} GB a "
             "scan at a time (counted in bfloat16, without cuDNN's work space)\n"
             f"plan: {epochs} epochs of {len(batches)} batches of {params.batch_size} scans; times {source}; views, "
             "loading and exchange of gradients come on top")
    return pd.DataFrame(rows), words
