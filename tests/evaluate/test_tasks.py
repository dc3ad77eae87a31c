"""Tasks: several classes, folds and sites, named test sets, and what these share with what was learned from."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from kit.cohort.identity import participant_ids
from kit.cohort.labels import LabelError
from kit.cohort.split import LeakageError, Splitting
from kit.evaluate.finetune import load_predictor, open_stores
from kit.evaluate.predict import predict_tested, prediction_columns
from kit.evaluate.tasks import check_tested, covariates, overlap, read_tasks, tasks_of
from kit.evaluate.tune import tune
from kit.explain.maps import scans_to_explain
from kit.explain.saliency import saliency
from kit.models.encoder_file import encoder_at, read_record, save_encoder
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import Benchmark, Finetune, Pretrain
from kit.reading import ParameterError, check
from kit.runs import write_table
from kit.store.leakage import seen_by
from kit.store.store import Store, scan_path
from kit.train.objectives import Supervised
from kit.train.pretrain import build_objective, check_start, choose_scans, pretrain_inputs, record_of
from tests.conftest import GRID, make_store


def changed(store, **columns):
    """A store with other columns in its index, on disk too."""
    write_table(store.folder / "index.csv", store.index.assign(**columns))
    return Store.open(store.folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A store with three classes that can be seen: a bright corner; without one, the young and the old."""
    store = make_store(tmp_path_factory.mktemp("three"), participants=36)
    age = store.index["age"]
    return changed(store, group=np.select([store.index["lesion"] == 1, age > 50], ["lesion", "old"], "young"))


def benchmark(store, **values):
    return {"prepared": str(store.folder), "output_dir": "outputs/x", "encoders": {"a": "random:resnet18_narrow"},
            "tasks": ["lesion", "age"], "finetune_tasks": [], **values}


# several classes


def test_cross_entropy_is_that_of_the_class(three):
    task, = read_tasks({"prepared": three}, "group")
    assert task.labels.classes == ("lesion", "old", "young") and set(task.parts["train"].labels) == {0, 1, 2}
    objective = Supervised(Predictor(build_encoder("resnet18_narrow", GRID), 3), "classification", flip=False, seed=0)
    scans = task.parts["train"].scans()
    from kit.store.dataset import collate
    batch = collate([scans[number] for number in range(4)]).to(torch.device("cpu"))
    loss = objective.eval()(batch, 0)["loss"]
    chances = objective.predictor(batch.images).softmax(1)
    slow = -sum(chances[row, int(label)].log() for row, label in enumerate(batch.labels)) / 4
    torch.testing.assert_close(loss, slow)


def test_three_classes_are_learned_saved_and_explained(three, tmp_path):
    params = Finetune.model_validate({"prepared": three.folder, "output_dir": tmp_path / "run", "task": "group",
                                      "encoder": "random:resnet18_narrow", "batch_size": 8, "steps": 40,
                                      "check_steps": 4, "learning_rates": [3e-3]})
    task, = tasks_of(params, open_stores(params), "group")
    predictor = tune(task, build_encoder("resnet18_narrow", GRID), params, 0, check=False).predictor
    found = predict_tested(task, predictor)
    true = task.parts["test"].labels.astype(int)
    assert list(found) == ["test"] and found["test"].shape == (len(true), 3) and predictor.outputs == 3
    right = (found["test"].argmax(1) == true).mean()
    assert right > max(np.bincount(true) / len(true)) + 0.2, right
    columns = prediction_columns(found["test"])
    assert list(columns) == ["predicted_0", "predicted_1", "predicted_2"]
    assert np.array_equal(columns["predicted_2"], found["test"][:, 2])

    # what 3_finetune leaves builds the same network again
    from safetensors.torch import save_file
    (tmp_path / "run").mkdir()
    save_file({name: value.contiguous() for name, value in predictor.state_dict().items()},
              tmp_path / "run/model.safetensors")
    (tmp_path / "run/task.json").write_text('{"architecture": "resnet18_narrow"}')
    again, _ = load_predictor(tmp_path / "run", three.record)
    rows = task.parts["test"].rows
    image, mask = three.read(rows["scan"].iloc[0])
    image = image.astype(np.float32)
    with torch.no_grad():
        logits = again(torch.from_numpy(image)[None, None])[0].numpy()
    assert np.allclose(logits, found["test"][0], atol=1e-4)

    table = pd.DataFrame({"scan": rows["scan"], "participant": rows["participant"], "true": task.parts["test"].labels,
                          "distribution": "in_distribution", **columns})
    write_table(tmp_path / "run/predictions.csv", table)
    chosen = scans_to_explain(tmp_path / "run", three, 2)
    said = table.set_index("scan").loc[chosen["scan"]]
    assert (said.filter(like="predicted_").to_numpy().argmax(1) == said["true"]).all() and len(chosen) == 2
    predicted, other = int(logits.argmax()), int(logits.argmin())
    unasked, asked, wrong = (saliency(again, image, mask, "gradient", target) for target in (None, predicted, other))
    assert np.array_equal(unasked, asked) and not np.array_equal(unasked, wrong)


def test_few_labels_are_few_in_validation_too(three):
    task, = read_tasks({"prepared": three}, "age")
    few = task.with_labels_for(0.5, 0)
    counts = {name: (part.participants.nunique(), few.parts[name].participants.nunique())
              for name, part in task.parts.items()}
    assert counts == {"train": (22, 11), "validation": (7, 4), "test": (7, 7)}


def test_a_class_that_training_lacks_is_named(three):
    lacking = three.index["group"].where(three.index["participant"].isin(
        read_tasks({"prepared": three}, "age")[0].parts["test"].rows["participant"]) | (three.index["group"] != "old"))
    with pytest.raises(LabelError, match="(?s)group: the train split has .*, none of class old; it needs two scans of "
                                         "all 3 classes and two participants"):
        read_tasks({"prepared": Store(three.folder, three.index.assign(group=lacking), three.record)}, "group")


# folds


def test_each_participant_is_tested_in_one_fold_whatever_the_label(store):
    way = Splitting(folds=3, split_seed=5)
    tasks = read_tasks({"prepared": store}, "lesion", splitting=way)
    assert [task.fold for task in tasks] == [0, 1, 2]
    tested = [set(task.parts["test"].participants) for task in tasks]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 24
    for task in tasks:
        sides = [set(task.parts[name].participants) for name in ("train", "validation", "test")]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 24
    # where half of the people have no such label, those who have are in the folds that they were in
    missing = store.index["age"].where(store.index["participant"].astype(int) % 2 == 0)
    half = Store(store.folder, store.index.assign(weight=missing), store.record)
    for task, people in zip(read_tasks({"prepared": half}, "weight", splitting=way), tested, strict=True):
        assert set(task.parts["test"].participants) < people
    only, = read_tasks({"prepared": store}, "lesion", splitting=way, only=[2])
    assert only.fold == 2 and set(only.parts["test"].participants) == tested[2]


def test_sites_are_left_out_one_by_one(store, capsys):
    way = Splitting(leave_one_site_out=True)
    for task, site in zip(read_tasks({"prepared": store}, "age", splitting=way), "AB", strict=True):
        assert set(task.parts["test"].rows["site"]) == {site}
        assert site not in set(task.parts["train"].rows["site"]) | set(task.parts["validation"].rows["site"])
    unlabelled = store.index.assign(age=store.index["age"].where(store.index["site"] == "B"),
                                    site=np.where(store.index["participant"] > "017", "C", store.index["site"]))
    tasks = read_tasks({"prepared": Store(store.folder, unlabelled, store.record)}, "age", splitting=way)
    assert [task.fold for task in tasks] == [1, 2]
    assert "age: site A has no usable scan with this label" in capsys.readouterr().out


@pytest.mark.parametrize("folds", [{"folds": 3}, {"leave_one_site_out": True}])
def test_pretraining_leaves_the_test_fold_out_and_other_folds_refuse_its_encoder(store, tmp_path, capsys, folds):
    values = {"prepared": store.folder, "output_dir": tmp_path, "split_seed": 2, **folds}
    params = Pretrain.model_validate({**values, "fold": 1})
    check_start(params)
    assert f"fold 1 of {folds.get('folds', 2)}: " in capsys.readouterr().out
    made = pretrain_inputs(params, store, tmp_path)
    record = record_of(params, store, build_objective(params, store), made, tmp_path)
    tasks = read_tasks({"prepared": store}, "age", splitting=Splitting(split_seed=2, **folds))
    learned = set(participant_ids(pd.concat(choose_scans(params, store))))
    assert learned == set(participant_ids(store.index)) - set(tasks[1].parts["test"].participants)
    check_tested(tasks[1], record, False, {})
    for task in tasks:
        if task.fold != 1:
            people = task.parts["test"].participants.nunique()
            with pytest.raises(LeakageError, match=f"{people} of {people} participants to be evaluated were seen"):
                check_tested(task, record, False, {})


def test_pretraining_refuses_who_will_be_tested_by_a_column_split(tmp_path, capsys):
    """One participant's other session, or one scan under another name, in `test`: found before days of training."""
    store = make_store(tmp_path / "store")
    params = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path / "run"})
    ids = participant_ids(store.index)
    changed(store, split=np.where(ids.isin(ids.unique()[:4]), "test", "pretrain"))
    check_start(params)
    second = store.index["session"] == "02"
    changed(store, split=np.where(second, "out_of_distribution", "pretrain"))
    with pytest.raises(LeakageError, match=f"{second.sum()} participants are both in pretrain and in test"):
        check_start(params)
    check_start(params.model_copy(update={"leave_out_test": False}))
    assert "nobody is left out" in capsys.readouterr().out
    changed(store, split=np.where(second, "out_of_distribution", "train"))
    with pytest.raises(LeakageError, match="participants"):
        check_start(params.model_copy(update={"folds": 4, "split": "train"}))
    changed(store, split=np.where(second, "out_of_distribution", "pretrain"))
    with pytest.raises(LeakageError, match="in pretrain and in test"):
        check_start(params.model_copy(update={"split": "out_of_distribution"}))
    shutil.copy(scan_path(store.folder, store.index["scan"].iloc[-1]),
                scan_path(store.folder, store.index["scan"].iloc[0]))
    changed(store, split=np.where(ids.isin(ids.unique()[:4]), "test", "pretrain"))
    with pytest.raises(LeakageError, match="1 scans are both in pretrain and in test, under two names"):
        check_start(params)


def test_the_split_seed_is_apart_from_the_training_seed(store):
    def people(**values):
        params = check(Finetune, {"prepared": str(store.folder), "output_dir": "outputs/x", "encoder": "random",
                                  "task": "lesion", **values})
        task, = tasks_of(params, open_stores(params), "lesion")
        return {name: set(part.participants) for name, part in task.parts.items()}

    assert people(seed=0) == people(seed=1) != people(split_seed=1)


@pytest.mark.parametrize(("values", "words"), [
    ({"folds": 1}, "folds: 1; set 0 for a single split"),
    ({"folds": 3, "leave_one_site_out": True}, "folds: 3 beside leave_one_site_out: true"),
    ({"folds": 30}, "folds: 30 folds of only 24 participants"),
    ({"folds": 3, "fold": 3}, "fold: 3; 3 folds are numbered 0 to 2"),
    ({"leave_one_site_out": True, "fold": 2}, "fold: 2; 2 folds are numbered 0 to 1"),
    ({"fold": 1}, "fold: 1; there is one split"),
    ({"folds": 3, "stratify": ["sex"]}, "stratify: the index has no column sex"),
])
def test_folds_that_cannot_be_are_refused_before_work(store, values, words):
    for model, more in ((Pretrain, {}), (Finetune, {"encoder": "random", "task": "lesion"})):
        with pytest.raises(ParameterError, match=words):
            check(model, {"prepared": str(store.folder), "output_dir": "outputs/x", **more, **values})


def test_a_refused_label_says_where_cells_are_corrected(tmp_path):
    store = make_store(tmp_path / "store")
    changed(store, sex=np.where(store.index["participant"] < "003", "Male", np.where(store.index["lesion"], "M", "F")))
    for task, words in (("sex", "M and Male: one class or two.* Write each class in one way. Correct cells in the "
                                "cohort's table, then run 1_preprocess again .finished scans are kept.$"),
                        ("gender", "task: gender: no such label column; the index has [a-z, ]*sex[a-z, ]*$")):
        with pytest.raises(ParameterError, match=words):
            check(Finetune, {"prepared": str(store.folder), "output_dir": "outputs/x", "encoder": "random",
                             "task": task})


def test_an_encoder_of_each_fold_and_seed_must_be_there(store, tmp_path):
    assert encoder_at("a/fold{fold}-seed{seed}/{other}", 3, 14) == "a/fold3-seed14/{other}"
    spec = str(tmp_path / "fold{fold}-seed{seed}")
    for fold in range(3):
        for seed in (0, 4):
            if (fold, seed) != (2, 4):
                save_encoder(tmp_path / f"fold{fold}-seed{seed}/encoder.safetensors",
                             build_encoder("resnet18_narrow", GRID), {})
    values = benchmark(store, encoders={"SimCLR": spec}, folds=3, seeds=[0, 4])
    with pytest.raises(ParameterError, match="1 thing is wrong:\n  encoders.SimCLR: no file .*fold2-seed4"):
        check(Benchmark, values)
    check(Benchmark, values | {"seeds": [0]})
    tuned = {"prepared": str(store.folder), "output_dir": "outputs/x", "task": "age", "encoder": spec, "folds": 3}
    check(Finetune, tuned | {"fold": 2})
    with pytest.raises(ParameterError, match="encoder: no file .*fold2-seed4"):
        check(Finetune, tuned | {"fold": 2, "seed": 4})


# named test sets


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two more cohorts: AIBL has the lesions and no age; GSP has both, and says which rows are its test's."""
    aibl, gsp = (make_store(tmp_path_factory.mktemp(name), 12, seed=seed, dataset=name)
                 for seed, name in enumerate(("AIBL", "GSP"), 1))
    split = np.where(gsp.index["participant"] < "006", "train", "test")
    return {"AIBL": changed(aibl, age=np.nan, site="far"), "GSP": changed(gsp, split=split)}


def test_people_scanned_at_several_sites_are_no_test_set(store, others, tmp_path):
    away = others["GSP"].index["participant"] < "003"
    write_table(tmp_path / "GSP/index.csv", others["GSP"].index.assign(split=np.where(away, "travelling", "")))
    for name in ("scans", "preparation.json"):
        (tmp_path / "GSP" / name).symlink_to(others["GSP"].folder / name)
    task, = read_tasks({"prepared": store, "GSP": Store.open(tmp_path / "GSP")}, "age")
    assert set(task.parts["GSP"].rows["participant"]) == set(others["GSP"].index["participant"][~away])


def test_each_test_set_has_its_own_tasks(store, others):
    write_table(others["AIBL"].folder / "index.csv", others["AIBL"].index.drop(columns="age"))
    folders = {name: str(other.folder) for name, other in others.items()}
    params = check(Benchmark, benchmark(store, tests={"AIBL": folders["AIBL"], "GSP": {
        "prepared": folders["GSP"], "tasks": ["age"]}}, out_of_distribution=folders["GSP"]))
    assert params.plain()["tests"]["GSP"]["tasks"] == ["age"]  # goes to YAML and back
    assert Benchmark.model_validate(params.plain()).tests == params.tests
    stores = open_stores(params)
    tasks = {name: tasks_of(params, stores, name)[0] for name in params.tasks}
    assert tasks["lesion"].tested == {"test": "in_distribution", "AIBL": "AIBL",
                                      "out_of_distribution": "out_of_distribution"}
    assert list(tasks["age"].tested) == ["test", "GSP", "out_of_distribution"]
    assert set(tasks["age"].parts["GSP"].rows["participant"]) == {f"{n:03d}" for n in range(6, 12)}
    assert tasks["lesion"].parts["AIBL"].participants.nunique() == 12


@pytest.mark.parametrize(("tests", "words"), [
    ({"AIBL": "nowhere"}, "tests.AIBL: nowhere holds no index.csv"),
    ({"AIBL": {"prepared": "AIBL", "tasks": ["lesion", "mmse"]}}, "tests.AIBL: no label column mmse in its index"),
    ({"AIBL": {"prepared": "AIBL", "tasks": ["site"]}}, "tests.AIBL: site is not among tasks"),
    ({"AIBL": {"prepared": "AIBL", "task": ["lesion"]}}, "tests.AIBL.task: unknown parameter"),
    ({"test": "AIBL"}, "tests.test: not a name for a test set"),
    ({"models": "AIBL"}, "tests.models: not a name for a test set"),  # a key of the record
    ({"a/b": "AIBL"}, "tests.a/b: not a name for a test set"),
    ({"out_of_distribution": "GSP"}, "tests.out_of_distribution: the parameter out_of_distribution has this name"),
])
def test_test_sets_that_cannot_be_are_refused_before_work(store, others, tests, words):
    def placed(value):
        return value if value == "nowhere" else str(others[value].folder)

    tests = {name: placed(test) if isinstance(test, str) else test | {"prepared": placed(test["prepared"])}
             for name, test in tests.items()}
    with pytest.raises(ParameterError, match=words):
        check(Benchmark, benchmark(store, tests=tests, out_of_distribution=str(others["GSP"].folder)))


def test_a_label_that_a_test_set_lacks_is_not_tested_there_and_that_is_said(tmp_path, others, capsys):
    store = make_store(tmp_path / "store")
    out = store.index["participant"] >= "018"
    store = changed(store, split=np.where(out, "out_of_distribution", "train"),
                    lesion=store.index["lesion"].where(~out))
    store = changed(store, split=store.index["split"].where(store.index["participant"] >= "006", "test").where(
        store.index["participant"] >= "004", "validation"))
    write_table(tmp_path / "GSP/index.csv", others["GSP"].index.drop(columns="age"))
    for name in ("scans", "preparation.json"):
        (tmp_path / "GSP" / name).symlink_to(others["GSP"].folder / name)
    params = check(Benchmark, benchmark(store, tests={"GSP": str(tmp_path / "GSP")}))
    tested = {task: list(tasks_of(params, open_stores(params), task)[0].tested) for task in params.tasks}
    assert tested == {"lesion": ["test", "GSP"], "age": ["test", "out_of_distribution"]}
    assert capsys.readouterr().out.splitlines() == [
        "lesion: out_of_distribution has no such label, so it is not tested there",
        "age: GSP has no such label, so it is not tested there"]


def test_codes_for_missing_in_a_test_set_are_asked_about_as_in_training(store, others):
    gsp = others["GSP"]
    coded = Store(gsp.folder, gsp.index.assign(age=gsp.index["age"].where(gsp.index.index > 0, 999)), gsp.record)
    stores = {"prepared": store, "GSP": coded}
    with pytest.raises(LabelError, match="GSP, .*: age: 999 in 1 rows looks like a code for a missing value"):
        read_tasks(stores, "age")
    read_tasks(stores, "age", missing_codes=[999])
    read_tasks(stores, "age", "regression")


def test_what_a_test_set_shares_with_training_and_pretraining_is_said(store, others):
    here = Store(store.folder, store.index.assign(scanner="Prisma"), store.record)
    aibl, gsp = others["AIBL"], others["GSP"]
    seen = {**seen_by(aibl, aibl.index, participant_ids(aibl.index))}
    assert seen["seen"] == {"dataset": {"AIBL": 16}, "site": {"far": 16}}
    task, = read_tasks({"prepared": here, "AIBL": aibl, "GSP": gsp}, "lesion")
    table = overlap(task, seen).set_index("distribution")
    assert table["shares"].to_dict() == {
        "in_distribution": "dataset made (train), site A and B (train), scanner Prisma (train)",
        "AIBL": "dataset AIBL (pretraining), site far (pretraining)", "GSP": "site A and B (train)"}
    assert table.loc["GSP", "dataset"] == "GSP" and table.loc["GSP", "site"] == "A, B" and not table["unknown"].any()
    # random weights saw nothing; of an encoder of an older kit it is not known
    alone = overlap(task, {"participants": []}).set_index("distribution")
    assert alone.loc["AIBL", ["shares", "unknown"]].tolist() == ["", ""]
    older = overlap(task, {"participants": ["x"]}).set_index("distribution")
    assert older.loc["AIBL", "unknown"] == "dataset (pretraining), site (pretraining)"
    # sites that are numbers are those of a dataset
    numbered = [Store(each.folder, each.index.assign(site=1), each.record) for each in (store, gsp)]
    task, = read_tasks(dict(zip(("prepared", "GSP"), numbered, strict=True)), "lesion")
    assert overlap(task, {}).set_index("distribution")["shares"].to_dict() == {
        "in_distribution": "dataset made (train), site made/1 (train)", "GSP": ""}


def test_an_encoders_record_says_where_its_scans_were_from(store, tmp_path):
    params = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path})
    objective = build_objective(params, store)
    record = record_of(params, store, objective, pretrain_inputs(params, store, tmp_path), tmp_path)
    save_encoder(tmp_path / "encoder.safetensors", objective.encoder, record)
    learned = pd.concat(choose_scans(params, store))
    assert read_record(tmp_path)["seen"] == {"dataset": {"made": len(learned)},
                                             "site": learned["site"].value_counts().to_dict()}


def test_covariates_of_those_tested(store):
    index = store.index.assign(sex=[None if row % 5 == 0 else "FM"[row % 2] for row in range(len(store.index))])
    task, = read_tasks({"prepared": Store(store.folder, index, store.record)}, "lesion")
    part = task.parts["test"]
    found = covariates(part)
    assert found["scan"].tolist() == part.rows["scan"].tolist()
    assert found["participant"].tolist() == part.participants.tolist()
    assert found["age"].tolist() == part.rows["age"].tolist() and found["age"].dtype == float
    sexes = index.set_index("scan").loc[found["scan"], "sex"]
    assert [each or "" for each in found["sex"]] == ["" if pd.isna(each) else each for each in sexes]
    bare = covariates(dataclasses.replace(part, rows=part.rows.drop(columns=["age", "sex"])))
    assert bare["age"].isna().all() and bare["sex"].isna().all() and len(bare) == len(found)
    # as other cohorts write them
    written = part.rows.assign(Age=part.rows["age"], Gender=["male", " m", "Female"] * 2).drop(
        columns=["age", "sex"])
    others = covariates(dataclasses.replace(part, rows=written))
    assert others["age"].tolist() == found["age"].tolist() and others["sex"].tolist() == ["M", "M", "F"] * 2
    coded = covariates(dataclasses.replace(part, rows=part.rows.assign(sex=[1.0, 2.0, np.nan] * 2)))
    assert coded["sex"].tolist() == ["1", "2", None] * 2
    # codes for missing are no age and no sex that two people could share
    coded = covariates(dataclasses.replace(part, rows=part.rows.assign(
        age=[60, -9, 999, 61, -9, 62], sex=["M", "NA", "-9", "unknown", "F", "?"])))
    assert coded["age"].fillna(0).tolist() == [60, 0, 0, 61, 0, 62]
    assert coded["sex"].tolist() == ["M", None, None, None, "F", None]
