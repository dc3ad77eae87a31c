"""Saliency maps against values found by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from kit.explain.saliency import METHODS, saliency

SHAPE = (7, 8, 9)  # three different sides, so that swapped axes cannot hide


@pytest.fixture
def scan() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:6, 2:7, 1:8] = True
    return np.where(mask, rng.normal(size=SHAPE), 0).astype(np.float32), mask


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Softplus(), nn.Conv3d(4, 4, 3), nn.Softplus(),
                        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    net(torch.randn(8, 1, *SHAPE))  # moves the running statistics away from 0 and 1
    return net


def test_gradient_is_autograds(net, scan):
    image, mask = scan
    net.eval()
    leaf = torch.from_numpy(image)[None, None].requires_grad_()
    net(leaf)[0, 1].backward()
    expected = np.where(mask, leaf.grad[0, 0].abs().numpy(), 0)
    np.testing.assert_allclose(saliency(net, image, mask, "gradient", target=1), expected, rtol=1e-5, atol=1e-9)


def test_linear_model_has_a_closed_form(scan):
    image, mask = scan
    net = nn.Sequential(nn.Flatten(), nn.Linear(image.size, 2))
    weight = net[1].weight.detach().numpy()[1].reshape(SHAPE)
    gradient = saliency(net, image, mask, "gradient", target=1)
    integrated = saliency(net, image, mask, "integrated_gradients", target=1)
    np.testing.assert_allclose(gradient, np.where(mask, np.abs(weight), 0), rtol=1e-5)
    np.testing.assert_allclose(integrated, weight * image, rtol=1e-4, atol=1e-7)
    assert integrated.min() < 0 < integrated.max()


def test_integrated_gradients_are_complete_and_more_steps_help(net, scan):
    image, mask = scan
    scan_and_baseline = torch.from_numpy(np.stack([5 * image, 0 * image])[:, None])
    with torch.no_grad():
        difference = float(-net.eval()(scan_and_baseline)[:, 1].diff())
    errors = {}
    for n_steps in (1, 32):  # proposition 1: the map sums to what the scan's output has over the baseline's
        found = saliency(net, 5 * image, mask, "integrated_gradients", target=1, n_steps=n_steps)
        errors[n_steps] = abs(found.sum() / difference - 1)
    assert errors[32] < 1e-3 < errors[1]


def test_internal_batches_change_nothing(net, scan):
    image, mask = scan
    maps = [saliency(net, image, mask, "integrated_gradients", n_steps=10, internal_batch_size=size)
            for size in (1, 3, 20)]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(maps[2], maps[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_map_is_repeatable_zero_outside_and_leaves_the_model_alone(net, scan, method):
    image, mask = scan
    net.train()  # BatchNorm must not see the scan
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (saliency(net, image.astype(np.float16), mask, method) for _ in range(2))
    assert first.shape == SHAPE and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert not first[~mask].any() and first[mask].any()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_bad_input_is_refused(net, scan):
    image, mask = scan
    with pytest.raises(ValueError, match="gradcam.*integrated_gradients"):
        saliency(net, image, mask, "gradcam")
    with pytest.raises(ValueError, match=r"\(7, 8, 9\).*\(7, 9, 8\)"):
        saliency(net, image, mask.transpose(0, 2, 1), "gradient")
    with pytest.raises(ValueError, match="not zero outside"):
        saliency(net, image + 1, mask, "gradient")
    net[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        saliency(net, image, mask, "gradient")
