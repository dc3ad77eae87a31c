"""A clinic's scans: whole heads as they are, and the mistakes that are made with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import real_heads, spoilt_scans
from kit.apply import Applied, apply
from kit.models.encoder_file import save_encoder
from kit.models.encoders import build_encoder
from kit.params import Apply
from kit.preprocess.nifti import write_nifti
from kit.preprocess.scan_file import read_scan
from kit.preprocess.settings import Preparation
from kit.runs import ROOT
from kit.store.grid import Grid

pytestmark = [pytest.mark.real, pytest.mark.slow]

GRID = Grid((36, 48, 40), 4.0)
ALL = os.environ.get("KIT_REAL_HEADS") == "all"  # each mistake that is looked at in all orientations takes a minute
MISTAKES = ("contrast inverted", "thick slices", *(("like CT", "no upper half") if ALL else ()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned nothing; its record says how scans are prepared."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), {
        "architecture": "resnet18_narrow", "objective": "simclr", "participants": [], "made_from": {},
        "preparation": Preparation(GRID, "rigid").record()})
    return folder


@pytest.fixture(scope="module")
def mistaken(real_cohorts: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Applied:
    """A head of IXI with each mistake, and as its own brain alone."""
    folder = tmp_path_factory.mktemp("clinic")
    row = real_heads.cohort().set_index("participant").loc["IXI080"]
    spoilt_scans.write_spoilt(folder / "files", {"IXI080": row["image_path"]},
                              {name: spoilt_scans.SPOILT[name] for name in MISTAKES}, workers=2)
    array, affine = read_scan(row["image_path"])
    write_nifti(folder / "files" / "stripped.nii.gz", np.where(read_scan(row["dlmuse_path"])[0] > 0, array, 0), affine)
    return apply(Apply(input=str(folder / "files"), encoder=str(encoder), output_dir="outputs/x"), folder / "run")


def test_a_clinics_mistakes_are_answered_with_a_warning(mistaken: Applied) -> None:
    found = mistaken.table.set_index("participant")
    assert mistaken.failed.empty and len(found) == 1 + len(MISTAKES) and np.isfinite(mistaken.features).all()
    words = found["warnings"]
    assert "not T1-weighted" in words["?IXI080-contrast-inverted"]
    if ALL:
        assert "not T1-weighted" in words["?IXI080-like-CT"] and "unlike the template" in words["?IXI080-no-upper-half"]
    assert words["?IXI080-thick-slices"] == "voxels of 2 x 2 x 6 mm: too coarse to trust"
    assert words["?stripped"] == ""  # no mistake: `mask: auto` takes it as it is
    assert set(found.index[found["unusable"] == ""]) == {"?IXI080-thick-slices", "?stripped"}


def test_a_whole_head_has_one_embedding_by_command_and_by_function(head: Path, real_cohorts: Path, encoder: Path,
                                                                   tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kit.apply", "--input", str(head), "--output", str(tmp_path / "e.npy")], cwd=ROOT,
        capture_output=True, text=True, check=False, env={**os.environ, "KIT_ENCODER": str(encoder)})
    assert done.returncode == 0, done.stderr
    assert "nothing to remark" in done.stderr
    bids = real_cohorts / "ds000011" / "sub-05" / "anat"
    table = pd.DataFrame({"image_path": [str(head), *map(str, sorted(bids.glob("*T1w.nii*")))]})
    table.to_csv(tmp_path / "cohort.csv", index=False)
    applied = apply(Apply(input=str(tmp_path / "cohort.csv"), encoder=str(encoder), output_dir="outputs/x"),
                    tmp_path / "run")
    assert len(applied.table) == 2 and (applied.table["warnings"] == "").all()
    # alone and beside another scan: convolutions add up in another order, 2e-7 of the largest feature seen
    assert np.allclose(applied.features[0], np.load(tmp_path / "e.npy"), rtol=1e-5, atol=1e-6)
