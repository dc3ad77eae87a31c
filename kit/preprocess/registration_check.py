"""Registration against known moves: how far brain voxels end up from where they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine

from kit.cohort.tables import read_cohort
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.store.grid import Grid
from kit.store.store import Store, read_transform


def registration_check(moved: Path, folder: Path, workers: int) -> pd.DataFrame:
    """Register scans whose heads were moved, and compare what is found with the known moves.

    Both sessions of a participant show the same head, the second one moved. The template's points that
    registration carries to the second session must be the moved points of the first.

    Args:
        moved: BIDS folder of `kit.sample.moved_cohort`, with `moves.csv`.
        folder: prepared scans are written there.
        workers: processes.

    Returns:
        one participant a row: scan (of the moved session), rotation_deg, translation_mm (of the known move), moved_mm
        (mean displacement of the brain before registration), error_mm (95th percentile over the brain after it).
    """
    cohort = read_cohort(moved)
    settings = Preparation(Grid((36, 48, 40), 4.0), registration="rigid", mask="given")
    index, _ = prepare(cohort, folder, settings, workers)
    store = Store.open(folder)
    moves = pd.read_csv(moved / "moves.csv", dtype={"participant": str})
    moves.index = moves["participant"].str.removeprefix("sub-")
    rows = []
    for participant, scans in index.groupby("participant", sort=False):
        if len(scans) < 2:
            continue  # one session failed; failed.csv says why
        still, turned = scans.sort_values("session")["scan"]
        move = moves.loc[participant]
        known = move[[f"m{i}{j}" for i in range(4) for j in range(4)]].to_numpy(np.float64).reshape(4, 4)
        points = _brain_points(store, still)
        native = apply_affine(read_transform(folder, still), points)  # where the first session has them
        should, found = apply_affine(known, native), apply_affine(read_transform(folder, turned), points)
        rows.append({"scan": turned, "rotation_deg": move["rotation_deg"], "translation_mm": move["translation_mm"],
                     "moved_mm": _distance(should, native).mean(),
                     "error_mm": float(np.quantile(_distance(should, found), 0.95))})
    return pd.DataFrame(rows)


def _brain_points(store: Store, scan: str) -> np.ndarray:
    """(points, 3) MNI millimetres (x, y, z) of the brain's voxels."""
    return apply_affine(store.grid.affine, np.argwhere(store.read(scan)[1])[:, ::-1])


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first - second, axis=1)
