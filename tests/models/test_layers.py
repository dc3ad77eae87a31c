"""Layers that CUDA runs in another way than torch's give torch's values and gradients; all here runs on the CPU too."""

import copy

import pytest
import torch
from torch import nn

from kit.models.convolution import Conv3d, with_right_gradients
from kit.models.encoders import build_encoder
from kit.models.pooling import MaxPool, _MaxPool
from kit.store.grid import PAPER_GRID

WHERE = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    (7, 1, 3), (3, 2, 1), ((7, 7, 7), (2, 2, 2), (3, 3, 3)), ((3, 5, 7), (1, 2, 3), (0, 1, 2)), ((3, 3, 4), 1, 0)])
def test_a_kernels_width_as_channels_is_the_same_convolution(kernel, stride, padding, where):
    plain = nn.Conv3d(1, 6, kernel, stride, padding).double()
    with_right_gradients(other := nn.Sequential(copy.deepcopy(plain)).to(where))
    layer, found = other[0], []
    images = torch.randn(2, 1, 15, 17, 21, dtype=torch.double)
    for run in (plain, lambda each: layer.by_columns(each, layer.weight, layer.bias)):
        each = images.detach().to(where if run is not plain else "cpu").requires_grad_()
        weights = list((plain if run is plain else layer).parameters())
        out = run(each)
        found.append([part.cpu() for part in (out, *torch.autograd.grad(out.square().sum(), [each, *weights]))])
    for part, true in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(part, true)


def test_only_a_huge_output_of_one_channel_goes_that_way():
    encoder = build_encoder("resnet18", PAPER_GRID)
    first, second = encoder.network.conv1, encoder.network.layer1[0].conv1
    assert not first.gains_by_columns((6, 1, *PAPER_GRID.shape)) and first.gains_by_columns((7, 1, *PAPER_GRID.shape))
    assert not second.gains_by_columns((1000, 64, 75, 96, 96))
    assert not Conv3d(1, 64, 7, padding="valid").gains_by_columns((7, 1, *PAPER_GRID.shape)), "it has no numbers"


@pytest.mark.parametrize("architecture", ["resnet18", "densenet121", "brainiac_resnet50", "medicalnet_resnet10"])
def test_encoders_max_pools_have_reproducible_gradients_on_cuda(architecture):
    pools = [type(layer) for layer in build_encoder(architecture, PAPER_GRID).modules()
             if isinstance(layer, nn.MaxPool3d)]
    assert pools == [MaxPool]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(9, 12, 10), (8, 7, 11)])
def test_maxima_and_their_gradients_are_torchs(shape, where):
    images = torch.randn(2, 3, *shape, dtype=torch.double)
    found = []
    for device, pool in (("cpu", nn.MaxPool3d(3, 2, 1)), (where, lambda each: _MaxPool.apply(each, MaxPool(3, 2, 1)))):
        each = images.detach().to(device).requires_grad_()
        out = pool(each)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.double, device=device).view_as(out)
        found.append([out.cpu(), torch.autograd.grad((out * weights).sum(), each)[0].cpu()])
    for part, true in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(part, true)
