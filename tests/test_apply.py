"""From scans to embeddings and predictions: what is written, what is refused, and what is warned of."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from kit.apply import (
    LEARNED_FROM,
    SAID,
    _encoder_from_here,
    _from_here,
    apply,
    main,
    said_of,
    scans_at,
    settings_for,
    write_output,
)
from kit.cohort.identity import participant_ids
from kit.cohort.tabular import CohortError
from kit.evaluate.conformal import class_columns, conformal_quantile, number_columns
from kit.evaluate.finetune import VALIDATION, run_finetune
from kit.evaluate.predict import predict
from kit.models.encoder_file import EncoderError, save_encoder
from kit.models.encoders import build_encoder
from kit.models.features import FeatureError, FeatureReader
from kit.models.heads import Predictor
from kit.models.reference import fit_reference, read_reference, save_reference
from kit.params import Apply, Finetune, Preprocess
from kit.preprocess.index import FAILED
from kit.preprocess.nifti import write_nifti
from kit.preprocess.quality import QC_METRICS
from kit.preprocess.settings import Preparation
from kit.preprocess.template import template
from kit.provenance import MisfitError
from kit.reading import ParameterError, check
from kit.runs import ROOT, Run
from kit.store.dataset import PreparedScans
from kit.store.grid import PAPER_GRID, Grid
from kit.store.leakage import seen_by
from kit.store.store import Store
from tests.conftest import GRID, SHAPE, make_store


@pytest.fixture(scope="module")
def encoder(store, tmp_path_factory):
    """An encoder file that saw nobody, with what it has seen beside it."""
    folder = tmp_path_factory.mktemp("encoder")
    network = build_encoder("resnet18_narrow", GRID)
    save_encoder(folder / "encoder.safetensors", network, {
        "architecture": "resnet18_narrow", "objective": "simclr", "preparation": store.record, "participants": [],
        "made_from": {}})
    features = predict(network, PreparedScans(store, store.index))
    save_reference(folder, fit_reference(features[:12], features[12:]))
    return folder


@pytest.fixture(scope="module")
def applied(store, encoder, tmp_path_factory):
    params = Apply(input=str(store.folder), encoder=str(encoder), output_dir="outputs/x")
    return apply(params, tmp_path_factory.mktemp("applied"))


def test_a_prepared_cohort_has_an_embedding_a_scan_as_the_encoder_gives_it(store, applied):
    assert applied.table["scan"].tolist() == store.index["scan"].tolist() and applied.failed.empty
    network = build_encoder("resnet18_narrow", GRID)
    assert np.array_equal(applied.features, predict(network, PreparedScans(store, store.index)))
    assert applied.table["fingerprint"].nunique() == 1 and applied.table["fingerprint"][0].startswith("f")


def test_what_is_written_reads_back_the_same(applied, tmp_path):
    for ending in ("csv", "parquet"):
        write_output(applied, tmp_path / f"e.{ending}")
    table = pd.read_parquet(tmp_path / "e.parquet")
    assert table.columns[:4].tolist() == ["participant", "session", "fingerprint", "scan"]
    pd.testing.assert_frame_equal(table[["warnings", "unusable", "as_far", "outside"]],
                                  applied.table[["warnings", "unusable", "as_far", "outside"]])
    assert np.array_equal(table.filter(regex=r"^f\d+$").to_numpy(np.float32), applied.features)
    text = pd.read_csv(tmp_path / "e.csv", dtype={"participant": str})
    assert np.allclose(text.filter(regex=r"^f\d+$"), applied.features, rtol=1e-6)
    write_output(applied._replace(features=applied.features[:1]), tmp_path / "e.npy")
    alone = np.load(tmp_path / "e.npy")
    assert alone.dtype == np.float32 and np.array_equal(alone, applied.features[0])
    assert pd.read_csv(tmp_path / "e_scans.csv")["scan"].tolist() == applied.table["scan"].tolist()


def test_whom_the_encoder_was_pretrained_on_is_said(store, encoder, tmp_path, capsys):
    ids = participant_ids(store.index)
    save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), {
        "architecture": "resnet18_narrow", "objective": "simclr", "preparation": store.record, "made_from": {},
        **seen_by(store, store.index.head(1), ids.head(1))})
    apply(Apply(input=str(store.folder), encoder=str(tmp_path), output_dir="outputs/x"), tmp_path / "run")
    assert "SEEN IN PRETRAINING: 1 of 24 participants, 1 of 32 scans" in capsys.readouterr().out


def test_the_command_lists_what_failed_in_a_file(store, encoder, tmp_path, monkeypatch, applied):
    monkeypatch.setattr(sys, "argv", ["kit.apply", "--input", str(store.folder), "--encoder", str(encoder), "--output",
                                      str(tmp_path / "x.csv")])
    failed = pd.DataFrame([["made_9", "9", "01", "made", "9.nii", "no brain"]], columns=list(FAILED))
    monkeypatch.setattr("kit.apply.apply", lambda *_: applied._replace(failed=failed))
    assert main() == 1 and pd.read_csv(tmp_path / "x_failed.csv")["reason"].tolist() == ["no brain"]
    monkeypatch.setattr("kit.apply.apply", lambda *_: applied)
    assert main() == 0 and not (tmp_path / "x_failed.csv").exists()
    (tmp_path / "x_failed.csv").write_text("mine\n1\n")
    assert main() == 0 and (tmp_path / "x_failed.csv").exists()


def test_a_scan_unlike_those_seen_is_called_so(store, encoder, tmp_path):
    seen = read_reference(encoder)
    features = predict(build_encoder("resnet18_narrow", GRID), PreparedScans(store, store.index))
    # the validation scans themselves: their p-values are ranks, evenly spread from 1/(n+1) on
    values = np.sort(seen.at_least_as_far(features[12:]))
    assert np.allclose(values, (1 + np.arange(1, 21)) / 21)
    away = seen.at_least_as_far(features[:1] + 50 * features.std(0))
    assert away[0] == 1 / 21
    params = Apply(input=str(store.folder), encoder=str(encoder), output_dir="outputs/x")
    moved = fit_reference(features[:12] + 50 * features.std(0), features[12:] + 50 * features.std(0))
    save_reference(tmp_path, moved)
    (tmp_path / "encoder.safetensors").write_bytes((encoder / "encoder.safetensors").read_bytes())
    found = apply(params.model_copy(update={"encoder": str(tmp_path)}), tmp_path / "run").table
    assert set(found["outside"]) == {"yes"} and found["warnings"].str.contains("unlike the scans").all()


def test_without_validation_scans_no_scan_is_called_typical(store, encoder, tmp_path):
    features = predict(build_encoder("resnet18_narrow", GRID), PreparedScans(store, store.index))
    save_reference(tmp_path, fit_reference(features, features[:0]))
    (tmp_path / "encoder.safetensors").write_bytes((encoder / "encoder.safetensors").read_bytes())
    params = Apply(input=str(store.folder), encoder=str(tmp_path), output_dir="outputs/x")
    table = apply(params, tmp_path / "run").table
    assert table["as_far"].isna().all() and set(table["outside"]) == {""}


def test_a_neighbours_reference_is_not_taken(store, encoder, tmp_path):
    save_reference(tmp_path, read_reference(encoder))  # of tmp_path/encoder.safetensors, say
    params = Apply(input=str(store.folder), encoder="x", output_dir="outputs/x")
    published = build_encoder("resnet18_narrow", GRID).state_dict()
    (tmp_path / "other.safetensors").write_bytes((encoder / "encoder.safetensors").read_bytes())
    torch.save(published, tmp_path / "published.pth")
    save_file(published, tmp_path / "encoder.safetensors")
    for name in ("other.safetensors", "published.pth", "encoder.safetensors"):
        table = apply(params.model_copy(update={"encoder": str(tmp_path / name)}), tmp_path / "run").table
        assert table["as_far"].isna().all() and set(table["outside"]) == {""}, name
    own = apply(params.model_copy(update={"encoder": str(encoder / "encoder.safetensors")}), tmp_path / "run").table
    assert own["as_far"].notna().all()


def test_the_reference_is_mahalanobis_and_takes_constant_features():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 3)) @ np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0.5]]) + [5, 0, 1]
    reference = fit_reference(np.c_[points, np.ones(len(points))], np.empty((0, 4)))
    some = np.c_[points[:50], np.ones(50)]
    inverse = np.linalg.inv(np.cov(points.T))
    exact = np.sqrt(np.einsum("nf,fg,ng->n", points[:50] - points.mean(0), inverse, points[:50] - points.mean(0)))
    assert np.allclose(reference.distances(some), exact, rtol=0.02)  # shrunk by 1 % with so many scans
    assert len(reference.validation) == 0


@pytest.mark.parametrize("architecture", ["resnet18_narrow", "vit_narrow"])
def test_features_by_name_are_what_the_name_says(architecture):
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    network = build_encoder(architecture, GRID).eval()
    with torch.no_grad():
        plain = network(images)
        assert torch.equal(FeatureReader(network)(images), plain) and FeatureReader(network).is_encoder_output
        flipped = FeatureReader(network, flips=True)(images)
        assert torch.allclose(flipped, (plain + network(images.flip(-1))) / 2)
        assert not torch.allclose(flipped, plain, atol=1e-4)
        if architecture == "vit_narrow":
            tokens = network.encode(network.tokens(images))
            assert torch.allclose(FeatureReader(network, "class")(images), tokens[:, 0], atol=1e-6)
            assert torch.allclose(FeatureReader(network, "mean")(images), tokens[:, 1:].mean(1), atol=1e-6)
            first = network.autoencoder.blocks[0](torch.cat([
                network.autoencoder.cls_token.expand(2, -1, -1), network.tokens(images)], 1))
            assert torch.allclose(FeatureReader(network, "class", [1])(images), first[:, 0], atol=1e-6)
            assert FeatureReader(network, stages=[1, 4])(images).shape == (2, 2 * network.features)
        else:
            joined = FeatureReader(network, stages=[3, 4])(images)
            assert joined.shape == (2, 64 + 128) and torch.allclose(joined[:, 64:], plain, atol=1e-6)
            assert torch.equal(FeatureReader(network, stages=[4, 3])(images), joined.roll(128, 1))
            with pytest.raises(FeatureError, match="class is for the kit's ViTs; ResNetEncoder has no class token"):
                FeatureReader(network, "class")
    with pytest.raises(FeatureError, match=r"stages: got \[9\]; \w+ has stages 1 to 4"):
        FeatureReader(network, stages=[1, 9])


def test_brainiacs_first_token_is_not_taken_for_a_mean():
    encoder = build_encoder("brainiac", GRID)
    assert FeatureReader(encoder).is_encoder_output
    with pytest.raises(FeatureError, match="pool: mean is not what BrainIAC's ViT gives"):
        FeatureReader(encoder, "mean")


def test_an_unknown_networks_output_is_not_taken_for_a_mean():
    assert FeatureReader(torch.nn.Flatten()).is_encoder_output
    with pytest.raises(FeatureError, match="pool: mean is not known to be what Flatten gives"):
        FeatureReader(torch.nn.Flatten(), "mean")


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held, kept = np.random.default_rng(0), [], []
    for _ in range(400):
        true, noise = rng.normal(50, 15, 80), rng.normal(0, 6, 80)
        table = number_columns((true + noise)[40:], pd.DataFrame({"true": true[:40], "predicted": (true + noise)[:40]}))
        held.append(((table["low"] <= true[40:]) & (true[40:] <= table["high"])).mean())
        labels = rng.integers(0, 2, 80)
        logits = rng.normal(1.5 * (2 * labels - 1), 1.5)
        sets = class_columns(logits[40:], ["CN", "AD"], pd.DataFrame({"true": labels[:40], "predicted": logits[:40]}))
        kept.append(np.mean([str(["CN", "AD"][label]) in possible.split(" or ")
                             for label, possible in zip(labels[40:], sets["possible"], strict=True)]))
    # 37 of 41 ranks: 90.2 % in the mean; 400 runs leave a standard error of .3 %
    assert 0.89 < np.mean(held) < 0.915
    assert 0.89 < np.mean(kept) < 0.94  # the likelier class always stays
    rare = rng.random(400) < 0.08  # patients whose log-odds are lower than most controls', as weights of classes may do
    logits = rng.normal(np.where(rare, -1.0, -3.0), 1.0)
    sets = class_columns(logits[200:], ["CN", "AD"], pd.DataFrame({"true": rare[:200], "predicted": logits[:200]}))
    assert sets["possible"][rare[200:]].str.contains("AD").mean() > 0.8  # though 92 % of people are controls
    assert sets["possible"][~rare[200:]].str.contains("CN").mean() > 0.8
    assert conformal_quantile(np.arange(8.0)) == np.inf and conformal_quantile(np.arange(9.0)) == 8
    assert number_columns(np.ones(1), pd.DataFrame({"true": [1.0], "predicted": [2.0]}))["low"].isna().all()


def test_classes_have_probabilities_that_sum_to_one():
    logits = np.array([[2.0, 0, -1], [0, 3, 0]])
    validation = pd.DataFrame({"true": [0, 1, 2] * 6, **{f"predicted_{each}": [5.0 * (each == label) for label in
                                                                               [0, 1, 2] * 6] for each in range(3)}})
    table = class_columns(logits, ["CN", "MCI", "AD"], validation)
    assert table["predicted"].tolist() == ["CN", "MCI"]
    assert np.allclose(table[["probability_CN", "probability_MCI", "probability_AD"]].sum(axis=1), 1)


def test_a_fine_tuned_model_predicts_what_its_own_run_wrote(store, tmp_path, monkeypatch, capsys):
    values = {"prepared": str(store.folder), "encoder": "random:resnet18_narrow", "task": "age", "steps": 20,
              "check_steps": 10, "batch_size": 8, "check_converged": False, "validation_fraction": 0.6,
              "output_dir": str(tmp_path / "model")}
    params = check(Finetune, values)
    run = Run.of(params)
    _, predictions, _ = run_finetune(params, run)
    run.close()
    found = apply(Apply(input=str(store.folder), encoder=str(tmp_path / "model"), output_dir="outputs/x"),
                  tmp_path / "applied").table.set_index("scan")
    same = found.loc[predictions["scan"]]
    assert np.allclose(same["predicted"], predictions["predicted"], atol=1e-4)
    assert (same["low"] < same["predicted"]).all() and same["as_far"].between(0, 1).all()
    part = pd.read_csv(tmp_path / "model/made_from.csv", dtype=str).set_index("scan")["part"]
    learned = part[found.index].isin(["train", "validation"])
    assert 0 < learned.sum() < len(found)
    assert (found["warnings"].str.contains(LEARNED_FROM) == learned).all()
    # the same files without names, and other people of the same names
    files = store.index.assign(dataset="?", participant="?" + store.index["scan"])
    params = Apply(input=str(store.folder), encoder=str(tmp_path / "model"), output_dir="outputs/x")
    unnamed = apply(params, tmp_path / "applied", Store(store.folder, files, store.record)).table.set_index("scan")
    assert (unnamed["warnings"].str.contains(LEARNED_FROM) == learned).all()
    others = make_store(tmp_path / "others", participants=4, seed=1, dataset="other")
    table = apply(params.model_copy(update={"input": str(others.folder)}), tmp_path / "applied").table
    assert not table["warnings"].str.contains(LEARNED_FROM).any()
    assert "people is unknown" not in capsys.readouterr().out
    (tmp_path / "model/made_from.csv").unlink()
    table = apply(params, tmp_path / "applied").table
    assert not table["warnings"].str.contains(LEARNED_FROM).any()
    assert "made_from.csv: whether the model learned from these people is unknown" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["kit.apply", "--input", str(store.folder), "--encoder", str(tmp_path / "model"),
                                      "--output", str(tmp_path / "x.csv"), "-p", "flips", "true"])
    assert main() == 2 and "flips change embeddings only" in capsys.readouterr().err


def test_what_the_network_cannot_give_is_refused_before_scans_are_prepared(tmp_path):
    asked = Apply(input=str(tmp_path), encoder=str(tmp_path), output_dir="outputs/x", pool="class")
    save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), {
        "architecture": "resnet18_narrow", "objective": "simclr", "participants": [], "made_from": {},
        "preparation": Preparation(GRID, "rigid").record()})
    write_nifti(tmp_path / "scan.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4))
    with pytest.raises(FeatureError, match="class"):
        apply(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tuned", [False, True])
def test_a_model_of_another_template_is_refused_before_scans_are_prepared(tmp_path, tuned):
    record = {"architecture": "resnet18_narrow", "objective": "simclr", "participants": [], "made_from": {},
              "preparation": Preparation(GRID, "rigid").record() | {"template": "another"}}
    network = build_encoder("resnet18_narrow", GRID)
    if tuned:
        save_file(Predictor(network, 1).state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "task.json").write_text(json.dumps(record))
        (tmp_path / VALIDATION).touch()
    else:
        save_encoder(tmp_path / "encoder.safetensors", network, record)
    write_nifti(tmp_path / "scan.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4))
    with pytest.raises(MisfitError, match="template: training scans another, this kit ICBM152 2009a"):
        apply(Apply(input=str(tmp_path), encoder=str(tmp_path), output_dir="outputs/x"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_how_raw_scans_are_prepared_follows_from_the_encoders_record(store):
    asked = Apply(input=".", encoder="x", output_dir="outputs/x")
    settings = settings_for(store.record, asked)
    assert (settings.registration, settings.mask, settings.grid) == ("rigid", "auto", GRID)
    affine = {**store.record, "registration": "affine", "mask": "hd-bet", "bias_correction": "n4"}
    settings = settings_for(affine, asked)
    assert (settings.registration, settings.mask, settings.bias_correction) == ("affine", "hd-bet", "n4")
    other = asked.model_copy(update={"registration": "none", "mask": "nonzero"})
    assert (settings_for(affine, other).registration, settings_for(affine, other).mask) == ("none", "nonzero")
    anything = dict.fromkeys(store.record, "any")
    assert settings_for(anything, asked).grid == PAPER_GRID
    with pytest.raises(EncoderError, match="how its scans were prepared is not known"):
        settings_for(None, asked)


def test_scans_are_found_whatever_lies_there(tmp_path):
    for name in ("a/one.nii.gz", "b/two.nii", "b/notes.txt", "b/._two.nii", ".git/annex/x.nii.gz", "c.nii/info",
                 "d/three.hdr", "d/three.img", "e/four.mgh.gz", "e/five.img.gz", "e/five.hdr.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = scans_at(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in found["image_path"]] == [
        "a/one.nii.gz", "b/two.nii", "d/three.img", "e/five.img.gz", "e/four.mgh.gz"]  # a pair is one scan
    assert found["participant"].tolist()[:2] == ["?one", "?two"] and (found["session"] == "01").all()
    assert len(scans_at(tmp_path / "a" / "one.nii.gz")) == 1
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "0001").touch()
    assert scans_at(tmp_path / "series")["image_path"].tolist() == [str(tmp_path / "series")]
    (tmp_path / "series" / "0002.img").write_bytes(bytes(128) + b"DICM")  # a slice, not half of a pair
    assert scans_at(tmp_path / "series")["image_path"].tolist() == [str(tmp_path / "series")]
    with pytest.raises(CohortError, match="no such file"):
        scans_at(tmp_path / "none.nii")


def test_a_table_whose_suffix_is_in_capitals_is_read_as_a_table(tmp_path):
    (tmp_path / "COHORT.CSV").write_text("participant,image_path\n001,a.nii\n")
    assert scans_at(tmp_path / "COHORT.CSV")["participant"].tolist() == ["001"]


def test_what_is_wrong_with_a_collection_is_said(tmp_path):
    scan = tmp_path / "PT001_OASIS1" / "sub_1" / "ses_1" / "t1.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.touch()
    assert scans_at(tmp_path)["participant"].tolist() == ["1"]
    (tmp_path / "participants.tsv").write_text("subject\tage\n1\t70\n")
    with pytest.raises(CohortError, match=r"participants.tsv: needs a column participant_id; found subject, age"):
        scans_at(tmp_path)


def test_one_series_of_a_folder_with_several_is_found(tmp_path):
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "0001").touch()
    spec = str(tmp_path / "series#4")
    assert scans_at(tmp_path / "series#4")["image_path"].tolist() == [spec]
    values = {"encoder": "random", "output_dir": "outputs/x"}
    assert [each[:8] for each in Apply(input=spec, **values).problems()] == ["encoder:"]
    assert "no such file or folder" in Apply(input=str(tmp_path / "none#4"), **values).problems()[0]
    with pytest.raises(CohortError, match="no such file"):
        scans_at(tmp_path / "none#4")


def test_a_model_without_validation_predictions_is_refused_before_any_work(store, tmp_path):
    for name in ("model.safetensors", "task.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(EncoderError, match=r"has no validation.csv: it is from an older kit"):
        apply(Apply(input=str(store.folder), encoder=str(tmp_path), output_dir="outputs/x"), tmp_path / "applied")


def test_the_commands_paths_start_where_it_is_given_then_at_the_project(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(encoder.parent)
    (tmp_path / "scan.nii").touch()
    assert _from_here(os.path.relpath(tmp_path / "scan.nii")) == os.path.abspath(os.path.relpath(tmp_path / "scan.nii"))
    assert _from_here("kit/apply.py") == str(ROOT / "kit/apply.py")
    for spec, found in ((encoder.name, str(encoder)), (f"resnet18_narrow:{encoder.name}/encoder.safetensors",
                                                       f"resnet18_narrow:{encoder}/encoder.safetensors"),
                        ("auto:kit/apply.py", str(ROOT / "kit/apply.py")), ("random:vit", "random:vit"),
                        (str(encoder), str(encoder))):
        assert _encoder_from_here(spec) == found


def test_every_flag_is_said_in_words():
    for name in QC_METRICS:
        assert "(" in said_of(f"{name} low") and QC_METRICS[name].what in said_of(f"{name} low")
    assert said_of("a note of the header") == "a note of the header"
    least = Preprocess.model_fields["brain_ml"].default[0]
    assert f"for an adult below {least} ml" in SAID["brain_ml low"]


def command(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "kit.apply", *map(str, arguments)], capture_output=True, text=True,
                          check=False, cwd=ROOT, env={**os.environ, "KIT_PROGRESS": "off", **environment})


@pytest.mark.slow
def test_the_command_refuses_in_a_sentence(store, encoder, tmp_path):
    done = command("--input", store.folder, "--encoder", encoder, "--output", tmp_path / "e.npy")
    assert done.returncode == 2 and "is for one scan" in done.stderr and "has 32" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "e.npy").exists()
    done = command("--input", tmp_path / "none", "--encoder", "random:resnet18", "--output", tmp_path / "e.npy")
    assert done.returncode == 2 and "2 things are wrong" in done.stderr and "no such file or folder" in done.stderr
    assert "name one that has learned something" in done.stderr
    done = command("--input", store.folder, "--encoder", encoder, "--output", tmp_path / "e.txt")
    assert done.returncode == 2 and ".npy, .csv or .parquet" in done.stderr


@pytest.mark.slow
def test_the_command_embeds_a_raw_scan_by_the_encoder_of_the_environment(tmp_path):
    """The template as a scan, where it lies; registration and skull stripping of heads: tests/real/test_apply.py."""
    grid = Grid((36, 48, 40), 4.0)
    array, mask, to_mm = template()
    write_nifti(tmp_path / "files" / "head.nii.gz", np.where(mask, array, 0).astype(np.float32), to_mm)
    record = {"shape": grid.shape, "spacing_mm": 4.0, "registration": "none", "mask": "nonzero"}
    asked = Apply(input=str(tmp_path / "files"), encoder=str(tmp_path), output_dir="outputs/x", registration="none")
    save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", grid), {
        "architecture": "resnet18_narrow", "objective": "simclr", "participants": [], "made_from": {},
        "preparation": settings_for(record, asked).record()})
    done = command("--input", tmp_path / "files" / "head.nii.gz", "--output", tmp_path / "e.npy",
                   "-p", "registration", "none", KIT_ENCODER=str(tmp_path / "encoder.safetensors"))
    assert done.returncode == 0, done.stderr
    features = np.load(tmp_path / "e.npy")
    assert features.shape == (128,) and np.isfinite(features).all() and "prepare" in done.stderr
    applied = apply(asked, tmp_path / "run")
    np.testing.assert_allclose(applied.features[0], features, rtol=1e-5)  # other threads: seen 4e-6 on an Intel Xeon
    assert not [flag for flag in applied.table["unusable"] if flag]


def test_without_an_encoder_the_command_says_how_to_name_one(monkeypatch, capsys):
    monkeypatch.delenv("KIT_ENCODER", raising=False)
    monkeypatch.setattr(sys, "argv", ["kit.apply", "--input", "x.nii", "--output", "x.npy"])
    with pytest.raises(SystemExit):
        main()
    assert "--encoder FILE, or the environment's KIT_ENCODER" in capsys.readouterr().err


def test_an_empty_input_is_not_the_current_folder(encoder, tmp_path, monkeypatch, capsys):
    write_nifti(tmp_path / "scan.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kit.apply", "--input", "", "--encoder", str(encoder), "--output", "x.csv"])
    with pytest.raises(SystemExit):
        main()
    assert "--input: got an empty path" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="input: got ''"):
        check(Apply, {"input": "", "encoder": str(encoder), "output_dir": "outputs/x"})


def test_an_output_that_cannot_be_written_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["kit.apply", "--input", "x.nii", "--encoder", "random", "--output",
                                      str(tmp_path / "file" / "x.csv")])
    with pytest.raises(SystemExit):
        main()
    assert f"--output: {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err
