"""Shared by the tests: a small store of made-up scans, on a grid of three different sides."""

import json
import os
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest

from kit.store.grid import Grid
from kit.store.store import FORMAT, Store, scan_path, write_scan

SHAPE = (12, 18, 24)  # unequal, so that swapped axes cannot hide
GRID = Grid(SHAPE, 4.0)  # lies inside the template's brain, all of it


def absent(reason: str) -> NoReturn:
    """What a test needs is not there: in CI that is a failure, on a user's machine a skip that says why."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def make_store(folder, participants=24, shape=SHAPE, seed=0, dataset="made"):
    """Noise in an ellipsoid; a bright corner says `lesion`, the mean brightness of the lower half says `age`."""
    grid = Grid(shape, 4.0)
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    mask = z**2 + y**2 + x**2 < 0.9
    rows = []
    for number in range(participants):
        lesion, age = number % 2, 20 + 60 * rng.random()
        for session in ("01", "02")[: 1 + number % 3 // 2]:
            image = rng.normal(size=shape) + 4 * lesion * ((x > 0.2) & (y > 0.2)) + (age - 50) / 15 * (z < 0)
            image = np.where(mask, (image - image[mask].mean()) / image[mask].std(), 0)
            scan = f"made_{number:03d}_{session}"
            write_scan(scan_path(folder, scan), image, mask, scan, grid.affine)
            rows.append({"scan": scan, "participant": f"{number:03d}", "session": session, "dataset": dataset,
                         "lesion": lesion, "age": age, "site": "AB"[number % 4 // 2]})
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    (folder / "preparation.json").write_text(json.dumps({
        "format": FORMAT, "axes": "zyx", "shape": list(shape), "spacing_mm": 4.0, "origin_mm": list(grid.origin_mm),
        "registration": "none", "mask": "given", "intensity": "zscore", "template": "t"}), encoding="utf-8")
    return Store.open(folder)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """24 participants, 32 scans. Tests read it and leave it as it is."""
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests stay together (they share what they make), and so do all notebooks, in order."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # files in the order below, not those of many tests first

    class Together(LoadScopeScheduling):  # xdist 3.8's own `loadgroup` finds no groups under pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "notebooks" if file.endswith(".ipynb") else file

    return Together(config, log)


LONGEST_FIRST = ("slurm", "real", "notebooks", "train", "models", "preprocess", "browser", "evaluate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, or one of two processes would wait for the other at the end."""
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)
