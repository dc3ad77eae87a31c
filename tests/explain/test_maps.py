"""Whom to look at, what is known of a scan, and the means of maps."""

import os
import re
from functools import partial

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from kit.device import on_device
from kit.explain.explainer import Explainer
from kit.explain.maps import (
    class_means,
    explainer_of,
    known_place,
    native_maps,
    no_better_than_chance,
    open_model,
    saliency_maps,
)
from kit.explain.maps import scans_to_explain as to_explain
from kit.explain.saliency import MethodError, Options
from kit.explain.targets import target_of
from kit.models.encoder_file import save_encoder
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import Saliency
from kit.preprocess.nifti import ScanError, write_nifti
from kit.reading import ParameterError, check
from kit.runs import Run, write_json, write_table
from kit.store.store import Store, scan_path, write_scan
from tests.conftest import GRID, make_store


def test_known_places_stand_in_the_prepared_folder(tmp_path):
    store = make_store(tmp_path / "store", participants=1)
    assert known_place(store, "made_000_01", "stroke") is None
    place = (np.indices(store.grid.shape)[0] > 6).astype(np.float32)
    write_nifti(store.folder / "effects/made_000_01_lesion.nii.gz", place, store.grid.affine)
    assert np.array_equal(known_place(store, "made_000_01", "stroke"), place > 0)
    assert known_place(store, "made_000_01", "age") is None and known_place(store, "made_000_01", "sex") is None


def test_a_known_place_that_a_coarse_grid_lost_is_none(tmp_path):
    store = make_store(tmp_path / "store", participants=1)
    path = store.folder / "effects/made_000_01_lesion.nii.gz"
    write_nifti(path, np.zeros(store.grid.shape, np.float32), store.grid.affine)
    assert known_place(store, "made_000_01", "stroke") is None
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ScanError, match=r"made_000_01_lesion.nii.gz: .*copy"):
        known_place(store, "made_000_01", "stroke")


@pytest.fixture
def six() -> Store:
    """Scans a to g of six people; nobody reads their voxels."""
    index = pd.DataFrame({"scan": list("abcdefg"), "participant": ["1", "1", "2", "3", "4", "5", "6"],
                          "session": "01", "dataset": "A"})
    return Store(None, index, {"shape": [1, 1, 1], "spacing_mm": 1.0})


def predicted(folder, store, true, said, **task) -> None:
    columns = {"predicted": said} if np.ndim(said) == 1 else {
        f"predicted_{number}": values for number, values in enumerate(np.transpose(said))}
    write_table(folder / "predictions.csv", store.index[["scan", "participant"]].assign(
        distribution="in_distribution", true=true, **columns))
    write_json(folder / "task.json", {"task": "ill", "kind": "classification", "classes": ["no", "yes"], **task})


def chosen(folder, store, *whom, count=2, seed=0) -> list[str]:
    return to_explain(folder, store, count, whom, seed)["scan"].tolist()


def test_of_two_classes(six, tmp_path):
    #                      a  b  c  d   e   f  g
    predicted(tmp_path, six, [1.0, 1, 1, 1, 0, 0, 0], [5.0, 9, 2, -3, 4, -1, -2])
    assert chosen(tmp_path, six, "surest") == ["b", "c"]  # a is b's participant
    assert chosen(tmp_path, six, "worst", count=5) == ["e", "d"]  # only who is wrong
    assert set(chosen(tmp_path, six, "controls", count=9)) == {"e", "f", "g"}
    assert len(chosen(tmp_path, six, "random", count=3)) == 3
    draws = {tuple(chosen(tmp_path, six, "random", seed=seed)) for seed in range(9)}
    assert len(draws) > 2 and tuple(chosen(tmp_path, six, "random", seed=4)) in draws
    table = to_explain(tmp_path, six, 5, ("surest", "worst", "random")).set_index("scan")
    assert table.index.is_unique and table.loc["b", "whom"].startswith("surest")
    assert "worst" in table.loc["d", "whom"] and table.loc["d", "said"] == "true yes, predicted no (0.95)"


def test_who_is_a_control_in_a_later_session_only_is_found(six, tmp_path):
    predicted(tmp_path, six, [1.0, 0, 1, 1, 1, 1, 1], np.zeros(7))  # a and b are one participant's
    assert chosen(tmp_path, six, "controls") == ["b"]


def test_of_several_classes(six, tmp_path):
    logits = [[9.0, 0, 0], [0, 0, 0.1], [0, 5, 0], [0, 0, 1], [0, 8, 0], [3, 0, 0], [0, 2, 0]]
    predicted(tmp_path, six, [0.0, 2, 1, 2, 0, 0, 1], logits, classes=["x", "y", "z"])
    assert chosen(tmp_path, six, "surest") == ["a", "c"]
    assert chosen(tmp_path, six, "worst") == ["e"]  # b's and d's classes have less than half, and are right
    assert to_explain(tmp_path, six, 1, ("worst",))["said"][0] == "true x, predicted y (1.00)"
    assert set(chosen(tmp_path, six, "controls", count=9)) == {"a", "e", "f"}


def test_of_a_number(six, tmp_path, capsys):
    predicted(tmp_path, six, [20.0, 30, 40, 50, 60, 70, 80], [25.0, 30, 40, 20, 61, 70, 79], kind="regression",
              classes=[])
    assert chosen(tmp_path, six, "surest") == ["g", "f"] and chosen(tmp_path, six, "worst") == ["d", "a"]
    assert chosen(tmp_path, six, "surest", "controls") == ["g", "f"]
    assert "ill is a number, which has no controls" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no test participant is among controls"):
        chosen(tmp_path, six, "controls")


def test_a_number_of_zeros_and_ones_is_no_class(six, tmp_path):
    predicted(tmp_path, six, [0.0, 0, 1, 1, 0, 1, 0], [0.1, 0.2, 0.9, 0.3, -2, 0.8, 0], kind="regression", classes=[])
    table = to_explain(tmp_path, six, 1, ("worst",))
    assert table[["scan", "said"]].values.tolist() == [["e", "true 0.0, predicted -2.0"]]


def test_participants_of_two_datasets_are_two(tmp_path):
    index = pd.DataFrame({"scan": ["1", "2", "3", "4"], "participant": ["001", "001", "001", "1"],
                          "session": ["01", "01", "02", "01"], "dataset": ["A", "B", "B", "A"]})
    store = Store(tmp_path, index, {"shape": [1, 1, 1], "spacing_mm": 1.0})
    predicted(tmp_path, store, 1.0, [1.0, 2.0, 3.0, 0.5])
    assert chosen(tmp_path, store, "surest", count=3) == ["3", "1", "4"]


def aliased(folder, *names: str) -> None:
    """A run's parameters, with a table that says that these participants of dataset A are one person."""
    write_table(folder / "aliases.csv", pd.DataFrame({"dataset": "A", "participant": names, "person": "p"}))
    (folder / "params.yaml").write_text(f"aliases: {folder / 'aliases.csv'}\n", encoding="utf-8")


def test_a_person_of_two_names_is_shown_once(six, tmp_path):
    predicted(tmp_path, six, [1.0, 1, 1, 1, 0, 0, 0], [5.0, 9, 2, -3, 4, -1, -2])
    assert chosen(tmp_path, six, "surest", count=3) == ["b", "c", "d"]
    aliased(tmp_path, "1", "2")
    assert chosen(tmp_path, six, "surest", count=3) == ["b", "d"]  # c is of the person whom b shows
    assert not {"c"} & set(chosen(tmp_path, six, "random", count=9))


@pytest.mark.parametrize(("metrics", "doubted"), [
    ({"in_distribution_auc": 0.8, "in_distribution_auc_low": 0.6}, False),
    ({"in_distribution_auc": 0.7, "in_distribution_auc_low": 0.45}, True),
    ({"in_distribution_auc": 0.5, "in_distribution_auc_low": None}, True),
    ({"in_distribution_auc": None, "in_distribution_auc_low": None}, True)])  # a fold that tests one class
def test_a_model_that_predicts_nothing_is_doubted(six, tmp_path, metrics, doubted):
    predicted(tmp_path, six, 1.0, 2.0 * np.ones(7))
    write_json(tmp_path / "metrics.json", metrics)
    assert ("better than chance" in no_better_than_chance(tmp_path)) == doubted


@pytest.mark.parametrize(("people", "doubted"), [(9, True), (10, False)])
def test_an_auc_of_one_counts_if_ten_of_each_class_were_tested(tmp_path, people, doubted):
    """It has no interval, whatever the number of participants, of whom each has two scans here."""
    true = np.tile([0.0, 1], 2 * people)
    index = pd.DataFrame({"scan": [f"{number:02d}" for number in range(4 * people)], "session": "01", "dataset": "A",
                          "participant": [f"{number % (2 * people):02d}" for number in range(4 * people)]})
    predicted(tmp_path, Store(None, index, {"shape": [1, 1, 1], "spacing_mm": 1.0}), true, 9 * true - 4)
    write_json(tmp_path / "metrics.json", {"in_distribution_auc": 1.0, "in_distribution_auc_low": None})
    words = no_better_than_chance(tmp_path)
    assert ("too few were tested" in words and "9 of a class, of 10" in words) if doubted else words == ""


def number_predicted(folder, true, said) -> str:
    """Why a model of a number is doubted that predicts this for as many people; the first has a second scan."""
    index = pd.DataFrame({"scan": [f"{number:02d}" for number in range(len(true) + 1)], "session": "01", "dataset": "A",
                          "participant": ["00", *(f"{number:02d}" for number in range(len(true)))]})
    store = Store(None, index, {"shape": [1, 1, 1], "spacing_mm": 1.0})
    predicted(folder, store, [true[0], *true], [said[0], *said], kind="regression", classes=[])
    write_json(folder / "metrics.json", {})
    return no_better_than_chance(folder)


def test_a_number_is_doubted_where_the_median_does_as_well(tmp_path):
    true = np.linspace(20, 80, 12)
    assert number_predicted(tmp_path, true, 50 + 0.8 * (true - 50)) == ""
    assert "not shown to predict better than the median does" in number_predicted(tmp_path, true, true[::-1])


@pytest.mark.parametrize(("people", "doubted"), [(4, True), (9, True), (10, False)])
def test_a_number_counts_if_ten_people_were_tested(tmp_path, people, doubted):
    true = np.linspace(20, 80, people)
    words = number_predicted(tmp_path, true, 50 + 0.4 * (true - 50))
    assert (f"too few were tested to know whether the model predicts better than chance ({people} participants, of 10 "
            "that are needed)" if doubted else "") == words


def test_a_gain_over_the_median_by_luck_is_doubted(tmp_path):
    true, said = np.linspace(20, 80, 12), np.full(12, 50.0)
    said[-1] = 65  # one is much better
    words = number_predicted(tmp_path, true, said)
    assert re.search(r"mean absolute error 15\.1, median's 16\.4; gain 1\.2 \[-1\.4, 5\.1\]", words), words


def test_a_file_that_was_replaced_since_its_preparation_is_named(tmp_path, capsys):
    store = make_store(tmp_path / "store", participants=1)
    mask = store.read("made_000_01")[1]
    write_scan(scan_path(store.folder, "made_000_01"), np.where(mask, 1.0, 0), mask, "made_000_01", GRID.affine,
               {"transform": np.eye(4).tolist()})
    write_nifti(tmp_path / "a.nii.gz", np.where(mask, 1.0, 0).astype(np.float32), GRID.affine)
    pd.DataFrame({"participant": ["000"], "session": "01", "dataset": "made", "image_path": ["a.nii.gz"]}).to_csv(
        tmp_path / "cohort.csv", index=False)
    prepared = scan_path(store.folder, "made_000_01").stat().st_mtime
    for later, said in ((-60, False), (60, True)):
        os.utime(tmp_path / "a.nii.gz", (prepared + later, prepared + later))
        maps = {("made_000_01", "gradient"): mask.astype(np.float32)}
        written = native_maps(maps, store, str(tmp_path / "cohort.csv"), "T1w", Run.open(tmp_path / f"run{said}", {}))
        assert len(written) == 1 and ("were written after they were prepared" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("method", "unit"), [
    ("occlusion", "log-odds, a cube of 24 mm"), ("integrated_gradients", "log-odds, a voxel"),
    ("gradient", "log-odds, per SD of the brain's intensity"),
    ("grad_cam", "relative, of log-odds"), ("attention_rollout", "attention, whatever the output")])
def test_a_maps_unit_names_the_output(store, method, unit):
    assert Explainer(torch.nn.Identity(), lambda model, _: model, "log-odds", store).unit(method) == unit


def test_means_are_of_classes_and_in_mni(tmp_path):
    store = make_store(tmp_path / "store", participants=4)
    rows = store.index.drop_duplicates("participant").reset_index(drop=True)
    mask = store.read(rows["scan"][0])[1]
    maps = {(scan, "gradient"): np.where(mask, 1.0 + 10 * number, 0).astype(np.float32)
            for number, scan in enumerate(rows["scan"])}
    bright = mask & (np.indices(mask.shape)[0] > 8)
    for scan in rows.loc[rows["lesion"] == 1, "scan"]:
        maps[scan, "gradient"][bright] *= 3
    record = {"task": "lesion", "kind": "classification", "classes": ["0", "1"]}
    run = Run.open(tmp_path / "run", {})
    means = class_means(maps, rows, record, store, run)
    assert list(means) == [("mean lesion=0 (n=2)", "gradient"), ("mean lesion=1 (n=2)", "gradient"),
                           ("lesion=1 less lesion=0", "gradient")]
    np.testing.assert_allclose(means["mean lesion=0 (n=2)", "gradient"][mask], 1, rtol=1e-5)  # nobody outweighs another
    difference = means["lesion=1 less lesion=0", "gradient"]
    assert difference[bright].min() > 0 > difference[mask & ~bright].max()
    written = nib.load(run / "maps/lesion=1_less_lesion=0_gradient.nii.gz")
    np.testing.assert_allclose(written.affine, GRID.affine)
    np.testing.assert_allclose(written.get_fdata().T, difference, atol=1e-6)

    halves = class_means(maps, rows, {"task": "age", "kind": "regression", "classes": []}, store, run)
    assert len(halves) == 3 and all(what.startswith(("mean age ", "age above ")) for what, _ in halves)
    assert [what for what, _ in class_means(maps, rows, {"task": None}, store, run)] == ["mean all (n=4)"]

    one = rows.assign(alias_of=["p", "p", "q", "r"])  # the first two are one person, who counts once
    scaled = [maps[scan, "gradient"] / maps[scan, "gradient"][mask].mean() for scan in rows["scan"]]
    expected = ((scaled[0] + scaled[1]) / 2 + scaled[2] + scaled[3]) / 3
    found = class_means(maps, one, {"task": None}, store, run)
    np.testing.assert_allclose(found["mean all (n=3)", "gradient"], expected, rtol=1e-5)


def test_maps_of_classes_with_like_names_get_a_file_each(tmp_path):
    store = make_store(tmp_path / "store", participants=3)
    rows = store.index.drop_duplicates("participant").assign(group=["a+b", "a/b", "A b"]).reset_index(drop=True)
    maps = {(scan, "gradient"): np.where(store.read(scan)[1], np.indices(GRID.shape)[axis] + 1.0, 0)
            for axis, scan in enumerate(rows["scan"])}
    run = Run.open(tmp_path / "run", {})
    record = {"task": "group", "kind": "classification", "classes": ["a+b", "a/b", "A b"]}
    means = class_means(maps, rows, record, store, run)
    for number, file in enumerate(("a_b_n=1", "a_b_n=1_2", "A_b_n=1_3")):
        written = nib.load(run / f"maps/mean_group={file}_gradient.nii.gz").get_fdata().T
        np.testing.assert_allclose(written, list(means.values())[number], atol=1e-6)


def saliency_params(store, model, folder, **changes) -> Saliency:
    return check(Saliency, {"prepared": store.folder, "model": model, "output_dir": folder, **changes})


def test_an_encoder_without_a_head(store, tmp_path, monkeypatch):
    (tmp_path / "encoder").mkdir()
    save_encoder(tmp_path / "encoder/encoder.safetensors", build_encoder("vit_narrow", GRID), {
        "architecture": "vit_narrow", "objective": "mae", "preparation": store.record, "participants": []})
    for changes, words in (({}, "target: got 'prediction'; an encoder without a head has similarity"),
                           ({"target": "component"}, "whom: of an encoder without a head")):
        with pytest.raises(ParameterError, match=words):
            saliency_params(store, tmp_path / "encoder", tmp_path / "run", **changes)
    params = saliency_params(store, tmp_path / "encoder", tmp_path / "run", target="component", whom=["random"],
                             participants=4, methods=["gradient", "attention_rollout"])
    run = Run.of(params)
    opened = open_model(params, store, run)
    assert opened.chosen["whom"].eq("random").all() and opened.chosen["participant"].is_unique
    # a bar that draws at each pass: what it then answers, True, must not become the model's output
    monkeypatch.setattr("kit.explain.maps.progress", partial(tqdm, mininterval=0, miniters=1, leave=False))
    maps = saliency_maps(explainer_of(params, opened, store), opened.chosen, params.methods, run)
    assert len(maps) == 8 and all(values.any() for values in maps.values())
    assert len(list((run / "maps").glob("*.nii.gz"))) == 8

    people = store.index[["dataset", "participant"]].drop_duplicates()
    write_table(tmp_path / "encoder/aliases.csv", people.assign(person=["p", "p", *range(len(people) - 2)]))
    (tmp_path / "encoder/params.yaml").write_text(f"aliases: {tmp_path / 'encoder/aliases.csv'}\n", encoding="utf-8")
    everybody = saliency_params(store, tmp_path / "encoder", tmp_path / "all", target="component", whom=["random"],
                                participants=99, methods=["gradient"])
    assert len(open_model(everybody, store, Run.of(everybody)).chosen) == len(people) - 1  # two are one person

    refused = saliency_params(store, tmp_path / "encoder", tmp_path / "other", target="views", whom=["random"])
    with pytest.raises(MethodError, match="grad_cam cannot explain this network"):
        open_model(refused, store, Run.of(refused))
    assert not (tmp_path / "other/made_from.json").exists()


@pytest.mark.parametrize("target", ["prediction", "similarity", "views", "component"])
def test_the_bar_counts_passes_whatever_the_target(store, tmp_path, monkeypatch, target):
    model = on_device(Predictor(build_encoder("resnet18_narrow", GRID))).eval()
    record = {"task": "lesion", "kind": "classification", "classes": ["0", "1"]}
    rows, methods, moved, bars = store.index.head(4), ["gradient", "occlusion", "integrated_gradients"], [], []

    class Counted(tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr("kit.explain.maps.progress",
                        lambda **options: bars.append(Counted(leave=False, **options)) or bars[0])
    found = target_of(target, model, record, store, rows)
    explainer = Explainer(model, found.of, found.words, store, Options(steps=3, patch=6))
    saliency_maps(explainer, rows, methods, Run.open(tmp_path / "run", {}))
    assert bars[0].n == bars[0].total == sum(moved) and min(moved) >= 0
    assert sum(n > 0 for n in moved) > 2 * 4 * len(methods)  # also during the maps, not only after each


def test_the_mean_brain_is_the_cohorts(store, tmp_path):
    (tmp_path / "encoder").mkdir()
    save_encoder(tmp_path / "encoder/encoder.safetensors", build_encoder("resnet18_narrow", GRID), {
        "architecture": "resnet18_narrow", "objective": "simclr", "preparation": store.record, "participants": []})
    params = saliency_params(store, tmp_path / "encoder", tmp_path / "run", target="views", whom=["random"],
                             methods=["integrated_gradients"], baseline="mean_brain", patch_mm=16)
    explainer = explainer_of(params, open_model(params, store, Run.of(params)), store)
    first = store.index.drop_duplicates("participant")["scan"]
    mean = np.mean([store.read(scan)[0] for scan in first], axis=0, dtype=np.float32)
    np.testing.assert_allclose(explainer.options.mean_brain, mean, atol=2e-3)
    assert explainer.options.patch == 4
