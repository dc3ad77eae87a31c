"""Lesions that are put into real brains at known places: a small model learns to see them, and its maps find them.

IXI (brain-development.org, CC BY-SA 3.0).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit.cohort.tables import read_cohort
from kit.evaluate.tasks import read_tasks
from kit.evaluate.tune import Choice, score_validation, tune
from kit.explain.explainer import Explainer
from kit.explain.saliency import Options
from kit.explain.targets import Output
from kit.explain.truth import implant_lesion, measure, summary
from kit.models.encoders import build_encoder
from kit.params import Finetune
from kit.preprocess.nifti import write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.preprocess.template import tissue_on
from kit.store.grid import Grid
from kit.store.store import Store, scan_path, write_scan

ALL = os.environ.get("KIT_REAL_HEADS") == "all"
pytestmark = [pytest.mark.real, pytest.mark.slow,
              pytest.mark.skipif(not ALL, reason="prepares 48 brains and trains on them, ten minutes: "
                                                 "KIT_REAL_HEADS=all")]

GRID = Grid((36, 48, 40), 4.0)
BRAINS = 48
METHODS = ("gradient", "gradient_x_input", "smoothgrad", "integrated_gradients", "guided_backpropagation", "occlusion",
           "grad_cam")


@pytest.fixture(scope="module")
def brains(real_cohorts: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first of IXI, with the brains that its label maps say."""
    folder = real_cohorts / "ixi_2mm"
    cohort = read_cohort(folder / "cohort.csv").head(BRAINS)
    cohort["mask_path"] = [str(folder / path) for path in cohort["dlmuse_path"]]
    prepared = tmp_path_factory.mktemp("ixi")
    prepare(cohort.drop(columns="dlmuse_path"), prepared, Preparation(GRID, "rigid", "given"), workers=2)
    return Store.open(prepared)


def implanted(brains: Store, folder: Path) -> Store:
    """Each brain as it is, and with a lesion of 10 to 14 mm radius somewhere in its white matter."""
    rng, rows = np.random.default_rng(17), []
    places = np.argwhere(tissue_on(brains.grid, "white"))
    for number, row in enumerate(brains.index.itertuples()):
        image, mask = brains.read(row.scan)
        image = image.astype(np.float32)
        z, y, x = places[rng.integers(len(places))]
        at = (brains.grid.affine @ [x, y, z, 1])[:3]
        changed, lesion = implant_lesion(image, mask, brains.grid, tuple(at), rng.uniform(10, 14), seed=number)
        for name, values in (("well", image), ("ill", changed)):
            scan = f"{row.participant}_{name}"
            write_scan(scan_path(folder, scan), values, mask, scan, brains.grid.affine)
            rows.append({"scan": scan, "participant": row.participant, "session": name, "dataset": "IXI",
                         "stroke": int(name == "ill")})
        write_nifti(folder / f"effects/{row.participant}_ill_lesion.nii.gz", lesion.astype(np.float32),
                    brains.grid.affine)
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    (folder / "preparation.json").write_text(json.dumps(brains.record), encoding="utf-8")
    return Store.open(folder)


def test_maps_find_lesions_in_real_brains(brains: Store, tmp_path: Path) -> None:
    store = implanted(brains, tmp_path)
    task = read_tasks({"prepared": store}, "stroke")[0]
    params = Finetune.model_validate({"prepared": store.folder, "output_dir": "unused", "task": "stroke",
                                      "encoder": "random:resnet18_narrow", "batch_size": 16, "steps": 300,
                                      "check_steps": 15, "patience": 6})
    model = tune(task, build_encoder("resnet18_narrow", GRID), params, 0, choice=Choice(1e-3, 1e-2),
                 check=False).predictor.eval()
    assert score_validation(task, model) > 0.8
    tested = task.parts["test"].rows
    scans = tested.loc[tested["stroke"] == 1, "scan"].head(12).tolist()
    explainer = Explainer(model, lambda model, _: Output(model), "log-odds of a lesion", store,
                          Options(patch=6, steps=32))
    table = summary(measure(explainer, scans, METHODS, "stroke"), store).set_index("method")
    print(table.filter(regex="participants|empty_maps|pointing$|mass|rank_ratio$").round(2).to_string())
    assert (table["mass_ratio_low"] >= 3).any(), table["mass_ratio"].to_dict()
    assert (table["rank_ratio_low"] >= 3).any() and table["pointing"].max() >= 0.5
