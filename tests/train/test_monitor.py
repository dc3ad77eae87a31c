"""The monitor's measures against closed forms, and its verdict on what each kind of run looks like."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kit.params import Pretrain
from kit.runs import Run
from kit.train.monitor import alignment, effective_rank, partners_found, probe, spread, uniformity, verdict
from kit.train.pretrain import pretrain


def test_closed_forms():
    axes = torch.eye(4)
    assert alignment(axes, axes) == 0 and alignment(axes, -axes) == 4
    assert uniformity(axes) == pytest.approx(-4)  # all squared distances are 2
    assert uniformity(torch.ones(5, 4) / 2) == pytest.approx(0, abs=1e-6)
    assert partners_found(axes, axes) == 1 and spread(torch.ones(5, 4) / 2) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    even = F.normalize(torch.randn(4000, 64, generator=generator), dim=1)
    assert spread(even) == pytest.approx(1, abs=0.02)


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
    assert probe(features, sex, people) > 0.7 and probe(features, age, people) > 0.9
    # a label that only says who it is cannot be read off another participant
    who = pd.Series(rng.integers(0, 2, 40)[people].astype(str))
    assert abs(probe(features, who, people) - 0.5) < 0.25
    assert probe(features[:20], sex[:20], people[:20]) is None


def log(**columns):
    return pd.DataFrame({"epoch": [1, 2], "loss": [3.4, 2.0], "top1": [0.1, 0.8], "rank": [20.0, 25.0],
                         "spread": [0.9, 0.9], "uniformity": [-2.0, -2.5], **columns})


@pytest.mark.parametrize(("columns", "word"), [
    ({}, "LEARNING: the loss fell by 41%"),
    ({"spread": [0.5, 0.01], "uniformity": [-1.0, -0.001]}, "COLLAPSED"),
    ({"rank": [8.0, 1.1]}, "COLLAPSED"),
    ({"loss": [3.43, 3.42]}, "NOT LEARNING: the loss"),
    ({"top1": [0.03, 0.04]}, "NOT LEARNING: 4.0% of the views"),
    ({"probe_site": [0.5, 0.95]}, "MEMORISING SITE"),
    ({"probe_site": [0.5, 0.6]}, "LEARNING"),
])
def test_the_verdict_in_plain_words(columns, word):
    assert verdict(log(**columns), batch_size=16, sites=2).startswith(word)
    assert verdict(log(**columns).head(1), 16).startswith("too early")


@pytest.mark.slow
def test_real_runs_get_the_verdict_that_they_deserve(store, tmp_path):
    said = {}
    for name, changes in {"good": {"temperature": 0.2}, "hot": {"temperature": 100}}.items():
        params = Pretrain.model_validate({"prepared": store.folder, "output_dir": tmp_path / name, "epochs": 12,
                                          "batch_size": 8, "validation_fraction": 0.4, "projection": [32, 16],
                                          **changes})
        said[name] = verdict(pretrain(params, Run.of(params)), 8, 2)
    assert said["good"].startswith("LEARNING") and said["hot"].startswith(("NOT LEARNING", "COLLAPSED"))
    assert not math.isnan(pd.read_csv(tmp_path / "good/log.csv")["alignment"].iloc[-1])
