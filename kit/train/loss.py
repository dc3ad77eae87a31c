"""NT-Xent (Chen et al. 2020, equation 1) as one matrix product and a cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kit.device import at_least_float32, no_autocast
from kit.train import distributed


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float,
            gather: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Score how well each view finds the other view of its scan among all other views of the batch.

    Args:
        first, second: (scans, width) embeddings of the two views, of this process's share of the batch. Half
            precision is raised to float32 and float64 is kept, even under autocast.
        temperature: divides the cosine similarities.
        gather: compare with the embeddings of all processes, which must have equally many scans. Their gradients are
            summed over processes, so with DDP's mean, N processes equal one process with the whole batch.

    Returns:
        the mean loss over this process's views, and the share of views whose most similar view is the right one;
        scalars of at least float32.
    """
    scans = len(first)
    views = torch.cat([first, second])
    with no_autocast(views.device):
        own = F.normalize(at_least_float32(views), dim=1)
        gathered = gather and distributed.world_size() > 1
        everyone = distributed.gather(own) if gathered else own
        start = 2 * scans * distributed.rank() if gathered else 0

        itself = own.new_zeros(2 * scans, len(everyone))
        itself.diagonal(start).fill_(-torch.inf)  # a view is not compared with itself
        logits = torch.addmm(itself, own, everyone.T, alpha=1 / temperature)  # (2 scans, 2 scans x processes)
        target = start + torch.arange(2 * scans, device=own.device).roll(scans)
        return F.cross_entropy(logits, target), (logits.detach().argmax(1) == target).to(own.dtype).mean()
