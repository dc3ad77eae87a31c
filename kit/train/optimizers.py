"""Optimisers and learning rates: torch's own, and LARS."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kit.reading import ParameterError


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888) with momentum, as SimCLR uses them.

    A kernel or matrix has the learning rate `lr * trust * |w| / |g + decay w|`; groups with `adapt` false (biases,
    norms) follow plain momentum SGD.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                                  "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # calls no closure
        """Take one step with the current gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                change = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["adapt"]:
                    weight_norm, change_norm = weight.norm(), change.norm()
                    change.mul_(torch.where(
                        (weight_norm > 0) & (change_norm > 0), group["trust"] * weight_norm / change_norm, 1.0))
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(change)
                weight.sub_(velocity, alpha=group["lr"])


def build_optimizer(objective: nn.Module, settings: Any) -> torch.optim.Optimizer:
    """Build the optimiser; weight decay acts on parameters of two or more dimensions, not on biases and norms.

    With `layer_decay`, a group's learning rate is the run's times its `scale`: 1 for the head and a final norm,
    `layer_decay` for the encoder's last stage, its square for the one before (as in BEiT, Bao et al. 2022).

    Args:
        objective: module to train.
        settings: `kit.train.loop.Settings`.

    Raises:
        ParameterError: `layer_decay` is not 1, and `depths_of` finds no stages in the network.
    """
    weights = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    scales = dict.fromkeys(weights, 1.0)
    if settings.layer_decay != 1:
        depths = depths_of(list(weights))
        scales = {name: settings.layer_decay ** (max(depths.values()) - depth) for name, depth in depths.items()}
    groups = []
    for scale in dict.fromkeys(scales.values()):
        here = [weight for name, weight in weights.items() if scales[name] == scale]
        groups += [{"params": [weight for weight in here if weight.ndim > 1], "weight_decay": settings.weight_decay,
                    "scale": scale},
                   {"params": [weight for weight in here if weight.ndim <= 1], "weight_decay": 0.0, "scale": scale}]
        if settings.optimizer == "lars":
            groups[-1]["adapt"] = False
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "lars":
        return Lars(groups, lr=settings.learning_rate)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


# of ResNet, ViT, DenseNet; only a stage has submodules, unlike the final norm that MONAI appends to a ViT's `blocks`
STAGE = re.compile(r"\.(?:layer|blocks\.|denseblock|transition)(\d+)\.\w+\.")


def depths_of(names: list[str]) -> dict[str, int]:
    """Depth of each parameter: 0 in the stem, from 1 in a ResNet's stages or a ViT's or DenseNet's blocks.

    What follows, a final norm and the head, is one deeper than the last of them.

    Args:
        names: of the parameters, in the network's order.

    Raises:
        ParameterError: no name tells a stage.
    """
    found = {name: int(match[1]) for name in names if (match := STAGE.search(name))}
    if not found:
        raise ParameterError(f"layer_decay: no stages in the parameters {', '.join(names[:3])}, ...: set it to 1, or "
                             "add what the network calls its stages to STAGE in kit/train/optimizers.py")
    order = {number: depth for depth, number in enumerate(sorted(set(found.values())), 1)}
    first = names.index(next(iter(found)))
    return {name: order[found[name]] if name in found else (len(order) + 1) * (place > first)
            for place, name in enumerate(names)}


def learning_rate(settings: Any, progress: float) -> float:
    """Learning rate at a fraction (0 to 1) of the run.

    Linear warm-up, never below 1 % of the full rate, then constant or a half cosine to zero.
    """
    if progress < settings.warmup_fraction:
        return settings.learning_rate * max(progress / settings.warmup_fraction, 0.01)
    if settings.schedule == "constant":
        return settings.learning_rate
    rest = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))
