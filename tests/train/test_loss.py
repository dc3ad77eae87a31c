"""NT-Xent against a loop written from the paper, a closed form, a symmetry, and one process against two."""

import math

import numpy as np
import pytest
import torch

from kit.train.distributed import launch, process_group, rank
from kit.train.loss import nt_xent


def slow_nt_xent(first, second, temperature):
    """Equation 1 of Chen et al. 2020, view by view."""
    views = torch.cat([first, second]).double()
    views = views / views.norm(dim=1, keepdim=True)
    count, total = len(views), 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        others = sum(math.exp(float(views[i] @ views[k]) / temperature) for k in range(count) if k != i)
        total -= math.log(math.exp(float(views[i] @ views[partner]) / temperature) / others)
    return total / count


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_against_the_slow_loop(pair, temperature):
    loss, _ = nt_xent(*pair, temperature)
    # float32 against float64
    assert loss.item() == pytest.approx(slow_nt_xent(*pair, temperature), rel=1e-5)


def test_closed_form_of_views_that_are_all_alike():
    same = torch.ones(4, 3)
    assert nt_xent(same, same, 0.5)[0].item() == pytest.approx(math.log(7), rel=1e-6)


def test_closed_form_of_perfect_views():
    loss, top1 = nt_xent(torch.eye(3), torch.eye(3), 0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 4) - 2, rel=1e-6) and top1 == 1


def test_views_are_exchangeable_and_scale_does_not_count(pair):
    first, second = pair
    assert nt_xent(first, second, 0.2)[0].item() == pytest.approx(nt_xent(3 * second, first, 0.2)[0].item(), rel=1e-6)


def _share(folder: str) -> None:
    """One of two processes with half of the scans: its gradient, averaged as DDP does."""
    with process_group():
        torch.manual_seed(0)
        net, scans = torch.nn.Linear(6, 4).double(), torch.randn(2, 8, 6).double()
        mine = scans[:, 4 * rank():4 * rank() + 4]
        nt_xent(net(mine[0]), net(mine[1]), 0.3)[0].backward()
        gradient = net.weight.grad
        torch.distributed.all_reduce(gradient)
        np.save(f"{folder}/{rank()}.npy", (gradient / 2).numpy())


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    launch(_share, (str(tmp_path),), 2)
    torch.manual_seed(0)
    net, scans = torch.nn.Linear(6, 4).double(), torch.randn(2, 8, 6).double()
    nt_xent(net(scans[0]), net(scans[1]), 0.3)[0].backward()
    for number in (0, 1):
        # the loss itself is float32
        assert np.allclose(np.load(tmp_path / f"{number}.npy"), net.weight.grad.numpy(), atol=1e-6)
