"""3D convolutions: right in bfloat16 on a CPU, and faster on CUDA where a first layer's output is huge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kit.device import at_least_float32, no_autocast

INDEX_LIMIT = 2**31  # elements that a 32-bit index reaches; cuDNN and torch take slower kernels beyond
LANES = 8  # channels that tensor cores read at a time in half precision


class Conv3d(nn.Conv3d):
    """Like torch's, with two exceptions.

    Under a CPU's autocast it runs in float32 if its kernel is larger than a side of its input. There, oneDNN 3.12
    (torch 2.13, avx512_bf16) computes bfloat16 gradients of the weights from uninitialised memory, or writes out of
    bounds: garbage, infinities, gradients that differ between runs, or a crash. Of 250 random shapes with no side
    shorter than the kernel's, none failed; in the last stages of a network on a small grid, sides are shorter.

    On CUDA, a layer that reads one channel and writes `INDEX_LIMIT` elements or more reads shifted copies of that
    channel as channels instead, see `by_columns`. For the paper's ResNet-18 this holds for more than three
    scans (six views) of 150x192x192; with six scans (twelve views), it cut a bf16 step on an H200 from 741 to 563 ms.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        small = any(side < size for side, size in zip(input.shape[2:], self.kernel_size, strict=True))
        if small and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with no_autocast(input.device):
                return super()._conv_forward(at_least_float32(input), weight, bias)
        if input.device.type == "cuda" and self.gains_by_columns(input.shape):
            return self.by_columns(input, weight, bias)
        return super()._conv_forward(input, weight, bias)

    def gains_by_columns(self, shape: Sequence[int]) -> bool:
        """Whether an input of this shape, (batch, channels, depth, height, width), goes through `by_columns`."""
        if (self.in_channels > 1 or set(self.dilation) != {1} or self.padding_mode != "zeros"
                or isinstance(self.padding, str)):
            return False
        places = [side // step for side, step in zip(shape[2:], self.stride, strict=True)]  # to within the padding
        return shape[0] * self.out_channels * math.prod(places) >= INDEX_LIMIT

    def by_columns(self, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same convolution with the kernel's width turned into channels (im2col along one axis).

        A kernel (kd, kh, kw) of one channel becomes one of (kd, kh, 1) and kw channels, padded with zeros to a multiple
        of `LANES`.

        Args:
            images: (batch, 1, depth, height, width).
            weight: (out channels, 1, kd, kh, kw).
            bias: (out channels,), or None.

        Returns:
            (batch, out channels, depth, height, width) as `forward` gives it; under autocast in its dtype.
        """
        assert not isinstance(self.padding, str)
        width, (*steps, step), (*pads, pad) = self.kernel_size[2], self.stride, self.padding
        spare = -width % LANES
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))
        shifted = F.pad(images[:, 0], (pad, pad)).unfold(-1, width, step).movedim(-1, 1)
        channels = F.pad(shifted, (0, 0, 0, 0, 0, 0, 0, spare))  # (batch, kw and zeros, depth, height, width)
        kernel = F.pad(weight[:, 0], (0, spare)).movedim(-1, 1)[..., None]
        return F.conv3d(channels, kernel, bias, (*steps, 1), (*pads, 0))


def with_right_gradients(network: nn.Module) -> None:
    """Turn all 3D convolutions of a network into `Conv3d`, in place; their weights stay."""
    for layer in network.modules():
        if type(layer) is nn.Conv3d:
            layer.__class__ = Conv3d
