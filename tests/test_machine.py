"""What a system may lack: half of Slurm, macOS's missing calls."""

import json
import os
import re
import subprocess
import sys

import pytest

from kit.runs import ROOT
from tests.conftest import make_store

PRETRAIN = """
import json, sys
from kit.params import Pretrain
from kit.reading import check
from kit.runs import Run
from kit.train.pretrain import pretrain, status
params = check(Pretrain, json.loads(sys.argv[1]))
run = Run.of(params)
pretrain(params, run)
print(status(params, run))
"""
ASK = """
import json, sys
from kit.machine import why_alone
from kit.params import Pretrain
from kit.reading import ParameterError, check
try:
    params = check(Pretrain, json.loads(sys.argv[1]))
    print(params.all_nodes(), why_alone())
except ParameterError as error:
    print(error)
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), participants=12).folder


def python(code, prepared, folder, path="", before="", **variables):
    """Run code in a process that has these of Slurm's variables, and no program on its path but those of `path`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    nodes = variables.pop("nodes", 0)
    values = {"prepared": str(prepared), "output_dir": str(folder), "epochs": 1, "batch_size": 4, "nodes": nodes,
              "projection": [16, 8]}
    done = subprocess.run([sys.executable, "-c", before + code, json.dumps(values)], cwd=ROOT, capture_output=True,
                          text=True, env={**clean, "PATH": str(path), "KIT_PROGRESS": "off", **variables})
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(("variables", "words"), [
    ({}, "1 \n"),
    ({**JOB, "SLURM_JOB_NUM_NODES": "1"}, "1 \n"),
    ({"SLURM_JOB_NUM_NODES": ""}, "1 \n"),
    ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": ""},
     "the Slurm job's nodes are not known, because SLURM_JOB_NUM_NODES is not set; "),
    ({"SLURM_JOB_ID": "7"}, "the Slurm job's nodes are not known, because SLURM_JOB_NUM_NODES is not set; "),
    ({"SLURM_JOB_NUM_NODES": "two"}, "the Slurm job's nodes are not known, because SLURM_JOB_NUM_NODES is 'two'; "),
    (JOB, "training on this machine only: the Slurm job's 2 nodes cannot be used, because srun is not found and "
          "scontrol is not found; correct that to use all nodes, or set nodes: 1 to hide this message"),
    ({"SLURM_JOB_NUM_NODES": "2"}, "SLURM_JOB_ID is not set and SLURM_JOB_NODELIST is not set"),
    ({**JOB, "SLURM_JOB_ID": "", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "srun is not found and SLURM_JOB_ID is"),
    ({**JOB, "SLURM_JOB_ID": "7_1"}, "and SLURM_JOB_ID is '7_1'"),
])
def test_half_of_slurm_is_one_machine_and_is_said(prepared, tmp_path, variables, words):
    said = python(ASK, prepared, tmp_path / "run", tmp_path, **variables)
    assert said.startswith("1 ") and words in said


def test_a_whole_job_has_its_nodes(prepared, tmp_path):
    for program in ("srun", "scontrol"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    assert python(ASK, prepared, tmp_path / "run", tmp_path, **JOB) == "2 \n"
    assert python(ASK, prepared, tmp_path / "run", tmp_path, **JOB, nodes=1) == "1 \n"


def test_nodes_that_were_asked_for_and_cannot_be_had_are_refused(prepared, tmp_path):
    said = python(ASK, prepared, tmp_path / "run", tmp_path, nodes=2)
    assert "nodes: 2 are started by Slurm" in said and "srun is not found" in said and "set nodes: 1 to train" in said


def test_in_an_salloc_shell_without_srun_it_trains_here(prepared, tmp_path):
    said = python(PRETRAIN, prepared, tmp_path / "run", tmp_path, **JOB, SLURM_CPUS_PER_TASK="", SLURM_NTASKS="2")
    assert said.startswith("training on this machine only: the Slurm job's 2 nodes cannot be used, because srun is not "
                           "found") and "finished" in said


def test_a_job_that_is_over_says_so(prepared, tmp_path):
    """Slurm's variables of an old shell, and a scontrol that knows no such node."""
    for program in ("srun", "scontrol"):
        (tmp_path / program).write_text("#!/bin/sh\necho slurm_load_node error: no such node >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(AssertionError, match=r"NodesError: scontrol show hostnames .* failed: slurm_load_node error: "
                                             r"no such node. Is the Slurm job over .* Set nodes: 1"):
        python(PRETRAIN, prepared, tmp_path / "run", tmp_path, **JOB)


def test_without_linuxs_calls_it_trains(prepared, tmp_path):
    """As on macOS."""
    hide = "import os\nfor name in [name for name in dir(os) if name.startswith('sched_')]: delattr(os, name)\n"
    hide += "assert not hasattr(os, 'sched_getaffinity')\n"
    assert "finished" in python(PRETRAIN, prepared, tmp_path / "run", os.environ["PATH"], before=hide)
    hide += "from kit.machine import cores\nprint(cores())\n"
    assert python("", prepared, tmp_path, before=hide) == f"{os.cpu_count()}\n"


def test_such_calls_stand_in_one_module():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kit").rglob("*.py")
             if re.search(r"\bos\.sched_|cpu_count|\bfcntl\.|SLURM_JOB_NUM_NODES", path.read_text(encoding="utf-8"))}
    assert found - {"kit/preprocess/index.py"} == {"kit/machine.py"}
