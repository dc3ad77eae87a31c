"""The masked autoencoder (He et al. 2022) around MONAI's network: patches, loss, reconstruction."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from kit.models.encoders import ViTEncoder, patch_size


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

    def __init__(self, encoder: ViTEncoder, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask patches with torch's random state, and fill them in.

        Args:
            images: (batch, 1, depth, height, width) float.

        Returns:
            predicted patches (batch, patches, voxels), and which were masked (batch, patches) bool.
        """
        predicted, masked = self.encoder.autoencoder(images, masking_ratio=self.mask_ratio)
        return predicted, masked.bool()


def patch_statistics(true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each patch's own mean and standard deviation, (batch, patches, 1) both; as He et al. 2022 normalise targets."""
    return true.mean(-1, keepdim=True), (true.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(images: torch.Tensor, predicted: torch.Tensor, masked: torch.Tensor,
                        normalise: bool = False) -> torch.Tensor:
    """Mean squared error over the voxels of the masked patches (He et al. 2022).

    Args:
        images: (batch, 1, depth, height, width) float.
        predicted, masked: see `MaskedAutoencoder.forward`.
        normalise: compare with each patch less its mean, over its standard deviation.
    """
    true = patches(images, patch_size(tuple(images.shape[2:])))
    if normalise:
        mean, sd = patch_statistics(true)
        true = (true - mean) / sd
    return (predicted.float() - true)[masked].square().mean()


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, seed: int = 0,
                normalised: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees, and the scan with the masked patches filled in; both of the images' shape.

    Where it was trained on `normalised` targets, the true patches' means and spreads are lent to what it predicts.
    """
    size, shape = patch_size(tuple(images.shape[2:])), tuple(images.shape[2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predicted, masked = model(images)
    true = patches(images, size)
    if normalised:
        mean, sd = patch_statistics(true)
        predicted = predicted * sd + mean
    seen = true * ~masked[..., None]
    return unpatches(seen, size, shape), unpatches(torch.where(masked[..., None], predicted.float(), true), size, shape)
