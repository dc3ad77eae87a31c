"""The masked autoencoder (He et al. 2022) around MONAI's network: masks, targets, loss, reconstruction.

Only patches that hold brain in the template become tokens (`kit.models.encoders.brain_patches`), so only they are
masked and filled in. The loss counts those that also hold brain in the scan's own mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import nn

from kit.augment.masking import masked_patches
from kit.device import at_least_float32, no_autocast
from kit.models.encoders import LEAST_OF_PATCH, ViTEncoder, patches
from kit.seeding import rng_for


class MaskedAutoencoder(nn.Module):
    """A ViT encoder with a decoder that fills in the masked patches."""

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Encode the seen tokens and predict all tokens.

        Same as MONAI's `MaskedAutoEncoderViT.forward` on the encoder's tokens, but with given masks instead of masks
        drawn from torch's random state.

        Args:
            images: (batch, 1, depth, height, width) float.
            masked: (batch, tokens) bool, equally many in each row.

        Returns:
            predicted patches (batch, tokens, voxels of a patch).
        """
        return self.fill_in(images, seen_tokens(masked))

    def fill_in(self, images: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Like `forward`, given indices of the seen tokens, (batch, seen) int64, so that no shape depends on the mask's
        values.
        """
        network, tokens = self.encoder.autoencoder, self.encoder.tokens(images)
        count = tokens.shape[1]
        tokens = self.encoder.encode(tokens.gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1])))
        first, tokens = network.decoder_embed(tokens).split([1, tokens.shape[1] - 1], dim=1)
        every = network.mask_tokens.to(tokens.dtype).repeat(len(images), count, 1)
        every = every.scatter(1, seen[..., None].expand_as(tokens), tokens)
        every = every + network.decoder_pos_embedding.index_select(1, self.encoder.brain_patches)
        decoded = network.decoder_blocks(torch.cat([first, every], dim=1))
        with no_autocast(images.device):
            return network.decoder_pred(at_least_float32(decoded))[:, 1:]

    def targets(self, images: torch.Tensor, normalise: bool) -> torch.Tensor:
        """Targets of the prediction, (batch, tokens, voxels of a patch).

        Args:
            images: (batch, 1, depth, height, width) float.
            normalise: subtract each patch's mean and divide by its SD, which He et al. 2022 found best.
        """
        true = patches(images, self.encoder.patch).index_select(1, self.encoder.brain_patches)
        if not normalise:
            return true
        return (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()

    def hold_brain(self, masks: torch.Tensor) -> torch.Tensor:
        """Which tokens hold brain in the scans' masks: (batch, 1, depth, height, width) bool -> (batch, tokens)."""
        share = patches(masks.float(), self.encoder.patch).mean(-1)
        return share.index_select(1, self.encoder.brain_patches) >= LEAST_OF_PATCH

    def images_of(self, values: torch.Tensor) -> torch.Tensor:
        """Invert `targets`, except for their normalisation; zero where there is no token."""
        (a, b, c), shape = self.encoder.patch, self.encoder.autoencoder.img_size
        every = values.new_zeros(len(values), shape[0] // a * (shape[1] // b) * (shape[2] // c), a * b * c)
        every = every.index_copy(1, self.encoder.brain_patches, values)
        return rearrange(every, "n (d h w) (a b c) -> n 1 (d a) (h b) (w c)", a=a, b=b, c=c, d=shape[0] // a,
                         h=shape[1] // b)


def seen_tokens(masked: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) bool, equally many in each row -> indices of unmasked tokens, (batch, seen tokens) int64."""
    return (~masked).nonzero()[:, 1].view(len(masked), -1)


def masks_for(keys: Sequence[int], tokens: int, ratio: float, *, seed: int, epoch: int) -> torch.Tensor:
    """Draw masks (batch, tokens) bool, keyed by (seed, epoch, scan): the same in any batch, worker and rank.

    Args:
        keys: (batch,) the scans' keys, see `kit.seeding.scan_key`.
        tokens: number of tokens of a scan.
        ratio: share of tokens to mask.
    """
    return torch.from_numpy(np.stack([masked_patches(tokens, ratio, rng_for(seed, epoch, key)) for key in keys]))


def reconstruction_loss(true: torch.Tensor, predicted: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Mean squared error over each scan's scored patches, averaged over scans (He et al. 2022).

    A scan without scored patches counts as 0.

    Args:
        true: see `MaskedAutoencoder.targets`.
        predicted: (batch, tokens, voxels of a patch), or one prediction for all scans (tokens, voxels of a patch).
        scored: (batch, tokens) bool: masked, and holding brain.
    """
    wrong = (predicted.float() - true).square().mean(-1) * scored
    return (wrong.sum(1) / scored.sum(1).clamp_min(1)).mean()


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, masked: torch.Tensor,
                normalise: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scans, what the network sees of them, and the same with its predictions in the masked patches.

    All have the images' shape and the targets' scale: with `normalise`, each patch minus its mean, over its SD.
    Predictions are shown as they are, not rescaled by the true patch's mean and SD. Voxels without a token are zero.
    """
    true, hidden = model.targets(images, normalise), masked[..., None]
    parts = (true, true * ~hidden, torch.where(hidden, model(images, masked).float(), true))
    scans, seen, filled = (model.images_of(values) for values in parts)
    return scans, seen, filled
