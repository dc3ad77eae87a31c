"""Simulate acquisition effects on one scan (blur, thick slices, ringing, ghosts, motion, spikes) and occlusion.

Images are (depth, height, width) float32. Acquisition effects act on a magnitude image (see `kit.augment.contrast`),
`cutout` and `blank_patches` on the z-scored view. What is linear along an axis is a small (side, side) matrix made in
float64: exact, and as fast as any convolution at these sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import circulant
from scipy.ndimage import gaussian_filter1d

from kit.augment.draws import Draw, detail
from kit.augment.masking import masked_patches, over_voxels
from kit.augment.spatial import scatter, view_to_scan, warp
from kit.device import upload


def along(image: torch.Tensor, matrix: np.ndarray, axis: int) -> torch.Tensor:
    """Apply a (side, side) matrix along an axis; return a new image.

    For a batch of images, (batch, depth, height, width), the matrices are (batch, side, side).
    """
    small = upload(matrix, image.device, image.dtype)
    if axis == 0:
        return torch.matmul(small, image.flatten(-2)).view_as(image)
    small = small if small.dim() == 2 else small[:, None]
    return torch.matmul(small, image) if axis == 1 else torch.matmul(image, small.mT)


def blur(image: torch.Tensor, fwhm: float) -> torch.Tensor:
    """Blur with a Gaussian of `fwhm` voxels (full width at half maximum); the box's edge values are repeated."""
    for axis in range(3):
        image = along(image, gaussian(image.shape[axis], fwhm), axis)
    return image


def gaussian(side: int, fwhm: float) -> np.ndarray:
    """Return the (side, side) matrix of a Gaussian blur of `fwhm` voxels; its rows sum to 1."""
    return gaussian_filter1d(np.eye(side), fwhm / np.sqrt(8 * np.log(2)), axis=0, mode="nearest")


def sharpen(image: torch.Tensor, amount: float, fwhm: float) -> torch.Tensor:
    """Sharpen by unsharp masking: x + amount * (x - blurred x), clipped at zero."""
    return torch.lerp(blur(image, fwhm), image, 1 + amount).clamp_(min=0)


def thick_slices(image: torch.Tensor, thickness: float, axis: int) -> torch.Tensor:
    """Average over slices `thickness` (> 1) voxels thick along an axis, then interpolate linearly between them."""
    return along(image, slice_profile(image.shape[axis], thickness), axis)


def slice_profile(side: int, thickness: float) -> np.ndarray:
    """Return the (side, side) matrix of `thick_slices`; its rows sum to 1."""
    count = int(np.ceil(side / thickness))
    edges = np.clip(side / 2 + (np.arange(count + 1) - count / 2) * thickness, 0, side)
    voxels = np.arange(side)
    overlap = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    overlap = np.clip(overlap, 0, None)
    middles = (edges[1:] + edges[:-1]) / 2
    read = np.stack([np.interp(voxels + 0.5, middles, one) for one in np.eye(count)], axis=1)
    return read @ (overlap / overlap.sum(1, keepdims=True))


def gibbs(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Truncate k-space along each axis, as if voxels were `factor` times as long; return the magnitude."""
    for axis in range(3):
        image = along(image, truncation(image.shape[axis], factor), axis)
    return image.abs_()


def truncation(side: int, factor: float) -> np.ndarray:
    """Return the (side, side) matrix that drops frequencies as if voxels were `factor` times as long."""
    return _filter(np.abs(np.fft.fftfreq(side)) <= 0.5 / factor)


def ghosting(image: torch.Tensor, lost: float, ghosts: int, axis: int) -> torch.Tensor:
    """Weaken every `ghosts`-th line of k-space along an axis, except the central one, by the share `lost`.

    Copies appear 1 / `ghosts` of the box apart, as if the signal varied periodically over the lines. Returns the
    magnitude.
    """
    return along(image, ghost_filter(image.shape[axis], lost, ghosts), axis).abs_()


def ghost_filter(side: int, lost: float, ghosts: int) -> np.ndarray:
    """Return the (side, side) matrix of `ghosting`."""
    line = np.abs(np.rint(np.fft.fftfreq(side) * side)).astype(int)
    return _filter(1 - lost * ((line % ghosts == 0) & (line > 0)))


def _filter(gains: np.ndarray) -> np.ndarray:
    """Return the matrix that multiplies each frequency by a gain, which must be the same for k and -k."""
    return circulant(np.fft.ifft(gains).real)


def spike(image: torch.Tensor, amplitude: float, draw: Draw) -> torch.Tensor:
    """Add the plane wave of one corrupted k-space value, in place; return the magnitude.

    `amplitude` is in the image's unit. The frequency is 0.02 to 0.25 cycles per voxel along each axis.
    """
    waves = plane_wave(draw, image.shape)
    along_z = torch.from_numpy(waves[0].astype(np.complex64)).to(image.device)
    plane = torch.from_numpy(np.outer(waves[1], waves[2]).astype(np.complex64)).to(image.device)
    for number in range(len(image)):
        image[number].add_((along_z[number] * plane).real, alpha=amplitude)
    return image.abs_()


def plane_wave(draw: Draw, shape: Sequence[int]) -> list[np.ndarray]:
    """Return the factors of a spike's wave along (z, y, x), each (side,) complex128."""
    stream = detail(draw, "spike")
    rates, phase = stream.uniform(0.02, 0.25, 3) * stream.choice([-1, 1], 3), stream.uniform(0, 2 * np.pi)
    z, y, x = (np.exp(2j * np.pi * rate * np.arange(side)) for rate, side in zip(rates, shape, strict=True))
    return [z * np.exp(1j * phase), y, x]


def motion(image: torch.Tensor, draw: Draw, movements: int, spacing_mm: float) -> torch.Tensor:
    """Simulate head movements while the lines along an axis are measured one after the other (Shaw et al. 2019).

    The central line, which carries most of the contrast, is measured in the first pose. Then the head moves
    `movements` times, at random lines. Lines on both sides of the centre are treated alike, as in a centric order.
    Each pose's rotations (degrees) and translations (mm) have a standard deviation of `draw.motion_mm`.
    """
    axis = draw.motion_axis
    everything = torch.ones_like(image, dtype=torch.bool)
    line = torch.fft.fftfreq(image.shape[axis], device=image.device).abs()
    k_space = torch.fft.fft(image, dim=axis)
    for start, pose in poses(draw, movements):
        back = view_to_scan(pose, image.shape, spacing_mm)
        moved = torch.fft.fft(scatter(*warp(image, everything, back), image.shape), dim=axis)
        later = (line >= start).view([-1 if number == axis else 1 for number in range(3)])
        k_space = torch.where(later, moved, k_space)
    return torch.fft.ifft(k_space, dim=axis).abs()


def poses(draw: Draw, movements: int) -> list[tuple[float, Draw]]:
    """Return for each movement of `motion` its first line's frequency, in cycles per voxel, and the head's new pose."""
    stream = detail(draw, "motion")
    starts = np.sort(stream.uniform(0.03, 0.3, movements))
    drawn = [stream.normal(0, draw.motion_mm, (2, 3)) for _ in starts]
    return [(float(start), Draw(rotation_degrees=tuple(rotation), translation_mm=tuple(translation)))
            for start, (rotation, translation) in zip(starts, drawn, strict=True)]


def cutout(image: torch.Tensor, side: float, boxes: int, draw: Draw) -> torch.Tensor:
    """Set boxes of `side` voxels a side, centred anywhere in the image, to zero, in place (DeVries and Taylor 2017)."""
    for low, high in cutout_boxes(draw, side, boxes, image.shape):
        image[low[0]:high[0], low[1]:high[1], low[2]:high[2]] = 0
    return image


def cutout_boxes(draw: Draw, side: float, boxes: int, shape: Sequence[int]) -> np.ndarray:
    """Return each box's first voxel and the voxel after its last, (boxes, 2, 3 of z y x) int64."""
    middles = detail(draw, "cutout").random((boxes, 1, 3)) * np.asarray(shape)
    return np.clip(np.rint(middles + np.array([[-side / 2], [side / 2]])), 0, shape).astype(int)


def blank_patches(image: torch.Tensor, share: float, size: float, draw: Draw) -> torch.Tensor:
    """Set a share of the patches of a regular grid, `size` voxels a side, to zero, in place (He et al. 2022)."""
    widths = (max(1, round(size)),) * 3
    count = math.prod(-(-side // width) for side, width in zip(image.shape, widths, strict=True))
    masked = over_voxels(masked_patches(count, share, detail(draw, "patches")), widths, tuple(image.shape))
    return image.masked_fill_(torch.from_numpy(masked).to(image.device), 0)
