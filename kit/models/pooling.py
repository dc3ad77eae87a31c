"""Pooling: the global average at the end of convolutional encoders, and maxima whose gradients are reproducible."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import nn

from kit.device import at_least_float32


class AveragePool(nn.AdaptiveAvgPool3d):
    """Mean over all places, in at least float32."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, depth, height, width) -> (batch, channel, 1, 1, 1)."""
        return super().forward(at_least_float32(images))


class MaxPool(nn.MaxPool3d):
    """torch's max-pool of undilated cubes, but its gradient is bit-reproducible on CUDA as well.

    There, torch adds the gradients of overlapping windows in whatever order they come.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int = 0) -> None:
        super().__init__(kernel_size, stride, padding)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, depth, height, width) -> the same with shorter sides."""
        return _MaxPool.apply(images, self) if images.device.type == "cuda" else super().forward(images)


class _MaxPool(torch.autograd.Function):
    """Maxima of windows; backward adds one set of non-overlapping windows at a time, so that sums have one order."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, pool: nn.MaxPool3d) -> torch.Tensor:
        values, indices = nn.functional.max_pool3d(images, pool.kernel_size, pool.stride, pool.padding,
                                                   return_indices=True)
        ctx.save_for_backward(indices)
        ctx.shape, ctx.apart = images.shape, -(-cast(int, pool.kernel_size) // cast(int, pool.stride))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, (indices,) = gradients[0], ctx.saved_tensors
        total = gradient.new_zeros(*ctx.shape[:2], ctx.shape[2:].numel())
        for z, y, x in itertools.product(range(ctx.apart), repeat=3):
            windows = (..., slice(z, None, ctx.apart), slice(y, None, ctx.apart), slice(x, None, ctx.apart))
            total.scatter_add_(2, indices[windows].flatten(2), gradient[windows].flatten(2))
        return total.view(ctx.shape), None
