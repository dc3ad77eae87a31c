"""NT-Xent (Chen et al. 2020, equation 1) as one matrix product and a cross-entropy."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from kit.train.distributed import rank, world_size


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float,
            gather: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Each view must find the other view of its scan among all other views of the batch.

    Args:
        first, second: (scans, width) embeddings of the two views; of this process's share of the batch.
        temperature: divides the cosine similarities.
        gather: compare with the embeddings of all processes; their gradients are summed over processes, so
            that with DDP's mean, N processes equal one process with the whole batch.

    Returns:
        the mean loss over this process's views, and the share of views whose most similar view is the
        right one; float32 scalars.
    """
    scans = len(first)
    own = F.normalize(torch.cat([first, second]).float(), dim=1)
    gathered = gather and dist.is_initialized() and world_size() > 1
    everyone = torch.cat(all_gather(own)) if gathered else own
    start = 2 * scans * rank() if gathered else 0

    place = torch.arange(2 * scans, device=own.device)
    logits = own @ everyone.T / temperature  # (2 scans, 2 scans x processes)
    logits[place, start + place] = -torch.inf  # a view is not compared with itself
    target = start + (place + scans) % (2 * scans)
    return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
