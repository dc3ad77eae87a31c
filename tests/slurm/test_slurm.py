"""The job template on a real two-node Slurm that is started for the tests on this machine."""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from kit.runs import ROOT
from kit.store.store import scan_path, write_scan
from kit.train import checkpoint
from tests.conftest import make_store

pytestmark = pytest.mark.slow

EPOCHS = 40  # of the tasks of an array: one is not done before the other is seen to train


class Job:
    """A job through the template: a tiny pretraining in `folder`."""

    def __init__(self, jobs, folder, store, *options, **params):
        folder.mkdir()
        self.jobs, self.folder, self.run, self.output = jobs, folder, folder / "run", folder / "executed.ipynb"
        self.log = folder / "job.log"
        self.number = jobs.send(f"--output={self.log}", "--time=10", "--mem=1500", *options, "slurm/papermill.sbatch",
                                "notebooks/2_pretrain.ipynb", self.output,
                                parameter_file(folder, store, output_dir=self.run, **params), "-p", "seed", "3")

    def show(self, name):
        return self.jobs.show(self.number, name)

    def wait(self, *states, seconds=400):
        self.jobs.wait(self.number, *states, log=self.log, seconds=seconds)

    def reach(self, step, seconds=400):
        """Wait until the training has come so far."""
        until = time.monotonic() + seconds
        while reached(self.run) < step:
            assert time.monotonic() < until and self.show("JobState") in ("PENDING", "RUNNING"), self.log.read_text()
            time.sleep(0.1)

    def signal(self, *arguments):
        subprocess.run(["scancel", *arguments, self.number], env=self.jobs.env, check=True)

    def text(self):
        """The job's log, and the notebook's printed lines."""
        cells = nbformat.read(self.output, as_version=4).cells
        return self.log.read_text(), "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def reached(run):
    """How many steps a training has behind it."""
    live = run / "live.json"
    found = re.search(r'"step": (\d+)', live.read_text()) if live.exists() else None
    return int(found[1]) if found else 0


def kernel(number, task=None):
    """The process in which the notebook of a job, or of a task of an array, trains; None if there is none."""
    wanted = {"SLURM_JOB_ID": number} if task is None else {"SLURM_ARRAY_JOB_ID": number,
                                                            "SLURM_ARRAY_TASK_ID": str(task)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            its = process.environ()
            if wanted.items() <= its.items() and "ipykernel_launcher" in process.cmdline():
                return process
    return None


def hang_until_time_is_up(number, folder):
    """Let both tasks train a little, then hang, as where a file system is gone, until Slurm sends its signal.

    Without that they would have to be longer than two minutes on the fastest machine.
    """
    hung, until = {0: None, 1: None}, time.monotonic() + 400
    while hung:
        for task, process in list(hung.items()):
            log = folder / f"{task}.log"
            if process is None and reached(folder / f"seed-{task}") >= 4 and (process := kernel(number, task)):
                process.suspend()
                hung[task] = process
            elif process and "USR1: time is nearly up" in log.read_text():
                process.resume()
                del hung[task]
            assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def parameter_file(folder, store, **params):
    values = {"prepared": store.folder, "batch_size": 8, "epochs": 3, "projection": [16, 8], "checkpoint_minutes": 10,
              "validation_fraction": 0.2, **params}
    (folder / "params.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return folder / "params.yaml"


def one_log(run, epochs):
    """The log of a run that was stopped in between: every epoch once."""
    table = pd.read_csv(run / "log.csv")
    assert table["epoch"].tolist() == list(range(1, epochs + 1)) and (run / "encoder.safetensors").exists()
    return table


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("scans"))


def test_two_nodes_are_stopped_by_usr1_requeued_and_end_with_one_log(jobs, scans, tmp_path):
    job = Job(jobs, tmp_path / "job", scans, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", epochs=12)
    job.reach(4)
    job.signal("-b", "-s", "USR1")
    job.wait("PENDING")
    state = checkpoint.read_checkpoint(job.run / "checkpoints")
    assert state["workers"] == 2 and len(state["log"]) + len(state["losses"]) > 0 and len(state["log"]) < 12
    first = state["log"]
    job.wait("COMPLETED")
    log, printed = job.text()
    assert "work is left; requeued as asked" in log and "start 2" in log and "finished: 12 epochs" in printed
    assert one_log(job.run, 12)["loss"].tolist()[:len(first)] == pytest.approx([row["loss"] for row in first])
    assert job.show("Restarts") == "1" and job.output.with_suffix(".html").exists()


def test_tasks_of_an_array_meet_a_real_time_limit_and_are_requeued_one_by_one(jobs, scans, tmp_path):
    # two minutes, of which Slurm sends the signal in the first (it may come a minute early)
    number = jobs.send(
        f"--output={tmp_path}/%a.log", "--array=0-1", "--time=2", "--signal=B:USR1@60", "--mem=1500",
        "--cpus-per-task=1", "slurm/papermill.sbatch", "notebooks/2_pretrain.ipynb", tmp_path / "seed-%a.ipynb",
        parameter_file(tmp_path, scans, epochs=EPOCHS), "-p", "seed", "%a", "-p", "output_dir", tmp_path / "seed-%a")
    hang_until_time_is_up(number, tmp_path)
    tables = []
    for task in (0, 1):
        log = tmp_path / f"{task}.log"
        jobs.wait(f"{number}_{task}", "COMPLETED", log=log, seconds=900)
        starts = [line.partition("start ")[2][0] for line in log.read_text().splitlines() if "start " in line]
        assert len(starts) >= 2 and starts == [str(start + 1) for start in range(len(starts))]
        assert log.read_text().count("work is left; requeued as asked") == len(starts) - 1
        assert (tmp_path / f"seed-{task}.html").exists()
        tables.append(one_log(tmp_path / f"seed-{task}", EPOCHS))
    assert tables[0]["loss"].tolist() != tables[1]["loss"].tolist()


def test_a_job_of_low_priority_makes_room_and_goes_on_where_it_was(jobs, scans, tmp_path):
    job = Job(jobs, tmp_path / "job", scans, "--partition=low", "--nodes=1", "--cpus-per-task=1", epochs=12)
    job.reach(4)
    other = jobs.send("--partition=main", "--nodes=2", "--exclusive", "--time=1", f"--output={tmp_path}/other.log",
                      "--wrap=sleep 1")
    job.wait("PENDING", seconds=60)  # Slurm gives it 20 s of grace
    first = checkpoint.read_checkpoint(job.run / "checkpoints")["log"]
    assert len(first) < 12 and not (job.run / "encoder.safetensors").exists()
    job.wait("COMPLETED")
    assert jobs.show(other, "JobState") == "COMPLETED" and int(job.show("Restarts")) >= 1
    assert one_log(job.run, 12)["loss"].tolist()[:len(first)] == [row["loss"] for row in first]


def test_a_training_that_fails_and_then_hangs_is_requeued_from_its_last_checkpoint(jobs, scans, tmp_path, monkeypatch):
    """It hangs as in a long validation: the kernel is suspended until Slurm kills it."""
    monkeypatch.setitem(jobs.env, "KIT_STOP_SECONDS", "2")
    job = Job(jobs, tmp_path / "job", scans, "--cpus-per-task=1", epochs=12)
    job.reach(4)
    kernel(job.number).kill()
    job.wait("PENDING", seconds=60)
    job.wait("RUNNING")
    job.reach(12)
    kernel(job.number).suspend()
    first = checkpoint.read_checkpoint(job.run / "checkpoints")["log"]
    job.signal("-b", "-s", "USR1")
    job.wait("PENDING", seconds=60)
    job.wait("COMPLETED")
    log = job.text()[0]
    assert "it failed after a checkpoint; requeued" in log and "it has not stopped yet; requeued as it is" in log
    assert job.show("Restarts") == "2"
    assert one_log(job.run, 12)["loss"].tolist()[:len(first)] == [row["loss"] for row in first]


def test_an_array_whose_tasks_would_write_one_notebook_is_refused(jobs, scans, tmp_path):
    number = jobs.send(f"--output={tmp_path}/%a.log", "--array=3", "slurm/papermill.sbatch",
                       "notebooks/2_pretrain.ipynb", tmp_path / "one.ipynb",
                       parameter_file(tmp_path, scans, output_dir=tmp_path / "run"))
    jobs.wait(f"{number}_3", "FAILED", log=tmp_path / "3.log", seconds=30)
    assert "which all tasks of the array would write; put %a into it" in (tmp_path / "3.log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_stop_by_hand_is_not_requeued(jobs, scans, tmp_path):
    job = Job(jobs, tmp_path / "job", scans, "--nodes=1", "--cpus-per-task=1", epochs=3000)
    job.reach(4)
    (job.run / "stop").touch()
    job.wait("COMPLETED")
    log, printed = job.text()
    assert "stopped by hand with work left" in log and "UNFINISHED" in printed and job.show("Restarts") == "0"


def test_scancel_leaves_a_usable_checkpoint_and_does_not_requeue(jobs, scans, tmp_path):
    job = Job(jobs, tmp_path / "job", scans, "--nodes=1", "--cpus-per-task=1", epochs=3000)
    job.reach(4)
    job.signal()
    job.wait("CANCELLED")
    state = checkpoint.read_checkpoint(job.run / "checkpoints")
    assert (job.run / "unfinished.csv").exists() and job.show("Restarts") == "0"  # it was written when asked
    assert len(pd.read_csv(job.run / "unfinished.csv")) == state["position"]["epoch"] + 1


def test_a_cell_that_fails_fails_the_job_and_stands_in_the_notebook(jobs, tmp_path):
    store = make_store(tmp_path / "store", participants=8)
    for scan in store.index["scan"]:
        image, mask = store.read(scan)
        image[5, 9, 12] = np.nan
        write_scan(scan_path(store.folder, scan), image, mask, scan, store.grid.affine)
    job = Job(jobs, tmp_path / "job", store, "--cpus-per-task=1", objective="mae", architecture="vit_narrow")
    job.wait("FAILED")
    cells = nbformat.read(job.output, as_version=4).cells
    assert any(out.output_type == "error" for cell in cells for out in cell.get("outputs", []))
    assert "An Exception was encountered" in cells[0].source and "the loss is nan" in job.log.read_text()


SHELL = """
import json, sys
from kit.machine import why_alone
from kit.params import Pretrain
from kit.reading import check
from kit.runs import Run
from kit.train import checkpoint
from kit.train.pretrain import pretrain, status
params = check(Pretrain, json.loads(sys.argv[1]))
run = Run.of(params)
pretrain(params, run)
print(status(params, run), checkpoint.read_checkpoint(run / "checkpoints")["workers"], why_alone())
"""

STEP = ["srun", "--overlap", "-N1", "-n1", "--mem=1000"]


@pytest.mark.parametrize(("nodes", "inside"), [(1, []), (2, []), (2, STEP)])
def test_an_salloc_shell_trains_on_its_nodes(jobs, scans, tmp_path, nodes, inside):
    """By hand: in the shell that salloc gives, and in one that srun gives on one of the nodes."""
    values = {"prepared": str(scans.folder), "output_dir": str(tmp_path / "run"), "epochs": 1, "batch_size": 8,
              "projection": [16, 8]}
    shell = ["salloc", f"--nodes={nodes}", "--mem=1500", "--partition=main", *inside]
    done = subprocess.run([*shell, sys.executable, "-c", SHELL, json.dumps(values)], env=jobs.env, cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert not done.returncode and f"finished: 1 epochs {nodes} \n" in done.stdout, done.stderr


def test_parameters_that_cannot_be_used_end_the_job_in_seconds(jobs, scans, tmp_path):
    job = Job(jobs, tmp_path / "job", scans, temprature=0.1)
    job.wait("FAILED", seconds=30)
    assert "temprature: unknown parameter; did you mean temperature?" in job.log.read_text() and not job.output.exists()
