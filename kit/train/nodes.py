"""Training on several nodes: from inside a Slurm job, `srun` starts the workers on all of its nodes.

    python -m kit.train.nodes RUN_FOLDER WORKERS     # what each of them runs; Slurm gives it its rank

The parameters are read from the run's `params.yaml`.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from kit.train.distributed import QUIET, die_with_parent, process_group
from kit.train.stop import NAME as STOP
from kit.train.stop import PREEMPTED


class NodesError(RuntimeError):
    """The workers on the nodes failed; the message ends with what they said last."""


def launch_on_nodes(folder: Path, nodes: int, workers: int) -> None:
    """Train the run of a folder in `workers` processes on each of `nodes` nodes of this Slurm job.

    Raises:
        NodesError: a worker failed.
    """
    each = os.environ.get("SLURM_CPUS_PER_TASK")
    cores = [f"--cpus-per-task={each}"] if each else []
    command = ["srun", "--overlap", "--unbuffered", "--label", "--export=ALL", f"--nodes={nodes}",
               f"--ntasks={nodes * workers}", f"--ntasks-per-node={workers}", "--kill-on-bad-exit=1", *cores,
               sys.executable, "-m", "kit.train.nodes", str(folder), str(workers)]
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


def main(folder: Path, workers: int) -> None:
    """One worker: rank and world from Slurm, parameters from the run's folder."""
    from kit.params import Pretrain
    from kit.train.pretrain import train

    # scancel and preemption send TERM to the steps at once: it asks for a checkpoint, and tells the batch script,
    # which hears of a preemption only when it is too late, that this was no stop by hand
    signal.signal(signal.SIGTERM, lambda number, frame: [(folder / name).touch() for name in (PREEMPTED, STOP)])
    world = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=world, LOCAL_RANK=os.environ["SLURM_LOCALID"],
                      LOCAL_WORLD_SIZE=str(workers))
    if os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ["KIT_CORES"] = str(int(os.environ["SLURM_CPUS_PER_TASK"]) * workers)
    with process_group():
        train(Pretrain.model_validate(yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
