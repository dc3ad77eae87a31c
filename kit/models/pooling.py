"""Global average pooling at the end of convolutional encoders."""

from __future__ import annotations

import torch
from torch import nn

from kit.device import at_least_float32


class AveragePool(nn.AdaptiveAvgPool3d):
    """Mean over all places, in at least float32."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, depth, height, width) -> (batch, channel, 1, 1, 1)."""
        return super().forward(at_least_float32(images))
