"""Facts about a pair of views: their grey levels, and their similarity in the features of one encoder or several.

Similarities between views of different scans are shown for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from kit.augment.recipe import Recipe
from kit.augment.views import make_views
from kit.show.figure import LEGEND, TEXT, blank, label
from kit.show.planes import Pair, window
from kit.store.dataset import Batch


@dataclass(frozen=True)
class Similar:
    """Cosine similarities of an encoder's features.

    Attributes:
        pair: of the two views shown.
        pairs: (scans - 1,) of the two views of every other scan, under the same recipe.
        different_scans: (scans * (scans - 1),) of view 1 of one scan and view 2 of another. If `pair` is far above
            them, the contrastive task is easy; if it is among them, hopeless.
        encoder: its name.
    """

    pair: float
    pairs: np.ndarray
    different_scans: np.ndarray
    encoder: str = ""


Similarity = Callable[[int, Recipe, int], list[Similar]]


def similarity_under(encoders: Mapping[str, nn.Module], scans: Batch, spacing_mm: float,
                     zscored: bool = True) -> Similarity:
    """Return a function of (scan number, recipe, seed) that compares the views of all scans by each encoder's features.

    Args:
        encoders: by name, for the figure; each maps scans (batch, 1, depth, height, width) to features (batch,
            features).
        scans: to compare; all use the recipe and seed of the pair shown.
        spacing_mm, zscored: of their store.
    """
    def compared(encoder: nn.Module, views: Sequence[torch.Tensor], number: int, name: str) -> Similar:
        first, second = (F.normalize(torch.cat([encoder.eval()(view[one:one + 1]) for one in range(len(view))]), dim=1)
                         for view in views)
        table = (first @ second.T).cpu().numpy()
        pairs = np.diag(table)
        return Similar(float(pairs[number]), np.delete(pairs, number), table[~np.eye(len(table), dtype=bool)], name)

    @torch.no_grad()
    def similarity(number: int, recipe: Recipe, seed: int) -> list[Similar]:
        views = [make_views(scans.images, scans.masks, scans.keys, recipe, seed=seed, epoch=0, view=view,
                            spacing_mm=spacing_mm, zscored=zscored)[0] for view in (0, 1)]
        return [compared(encoder, views, number, name) for name, encoder in encoders.items()]

    return similarity


def pair_facts(pair: Pair, similar: Sequence[Similar] = (), note: str = "") -> Figure:
    """Draw histograms of the original and the views, and the pair's similarity beside all others', by each encoder.

    Args:
        pair: volumes (depth, height, width), zero outside the mask.
        similar: empty while not yet known.
    """
    figure = blank(760 if len(similar) < 2 else 900, 190, note=note)
    left, *others = figure.subplots(1, 1 + max(1, len(similar)))
    low, high = window(pair.original)
    margin = (high - low) / 2
    for name, volume, colour in (("original", pair.original, "#555555"), ("view 1", pair.view_1, "#c0392b"),
                                 ("view 2", pair.view_2, "#2471a3")):
        values = volume.ravel()[:: max(1, volume.size // 200_000)]
        density, edges = np.histogram(values[values != 0], bins=60, range=(low - margin, high + margin), density=True)
        left.stairs(np.nan_to_num(density), edges, label=name, color=colour)
    left.legend(**LEGEND)
    label(left, "grey level, as prepared", "density", "grey levels inside the mask")
    for axes in others:
        label(axes, "cosine similarity", "", "similarity: not known yet")
        axes.set_yticks([])
    for axes, each in zip(others, similar, strict=False):
        _draw_similar(axes, each)
    return figure


def _draw_similar(axes: Axes, similar: Similar) -> None:
    for height, values, name, colour in ((2, similar.pairs, "two views of another scan", "#2471a3"),
                                         (1, similar.different_scans, "views of different scans", "#888888")):
        axes.plot(values, np.full(len(values), height), "|", color=colour, markersize=16, label=name)
    axes.axvline(similar.pair, ymax=0.55, color="#c0392b", label=f"this pair: {similar.pair:.3f}")
    axes.set_ylim(0.4, 4.6)
    axes.legend(loc="upper left", **LEGEND)
    axes.set_title(f"similarity by {similar.encoder}", fontsize=TEXT)
