"""Where and how networks run: device, precision, scans at a time, threads.

With `precision: bf16`, the network's convolutions and matrix products run in bfloat16 during training. Everything else
is at least float32, even under autocast: views, the pooling that makes the features, heads, losses, and whatever is
predicted, embedded or validated. With its three digits, bfloat16 would cause ties in an AUC and steps in an age.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kit.errors import KitError
from kit.machine import cores, keep_freed_memory

Module = TypeVar("Module", bound=nn.Module)

VOXELS = 2**24  # run at a time without gradients; resnet18 then takes about 8 GB


class DeviceError(KitError, RuntimeError):
    """The job has a GPU that torch cannot use; the message says what to check."""


def device() -> torch.device:
    """The CUDA device of this process, or the CPU.

    Raises:
        DeviceError: see `check_gpu`.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    check_gpu()
    return torch.device("cpu")


def check_gpu() -> None:
    """Check that torch sees the GPUs of this Slurm job, if it has some, without starting CUDA.

    Raises:
        DeviceError: it sees none; on the CPU the job would take too long, and be requeued again and again.
    """
    ids, count = (os.environ.get(name, "") for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"))
    given = [f"SLURM_JOB_GPUS={ids}"] * bool(ids) + [f"SLURM_GPUS_ON_NODE={count}"] * (count not in ("", "0"))
    if not given or os.environ.get("CUDA_VISIBLE_DEVICES") == "" or torch.cuda.is_available():
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPUs alone"
    raise DeviceError(f"{platform.node()}: Slurm gave this job GPUs ({', '.join(given)}), but torch sees none; torch "
                      f"{torch.__version__} {built}. Install torch for CUDA (docs/cluster.md), look with nvidia-smi "
                      "whether the node's driver is new enough for it, or export CUDA_VISIBLE_DEVICES= to use the CPU")


def on_device(module: Module) -> Module:
    """Move a module to `device()`, its kernels stored channels-last; cuDNN becomes deterministic for the whole process.

    Channels-last cuts a training step of resnet18_narrow (64 views of 36x48x40, two threads) from 2.0 to 1.3 s, and one
    of resnet18 on an H200 (12 views of 150x192x192, bf16) from 563 to 469 ms. Deterministic algorithms took no longer
    there.
    """
    torch.backends.cudnn.deterministic = True
    return module.to(device(), memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # stub lacks it


def autocast(precision: str, where: torch.device) -> torch.autocast:
    """Context in which a training step runs in "bf16", or in "fp32" even under an outer autocast."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16")


def no_autocast(where: torch.device) -> torch.autocast:
    """Disable autocast, so that operations run in the precision of their tensors."""
    return torch.autocast(where.type, enabled=False)


@contextmanager
def evaluation(where: torch.device) -> Iterator[None]:
    """For predictions and features: disable autocast, and TF32 (ten bits), which CUDA convolutions use by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(where):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Raise half precision to float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def upload(array: np.ndarray, where: torch.device, kind: torch.dtype | None = None) -> torch.Tensor:
    """Move a small array to a device, as it is or as another type; on the CPU it may share memory with the array.

    numpy does the conversion, because torch would wake all its threads for it. Pinning made views slower on an H200,
    because each array needs a pinned allocation of its own.
    """
    plain = array if kind is None else array.astype(torch.empty(0, dtype=kind).numpy().dtype)
    return torch.from_numpy(np.ascontiguousarray(plain)).to(where, non_blocking=True)


def scans_at_a_time(shape: Sequence[int]) -> int:
    """Scans of `shape` voxels that run at a time without gradients: 3 of 150x192x192, 32 small ones."""
    return min(32, max(2, VOXELS // math.prod(shape)))


def set_threads() -> int:
    """Share this machine's cores among its processes; torch is bit-reproducible only for a fixed number of threads.

    Returns:
        threads of this process.
    """
    own, here = cores(), 1
    if dist.is_initialized():  # srun binds each worker to its own cores; KIT_CORES counts those of all workers here
        own, here = int(os.environ.get("KIT_CORES", own)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, own // here)
    torch.set_num_threads(threads)
    keep_freed_memory()
    return threads
