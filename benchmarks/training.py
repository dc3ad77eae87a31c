"""The loss, against the paper's public code's way of computing it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.ratio import Ratio, cpu_seconds, times_better
from kit.train.loss import nt_xent


def broadcast_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent through a cosine similarity broadcast over (2N, 2N, width), as many public codes have it."""
    views = torch.cat([first, second])
    count = len(views)
    similarity = nn.CosineSimilarity(dim=2)(views.unsqueeze(1), views.unsqueeze(0)) / temperature
    partner = torch.arange(count).roll(count // 2)
    positives = similarity[torch.arange(count), partner].unsqueeze(1)
    others = torch.ones(count, count, dtype=torch.bool)
    others[torch.arange(count), torch.arange(count)] = False
    others[torch.arange(count), partner] = False
    logits = torch.cat([positives, similarity[others].view(count, -1)], dim=1)
    return nn.functional.cross_entropy(logits, torch.zeros(count, dtype=torch.long))


def measure() -> list[Ratio]:
    """NT-Xent forward and backward at the paper's global batch of 72, and at 512; 64-d embeddings."""
    ratios = []
    for batch, goal, repeats in ((72, 40, 20), (512, 150, 3)):
        first, second = (part.requires_grad_() for part in torch.randn(2, batch, 64).unbind())
        ours, peer = cpu_seconds(lambda _, pair=(first, second): nt_xent(*pair, 0.5)[0].backward(),
                                 lambda _, pair=(first, second): broadcast_nt_xent(*pair, 0.5).backward(),
                                 repeats=repeats)
        ratios.append(times_better(f"ntxent_vs_paper_{batch}", ours, peer, goal, "CPU-seconds",
                                   f"forward and backward, {batch} pairs of 64 dimensions, one thread, against a "
                                   "cosine similarity broadcast over (2N, 2N, 64)"))
    return ratios
