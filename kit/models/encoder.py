"""The base class of all encoders, for annotations that need no network."""

from __future__ import annotations

from torch import nn


class Encoder(nn.Module):
    """A network from scans (batch, 1, depth, height, width) to features (batch, `features`)."""

    features: int
    rescales = False  # whether it normalises each scan itself: its output does not depend on the scan's scale
