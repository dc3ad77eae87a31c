"""Maps against known places, by hand; and a lesion that is put into a brain."""

import numpy as np
import pandas as pd
import pytest
import torch

from kit.evaluate.finetune import load_predictor, run_finetune
from kit.explain.maps import explainer_of, open_model
from kit.explain.shuffled import shuffled_model
from kit.explain.truth import (
    MEASURES,
    against_place,
    implant_lesion,
    scans_with_place,
    summary,
    truth_table,
)
from kit.params import Finetune, Saliency
from kit.preprocess.nifti import write_nifti
from kit.preprocess.template import template_on
from kit.reading import check
from kit.runs import Run, write_table
from kit.store.grid import Grid
from kit.store.store import Store
from tests.conftest import make_store

GRID = Grid((36, 48, 40), 4.0)


@pytest.fixture
def place() -> tuple[np.ndarray, np.ndarray]:
    brain = np.zeros((4, 5, 6), bool)
    brain[1:3, 1:4, 1:5] = True  # 24 voxels
    lesion = np.zeros_like(brain)
    lesion[1, 1, :3] = True  # 2 in the brain, 1 outside
    return lesion, brain


def test_mass_rank_and_pointing_by_hand(place):
    lesion, brain = place
    found = np.where(brain, 1.0, 50.0)
    found[1, 1, 1], found[2, 3, 4] = -11, 8  # 12 of 41 in the lesion; of the two strongest one
    measured = against_place(found, lesion, brain)
    assert measured == pytest.approx({"share_of_brain": 2 / 24, "pointing": 1, "mass": 12 / 41,
                                      "mass_ratio": 12 / 41 * 12, "rank": 0.5, "rank_ratio": 6})
    found[2, 3, 4] = 20
    assert against_place(found, lesion, brain)["pointing"] == 0
    found[1, 2, 2] = 30  # beside it
    assert against_place(found, lesion, brain)["pointing"] == 1


def test_an_even_map_is_chance_and_a_zero_one_says_nothing(place):
    lesion, brain = place
    rng = np.random.default_rng(0)
    even = pd.DataFrame([against_place(1 + 1e-3 * rng.random(brain.shape), lesion, brain) for _ in range(400)]).mean()
    assert even["mass_ratio"] == pytest.approx(1, abs=0.01) and even["rank_ratio"] == pytest.approx(1, abs=0.3)
    zero = against_place(np.zeros(brain.shape), lesion, brain)
    assert zero["share_of_brain"] == pytest.approx(2 / 24) and np.isnan(zero["mass"]) and np.isnan(zero["pointing"])
    with pytest.raises(ValueError, match="lies outside the brain"):
        against_place(even.to_numpy()[:1].repeat(120).reshape(brain.shape), ~brain, brain)
    with pytest.raises(ValueError, match=r"\(4, 5, 6\).*\(4, 6, 5\)"):
        against_place(np.ones(brain.shape), lesion.transpose(0, 2, 1), brain)


@pytest.mark.parametrize(("within", "beside"), [((0, 0, 0), 4), ((2, 2, 2), 7), ((4, 4, 4), 4)])
def test_it_does_not_matter_where_in_the_strongest_cube_a_lesion_lies(within, beside):
    """As in occlusion's maps all of its voxels are equally strong; pointing also counts those beside the lesion."""
    brain = np.ones((9, 10, 11), bool)
    found, lesion = np.ones(brain.shape), np.zeros_like(brain)
    found[2:7, 3:8, 4:9] = 2
    lesion[2:7, 3:8, 4:9][within] = True
    measured = against_place(found, lesion, brain)
    assert measured["rank"] == pytest.approx(1 / 5**3) and measured["pointing"] == pytest.approx(beside / 5**3)


def test_intervals_are_over_participants(store):
    scans = store.index["scan"].tolist()
    table = pd.DataFrame([{"scan": scan, "method": method, "place": "lesion", "share_of_brain": 0.1, "pointing": 1.0,
                           "mass": 0.1 * number, "mass_ratio": number, "rank": 0.5, "rank_ratio": 5.0}
                          for method in ("gradient", "occlusion") for number, scan in enumerate(scans[:8], 1)])
    table.loc[table["scan"].eq(scans[0]) & table["method"].eq("occlusion"), ["pointing", "mass", "rank"]] = np.nan
    found = summary(table, store).set_index("method")
    people = store.index["participant"].head(8).nunique()
    assert found.loc["gradient", "participants"] == people and people < 8  # two scans of one are one
    assert found.loc["occlusion", ["participants", "empty_maps"]].tolist() == [people - 1, 1]
    row = found.loc["gradient"]
    assert row["mass_ratio_low"] < row["mass_ratio"] < row["mass_ratio_high"]
    assert row["pointing"] == row["pointing_low"] == row["pointing_high"] == 1
    alone = summary(table[table["scan"] == scans[1]], store).iloc[0]
    assert alone["participants"] == 1 and np.isnan(alone["mass_low"])
    assert summary(table.head(0), store).empty


def test_a_person_of_two_names_counts_once(store, tmp_path, monkeypatch):
    scans = store.index.drop_duplicates("participant").head(3)
    write_table(tmp_path / "aliases.csv", scans[["dataset", "participant"]].assign(person=["p", "p", "q"]))
    (tmp_path / "params.yaml").write_text(f"aliases: {tmp_path / 'aliases.csv'}\n", encoding="utf-8")
    table = pd.DataFrame({"scan": scans["scan"], "method": "gradient", **dict.fromkeys(MEASURES, [0.0, 0.0, 1.0])})
    assert summary(table, store).loc[0, ["participants", "mass"]].tolist() == [3, pytest.approx(1 / 3)]
    assert summary(table, store, model=tmp_path).loc[0, ["participants", "mass"]].tolist() == [2, 0.5]
    monkeypatch.setattr("kit.explain.truth.known_place", lambda store, scan, task: store.read(scan)[1])
    write_table(tmp_path / "predictions.csv", scans[["scan", "participant"]].assign(distribution="in_distribution"))
    assert set(scans_with_place(tmp_path, store, "lesion", 9, 0)) == set(scans["scan"].iloc[[0, 2]])


def test_places_that_the_grid_lost_are_left_out_and_counted(tmp_path, capsys):
    store = make_store(tmp_path / "store", participants=2)
    for scan, place in zip(store.index["scan"], (store.read(store.index["scan"][0])[1], np.zeros(store.grid.shape)),
                           strict=True):
        write_nifti(store.folder / f"effects/{scan}_lesion.nii.gz", place, store.grid.affine)
    write_table(tmp_path / "predictions.csv", store.index[["scan", "participant"]].assign(
        distribution="in_distribution"))
    assert scans_with_place(tmp_path, store, "stroke", 9, 0) == ["made_000_01"]
    assert capsys.readouterr().out == ("known places of stroke: 1 of 2 have no voxel in the brain on this grid, and "
                                       "are left out: made_001_01\n")


def test_who_has_a_known_place_in_a_later_session_only_is_found(tmp_path):
    store = make_store(tmp_path / "store", participants=3)
    scans = store.index[store.index["participant"] == "002"]
    assert scans["session"].tolist() == ["01", "02"]
    place = store.read("made_002_02")[1]
    write_nifti(store.folder / "effects/made_002_02_lesion.nii.gz", place, store.grid.affine)
    write_table(tmp_path / "predictions.csv", scans[["scan", "participant"]].assign(distribution="in_distribution"))
    assert scans_with_place(tmp_path, store, "stroke", 9, 0) == ["made_002_02"]


def test_a_lesion_is_dark_and_where_it_was_put():
    brain = template_on(GRID)[1]
    image = np.where(brain, np.random.default_rng(0).normal(size=GRID.shape), 0).astype(np.float32)
    at = (-30.0, -20.0, 24.0)
    changed, lesion = implant_lesion(image, brain, GRID, at, 12.0, seed=3)
    z, y, x = np.argwhere(lesion).mean(0)
    middle = (GRID.affine @ [x, y, z, 1])[:3]
    assert np.linalg.norm(middle - at) < 4 and x < (GRID.shape[2] - 1) / 2  # left of the middle
    assert lesion.sum() * 0.064 == pytest.approx(4 / 3 * np.pi * 1.2**3, rel=0.3)  # ml
    assert changed[lesion].mean() < -1.5 and abs(changed[brain].mean()) < 1e-3 and not changed[~brain].any()
    assert changed[brain].std() == pytest.approx(1, abs=1e-3)
    far = brain & ~lesion & (np.indices(GRID.shape)[2] > 25)
    assert np.corrcoef(changed[far], image[far])[0, 1] > 0.999  # elsewhere only the scale is another
    assert np.array_equal(implant_lesion(image, brain, GRID, at, 12.0, seed=3)[1], lesion)
    assert not np.array_equal(implant_lesion(image, brain, GRID, at, 12.0, seed=4)[1], lesion)
    with pytest.raises(ValueError, match="no voxel within 5 mm"):
        implant_lesion(image, brain, GRID, (-77.0, -110.0, -63.0), 5.0, seed=0)


def test_models_are_held_against_the_same_people(tmp_path):
    """Through the notebook's functions: two models that hardly learned, and one more of shuffled labels."""
    folder = tmp_path / "store"
    made = make_store(folder)
    corner = np.indices(made.grid.shape)
    corner = (corner[1] >= 11) & (corner[2] >= 15)  # where `make_store` puts what it calls a lesion
    for scan in made.index.loc[made.index["lesion"] == 1, "scan"]:
        write_nifti(folder / f"effects/{scan}_lesion.nii.gz", corner.astype(np.float32), made.grid.affine)
    made.index.rename(columns={"lesion": "stroke"}).to_csv(folder / "index.csv", index=False)
    store = Store.open(folder)
    for name, seed in (("one", 0), ("other", 1)):
        params = check(Finetune, {"prepared": folder, "output_dir": tmp_path / name, "task": "stroke", "steps": 4,
                                  "check_steps": 2, "encoder": "random:resnet18_narrow", "batch_size": 8,
                                  "check_converged": False, "seed": seed})
        run_finetune(params, Run.of(params))
    params = check(Saliency, {"prepared": folder, "model": tmp_path / "one", "compare": {"other": tmp_path / "other"},
                              "methods": ["gradient", "grad_cam_pp"], "truth_participants": 3, "whom": ["random"],
                              "output_dir": tmp_path / "run"})
    run = Run.of(params)
    opened = open_model(params, store, run)
    table = truth_table(params, explainer_of(params, opened, store), "stroke", run)
    assert list(zip(table["model"], table["method"], strict=True)) == [
        (model, method) for model in ("model", "other") for method in ("gradient", "grad_cam_pp")]
    assert table["task"].eq("stroke").all() and (table["participants"] + table["empty_maps"]).eq(3).all()
    scans = [scans_with_place(tmp_path / name, store, "stroke", 3, 0) for name in ("one", "other")]
    assert scans[0] == scans[1] and store.index.set_index("scan").loc[scans[0], "stroke"].eq(1).all()
    assert len(pd.read_csv(run / "truth.csv")) == 4
    of_an_encoder = truth_table(params, explainer_of(params, opened, store), None, run)
    assert not len(of_an_encoder) and list(of_an_encoder) == list(table)  # the notebook shows its columns

    shuffled = shuffled_model(tmp_path / "one", steps=2)
    learned, _ = load_predictor(tmp_path / "one", store.record)
    assert not torch.equal(shuffled.head.weight.cpu(), learned.head.weight)
