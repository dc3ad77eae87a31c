"""4_saliency: whom to look at, their maps, and what the maps hold against regions and known places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from kit.cohort.identity import participant_ids
from kit.cohort.labels import read_labels
from kit.cohort.tabular import read_table
from kit.evaluate.finetune import load_predictor
from kit.explain.regions import inside_share, region_table
from kit.explain.saliency import Maps, saliency
from kit.models.encoder_file import weights_digest
from kit.params import Saliency
from kit.preprocess.nifti import read_nifti, write_nifti
from kit.provenance import (
    OLDER,
    MisfitError,
    Side,
    Used,
    check_fit,
    made_from,
    read_made_from,
    remove_stale,
    write_stamped,
)
from kit.reading import read_yaml
from kit.runs import Run, shown
from kit.store.store import Store

RESULTS = ("maps/*.nii.gz", "figures/*.png", "regions.csv", "known_places.csv", "randomisation.csv")  # of one model
EFFECTS = {"stroke": "lesion", "alzheimers": "hippocampus", "age": "ventricles"}  # task: its known place


def open_model(params: Saliency, store: Store, run: Run) -> tuple[nn.Module, dict[str, Any], pd.DataFrame]:
    """The model, its record, and the scans to look at; notes what the run is made from.

    Results of another model or of other scans go first, with a line that says what changed.

    Args:
        params: whose `model` is a run of 3_finetune.
        store: the scans that it was tested on.

    Raises:
        MisfitError: the scans were prepared differently, or are not those that the model was tested on.
    """
    allowed = check_model(params.model, store, params.allow_differences)
    predictor, record = load_predictor(params.model, store.record)
    chosen = scans_to_explain(params.model, store, params.participants)
    model = {"from": shown(params.model), "weights": weights_digest(predictor)}
    drawn = Used("prepared", "drawn", store, chosen, participant_ids(chosen))
    remove_stale(run.folder, made_from([drawn], model=model, allowed=allowed), RESULTS)
    return predictor, record, chosen


def check_model(folder: Path, store: Store, allow: Sequence[str] = ()) -> list[str]:
    """Check a run of 3_finetune against the scans that it is to be shown.

    Args:
        folder: of that run.
        store: the scans.
        allow: in what the preparation may differ.

    Returns:
        the differences that were allowed, a line each.

    Raises:
        MisfitError: the scans were prepared differently, or tested scans are gone, or their voxels or labels have
            changed.
    """
    record, made = json.loads((folder / "task.json").read_text(encoding="utf-8")), read_made_from(folder)
    if made is None or made.rows is None:
        raise MisfitError(f"model {shown(folder)} is {OLDER}; run 3_finetune again")
    sources = made.record["prepared"]["mask_sources"]
    allowed = check_fit({"model": Side(shown(folder), record["preparation"], sources), "prepared": Side.of(store)},
                        allow)
    tested = read_table(folder / "predictions.csv", text=("scan", "distribution"))
    tested = tested.loc[tested["distribution"] == "in_distribution", "scan"]
    gone = sorted(set(tested) - set(store.index["scan"]))
    lines = [f"{len(gone)} of {len(tested)} tested scans are gone: {', '.join(gone[:3])}"] * bool(gone)
    then, there = made.rows[made.rows["part"] == "test"].set_index("scan"), sorted(set(tested) - set(gone))
    codes = read_yaml(folder / "params.yaml").get("missing_codes", ())
    labels = read_labels(store.index, record["task"], record["kind"], codes).values
    labels = pd.Series(labels, store.index["scan"]).map(repr)
    changed = {"labels": [scan for scan in there if then["label"].get(scan) != labels[scan]]}
    if not allowed:  # scans that were prepared otherwise on purpose are others
        changed["voxels"] = [scan for scan in there if then["checksum"].get(scan) != str(store.checksum(scan))]
    lines += [f"{what} of {len(scans)} of {len(tested)} tested scans have changed: {', '.join(scans[:3])}"
              for what, scans in changed.items() if scans]
    if lines:
        raise MisfitError(f"model {shown(folder)} was tested on other scans than lie in {shown(store.folder)}:\n  "
                          + "\n  ".join(lines) + "\nrun 3_finetune again, or name the folder that it was run on")
    return allowed


def scans_to_explain(model: Path, store: Store, count: int) -> pd.DataFrame:
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
    write_stamped(run / "regions.csv", means)
    return means


def known_place(store: Store, scan: str, task: str) -> np.ndarray | None:
    """Where a task's effect is known to lie in a scan: what `1_preprocess` left in the store's `effects/`.

    Args:
        store: prepared scans; of the sample cohort, 1_preprocess knows where the generator put its effects.
        scan: of the store.
        task: a label column.

    Returns:
        (depth, height, width) bool, or None where nothing is known.
    """
    path = store.folder / "effects" / f"{scan}_{EFFECTS.get(task)}.nii.gz"
    return read_nifti(path)[0] > 0 if path.exists() else None


def inside_known_places(maps: Maps, store: Store, task: str, run: Run) -> pd.DataFrame:
    """How much of each map lies in the known place, beside the place's share of the brain; `known_places.csv`."""
    rows = []
    for (scan, method), values in maps.items():
        place = known_place(store, scan, task)
        if place is not None and (place & store.read(scan)[1]).any():
            share = inside_share(values, place, store.read(scan)[1])
            rows.append({"scan": scan, "method": method, "place": EFFECTS[task], **share})
    table = pd.DataFrame(rows, columns=["scan", "method", "place", "share_of_saliency", "share_of_brain", "ratio"])
    write_stamped(run / "known_places.csv", table)
    return table
