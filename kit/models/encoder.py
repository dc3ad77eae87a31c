"""What every encoder is, for those who take one."""

from __future__ import annotations

from torch import nn


class Encoder(nn.Module):
    """A network from scans (batch, 1, depth, height, width) to features (batch, `features`)."""

    features: int
