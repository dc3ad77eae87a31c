"""The masked autoencoder (He et al. 2022) around MONAI's network: patches, loss, reconstruction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import nn

from kit.augment.masking import masked_patches
from kit.device import at_least_float32, no_autocast
from kit.models.encoders import ViTEncoder, patch_size
from kit.seeding import rng_for


def patches(images: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """(batch, 1, depth, height, width) -> (batch, patches, voxels of a patch), in the network's order."""
    a, b, c = size
    return rearrange(images, "n 1 (d a) (h b) (w c) -> n (d h w) (a b c)", a=a, b=b, c=c)


def unpatches(tokens: torch.Tensor, size: tuple[int, int, int], shape: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of `patches`."""
    (a, b, c), (depth, height, _) = size, shape
    return rearrange(tokens, "n (d h w) (a b c) -> n 1 (d a) (h b) (w c)", a=a, b=b, c=c, d=depth // a, h=height // b)


class MaskedAutoencoder(nn.Module):
    """A ViT encoder with the decoder that fills in what was masked."""

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Encode the patches that are seen, and predict all.

        MONAI's `MaskedAutoEncoderViT.forward` with the masks given instead of drawn from torch's random state.

        Args:
            images: (batch, 1, depth, height, width) float.
            masked: (batch, patches) bool, as many in each row.

        Returns:
            predicted patches (batch, patches, voxels of a patch).
        """
        return self.fill_in(images, seen_places(masked))

    def fill_in(self, images: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """`forward`, with the numbers of the seen patches (batch, seen patches) int64, whose shape says how many."""
        network = self.encoder.autoencoder
        count = network.decoder_pos_embedding.shape[1]
        tokens = network.patch_embedding(images)
        tokens = tokens.gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = network.blocks(torch.cat([network.cls_token.expand(len(images), -1, -1), tokens], dim=1))
        first, tokens = network.decoder_embed(tokens).split([1, tokens.shape[1] - 1], dim=1)
        every = network.mask_tokens.to(tokens.dtype).repeat(len(images), count, 1)
        every = every.scatter(1, seen[..., None].expand_as(tokens), tokens)
        every = torch.cat([first, every + network.decoder_pos_embedding], dim=1)
        decoded = network.decoder_blocks(every)
        with no_autocast(images.device):
            return network.decoder_pred(at_least_float32(decoded))[:, 1:]


def seen_places(masked: torch.Tensor) -> torch.Tensor:
    """(batch, patches) bool, as many in each row -> the numbers of those not masked, (batch, seen patches) int64."""
    return (~masked).nonzero()[:, 1].view(len(masked), -1)


def masks_for(keys: Sequence[int], shape: tuple[int, int, int], ratio: float, *, seed: int,
              epoch: int) -> torch.Tensor:
    """Masks of scans, (batch, patches) bool, keyed by (seed, epoch, scan): the same in any batch, worker and rank.

    Args:
        keys: (batch,) the scans' keys, see `kit.seeding.scan_key`.
        shape: voxels (z, y, x).
        ratio: share of the patches that are masked.
    """
    count = math.prod(side // width for side, width in zip(shape, patch_size(shape), strict=True))
    return torch.from_numpy(np.stack([masked_patches(count, ratio, rng_for(seed, epoch, key)) for key in keys]))


def patch_statistics(true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each patch's own mean and standard deviation, (batch, patches, 1) both; as He et al. 2022 normalise targets."""
    return true.mean(-1, keepdim=True), (true.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(images: torch.Tensor, predicted: torch.Tensor, masked: torch.Tensor,
                        normalise: bool = False) -> torch.Tensor:
    """Mean squared error over the voxels of the masked patches (He et al. 2022).

    Args:
        images: (batch, 1, depth, height, width) float.
        predicted, masked: see `MaskedAutoencoder.forward`; masked patches count.
        normalise: compare with each patch less its mean, over its standard deviation.
    """
    true = patches(images, patch_size(tuple(images.shape[2:])))
    if normalise:
        mean, sd = patch_statistics(true)
        true = (true - mean) / sd
    return (predicted.float() - true)[masked].square().mean()


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, masked: torch.Tensor,
                normalised: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees, and the scan with the masked patches filled in; both of the images' shape.

    Where it was trained on `normalised` targets, the true patches' means and spreads are lent to what it predicts.
    """
    size, shape = patch_size(tuple(images.shape[2:])), tuple(images.shape[2:])
    true, predicted = patches(images, size), model(images, masked).float()
    if normalised:
        mean, sd = patch_statistics(true)
        predicted = predicted * sd + mean
    seen = true * ~masked[..., None]
    return unpatches(seen, size, shape), unpatches(torch.where(masked[..., None], predicted, true), size, shape)
