"""The gradient of one optimiser step: batches accumulated, large ones in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from kit.data.loader import Batch
from kit.models.precision import autocast
from kit.train.distributed import rank, world_size

Cuts = list[list[int]]  # this process's scans of one batch, in chunks


def cut(batch: list[int], chunk: int) -> Cuts:
    """This process's share of a global batch (equal parts, so that each counts the same), in chunks.

    Args:
        batch: scan numbers.
        chunk: scans at a time; 0 takes the whole share.

    Raises:
        ValueError: there are more processes than scans.
    """
    each = len(batch) // world_size()
    if not each:
        raise ValueError(f"a batch of {len(batch)} scans (one of a participant) for {world_size()} processes: take "
                         "fewer workers, or more participants")
    share = batch[rank() * each:(rank() + 1) * each]
    size = chunk or each
    return [share[start:start + size] for start in range(0, each, size)]


def reads(step: list[Cuts], twice: bool) -> Cuts:
    """The order in which `gradients` takes scans from the loader; chunks that are run again are read again."""
    return [part for cuts in step for part in (cuts * 2 if twice and len(cuts) > 1 else cuts)]


def gradients(model: nn.Module, objective: nn.Module, stream: Iterator[Batch], step: list[Cuts], epoch: int,
              number: int, seed: int, precision: str = "fp32") -> dict[str, torch.Tensor]:
    """Add the gradient of the mean loss of a step's batches to the weights' gradients.

    A batch in chunks: an objective with `embed` and `compare` (SimCLR) embeds chunk by chunk without graph, takes
    the loss's gradient at the embeddings, and runs each chunk again with it (gradient caching, Gao et al. 2021,
    arXiv 2101.06983); memory is that of one chunk, and BatchNorm sees the chunk. Any other objective's loss is a
    mean over scans, whose chunks just add up.

    Args:
        model: `objective`, or its DistributedDataParallel.
        stream: of the batches that `reads` names.
        step: the batches, in chunks.
        number: of the step's first batch within the epoch; with seed and epoch it keys the random state.

    Returns:
        means over the step of what the objective reports, on this process.
    """
    reports = []
    for place, cuts in enumerate(step):
        seeds = np.random.SeedSequence([seed, epoch, number + place, rank()]).generate_state(len(cuts)).tolist()
        last = place == len(step) - 1
        if len(cuts) > 1 and hasattr(objective, "compare"):
            reports.append(_cached(model, objective, stream, seeds, epoch, len(step), last, precision))
            continue
        scans = sum(len(part) for part in cuts)
        parts = []
        for part, part_seed in zip(cuts, seeds, strict=True):
            weight = len(part) / scans
            with _exchange(model, last and part is cuts[-1]):
                out = run_model(model, next(stream), epoch, part_seed, precision)
                (out["loss"] * (weight / len(step))).backward()
            parts.append({name: value.detach() * weight for name, value in out.items()})
        reports.append({name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]})
    return {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}


@contextmanager
def fitting(step: list[Cuts]) -> Iterator[None]:
    """Where a step does not fit into memory, name the chunk to try.

    Raises:
        MemoryError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no type of its own
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        scans = max(len(part) for cuts in step for part in cuts)
        cure = (f"set `chunk: {scans // 2}` (the loss stays that of the whole batch; BatchNorm then sees the chunk), "
                "or spread the batch over more workers") if scans > 1 else "take a coarser grid or a smaller network"
        raise MemoryError(f"out of memory with {scans} scans at a time: {cure}") from error


def _cached(model: nn.Module, objective: nn.Module, stream: Iterator[Batch], seeds: list[int], epoch: int,
            batches: int, last: bool, precision: str) -> dict[str, torch.Tensor]:
    with torch.no_grad(), _still_statistics(objective):
        parts = [run_model(objective, next(stream), epoch, seed, precision, embed=True) for seed in seeds]
    embeddings = torch.cat(parts, dim=1).requires_grad_()  # (2, scans, width)
    out = objective.compare(*embeddings)
    (out["loss"] / batches).backward()
    for part, gradient, seed in zip(parts, embeddings.grad.split([part.shape[1] for part in parts], 1), seeds,
                                    strict=True):
        with _exchange(model, last and part is parts[-1]):
            run_model(model, next(stream), epoch, seed, precision, embed=True).backward(gradient)
    return {name: value.detach() for name, value in out.items()}


def run_model(model: nn.Module, batch: Batch, epoch: int, seed: int, precision: str, **options: bool):
    """What an objective makes of a batch in "fp32" or "bf16"; the seed is of torch's random state."""
    torch.manual_seed(seed)
    where = next(model.parameters()).device
    with autocast(precision, where):
        return model(batch.to(where), epoch, **options)


def _exchange(model: nn.Module, now: bool):
    """Processes exchange gradients only when the last part of a step goes backward."""
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()


@contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics stay as they are: the second pass over a chunk counts, not the first."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
