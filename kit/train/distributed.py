"""Processes that train together: launch, threads, BatchNorm over all of them."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kit.data.loader import keep_freed_memory
from kit.machine import cores, let_others_run

# DDP is told to look for unused parameters on purpose (see `kit.train.state.State`), and warns at every start
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
AWAKE = 0.05  # seconds; a process that is further behind is waited for asleep
PATIENCE = timedelta(hours=2)  # one process may validate, or wait for a full disk, while the others stand by


def rank() -> int:
    """This process's number among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is gone, however it went: no stray workers."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that the launcher started: NCCL where each has a CUDA device, else gloo.

    An interrupt (JupyterLab's Stop button reaches the kernel's whole process group) is left to the process that
    launched them; see `kit.train.stop`.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())  # Slurm may show each its own
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    set_threads()
    try:
        yield
        dist.barrier()  # with gloo, one that leaves early aborts the others
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., Any], arguments: tuple, workers: int) -> Any:
    """Run `function(*arguments)` in `workers` processes of this machine, through torch elastic.

    Args:
        function: lives in a module: a worker cannot find what a notebook defines.
        arguments: for each worker, picklable.
        workers: processes.

    Returns:
        what rank 0 returned.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a worker failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(QUIET)  # for the workers; torch has read its own by now
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    run_id = secrets.token_hex(8)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=workers, run_id=run_id, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
                          start_method="spawn", signals_to_handle="SIGQUIT")  # interrupts and TERM ask to stop
    try:
        return elastic_launch(config, function)(*arguments)[0]
    finally:  # torch elastic leaves its own handlers behind
        for number, handler in handlers.items():
            signal.signal(number, handler)


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars that each process holds, as their mean over the processes; the same numbers in all of them."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


class _Gather(torch.autograd.Function):
    """What all processes hold, joined along the first axis in the order of their ranks; gradients are summed."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(value: torch.Tensor) -> torch.Tensor:
    """(rows, ...) of each process -> (rows x processes, ...), differentiable."""
    return _Gather.apply(value)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """BatchNorm over the whole batch of all processes: torch's on CUDA, `AllReducedBatchNorm` on the CPU."""
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, AllReducedBatchNorm.of(child))
        else:
            synchronise_batch_norm(child)
    return module


class AllReducedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose mean and variance are taken over all processes; torch's SyncBatchNorm refuses the CPU."""

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> AllReducedBatchNorm:
        """The same parameters and running statistics, shared with `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.__dict__.update(norm.__dict__)
        return new

    def _check_input_dim(self, images: torch.Tensor) -> None:
        """Any number of dimensions, channels second."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(images)
        normal, mean, variance = _SharedBatchNorm.apply(images, self.weight, self.bias, self.eps)
        count = images.numel() / images.shape[1] * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return normal


class _SharedBatchNorm(torch.autograd.Function):
    """BatchNorm by the moments over all processes, one exchange each way; gradient as in Ioffe and Szegedy 2015.

    Every process holds as many scans as any other. Moments are joined in float64.
    """

    @staticmethod
    def forward(context: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                eps: float) -> tuple[torch.Tensor, ...]:
        dims, count = [0, *range(2, images.dim())], images.numel() / images.shape[1]
        mean = images.sum(dims) / count
        deviations, _ = _sums(images, images, weight, mean, torch.ones_like(mean), 0.0)  # of x (x - mean)
        moments = _mean(torch.stack([mean.double(), deviations.double() / count + mean.double() ** 2]))
        mean, variance = moments[0].to(images.dtype), (moments[1] - moments[0] ** 2).to(images.dtype)
        context.save_for_backward(images, weight, mean, variance)
        context.eps = eps
        context.mark_non_differentiable(mean, variance)
        return F.batch_norm(images, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        images, weight, mean, variance = context.saved_tensors
        of_weight, of_bias = _sums(gradient, images, weight, mean, variance, context.eps)
        count = images.numel() / images.shape[1]
        sums = (_mean(torch.stack([of_weight, of_bias]).double()) / count).to(images.dtype)
        scale = weight * (variance + context.eps).rsqrt()
        shared = F.batch_norm(images, mean, variance, -scale * sums[0], -scale * sums[1], eps=context.eps)
        return shared.addcmul_(gradient, _channels(scale, images)), of_weight, of_bias, None


def _sums(gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
          variance: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel: the sum of the gradient times the normalised images, and that of the gradient.

    By a kernel of torch's own BatchNorm, which reads both once.
    """
    return torch.ops.aten.native_batch_norm_backward(gradient, images, weight, mean, variance, None, None, False, eps,
                                                     [False, True, True])[1:]


def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(channel,) -> (1, channel, 1, ...)"""
    return values.view([1, -1] + [1] * (like.dim() - 2))


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes of something small, always added up in the same order.

    BatchNorm asks for it some forty times a step. Gloo gathers faster than it reduces, and a process that stays awake
    for the answer has it in 0.15 ms instead of 0.4, or 2 in one case of ten.
    """
    parts = [torch.empty_like(values) for _ in range(world_size())]
    work, begun = dist.all_gather(parts, values, async_op=True), time.monotonic()
    while not work.is_completed() and time.monotonic() - begun < AWAKE:
        let_others_run()
    work.wait()
    return torch.stack(parts).mean(0)
