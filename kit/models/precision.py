"""What may run in bfloat16 and what does not.

With `precision: bf16`, convolutions and matrix products of the network do while it trains. Views, the mean over places
or patches that makes the features, heads, losses and everything that is predicted, embedded or validated are float32
at least, whatever autocast says outside: bfloat16 has three digits, which makes ties of an AUC and steps of an age.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def autocast(precision: str, where: torch.device) -> torch.autocast:
    """The precision of a training step on a device: "bf16", or "fp32" whatever autocast says outside."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16")


def no_autocast(where: torch.device) -> torch.autocast:
    """What stands inside runs in the precision of its tensors."""
    return torch.autocast(where.type, enabled=False)


@contextmanager
def evaluation(where: torch.device) -> Iterator[None]:
    """For predictions and features: no autocast, and convolutions without TF32, whose ten bits CUDA takes by itself."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(where):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision is raised; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
