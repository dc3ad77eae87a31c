"""A real Slurm of two nodes on this machine, started once for all tests that need it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.runs import ROOT
from tests.conftest import absent

HERE = Path(__file__).parent
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/bin"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like reach the two nodes."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]:
        absent(f"no {', '.join(missing)}: apt-get install -y --no-install-recommends slurm-wlm munge")
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "slurm_up.sh", state], check=True, timeout=120, capture_output=True)
    yield {**os.environ, "SLURM_CONF": str(state / "slurm.conf"), "KIT_PYTHON": sys.executable, "PATH": PATH,
           "PYTHONPATH": str(ROOT), "KIT_PROGRESS": "off", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([HERE / "slurm_down.sh", state], check=True, timeout=120, capture_output=True)


class Jobs:
    """Jobs of the two nodes; `name` is a job's number, or 12_1 for a task of an array."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def send(self, *arguments: object) -> str:
        """Submit from the project's root; the job's number."""
        return subprocess.run(["sbatch", "--parsable", *map(str, arguments)], env=self.env, cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout.strip()

    def show(self, job: str, field: str) -> str:
        """A field of `scontrol show job`."""
        said = subprocess.run(["scontrol", "show", "job", job], env=self.env, capture_output=True, text=True,
                              check=True).stdout
        return re.search(rf"\b{field}=(\S+)", said)[1]

    def wait(self, job: str, *states: str, log: Path, seconds: float = 400) -> str:
        """Wait until the job is in one of the states; which. Fails with its log (`sbatch --wait` polls too slowly)."""
        until = time.monotonic() + seconds
        while (state := self.show(job, "JobState")) not in states:
            said = log.read_text(encoding="utf-8") if log.exists() else ""
            assert time.monotonic() < until and state not in ("FAILED", "TIMEOUT"), f"{state}:\n{said[-5000:]}"
            time.sleep(0.3)
        return state


@pytest.fixture(scope="session")
def jobs(slurm: dict[str, str]) -> Jobs:
    """Submit, ask and wait for jobs."""
    return Jobs(slurm)
