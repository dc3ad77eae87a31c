"""A model, what is asked of it, and how: what maps and their checks are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import nn

from kit.explain.saliency import DEFAULTS, Options, attribution
from kit.store.store import Store


class Asked(NamedTuple):
    """What maps are made with.

    Attributes:
        model: that is explained.
        of: a model and a scan's name -> a module that gives one number a scan; see `kit.explain.targets.Question`.
        words: what that number is.
        store: of the scans.
        options: of the methods.
    """

    model: nn.Module
    of: Callable[[nn.Module, str], nn.Module]
    words: str
    store: Store
    options: Options = DEFAULTS

    def read(self, scan: str) -> tuple[np.ndarray, np.ndarray]:
        """A scan, float32, and its mask: (depth, height, width) both."""
        image, mask = self.store.read(scan)
        return image.astype(np.float32), mask

    def map(self, scan: str, method: str, *, model: nn.Module | None = None, image: np.ndarray | None = None,
            mask: np.ndarray | None = None) -> np.ndarray:
        """One map, uncut: (depth, height, width) float32; of another model or of a changed scan where they are given.

        Raises:
            MethodError, ValueError: see `kit.explain.saliency.attribution`.
        """
        if image is None:
            image, mask = self.read(scan)
        return attribution(self.of(model or self.model, scan), image, mask, method, options=self.options)
