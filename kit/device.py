"""Where and how networks run: the device, what may be bfloat16, how many scans at a time, threads and memory.

With `precision: bf16`, convolutions and matrix products of the network run in bfloat16 while it trains. Views, the mean
over places or patches that makes the features, heads, losses and everything that is predicted, embedded or validated
are float32 at least, whatever autocast says outside: bfloat16 has three digits, which makes ties of an AUC and steps of
an age.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from kit.machine import cores

# of malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

VOXELS = 2**24  # run at a time without gradients: resnet18 then takes about 8 GB


def device() -> torch.device:
    """The CUDA device of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_device(module: nn.Module) -> nn.Module:
    """Move a module to `device()`; on the CPU its kernels lie channels-last.

    A training step of resnet18_narrow, 64 views of 36x48x40 on two threads, then takes 1.3 s instead of 2.0. On
    CUDA nobody has measured it: kernels stay as they are.
    """
    where = device()
    return module.to(where, memory_format=torch.channels_last_3d if where.type == "cpu" else torch.preserve_format)


def autocast(precision: str, where: torch.device) -> torch.autocast:
    """The precision of a training step on a device: "bf16", or "fp32" whatever autocast says outside."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16")


def no_autocast(where: torch.device) -> torch.autocast:
    """What stands inside runs in the precision of its tensors."""
    return torch.autocast(where.type, enabled=False)


@contextmanager
def evaluation(where: torch.device) -> Iterator[None]:
    """For predictions and features: no autocast, and convolutions without TF32, whose ten bits CUDA takes by itself."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(where):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision is raised; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def scans_at_a_time(shape: Sequence[int]) -> int:
    """How many scans of `shape` voxels run at a time without gradients: 3 of 150x192x192, 32 of small ones."""
    return min(32, max(2, VOXELS // math.prod(shape)))


def set_threads() -> int:
    """Share this machine's cores among its processes; torch repeats its bits for one number of threads only.

    Returns:
        threads of this process.
    """
    own, here = cores(), 1
    if dist.is_initialized():
        own, here = int(os.environ.get("KIT_CORES", own)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, own // here)
    torch.set_num_threads(threads)
    keep_freed_memory()
    return threads


def keep_freed_memory(*_: object) -> None:
    """Have glibc keep what this process frees, instead of asking the system for zeroed pages again and again.

    Reading a scan of 150x192x192 then takes 2 ms instead of 4, and a CPU training step of resnet18_narrow (64 views of
    36x48x40 on two threads) 1.0 s instead of 2.0.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems' libraries have none
    if mallopt is not None:
        for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(option, size)
