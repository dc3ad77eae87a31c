"""The output to explain: one number per scan, which a map then attributes to voxels.

With a head: its output, or one of several classes. For any encoder: similarity to another scan, similarity to the
scan's own views, or the position along the embeddings' first principal direction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from kit.augment.recipe import Recipe, read_recipe
from kit.augment.views import make_views
from kit.errors import KitError
from kit.evaluate.predict import predict
from kit.models.encoders import DenseNetEncoder, ResNetEncoder, ViTEncoder
from kit.models.heads import Predictor
from kit.store.dataset import PreparedScans, collate
from kit.store.store import Store

OF_ENCODERS = ("similarity", "views", "component")
VIEWS = 8  # of a scan; it is compared with their mean direction


class TargetError(KitError, ValueError):
    """A model has no such output; the message says which it has."""


class Output(nn.Module):
    """One output of a model, or its negative: (batch,)."""

    def __init__(self, model: nn.Module, number: int = 0, sign: float = 1.0) -> None:
        super().__init__()
        self.model, self.number, self.sign = model, number, sign

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch,)."""
        answer = self.model(images)
        return self.sign * (answer if answer.ndim == 1 else answer[:, self.number])


class Cosine(nn.Module):
    """Cosine similarity of a scan's features to given ones, -1 to 1: (batch,).

    Args:
        encoder: computes the features.
        to: (features,).
    """

    to_features: torch.Tensor

    def __init__(self, encoder: nn.Module, to: torch.Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("to_features", to)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch,)."""
        return F.cosine_similarity(self.encoder(images), self.to_features[None])


class Along(nn.Module):
    """Position of a scan's features along a direction from a centre, in the features' unit: (batch,)."""

    centre: torch.Tensor
    direction: torch.Tensor

    def __init__(self, encoder: nn.Module, centre: torch.Tensor, direction: torch.Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centre", centre)
        self.register_buffer("direction", direction)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch,)."""
        return (self.encoder(images) - self.centre) @ self.direction


class Target(NamedTuple):
    """The output to explain, applicable to models with different weights.

    Attributes:
        words: a description for titles.
        of: (model, scan name) -> a module that outputs one number per scan.
    """

    words: str
    of: Callable[[nn.Module, str], nn.Module]


def encoder_of(model: nn.Module) -> ResNetEncoder | DenseNetEncoder | ViTEncoder | None:
    """Find the encoder inside a model, if it is one of the kit's."""
    kinds = (ResNetEncoder, DenseNetEncoder, ViTEncoder)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def target_of(target: str, model: nn.Module, record: dict[str, Any], store: Store, rows: pd.DataFrame,
              like: str | None = None, seed: int = 0) -> Target:
    """Convert a notebook's `target` to a `Target`.

    Args:
        target: `prediction` (log-odds of the second of two classes, the logit of the predicted class of several, or a
            number, in standard deviations of the training labels if the model was trained with `standardise`), a
            class's name, or one of `OF_ENCODERS`.
        model: a `Predictor`, or an encoder.
        record: its `task.json`; for an encoder its record.
        store, rows: the scans; `component` is fitted to their embeddings.
        like: for `similarity`: a scan's name; None: the first of `rows` that is not the scan itself.
        seed: of the views, which use the recipe in `record`, or without one (a fine-tuned model has none) `weak`.

    Raises:
        TargetError: the model has no such output, the store no scan of that name, or there are too few scans.
    """
    if target == "similarity":
        return _similarity(store, rows, like)
    if target == "views":
        recipe = Recipe.model_validate(record["views"]) if "views" in record else read_recipe("weak")
        return Target(f"similarity to {VIEWS} of its own views",
                      lambda model, scan: _like_its_views(_encoder(model), store, scan, seed, recipe))
    if target == "component":
        return _component(store, rows)
    if not isinstance(model, Predictor):
        raise TargetError(f"target: got {target!r}; an encoder without a head has {', '.join(OF_ENCODERS)}")
    return _output(target, model, record, store)


def _output(target: str, model: Predictor, record: dict[str, Any], store: Store) -> Target:
    classes, task = list(record.get("classes") or ()), record.get("task", "output")
    if target != "prediction" and target not in classes:
        raise TargetError(f"target: got {target!r}; this model has prediction"
                          f"{', ' + ', '.join(classes) if classes else ''}, {', '.join(OF_ENCODERS)}")
    if model.outputs == 1:
        sign = -1.0 if target != "prediction" and classes.index(target) == 0 else 1.0
        of_class = (target if target != "prediction" else classes[1]) if classes else ""
        standardised = (float(model.mean), float(model.sd)) != (0.0, 1.0)
        unit = "training labels' SD" if standardised else "the label's own unit"
        words = f"log-odds of {task} = {of_class}" if classes else f"{task}, in {unit}"
        return Target(words, lambda model, scan: Output(model, 0, sign))
    if target != "prediction":
        return Target(f"logit of {task} = {target}", lambda model, scan: Output(model, classes.index(target)))

    @cache
    def predicted(scan: str) -> int:  # by the explained model, even for copies with other weights
        return int(_embed(model, store, [scan])[0].argmax())

    return Target(f"logit of the predicted {task}", lambda other, scan: Output(other, predicted(scan)))


def _similarity(store: Store, rows: pd.DataFrame, like: str | None) -> Target:
    if like is not None and like not in set(store.index["scan"]):
        raise TargetError(f"like: the prepared scans have no {like!r}")
    first = like or rows["scan"].iloc[0]
    # all are compared with `first`, and `first` itself with the first of these
    others = [scan for scan in rows["scan"] if scan != first]
    if not others:
        raise TargetError("target: similarity needs a second scan; name another in like, or show two")

    def of(model: nn.Module, scan: str) -> Cosine:
        encoder = _encoder(model)
        other = others[0] if scan == first else first
        return Cosine(encoder, torch.from_numpy(_embed(encoder, store, [other])[0]).to(_device(encoder)))

    own = f" (its own map: to {others[0]})" if first in set(rows["scan"]) else ""  # no scan is compared with itself
    return Target(f"similarity to {first}{own}", of)


def _like_its_views(encoder: nn.Module, store: Store, scan: str, seed: int,
                    recipe: Recipe) -> Cosine:
    """Cosine of the scan to its views' mean direction, held constant so that the map is in the scan's own space."""
    item = PreparedScans(store, store.index[store.index["scan"] == scan])[0]
    batch = collate([item]).to(_device(encoder))
    with torch.no_grad():
        features = torch.cat([F.normalize(encoder.eval()(make_views(
            batch.images, batch.masks, batch.keys, recipe, seed=seed, epoch=0, view=number,
            spacing_mm=store.grid.spacing_mm, zscored=store.zscored)[0])) for number in range(VIEWS)])
    return Cosine(encoder, features.mean(0))


def _component(store: Store, rows: pd.DataFrame) -> Target:
    if len(rows) < 3:
        raise TargetError(f"target: component needs three scans or more, these are {len(rows)}; show more")

    @lru_cache(maxsize=1)
    def fitted(encoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        features = _embed(encoder, store, rows["scan"])
        centre = features.mean(0)
        direction = np.linalg.svd(features - centre, full_matrices=False)[2][0]
        direction *= np.sign(direction[np.abs(direction).argmax()])  # a sign that does not depend on the SVD's
        return torch.from_numpy(centre).to(_device(encoder)), torch.from_numpy(direction).to(_device(encoder))

    return Target("first principal direction of the embeddings",
                  lambda model, scan: Along(_encoder(model), *fitted(_encoder(model))))


def _encoder(model: nn.Module) -> nn.Module:
    return model.encoder if isinstance(model, Predictor) else model


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _embed(model: nn.Module, store: Store, scans: pd.Series | list[str]) -> np.ndarray:
    """Run a model over named scans: (scans, width) float32."""
    rows = store.index.set_index("scan", drop=False).loc[list(scans)]
    return predict(model, PreparedScans(store, rows))
