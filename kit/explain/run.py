"""4_saliency: whom to look at, their maps, and what the maps hold against regions and known places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kit.data.cohort import PROCEDURAL
from kit.data.identity import participant_ids
from kit.data.nifti import read_nifti, write_nifti
from kit.data.resample import resample
from kit.data.sample import effect_masks, sample_cohort
from kit.data.store import Store
from kit.data.tabular import read_table
from kit.explain.regions import inside_share, region_table
from kit.explain.saliency import Maps, saliency
from kit.reading import read_yaml
from kit.runs import Run, resolve, write_table

EFFECTS = {"stroke": "lesion", "alzheimers": "hippocampus", "age": "ventricles"}  # task: its known place


def choose_scans(model: Path, store: Store, count: int) -> pd.DataFrame:
    """Rows of the index: test participants of whom a model rightly predicts the most.

    Of the positive class those with the highest score; of a number those with the highest prediction. One scan
    a participant, in distribution only.

    Args:
        model: a run of 3_finetune.
        store: the scans that it was tested on.
        count: participants.
    """
    predictions = read_table(model / "predictions.csv", text=("scan", "participant"))
    known = predictions[predictions["distribution"] == "in_distribution"]
    if set(known["true"]) == {0.0, 1.0}:
        known = known[known["true"] == 1]
    best = known.sort_values("predicted", ascending=False, kind="stable")["scan"]
    rows = store.index.set_index("scan", drop=False).loc[best]
    return rows[~participant_ids(rows).duplicated()].head(count).reset_index(drop=True)


def saliency_maps(model: nn.Module, store: Store, rows: pd.DataFrame, methods: list[str], steps: int, run: Run) -> Maps:
    """Maps of each scan by each method, written as `maps/<scan>_<method>.nii.gz` in MNI152 millimetres."""
    maps: Maps = {}
    for scan in rows["scan"]:
        image, mask = store.read(scan)
        for method in methods:
            values = saliency(model, image.astype(np.float32), mask, method, n_steps=steps)
            maps[scan, method] = values
            write_nifti(run / "maps" / f"{scan}_{method}.nii.gz", values, store.grid.affine)
    return maps


def region_means(maps: Maps, store: Store, run: Run) -> pd.DataFrame:
    """Regions' shares of each method's maps, as means over scans; also written to `regions.csv`."""
    tables = [region_table(values, store.read(scan)[1], store.grid).assign(scan=scan, method=method)
              for (scan, method), values in maps.items()]
    table = pd.concat(tables, ignore_index=True)
    means = table.groupby(["method", "region", "side"], sort=False).mean(numeric_only=True).reset_index()
    write_table(run / "regions.csv", means)
    return means


def cohort_of(store: Store, workers: int) -> Path | None:
    """BIDS folder of the cohort that 1_preprocess prepared; None where it was no such folder, or was not noted.

    The sample cohort is made again, where it is gone, by the numbers of that run.
    """
    noted = store.folder / "params.yaml"
    if not noted.exists():
        return None
    made = read_yaml(noted)
    if made["cohort"] == "sample":
        return sample_cohort(made["sample_participants"], made["seed"], workers)
    folder = resolve(made["cohort"])
    return folder if folder.is_dir() else None


def known_place(cohort: Path | None, store: Store, scan: str, task: str) -> np.ndarray | None:
    """Where the sample cohort's generator put a task's effect in a scan, on the store's grid.

    Args:
        cohort: BIDS folder, see `cohort_of`. Only of the sample cohort's own datasets is anything known, whatever
            other participants are called.
        store: prepared without registration, so that the scan's own millimetres are the grid's.
        scan: of the store.
        task: a label column.

    Returns:
        (depth, height, width) bool, or None where nothing is known.
    """
    if cohort is None or task not in EFFECTS or store.record["registration"] != "none":
        return None
    row = store.index.set_index("scan").loc[scan]
    if not row["dataset"].startswith(PROCEDURAL):
        return None
    path = effect_masks(cohort, row["participant"], row["session"]).get(EFFECTS[task])
    if path is None:
        return None
    place, affine = read_nifti(path)
    return resample(place, affine, np.eye(4), store.grid.shape, store.grid.affine) > 0.5


def inside_known_places(maps: Maps, cohort: Path | None, store: Store, task: str, run: Run) -> pd.DataFrame:
    """How much of each map lies in the known place, beside the place's share of the brain; `known_places.csv`."""
    rows = []
    for (scan, method), values in maps.items():
        place = known_place(cohort, store, scan, task)
        if place is not None and (place & store.read(scan)[1]).any():
            share = inside_share(values, place, store.read(scan)[1])
            rows.append({"scan": scan, "method": method, "place": EFFECTS[task], **share})
    table = pd.DataFrame(rows, columns=["scan", "method", "place", "share_of_saliency", "share_of_brain", "ratio"])
    write_table(run / "known_places.csv", table)
    return table
