"""The monitor's measures against closed forms, and its verdict on what each kind of run looks like."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kit import device
from kit.augment.masking import masked_patches
from kit.params import Pretrain
from kit.runs import Run
from kit.seeding import rng_for, scan_key
from kit.store.dataset import PreparedScans
from kit.train.monitor import (
    alignment,
    effective_rank,
    look,
    mean_scan_loss,
    quick_probe,
    std,
    uniformity,
    verdict,
)
from kit.train.objectives import VALIDATION_EPOCH, SimCLR
from kit.train.pretrain import build_objective, by_chance, pretrain


def test_closed_forms():
    axes = torch.eye(4)
    assert alignment(axes, axes) == 0 and alignment(axes, -axes) == 4
    assert uniformity(axes) == pytest.approx(-4)  # all squared distances are 2
    assert uniformity(torch.ones(5, 4) / 2) == pytest.approx(0, abs=1e-6)
    assert std(torch.ones(5, 4) / 2) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    even = F.normalize(torch.randn(4000, 64, generator=generator), dim=1)
    assert std(even) == pytest.approx(1, abs=0.02)


def test_the_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    assert effective_rank(torch.randn(5000, 5, generator=generator) @ basis[:5]) == pytest.approx(5, rel=0.02)
    assert effective_rank(torch.randn(100, 1, generator=generator) @ basis[:1]) == pytest.approx(1, rel=0.01)


def test_probes_go_across_participants():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 2)
    features = rng.normal(size=(40, 6))[people] + 0.01 * rng.normal(size=(80, 6))
    sex, age = pd.Series(np.where(features[:, 0] > 0, "F", "M")), pd.Series(50 + 10 * features[:, 1])
    assert quick_probe(features, sex, people) > 0.7 and quick_probe(features, age, people) > 0.9
    # a label that only says who it is cannot be read off another participant
    who = pd.Series(rng.integers(0, 2, 40)[people].astype(str))
    assert abs(quick_probe(features, who, people) - 0.5) < 0.25
    assert quick_probe(features[:20], sex[:20], people[:20]) is None


def test_sites_with_number_codes_are_classes(store):
    """Seven sites of three to five scans: a regression of their codes would give an R²."""
    rows = store.index.assign(site=store.index["participant"].astype(int) % 7, dataset=lambda rows: rows["site"] + 1)
    rows.loc[rows["site"] == 0, "site"] = math.nan
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused"})
    objective, scans = device.on_device(build_objective(asked, store)), PreparedScans(store, store.index)
    numbers = look(objective, scans, rows)
    texts = look(objective, scans, rows.assign(site=rows["site"].map("site {}".format, na_action="ignore"),
                                               dataset=rows["dataset"].map("set {}".format)))
    assert numbers == texts and numbers["classes_site"] == 6 and numbers["classes_dataset"] == 7
    assert 0 <= numbers["probe_site"] <= 1 and "classes_age" not in numbers and "classes_sex" not in numbers


def test_a_site_of_one_participant_is_not_probed(store, monkeypatch):
    """Two sites of eleven participants that the features tell apart, and two of one."""
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused"})
    objective, scans = build_objective(asked, store), PreparedScans(store, store.index)
    number = store.index["participant"].astype(int)
    site = pd.Series(np.where(number % 2, "a", "b")).mask(number == 0, "c").mask(number == 1, "d")
    features = F.one_hot(torch.tensor(pd.factorize(site)[0]), 4).float()
    monkeypatch.setattr("kit.train.monitor.embed", lambda *_: (features, None))
    found = look(objective, scans, store.index.assign(site=site))
    assert found["probe_site"] == 1 and found["classes_site"] == 2
    alone = look(objective, scans, store.index.assign(site=number, dataset=site))
    assert "probe_site" not in alone and alone["probe_dataset"] == 1  # no site has two participants


def test_uniformity_is_of_different_scans(store, monkeypatch):
    """A scan's two views are no pair: aligned perfectly, they do not change it."""
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused"})
    rows = store.index[:4]
    monkeypatch.setattr("kit.train.monitor.embed", lambda *_: (torch.eye(4), torch.eye(4).expand(2, 4, 4)))
    found = look(build_objective(asked, store), PreparedScans(store, rows), rows)
    assert found["alignment"] == 0 and found["uniformity"] == pytest.approx(-4)  # all squared distances are 2


def test_labels_are_read_as_elsewhere(store):
    """A code among ages is no age, few ages are numbers, site 1 of two datasets is two sites, male and M are one."""
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused"})
    objective, scans = device.on_device(build_objective(asked, store)), PreparedScans(store, store.index)
    number = store.index["participant"].astype(int)
    rows = store.index.assign(age=30.0 + number, site=number % 2 + 1, dataset=np.where(number < 12, "a", "b"))
    last = number == number.max()
    plain = look(objective, scans, rows.assign(age=rows["age"].mask(last)))
    for missing in ("NA", 999, -9):
        told = rows["age"].astype(object).mask(last, missing)
        assert look(objective, scans, rows.assign(age=told))["probe_age"] == plain["probe_age"]
    assert plain["classes_site"] == 4 and plain["classes_dataset"] == 2
    sex = pd.Series(np.where(number % 2, "F", "M"))
    written = sex.mask(number % 4 == 1, "female").mask(number % 4 == 2, "m")
    assert look(objective, scans, rows.assign(sex=written))["probe_sex"] == look(
        objective, scans, rows.assign(sex=sex))["probe_sex"]
    written = plain | look(objective, scans, rows.assign(sex=sex, age=rows["age"].mask(last)))
    capitals = rows.assign(Sex=sex, Age=rows["age"].mask(last), Site=rows["site"]).drop(columns=["age", "site"])
    assert {"probe_age", "probe_sex", "probe_site"} < set(written) and look(objective, scans, capitals) == written
    assert "probe_age" not in look(objective, scans, rows.assign(age=np.where(number % 2, "60-65", "65-70")))
    few = pd.Series(20.0 + 10 * (number % 5))
    assert quick_probe(np.zeros((len(few), 3)), few, number.to_numpy()) <= 0  # R²: balanced accuracy would be 0.2


def test_a_network_that_has_diverged_is_not_measured(store):
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused"})
    objective, scans = device.on_device(build_objective(asked, store)), PreparedScans(store, store.index)
    with torch.no_grad():
        objective.head[-1].weight.fill_(torch.inf)
    assert look(objective, scans, store.index) == {}
    with torch.no_grad():
        next(objective.encoder.parameters()).fill_(torch.nan)
    assert look(objective, scans, store.index) == {}


def log(**columns):
    return pd.DataFrame({"epoch": [1, 2], "loss": [3.4, 2.0], "top1": [0.1, 0.8], "rank": [20.0, 25.0],
                         "std": [0.9, 0.9], "uniformity": [-2.0, -2.5], **columns})


@pytest.mark.parametrize(("columns", "word"), [
    ({}, "LEARNING: the loss fell by 41%"),
    ({"std": [0.5, 0.01], "uniformity": [-1.0, -0.001], "top1": [0.1, 0.04]}, "COLLAPSED"),
    ({"std": [0.2, 0.088], "uniformity": [-0.1, -0.036], "top1": [0.08, 0.375]}, "LEARNING"),  # 4 validation scans
    ({"rank": [8.0, 1.1]}, "COLLAPSED"),
    ({"rank": [1.9, 1.4]}, "LEARNING"),  # of 3 validation scans it is 2 at most
    ({"loss": [3.43, 3.42]}, "NOT LEARNING: the loss"),
    ({"top1": [0.03, 0.04]}, "NOT LEARNING: 4.0% of the views"),
    ({"probe_site": [0.5, 0.95]}, "MEMORISING SITE"),
    ({"probe_site": [0.5, 0.6]}, "LEARNING"),
    ({"probe_site": [0.2, 0.72], "classes_site": [5, 5]}, "MEMORISING SITE"),
    ({"probe_dataset": [0.5, 0.78], "classes_dataset": [2, 2]}, "LEARNING"),
    ({"probe_dataset": [0.25, 0.78], "classes_dataset": [4, 4]},
     "MEMORISING SITE: the site can be predicted from the features with 78% balanced accuracy (chance 25%, 25% at "
     "first)"),
    ({"probe_site": [math.nan, math.nan], "classes_site": [math.nan, math.nan], "probe_dataset": [0.25, 0.78],
      "classes_dataset": [4, 4]}, "MEMORISING SITE: the site can be predicted from the features with 78%"),
])
def test_the_verdict_in_plain_words(columns, word):
    assert verdict(log(**columns), chance=1 / 31, sites=2).startswith(word)
    assert verdict(log(**columns).head(1), 1 / 31).startswith("too early")


@pytest.mark.parametrize(("losses", "seconds", "word"), [
    ([3.0, math.nan], [9.0, 9.0], "NOT LEARNING: the validation loss is not finite"),
    ([3.0, math.nan], [9.0, math.nan], "LEARNING"),  # stopped in an epoch, before validation
    ([math.nan, 2.0], [9.0, 9.0], "LEARNING"),
])
def test_a_network_that_fails_on_validation_is_not_learning(losses, seconds, word):
    assert verdict(log(validation_loss=losses, seconds=seconds), 1 / 31).startswith(word)


@pytest.mark.parametrize(("batch", "top1", "word"), [(2, 0.5, "LEARNING"), (2, 0.4, "NOT LEARNING"),
                                                     (72, 0.03, "LEARNING"), (72, 0.01, "NOT LEARNING")])
def test_how_many_partners_are_more_than_chance_finds(batch, top1, word):
    assert verdict(log(top1=[0.0, top1]), 1 / (2 * batch - 1)).startswith(word)


@pytest.mark.parametrize(("losses", "scans", "word"), [
    ([2.0, 1.0, 0.8, 1.5, 1.6, 1.7], 40, "OVERFITTING"),
    ([2.0, 1.0, 0.8, 1.5, 1.6, 1.7], 4, "LEARNING"),  # too few scans to say so
    ([2.0, 1.0, 0.8, 0.9, 1.1, 1.1], 40, "LEARNING"),  # within what it jumps
    ([2.0, 1.0, 0.8, 1.5, 0.9, 1.7], 40, "LEARNING"),  # one bad epoch
    ([2.0, 1.0, 0.8, 1.5, 1.6, math.nan], 40, "LEARNING"),  # stopped in an epoch; two remain above the best
])
def test_scans_learned_by_heart_are_called_so(losses, scans, word):
    train = [3.0, 2.0, 1.5, 1.2, 1.0, 0.9]
    rows = pd.DataFrame({"epoch": range(1, 7), "loss": train, "top1": 0.8, "validation_loss": losses})
    said = verdict(rows, 1 / 15, validation_scans=scans)
    assert said.startswith(word)
    if word == "OVERFITTING":
        assert "memorising the scans" in said and "0.800 after epoch 3" in said and "40 validation scans" in said
        rose = rows.assign(loss=[3.0, 2.0, 1.5, 1.6, 1.7, 1.8])
        assert verdict(rose, 1 / 15, validation_scans=40).startswith("LEARNING")


@pytest.mark.parametrize(("losses", "word"), [
    ([0.9, 0.6], "LEARNING: the loss fell by 41%; on held-out scans it is 0.600, that of the mean scan 0.700"),
    ([0.9, 0.7], "NOT LEARNING: on held-out scans the loss is 0.700, while always predicting the mean training scan"),
    ([0.6, 0.8], "NOT LEARNING"),  # the encoder that is kept is the last epoch's
    ([0.6, math.nan], "LEARNING"),  # stopped in an epoch
])
def test_an_autoencoder_that_the_mean_scan_beats_is_not_learning(losses, word):
    rows = log(validation_loss=losses, mean_scan_loss=[0.7, 0.7]).drop(columns=["top1", "std", "uniformity"])
    assert verdict(rows, 1 / 31).startswith(word)


def test_an_autoencoder_without_validation_scans_is_not_called_better_than_the_mean_scan():
    words = verdict(pd.DataFrame({"epoch": [1, 2], "loss": [1.0, 0.9]}), 0.0)
    assert words.startswith("LEARNING: the loss fell by 10%; whether it beats the mean scan is unknown")


def autoencoder(store, **changes):
    return build_objective(Pretrain.model_validate({
        "prepared": store.folder, "output_dir": "unused", "objective": "mae", "architecture": "vit_narrow",
        **changes}), store)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_mean_scans_loss_by_hand(store, monkeypatch, normalise):
    objective = device.on_device(autoencoder(store, normalise_patches=normalise))
    learned, validation = (PreparedScans(store, rows) for rows in (store.index[:20], store.index[20:]))
    monkeypatch.setattr(device, "VOXELS", 3 * math.prod(store.grid.shape))  # three scans at a time

    def blocks(volume):  # 4 x 3 x 4 voxels each, along z, then y, then x
        return [volume[z:z + 4, y:y + 3, x:x + 4].ravel().astype(float)
                for z in range(0, 12, 4) for y in range(0, 18, 3) for x in range(0, 24, 4)]

    def read(scan):
        image, mask = store.read(scan)
        holds = np.array([block.mean() >= 0.05 for block in blocks(mask)])
        parts = [(block - block.mean()) / math.sqrt(block.var(ddof=1) + 1e-6) if normalise else block
                 for block in blocks(image)]
        return np.array(parts), holds

    total, count = np.zeros((108, 48)), np.zeros(108)
    for scan in learned.scans:
        parts, holds = read(scan)
        total, count = total + parts * holds[:, None], count + holds
    mean = total / np.maximum(count, 1)[:, None]
    each = []
    for scan in validation.scans:
        parts, holds = read(scan)
        masked = masked_patches(108, 0.75, rng_for(0, VALIDATION_EPOCH, scan_key(scan)))
        each.append(np.square(parts - mean)[masked & holds].mean())
    assert mean_scan_loss(objective, learned, validation) == pytest.approx(np.mean(each), rel=1e-5)
    assert 0 < holds.sum() < 108


def test_an_autoencoders_log_has_the_mean_scan_in_every_row(store, tmp_path):
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path / "run", "objective": "mae",
                                     "architecture": "vit_narrow", "epochs": 2, "monitor_epochs": 0,
                                     "validation_fraction": 0.2})
    rows = pretrain(asked, Run.of(asked))
    assert rows["mean_scan_loss"].nunique() == 1 and rows["mean_scan_loss"].notna().all()
    assert pd.read_csv(tmp_path / "run/log.csv")["mean_scan_loss"].notna().all()


@pytest.mark.slow
def test_an_autoencoder_of_structured_scans_beats_the_mean_scan(store, tmp_path):
    # how bright the lower half is, and whether there is a bright corner, can be seen in any patch of them
    asked = Pretrain.model_validate({
        "prepared": store.folder, "output_dir": tmp_path / "run", "objective": "mae", "architecture": "vit_narrow",
        "normalise_patches": False, "epochs": 160, "batch_size": 4, "learning_rate": 1e-3,
        "beta2": 0.95, "monitor_epochs": 0, "validation_fraction": 0.3})
    rows = pretrain(asked, Run.of(asked))
    assert rows["validation_loss"].iloc[-1] < 0.9 * rows["mean_scan_loss"].iloc[-1]
    assert verdict(rows, 0.0).startswith("LEARNING")


def test_chance_follows_the_batches_that_are_really_used(store):
    def chance(**changes) -> float:
        asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused", **changes})
        return by_chance(asked, store.index)

    assert chance(batch_size=8) == pytest.approx(1 / 15)
    # 24 participants, 8 of whom have a second scan: a batch of 24 and one of 8
    assert chance(batch_size=64) == pytest.approx((1 / 47 + 1 / 15) / 2)
    assert chance(batch_size=64, session_pairs=True) == pytest.approx(1 / 47)


def test_a_look_takes_few_scans_at_a_time_and_finds_the_same(store, monkeypatch):
    asked = Pretrain.model_validate({"prepared": store.folder, "output_dir": "unused", "batch_size": 16})
    objective, scans = device.on_device(build_objective(asked, store)), PreparedScans(store, store.index)
    whole, sizes = look(objective, scans, store.index), []
    objective.encoder.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(device, "VOXELS", 3 * math.prod(store.grid.shape))
    assert look(objective, scans, store.index) == pytest.approx(whole, abs=1e-3)
    assert isinstance(objective, SimCLR) and max(sizes) == 6  # both views of three scans


@pytest.mark.slow
def test_real_runs_get_the_verdict_that_they_deserve(store, tmp_path):
    said = {}
    for name, changes in {"good": {"temperature": 0.2}, "hot": {"temperature": 100}}.items():
        params = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path / name, "epochs": 12,
                                          "batch_size": 8, "validation_fraction": 0.4, "projection": [32, 16],
                                          **changes})
        said[name] = verdict(pretrain(params, Run.of(params)), 1 / 15, 2)
    assert said["good"].startswith("LEARNING") and said["hot"].startswith(("NOT LEARNING", "COLLAPSED"))
    assert not math.isnan(pd.read_csv(tmp_path / "good/log.csv")["alignment"].iloc[-1])
