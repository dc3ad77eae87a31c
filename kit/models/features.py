"""Which activations of an encoder count as a scan's features: pooling, stages, and mirrored copies.

Published comparisons of encoders differ in this, so each option has a name. The default is what the encoder was trained
and evaluated with here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from kit.device import at_least_float32
from kit.errors import KitError
from kit.models.encoders import DenseNetEncoder, ResNetEncoder, ViTEncoder
from kit.models.third_party_networks import BrainIACResNet, BrainIACViT, MedicalNet

Pool = Literal["default", "mean", "class"]
GIVE_MEANS = (ResNetEncoder, DenseNetEncoder, ViTEncoder, BrainIACResNet, MedicalNet)  # their output is a mean


class FeatureError(KitError, ValueError):
    """An encoder lacks the requested features; the message says which it has."""


def stages_of(encoder: nn.Module) -> list[nn.Module]:
    """Stages of one of the kit's encoders, in order: 4 of a ResNet or DenseNet, each transformer block of a ViT.

    Of any other network, none. A stage's output comes before the encoder's final norm; a ResNet has none, so that only
    there the mean of the last stage is the encoder's own output.
    """
    if isinstance(encoder, ResNetEncoder):
        return [getattr(encoder.network, f"layer{number}") for number in range(1, 5)]
    if isinstance(encoder, DenseNetEncoder):
        return [getattr(encoder.network.features, f"denseblock{number}") for number in range(1, 5)]
    if isinstance(encoder, ViTEncoder):
        return list(encoder.autoencoder.blocks)[:-1]  # the last is a LayerNorm
    return []


class FeatureReader(nn.Module):
    """Read the requested features of scans.

    Args:
        encoder: from `kit.models.encoders`, or a third-party network.
        pool: "mean" over voxels or brain tokens, "class" token of a ViT, or "default": the encoder's own output, or
            with stages their mean.
        stages: numbers in `stages_of`, from 1, whose features (before a final norm) are concatenated in this order;
            none: the encoder's output.
        flips: average the features of a scan and of its mirror image.

    Raises:
        FeatureError: the encoder has no class token, no mean, or no such stage.
    """

    def __init__(self, encoder: nn.Module, pool: Pool = "default", stages: Sequence[int] = (),
                 flips: bool = False) -> None:
        super().__init__()
        there = stages_of(encoder)
        if pool == "class" and not isinstance(encoder, ViTEncoder):
            raise FeatureError(f"pool: class is for the kit's ViTs; {type(encoder).__name__} has no class token")
        if pool == "mean" and isinstance(encoder, BrainIACViT):
            raise FeatureError("pool: mean is not what BrainIAC's ViT gives, whose features are its first token; give "
                               "default")
        if pool == "mean" and not isinstance(encoder, GIVE_MEANS):
            raise FeatureError(f"pool: mean is not known to be what {type(encoder).__name__} gives; give default, or "
                               "add the class to GIVE_MEANS in kit/models/features.py")
        if wrong := [number for number in stages if not 1 <= number <= len(there)]:
            raise FeatureError(f"stages: got {wrong}; {type(encoder).__name__} has "
                               + (f"stages 1 to {len(there)}" if there else "none that the kit knows"))
        self.encoder, self.pool, self.flips = encoder, pool, flips
        self._read_at = [there[number - 1] for number in stages]
        if isinstance(encoder, ViTEncoder) and pool == "class" and not stages:
            self._read_at = [encoder.autoencoder.blocks[-1]]

    @property
    def is_encoder_output(self) -> bool:
        """Whether the features read are simply the encoder's own output."""
        return not (self._read_at or self.flips)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features), at least float32."""
        features = self._read(images)
        return (features + self._read(images.flip(-1))) / 2 if self.flips else features

    def _read(self, images: torch.Tensor) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        hooks = [module.register_forward_hook(
            lambda _, __, output, place=place: found.__setitem__(place, self._pooled(output)))
                 for place, module in enumerate(self._read_at)]
        try:
            whole = self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([found[place] for place in sorted(found)], 1) if found else whole

    def _pooled(self, output: torch.Tensor) -> torch.Tensor:
        """Stage (batch, channel, depth, height, width) or (batch, 1 + tokens, features) -> (batch, features)."""
        output = at_least_float32(output)
        if output.ndim == 5:
            return output.mean((2, 3, 4))
        return output[:, 0] if self.pool == "class" else output[:, 1:].mean(1)
