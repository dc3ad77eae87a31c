"""What is learned: a batch and the epoch in, `{"loss": ...}` and what else is worth logging out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kit.augment.recipe import Flip, Recipe
from kit.augment.views import make_views
from kit.data.loader import Batch
from kit.models.heads import Predictor, projection_head
from kit.models.mae import MaskedAutoencoder, reconstruction_loss
from kit.train.loss import nt_xent

HELD_OUT_EPOCH = 2**31 - 1  # keys the views of held-out scans, which stay the same all through a run


class SimCLR(nn.Module):
    """Two views of a scan agree, and differ from the views of all other scans (Chen et al. 2020)."""

    def __init__(self, encoder: nn.Module, recipe: Recipe, *, projection: list[int], temperature: float, seed: int,
                 spacing_mm: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.features, projection)
        self.recipe, self.temperature, self.seed, self.spacing_mm = recipe, temperature, seed, spacing_mm

    def forward(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """Loss and the share of views that find their partner; over all processes while training."""
        key = epoch if self.training else HELD_OUT_EPOCH
        views = torch.cat([make_views(batch.images, batch.masks, batch.keys, self.recipe, seed=self.seed, epoch=key,
                                      view=view, spacing_mm=self.spacing_mm)[0] for view in (0, 1)])
        first, second = self.head(self.encoder(views)).chunk(2)
        loss, top1 = nt_xent(first, second, self.temperature, gather=self.training)
        return {"loss": loss, "top1": top1}


class MaskedReconstruction(nn.Module):
    """Masked patches are filled in from the rest (He et al. 2022); the whole scan is the one view."""

    def __init__(self, encoder: nn.Module, mask_ratio: float) -> None:
        super().__init__()
        self.autoencoder = MaskedAutoencoder(encoder, mask_ratio)

    @property
    def encoder(self) -> nn.Module:
        """What `3_finetune` takes over."""
        return self.autoencoder.encoder

    def forward(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """Loss; the masks come from torch's random state, which the loop seeds at each step."""
        predicted, masked = self.autoencoder(batch.images)
        return {"loss": reconstruction_loss(batch.images, predicted, masked)}


class Supervised(nn.Module):
    """A label is predicted: logistic loss for two classes, squared error for a standardised number."""

    def __init__(self, predictor: Predictor, kind: str, *, flip: bool, seed: int) -> None:
        super().__init__()
        self.predictor = predictor
        self.kind, self.seed = kind, seed
        self.recipe = Recipe(flip=Flip(probability=0.5, axes=["x"])) if flip else Recipe()

    def forward(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """Loss; scans are mirrored at random while training, if so asked."""
        images = batch.images
        if self.training:
            images = make_views(images, batch.masks, batch.keys, self.recipe, seed=self.seed, epoch=epoch, view=0)[0]
        output = self.predictor(images)[:, 0].float()
        if self.kind == "classification":
            return {"loss": F.binary_cross_entropy_with_logits(output, batch.labels)}
        return {"loss": F.mse_loss(output, (batch.labels - self.predictor.mean) / self.predictor.sd)}
