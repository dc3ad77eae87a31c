"""A real Slurm of two nodes on this machine, started once for all tests that need it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
