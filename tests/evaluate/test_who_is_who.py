"""From tables and folders to a refusal: nobody who was pretrained on is tested, under whatever name."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from kit.cohort.identity import IdentityError, participant_ids
from kit.cohort.split import LeakageError
from kit.cohort.tables import read_cohort
from kit.evaluate.finetune import run_finetune
from kit.models.encoder_file import read_record, save_encoder
from kit.params import Benchmark, Finetune, Pretrain
from kit.preprocess.nifti import write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import UNUSABLE, Preparation
from kit.reading import ParameterError, check
from kit.runs import Run, write_table
from kit.store.grid import Grid
from kit.store.leakage import voxel_hashes
from kit.store.store import Store
from kit.train.pretrain import build_objective, check_start, choose_scans, pretrain_inputs, record_of
from tests.conftest import make_store

SETTINGS = Preparation(Grid((12, 16, 14), 12.0), "none", "nonzero")
PEOPLE = 20


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of twenty scans, 01.nii.gz to 20.nii.gz: noise in a box of a brain's size."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    affine = np.diag([12.0, 12, 12, 1])
    affine[:3, 3] = [-70, -100, -60]
    for number in range(1, PEOPLE + 1):
        values = np.pad(rng.uniform(10, 100 + number, (8, 9, 10)), 1).astype(np.float32)
        write_nifti(folder / f"{number:02d}.nii.gz", values, affine)
    return folder


def table(scans, name, participant="{:03d}", dataset="", people=range(1, PEOPLE + 1), **columns):
    """A CSV of these people; an empty `dataset` or `participant` is no column."""
    rows = {"image_path": [f"{number:02d}.nii.gz" for number in people], "age": [40.5 + number for number in people]}
    rows |= {"participant": [participant.format(number) for number in people]} if participant else {}
    rows |= {"dataset": dataset} if dataset else {}
    pd.DataFrame(rows | columns).to_csv(scans / f"{name}.csv", index=False)
    return scans / f"{name}.csv"


def prepared(path, folder):
    prepare(read_cohort(path), folder, SETTINGS, workers=0)
    return Store.open(folder)


def encoder_of(store, folder, **changes):
    """What 2_pretrain leaves, but for the training."""
    params = Pretrain.model_validate({"prepared": store.folder, "output_dir": folder,
                                      "accept_flags": UNUSABLE, **changes})  # noise looks like no brain
    check_start(params)
    objective = build_objective(params, store)
    record = record_of(params, store, objective, pretrain_inputs(params, store, folder), folder)
    save_encoder(folder / "encoder.safetensors", objective.encoder, record)
    return str(folder)


def finetuned(store, encoder, folder, **changes):
    params = check(Finetune, {"prepared": str(store.folder), "encoder": encoder, "task": "age", "mode": "probe",
                              "output_dir": str(folder), "accept_flags": UNUSABLE, **changes})
    run = Run.of(params)
    try:
        return run_finetune(params, run)
    finally:
        run.close()


@pytest.fixture(scope="module")
def adni(scans, tmp_path_factory):
    """An encoder that saw all twenty as ADNI/001 to ADNI/020."""
    folder = tmp_path_factory.mktemp("adni")
    store = prepared(table(scans, "pretrain", dataset="ADNI"), folder / "prepared")
    return encoder_of(store, folder / "encoder", leave_out_test=False)


@pytest.mark.slow
def test_the_same_people_in_two_tables_are_asked_about_then_found(scans, adni, tmp_path):
    store = prepared(table(scans, "adni"), tmp_path / "a")
    with pytest.raises(IdentityError, match="cohort adni has no column dataset.* encoder's pretraining"):
        finetuned(store, adni, tmp_path / "run")
    scan = tmp_path / "a/scans" / f"{store.index['scan'][0]}.b2nd"
    before = scan.stat().st_mtime_ns
    with pytest.raises(LeakageError, match="4 of 4 participants"):  # nothing was prepared anew
        finetuned(prepared(table(scans, "adni", dataset="adni "), tmp_path / "a"), adni, tmp_path / "again")
    assert scan.stat().st_mtime_ns == before
    assert finetuned(store, "random:resnet18_narrow", tmp_path / "random")[2]["train_participants"] == 12
    for name, participant, dataset in (("b", "sub-{:03d}", "ADNI"), ("c", "{}", "adni"), ("d", " {:02d} ", " ADNI")):
        store = prepared(table(scans, name, participant, dataset), tmp_path / name)
        with pytest.raises(LeakageError, match="4 of 4 participants to be evaluated were seen in pretraining"):
            finetuned(store, adni, tmp_path / f"run {name}")
    with pytest.raises(LeakageError, match="4 of 4 scans to be evaluated were seen in pretraining, under other names"):
        finetuned(prepared(table(scans, "e", "P{}", "other"), tmp_path / "e"), adni, tmp_path / "run e")


@pytest.mark.parametrize(("name", "what"), [("ADNI", "4 of 4 participants"), ("Renamed since", "4 of 4 scans")])
@pytest.mark.parametrize("copy", [shutil.copy, lambda source, target: target.symlink_to(source)])
def test_a_bids_folder_of_the_same_scans_is_found_whatever_its_name(scans, adni, tmp_path, name, what, copy):
    bids = tmp_path / "bids"
    rows = ["participant_id\tage"]
    for number in range(1, PEOPLE + 1):
        anat = bids / f"sub-{number:03d}" / "anat"
        anat.mkdir(parents=True)
        copy(scans / f"{number:02d}.nii.gz", anat / f"sub-{number:03d}_T1w.nii.gz")
        rows.append(f"sub-{number:03d}\t{40.5 + number}")
    (bids / "participants.tsv").write_text("\n".join(rows))
    (bids / "dataset_description.json").write_text(json.dumps({"Name": name}))
    with pytest.raises(LeakageError, match=f"{what} to be evaluated were seen in pretraining"):
        finetuned(prepared(bids, tmp_path / "prepared"), adni, tmp_path / "run")


def test_other_people_are_tested_and_what_was_seen_is_said(scans, tmp_path, capsys):
    half = prepared(table(scans, "first", dataset="ADNI", people=range(1, 11)), tmp_path / "first")
    rest = prepared(table(scans, "second", dataset="ADNI", people=range(11, 21)), tmp_path / "second")
    encoder = encoder_of(half, tmp_path / "encoder", leave_out_test=False)
    assert finetuned(rest, encoder, tmp_path / "run")[2]["train_participants"] == 6
    assert "SEEN" not in capsys.readouterr().out
    finetuned(half, encoder, tmp_path / "same", allow_seen_participants=True)
    assert "SEEN IN PRETRAINING: 2 of 2 participants, 2 of 2 scans\n" in capsys.readouterr().out


def test_an_encoder_of_a_nameless_dataset_knows_its_people_in_any(scans, tmp_path):
    store = prepared(table(scans, "nameless", people=range(1, 11)), tmp_path / "nameless")
    encoder = encoder_of(store, tmp_path / "encoder", leave_out_test=False)
    # the same names, other scans: as nobody said whose they are, they count as the same people
    other = table(scans, "named", participant="", dataset="ADNI", people=range(11, 21),
                  **{"Participant ID": [f"{number:03d}" for number in range(1, 11)]})
    with pytest.raises(LeakageError, match="2 of 2 participants"):
        finetuned(prepared(other, tmp_path / "named"), encoder, tmp_path / "run")


def test_people_known_under_two_names_are_found_by_a_table_of_aliases(tmp_path):
    one, two = (make_store(tmp_path / name, seed=seed, dataset=name) for seed, name in enumerate(("ADNI", "OASIS")))
    encoder = encoder_of(one, tmp_path / "encoder")
    assert finetuned(two, encoder, tmp_path / "a")[2]["in_distribution_mean_absolute_error_participants"] == 5
    people = sorted(set(choose_scans(Pretrain.model_validate({"prepared": one.folder, "output_dir": tmp_path}), one)[0][
        "participant"]))
    assert len(people) == 17  # of 24, less 5 for testing and 2 for validation
    rows = [f"{dataset},sub-{name},P{row}" for row, name in enumerate(two.index["participant"].unique())
            for dataset, name in (("oasis", name), ("ADNI", people[row % 17]))]
    rows = [row for row in dict.fromkeys(rows) if int(row.rpartition("P")[2]) < 17]
    (tmp_path / "aliases.csv").write_text("dataset,participant,person\n" + "\n".join(rows))
    seen = pd.read_csv(tmp_path / "a/predictions.csv", dtype=str)["participant"].unique()
    expected = sum(int(name) < 17 for name in seen)
    assert expected
    with pytest.raises(LeakageError, match=f"{expected} of 5 participants"):
        finetuned(two, encoder, tmp_path / "b", aliases=str(tmp_path / "aliases.csv"))
    (tmp_path / "aliases.csv").write_text("dataset,participant\n1,2\n")
    with pytest.raises(ParameterError, match="aliases: .*aliases.csv: needs dataset, participant, person"):
        finetuned(two, encoder, tmp_path / "c", aliases=str(tmp_path / "aliases.csv"))


def test_aliases_of_one_cohort_stay_on_one_side(store, tmp_path):
    pairs = [f"made,{number:03d},P{number // 2}" for number in range(24)]
    (tmp_path / "aliases.csv").write_text("dataset,participant,person\n" + "\n".join(pairs))
    for _ in range(2):  # trained, then read
        task, predictions, _ = finetuned(store, "random:resnet18_narrow", tmp_path / "run",
                                         aliases=str(tmp_path / "aliases.csv"))
        assert participant_ids(predictions).tolist() == task.parts["test"].participants.tolist()  # as scored, so drawn
    sides = [{int(name) // 2 for name in part.rows["participant"]} for part in task.parts.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12


def test_a_scan_under_two_names_in_two_splits_is_refused(scans, tmp_path):
    for number in range(1, 11):
        (scans / f"{number + 40:02d}.nii.gz").write_bytes((scans / f"{number:02d}.nii.gz").read_bytes())
    people = [*range(1, PEOPLE + 1), *range(41, 51)]
    splits = np.where(np.array(people) < 21, np.resize(["train", "validation", "test"], 30), "train")
    store = prepared(table(scans, "twice", dataset="x", people=people, split=splits), tmp_path / "a")
    with pytest.raises(LeakageError, match="3 scans are both in train and in validation, under two names"):
        finetuned(store, "random:resnet18_narrow", tmp_path / "run")
    # without a column split pretraining, too, refuses to learn from a scan that will be tested
    store = prepared(table(scans, "twice2", dataset="x", people=people), tmp_path / "b")
    with pytest.raises(LeakageError, match="scans are both in pretrain and in test, under two names"):
        encoder_of(store, tmp_path / "encoder")


def test_without_a_column_split_the_tested_are_left_out_of_pretraining(store, tmp_path, capsys):
    encoder = encoder_of(store, tmp_path / "encoder")
    assert "no column split: 5 of 24 participants are left out, for testing" in capsys.readouterr().out
    assert len(read_record(encoder)["participants"]) == 19
    people = []
    for seed in (0, 1):
        predictions = finetuned(store, encoder, tmp_path / str(seed), seed=seed)[1]
        people.append(sorted(predictions["participant"].unique()))
    assert people[0] == people[1] and len(people[0]) == 5


def test_rows_without_a_participant_are_tested_only_if_each_is_a_person(scans, tmp_path):
    store = prepared(table(scans, "nobody", participant=""), tmp_path / "a")
    with pytest.raises(IdentityError, match="20 of 20 scans have no participant"):
        finetuned(store, "random:resnet18_narrow", tmp_path / "run")
    found = finetuned(store, "random:resnet18_narrow", tmp_path / "all", rows_are_people=True)[1]
    again = prepared(table(scans, "nobody", participant="", people=range(PEOPLE, 0, -1)), tmp_path / "b")
    turned = finetuned(again, "random:resnet18_narrow", tmp_path / "again", rows_are_people=True)[1]
    assert sorted(found["true"]) == sorted(turned["true"]) and len(found) == 4


def test_a_second_cohort_must_have_a_dataset_and_other_people(scans, tmp_path):
    def store(name, *arguments, **options):
        return prepared(table(scans, name, *arguments, **options), tmp_path / name)

    one = store("one", dataset="x", people=range(1, 11))
    for name, options, error, words in (
            ("two", {"people": range(11, 21)}, IdentityError, "cohort two has no column dataset"),
            ("three", {"people": range(1, 11), "dataset": "x"}, LeakageError, "6 participants are both in train and"),
            ("four", {"people": range(1, 11), "dataset": "y"}, LeakageError, "6 scans are both in train and")):
        with pytest.raises(error, match=words):
            finetuned(one, "random:resnet18_narrow", tmp_path / f"run {name}",
                   out_of_distribution=str(store(name, **options).folder))
    other = store("five", people=range(11, 21), dataset="y")
    task = finetuned(one, "random:resnet18_narrow", tmp_path / "run", out_of_distribution=str(other.folder))[0]
    assert len(task.parts["out_of_distribution"].rows) == 10


def test_the_sites_own_salt(store, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_SALT", "a secret of the site, longer than the 64 bytes that a key of BLAKE2 may have " * 2)
    encoder = encoder_of(store, tmp_path / "encoder", leave_out_test=False)
    with pytest.raises(LeakageError, match="5 of 5 participants"):
        finetuned(store, encoder, tmp_path / "a")
    monkeypatch.delenv("KIT_SALT")
    with pytest.raises(LeakageError, match="hashed with another salt: set KIT_SALT"):
        finetuned(store, encoder, tmp_path / "b")


def test_encoders_of_an_older_kit_are_refused(store, tmp_path):
    encoder = encoder_of(store, tmp_path / "encoder")
    record = read_record(encoder)
    del record["voxels"], record["salt"]
    params = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path})
    save_encoder(tmp_path / "encoder/encoder.safetensors", build_objective(params, store).encoder, record)
    with pytest.raises(LeakageError, match="hashed with another salt"):
        finetuned(store, encoder, tmp_path / "run")


def test_voxels_say_which_scan_it_is_not_which_mask(store, tmp_path):
    hashes = voxel_hashes(store, store.index["scan"])
    assert len(set(hashes.values())) == len(store.index) == 32
    again = make_store(tmp_path / "again", dataset="other")
    assert voxel_hashes(again, again.index["scan"]) == hashes


def test_predictions_come_back_with_the_names_that_they_had(store, tmp_path):
    first = finetuned(store, "random:resnet18_narrow", tmp_path / "run")[1]
    again = finetuned(store, "random:resnet18_narrow", tmp_path / "run")[1]
    assert again["participant"].tolist() == first["participant"].tolist()
    assert all(len(name) == 3 for name in again["participant"])


def coded(folder):
    """A store whose column `sex` has 1, 2 and for missing 9; `apoe` has 0, 1 and 2."""
    store = make_store(folder)
    codes = [9 if row % 8 == 7 else 1 + row % 2 for row in range(len(store.index))]
    index = store.index.assign(sex=codes, apoe=np.arange(len(store.index)) % 3)
    write_table(store.folder / "index.csv", index)
    return Store.open(folder)


def test_codes_are_asked_about_and_named_by_parameters(tmp_path):
    store = coded(tmp_path / "store")
    with pytest.raises(ParameterError, match=r"task: sex: .* Found 1 \(16\), 2 \(12\), 9 \(4\).* missing_codes"):
        finetuned(store, "random:resnet18_narrow", tmp_path / "a", task="sex")
    task = finetuned(store, "random:resnet18_narrow", tmp_path / "b", task="sex", missing_codes=[9])[0]
    assert task.labels.classes == ("1", "2") and int(np.isnan(task.labels.values).sum()) == 4
    values = {"prepared": str(store.folder), "output_dir": str(tmp_path / "c"), "tasks": ["sex", "apoe"],
              "encoders": {"a": "random"}, "finetune_tasks": []}
    with pytest.raises(ParameterError, match="(?s)tasks: sex: are these class codes.*tasks: apoe: are these class"):
        check(Benchmark, values)
    check(Benchmark, values | {"missing_codes": {"sex": [9]}, "task_types": {"apoe": "regression"}})
    with pytest.raises(ParameterError, match="missing_codes: sx is not among tasks"):
        check(Benchmark, values | {"missing_codes": {"sx": [9]}, "task_types": {"sex": "regression",
                                                                               "apoe": "regression"}})
