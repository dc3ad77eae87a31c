"""A Slurm array of two tasks fills the benchmark's cells through the job template; a run without shards adds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kit.evaluate.benchmark import run_benchmark
from kit.execute import parameters
from kit.runs import Run
from tests.conftest import make_store

pytestmark = pytest.mark.slow


def test_an_array_of_two_tasks_fills_one_table(jobs, tmp_path: Path) -> None:
    make_store(tmp_path / "store", 40)
    values = {"prepared": str(tmp_path / "store"), "encoders": {"ResNet": "random:resnet18_narrow"}, "steps": 4,
              "baselines": ["guess", "voxels"], "tasks": ["lesion"], "label_fractions": [1.0],
              "finetune_tasks": ["lesion"], "finetune_fractions": [1.0], "out_of_distribution": None,
              "output_dir": str(tmp_path / "table")}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    job = jobs.send("--array=0-1", f"--output={tmp_path}/%a.log", "slurm/papermill.sbatch",
                    "notebooks/5_benchmark.ipynb", tmp_path / "part-%a.ipynb", tmp_path / "values.yaml",
                    "-p", "shards", "2", "-p", "shard", "%a")
    for task in (0, 1):
        jobs.wait(f"{job}_{task}", "COMPLETED", log=tmp_path / f"{task}.log", seconds=600)
        assert (tmp_path / f"part-{task}.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").glob("cells/**/seed*.csv")}
    assert len(before) == 3
    params = parameters("5_benchmark", values)
    run = Run.of(params)
    results = run_benchmark(params, run)
    run.close()
    assert not results.missing and set(results.scores["encoder"]) == {"guess", "voxels", "ResNet"}
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was computed twice"
