"""The loop: it learns, resumes to the bit, and two processes equal one."""

import json
import os
import re
import shutil
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import DenseNet121
from torch.nn.parallel import DistributedDataParallel

from kit.augment.recipe import Recipe
from kit.cohort.labels import LabelError
from kit.cohort.split import LeakageError
from kit.evaluate import tune as tuning
from kit.evaluate.finetune import load_predictor, run_finetune
from kit.evaluate.tasks import read_tasks
from kit.models.convolution import with_right_gradients
from kit.models.encoder import Encoder
from kit.models.encoder_file import read_record
from kit.models.encoders import build_encoder
from kit.params import Finetune, Pretrain
from kit.reading import ParameterError
from kit.runs import Run
from kit.store.dataset import PreparedScans, collate
from kit.store.store import Store, StoreError, scan_path, write_scan
from kit.train import checkpoint, objectives
from kit.train import pretrain as pretraining
from kit.train.checkpoint import CheckpointError
from kit.train.distributed import (
    AllReducedBatchNorm,
    launch,
    process_group,
    rank,
    synchronise_batch_norm,
    world_size,
)
from kit.train.loop import Settings, TrainingError, chunks_of, fit, validate
from kit.train.objectives import SimCLR
from kit.train.optimizers import depths_of, learning_rate
from kit.train.pretrain import build_objective, choose_scans, pretrain
from tests.conftest import GRID, absent, make_store

RECIPE = Recipe.model_validate({"gamma": {"range": [0.7, 1.4]}, "noise": {"range": [0.1, 0.3]}})
SETTINGS = Settings(epochs=10, batch_size=8, learning_rate=0.1, weight_decay=0.0, optimizer="adamw", schedule="cosine",
                    seed=0, warmup_fraction=0.2)


def params(store, folder, **changes):
    return Pretrain.model_validate({"prepared": store.folder, "output_dir": folder, "epochs": 3, "batch_size": 8,
                                    "validation_fraction": 0.2, "leave_out_test": False, **changes})


def weights(folder):
    return checkpoint.read_checkpoint(folder / "checkpoints")["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    """Stands for the machine going away."""


@pytest.mark.parametrize("objective", ["simclr", "mae"])
def test_a_run_killed_in_the_middle_of_an_epoch_ends_the_same(store, tmp_path, monkeypatch, objective):
    changes = {"objective": objective, "architecture": "vit_narrow" if objective == "mae" else "resnet18_narrow",
               "checkpoint_minutes": 0}  # after every step
    whole = params(store, tmp_path / "whole", **changes)
    log = pretrain(whole, Run.of(whole))

    broken, real, calls = params(store, tmp_path / "broken", **changes), checkpoint.save, []

    def save(*arguments, **options):
        real(*arguments, **options)
        calls.append(1)
        if len(calls) == 5:
            raise Killed

    run = Run.of(broken)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", save)
        pretrain(broken, run)
    state = checkpoint.read_checkpoint(run / "checkpoints")
    assert len(state["log"]) == 1 and len(state["losses"]) == 1  # within the second epoch
    resumed = pretrain(broken, run)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert resumed["loss"].tolist() == log["loss"].tolist()


def test_pretraining_learns_and_says_what_it_saw(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=12, learning_rate=3e-3, temperature=0.2)
    log = pretrain(learned, run := Run.of(learned))
    assert log["loss"].iloc[-1] < 0.8 * log["loss"].iloc[0]
    assert {"epoch", "loss", "top1", "validation_loss", "learning_rate", "seconds"} <= set(log.columns)
    record = read_record(tmp_path / "run")
    assert record["architecture"] == "resnet18_narrow" and len(record["participants"]) == 24
    assert not set(record["participants"]) & set(store.index["participant"])  # hashes, not names
    assert pretrain(learned, run).equals(log)  # a finished run is only read


def test_views_keep_the_stores_scale(tmp_path, monkeypatch):
    """What evaluation reads is what training reads, where the store is not z-scored."""
    made = make_store(tmp_path / "store")
    whitened = Store(made.folder, made.index, made.record | {"intensity": "whitematter"})
    asked, scales = params(whitened, tmp_path / "run", recipe="none"), []
    objective = build_objective(asked, whitened).train()
    batch = collate([PreparedScans(whitened, whitened.index)[0]]).to(torch.device("cpu"))
    batch = replace(batch, images=(0.8 + 0.2 * batch.images) * batch.masks)
    torch.testing.assert_close(objective.views(batch, 0)[0], batch.images, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(tuning, "Supervised", lambda *_, **options: scales.append(options["zscored"]) or 1 / 0)
    for store in (made, whitened):
        with pytest.raises(ZeroDivisionError):
            tuning.Job(read_tasks({"prepared": store}, "lesion")[0], build_encoder("resnet18_narrow", GRID), SETTINGS,
                       steps=1, check_steps=1, flip=False).objective()
    assert scales == [True, False]


def test_participants_seen_in_pretraining_are_refused(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=1)
    pretrain(learned, Run.of(learned))
    values = {"prepared": store.folder, "encoder": str(tmp_path / "run"), "task": "lesion", "mode": "probe"}
    refused = Finetune.model_validate({**values, "output_dir": tmp_path / "a"})
    with pytest.raises(LeakageError, match=r"\d of \d participants to be evaluated were seen in pretraining"):
        run_finetune(refused, Run.of(refused))
    allowed = Finetune.model_validate({**values, "output_dir": tmp_path / "b", "allow_seen_participants": True})
    assert 0 <= run_finetune(allowed, Run.of(allowed))[2]["in_distribution_auc"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("task", "mode", "metric"), [("lesion", "finetune", "auc"), ("lesion", "probe", "auc"),
                                                      ("age", "finetune", "mean_absolute_error")])
def test_finetuning_finds_what_is_there(store, tmp_path, task, mode, metric):
    tuned = Finetune.model_validate({
        "prepared": store.folder, "output_dir": tmp_path / "run", "encoder": "random:resnet18_narrow", "task": task,
        "mode": mode, "steps": 45, "check_steps": 3, "patience": 8, "batch_size": 8, "flip": False,
        "learning_rates": [3e-3]})
    found, predictions, metrics = run_finetune(tuned, run := Run.of(tuned))
    value, low, high = (metrics[f"in_distribution_{metric}{end}"] for end in ("", "_low", "_high"))
    assert low is None and high is None  # of a handful of participants
    assert json.loads((run / "metrics.json").read_text())[f"in_distribution_{metric}_low"] is None
    constant = found.parts["train"].labels.mean()
    assert value > 0.9 if metric == "auc" else value < predictions["true"].sub(constant).abs().mean()
    assert predictions.columns.tolist() == ["scan", "participant", "dataset", "distribution", "true", "predicted",
                                            "fingerprint"]
    _, again, read = run_finetune(tuned, run)
    assert np.allclose(again["predicted"], predictions["predicted"]) and read == metrics
    if mode == "finetune":  # the model that is left gives the predictions that were written
        assert metrics["converged"] in (0, 1) and metrics["learning_rate"] == 3e-3 and not (run / "tries").exists()
        assert metrics[f"validation_{metric}"] == pd.read_csv(run / "tries.csv")["validation_score"][0]
        assert len(pd.read_csv(run / "log.csv")) > 1
        model, record = load_predictor(tmp_path / "run", store.record)
        image = torch.from_numpy(store.read(predictions["scan"][0])[0].astype(np.float32))[None, None]
        with torch.no_grad():
            alone = float(model(image) * model.sd + model.mean)
        assert record["task"] == task and alone == pytest.approx(predictions["predicted"][0], rel=1e-3, abs=1e-4)


def test_other_classes_out_of_distribution_are_refused(tmp_path):
    stores = {}
    for name, words in (("here", ("CN", "AD")), ("there", ("CN", "MCI"))):  # CN is 1 here, 0 there
        (tmp_path / name).mkdir()
        stores[name] = make_store(tmp_path / name, seed=len(stores), dataset=name)
        stores[name].index["diagnosis"] = stores[name].index["lesion"].map(dict(enumerate(words)))
    stores = {"prepared": stores["here"], "there": stores["there"]}
    with pytest.raises(LabelError, match=r"diagnosis.*AD, CN.*CN, MCI.*rename"):
        read_tasks(stores, "diagnosis")
    stores["there"] = make_store(tmp_path / "there", seed=1, dataset="elsewhere")
    stores["there"].index["diagnosis"] = stores["there"].index["lesion"].map({0: "CN", 1: "AD"})
    assert "there" in read_tasks(stores, "diagnosis")[0].parts


def test_a_loss_that_is_not_finite_names_the_scans(tmp_path):
    store = make_store(tmp_path / "store", participants=8)
    image, mask = store.read("made_003_01")
    image[5, 9, 12] = np.nan
    write_scan(scan_path(store.folder, "made_003_01"), image, mask, "made_003_01", store.grid.affine)
    broken = params(store, tmp_path / "run", objective="mae", architecture="vit_narrow", validation_fraction=0.0)
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 1, step \d+; scans: .*made_003_01"):
        pretrain(broken, Run.of(broken))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=2)
    pretrain(learned, Run.of(learned))
    folder = tmp_path / "run/checkpoints"
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:1000])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = checkpoint.read_checkpoint(folder)
    assert len(state["log"]) == 1 and (folder / "last.pt").exists()
    assert any(re.search(r"last.pt cannot be read .*this process leaves it as it is", str(each.message))
               for each in caught)


def test_a_damaged_checkpoint_is_kept_aside_when_the_run_resumes(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=2)
    log = pretrain(learned, run := Run.of(learned))
    (run / "encoder.safetensors").unlink()  # the run was killed before its end
    bad = (run / "checkpoints/last.pt").read_bytes()[:1000]
    (run / "checkpoints/last.pt").write_bytes(bad)
    with pytest.warns(UserWarning, match=r"last.pt cannot be read .*kept as last.damaged.pt, and previous.pt is used"):
        again = pretrain(learned, run)
    assert again["loss"].tolist() == log["loss"].tolist()
    assert (run / "checkpoints/last.damaged.pt").read_bytes() == bad


def test_a_checkpoint_that_another_process_sets_aside_is_passed_over(tmp_path, monkeypatch):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"epoch": epoch})
    load = torch.load

    def set_aside_meanwhile(path, **options):
        if path.name == "last.pt":
            path.rename(tmp_path / "last.damaged.pt")
        return load(path, **options)

    monkeypatch.setattr(checkpoint.torch, "load", set_aside_meanwhile)
    assert checkpoint.read_checkpoint(tmp_path) == {"epoch": 1}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=2)
    log = pretrain(learned, run := Run.of(learned))
    (run / "encoder.safetensors").unlink()
    for name in ("last", "previous"):
        (run / f"checkpoints/{name}.pt").write_bytes(b"bad")
    with pytest.raises(CheckpointError, match=r"checkpoints/last.pt \(.*\) and .*checkpoints/previous.pt \(.*\) cannot "
                                              r"be read. Restore one .*, or remove .*run/checkpoints to start again"):
        pretrain(learned, run)
    with pytest.raises(CheckpointError, match="last.pt"):
        fit(build_objective(learned, store), PreparedScans(store, store.index), lambda _: [[0, 1]],
            PreparedScans(store, store.index[:0]), SETTINGS, run.folder)
    assert (run / "checkpoints/last.pt").read_bytes() == b"bad"
    shutil.rmtree(run / "checkpoints")
    assert pretrain(learned, run)["loss"].tolist() == log["loss"].tolist()


def test_the_rate_falls_from_the_head_to_the_stem():
    networks = {name: build_encoder(name, GRID) for name in ("resnet18_narrow", "vit_narrow")}
    networks["densenet"] = DenseNet121(3, 1, 1)
    expected = {
        "resnet18_narrow": {"network.conv1.weight": 0, "network.bn1.bias": 0, "network.layer1.0.conv1.weight": 1,
                            "network.layer4.1.bn2.weight": 4, "head.weight": 5},
        "vit_narrow": {"autoencoder.cls_token": 0, "autoencoder.blocks.0.norm1.weight": 1,
                       "autoencoder.blocks.3.mlp.linear2.bias": 4,
                       "autoencoder.blocks.4.weight": 5, "head.weight": 5},  # MONAI lists the final norm as a block
        "densenet": {"features.conv0.weight": 0, "features.denseblock1.denselayer1.layers.conv1.weight": 1,
                     "features.transition3.conv.weight": 3, "features.denseblock4.denselayer16.layers.conv2.weight": 4,
                     "features.norm5.weight": 5, "head.weight": 5}}
    for name, network in networks.items():
        module = torch.nn.Sequential(OrderedDict(encoder=network, head=torch.nn.Linear(2, 1)))
        depths = depths_of([weight for weight, _ in module.named_parameters()])
        found = {weight.removeprefix("encoder."): depth for weight, depth in depths.items()}
        assert {weight: found[weight] for weight in expected[name]} == expected[name]


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(SETTINGS, place) for place in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.001, 0.05, 0.1, 0.05, 0.0], abs=1e-9)
    assert learning_rate(replace(SETTINGS, schedule="constant"), 0.9) == 0.1


def _gradient(store, folder: str) -> None:
    """One SimCLR step in float64 on this process's share of eight scans; the first layer's gradient."""
    torch.manual_seed(0)
    objective = SimCLR(build_encoder("resnet18_narrow", GRID), RECIPE, projection=[16, 8], temperature=0.2, seed=0,
                       spacing_mm=4.0).double()
    with process_group() if "RANK" in os.environ else nullcontext():
        synchronise_batch_norm(objective)
        each = 8 // world_size()
        batch = collate([PreparedScans(store, store.index)[rank() * each + number] for number in range(each)])
        batch = replace(batch, images=batch.images.double())
        model = DistributedDataParallel(objective) if world_size() > 1 else objective
        model(batch, 0)["loss"].backward()
        np.save(f"{folder}/{world_size()}-{rank()}.npy", objective.encoder.network.conv1.weight.grad.numpy())
        del model  # see `process_group`


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scan_that_comes_again_in_a_balanced_epoch_has_other_views(store, tmp_path, monkeypatch, accumulate):
    shutil.copytree(store.folder, tmp_path / "store")
    small = store.index["participant"].isin(["000", "001", "003"])
    store.index.assign(dataset=np.where(small, "small", "large")).to_csv(tmp_path / "store/index.csv", index=False)
    real, drawn = objectives.make_views, []

    def make_views(images, masks, keys, recipe, **options):
        drawn.extend((key, options["epoch"], options["view"]) for key in keys)
        return real(images, masks, keys, recipe, **options)

    monkeypatch.setattr(objectives, "make_views", make_views)
    asked = params(store, tmp_path / "run", prepared=tmp_path / "store", epochs=1, sampling="balanced",
                   accumulate=accumulate, validation_fraction=0, monitor_epochs=0)
    pretrain(asked, Run.of(asked))
    training = [each for each in drawn if each[1] != objectives.VALIDATION_EPOCH]
    assert len({key for key, _, _ in training}) < len(training) / 2 and len(set(training)) == len(training)


@pytest.mark.parametrize(("objective", "architecture"), [("simclr", "resnet18_narrow"), ("mae", "vit_narrow")])
def test_two_sessions_of_a_person_are_no_negatives_on_validation_either(store, tmp_path, objective, architecture):
    logs, held_out = {}, choose_scans(params(store, tmp_path), store)[1]["participant"]
    further = store.index["participant"].isin(held_out) & store.index["participant"].duplicated()
    assert further.any()
    shutil.copytree(store.folder, tmp_path / "first")
    store.index[~further].to_csv(tmp_path / "first/index.csv", index=False)
    for name, folder in (("all", store.folder), ("first", tmp_path / "first")):
        asked = params(store, tmp_path / name / "run", prepared=folder, objective=objective, architecture=architecture,
                       epochs=1)
        logs[name] = pretrain(asked, Run.of(asked)).drop(columns="seconds")
    assert logs["all"].equals(logs["first"]) is (objective == "simclr")
    assert logs["all"]["loss"].equals(logs["first"]["loss"])  # the same scans were learned from


def _resume(store, folder: str) -> None:
    """Resume from a folder of this process's own, as if it saw another state of a network disk."""
    with process_group():
        scans = PreparedScans(store, store.index)
        try:
            fit(SimCLR(build_encoder("resnet18_narrow", GRID), RECIPE, projection=[16, 8], temperature=0.2, seed=0,
                       spacing_mm=4.0), scans, lambda _: [list(range(8))], scans, replace(SETTINGS, epochs=2),
                Path(folder) / str(rank()), params={"seed": 0})
        except CheckpointError as error:
            (Path(folder) / f"{rank()}.txt").write_text(str(error))


@pytest.mark.slow
def test_processes_that_read_different_checkpoints_stop(store, tmp_path):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    scans = PreparedScans(store, store.index)
    fit(SimCLR(build_encoder("resnet18_narrow", GRID), RECIPE, projection=[16, 8], temperature=0.2, seed=0,
               spacing_mm=4.0), scans, lambda _: [list(range(8))], scans, replace(SETTINGS, epochs=1), tmp_path / "0",
        params={"seed": 0})
    launch(_resume, (store, str(tmp_path)), 2)
    for number in (0, 1):
        assert "(epoch 1 after 0 steps, epoch 2 after 0 steps)" in (tmp_path / f"{number}.txt").read_text()


class Small(Encoder):
    """A ResNet's kinds of layers, once each: a whole one takes a minute to compile."""

    features = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv3d(1, 8, 7, 2, 3), torch.nn.BatchNorm3d(8), torch.nn.ReLU(), torch.nn.MaxPool3d(3, 2, 1),
            torch.nn.Conv3d(8, 16, 3, 2, 1), torch.nn.BatchNorm3d(16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(1),
            torch.nn.Flatten())
        with_right_gradients(self)

    def forward(self, images):
        return self.layers(images)


@pytest.mark.slow
def test_a_compiled_encoder_learns_the_same(store, tmp_path, monkeypatch):
    if not shutil.which("g++"):
        absent("torch.compile on a CPU needs g++")
    monkeypatch.setattr(pretraining, "build_encoder", lambda *_: Small())
    logs, runs = [], {"plain": {}, "compiled": {"torch_compile": True}, "chunks": {"torch_compile": True, "chunk": 4}}
    smooth = {"optimizer": "lars", "learning_rate": 0.1}  # Adam's first steps follow the signs of gradients near zero
    for name, changes in runs.items():
        asked = params(store, tmp_path / name, epochs=2, **smooth, **changes)
        logs.append(pretrain(asked, Run.of(asked))["loss"].to_numpy())
    assert (logs[0] != logs[1]).any() and np.allclose(logs[1], logs[0], rtol=1e-5)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()
    chunked = params(store, tmp_path / "chunked", epochs=2, chunk=4, **smooth)
    logs.append(pretrain(chunked, Run.of(chunked))["loss"].to_numpy())
    assert np.allclose(logs[3], logs[2], rtol=1e-5)  # seen: 3e-7
    asked = params(store, tmp_path / "mae", objective="mae", architecture="vit_narrow", torch_compile=True)
    assert any(problem.startswith("torch_compile: true is for simclr") for problem in asked.problems())


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(store, tmp_path):
    _gradient(store, str(tmp_path))
    launch(_gradient, (store, str(tmp_path)), 2)
    one = np.load(tmp_path / "1-0.npy")
    for number in (0, 1):  # the loss is float32 in the middle: 7e-8 of the largest gradient was seen
        assert np.abs(np.load(tmp_path / f"2-{number}.npy") - one).max() < 1e-5 * np.abs(one).max()


@pytest.mark.slow
def test_a_run_in_two_processes(store, tmp_path):
    logs = []
    for workers in (1, 2):
        # not Adam: its first steps follow the signs of gradients, which rounding turns where they are near zero
        run = params(store, tmp_path / str(workers), workers=workers, epochs=1, optimizer="lars", learning_rate=0.1)
        logs.append(pretrain(run, Run.of(run)))
    assert np.allclose(logs[0]["loss"], logs[1]["loss"], atol=1e-3)  # float32's rounding over three steps: 1.2e-4 seen
    assert read_record(tmp_path / "2")["participants"]


def _normalise(folder: str) -> None:
    with process_group():
        norm, images = _norm_and_images()
        mine = images[4 * rank():4 * rank() + 4].requires_grad_()
        (synchronise_batch_norm(torch.nn.Sequential(norm))(mine) ** 3).sum().backward()
        np.savez(f"{folder}/{rank()}.npz", gradient=mine.grad, mean=norm.running_mean, var=norm.running_var)


def _norm_and_images():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.BatchNorm3d(3).double(), torch.randn(8, 3, 2, 3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.slow
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(tmp_path):
    launch(_normalise, (str(tmp_path),), 2)
    norm, images = _norm_and_images()
    images.requires_grad_()
    (norm(images) ** 3).sum().backward()
    for number in (0, 1):
        there = np.load(tmp_path / f"{number}.npz")
        assert np.allclose(there["gradient"], images.grad[4 * number:4 * number + 4].numpy(), atol=1e-12)
        assert np.allclose(there["mean"], norm.running_mean) and np.allclose(there["var"], norm.running_var)
    assert isinstance(synchronise_batch_norm(torch.nn.Sequential(norm))[0], AllReducedBatchNorm)


def test_logs_are_tables(store, tmp_path):
    learned = params(store, tmp_path / "run", epochs=1, validation_fraction=0.0)
    log = pretrain(learned, Run.of(learned))
    assert pd.read_csv(tmp_path / "run/log.csv").equals(log) and "validation_loss" not in log


def test_validation_scans_are_compared_in_equal_groups_whatever_fits_at_a_time(store, monkeypatch):
    objective = SimCLR(build_encoder("resnet18_narrow", store.grid), RECIPE, projection=[16, 8], temperature=0.1,
                       seed=0, spacing_mm=4.0)
    scans = PreparedScans(store, store.index.head(9))
    whole = validate(objective, scans, 8)  # 5 and 4 scans: a ninth by itself would find its partner
    monkeypatch.setattr("kit.train.loop.scans_at_a_time", lambda shape: 2)
    assert validate(objective, scans, 8) == pytest.approx(whole, rel=1e-5)  # float32 sums of another order
    embeddings = torch.cat([objective(collate([scans[number]]), 0, embed=True) for number in range(9)], 1)
    groups = [objective.compare(*embeddings[:, part])["loss"] for part in (slice(5), slice(5, 9))]
    assert whole["loss"] == pytest.approx((5 * groups[0].item() + 4 * groups[1].item()) / 9, rel=1e-5)


@pytest.mark.parametrize(("equal", "shares"), [(True, [[0, 1], [2, 3], [4, 5]]), (False, [[0, 1, 2], [3, 4], [5, 6]])])
def test_a_batch_is_shared_among_processes(monkeypatch, equal, shares):
    monkeypatch.setattr("kit.train.loop.world_size", lambda: 3)
    for number, share in enumerate(shares):
        monkeypatch.setattr("kit.train.loop.rank", lambda number=number: number)
        assert chunks_of(list(range(7)), 0, equal) == [share]
        assert chunks_of(list(range(7)), 4, equal) == [share]
        assert chunks_of(list(range(7)), 2, equal) == [[2 * number, 2 * number + 1]]  # 3, 2, 2 would be 2, 1, 1 chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
def test_all_processes_run_equally_many_chunks(monkeypatch, chunk):
    for processes in (2, 3):
        monkeypatch.setattr("kit.train.loop.world_size", lambda processes=processes: processes)
        for size in range(processes, 20):
            counts, read = set(), []
            for number in range(processes):
                monkeypatch.setattr("kit.train.loop.rank", lambda number=number: number)
                chunks = chunks_of(list(range(size)), chunk, equal=False)
                counts.add(len(chunks))
                read += [scan for part in chunks for scan in part]
            assert len(counts) == 1 and read == list(range(len(read))) and len(read) > size - processes


def test_a_pair_stays_together(monkeypatch):
    monkeypatch.setattr("kit.train.loop.world_size", lambda: 2)
    for number, share in enumerate([[0, 1, 2, 3], [4, 5, 6, 7]]):
        monkeypatch.setattr("kit.train.loop.rank", lambda number=number: number)
        assert chunks_of(list(range(10)), 0, True, 2) == [share]
        assert chunks_of(list(range(10)), 1, True, 2) == [share[:2], share[2:]]


@pytest.mark.parametrize(("values", "epochs"), [([1.0, 1.0, 1.0], 1), ([np.nan, 2.0, 2.0], 2), ([3.0, np.nan, 1.0], 3)])
def test_the_best_epoch_is_the_first_of_the_lowest_and_never_nan(store, tmp_path, values, epochs):
    objective = build_objective(params(store, tmp_path / "run"), store)
    scans = PreparedScans(store, store.index.head(8))
    settings = replace(SETTINGS, epochs=3, batch_size=4, learning_rate=1e-3)
    fit(objective, scans, lambda _: [[0, 1, 2, 3]], scans, settings, tmp_path,
        monitor=lambda _, epoch: {"monitor": values[epoch - 1]})
    assert len(checkpoint.read_checkpoint(tmp_path / "checkpoints", "best")["log"]) == epochs


def test_more_processes_than_scans_of_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr("kit.train.loop.world_size", lambda: 4)
    with pytest.raises(TrainingError, match="3 scans .* for 4 processes: use fewer workers"):
        chunks_of([0, 1, 2], 0)


def test_more_processes_than_scans_of_a_batch_are_refused_before_work_starts(store, tmp_path):
    # 24 participants, 8 of whom have a second scan: a batch of 24 and one of 8
    asked = params(store, tmp_path / "run", workers=16, batch_size=32, validation_fraction=0)
    with pytest.raises(ParameterError, match="workers: 16 processes, but 8 scans in the smallest batch"):
        pretrain(asked, Run.of(asked))
    pairs = params(store, tmp_path / "pairs", workers=32, batch_size=32, validation_fraction=0, session_pairs=True)
    with pytest.raises(ParameterError, match="workers: 32 processes, but 24 pairs of scans in the smallest batch"):
        pretrain(pairs, Run.of(pairs))


def test_scans_that_are_damaged_at_the_start_are_named_and_left_out(tmp_path):
    store = make_store(tmp_path / "store")
    whole = params(store, tmp_path / "whole", epochs=1)
    learned, validation = choose_scans(whole, store)
    bad = [learned["scan"].iloc[1], validation["scan"].iloc[0]]
    scan_path(store.folder, bad[0]).write_bytes(b"no scan")
    scan_path(store.folder, bad[1]).unlink()
    asked = params(store, tmp_path / "run", epochs=1)
    with pytest.warns(UserWarning, match=f"2 of 32 scans are missing or damaged and left out: {bad[0]}, {bad[1]}"):
        pretrain(asked, Run.of(asked))
    assert sorted(pd.read_csv(tmp_path / "run/damaged.csv")["scan"]) == sorted(bad)
    made = pd.read_csv(tmp_path / "run/made_from.csv")
    assert len(made) == 30 and not set(bad) & set(made["scan"])

    stopped = params(store, tmp_path / "stopped", epochs=1)
    (run := Run.of(stopped)).folder.joinpath("stop").touch()
    with pytest.warns(UserWarning, match="2 of 32 scans"):
        pretrain(stopped, run)
    later = scan_path(store.folder, learned["scan"].iloc[2])
    well = later.read_bytes()
    later.write_bytes(b"no scan")  # meanwhile
    with pytest.raises(CheckpointError, match=f"1 scans that .* began with are missing .* now: {later.stem}"):
        pretrain(stopped, run)
    later.write_bytes(well)  # restored, it resumes
    image, mask = store.read(learned["scan"].iloc[0])
    write_scan(scan_path(store.folder, bad[0]), image, mask, bad[0], store.grid.affine)
    with pytest.warns(UserWarning, match="2 of 32 scans"):  # mended since: what was left out stays out
        assert pretrain(stopped, run)["loss"].notna().all()
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "run"))


@pytest.mark.parametrize("part", ["learned from", "validation"])
def test_a_scan_that_breaks_later_ends_the_run_with_a_checkpoint_and_its_name(tmp_path, monkeypatch, part):
    store = make_store(tmp_path / "store")
    whole = params(store, tmp_path / "whole")
    log = pretrain(whole, Run.of(whole))
    asked, read, reads = params(store, tmp_path / "run"), Store.read, []
    learned, validation = choose_scans(asked, store)
    breaking = (learned if part == "learned from" else validation)["scan"].iloc[0]

    def breaks(self, scan, crop=None):
        reads.append(scan)
        # of a validation scan: read by the validation and by the monitor, in the first epoch
        if reads.count(breaking) == {"learned from": 2, "validation": 3}[part] and scan == breaking:
            raise StoreError(f"scan {scan}: damaged")
        return read(self, scan, crop)

    monkeypatch.setattr(Store, "read", breaks)
    with pytest.raises(StoreError, match="scan made_"):
        pretrain(asked, run := Run.of(asked))
    state = checkpoint.read_checkpoint(tmp_path / "run/checkpoints")
    assert state["position"]["epoch"] == 1
    assert part == "learned from" or state["position"]["step"] == len(log["loss"])  # three steps, before validation
    monkeypatch.undo()
    again = pretrain(asked, run)  # it was well after all
    assert np.array_equal(again["loss"], log["loss"]) and same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
