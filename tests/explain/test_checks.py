"""The randomisation check: 1 for the same weights, lower for new ones."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kit.explain.checks import randomisation_check, rank_correlation, reinitialised
from kit.explain.saliency import METHODS, saliency

SHAPE = (7, 8, 9)


class WithToken(nn.Module):
    """A layer with a parameter of its own and no `reset_parameters`, as a transformer's class token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(3 + 0.5 * torch.randn(1000))


@pytest.fixture
def scan() -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:6, 2:7, 1:8] = True
    return np.where(mask, np.random.default_rng(0).normal(size=SHAPE), 0).astype(np.float32), mask


@pytest.fixture
def left_reader() -> nn.Module:
    """A model that has learnt to look at the left side only (x is the last axis)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(np.prod(SHAPE), 4), nn.Softplus(), nn.Linear(4, 1))
    net[1].weight.data.view(4, *SHAPE)[..., 4:] *= 1e-3
    return net


def test_rank_correlation_by_hand():
    mask = np.array([True, True, True, True, False])
    # Signs and the voxel outside do not count; ranks 1234 against 1243: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(np.array([1, -2, 3, 4, 0]), np.array([1, 2, 9, -5, 99]), mask) == pytest.approx(0.8)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5), mask))


def test_same_weights_give_one_and_new_weights_less(left_reader, scan, tmp_path):
    image, mask = scan
    store = SimpleNamespace(read={"first": scan, "second": None}.get)
    maps = {("first", method): saliency(left_reader, image, mask, method) for method in METHODS}
    others = {("second", method): values for (_, method), values in maps.items()}  # one scan is enough
    table = randomisation_check(left_reader, store, maps | others, 32, (0, 1), tmp_path)
    assert len(pd.read_csv(tmp_path / "randomisation.csv")) == len(table)
    assert list(zip(table["method"], table["seed"], strict=True)) == [(m, s) for s in (0, 1) for m in METHODS]
    gradient = table[table["method"] == "gradient"]["rank_correlation"]
    integrated = table[table["method"] == "integrated_gradients"]["rank_correlation"]
    assert gradient.abs().max() < 0.3
    assert integrated.max() < 0.8
    assert integrated.mean() > gradient.mean()  # the image is in both of its maps

    # Maps of the randomised copy itself are what a model that has learnt nothing gives: 1.
    fresh = reinitialised(left_reader, seed=1)
    own = {("first", method): saliency(fresh, image, mask, method) for method in METHODS}
    again = randomisation_check(left_reader, store, own, 32, (1,), tmp_path)
    np.testing.assert_allclose(again["rank_correlation"], 1)


def test_reinitialised_is_not_what_training_started_from():
    torch.manual_seed(3)
    start = nn.Linear(5, 4)
    assert not torch.equal(reinitialised(start, seed=3).weight, start.weight)


def test_reinitialised_draws_every_weight_by_its_seed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), WithToken(), nn.Linear(4, 2))
    net[1].running_mean.fill_(7)
    net[1].weight.data.fill_(2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    first, same, other = (reinitialised(net, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in ("0.weight", "0.bias", "2.token", "3.weight", "3.bias"):
        assert not torch.equal(first[name], before[name]) and not torch.equal(first[name], other[name])
    assert first["2.token"].mean() == pytest.approx(3, abs=0.1)
    assert first["2.token"].std() == pytest.approx(0.5, abs=0.1)
    assert first["1.running_mean"].abs().max() == 0 and torch.equal(first["1.weight"], torch.ones(4))
