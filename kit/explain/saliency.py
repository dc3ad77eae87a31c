"""Saliency maps of one scan, by nine methods; captum computes the attributions where it can.

- `gradient`: |d output / d voxel| (Simonyan et al., arXiv 1312.6034); never negative.
- `gradient_x_input`: the gradient times the voxel (Shrikumar et al., arXiv 1605.01713); signed.
- `smoothgrad`: the absolute mean gradient over noisy copies of the scan (Smilkov et al., arXiv 1706.03825).
- `integrated_gradients`: the mean gradient on the straight path from a baseline to the scan, times their difference
  (Sundararajan et al., arXiv 1703.01365); signed, and sums to the scan's output minus the baseline's.
- `grad_cam`, `grad_cam_pp`: a stage's channels, weighted by their gradients (Selvaraju et al., arXiv 1610.02391;
  Chattopadhay et al., arXiv 1710.11063); shows only what raises the output; as coarse as the stage.
- `guided_backpropagation`: the gradient, with negative values set to zero at each ReLU on the way back (Springenberg
  et al., arXiv 1412.6806); signed. Adebayo et al. (arXiv 1810.03292) found that it shows edges whatever the weights.
- `occlusion`: the drop in output when a cube of brain is replaced by the baseline (Zeiler & Fergus, arXiv 1311.2901);
  signed, as coarse as the cubes.
- `attention_rollout`: the patches that a ViT's brain tokens attend to, through all layers (Abnar & Zuidema, arXiv
  2005.00928); it ignores the head, so all outputs have the same map.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import (
    FeatureAblation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
)
from torch import nn

from kit.device import evaluation, scans_at_a_time
from kit.errors import KitError
from kit.explain.targets import Along, Cosine, Output, encoder_of
from kit.models.encoders import ViTEncoder
from kit.models.features import stages_of
from kit.params import METHODS
from kit.preprocess.resample import smoothed_inside

if TYPE_CHECKING:
    from monai.networks.blocks.transformerblock import TransformerBlock

# a value is a contribution to the output: a voxel's, or with occlusion that of the whole cube that the voxel lies in
CONTRIBUTIONS = frozenset({"gradient_x_input", "integrated_gradients", "occlusion"})
# multiplied by the scan; integrated_gradients by the scan less the baseline
TIMES_IMAGE = frozenset({"gradient_x_input", "integrated_gradients"})
CAMS = ("grad_cam", "grad_cam_pp")
GRADIENT_VOXELS = 2**22  # at a time with gradients: one scan of 150x192x192, or 32 demo scans
Maps = dict[tuple[str, str], np.ndarray]  # (scan, method): (depth, height, width) float32


class MethodError(KitError, ValueError):
    """A method cannot work with a network; the message says why, and which can."""


class Options(NamedTuple):
    """Options of the methods.

    Attributes:
        steps: points on the path of integrated gradients (Gauss-Legendre quadrature).
        samples: noisy copies for SmoothGrad.
        noise: SmoothGrad's noise SD, in SDs of the brain's voxels. A z-scored brain spans about five SDs, so 0.5 is a
            tenth of its range, the lower end of what Smilkov et al. recommend.
        baseline: start of integrated gradients, and the values that occlusion puts in: `zero` (for a z-scored scan a
            uniform brain of mean intensity), `mean_brain` (of the cohort), `blurred` (the scan itself without detail).
        layer: for Grad-CAM: a stage's number, from 1, or a module's dotted name or the end of one, such as
            `layer4.1`, if no other name ends so; None: the last stage.
        patch: side of occlusion's cubes, voxels.
        blur: standard deviation of the blurred baseline, voxels.
        mean_brain: (depth, height, width), for the baseline `mean_brain`.
        seed: of SmoothGrad's noise.
        batch: points, copies or cubes per forward pass; None: as many as the scan's size allows.
    """

    steps: int = 16
    samples: int = 8
    noise: float = 0.5
    baseline: str = "zero"
    layer: int | str | None = None
    patch: int = 6
    blur: float = 3.0
    mean_brain: np.ndarray | None = None
    seed: int = 0
    batch: int | None = None


DEFAULTS = Options()


def saliency(model: nn.Module, image: np.ndarray, mask: np.ndarray, method: str, target: int | None = None,
             options: Options = DEFAULTS) -> np.ndarray:
    """Map how one output of a model depends on each voxel of one scan, inside the brain.

    The model is put into evaluation mode and is otherwise unchanged, as is the caller's random state.

    Args:
        model: maps (batch, 1, depth, height, width) float32 to (batch, outputs) or (batch,); on any device.
        image: (depth, height, width), 0 outside the mask, as prepared scans are.
        mask: (depth, height, width), true inside the brain.
        method: one of `kit.params.METHODS`.
        target: number of the output to explain, from 0; a model of two classes has one, the log-odds of the second.
            None: the highest for this scan, which of several classes is the predicted one.
        options: see `Options`.

    Returns:
        (depth, height, width) float32, zero outside the mask; the module's docstring says which methods are signed.

    Raises:
        MethodError: the method is unknown or cannot work with this network.
        ValueError: shapes differ, the image is not zero outside its mask, the model has no such output, or the map is
            not finite.
    """
    found = attribution(model, image, mask, method, target, options)
    return np.where(np.asarray(mask, dtype=bool), found, np.float32(0))


def attribution(model: nn.Module, image: np.ndarray, mask: np.ndarray, method: str, target: int | None = None,
                options: Options = DEFAULTS) -> np.ndarray:
    """As `saliency`, but not masked: one of the checks is how much of a map lies outside the brain.

    Three methods are zero there by construction, so that this check cannot fail for them: gradient times input and
    integrated gradients, as scan and baseline are 0 there, and SmoothGrad, whose noisy copies are masked.
    """
    mask = np.asarray(mask, dtype=bool)
    check_methods(model, [method], options.layer, options.baseline)
    if image.ndim != 3 or image.shape != mask.shape:
        raise ValueError(f"image has shape {image.shape}, mask {mask.shape}: both must be the same (D, H, W)")
    if np.any(image[~mask]):
        # Masking the map would drop these voxels' contributions.
        raise ValueError("image is not zero outside its mask: multiply it by the mask first")
    where = next(model.parameters()).device
    scan = _batch_of_one(image, where).requires_grad_()
    with frozen(model), evaluation(where):
        if not isinstance(model, (Output, Cosine, Along)):  # these already output one number
            with torch.no_grad():
                answer = model(scan)
            outputs = answer.shape[1] if answer.ndim > 1 else 1
            if target is None:
                target = int(answer[0].argmax()) if answer.ndim > 1 else 0
            if not 0 <= target < outputs:
                raise ValueError(f"target: got {target}; this model's outputs are 0 to {outputs - 1} (two classes have "
                                 "one, the log-odds of the second)")
        found = _attribute(Output(model, target or 0), scan, mask, method, options)
    values = found.detach()[0, 0].cpu().numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{method}: the map is not finite; look for nan in the model's weights and output")
    return values


def check_methods(model: nn.Module, methods: Sequence[str], layer: int | str | None = None,
                  baseline: str = DEFAULTS.baseline) -> None:
    """Check, before any work, that methods can work with a network; not that a module named in `layer` outputs maps.

    Args:
        layer, baseline: see `Options`.

    Raises:
        MethodError: for the first method that is unknown or cannot; it says why, and which can.
    """
    for method in methods:
        if method not in METHODS:
            raise MethodError(f"method: {method!r} is unknown; choose one of {', '.join(METHODS)}")
        if reason := _unfit(model, method, layer, baseline):
            able = [each for each in METHODS if not _unfit(model, each, layer, baseline)]
            raise MethodError(f"methods: {method} cannot explain this network: {reason}; these can: {', '.join(able)}")


def _unfit(model: nn.Module, method: str, layer: int | str | None, baseline: str) -> str:
    encoder = encoder_of(model)
    if any(getattr(module, "rescales", False) for module in model.modules()) and (
            method == "gradient_x_input" or method == "integrated_gradients" and baseline == "zero"):
        return ("it normalises each scan itself: scaling a scan changes no output, so that contributions sum to zero"
                + "; or set baseline: mean_brain or blurred" * (method == "integrated_gradients"))
    vit = isinstance(encoder, ViTEncoder)
    if method == "attention_rollout" and not vit:
        return f"{type(encoder or model).__name__} has no attention that the kit knows"
    if method == "guided_backpropagation" and not any(isinstance(module, nn.ReLU) for module in model.modules()):
        return "it has no ReLU layers"
    if method in CAMS and vit:
        return "a ViT's stages are tokens, not maps"
    return _layer(model, layer)[1] if method in CAMS else ""


def _layer(model: nn.Module, layer: int | str | None) -> tuple[nn.Module | None, str]:
    """Find the module for Grad-CAM; the second value says what is wrong, if anything."""
    if isinstance(layer, str):
        inner = model
        while isinstance(inner, (Output, Cosine, Along)):
            inner = inner.model if isinstance(inner, Output) else inner.encoder
        if layer in (whole := dict(inner.named_modules())):
            return whole[layer], ""
        found = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{layer}")}
        if len(found) == 1:
            return next(iter(found.values())), ""
        return None, (f"layer: {layer!r} could be {', '.join(found)}; give one of these names in full" if found else
                      f"layer: it has no module {layer!r}")
    encoder = encoder_of(model)
    stages = stages_of(encoder) if encoder is not None else []
    if not stages:
        return None, "its stages are not known; name a module in layer"
    number = len(stages) if layer is None else layer
    if not 1 <= number <= len(stages):
        return None, f"layer: it has stages 1 to {len(stages)}, not {number}"
    return stages[number - 1], ""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and compute no gradients for its weights, which saves a third of the time."""
    model.eval()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _attribute(score: nn.Module, scan: torch.Tensor, mask: np.ndarray, method: str, options: Options) -> torch.Tensor:
    """Attribute a score (batch,) by one method: (1, 1, depth, height, width)."""
    shape = tuple(scan.shape[2:])
    at_a_time = options.batch or max(1, min(32, GRADIENT_VOXELS // scan[0].numel()))
    if method == "gradient":
        return Saliency(score).attribute(scan, abs=True)
    if method == "gradient_x_input":
        return InputXGradient(score).attribute(scan)
    if method == "smoothgrad":
        return _smoothgrad(score, scan, mask, options, at_a_time)
    if method == "integrated_gradients":
        return IntegratedGradients(score).attribute(scan, _baseline(scan, mask, options), n_steps=options.steps,
                                                    internal_batch_size=at_a_time)
    if method in CAMS:
        layer, _ = _layer(score, options.layer)
        assert layer is not None  # `check_methods` found it
        coarse = (LayerGradCam(score, layer).attribute(scan, relu_attributions=True) if method == "grad_cam"
                  else _grad_cam_pp(score, scan, layer))
        if coarse.ndim != scan.ndim:
            raise MethodError(f"layer: {options.layer!r} outputs no maps (depth, height, width); name a stage, from 1, "
                              "or a convolution")
        return F.interpolate(coarse, shape, mode="trilinear", align_corners=False)
    if method == "guided_backpropagation":
        return _guided(score, scan)
    if method == "occlusion":
        numbers = torch.from_numpy(cubes(mask, options.patch))[None, None].to(scan.device)
        with torch.no_grad():
            return FeatureAblation(score).attribute(
                scan.detach(), _baseline(scan, mask, options), feature_mask=numbers,
                perturbations_per_eval=options.batch or scans_at_a_time(shape))
    assert method == "attention_rollout", method  # the last of METHODS
    return _rollout(cast(ViTEncoder, encoder_of(score)), scan.detach())


def _smoothgrad(score: nn.Module, scan: torch.Tensor, mask: np.ndarray, options: Options, batch: int) -> torch.Tensor:
    inside = torch.from_numpy(mask).to(scan.device)
    spread = float(scan.detach()[0, 0][inside].std(correction=0))
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        found = NoiseTunnel(Saliency(lambda noisy: score(noisy * inside))).attribute(  # no noise outside the brain
            scan.detach(), nt_samples=options.samples, nt_samples_batch_size=min(batch, options.samples),
            stdevs=options.noise * spread, abs=False)
    return found.abs()


def _grad_cam_pp(score: nn.Module, scan: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Grad-CAM++ at the layer's resolution, (1, 1, ...): equation 19 of the paper, divided by the squared gradient.

    MONAI's version is not used: in the denominator it multiplies each activation by its own cubed gradient before it
    sums, where the paper sums the activations alone, so the two agree only where a channel's gradient is the same
    everywhere, as before global pooling. It also leaves hooks on the network, and adds 1e-7 to a denominator that is
    smaller than that at 150x192x192.
    """
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        kept.append(output)
        return output.clone()  # what follows, such as an in-place ReLU, must not overwrite what is kept

    hook = layer.register_forward_hook(keep)
    try:
        answer = score(scan)
    finally:
        hook.remove()
    last = kept[-1]  # a module may run several times, as a block's activation does; captum's Grad-CAM takes the last
    gradient, = torch.autograd.grad(answer.sum(), last)
    activation, every = last.detach(), tuple(range(2, last.ndim))
    below = 2 + activation.sum(every, keepdim=True) * gradient
    share = torch.where(below != 0, 1 / below, 0)
    weight = (share * gradient.relu()).sum(every, keepdim=True)
    return (weight * activation).sum(1, keepdim=True).relu()


def _guided(score: nn.Module, scan: torch.Tensor) -> torch.Tensor:
    """Guided backpropagation on a copy of the network, as captum's hooks need ReLUs that are not in-place."""
    network = copy.deepcopy(score)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks")
        return GuidedBackprop(network).attribute(scan)


@torch.no_grad()
def _rollout(encoder: ViTEncoder, scan: torch.Tensor) -> torch.Tensor:
    """Attention rollout to each patch, averaged over the brain tokens, as the features are."""
    attending = [cast("TransformerBlock", block).attn for block in stages_of(encoder)]
    for block in attending:
        block.use_flash_attention, block.save_attn = False, True
    try:
        encoder(scan)
        joint = None
        for block in attending:
            attention = block.att_mat.mean(1)  # over heads: (1, tokens, tokens)
            own = torch.eye(attention.shape[-1], device=scan.device)
            step = (attention + own) / 2  # adds the residual connection; rows still sum to 1
            joint = step if joint is None else step @ joint
    finally:
        for block in attending:
            block.use_flash_attention, block.save_attn, block.att_mat = True, False, torch.Tensor()
    assert joint is not None  # a ViT has layers
    tokens = joint[0, 1:, 1:].mean(0)
    sides = [side // patch for side, patch in zip(scan.shape[2:], encoder.patch, strict=True)]
    flat = torch.zeros(int(np.prod(sides)), device=scan.device).index_copy(0, encoder.brain_patches, tokens)
    volume = flat.reshape(sides)
    for axis, patch in enumerate(encoder.patch):
        volume = volume.repeat_interleave(patch, axis)
    return volume[None, None]


def baseline_of(image: np.ndarray, mask: np.ndarray, options: Options) -> np.ndarray:
    """Make the uninformative reference scan: (depth, height, width) float32, zero outside the mask."""
    if options.baseline == "zero":
        return np.zeros(image.shape, np.float32)
    if options.baseline == "mean_brain":
        if options.mean_brain is None:
            raise ValueError("baseline: mean_brain needs the cohort's mean, options.mean_brain")
        return np.where(mask, options.mean_brain, 0).astype(np.float32)
    if options.baseline != "blurred":
        raise ValueError(f"baseline: got {options.baseline!r}; choose zero, mean_brain or blurred")
    return smoothed_inside(image, mask, options.blur)


def _baseline(scan: torch.Tensor, mask: np.ndarray, options: Options) -> torch.Tensor:
    return _batch_of_one(baseline_of(scan.detach()[0, 0].cpu().numpy(), mask, options), scan.device)


def cubes(mask: np.ndarray, side: int) -> np.ndarray:
    """Number the cubes of `side` voxels: (depth, height, width) int64.

    Cubes with brain are numbered from 0 without gaps; all others share the next number.
    """
    along = [np.arange(length) // side for length in mask.shape]
    counts = [int(each[-1]) + 1 for each in along]
    number = np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), counts)
    held = np.unique(number[mask])
    new = np.full(int(np.prod(counts)), len(held))
    new[held] = np.arange(len(held))
    return new[number]


def passes_of(method: str, mask: np.ndarray, options: Options) -> int:
    """Approximate number of scans that go through the network for one map."""
    if method == "occlusion":
        return int(cubes(mask, options.patch).max()) + 3
    return 1 + {"smoothgrad": options.samples, "integrated_gradients": options.steps}.get(method, 1)


def _batch_of_one(image: np.ndarray, where: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32))[None, None].to(where)  # (1, 1, D, H, W)
