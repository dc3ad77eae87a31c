"""A 3D convolution whose gradient is right in bfloat16 on a CPU, too."""

from __future__ import annotations

import torch
from torch import nn

from kit.device import at_least_float32, no_autocast


class Conv3d(nn.Conv3d):
    """Like torch's, but under a CPU's autocast it runs in float32 if its kernel is larger than a side of its input.

    There, oneDNN 3.12 (torch 2.13, avx512_bf16) computes bfloat16 gradients of the weights from uninitialised memory,
    or writes out of bounds: garbage, infinities, gradients that differ between runs, or a crash. In 250 random shapes
    with every side at least the kernel's, none failed. The last stages of small grids have sides below it.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        small = any(side < size for side, size in zip(input.shape[2:], self.kernel_size, strict=True))
        if small and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with no_autocast(input.device):
                return super()._conv_forward(at_least_float32(input), weight, bias)
        return super()._conv_forward(input, weight, bias)


def with_right_gradients(network: nn.Module) -> None:
    """Make all of a network's 3D convolutions `Conv3d`, with the weights that they have."""
    for layer in network.modules():
        if type(layer) is nn.Conv3d:
            layer.__class__ = Conv3d
