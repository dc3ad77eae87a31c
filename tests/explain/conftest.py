"""Atlases that are data of another package."""

from __future__ import annotations

import pytest

from kit.explain.atlas_files import atlas_names
from tests.conftest import absent


@pytest.fixture(scope="session")
def deepmriprep() -> list[str]:
    """Names of deepmriprep's atlases."""
    names = atlas_names()
    if not names:
        absent("no deepmriprep: pip install deepmriprep==0.3.0, or pip download --no-deps deepmriprep==0.3.0 and name "
               "the wheel in $KIT_DEEPMRIPREP")
    return names
