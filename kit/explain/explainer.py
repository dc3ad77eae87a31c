"""The model, the output to explain and the methods' options, from which maps and checks are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import nn

from kit.explain.saliency import CAMS, CONTRIBUTIONS, DEFAULTS, Options, attribution
from kit.store.store import Store


class Explainer(NamedTuple):
    """Everything needed to make maps.

    Attributes:
        model: the model to explain.
        of: (model, scan name) -> a module that outputs one number per scan; see `kit.explain.targets.Target`.
        words: a description of that number.
        store: of the scans.
        options: of the methods.
    """

    model: nn.Module
    of: Callable[[nn.Module, str], nn.Module]
    words: str
    store: Store
    options: Options = DEFAULTS

    def unit(self, method: str) -> str:
        """Unit of a method's map, which says what output it explains, for pictures."""
        if method == "attention_rollout":
            return "attention, whatever the output"
        if method in CAMS:
            return f"relative, of {self.words}"
        if method == "occlusion":
            return f"{self.words}, a cube of {self.options.patch * self.store.grid.spacing_mm:g} mm"
        if method in CONTRIBUTIONS:
            return f"{self.words}, a voxel"
        return f"{self.words}, per {'SD of the brain' if self.store.zscored else 'white matter'}'s intensity"

    def read(self, scan: str) -> tuple[np.ndarray, np.ndarray]:
        """Read a scan, float32, and its mask, both (depth, height, width)."""
        image, mask = self.store.read(scan)
        return image.astype(np.float32), mask

    def map(self, scan: str, method: str, *, model: nn.Module | None = None, image: np.ndarray | None = None,
            mask: np.ndarray | None = None) -> np.ndarray:
        """Make one map, not masked: (depth, height, width) float32; optionally for another model or a changed scan.

        Raises:
            MethodError, ValueError: see `kit.explain.saliency.attribution`.
        """
        if image is None:
            image, mask = self.read(scan)
        assert mask is not None  # an image comes with its mask
        return attribution(self.of(model or self.model, scan), image, mask, method, options=self.options)
