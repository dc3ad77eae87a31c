"""Real scans, which are not in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kit.runs import ROOT
from tests.conftest import absent

FOLDER = Path(os.environ.get("KIT_REAL_SCANS", ROOT.parent / "shared" / "data"))
HEAD = Path("/usr/share/mricron/templates/ch2.nii.gz")
SCANS = {"child": FOLDER / "subpixar009_T1w.nii.gz", "tumour": FOLDER / "00001_t1n.nii.gz", "head": HEAD}
BRAINS = SCANS | {"head": HEAD.with_name("ch2bet.nii.gz")}


@pytest.fixture(scope="session")
def real_files() -> dict[str, Path]:
    """Paths of a child's and a patient's skull-stripped scans and of one whole head."""
    missing = [str(path) for path in {*SCANS.values(), *BRAINS.values()} if not path.is_file()]
    if missing:
        absent(f"no real scans: {', '.join(missing)} (KIT_REAL_SCANS names their folder; mricron-data has the head)")
    return SCANS


@pytest.fixture(scope="session")
def head() -> Path:
    """The whole head alone (Colin27), which needs one Debian package."""
    if not HEAD.is_file():
        absent(f"no {HEAD} (apt-get install mricron-data)")
    return HEAD


@pytest.fixture(scope="session")
def brain_files(real_files: dict[str, Path]) -> dict[str, Path]:
    """The brains alone, on the scans' own voxels."""
    return BRAINS


@pytest.fixture(scope="session")
def real_cohorts() -> Path:
    """The folder with IXI at 2 mm, ds000011 and ds002748."""
    missing = [name for name in ("ixi_2mm", "ds000011", "ds002748_2mm") if not (FOLDER / name).is_dir()]
    if missing or not HEAD.is_file():
        absent(f"no real cohorts: {', '.join(missing) or HEAD} (KIT_REAL_SCANS names their folder)")
    return FOLDER
