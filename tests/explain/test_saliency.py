"""Saliency maps against values found by hand, and against what their theories promise."""

import copy
import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from monai.visualize import GradCAMpp
from torch import nn

from kit.explain.saliency import MethodError, Options, attribution, baseline_of, check_methods, cubes, saliency
from kit.explain.targets import Cosine, Output
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.models.third_party_networks import MedicalNet
from kit.params import METHODS
from kit.runs import ROOT
from kit.store.grid import Grid

SHAPE = (7, 8, 9)  # three different sides, so that swapped axes cannot hide
GRADIENTS = ("gradient", "gradient_x_input", "smoothgrad", "integrated_gradients", "guided_backpropagation")
OF_CNNS = tuple(method for method in METHODS if method != "attention_rollout")
GRID = Grid((36, 48, 40), 4.0)


@pytest.fixture
def scan() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:6, 2:7, 1:8] = True
    return np.where(mask, rng.normal(size=SHAPE), 0).astype(np.float32), mask


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.Conv3d(4, 4, 3), nn.Softplus(),
                        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    net(torch.randn(8, 1, *SHAPE))  # moves the running statistics away from 0 and 1
    return net


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, np.ndarray]:
    """A scan and its mask, large enough for the kit's encoders."""
    rng = np.random.default_rng(0)
    mask = np.zeros(GRID.shape, bool)
    mask[8:28, 10:38, 8:32] = True
    return np.where(mask, rng.normal(size=GRID.shape), 0).astype(np.float32), mask


@pytest.fixture(scope="module")
def resnet() -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_encoder("resnet18_narrow", GRID)).eval()


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
    sizes, products = np.where(mask, np.abs(weight), 0), weight * image
    for method, expected in {"gradient": sizes, "smoothgrad": sizes, "gradient_x_input": products,
                             "integrated_gradients": products}.items():
        found = saliency(net, image, mask, method, target=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7, err_msg=method)
    # of a cube the output loses the sum of its products
    cube = saliency(net, image, mask, "occlusion", target=1, options=Options(patch=4))
    for number in range(int(cubes(mask, 4).max())):
        here = cubes(mask, 4) == number
        np.testing.assert_allclose(cube[here & mask], products[here].sum(), rtol=1e-4, atol=1e-6)
    # a voxel a cube is gradient x input
    one = saliency(net, image, mask, "occlusion", target=1, options=Options(patch=1))
    np.testing.assert_allclose(one, products, rtol=1e-3, atol=1e-5)


def test_guided_backpropagation_passes_only_what_raises_the_output(scan):
    """Two ReLUs read the scan, one is added and one subtracted: the gradient sees both, the guided one the first."""
    image, mask = scan
    net = nn.Sequential(nn.Flatten(), nn.Linear(image.size, 2), nn.ReLU(inplace=True), nn.Linear(2, 1))
    net[1].weight.data[0], net[1].weight.data[1] = 1.0, 2.0
    net[1].bias.data[:] = 1000.0  # both ReLUs are open
    net[3].weight.data[0] = torch.tensor([1.0, -1.0])
    np.testing.assert_allclose(saliency(net, image, mask, "gradient"), mask.astype(float))  # |1 - 2|
    np.testing.assert_allclose(saliency(net, image, mask, "guided_backpropagation"), mask.astype(float))  # 1
    net[3].weight.data[0] = torch.tensor([-1.0, -1.0])
    assert not saliency(net, image, mask, "guided_backpropagation").any()


@pytest.mark.parametrize("baseline", ["zero", "mean_brain", "blurred"])
def test_integrated_gradients_are_complete_within_two_percent(net, scan, baseline):
    image, mask = scan
    image = 5 * image
    options = Options(steps=32, baseline=baseline, blur=1.5, mean_brain=np.random.default_rng(1).normal(size=SHAPE))
    empty = baseline_of(image, mask, options)
    with torch.no_grad():
        difference = float(-net.eval()(torch.from_numpy(np.stack([image, empty])[:, None]))[:, 1].diff())
    found = saliency(net, image, mask, "integrated_gradients", 1, options)
    assert found.sum() == pytest.approx(difference, rel=0.02)
    if baseline == "zero":
        once = saliency(net, image, mask, "integrated_gradients", 1, options._replace(steps=1))
        assert abs(once.sum() / difference - 1) > abs(found.sum() / difference - 1)


def test_baselines_are_zero_outside_and_a_blurred_scan_keeps_its_level(scan):
    image, mask = scan
    lifted = np.where(mask, image + 10, 0).astype(np.float32)
    blurred = baseline_of(lifted, mask, Options(baseline="blurred", blur=2.0))
    assert not blurred[~mask].any() and blurred[mask].std() < 0.3 * image[mask].std()
    assert blurred[mask].mean() == pytest.approx(lifted[mask].mean(), abs=0.2)  # the brain's edge is no darker
    with pytest.raises(ValueError, match="mean_brain needs the cohort's mean"):
        baseline_of(image, mask, Options(baseline="mean_brain"))


def test_batches_change_nothing(net, scan):
    image, mask = scan
    for method in ("integrated_gradients", "occlusion"):
        maps = [saliency(net, image, mask, method, options=Options(steps=10, patch=2, batch=size))
                for size in (1, 3, 20)]
        np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(maps[2], maps[0], rtol=1e-4, atol=1e-6)


def test_smoothgrad_tells_a_kink_from_a_slope(scan):
    """Of |x| at zero the gradient is anything, and its mean over noise is zero; of a slope noise changes nothing."""
    image, mask = scan

    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.weight * ((images[..., :4] - 1e-6).abs().sum((1, 2, 3, 4)) + images[..., 4:].sum((1, 2, 3, 4)))

    image = np.where(np.arange(SHAPE[2]) < 4, 0, image).astype(np.float32)
    plain = saliency(Kink(), image, mask, "gradient")
    smooth = saliency(Kink(), image, mask, "smoothgrad", options=Options(samples=200))
    assert (plain[mask] == 1).all()
    assert smooth[..., :4][mask[..., :4]].mean() < 0.15
    np.testing.assert_allclose(smooth[..., 4:][mask[..., 4:]], 1, rtol=1e-5)


@pytest.fixture
def bright_corner() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A network that finds bright cubes of 4 voxels, and a brain with one such cube."""
    net = nn.Sequential(nn.Conv3d(1, 2, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 1))
    net[0].weight.data[0], net[0].weight.data[1] = 1 / 64, -1 / 64  # one likes light, the other dark
    net[0].bias.data[:] = 0
    net[4].weight.data[0] = torch.tensor([30.0, -30.0])
    image = np.random.default_rng(0).normal(0, 0.05, (16, 20, 24)).astype(np.float32)
    image[4:8, 12:16, 16:20] += 3
    mask = np.ones(image.shape, bool)
    return net, image, mask


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_class_activation_maps_find_the_cube(bright_corner, method):
    net, image, mask = bright_corner
    found = saliency(net, image, mask, method, options=Options(layer="1"))
    assert found.min() >= 0
    strongest = np.unravel_index(found.argmax(), found.shape)
    assert 4 <= strongest[0] < 8 and 12 <= strongest[1] < 16 and 16 <= strongest[2] < 20
    assert found[4:8, 12:16, 16:20].mean() > 10 * found[:, :8].mean()


def test_grad_cam_pp_is_monais_where_gradients_are_large(bright_corner):
    net, image, mask = bright_corner
    images = torch.from_numpy(image)[None, None].requires_grad_()
    net[4].weight.data *= 100
    net[4].bias.data -= net(images).detach()[0]  # MONAI multiplies by the output's exponential: 1
    theirs = GradCAMpp(net, "1", upsampler=lambda _: nn.Identity(), postprocessing=lambda each: each)(images, 0)
    theirs = torch.nn.functional.interpolate(theirs, image.shape, mode="trilinear")[0, 0].detach().numpy()
    ours = saliency(net, image, mask, "grad_cam_pp", options=Options(layer="1"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.max())


def test_grad_cam_pp_below_the_last_stage_is_the_papers(net, scan):
    """Equation 19 of arXiv 1710.11063, place by place: the activations are summed without the gradients."""
    image, mask = scan
    net.eval()
    activation = net[:3](torch.from_numpy(image)[None, None]).detach().requires_grad_()
    gradient, = torch.autograd.grad(net[3:](activation)[0, 0], activation)
    kept = activation.detach()
    expected = torch.zeros_like(kept[:, :1])
    for channel, slope in zip(kept[0], gradient[0], strict=True):
        each = channel.flatten().tolist()
        alphas = [(g, g**2 / (2 * g**2 + sum(a * g**3 for a in each))) for g in slope.flatten().tolist() if g]
        expected += sum(alpha * max(g, 0) for g, alpha in alphas) * channel
    expected = F.interpolate(expected.relu(), SHAPE, mode="trilinear")[0, 0].numpy() * mask
    found = saliency(net, image, mask, "grad_cam_pp", target=0, options=Options(layer="2"))
    assert expected.any() and gradient.std(dim=(2, 3, 4)).min() > 0  # else the two orders of summing would agree
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_a_module_that_runs_twice_gives_the_map_of_its_last_call(resnet, brain, method):
    image, mask = brain
    block, activation = (saliency(resnet, image, mask, method, options=Options(layer=layer))
                         for layer in ("layer4.1", "layer4.1.act"))  # the block ends with its second activation
    assert block.any()
    np.testing.assert_array_equal(activation, block)


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_an_in_place_relu_does_not_change_the_map_of_the_norm_before_it(resnet, brain, method):
    plain = copy.deepcopy(resnet)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    expected, found = (saliency(model, *brain, method, options=Options(layer="layer3.0.bn1"))
                       for model in (plain, resnet))
    assert expected.any()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_a_layer_that_outputs_no_maps_is_refused_by_name(resnet, brain, method):
    with pytest.raises(MethodError, match="layer: 'head' outputs no maps"):
        saliency(resnet, *brain, method, options=Options(layer="head"))


def test_occlusion_loses_the_cube(bright_corner):
    net, image, mask = bright_corner
    found = saliency(net, image, mask, "occlusion", options=Options(patch=4))
    cube = found[4:8, 12:16, 16:20]
    with torch.no_grad():
        gone = image.copy()
        gone[4:8, 12:16, 16:20] = 0
        lost = float(-net(torch.from_numpy(np.stack([image, gone])[:, None]))[:, 0].diff())
    np.testing.assert_allclose(cube, lost, rtol=1e-4)
    elsewhere = np.delete(found.ravel(), np.ravel_multi_index(np.indices((4, 4, 4)).reshape(3, -1)
                                                             + np.array([[4], [12], [16]]), found.shape))
    assert np.abs(elsewhere).max() < 0.1 * lost


@pytest.fixture(scope="module")
def vit() -> Predictor:
    return Predictor(build_encoder("vit_narrow", GRID)).eval()


def test_rollout_sums_to_the_attention_that_is_paid_to_patches(vit, brain):
    image, mask = brain
    before = vit(torch.from_numpy(image)[None, None])
    found = attribution(vit, image, mask, "attention_rollout")
    patch = vit.encoder.patch
    tokens = found[:: patch[0], :: patch[1], :: patch[2]].ravel()
    assert (tokens[vit.encoder.brain_patches] > 0).all() and np.count_nonzero(tokens) == len(vit.encoder.brain_patches)
    assert 0.9 < tokens.sum() < 1  # a row of attention sums to 1; the class token has the rest
    assert torch.equal(vit(torch.from_numpy(image)[None, None]), before)  # flash attention is on again
    for block in list(vit.encoder.autoencoder.blocks)[:-1]:
        assert block.attn.use_flash_attention and not block.attn.save_attn


def test_rollout_of_one_layer_by_hand():
    """All of the attention of one layer goes to one patch: it has half of the map, the residual the other half."""
    vit = build_encoder("vit_narrow", GRID)
    kept = [list(vit.autoencoder.blocks)[0].attn]
    tokens = len(vit.brain_patches) + 1

    def look(_, inputs, output):
        kept[0].att_mat = torch.zeros(1, 4, tokens, tokens)
        kept[0].att_mat[..., 5] = 1

    kept[0].register_forward_hook(look)
    for block in list(vit.autoencoder.blocks)[1:-1]:
        block.attn.register_forward_hook(
            lambda module, _, __: setattr(module, "att_mat", torch.eye(tokens).expand(1, 4, -1, -1)))
    mask = np.ones(GRID.shape, bool)
    found = attribution(Output(vit), np.zeros(GRID.shape, np.float32), mask, "attention_rollout")
    flat = found[tuple(slice(None, None, side) for side in vit.patch)].ravel()[vit.brain_patches]
    assert flat[4] == pytest.approx(0.5 + 0.5 / (tokens - 1), rel=1e-4)
    np.testing.assert_allclose(np.delete(flat, 4), 0.5 / (tokens - 1), rtol=1e-4)


def test_methods_that_cannot_are_refused_with_those_that_can(vit, resnet, net):
    with pytest.raises(MethodError, match="(?s)grad_cam cannot explain.*tokens, not maps; these can: gradient, .*"
                                          "occlusion, attention_rollout$"):
        check_methods(vit, ["gradient", "grad_cam"])
    with pytest.raises(MethodError, match="guided_backpropagation cannot.*no ReLU"):
        check_methods(vit, ["guided_backpropagation"])
    with pytest.raises(MethodError, match="attention_rollout cannot.*ResNetEncoder has no attention"):
        check_methods(resnet, ["attention_rollout"])
    with pytest.raises(MethodError, match="has stages 1 to 4, not 5"):
        check_methods(resnet, ["grad_cam"], layer=5)
    with pytest.raises(MethodError, match="no module 'layer9'"):
        check_methods(resnet, ["grad_cam"], layer="layer9")
    with pytest.raises(MethodError, match="name a module in layer"):
        check_methods(net, ["grad_cam_pp"])
    check_methods(resnet, OF_CNNS, layer="layer2")


def test_contributions_are_refused_of_a_network_that_rescales_its_input():
    """Multiples of a scan have one output, so nothing adds up to the output's rise."""
    network = Predictor(MedicalNet(10, (16, 32, 32)))
    able = "gradient, smoothgrad, guided_backpropagation, occlusion"
    for method in ("gradient_x_input", "integrated_gradients"):
        with pytest.raises(MethodError, match=f"normalises each scan itself.*these can: {able}$"):
            check_methods(network, ["gradient", method])
        with pytest.raises(MethodError, match="normalises each scan itself"):
            saliency(network, np.ones(SHAPE, np.float32), np.ones(SHAPE, bool), method)
    check_methods(network, ["gradient", "integrated_gradients", "occlusion"], baseline="blurred")


def test_a_layers_full_name_is_taken_first_and_an_ambiguous_one_is_refused(resnet, scan):
    image, mask = scan
    block = nn.Sequential(OrderedDict(conv1=nn.Conv3d(2, 2, 3, padding=1)))
    net = nn.Sequential(OrderedDict(stem=block, conv1=nn.Conv3d(2, 3, 3), pool=nn.AdaptiveAvgPool3d(1),
                                    flat=nn.Flatten(), head=nn.Linear(3, 2)))
    net = nn.Sequential(OrderedDict(first=nn.Conv3d(1, 2, 1), **dict(net.named_children())))
    expected = LayerGradCam(net.eval(), net.conv1).attribute(torch.from_numpy(image)[None, None], 0,
                                                             relu_attributions=True)
    expected = F.interpolate(expected, SHAPE, mode="trilinear", align_corners=False)[0, 0].detach().numpy()
    for model in (net, Output(net)):  # the stem's conv1 comes first, and is another
        found = attribution(model, image, mask, "grad_cam", 0, Options(layer="conv1"))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(MethodError, match="'conv1' could be encoder.network.conv1, "
                                          "encoder.network.layer1.0.conv1, .*; give one of these names in full"):
        check_methods(resnet, ["grad_cam"], layer="conv1")
    for model in (resnet, Output(Output(resnet)), Cosine(resnet.encoder, torch.zeros(1))):
        check_methods(model, ["grad_cam"], layer="encoder.network.conv1")
        check_methods(model, ["grad_cam"], layer="network.conv1")


@pytest.mark.parametrize("method", OF_CNNS)
def test_map_is_repeatable_zero_outside_and_leaves_the_model_alone(net, scan, method):
    image, mask = scan
    net.train()  # BatchNorm must not see the scan
    options = Options(patch=3, layer="4")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (saliency(net, image.astype(np.float16), mask, method, options=options) for _ in range(2))
    assert first.shape == SHAPE and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert not first[~mask].any() and first[mask].any()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks or module._backward_hooks or module._forward_pre_hooks
                   for module in net.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_bad_input_is_refused(net, scan):
    image, mask = scan
    with pytest.raises(MethodError, match="gradcam.*integrated_gradients"):
        saliency(net, image, mask, "gradcam")
    with pytest.raises(ValueError, match=r"\(7, 8, 9\).*\(7, 9, 8\)"):
        saliency(net, image, mask.transpose(0, 2, 1), "gradient")
    with pytest.raises(ValueError, match="not zero outside"):
        saliency(net, image + 1, mask, "gradient")
    for target in (-1, 2):
        with pytest.raises(ValueError, match=f"target: got {target}; this model's outputs are 0 to 1"):
            saliency(net, image, mask, "gradient", target)
    net[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        saliency(net, image, mask, "gradient")


PEAK = """
import sys, numpy as np, torch
from kit.explain.saliency import Options, saliency
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.store.grid import PAPER_GRID, Grid
half = Grid((75, 96, 96), 2.0)
grid = {"full": PAPER_GRID, "half": half}[sys.argv[2]]
mask = np.zeros(grid.shape, bool)
mask[5:-5, 5:-5, 5:-5] = True
image = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0).astype(np.float32)
model = Predictor(build_encoder("resnet18", grid)).eval()
found = saliency(model, image, mask, "integrated_gradients", options=Options(steps=int(sys.argv[1]), batch=1))
assert found[mask].any()
from benchmarks.ratio import memory_bytes
print(memory_bytes("VmHWM"))
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_steps():
    """At 150x192x192, which takes eight minutes, with KIT_REAL_HEADS=all; else at half of each side."""
    size = "full" if os.environ.get("KIT_REAL_HEADS") == "all" else "half"
    peaks = [int(subprocess.run([sys.executable, "-c", PEAK, str(steps), size], cwd=ROOT, capture_output=True,
                                text=True, check=True).stdout.split()[-1]) for steps in (1, 3)]
    assert max(peaks) < 8e9 and peaks[1] < 1.1 * peaks[0], peaks
