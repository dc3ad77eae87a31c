"""Processes that train together, on this machine or on the nodes of a Slurm job, and what they exchange."""

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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather, all_reduce

from kit.device import check_gpu, device, set_threads
from kit.errors import KitError
from kit.train.stop import NAME as STOP
from kit.train.stop import PREEMPTED

# silences DDP's warning about `find_unused_parameters`, which `kit.train.loop.State` sets on purpose
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
PATIENCE = timedelta(hours=2)  # the others wait while one process validates or retries on a full disk


def rank() -> int:
    """Rank of this process; 0 if it trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, for whatever reason, so that no workers are left behind."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that the launcher started, by NCCL if there is CUDA, else by gloo.

    Interrupts are ignored here (JupyterLab's Stop button reaches the kernel's whole process group) and left to the
    launching process; see `kit.train.stop`. A process that should have a GPU and sees none is refused: by gloo it would
    wait for others that wait by NCCL. No DistributedDataParallel module may outlive this context: freed later, it shuts
    down gloo's threads while holding the GIL that they wait for, and the process hangs (seen with torch 2.13).
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    check_gpu()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())  # Slurm may show only one
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    set_threads()
    try:
        yield
        gc.collect()
        dist.barrier()  # with gloo, a process that leaves early aborts the others
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., Any], arguments: tuple, workers: int) -> Any:
    """Run `function(*arguments)` in `workers` processes on this machine, through torch elastic.

    Args:
        function: must live in a module, because workers cannot find what a notebook defines.
        arguments: passed to each worker; picklable.
        workers: number of processes.

    Returns:
        what rank 0 returned.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a worker failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(QUIET)  # for the workers; torch has already read it here
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    run_id = secrets.token_hex(8)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=workers, run_id=run_id, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
                          start_method="spawn", signals_to_handle="SIGQUIT")  # SIGINT and SIGTERM ask to stop
    try:
        return elastic_launch(config, function)(*arguments)[0]
    finally:  # torch elastic leaves its own handlers behind
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average each scalar over the processes; all of them get the same numbers."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def of_first_process(value: float) -> float:
    """Broadcast rank 0's value to all processes."""
    if world_size() == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64, device=device())
    dist.broadcast(held, 0)
    return held.item()


def of_all_processes(values: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Each process's values, in rank order."""
    if world_size() == 1:
        return [values]
    gathered = gather(torch.tensor([values], dtype=torch.int64, device=device()))
    return [tuple(row) for row in gathered.tolist()]


def gather(value: torch.Tensor) -> torch.Tensor:
    """Concatenate over processes, (rows, ...) -> (rows x processes, ...) in rank order; gradients are summed."""
    return torch.cat(all_gather(value))


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replace BatchNorm by one over the global batch: torch's on CUDA, `AllReducedBatchNorm` on the CPU."""
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

    It exists to test N processes against one, so it is written for clarity, in float64, and not for speed.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> AllReducedBatchNorm:
        """Make one that shares the weights and running statistics of `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.__dict__.update(norm.__dict__)
        return new

    def _check_input_dim(self, images: torch.Tensor) -> None:
        """Accept any number of dimensions, channels second."""

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
    """Workers on the nodes failed or could not start; the message says why, or ends with their last output."""


def launch_on_nodes(module: str, folder: Path, nodes: int, workers: int) -> None:
    """Run `python -m module FOLDER WORKERS` in `workers` processes on each of `nodes` nodes of this Slurm job.

    `srun` starts them from inside the job; each then calls `worker_of_slurm`.

    Raises:
        NodesError: a worker failed.
    """
    each = os.environ.get("SLURM_CPUS_PER_TASK")
    cores = [f"--cpus-per-task={each}"] if each else []
    command = ["srun", "--overlap", "--unbuffered", "--label", "--export=ALL", f"--nodes={nodes}",
               f"--ntasks={nodes * workers}", f"--ntasks-per-node={workers}", "--kill-on-bad-exit=1", *cores,
               sys.executable, "-m", module, str(folder), str(workers)]
    said: collections.deque[str] = collections.deque(maxlen=30)
    # own session: the Stop button interrupts the kernel's process group, and must not end srun
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
                          stdin=subprocess.DEVNULL,
                          env={**os.environ, **meeting_point(), **QUIET, "KIT_PROGRESS": "off"},
                          start_new_session=True, preexec_fn=die_with_parent) as srun:
        try:
            for line in srun.stdout or ():
                said.append(line)
                print(line, end="", flush=True)
        except BaseException:
            srun.terminate()
            raise
    if srun.returncode:
        raise NodesError(f"the workers failed (srun exited with {srun.returncode}); their last output:\n"
                         + "".join(said))


def meeting_point() -> dict[str, str]:
    """Address and port of rank 0 from Slurm, because node names may not resolve; empty if they are already exported.

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
    """Run `train(folder)` as one worker started by `srun`, with rank and world size from Slurm."""
    # scancel and preemption send SIGTERM to the job's steps at once, but the batch script hears of it too late: STOP
    # asks for a checkpoint, and PREEMPTED tells the batch script that nobody stopped the run by hand
    def ask_to_stop(*_: object) -> None:
        for name in (PREEMPTED, STOP):
            (folder / name).touch()

    signal.signal(signal.SIGTERM, ask_to_stop)
    world = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=world, LOCAL_RANK=os.environ["SLURM_LOCALID"],
                      LOCAL_WORLD_SIZE=str(workers))
    if os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ["KIT_CORES"] = str(int(os.environ["SLURM_CPUS_PER_TASK"]) * workers)
    with process_group():
        train(folder)
