"""Files of full-size weights do not outlive their test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def small_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.stat().st_size > 1e7:
            file.unlink()
