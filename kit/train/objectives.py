"""Training objectives: each takes a batch and the epoch, and returns `{"loss": ...}` and whatever should be logged.

A new objective is a module that follows `Objective`; `kit.train.loop.fit` trains it without further changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from kit.augment.recipe import Flip, Recipe
from kit.augment.views import make_views
from kit.device import no_autocast
from kit.models.encoder import Encoder
from kit.models.encoders import ViTEncoder
from kit.models.heads import Predictor, projection_head
from kit.models.mae import MaskedAutoencoder, masks_for, reconstruction_loss
from kit.store.dataset import Batch
from kit.train.loss import nt_xent

VALIDATION_EPOCH = 2**31 - 1  # keys the views of validation scans, which stay the same throughout a run
Report = dict[str, torch.Tensor]  # scalars: `loss`, and whatever else is worth logging


class Objective(Protocol):
    """What the loop, its chunks, validation, the monitor and `kit.train.pretrain` need from an objective.

    `kit.train.plan` counts an objective's floating-point operations through `head(encoder(scans))`; an objective
    without `head` needs a branch there.

    Attributes:
        compares: whether the loss compares the scans of a batch with each other. If so, a batch in chunks is embedded
            chunk by chunk, then all embeddings are compared; if not, the loss is a mean over scans.
        scans_per_item: scans of a batch that make one item, which is what gives two views: 1, or 2 if these come from
            two sessions.
        recipe: how views are made; kept in checkpoints and the encoder's record. `Recipe()` if there are no views.
    """

    compares: bool
    scans_per_item: int
    recipe: Recipe

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained."""

    @property
    def compare(self) -> Any:
        """A method: report on the two views' embeddings (items, width); used only if it `compares`.

        It computes in float32 outside autocast, and while training over all processes: see `kit.train.loss.nt_xent`.
        """

    def __call__(self, batch: Batch, epoch: int, /, **options: bool) -> Any:
        """Report on a batch; an objective that `compares` also takes `embed=True`, which asks for the embeddings
        (2, items, width) in place of the report."""

    def train(self, mode: bool = True) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> object: ...


class SimCLR(nn.Module):
    """Make two views of a scan agree, and differ from the views of all other scans (Chen et al. 2020).

    Args:
        projection: widths of the projection head's layers; the last is the embedding's.
        temperature: of NT-Xent.
        spacing_mm: of the grid, for the recipe's ranges in mm.
        paired: training batches hold pairs of sessions, and each session gives one view.
        zscored: the scans' intensity scale, which their views keep; see `kit.augment.views.make_views`.
    """

    encoder: Encoder
    compares = True

    def __init__(self, encoder: Encoder, recipe: Recipe, *, projection: list[int], temperature: float, seed: int,
                 spacing_mm: float, paired: bool = False, zscored: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.features, projection)
        self.recipe, self.temperature, self.seed, self.spacing_mm = recipe, temperature, seed, spacing_mm
        self.zscored = zscored
        self.scans_per_item = 2 if paired else 1

    def forward(self, batch: Batch, epoch: int, embed: bool = False) -> Report | torch.Tensor:
        """Loss and the share of views that find their partner, see `compare`; with `embed`, only the embeddings.

        Returns:
            `{"loss": ..., "top1": ...}`, or the two views' embeddings (2, items, width).
        """
        first, second = self.head(self.encoder(torch.cat(self.views(batch, epoch)))).chunk(2)
        return torch.stack([first, second]) if embed else self.compare(first, second)

    def views(self, batch: Batch, epoch: int) -> list[torch.Tensor]:
        """The two views, each (items, 1, depth, height, width); for validation scans, the same throughout a run."""
        key = epoch if self.training else VALIDATION_EPOCH
        parts = [batch, batch]
        if self.scans_per_item == 2 and self.training:
            parts = [Batch(batch.images[turn::2], batch.masks[turn::2], batch.keys[turn::2], batch.labels[turn::2])
                     for turn in (0, 1)]
        with no_autocast(batch.images.device):
            return [make_views(part.images, part.masks, part.keys, self.recipe, seed=self.seed, epoch=key, view=view,
                               spacing_mm=self.spacing_mm, zscored=self.zscored)[0] for view, part in enumerate(parts)]

    def compare(self, first: torch.Tensor, second: torch.Tensor) -> Report:
        """Loss and top-1 accuracy of two views' embeddings (items, width); over all processes while training."""
        loss, top1 = nt_xent(first, second, self.temperature, gather=self.training)
        return {"loss": loss, "top1": top1}


class MaskedReconstruction(nn.Module):
    """Fill in masked patches from the rest (He et al. 2022); the whole scan is the only view.

    A recipe, if given, augments the training scans first; validation scans stay as they are.

    Args:
        mask_ratio: share of the tokens that are masked, 0 to 1.
        normalise: predict each patch minus its mean, over its SD.
        spacing_mm, zscored: as of `SimCLR`.
    """

    compares, scans_per_item = False, 1

    def __init__(self, encoder: ViTEncoder, mask_ratio: float, *, seed: int, normalise: bool = True,
                 recipe: Recipe | None = None, spacing_mm: float = 1.0, zscored: bool = True) -> None:
        super().__init__()
        self.autoencoder = MaskedAutoencoder(encoder)
        self.mask_ratio, self.seed, self.normalise = mask_ratio, seed, normalise
        self.recipe, self.spacing_mm, self.zscored = recipe or Recipe(), spacing_mm, zscored

    @property
    def encoder(self) -> ViTEncoder:
        """The part that `3_finetune` reuses."""
        return self.autoencoder.encoder

    def masks(self, batch: Batch, epoch: int) -> torch.Tensor:
        """Which tokens are masked, (batch, tokens) bool; for validation scans, the same throughout a run."""
        key = epoch if self.training else VALIDATION_EPOCH
        masks = masks_for(batch.keys, len(self.encoder.brain_patches), self.mask_ratio, seed=self.seed, epoch=key)
        return masks.to(batch.images.device)

    def forward(self, batch: Batch, epoch: int) -> Report:
        """Mean squared error over the masked patches that hold brain."""
        batch = self.view(batch, epoch)
        masked = self.masks(batch, epoch)
        return self.score(batch, self.autoencoder(batch.images, masked), masked)

    def score(self, batch: Batch, predicted: torch.Tensor, masked: torch.Tensor) -> Report:
        """Score predicted patches against the scans, see `reconstruction_loss`."""
        true = self.autoencoder.targets(batch.images, self.normalise)
        return {"loss": reconstruction_loss(true, predicted, masked & self.autoencoder.hold_brain(batch.masks))}

    def view(self, batch: Batch, epoch: int) -> Batch:
        """The batch, augmented by the recipe while training."""
        if not self.training or self.recipe == Recipe():
            return batch
        with no_autocast(batch.images.device):
            images, masks, _ = make_views(batch.images, batch.masks, batch.keys, self.recipe, seed=self.seed,
                                          epoch=epoch, view=0, spacing_mm=self.spacing_mm, zscored=self.zscored)
        return replace(batch, images=images, masks=masks)


class Supervised(nn.Module):
    """Predict a label: cross-entropy for classes, squared error for a standardised number.

    Args:
        kind: "regression" or "classification".
        flip: mirror each training scan left-right with probability 0.5.
        zscored: as of `SimCLR`.
    """

    compares, scans_per_item = False, 1

    def __init__(self, predictor: Predictor, kind: str, *, flip: bool, seed: int, zscored: bool = True) -> None:
        super().__init__()
        self.predictor = predictor
        self.kind, self.seed, self.zscored = kind, seed, zscored
        self.recipe = Recipe(flip=Flip(probability=0.5, axes=("x",))) if flip else Recipe()

    @property
    def encoder(self) -> Encoder:
        """The predictor's encoder."""
        return self.predictor.encoder

    def forward(self, batch: Batch, epoch: int) -> Report:
        """Loss; with `flip`, training scans are mirrored left-right at random."""
        images = batch.images
        if self.training:
            with no_autocast(images.device):
                images = make_views(images, batch.masks, batch.keys, self.recipe, seed=self.seed, epoch=epoch, view=0,
                                    zscored=self.zscored)[0]
        output = self.predictor(images)  # (batch, outputs)
        if self.kind == "regression":
            return {"loss": F.mse_loss(output[:, 0], (batch.labels - self.predictor.mean) / self.predictor.sd)}
        if self.predictor.outputs > 1:
            return {"loss": F.cross_entropy(output, batch.labels.long())}
        return {"loss": F.binary_cross_entropy_with_logits(output[:, 0], batch.labels)}
