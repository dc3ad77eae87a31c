"""Encoders: scans (batch, 1, depth, height, width) to features (batch, `encoder.features`)."""

from __future__ import annotations

import math
import warnings

import torch
from monai.networks.nets import MaskedAutoEncoderViT, ResNet
from torch import nn

from kit.device import at_least_float32

Shape = tuple[int, int, int]

# hidden width, layers, heads, decoder width, decoder layers; `vit` as ViT-B and its decoder in He et al. 2022
VIT_SIZES = {"vit": (768, 12, 12, 384, 4), "vit_narrow": (192, 6, 6, 96, 2)}


class AveragePool(nn.AdaptiveAvgPool3d):
    """The mean over all places, in float32 at least."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, channel, depth, height, width) -> (batch, channel, 1, 1, 1)."""
        return super().forward(at_least_float32(images))


class ResNetEncoder(nn.Module):
    """MONAI's 3D ResNet without its last layer; `network` keeps MONAI's parameter names.

    `resnet18` is the paper's: `monai.networks.nets.resnet18(spatial_dims=3, n_input_channels=1)`, whose state
    dict is the released model's. `resnet18_narrow` has the same blocks at a quarter of the width, a first
    convolution of 3 voxels at stride 2, and no max-pool, which small grids do not survive.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        narrow = architecture == "resnet18_narrow"
        widths = [16, 32, 64, 128] if narrow else [64, 128, 256, 512]
        stem = {"conv1_t_size": 3, "conv1_t_stride": 2, "no_max_pool": True} if narrow else {}
        self.network = ResNet("basic", [2, 2, 2, 2], widths, n_input_channels=1, feed_forward=False, **stem)
        self.network.avgpool = AveragePool(1)
        self.features = widths[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        return self.network(images)


class ViTEncoder(nn.Module):
    """The encoder of MONAI's masked autoencoder on all patches; features are the mean of the patch tokens."""

    def __init__(self, architecture: str, shape: Shape) -> None:
        super().__init__()
        width, layers, heads, decoder_width, decoder_layers = VIT_SIZES[architecture]
        self.autoencoder = MaskedAutoEncoderViT(
            in_channels=1, img_size=shape, patch_size=patch_size(shape), hidden_size=width, mlp_dim=4 * width,
            num_layers=layers, num_heads=heads, decoder_hidden_size=decoder_width,
            decoder_mlp_dim=4 * decoder_width, decoder_num_layers=decoder_layers,
            decoder_num_heads=heads, qkv_bias=True)
        self.features = width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        mae = self.autoencoder
        tokens = mae.patch_embedding(images)
        tokens = torch.cat([mae.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return at_least_float32(mae.blocks(tokens)[:, 1:]).mean(1)


def patch_size(shape: Shape) -> Shape:
    """For each side the divisor nearest to a sixth of it, between 4 and 16 voxels: 6, 8, 8 for 36, 48, 40.

    Raises:
        ValueError: a side has no divisor in that range.
    """
    def nearest(side: int) -> int:
        divisors = [number for number in range(4, 17) if side % number == 0]
        if not divisors:
            raise ValueError(f"shape {shape}: a ViT cuts it into patches, but {side} has no divisor from 4 to 16; "
                             "prepare the scans on a grid whose sides do")
        return min(divisors, key=lambda number: (abs(math.log(number * 6 / side)), number))

    return tuple(nearest(side) for side in shape)


def build_encoder(architecture: str, shape: Shape, seed: int = 0) -> nn.Module:
    """An encoder with random weights that the seed decides.

    Args:
        architecture: see `kit.params.Architecture`.
        shape: voxels (z, y, x) of the scans that it is for; a ViT takes no other.
        seed: of the weights; the caller's random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # MONAI 1.6 calls it in the way that torch will change
        torch.manual_seed(seed)
        return ViTEncoder(architecture, shape) if architecture in VIT_SIZES else ResNetEncoder(architecture)
