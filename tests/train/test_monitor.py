"""The monitor's measures against closed forms, and its verdict on what each kind of run looks like."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kit import device
from kit.params import Pretrain
from kit.runs import Run
from kit.store.dataset import PreparedScans
from kit.train.monitor import alignment, effective_rank, look, quick_probe, std, uniformity, verdict
from kit.train.objectives import SimCLR
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
])
def test_the_verdict_in_plain_words(columns, word):
    assert verdict(log(**columns), chance=1 / 31, sites=2).startswith(word)
    assert verdict(log(**columns).head(1), 1 / 31).startswith("too early")


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
    objective, scans = build_objective(asked, store), PreparedScans(store, store.index)
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
