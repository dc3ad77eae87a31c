"""Does a saliency map depend on what the model has learnt? The model parameter randomisation check.

Adebayo et al., Sanity Checks for Saliency Maps, arXiv 1810.03292: draw the map again from a model whose
weights are random, and compare. A rank correlation near 0 means that the map comes from the learnt weights.
Near 1 means that the picture would look the same had the model learnt nothing: it shows the scan (its edges)
or the network's layout, and must not be read as what the model uses. Integrated gradients multiply by
the image, so that part of any agreement is the image itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn

from kit.explain.saliency import Maps, saliency
from kit.provenance import write_stamped
from kit.runs import Run
from kit.store.store import Store


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model with the weights of all layers drawn anew; the model itself is left alone.

    Layers draw by their own `reset_parameters`; BatchNorm forgets its running statistics too. Parameters that
    no such layer owns (class tokens, position embeddings) are drawn from a normal distribution of the mean
    and standard deviation they had. Drawn on the CPU, so that a seed gives the same copy on every device.
    """
    device = next(model.parameters()).device
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # A stream of its own: the plain seed could draw the very weights that training started from.
        torch.manual_seed(int(np.random.SeedSequence([1810, 3292, seed]).generate_state(1)[0]))
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
                continue
            for parameter in module.parameters(recurse=False):
                parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())
    return fresh.to(device)


def rank_correlation(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> float:
    """Spearman's rank correlation, -1 to 1, of two maps' absolute values inside a mask.

    All are (depth, height, width). nan where a map is constant inside the mask: it then has no ranks.
    """
    inside = np.asarray(mask, dtype=bool)
    first, second = np.abs(first[inside]), np.abs(second[inside])
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def randomisation_check(model: nn.Module, store: Store, maps: Maps, n_steps: int, seeds: Sequence[int],
                        run: Run) -> pd.DataFrame:
    """Compare the first scan's maps with those that randomly initialised copies of the model give for it.

    Args:
        model, maps, n_steps: the trained model, its maps, and how these were made; see `saliency`.
        store: of the scans.
        seeds: one randomised copy each.

    Returns:
        A row per seed and method: `method`, `seed`, `rank_correlation` (what it means: the module's text); also
        written to `randomisation.csv`.
    """
    first = next(iter(maps))[0]
    image, mask = store.read(first)
    rows = []
    for seed in seeds:
        fresh = reinitialised(model, seed)
        for method, found in ((method, found) for (scan, method), found in maps.items() if scan == first):
            random_map = saliency(fresh, image, mask, method, n_steps=n_steps)
            rows.append((method, seed, rank_correlation(found, random_map, mask)))
    table = pd.DataFrame(rows, columns=["method", "seed", "rank_correlation"])
    write_stamped(run / "randomisation.csv", table)
    return table
