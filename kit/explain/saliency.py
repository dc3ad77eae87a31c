"""Saliency maps of one scan: gradient and integrated gradients, both by captum."""

from __future__ import annotations

import numpy as np
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import nn

METHODS = ("gradient", "integrated_gradients")
Maps = dict[tuple[str, str], np.ndarray]  # (scan, method): (depth, height, width) float32


def saliency(
    model: nn.Module, image: np.ndarray, mask: np.ndarray, method: str, target: int = 0,
    n_steps: int = 32, internal_batch_size: int = 4,
) -> np.ndarray:
    """Map how one output of a model depends on each voxel of one scan.

    - `gradient`: |d output / d voxel| (Simonyan et al., arXiv 1312.6034); never negative.
    - `integrated_gradients`: the gradient averaged along the straight path from the baseline to the scan,
      times their difference (Sundararajan et al., arXiv 1703.01365). Signed: a positive voxel raises the
      output. The baseline is zero everywhere: after z-scoring, a brain of one uniform, mean intensity.

    Neither draws random numbers. The model is put into evaluation mode.

    Args:
        model: maps (batch, 1, depth, height, width) float32 to (batch, outputs); on any device.
        image: (depth, height, width), z-scored inside the mask and 0 outside, as prepared scans are.
        mask: (depth, height, width), true inside the brain.
        target: which output is explained.
        n_steps: points on the path of integrated gradients (Gauss-Legendre quadrature).
        internal_batch_size: points at a time; bounds memory.

    Returns:
        (depth, height, width) float32, zero outside the mask.

    Raises:
        ValueError: the method, shapes, an image that is not zero outside its mask, or a map that is not finite.
    """
    mask = np.asarray(mask, dtype=bool)
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if image.ndim != 3 or image.shape != mask.shape:
        raise ValueError(f"image has shape {image.shape}, mask {mask.shape}: both must be the same (D, H, W)")
    if np.any(image[~mask]):
        # What such voxels contribute would be lost when the map is cut to the mask.
        raise ValueError("image is not zero outside its mask: multiply it by the mask first")

    scan = _batch_of_one(model, image).requires_grad_()
    model.eval()
    if method == "gradient":
        found = Saliency(model).attribute(scan, target=target, abs=True)
    else:
        found = IntegratedGradients(model).attribute(
            scan, baselines=0.0, target=target, n_steps=n_steps, internal_batch_size=internal_batch_size)
    found = found.detach()[0, 0].cpu().numpy().astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"{method}: the map is not finite; look for nan in the model's weights and output")
    return np.where(mask, found, np.float32(0))


def _batch_of_one(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.from_numpy(np.array(image, dtype=np.float32))[None, None].to(device)  # (1, 1, D, H, W)
