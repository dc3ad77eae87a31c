"""What no encoder is needed for: right where the truth is known, and blind to what is tested."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

import kit
from kit.cohort.identity import participant_ids
from kit.cohort.labels import LabelError, Labels, read_labels
from kit.cohort.split import splits
from kit.cohort.tabular import TableError
from kit.evaluate import measured as measured_module
from kit.evaluate import volumes as volumes_module
from kit.evaluate.baselines import BASELINES, LEAST_ROWS, baseline_predictions
from kit.evaluate.measured import measured, measured_file
from kit.evaluate.metrics import score
from kit.evaluate.probe import fit_probe, predict_probe
from kit.evaluate.tasks import CORRECTION, Part, Task
from kit.evaluate.volumes import native_size, regions_on, tissue_shares, tissue_volumes
from kit.preprocess.nifti import ScanError, write_nifti
from kit.preprocess.template import template_on
from kit.store.grid import Grid
from kit.store.store import Store
from tests.conftest import make_store

PEOPLE = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sixty people: the index says age, sex (a coin) and a stage of three that the lower half's brightness shows."""
    store = make_store(tmp_path_factory.mktemp("baselines"), PEOPLE)
    number = store.index["participant"].astype(int)
    sex = pd.Series(np.random.default_rng(3).permutation(PEOPLE) % 2)[number].map({0: "F", 1: "M"}).to_numpy()
    stage = pd.cut(store.index["age"], [0, 40, 60, 99], labels=["early", "middle", "late"]).astype(str)
    return Store(store.folder, store.index.assign(sex=sex, stage=stage), store.record)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Twelve people of another dataset, who write `gender` for `sex` and come from another site."""
    store = make_store(tmp_path_factory.mktemp("elsewhere"), 12, seed=1, dataset="elsewhere")
    return Store(store.folder, store.index.assign(gender=["male", "female"] * 8, site="C"), store.record)


def task_of(store, name, elsewhere=None):
    """A task as `read_task` makes it; `stage` has three classes."""
    if name == "stage":
        classes = ("early", "middle", "late")
        values = store.index["stage"].map(classes.index).to_numpy(float)
        labels = Labels("stage", "classification", values, classes)
    else:
        labels = read_labels(store.index, name)
    place, ids = splits(store.index, 0), participant_ids(store.index)
    parts = {part: Part(store, store.index[place == part], labels.values[place == part], ids[place == part])
             for part in ("train", "validation", "test")}
    if elsewhere:
        theirs = np.zeros(len(elsewhere.index))
        parts["elsewhere"] = Part(elsewhere, elsewhere.index, theirs, participant_ids(elsewhere.index))
    return Task(labels, parts)


def error_or_auc(task, predictions):
    part = task.parts["test"]
    return score(part.labels, predictions["test"], task.labels.kind, part.participants)["value"]


def with_index(store, **columns):
    return Store(store.folder, store.index.assign(**columns), store.record)


def test_guess_knows_the_mean_and_the_shares_alone(store):
    age, lesion, stage = (task_of(store, name) for name in ("age", "lesion", "stage"))
    mean = age.parts["train"].labels.mean()
    assert (baseline_predictions("guess", age)["test"] == mean).all()
    found = baseline_predictions("guess", lesion)
    assert error_or_auc(lesion, found) == 0.5
    share = lesion.parts["train"].labels.mean()
    np.testing.assert_allclose(1 / (1 + np.exp(-found["test"])), share)
    logits = baseline_predictions("guess", stage)["test"]
    shares = np.bincount(stage.parts["train"].labels.astype(int)) / len(stage.parts["train"].labels)
    assert logits.shape == (len(stage.parts["test"].rows), 3)
    np.testing.assert_allclose(np.exp(logits), np.broadcast_to(shares, logits.shape))


def test_demographics_never_have_the_label_in_another_dress(store):
    said = []
    assert baseline_predictions("demographics", task_of(store, "sex"), say=said.append)
    assert baseline_predictions("demographics", task_of(store, "sex"), demographics=["sex"], say=said.append) is None
    assert said == [f"demographics on sex: {words}" for words in (
        "without sex, which is the label or says the same", "without sex, which is the label or says the same",
        "no row, because its only columns give the label away")]
    for name, columns, kept in (
            ("sex", {"gender": store.index["sex"]}, "age"),
            ("sex", {"Female": (store.index["sex"] == "F").astype(int)}, "age"),
            ("sex", {"Female": (store.index["sex"] == "F").astype(object).map(int).mask(store.index.index == 3, "NA")},
             "age"),  # read as numbers all the same
            ("age", {"months": store.index["age"] * 12}, "sex"),
            ("age", {"months": (store.index["age"] * 12).astype(object).mask(store.index.index == 3, "NA")}, "sex"),
            ("lesion", {"group": store.index["lesion"].map({0: "control", 1: "patient"}).mask(
                store.index.index == 3, "unknown").mask(store.index["scan"] == "made_001_01", "Patient")}, "age"),
            ("age", {"age_at_scan": store.index["lesion"]}, "sex")):
        said.clear()
        task = task_of(with_index(store, **columns), name)
        both = baseline_predictions("demographics", task, demographics=[kept, *columns], say=said.append)
        alone = baseline_predictions("demographics", task, demographics=[kept], say=said.append)
        np.testing.assert_array_equal(both["test"], alone["test"])
        assert len(said) == 1 and f"without {next(iter(columns))}" in said[0]
    with pytest.raises(LabelError, match="no column height; the index has scan, "):
        baseline_predictions("demographics", task_of(store, "age"), demographics=["height"])


def test_few_labels_leave_out_what_all_labels_do(store, tmp_path):
    """A fraction of the labels is too few scans to tell a copy of the label from a column that agrees by chance."""
    months = store.index["age"] * 12
    task = task_of(with_index(store, months=months), "age")
    few = task.with_labels_for(0.2, 0)
    assert sum(len(few.parts[name].rows) for name in ("train", "validation")) < LEAST_ROWS
    said = []
    assert baseline_predictions("demographics", few, demographics=["months"], say=said.append) is None
    assert said[0] == "demographics on age: without months, which is the label or says the same"
    store.index[["scan"]].assign(months=months).to_csv(tmp_path / "volumes.csv", index=False)
    said.clear()
    assert baseline_predictions("volumes", few, volumes=tmp_path / "volumes.csv", say=said.append) is None
    assert said[0] == "volumes on age: without months, which is the label or says the same"


def test_a_cell_of_text_does_not_make_ages_categories(store):
    task = task_of(with_index(store, age=store.index["age"].astype(str).mask(store.index.index == 3, ">90"),
                              old=(store.index["age"] > 50).astype(int)), "old")
    found = baseline_predictions("demographics", task, demographics=["age"])
    assert error_or_auc(task, found) > 0.8


def test_words_among_numbers_are_missing_values_and_not_categories(store):
    """A column that is mostly text stays categories."""
    rng = np.random.default_rng(0)
    score = pd.Series(rng.normal(size=len(store.index)).round(3))
    ill, some = (score > 0).astype(int).to_numpy(), store.index.index % 9 == 3
    words, empty = (task_of(with_index(store, score=score.astype(object).mask(some, cell), ill=ill), "ill")
                    for cell in ("NA", np.nan))
    found, numbers = (baseline_predictions("demographics", task, demographics=["score"])["test"]
                      for task in (words, empty))
    assert error_or_auc(words, {"test": found}) > 0.9 and np.array_equal(found, numbers)
    grade = np.where(some, "3", np.where(ill ^ some, "high", "low"))
    task = task_of(with_index(store, grade=grade, ill=ill), "ill")
    assert len(set(baseline_predictions("demographics", task, demographics=["grade"])["test"])) == 3


def test_a_category_that_a_test_set_codes_otherwise_is_said(store, elsewhere):
    """Codes of the same sexes, and an unknown site, are no news."""
    theirs = elsewhere.index.drop(columns="gender")
    for sex, words in ((["male", "female"] * 8, []),
                       ([1, 2] * 8, ["demographics on lesion: sex of elsewhere has no value of training (1 there, M in "
                                     "training), so that it does not count there"])):
        other, said = Store(elsewhere.folder, theirs.assign(sex=sex), elsewhere.record), []
        task = task_of(store, "lesion", other)
        assert baseline_predictions("site", task, say=said.append) and not said
        assert baseline_predictions("demographics", task, demographics=["sex"], say=said.append)
        assert said == words


def test_a_column_that_a_test_set_lacks_is_said(store, elsewhere):
    theirs, sex = elsewhere.index.drop(columns=["age", "gender"]), ["F", "M"] * 8
    for age, words in ((np.nan, ["demographics on lesion: elsewhere has no values of age, so it is predicted without"]),
                       (np.arange(16) + 40, [])):
        other, said = Store(elsewhere.folder, theirs.assign(sex=sex, age=age), elsewhere.record), []
        assert baseline_predictions("demographics", task_of(store, "lesion", other), say=said.append)
        assert said == words


def test_a_code_for_a_missing_age_is_not_learned_as_an_age(store):
    third, old = store.index.index % 3 == 0, (store.index["age"] > 50).astype(int)
    found = [baseline_predictions("demographics", task_of(with_index(store, age=store.index["age"].mask(third, code),
                                                                     old=old), "old"), demographics=["age"])["test"]
             for code in (999, -9, np.nan)]
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[2])


def test_age_and_sex_are_found_where_they_say_something(store, elsewhere):
    rng = np.random.default_rng(0)
    man = store.index["sex"] == "M"
    sick = man ^ (rng.random(len(store.index)) < 0.1)
    task = task_of(with_index(store, sick=sick.astype(int)), "sick", elsewhere)
    found = baseline_predictions("demographics", task)
    assert error_or_auc(task, found) > 0.8
    male = elsewhere.index["gender"] == "male"  # as it is called there
    assert found["elsewhere"][male].min() > found["elsewhere"][~male].max()
    # age missing for half of them, and telling the other half's illness
    missing = rng.random(len(store.index)) < 0.5
    ill = np.where(missing, 1, store.index["age"] > 50)
    task = task_of(with_index(store, age=store.index["age"].where(~missing), ill=ill), "ill")
    assert error_or_auc(task, baseline_predictions("demographics", task)) > 0.9


def test_a_site_that_says_the_label_is_found_and_an_unknown_one_says_nothing(store, elsewhere):
    index = store.index
    confounded = with_index(store, ill=((index["site"] == "B") ^ (index.index % 10 == 0)).astype(int))
    task = task_of(confounded, "ill", elsewhere)
    found = baseline_predictions("site", task)
    assert error_or_auc(task, found) > 0.8 and len(set(found["test"])) == 2
    assert len(set(found["elsewhere"])) == 1
    assert found["test"].min() < found["elsewhere"][0] < found["test"].max()
    same_name = Store(elsewhere.folder, elsewhere.index.assign(site="B"), elsewhere.record)  # B of another dataset
    np.testing.assert_array_equal(baseline_predictions("site", task_of(confounded, "ill", same_name))["elsewhere"],
                                  found["elsewhere"])
    numbered = confounded.index.assign(site=(index["site"] == "B").astype(int))
    gap = numbered.assign(site=numbered["site"].astype(float).where(numbered.index > 0))  # so the others read as floats
    task = task_of(Store(store.folder, numbered, store.record), "ill", Store(store.folder, gap, store.record))
    as_float = baseline_predictions("site", task)["elsewhere"]
    same = gap["site"].notna().to_numpy()
    np.testing.assert_array_equal(as_float[same & (gap["site"] == 1)], found["test"].max())
    capital = Store(store.folder, confounded.index.rename(columns={"site": "Site"}), store.record)
    np.testing.assert_array_equal(baseline_predictions("site", task_of(capital, "ill"))["test"], found["test"])
    pooled = with_index(store, dataset=confounded.index["site"], ill=confounded.index["ill"],
                        site=index["site"].where(index["site"] == "A"))  # dataset B states no sites
    task = task_of(pooled, "ill")
    assert error_or_auc(task, baseline_predictions("site", task)) > 0.8
    said = []
    assert baseline_predictions("site", task_of(with_index(store, site="A"), "lesion"), say=said.append) is None
    assert said == ["site on lesion: no row, because all training scans have the same site"]


@pytest.mark.parametrize("grid", [Grid((36, 48, 40), 4.0), Grid((75, 96, 96), 2.0)])
def test_known_amounts_of_tissue_are_measured(grid, tmp_path):
    mask = template_on(grid)[1]
    rng, voxel_ml = np.random.default_rng(0), grid.spacing_mm**3 / 1000
    right = np.zeros(grid.shape, bool)
    right[:, :, grid.shape[2] // 2:] = True  # x above 0
    tissue = np.full(grid.shape, -1)
    for side, shares in ((right, (0.3, 0.3, 0.4)), (~right, (0.1, 0.6, 0.3))):
        tissue[mask & side] = rng.choice(3, int((mask & side).sum()), p=shares)
    image = np.where(mask, 100 * (1 + tissue) + rng.normal(0, 20, grid.shape), 0).astype(np.float16)
    truth = np.array([[((tissue == each) & side).sum() for each in range(3)] for side in (~right, right)]) * voxel_ml

    found = tissue_volumes(image, mask, regions_on(grid), voxel_ml)
    assert found[0] == pytest.approx(mask.sum() * voxel_ml, rel=1e-6)
    np.testing.assert_allclose(found[1:4], truth.sum(0), rtol=0.05)
    np.testing.assert_allclose(found[4:].reshape(-1, 3).sum(0), found[1:4], rtol=1e-4)  # cubes hold the whole brain

    # an atlas of other voxels, stored in another orientation: 7 is left, 9 is right
    affine = np.diag([-3.0, 3, 3, 1])
    affine[:3, 3] = [100.5, -130, -80]
    x = 100.5 - 3 * np.arange(67)
    labels = np.broadcast_to(np.where(x < 0, 7, 9), (60, 75, 67)).astype(np.float32)
    write_nifti(tmp_path / "atlas.nii.gz", labels, affine)
    regions = regions_on(grid, tmp_path / "atlas.nii.gz")
    assert set(np.unique(regions[mask])) == {1, 2}
    found = tissue_volumes(image, mask, regions, voxel_ml)
    np.testing.assert_allclose(found[4:].reshape(2, 3), truth, rtol=0.05)
    time.sleep(0.01)  # for another time of modification
    write_nifti(tmp_path / "atlas.nii.gz", 16 - labels, affine)  # corrected since: the sides changed places
    assert np.array_equal(regions_on(grid, tmp_path / "atlas.nii.gz") == 1, regions == 2)
    write_nifti(tmp_path / "native.nii.gz", labels, np.diag([1.0, 1, 1, 1]) + 500 * np.eye(4, k=3))
    with pytest.raises(ScanError, match="native.nii.gz: none of its labels lies in the template's brain"):
        regions_on(grid, tmp_path / "native.nii.gz")


def test_volumes_of_scans_brought_to_the_templates_size_are_the_heads(store):
    rows = store.index.assign(scale=1.1)
    assert (native_size(store, rows) == 1).all()  # not registered
    affine = Store(store.folder, store.index, store.record | {"registration": "affine"})
    np.testing.assert_allclose(native_size(affine, rows), 1.331)


def test_a_table_of_volumes_is_joined_by_who_it_is(store, elsewhere, tmp_path):
    """A column that tells the age, under names as spreadsheets write them, without some people."""
    first = Store(store.folder, store.index.drop_duplicates("participant"), store.record)
    index = first.index.sample(frac=1, random_state=0)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"Measure:volume": "sub-" + index["participant"].astype(int).astype(str),
                          "hippocampus": 5000 - 30 * index["age"] + rng.normal(0, 120, PEOPLE),
                          "pallidum": rng.normal(1500, 50, PEOPLE), "Age": index["age"], "note": "fine"})
    table.to_csv(tmp_path / "aseg.tsv", sep="\t", index=False)
    task, said = task_of(first, "age"), []
    found = baseline_predictions("volumes", task, volumes=tmp_path / "aseg.tsv", say=said.append)
    assert error_or_auc(task, found) < 5 and said == ["volumes on age: Age of the table left out, as not volumes",
                                                      "volumes on age: read as volumes: hippocampus, pallidum"]

    lost = task.parts["train"].participants.iloc[0], task.parts["test"].participants.iloc[0]
    table[~index["participant"].isin([name.split("/")[1] for name in lost]).to_numpy()].to_csv(
        tmp_path / "some.csv", index=False)
    said.clear()
    found = baseline_predictions("volumes", task, volumes=tmp_path / "some.csv", say=said.append)
    assert error_or_auc(task, found) < 8 and np.isfinite(found["test"]).all()
    assert said[2:] == [f"volumes on age: no values for 1 participants of {part}: {name}"
                        for part, name in zip(("train", "test"), lost, strict=True)]

    with pytest.raises(TableError, match=r"has one row of \d+, who has several scans: add a column session, or scan"):
        baseline_predictions("volumes", task_of(store, "age"), volumes=tmp_path / "aseg.tsv")
    both = task_of(first, "age", elsewhere)
    with pytest.raises(TableError, match="0, who is in several datasets: add a column dataset"):
        baseline_predictions("volumes", both, volumes=tmp_path / "aseg.tsv")
    table.assign(dataset="made").to_csv(tmp_path / "named.csv", index=False)
    assert set(baseline_predictions("volumes", both, volumes=tmp_path / "named.csv")) == {"test"}
    table.assign(dataset="other").to_csv(tmp_path / "other.csv", index=False)
    assert baseline_predictions("volumes", both, volumes=tmp_path / "other.csv") is None
    for text, words in (("name,a\nx,1\n", "needs a column participant"),
                        ("participant,a\n001,1\n1,2\n", "several rows"),
                        ("participant,a\n1,x\n", "no column of numbers")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(TableError, match=words):
            baseline_predictions("volumes", task, volumes=tmp_path / "bad.csv")


def test_a_column_of_volumes_may_lack_some_and_codes_are_no_volumes(tmp_path):
    (tmp_path / "ml.csv").write_text("participant,ml,mrn,age,note\n1,3.5,0012,30,x\n2,NA,0013,89+,y\n3,2,0014,40,z\n")
    table = volumes_module.read_volumes(tmp_path / "ml.csv")
    assert table.columns.tolist() == ["ml"] and table["ml"].isna().tolist() == [False, True, False]


def test_a_table_of_volumes_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read, real = [], volumes_module.read_foreign
    monkeypatch.setattr(volumes_module, "read_foreign", lambda path, *more, **options: (
        read.append(path) or real(path, *more, **options)))
    (tmp_path / "ml.csv").write_text("participant,ml\n001,3\n")
    for _ in range(2):
        assert volumes_module.read_volumes(tmp_path / "ml.csv")["ml"].tolist() == [3]
    assert len(read) == 1
    (tmp_path / "ml.csv").write_text("participant,ml\n001,45\n")
    assert volumes_module.read_volumes(tmp_path / "ml.csv")["ml"].tolist() == [45] and len(read) == 2


def test_sessions_have_rows_of_their_own(store, tmp_path):
    index = store.index
    visit = np.where(index["session"] == "01", 1, 2)
    values = visit + np.random.default_rng(0).normal(0, 0.1, len(index))
    pd.DataFrame({"participant": index["participant"], "session": "ses-" + index["session"], "ml": values}).to_csv(
        tmp_path / "sessions.csv", index=False)
    task = task_of(with_index(store, visit=visit), "visit")
    assert error_or_auc(task, baseline_predictions("volumes", task, volumes=tmp_path / "sessions.csv")) == 1


@pytest.mark.parametrize(("name", "task", "least"), [("voxels", "lesion", 0.95), ("volumes", "lesion", 0.8),
                                                     ("voxels", "stage", 0.8)])
def test_planted_differences_are_found(store, name, task, least):
    task = task_of(store, task)
    found = baseline_predictions(name, task)["test"]
    part = task.parts["test"]
    if found.ndim == 1:
        assert error_or_auc(task, {"test": found}) > least
    else:
        assert found.shape == (len(part.rows), 3)
        later = part.labels > part.labels.min()  # the test part may lack a class
        assert roc_auc_score(later, found[:, 2] - found[:, 0]) > least


def test_fine_voxels_are_averaged_to_four_millimetres(tmp_path):
    store = make_store(tmp_path / "fine", 40, shape=(25, 30, 35))
    store = Store(store.folder, store.index, store.record | {"spacing_mm": 2.0})
    task = task_of(store, "lesion")
    assert error_or_auc(task, baseline_predictions("voxels", task, cache=tmp_path / "cache")) > 0.95
    file, = (tmp_path / "cache").glob("voxels-*.safetensors")
    assert file.stat().st_size < 1.1 * len(store.index) * 13 * 15 * 18 * 2 + 10_000


def test_nothing_of_what_is_tested_is_learnt(store, elsewhere, tmp_path):
    for kind in ("age", "lesion", "stage"):
        task = task_of(store, kind, elsewhere)
        test = task.parts["test"]
        other = replace(test, labels=test.labels[::-1].copy())
        fewer = {"train": task.parts["train"], "validation": task.parts["validation"],
                 "test": test.only(np.arange(len(test.rows)) < 5)}
        for name in BASELINES:
            found = baseline_predictions(name, task, cache=tmp_path)
            changed = baseline_predictions(name, replace(task, parts=task.parts | {"test": other}), cache=tmp_path)
            np.testing.assert_array_equal(found["test"], changed["test"])
            few = baseline_predictions(name, replace(task, parts=fewer), cache=tmp_path)
            np.testing.assert_allclose(few["test"], found["test"][:5], rtol=1e-3, atol=1e-5)  # float32


def test_scans_are_measured_once_whatever_is_learnt_from_them(store, tmp_path):
    task = task_of(store, "age")
    first = {name: baseline_predictions(name, task, cache=tmp_path)["test"] for name in ("volumes", "voxels")}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2
    fewer = task.with_labels_for(0.5, 0)
    for name, before in first.items():
        assert np.array_equal(baseline_predictions(name, task, cache=tmp_path)["test"], before)
        few = baseline_predictions(name, fewer, cache=tmp_path)["test"]
        np.testing.assert_allclose(few, baseline_predictions(name, fewer)["test"], rtol=1e-6)
        assert not np.allclose(few, before)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_another_kit_or_grid_measures_anew(store, tmp_path, monkeypatch):
    task = task_of(store, "age")

    def count():
        for name in ("volumes", "voxels"):
            baseline_predictions(name, task, cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert count() == count() == 2
    coarse = Store(store.folder, store.index, store.record | {"spacing_mm": 2 * store.grid.spacing_mm})
    monkeypatch.setattr(kit, "__version__", "0.0.0+other")
    assert count() == 4
    task = task_of(coarse, "age")
    assert count() == 6


def test_a_killed_measuring_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_module, "SAVED_TOGETHER", 2)
    path, seen = measured_file(tmp_path, "lengths", 1), []

    def measure(scans):
        if "dddd" in scans and len(seen) < 4:
            raise KeyboardInterrupt
        seen.extend(scans)
        return [np.array([len(scan)]) for scan in scans]

    scans = {f"key of {scan}": scan for scan in ("a", "bb", "ccc", "dddd", "eeeee")}
    with pytest.raises(KeyboardInterrupt):
        measured(scans, measure, path)
    assert seen == ["a", "bb"] and set(load_file(path)) == {"key of a", "key of bb"}
    seen.extend(["", ""])
    found = measured(scans, measure, path)
    assert seen == ["a", "bb", "", "", "ccc", "dddd", "eeeee"]
    assert {key: value.item() for key, value in found.items()} == {key: len(scan) for key, scan in scans.items()}


def test_shards_that_measure_at_the_same_time_keep_each_others_values(tmp_path):
    path = measured_file(tmp_path, "lengths", 1)

    def measure(scans):
        if "bb" in scans:  # another shard measures and writes while this one does
            measured({"key of a": "a"}, measure, path)
        return [np.array([len(scan)]) for scan in scans]

    found = measured({"key of bb": "bb"}, measure, path)
    for values in (found, load_file(path)):
        assert {key: value.item() for key, value in values.items()} == {"key of a": 1, "key of bb": 2}


def test_a_probe_of_several_classes_takes_the_penalty_of_the_best_macro_auc():
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    features = rng.normal(size=(150, 40)) + np.eye(3, 40)[labels] * 4
    probe = fit_probe(features[:60], labels[:60], features[60:105], labels[60:105], "classification")
    found = predict_probe(probe, features[105:], "classification")
    assert found.shape == (45, 3) and (found.argmax(1) == labels[105:]).mean() > 0.7
    noise = fit_probe(np.zeros((60, 2)), labels[:60], np.zeros((45, 2)), labels[60:105], "classification")
    assert noise[-1].C == 1e-4  # all penalties are equal: the strongest


def test_validation_of_one_class_chooses_no_penalty(store):
    task = task_of(store, "lesion")
    part = task.parts["validation"]
    known = pd.Series(store.index["age"]).where(~store.index["scan"].isin(part.rows["scan"][part.labels == 1]))
    said = []
    assert baseline_predictions("demographics", task_of(with_index(store, age=known), "lesion"), demographics=["age"],
                                say=said.append)
    assert said[-1] == ("demographics on lesion: validation scans with a value are all of one class, so the penalty is "
                        "not chosen but 1")
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 3)), np.arange(40) % 2
    assert fit_probe(features, labels, features[:5], np.zeros(5), "classification")[-1].C == 1
    assert fit_probe(features, np.arange(40) % 3, features[:5], np.ones(5), "classification")[-1].C == 1


def test_bias_is_not_fitted_on_imputed_scans(store):
    """A validation scan without any of the columns has no prediction to fit the correction on."""
    heights = np.random.default_rng(0).normal(170, 10, len(store.index)) + 0.2 * store.index["age"]
    task = task_of(Store(store.folder, store.index.assign(height=heights), store.record), "age")
    part = task.parts["validation"]
    there = np.arange(len(part.rows)) > 0
    unknown = replace(part, rows=part.rows.assign(height=part.rows["height"].where(there)))
    found = baseline_predictions("demographics", replace(task, parts={**task.parts, CORRECTION: unknown}),
                                 demographics=["height"])
    assert np.isfinite(found[CORRECTION]).tolist() == there.tolist() and np.isfinite(found["test"]).all()


def test_a_few_bright_voxels_do_not_take_a_tissue_of_their_own():
    """Vessels, or fat that the mask left: 0.2 % of the brain at three times the brightness of white matter."""
    brain = template_on(Grid((72, 96, 80), 2.0))
    voxels = brain[0][brain[1]].astype(float)
    usual, bright = tissue_shares(voxels).mean(0), voxels.copy()
    bright[np.random.default_rng(0).permutation(len(bright))[:len(bright) // 500]] = 3 * np.quantile(voxels, 0.9)
    np.testing.assert_allclose(tissue_shares(bright).mean(0), usual, atol=0.02)
