"""The job template on a real two-node Slurm that is started for the tests on this machine."""

import re
import subprocess
import time

import nbformat
import numpy as np
import pandas as pd
import pytest

from kit.data.store import scan_path, write_scan
from kit.runs import ROOT
from kit.train import checkpoint
from tests.conftest import make_store

pytestmark = pytest.mark.slow


class Job:
    """A job through the template: a tiny pretraining in `folder`."""

    def __init__(self, env, folder, store, *options, notebook=ROOT / "notebooks/2_pretrain.ipynb", **params):
        folder.mkdir()
        self.env, self.folder, self.run, self.output = env, folder, folder / "run", folder / "executed.ipynb"
        values = {"prepared": store.folder, "output_dir": self.run, "batch_size": 8, "epochs": 3,
                  "projection": [16, 8], "checkpoint_minutes": 10, "validation_fraction": 0.2, **params}
        (folder / "params.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
        self.log = folder / "job.log"
        said = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", "--time=10", "--mem=1500", *options,
             "slurm/papermill.sbatch", notebook, self.output, folder / "params.yaml", "-p", "seed", "3"],
            env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        self.number = said.strip()

    def show(self, name):
        said = subprocess.run(["scontrol", "show", "job", self.number], env=self.env, capture_output=True, text=True)
        return re.search(rf"\b{name}=(\S+)", said.stdout)[1]

    def wait(self, *states, seconds=400):
        until = time.monotonic() + seconds
        while (state := self.show("JobState")) not in states:
            assert time.monotonic() < until, f"still {state}:\n{self.log.read_text() if self.log.exists() else ''}"
            time.sleep(0.3)

    def reach(self, step, seconds=400):
        """Wait until the training has come so far."""
        live, until = self.run / "live.json", time.monotonic() + seconds
        while not (live.exists() and (found := re.search(r'"step": (\d+)', live.read_text()))
                   and int(found[1]) >= step):
            assert time.monotonic() < until and self.show("JobState") in ("PENDING", "RUNNING"), self.log.read_text()
            time.sleep(0.1)

    def signal(self, *arguments):
        subprocess.run(["scancel", *arguments, self.number], env=self.env, check=True)

    def text(self):
        """The job's log, and the notebook's printed lines."""
        cells = nbformat.read(self.output, as_version=4).cells
        return self.log.read_text(), "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("scans"))


def test_two_nodes_are_stopped_by_usr1_requeued_and_end_with_one_log(slurm, scans, tmp_path):
    job = Job(slurm, tmp_path / "job", scans, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", epochs=12)
    job.reach(4)
    job.signal("-b", "-s", "USR1")
    job.wait("PENDING")
    state = checkpoint.load(job.run / "checkpoints")
    assert state["workers"] == 2 and len(state["log"]) + len(state["losses"]) > 0 and len(state["log"]) < 12
    first = state["log"]
    job.wait("COMPLETED")
    log, printed = job.text()
    assert "work is left; requeued as asked" in log and "start 2" in log and "finished: 12 epochs" in printed
    table = pd.read_csv(job.run / "log.csv")
    assert table["epoch"].tolist() == list(range(1, 13)) and (job.run / "encoder.safetensors").exists()
    assert table["loss"].tolist()[:len(first)] == pytest.approx([row["loss"] for row in first])
    assert job.show("Restarts") == "1" and (job.folder / "report.html").exists()


def test_scancel_leaves_a_usable_checkpoint_and_does_not_requeue(slurm, scans, tmp_path):
    job = Job(slurm, tmp_path / "job", scans, "--nodes=1", "--cpus-per-task=1", epochs=3000)
    job.reach(4)
    job.signal()
    job.wait("CANCELLED")
    state = checkpoint.load(job.run / "checkpoints")
    assert (job.run / "unfinished.csv").exists() and job.show("Restarts") == "0"  # it was written when asked
    assert len(pd.read_csv(job.run / "unfinished.csv")) == state["position"]["epoch"] + 1


def test_a_cell_that_fails_fails_the_job_and_stands_in_the_notebook(slurm, tmp_path):
    store = make_store(tmp_path / "store", participants=8)
    for scan in store.index["scan"]:
        image, mask = store.read(scan)
        image[5, 9, 12] = np.nan
        write_scan(scan_path(store.folder, scan), image, mask, scan, store.grid.affine)
    job = Job(slurm, tmp_path / "job", store, "--cpus-per-task=1", objective="mae", architecture="vit_narrow")
    job.wait("FAILED")
    cells = nbformat.read(job.output, as_version=4).cells
    assert any(out.output_type == "error" for cell in cells for out in cell.get("outputs", []))
    assert "An Exception was encountered" in cells[0].source and "the loss is nan" in job.log.read_text()


def test_parameters_that_cannot_be_used_end_the_job_in_seconds(slurm, scans, tmp_path):
    job = Job(slurm, tmp_path / "job", scans, temprature=0.1)
    job.wait("FAILED", seconds=30)
    assert "temprature: unknown parameter; did you mean temperature?" in job.log.read_text() and not job.output.exists()
