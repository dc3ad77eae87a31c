"""What counts of what a run reads, and in which words a change is told."""

import pandas as pd
import pytest

from kit.cohort.identity import participant_ids
from kit.params import NOTEBOOKS
from kit.provenance import (
    FIELDS,
    MadeFrom,
    Side,
    Used,
    changes,
    check_fit,
    compare,
    fingerprint,
    made_from,
    read_made_from,
    words,
    write,
)
from tests.conftest import make_store


def account(store, rows=None, part="train", **more):
    rows = store.index if rows is None else rows
    return made_from([Used("prepared", part, store, rows, participant_ids(rows), rows["lesion"])], **more)


def test_rows_order_and_noted_things_do_not_count(store):
    made = account(store, encoder={"weights": "ab", "from": "here"})
    other = account(store, store.index.iloc[::-1], encoder={"weights": "ab", "from": "there"}, allowed=["mask"])
    assert made.fingerprint == other.fingerprint and changes(made, other) == []
    assert made.rows.equals(other.rows) and len(made.fingerprint) == 10
    int(made.fingerprint, 16)
    assert pd.to_numeric(pd.Series([made.fingerprint]), errors="coerce").isna().all()


def test_every_aspect_counts(store):
    def moved(record):
        return record | {"prepared": record["prepared"] | {"preparation": {"mask": "nonzero"}}}

    made, more = account(store, labels={"task": "lesion", "classes": ["0", "1"]}), {"labels": {"task": "lesion"}}
    others = [account(store, store.index.iloc[1:]), account(store, part="test"),
              account(store, store.index.assign(lesion=1)), account(store, store.index.assign(dataset="x")),
              account(store, store.index.assign(session="x")), account(store, **more),
              MadeFrom(moved(made.record)), MadeFrom(made.record | {"kit": "0"})]
    assert len({fingerprint(other.record) for other in [made, *others]}) == 9
    assert all(changes(made, MadeFrom(other.record | {"kit": other.record["kit"]})) for other in others)


def test_it_comes_back_from_its_folder(store, tmp_path):
    made = account(store)
    write(tmp_path, made)
    back = read_made_from(tmp_path)
    assert back.record == made.record and back.rows.equals(made.rows)
    (tmp_path / "made_from.csv").unlink()
    assert read_made_from(tmp_path).rows is None


def test_a_benchmarks_words_tell_encoders_from_random_weights_and_baselines(store, tmp_path):
    encoders = {"voxels": "none", "site": "none", "random init": "random", "SimCLR": "simclr"}
    record = account(store).record
    models = {name: {**record, "encoder": {"name": name, "weights": "0123456789", "objective": objective}}
              for name, objective in encoders.items()}
    write(tmp_path, MadeFrom({"kit": "1.0", "fingerprint": "f1", "models": models}))
    assert words(tmp_path) == (
        "made from: encoder SimCLR 01234567 (simclr), random init from random weights, baselines voxels and site, "
        f"up to {len(store.index)} scans of prepared, kit 1.0; fingerprint f1")
    write(tmp_path, account(store, encoder={"weights": "0123456789", "objective": "random"}))  # of 3_finetune: no names
    assert words(tmp_path).startswith("made from: encoder 01234567 (random), ")


@pytest.mark.parametrize(("folds", "said"), [
    (1, "SimCLR 00000000 (simclr)"), (2, "SimCLR 00000000, 11111111 (simclr)"),
    (4, "SimCLR 00000000, 11111111, 22222222 ... (simclr)")])
def test_a_benchmarks_words_show_the_encoders_of_several_folds(store, tmp_path, folds, said):
    record = account(store).record  # of two tasks for each fold
    models = {f"{fold}{task}": {**record, "encoder": {"name": "SimCLR", "weights": str(fold) * 16,
                                                      "objective": "simclr"}} for fold in range(folds) for task in "ab"}
    write(tmp_path, MadeFrom({"kit": "1.0", "fingerprint": "f1", "models": models}))
    assert words(tmp_path).startswith(f"made from: encoder {said}, up to {len(store.index)} scans")


def test_a_record_that_cannot_be_read_just_now_is_not_taken_for_none(tmp_path):
    assert read_made_from(tmp_path) is None
    (tmp_path / "made_from.json").mkdir()  # an OSError, as of a disk that is away
    with pytest.raises(IsADirectoryError):
        read_made_from(tmp_path)


def test_a_scan_that_cannot_be_read_is_another_scan(tmp_path):
    store = make_store(tmp_path, participants=4)
    before = account(store)
    (tmp_path / "scans/made_001_01.b2nd").unlink()
    assert changes(before, account(store)) == ["scans of prepared: 1 of 5 changed: made_001_01"]


def test_changes_are_told_with_numbers_where_rows_are_known(store):
    few, all_of_them = account(store, store.index.iloc[2:]), account(store)
    first, second = store.index["scan"][:2]
    assert changes(few, all_of_them) == [f"scans of prepared: 2 more than the 30: {first}, {second}"]
    assert changes(all_of_them, few) == [f"scans of prepared: 2 of 32 gone: {first}, {second}"]
    assert changes(MadeFrom(few.record), all_of_them) == [
        "scans, split, labels, participants, sessions or datasets of prepared changed (30 scans then, 32 now)"]
    prepared = few.record["prepared"]
    newer = MadeFrom(few.record | {"prepared": prepared | {"preparation": prepared["preparation"] | {"field": 1}}})
    assert changes(few, newer) == ["prepared: field: then None, now 1"]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_preparation_is_compared(field):
    assert list(compare({"a": {field: [1]}, "b": {field: [2]}, "c": {}})) == [field]
    assert compare({"a": {field: [1]}, "b": {field: [1]}}) == {}


def test_what_agrees_is_said_by_no_word(capsys):
    side = Side("here", {"mask": "auto", "versions": {"nibabel": "5"}}, ["given"])
    assert check_fit({"encoder": side, "prepared": side}) == [] and capsys.readouterr().out == ""


def test_the_same_name_and_default_wherever_preparations_meet():
    having = {name: model.model_fields["allow_differences"].default for name, model in NOTEBOOKS.items()
              if "allow_differences" in model.model_fields}
    assert having == {"3_finetune": [], "4_saliency": [], "5_benchmark": [], "6_apply": []}
