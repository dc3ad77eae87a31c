"""Which numbers of an encoder are a scan's features: pooling, stages, and mirrored copies.

Public comparisons of encoders differ in this, so each way has a name. The default is what the encoder was trained and
evaluated with here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from kit.device import at_least_float32
from kit.errors import KitError
from kit.models.encoders import DenseNetEncoder, ResNetEncoder, ViTEncoder

Pool = Literal["default", "mean", "class"]


class FeatureError(KitError, ValueError):
    """An encoder has no such features; the message says which it has."""


def stages_of(encoder: nn.Module) -> list[nn.Module]:
    """The stages of an encoder, from the scan on: 4 of a ResNet or DenseNet, one a transformer block of a ViT."""
    if isinstance(encoder, ResNetEncoder):
        return [getattr(encoder.network, f"layer{number}") for number in range(1, 5)]
    if isinstance(encoder, DenseNetEncoder):
        return [getattr(encoder.network.features, f"denseblock{number}") for number in range(1, 5)]
    if isinstance(encoder, ViTEncoder):
        return list(encoder.autoencoder.blocks)[:-1]  # the last is a LayerNorm
    return []


class FeatureReader(nn.Module):
    """Features of scans as asked for.

    Args:
        encoder: from `kit.models.encoders`, or another's.
        pool: "mean" over places or brain tokens, "class" token of a ViT, or "default": what the encoder gives.
        stages: numbers of `stages_of`, from 1, whose features are joined; none: the encoder's end.
        flips: mean of a scan's features and of its mirror image's.

    Raises:
        FeatureError: the encoder has no class token, or no such stage.
    """

    def __init__(self, encoder: nn.Module, pool: Pool = "default", stages: Sequence[int] = (),
                 flips: bool = False) -> None:
        super().__init__()
        there = stages_of(encoder)
        if pool == "class" and not isinstance(encoder, ViTEncoder):
            raise FeatureError(f"pool: class is for the kit's ViTs; {type(encoder).__name__} has no class token")
        if wrong := [number for number in stages if not 1 <= number <= len(there)]:
            raise FeatureError(f"stages: got {wrong}; {type(encoder).__name__} has "
                               + (f"stages 1 to {len(there)}" if there else "none that the kit knows"))
        self.encoder, self.pool, self.flips = encoder, pool, flips
        self._read_at = [there[number - 1] for number in stages]
        if pool == "class" and not stages:
            self._read_at = [encoder.autoencoder.blocks[-1]]

    @property
    def plain(self) -> bool:
        """Whether these are what the encoder itself gives."""
        return not (self._read_at or self.flips)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features), float32 at least."""
        features = self._read(images)
        return (features + self._read(images.flip(-1))) / 2 if self.flips else features

    def _read(self, images: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        hooks = [module.register_forward_hook(lambda _, __, output: found.append(self._pooled(output)))
                 for module in self._read_at]
        try:
            whole = self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, 1) if found else whole

    def _pooled(self, output: torch.Tensor) -> torch.Tensor:
        """A stage's (batch, channel, depth, height, width), or (batch, 1 + tokens, features) -> (batch, features)."""
        output = at_least_float32(output)
        if output.ndim == 5:
            return output.mean((2, 3, 4))
        return output[:, 0] if self.pool == "class" else output[:, 1:].mean(1)
