"""Processes that train together: on this machine, on the nodes of a Slurm job; and what they exchange."""

from __future__ import annotations

import collections
import ctypes
import gc
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather, all_reduce

from kit.device import device, set_threads
from kit.errors import KitError
from kit.train.stop import NAME as STOP
from kit.train.stop import PREEMPTED

# DDP is told to look for unused parameters on purpose (see `kit.train.loop.State`), and warns at every start
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
PATIENCE = timedelta(hours=2)  # one process may validate, or wait for a full disk, while the others stand by


def rank() -> int:
    """This process's number among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is gone, however it went: no stray workers."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that the launcher started: NCCL where each has a CUDA device, else gloo.

    An interrupt (JupyterLab's Stop button reaches the kernel's whole process group) is left to the process that
    launched them; see `kit.train.stop`. What is wrapped in DistributedDataParallel must not outlive it: freed later,
    it takes gloo's threads down while it holds the GIL that they wait for, and the process hangs (torch 2.13, seen).
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
        gc.collect()
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


def of_first_process(value: float) -> float:
    """What rank 0 holds, in all processes."""
    if world_size() == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64, device=device())
    dist.broadcast(held, 0)
    return held.item()


def gather(value: torch.Tensor) -> torch.Tensor:
    """(rows, ...) of each process -> (rows x processes, ...) in the order of their ranks; gradients are summed."""
    return torch.cat(all_gather(value))


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
    """BatchNorm over all processes, for CPUs: torch's SyncBatchNorm takes CUDA tensors only.

    It is there so that N processes can be tested against one: written plainly, in float64, not for speed.
    """

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> AllReducedBatchNorm:
        """The same weights and running statistics, shared with `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.__dict__.update(norm.__dict__)
        return new

    def _check_input_dim(self, images: torch.Tensor) -> None:
        """Any number of dimensions, channels second."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(images)
        channels = [1, -1] + [1] * (images.dim() - 2)
        dims, values = [0, *range(2, images.dim())], images.double()
        places = torch.full_like(self.weight, images.numel() / images.shape[1], dtype=torch.float64)
        total, squares, count = all_reduce(torch.stack([values.sum(dims), values.square().sum(dims), places]))
        mean = total / count
        variance = squares / count - mean.square()
        scale = self.weight * (variance + self.eps).rsqrt()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(images.dtype), self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).to(images.dtype), self.momentum)
        return ((values - mean.view(channels)) * scale.view(channels) + self.bias.view(channels)).to(images.dtype)


class NodesError(KitError, RuntimeError):
    """The workers on the nodes failed; the message ends with what they said last."""


def launch_on_nodes(module: str, folder: Path, nodes: int, workers: int) -> None:
    """Run `python -m module FOLDER WORKERS` in `workers` processes on each of `nodes` nodes of this Slurm job.

    From inside the job, `srun` starts them; each then calls `worker_of_slurm`.

    Raises:
        NodesError: a worker failed.
    """
    each = os.environ.get("SLURM_CPUS_PER_TASK")
    cores = [f"--cpus-per-task={each}"] if each else []
    command = ["srun", "--overlap", "--unbuffered", "--label", "--export=ALL", f"--nodes={nodes}",
               f"--ntasks={nodes * workers}", f"--ntasks-per-node={workers}", "--kill-on-bad-exit=1", *cores,
               sys.executable, "-m", module, str(folder), str(workers)]
    said: collections.deque[str] = collections.deque(maxlen=30)
    # its own session: the Stop button's interrupt, sent to the kernel's group, must not end srun
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
                          stdin=subprocess.DEVNULL,
                          env={**os.environ, **meeting_point(), **QUIET, "KIT_PROGRESS": "off"},
                          start_new_session=True, preexec_fn=die_with_parent) as srun:
        try:
            for line in srun.stdout:
                said.append(line)
                print(line, end="", flush=True)
        except BaseException:
            srun.terminate()
            raise
    if srun.returncode:
        raise NodesError(f"the workers failed (srun ended with {srun.returncode}); the last they said:\n"
                         + "".join(said))


def meeting_point() -> dict[str, str]:
    """Address and port of rank 0: exported already, else asked of Slurm (node names may not resolve).

    Raises:
        NodesError: Slurm does not answer, or the job is over.
    """
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return {}
    names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", *names[:1]))
    if not found:
        raise NodesError(f"Slurm knows no address of {', '.join(names[:1])}; set nodes: 1 to train on this machine")
    return {"MASTER_ADDR": found[1],
            "MASTER_PORT": str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000)}  # below ephemeral ports


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], check=False, text=True, capture_output=True)
    if done.returncode:
        raise NodesError(f"scontrol {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}. Is the "
                         "Slurm job over whose variables are set here? Set nodes: 1 to train on this machine")
    return done.stdout


def worker_of_slurm(folder: Path, workers: int, train: Callable[[Path], None]) -> None:
    """Run `train(folder)` as one worker that `srun` started: rank and world from Slurm."""
    # scancel and preemption send TERM to the steps at once: it asks for a checkpoint, and tells the batch script,
    # which hears of a preemption only when it is too late, that this was no stop by hand
    signal.signal(signal.SIGTERM, lambda number, frame: [(folder / name).touch() for name in (PREEMPTED, STOP)])
    world = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=world, LOCAL_RANK=os.environ["SLURM_LOCALID"],
                      LOCAL_WORLD_SIZE=str(workers))
    if os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ["KIT_CORES"] = str(int(os.environ["SLURM_CPUS_PER_TASK"]) * workers)
    with process_group():
        train(folder)
