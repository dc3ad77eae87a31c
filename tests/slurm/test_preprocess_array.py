"""A Slurm array of two tasks prepares a cohort in two shards through the notebook, and the last one merges them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit.cohort.tables import read_cohort
from kit.preprocess.index import scan_names, shard_of
from kit.preprocess.nifti import write_nifti
from kit.runs import ROOT
from kit.store.store import Store

pytestmark = pytest.mark.slow

SCRIPT = """#!/bin/bash
#SBATCH --array=0-1
#SBATCH --output={folder}/%a.log
export PYTHONPATH={root} KIT_PROGRESS=off OMP_NUM_THREADS=1
cd {root}
{python} -m kit.execute 1_preprocess -p cohort {folder}/cohort.csv -p mask nonzero \\
    -p spacing_mm 12 -p shape '[12, 16, 14]' -p workers 1 -p output_dir {folder}/out \\
    -p max_failed_fraction 0.1 -p shards 2 -p shard $SLURM_ARRAY_TASK_ID
"""


def test_an_array_of_two_tasks_prepares_and_merges_a_cohort(jobs, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    affine = np.diag([12.0, 12, 12, 1])
    affine[:3, 3] = [-70, -100, -60]
    paths = [tmp_path / f"{row}.nii.gz" for row in range(10)]
    for row, path in enumerate(paths):
        write_nifti(path, np.pad(rng.uniform(10, 100 + row, (8, 9, 10)), 1), affine)
    paths[3].write_text("no scan", encoding="utf-8")
    pd.DataFrame({"participant": range(10), "image_path": paths}).to_csv(tmp_path / "cohort.csv", index=False)
    script = tmp_path / "array.sh"
    script.write_text(SCRIPT.format(folder=tmp_path, root=ROOT, python=sys.executable), encoding="utf-8")
    job = jobs.send(script)
    for task in (0, 1):
        jobs.wait(f"{job}_{task}", "COMPLETED", log=tmp_path / f"{task}.log", seconds=600)
    store = Store.open(tmp_path / "out")
    assert store.index["participant"].tolist() == [str(row) for row in range(10) if row != 3]
    assert pd.read_csv(tmp_path / "out" / "failed.csv")["reason"].str.startswith("not a NIfTI file").tolist() == [True]
    assert store.read(store.index["scan"].iloc[-1])[1].any()
    whole = read_cohort(tmp_path / "cohort.csv")
    own_scans = [[name for name in scan_names(shard_of(whole, shard, 2)) if name in set(store.index["scan"])]
                 for shard in (0, 1)]
    assert list(map(len, own_scans)) == [6, 3]  # of 7 and 3: a shard alone would have failed more than a tenth
    for shard in (0, 1):
        own = tmp_path / "out" / "shards" / f"{shard}-of-2"
        assert Store.open(own).index["scan"].tolist() == own_scans[shard]
        assert (own / "report.html").is_file()
