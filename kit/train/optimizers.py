"""Optimisers and learning rates: torch's own, and LARS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888) with momentum, as SimCLR uses them.

    A kernel or matrix moves by `lr * trust * |w| / |g + decay w|` times its gradient; groups with `adapt` false
    (biases, norms) move by plain momentum SGD.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                                  "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step from the gradients that are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                change = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["adapt"]:
                    long, steep = weight.norm(), change.norm()
                    change.mul_(torch.where((long > 0) & (steep > 0), group["trust"] * long / steep, 1.0))
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(change)
                weight.sub_(velocity, alpha=group["lr"])


def build_optimizer(objective: nn.Module, settings: Any) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases and norms.

    Args:
        objective: whose weights are trained.
        settings: `kit.train.loop.Settings`.
    """
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    groups = [{"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
              {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0}]
    if settings.optimizer == "lars":
        groups[1]["adapt"] = False
        return Lars(groups, lr=settings.learning_rate)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def learning_rate(settings: Any, progress: float) -> float:
    """The rate at a share (0 to 1) of the run: linear warm-up, then constant or half a cosine to zero."""
    if progress < settings.warmup_fraction:
        return settings.learning_rate * max(progress, 1e-3) / settings.warmup_fraction
    if settings.schedule == "constant":
        return settings.learning_rate
    rest = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))
