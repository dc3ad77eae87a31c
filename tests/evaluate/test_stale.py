"""Results that were made from something else than lies there now: computed anew, or refused, never shown."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from kit.evaluate import benchmark, benchmark_cells
from kit.evaluate import finetune as finetuning
from kit.explain.atlas import load_atlas
from kit.explain.maps import explainer_of, open_model, region_shares, saliency_maps
from kit.models.encoder_file import read_record, save_encoder
from kit.models.encoders import build_encoder
from kit.params import Benchmark, Finetune, Pretrain, Saliency
from kit.provenance import MisfitError, words
from kit.reading import check
from kit.runs import Run
from kit.store.store import Store, scan_path, write_scan
from kit.train import checkpoint, pretrain
from kit.train.checkpoint import CheckpointError
from tests.conftest import GRID, make_store


class Killed(Exception):
    """Stands for the machine going away."""


@pytest.fixture
def store(tmp_path):
    """One that tests may change."""
    return make_store(tmp_path / "store")


def change_index(store, change):
    """What preparing a corrected cohort again does: the table is another, the scans stay."""
    index = pd.read_csv(store.folder / "index.csv", dtype={name: str for name in ("participant", "session")})
    change(index).to_csv(store.folder / "index.csv", index=False)


def correct_labels(store):
    """The first eight scans' label `lesion` was the other one."""
    change_index(store, lambda index: index.assign(lesion=np.where(index.index < 8, 1 - index["lesion"],
                                                                   index["lesion"])))


def change_scans(store, *scans):
    for scan in scans:
        image, mask = store.read(scan)
        write_scan(scan_path(store.folder, scan), image.astype(np.float32) * 1.5, mask, scan, store.grid.affine)


def change_record(store, **fields):
    path = store.folder / "preparation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def encoder_file(store, path, seed=0, **record):
    """An encoder that saw nobody."""
    record = {"architecture": "resnet18_narrow", "objective": "simclr", "preparation": store.record,
              "participants": [], "voxels": [], "made_from": {"prepared": {}}} | record
    save_encoder(path, build_encoder("resnet18_narrow", GRID, seed), record)
    return str(path)


def through(model, function, values):
    """As a notebook does: parameters checked, the folder taken, the work done, the folder given back."""
    params = check(model, {name: str(value) if hasattr(value, "parts") else value for name, value in values.items()})
    run = Run.of(params)
    try:
        return function(params, run)
    finally:
        run.close()


def finetuned(store, folder, **changes):
    return through(Finetune, finetuning.run_finetune, {
        "prepared": store.folder, "encoder": "random:resnet18_narrow", "task": "lesion", "mode": "probe", "steps": 3,
        "batch_size": 8, "output_dir": folder, **changes})


def benchmarked(store, folder, **changes):
    return through(Benchmark, benchmark.run_benchmark, {
        "prepared": store.folder, "encoders": {"one": "random:resnet18_narrow"}, "tasks": ["lesion", "age"],
        "baselines": [],
        "finetune_tasks": [], "label_fractions": [1.0], "output_dir": folder, **changes})


def pretrained(store, folder, **changes):
    return through(Pretrain, pretrain.pretrain, {
        "prepared": store.folder, "epochs": 1, "batch_size": 8, "projection": [16, 8], "validation_fraction": 0.2,
        "leave_out_test": False, "output_dir": folder, **changes})


@pytest.fixture
def fitted(monkeypatch):
    """The probes that are fitted, counted."""
    calls = []

    def count(module):
        real = module.probe_tested
        monkeypatch.setattr(module, "probe_tested", lambda *arguments: calls.append(1) or real(*arguments))

    count(finetuning)
    count(benchmark_cells)
    return calls


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name != "fingerprint"}


# 3_finetune


def test_corrected_labels_are_learned_anew(store, tmp_path, capsys, fitted):
    old = finetuned(store, tmp_path / "run")[2]
    correct_labels(store)
    _, table, anew = finetuned(store, tmp_path / "run")
    said = capsys.readouterr().out
    assert "computed again" in said and "labels of lesion of prepared: 8 of 32 changed: made_000_01, made_001" in said
    fresh = finetuned(store, tmp_path / "fresh")[2]
    assert anew == fresh and anew["fingerprint"] != old["fingerprint"] and numbers(anew) != numbers(old)
    assert set(table["fingerprint"]) == {anew["fingerprint"]} and len(fitted) == 3
    assert finetuned(store, tmp_path / "run")[2] == anew and len(fitted) == 3
    assert "computed again" not in capsys.readouterr().out


def test_what_is_not_read_may_change(store, tmp_path, fitted):
    """Another label, the rows' order, the store's place, and who is beside the scans with this label."""
    change_index(store, lambda index: index.assign(lesion=index["lesion"].where(index.index != 5)))
    first = finetuned(store, tmp_path / "run")[2]
    change_index(store, lambda index: index.assign(age=index["age"] + 1, note="new").iloc[::-1])
    change_scans(store, store.index["scan"][5])
    assert finetuned(store, tmp_path / "run")[2] == first and len(fitted) == 1
    shutil.move(store.folder, tmp_path / "moved")
    moved = finetuned(Store.open(tmp_path / "moved"), tmp_path / "elsewhere")[2]
    assert moved["fingerprint"] == first["fingerprint"]


def test_changed_scans_and_an_encoder_trained_anew_are_said(store, tmp_path, capsys, fitted):
    encoder = encoder_file(store, tmp_path / "encoder.safetensors")
    finetuned(store, tmp_path / "run", encoder=encoder)
    encoder_file(store, tmp_path / "encoder.safetensors", seed=1)
    change_scans(store, "made_003_01")
    change_index(store, lambda index: index[index["scan"] != "made_001_01"])
    anew = finetuned(store, tmp_path / "run", encoder=encoder)[2]
    said = capsys.readouterr().out
    assert "encoder weights: " in said and "scans of prepared: 1 of 32 gone: made_001_01" in said
    assert "scans of prepared: 1 of 32 changed: made_003_01" in said
    assert anew == finetuned(store, tmp_path / "fresh", encoder=encoder)[2] and len(fitted) == 3


def test_a_half_finished_fine_tuning_of_other_labels_is_not_resumed(store, tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.save, []

    def save(*arguments, **options):
        real(*arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", save)
        finetuned(store, tmp_path / "run", mode="finetune")
    correct_labels(store)
    anew = finetuned(store, tmp_path / "run", mode="finetune")[2]
    assert "labels of lesion of prepared: 8 of 32" in capsys.readouterr().out
    assert anew == finetuned(store, tmp_path / "fresh", mode="finetune")[2]
    logs = [pd.read_csv(tmp_path / name / "log.csv").drop(columns="seconds") for name in ("run", "fresh")]
    assert logs[0].equals(logs[1])
    # as it was: another run's `mtime` would be later
    before = (tmp_path / "run/model.safetensors").stat().st_mtime_ns
    finetuned(store, tmp_path / "run", mode="finetune")
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns == before


def test_a_half_finished_cell_of_other_labels_is_not_resumed(store, tmp_path, monkeypatch, capsys):
    values = {"encoders": {"ResNet": "random:resnet18_narrow"}, "baselines": [], "tasks": ["lesion"],
              "finetune_tasks": ["lesion"], "finetune_fractions": [1.0], "steps": 3, "batch_size": 8}
    real, calls = checkpoint.save, []

    def save(*arguments, **options):
        real(*arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", save)
        benchmarked(store, tmp_path / "run", **values)
    assert not list((tmp_path / "run/cells").glob("*/*/*/*.csv")) and list((tmp_path / "run/cells").rglob("last.pt"))
    correct_labels(store)
    anew = benchmarked(store, tmp_path / "run", **values).predictions
    assert "labels of lesion of prepared changed" in capsys.readouterr().out
    pd.testing.assert_frame_equal(anew, benchmarked(store, tmp_path / "fresh", **values).predictions)
    assert not list((tmp_path / "run/cells").rglob("checkpoints"))


@pytest.mark.parametrize("left", ["", "{"])
def test_a_run_of_an_older_kit_is_computed_anew(store, tmp_path, capsys, fitted, left):
    first = finetuned(store, tmp_path / "run")[2]
    (tmp_path / "run/made_from.json").write_text(left)
    if not left:
        (tmp_path / "run/made_from.json").unlink()
    assert finetuned(store, tmp_path / "run")[2] == first and len(fitted) == 2
    assert "it is from an older kit, which did not record what it was made from" in capsys.readouterr().out


def test_other_names_of_the_people_used_are_another_input(store, tmp_path, capsys, fitted):
    table = tmp_path / "aliases.csv"

    def note(*rows):
        table.write_text("dataset,participant,person\n" + "\n".join(rows) + "\n")

    note("other,1,a", "else,2,a")  # nobody of this store
    finetuned(store, tmp_path / "run", aliases=table)
    note("other,1,a", "else,2,a", "other,3,b")
    finetuned(store, tmp_path / "run", aliases=table)
    assert len(fitted) == 1
    note("made,001,a", "else,2,a")
    finetuned(store, tmp_path / "run", aliases=table)
    assert len(fitted) == 2 and "aliases: other names of the people used" in capsys.readouterr().out


# what meets must have been prepared alike


def test_out_of_distribution_scans_prepared_otherwise_are_refused_with_all_differences(store, tmp_path):
    other = make_store(tmp_path / "other", seed=1, dataset="other", shape=(9, 18, 24))
    change_record(other, spacing_mm=3.0, intensity="whitematter")
    for door in (finetuned, benchmarked):
        with pytest.raises(MisfitError) as refused:
            door(store, tmp_path / door.__name__, out_of_distribution=other.folder)
        text = str(refused.value)
        assert "\n  shape: prepared [12, 18, 24], out_of_distribution [9, 18, 24]\n" in text
        assert "\n  spacing_mm: prepared 4.0, out_of_distribution 3.0\n" in text and "\n  origin_mm: " in text
        assert "\n  intensity: prepared zscore, out_of_distribution whitematter\n" in text
        assert "allow_differences" not in text and str(other.folder) in text


def test_a_difference_is_allowed_by_name_and_stands_in_the_report(store, tmp_path, capsys):
    other = make_store(tmp_path / "other", seed=1, dataset="other")
    change_record(other, registration="affine", mask="auto", versions={"SimpleITK": "1.0"})
    encoder = encoder_file(store, tmp_path / "encoder.safetensors")
    values = {"encoder": encoder, "out_of_distribution": other.folder}
    with pytest.raises(MisfitError, match="(?s)registration: encoder none, prepared none, out_of_distribution affine"
                                          r".*mask: .*allow_differences: \[registration, mask\]"):
        finetuned(store, tmp_path / "a", **values)
    with pytest.raises(MisfitError, match=r"prepared differently: .*\n  mask: .*\n.*: \[mask\]$"):
        finetuned(store, tmp_path / "a", **values, allow_differences=["registration"])
    capsys.readouterr()  # as asked, in the same folder
    finetuned(store, tmp_path / "a", **values, allow_differences=["registration", "mask"])
    line = "allowed to differ: registration: encoder none, prepared none, out_of_distribution affine"
    said = capsys.readouterr().out
    assert line in said and "other versions of libraries: SimpleITK encoder None, prepared None, out_of" in said
    assert line in json.loads((tmp_path / "a/made_from.json").read_text())["allowed"]
    assert line in words(tmp_path / "a")


def test_an_encoder_prepared_otherwise_is_refused(store, tmp_path):
    encoder = encoder_file(store, tmp_path / "encoder.safetensors",
                           preparation=store.record | {"registration": "rigid", "template": "other"})
    with pytest.raises(MisfitError, match="(?s)template: encoder other, prepared t\n  registration: encoder rigid"):
        finetuned(store, tmp_path / "a", encoder=encoder)
    with pytest.raises(MisfitError, match="template: encoder other") as refused:
        finetuned(store, tmp_path / "b", encoder=encoder, allow_differences=["registration"])
    assert "registration" not in str(refused.value)


def test_one_word_for_masks_of_two_sources_is_said(store, tmp_path, capsys):
    other = make_store(tmp_path / "other", seed=1, dataset="other")
    change_index(store, lambda index: index.assign(mask_source="given"))
    change_index(other, lambda index: index.assign(mask_source="deepbet"))
    finetuned(store, tmp_path / "run", out_of_distribution=other.folder)
    assert "from different sources: prepared given, out_of_distribution deepbet" in capsys.readouterr().out


# 5_benchmark


def test_only_the_cells_concerned_are_computed_anew(store, tmp_path, capsys, fitted):
    encoder = encoder_file(store, tmp_path / "encoder.safetensors")
    values = {"encoders": {"one": encoder}, "baselines": ["random init"]}
    first = benchmarked(store, tmp_path / "run", **values).tidy
    assert len(fitted) == 4 and first.groupby(["encoder", "task"])["fingerprint"].nunique().eq(1).all()
    assert first["fingerprint"].nunique() == 4

    correct_labels(store)
    second = benchmarked(store, tmp_path / "run", **values).tidy
    assert len(fitted) == 6
    assert "labels of lesion of prepared changed: random init on lesion (1 cells), one on lesion (1 cells)" in (
        capsys.readouterr().out)
    ages = first["task"] == "age"
    pd.testing.assert_frame_equal(first[ages], second[ages])
    assert not set(first["fingerprint"][~ages]) & set(second["fingerprint"])

    encoder_file(store, tmp_path / "encoder.safetensors", seed=1)
    third = benchmarked(store, tmp_path / "run", **values).tidy
    said = capsys.readouterr().out
    assert len(fitted) == 8 and "encoder weights: " in said and "one on lesion (1 cells), one on age (1 cells)" in said
    fresh = benchmarked(store, tmp_path / "fresh", **values).tidy
    pd.testing.assert_frame_equal(third, fresh)
    assert json.loads((tmp_path / "run/made_from.json").read_text())["fingerprint"] == (
        json.loads((tmp_path / "fresh/made_from.json").read_text())["fingerprint"])
    done = len(fitted)
    pd.testing.assert_frame_equal(benchmarked(store, tmp_path / "run", **values).tidy, fresh)
    assert len(fitted) == done and "encoder one" in words(tmp_path / "run")

    for record in (tmp_path / "run/cells").rglob("made_from.json"):
        record.unlink()
    benchmarked(store, tmp_path / "run", **values)
    assert len(fitted) == done + 4 and "no record of what it was made from" in capsys.readouterr().out


def test_no_shard_keeps_tables_of_older_labels(store, tmp_path):
    values = {"baselines": ["guess"], "shards": 2}
    for shard in (0, 1):
        benchmarked(store, tmp_path / "run", **values, shard=shard)
    benchmarked(store, tmp_path / "run", **values | {"shards": 1})
    tables = [tmp_path / "run" / folder / "scores.csv" for folder in ("shards/0-of-2", "shards/1-of-2", ".")]
    assert all(table.exists() for table in tables)
    correct_labels(store)
    benchmarked(store, tmp_path / "run", **values, shard=0)
    assert [table.exists() for table in tables] == [True, False, False]


# 2_pretrain


def test_a_finished_pretraining_is_shown_if_its_scans_are_the_same(store, tmp_path, capsys):
    log = pretrained(store, tmp_path / "run")
    made = read_record(tmp_path / "run")["made_from"]
    assert made["fingerprint"] == json.loads((tmp_path / "run/made_from.json").read_text())["fingerprint"]
    change_index(store, lambda index: index.assign(lesion=0, age=1).iloc[::-1])  # which it does not read
    assert pretrained(store, tmp_path / "run").equals(log)
    change_scans(store, "made_003_01", "made_004_01")
    with pytest.raises(CheckpointError, match=r"(?s)trained on other inputs than are there now:\n  scans of prepared: "
                                              "2 of 32 changed: made_003_01, made_004_01\ngive another output_dir"):
        pretrained(store, tmp_path / "run")
    (tmp_path / "run/made_from.json").unlink()  # the encoder's own record knows it, too
    with pytest.raises(CheckpointError, match="scans of prepared changed"):
        pretrained(store, tmp_path / "run")


def stopped(store, folder):
    folder.mkdir()
    (folder / "stop").touch()
    pretrained(store, folder)
    assert (folder / "checkpoints/last.pt").exists() and not (folder / "encoder.safetensors").exists()


@pytest.mark.parametrize(("change", "line"), [
    (lambda store: change_scans(store, "made_003_01"), "scans of prepared: 1 of 32 changed: made_003_01"),
    (lambda store: change_index(store, lambda index: index.assign(unusable=["contrast"] + [""] * 31)),
     "scans of prepared: 1 of 32 gone: made_000_01"),
    (lambda store: change_index(store, lambda index: index.assign(dataset=["other"] + ["made"] * 31)),
     "participants, sessions or datasets of prepared: 1 of 32 changed: made_000_01"),
    (lambda store: change_record(store, registration="affine"), "prepared: registration: then none, now affine"),
])
def test_a_half_finished_pretraining_does_not_go_on_with_other_scans(store, tmp_path, change, line):
    stopped(store, tmp_path / "run")
    change(store)
    with pytest.raises(CheckpointError, match=line):
        pretrained(store, tmp_path / "run")
    (tmp_path / "run/made_from.json").unlink()  # the checkpoint knows it, too
    with pytest.raises(CheckpointError, match="trained on other inputs"):
        pretrained(store, tmp_path / "run")


def test_a_half_finished_pretraining_goes_on_with_the_same_scans(store, tmp_path):
    stopped(store, tmp_path / "run")
    change_index(store, lambda index: index.assign(lesion=0))
    (tmp_path / "run/made_from.json").unlink()
    assert len(pretrained(store, tmp_path / "run")) == 1
    assert (tmp_path / "run/made_from.json").exists()


def test_a_pretraining_of_an_older_kit_is_refused(store, tmp_path):
    """Its checkpoint lacks what it was made from."""
    stopped(store, tmp_path / "run")
    state = checkpoint.read_checkpoint(tmp_path / "run/checkpoints")
    del state["params"]["made_from"]
    torch.save(state, tmp_path / "run/checkpoints/last.pt")
    with pytest.raises(CheckpointError, match="is from an older kit, .* give another output_dir"):
        pretrained(store, tmp_path / "run")


# 4_saliency


def explained(store, model, folder, **changes):
    def look(params, run):
        opened = Store.open(params.prepared)
        found = open_model(params, opened, run)
        maps = saliency_maps(explainer_of(params, found, opened), found.chosen, ["gradient"], run)
        return found.record, region_shares(maps, found.chosen, opened, load_atlas("tissues", opened.grid), run)

    return through(Saliency, look, {"prepared": store.folder, "model": model, "participants": 1, "output_dir": folder,
                                    **changes})


def test_a_model_is_shown_the_scans_that_it_was_tested_on(store, tmp_path, capsys):
    metrics = finetuned(store, tmp_path / "model", mode="finetune", steps=2)[2]
    record, _ = explained(store, tmp_path / "model", tmp_path / "run")
    assert record["made_from"]["fingerprint"] == metrics["fingerprint"]
    made = json.loads((tmp_path / "run/made_from.json").read_text())
    assert set(pd.read_csv(tmp_path / "run/regions.csv")["fingerprint"]) == {made["fingerprint"]}

    change_record(store, registration="affine", intensity="whitematter")
    with pytest.raises(MisfitError, match="(?s)intensity: model zscore, prepared whitematter.*registration: "):
        explained(store, tmp_path / "model", tmp_path / "run")
    change_record(store, registration="affine", intensity="zscore")
    with pytest.raises(MisfitError, match=r"allow_differences: \[registration\]"):
        explained(store, tmp_path / "model", tmp_path / "run")
    explained(store, tmp_path / "model", tmp_path / "allowed", allow_differences=["registration"])
    assert "allowed to differ: registration: model none, prepared affine" in capsys.readouterr().out
    assert "registration" in json.loads((tmp_path / "allowed/made_from.json").read_text())["allowed"][0]

    change_record(store, registration="none")
    tested = pd.read_csv(tmp_path / "model/predictions.csv")["scan"].tolist()
    change_scans(store, tested[0])
    change_index(store, lambda index: index[index["scan"] != tested[1]].assign(
        lesion=lambda rows: rows["lesion"].where(rows["scan"] != tested[2], 1 - rows["lesion"])))
    with pytest.raises(MisfitError, match=f"(?s)1 of {len(tested)} tested scans are gone: {tested[1]}.*"
                                          f"labels of 1 of {len(tested)} tested scans have changed: {tested[2]}.*"
                                          f"voxels of 1 of {len(tested)} tested scans have changed: {tested[0]}"):
        explained(store, tmp_path / "model", tmp_path / "run")


@pytest.mark.slow
def test_maps_of_an_older_model_go_and_an_older_kits_model_is_refused(store, tmp_path, capsys):
    finetuned(store, tmp_path / "model", mode="finetune", steps=2)
    explained(store, tmp_path / "model", tmp_path / "run")
    (tmp_path / "run/maps/old_gradient.nii.gz").touch()
    correct_labels(store)
    finetuned(store, tmp_path / "model", mode="finetune", steps=2)
    explained(store, tmp_path / "model", tmp_path / "run")
    assert "model weights: " in capsys.readouterr().out
    assert not (tmp_path / "run/maps/old_gradient.nii.gz").exists()
    (tmp_path / "model/made_from.json").unlink()
    with pytest.raises(MisfitError, match="is from an older kit, .*; run 3_finetune again"):
        explained(store, tmp_path / "model", tmp_path / "run")
