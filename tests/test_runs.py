"""A run's folder: files whole or not at all, one writer, the same parameters."""

import json
import os
import subprocess
import sys

import pytest

from kit.runs import Run, RunError, write_whole

KILLED = """
import os, sys, signal
from kit.runs import write_whole
def write(aside):
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], write)
"""


def test_a_writer_killed_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(aside):
        aside.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "new.csv", write)
    assert list(tmp_path.iterdir()) == []


def test_other_parameters_are_refused_with_the_differences(tmp_path):
    Run.open(tmp_path / "run", {"seed": 0, "epochs": 3, "workers": 1}).close()
    with pytest.raises(RunError, match=r"seed: the folder has 0, asked for 1\n.*epochs: the folder has 3"):
        Run.open(tmp_path / "run", {"seed": 1, "epochs": 4, "workers": 1})
    Run.open(tmp_path / "run", {"seed": 0, "epochs": 3, "workers": 2}, frozenset({"workers"})).close()


def test_one_writer_at_a_time(tmp_path):
    run = Run.open(tmp_path / "run", {"seed": 0})
    with pytest.raises(RunError, match="another process is writing this run"):
        Run.open(tmp_path / "run", {"seed": 0})
    run.close()
    Run.open(tmp_path / "run", {"seed": 0}).close()


def test_what_a_run_leaves(tmp_path):
    run = Run.open(tmp_path / "run", {"seed": 0})
    run.metrics({"loss": 2})
    assert run.metrics({"auc": 0.5}) == {"loss": 2.0, "auc": 0.5} == json.loads((run / "metrics.json").read_text())
    assert "torch==" in (run / "environment.txt").read_text()
    assert sorted(os.listdir(run.folder)) == [".lock", "environment.txt", "metrics.json", "params.yaml"]
