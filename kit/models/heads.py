"""Heads on top of an encoder: SimCLR's projection head, and a linear prediction head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kit.device import at_least_float32, no_autocast
from kit.models.encoder import Encoder


class Head(nn.Sequential):
    """Layers that run in at least float32, even under autocast."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, features) -> (batch, width of the last layer)."""
        with no_autocast(features.device):
            return super().forward(at_least_float32(features))


def projection_head(features: int, widths: Sequence[int]) -> Head:
    """Linear layers without bias, with ReLU in between (SimCLR, Chen et al. 2020; sizes as in the paper's code).

    Args:
        features: width of the encoder's output.
        widths: of the layers, such as 512, 512, 64; the last is the embedding's.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width, bias=False), nn.ReLU()]
        features = width
    return Head(*layers[:-1])


class Predictor(nn.Module):
    """An encoder and a linear layer that predicts one logit, K logits, or a number standardised by the training labels.

    Attributes:
        outputs: 1 for two classes and for numbers, K for K > 2 classes; see `kit.cohort.labels.Labels.outputs`.
        mean, sd: of the training labels; 0 and 1 for classification.
    """

    mean: torch.Tensor
    sd: torch.Tensor

    def __init__(self, encoder: Encoder, outputs: int = 1, mean: float = 0.0, sd: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.outputs = encoder, outputs
        self.head = nn.Linear(encoder.features, outputs)
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("sd", torch.tensor(float(sd)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, outputs): logits, or a standardised number."""
        features = self.encoder(images)
        with no_autocast(features.device):
            return self.head(at_least_float32(features))
