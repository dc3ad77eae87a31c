"""How alike an encoder finds two views of a scan, beside how alike it finds views of different scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kit.augment.recipe import Recipe
from kit.augment.views import make_views
from kit.data.loader import Batch


@dataclass(frozen=True)
class Similar:
    """Cosine similarities of an encoder's features.

    Attributes:
        pair: of the two views that are shown.
        pairs: (scans - 1,) of the two views of every other scan, under the same recipe.
        strangers: (scans * (scans - 1),) of views of different scans. Where `pair` lies far above them the task
            is easy; where it lies among them, hopeless.
        encoder: which.
    """

    pair: float
    pairs: np.ndarray
    strangers: np.ndarray
    encoder: str = ""


Similarity = Callable[[int, Recipe, int], Similar]


def similarity_under(encoder: nn.Module, name: str, scans: Batch, spacing_mm: float) -> Similarity:
    """A function of (number of the scan shown, recipe, seed) that compares all scans' views.

    Args:
        encoder: scans (batch, 1, depth, height, width) to features (batch, features).
        name: of the encoder, for the figure.
        scans: that are compared; with the same recipe and seed as the pair that is shown.
        spacing_mm: of their grid.
    """
    encoder = encoder.eval()

    @torch.no_grad()
    def similarity(number: int, recipe: Recipe, seed: int) -> Similar:
        first, second = (F.normalize(torch.cat([encoder(make_views(
            scans.images[one:one + 1], scans.masks[one:one + 1], scans.keys[one:one + 1], recipe, seed=seed, epoch=0,
            view=view, spacing_mm=spacing_mm)[0]) for one in range(len(scans))]), dim=1) for view in (0, 1))
        table = (first @ second.T).cpu().numpy()
        pairs = np.diag(table)
        return Similar(float(pairs[number]), np.delete(pairs, number), table[~np.eye(len(table), dtype=bool)], name)

    return similarity
