"""Encoders: scans (batch, 1, depth, height, width) to features (batch, `encoder.features`)."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar, cast

import numpy as np
import torch
from einops import rearrange
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DenseNet121, MaskedAutoEncoderViT, ResNet
from torch import nn

from kit.device import at_least_float32
from kit.errors import KitError
from kit.models.convolution import with_right_gradients
from kit.models.encoder import Encoder
from kit.models.pooling import AveragePool, MaxPool
from kit.models.third_party_networks import THIRD_PARTY, build_third_party
from kit.preprocess.template import template_on
from kit.store.grid import Grid, Shape

Values = TypeVar("Values", torch.Tensor, np.ndarray)
PATCH_MM = 16.0  # target side of a ViT's patch: 16 voxels of 1 mm, like the 16 pixels of He et al.
DENSENET_LEAST = 29  # voxels of the shortest side
LEAST_OF_PATCH = 0.05  # a patch with at least this share of brain voxels counts as brain
RESNETS = ("resnet18", "resnet18_narrow")
# hidden width, layers, heads, decoder width, decoder layers; `vit` is ViT-B, its decoder of MONAI's default size
VIT_SIZES = {"vit": (768, 12, 12, 384, 4), "vit_narrow": (96, 4, 4, 96, 1)}


class GridError(KitError, ValueError):
    """An architecture cannot read scans of this grid; the message says why."""


class ResNetEncoder(Encoder):
    """MONAI's 3D ResNet without its last layer; `network` keeps MONAI's parameter names.

    `resnet18` is the paper's: `monai.networks.nets.resnet18(spatial_dims=3, n_input_channels=1)`, with the same
    state dict as the released model. `resnet18_narrow` suits small grids: the same blocks at a quarter of the width,
    a first convolution of 3 voxels at stride 2, and no max-pool.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        narrow = architecture == "resnet18_narrow"
        widths = [16, 32, 64, 128] if narrow else [64, 128, 256, 512]
        stem = {"conv1_t_size": 3, "conv1_t_stride": 2, "no_max_pool": True} if narrow else {}
        self.arguments: dict[str, Any] = {  # of MONAI's class; an export's config.json repeats them
            "block": "basic", "layers": [2, 2, 2, 2], "block_inplanes": widths, "n_input_channels": 1,
            "feed_forward": False, **stem}
        self.network = ResNet(**self.arguments)
        # The same pooling, with reproducible gradients on CUDA and means in float32.
        self.network.maxpool, self.network.avgpool = MaxPool(3, 2, 1), AveragePool(1)
        self.features = widths[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        return self.network(images)


class DenseNetEncoder(Encoder):
    """MONAI's 3D DenseNet121 (Huang et al. 2017) before its class layer; `network` keeps MONAI's parameter names.

    Raises:
        GridError: a side is too short to be halved five times.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if min(shape) < DENSENET_LEAST:
            raise GridError(f"densenet121 needs sides of at least {DENSENET_LEAST} voxels, but these are {shape}; use "
                            "resnet18_narrow, or prepare the scans on a finer grid")
        self.network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
        self.features = cast(nn.Linear, self.network.class_layers.out).in_features
        self.network.features.pool0, self.network.class_layers.pool = MaxPool(3, 2, 1), AveragePool(1)
        self.network.class_layers.out = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        return self.network(images)


class ViTEncoder(Encoder):
    """The encoder of MONAI's masked autoencoder, run on brain patches only; features are the mean of their tokens.

    Attributes:
        patch: voxels of a patch along each axis, see `patch_size`.
        brain_patches: (tokens,) int64, indices of the patches that become tokens; see the function of that name.
    """

    brain_patches: torch.Tensor

    def __init__(self, architecture: str, grid: Grid) -> None:
        super().__init__()
        width, layers, heads, decoder_width, decoder_layers = VIT_SIZES[architecture]
        self.patch = patch_size(grid)
        self.arguments: dict[str, Any] = {
            "in_channels": 1, "img_size": grid.shape, "patch_size": self.patch, "hidden_size": width,
            "mlp_dim": 4 * width, "num_layers": layers, "num_heads": heads, "decoder_hidden_size": decoder_width,
            "decoder_mlp_dim": 4 * decoder_width, "decoder_num_layers": decoder_layers, "decoder_num_heads": heads,
            "qkv_bias": True}
        self.autoencoder = MaskedAutoEncoderViT(**self.arguments)
        # learn positions, starting from MONAI's sines and cosines: registered scans have their anatomy in place
        self.autoencoder.patch_embedding.position_embeddings.requires_grad_(True)
        self.autoencoder.decoder_pos_embedding.requires_grad_(True)
        for block in self.autoencoder.modules():
            if isinstance(block, SABlock):
                block.use_flash_attention = True  # the same attention without its full matrix in memory
        self.register_buffer("brain_patches", torch.from_numpy(brain_patches(grid)), persistent=False)
        self.features = width

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> embedded patches with positions (batch, tokens, features)."""
        return self.autoencoder.patch_embedding(images).index_select(1, self.brain_patches)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode any subset of tokens: (batch, some, features) -> class token first (batch, 1 + some, features)."""
        first = self.autoencoder.cls_token.expand(tokens.shape[0], -1, -1)  # `len` would fix an export's batch size
        return self.autoencoder.blocks(torch.cat([first, tokens], dim=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        return at_least_float32(self.encode(self.tokens(images))[:, 1:]).mean(1)


def patch_size(grid: Grid) -> Shape:
    """Choose for each side the divisor whose length is closest to 16 mm by ratio, within 8 to 32 mm.

    Gives 4, 4, 4 for 36x48x40 voxels of 4 mm, and 15, 16, 16 for 150x192x192 of 1 mm, as 16 does not divide 150.

    Raises:
        GridError: a side has no divisor in that range.
    """
    def off(number: int) -> float:
        return abs(math.log(number * grid.spacing_mm / PATCH_MM))

    def nearest(side: int) -> int:
        divisors = [number for number in range(1, side + 1) if side % number == 0 and off(number) <= math.log(2) + 1e-9]
        if not divisors:
            raise GridError(f"shape {grid.shape}: a ViT cuts it into patches of about {PATCH_MM:g} mm, but {side} "
                            f"voxels of {grid.spacing_mm:g} mm have no divisor from {PATCH_MM / 2:g} to "
                            f"{PATCH_MM * 2:g} mm; prepare the scans on a grid whose sides do")
        return min(divisors, key=lambda number: (off(number), number))

    depth, height, width = grid.shape
    return nearest(depth), nearest(height), nearest(width)


def patches(values: Values, size: Shape) -> Values:
    """Cut into patches: (batch, 1, depth, height, width) -> (batch, patches, voxels of a patch), in network order."""
    a, b, c = size
    return rearrange(values, "n 1 (d a) (h b) (w c) -> n (d h w) (a b c)", a=a, b=b, c=c)


def brain_patches(grid: Grid) -> np.ndarray:
    """Indices (tokens,) int64 of the patches that are at least 5 % brain in the template.

    610 of 1080 on the demo's grid, 667 of 1440 on the paper's. Using the template instead of each scan's mask gives all
    scans the same tokens: a batch needs no padding, and a scan's features do not depend on the rest of its batch.

    Raises:
        GridError: there are fewer than two, because the grid misses the brain.
    """
    brain = patches(template_on(grid)[1][None, None], patch_size(grid))[0]
    indices = np.flatnonzero(brain.mean(-1) >= LEAST_OF_PATCH)
    if len(indices) < 2:
        raise GridError(f"{grid}: the template's brain fills {len(indices)} patches; a ViT needs two")
    return indices


def build_encoder(architecture: str, grid: Grid, seed: int = 0) -> Encoder:
    """Build an encoder with random weights drawn from the seed.

    Args:
        architecture: see `kit.params.Architecture` and `kit.models.third_party_networks.THIRD_PARTY`.
        grid: of the scans that it will read. A ViT refuses scans of another shape; BrainIAC's networks would misplace
            scans of another grid without an error.
        seed: of the weights; the caller's random state is left unchanged.

    Raises:
        ValueError: unknown architecture.
        GridError: it cannot read scans of this grid.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # MONAI 1.6 omits `indexing`, which torch will require
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also seeds CUDA, for good
        encoder: Encoder
        if architecture in THIRD_PARTY:
            encoder = build_third_party(architecture, grid)
        elif architecture in VIT_SIZES:
            encoder = ViTEncoder(architecture, grid)
        elif architecture == "densenet121":
            encoder = DenseNetEncoder(grid.shape)
        elif architecture in RESNETS:
            encoder = ResNetEncoder(architecture)
        else:
            known = (*RESNETS, "densenet121", *VIT_SIZES, *THIRD_PARTY)
            raise ValueError(f"no architecture {architecture!r}; there are {', '.join(known)}")
    with_right_gradients(encoder)
    return encoder
