"""2_pretrain: an encoder from unlabelled scans, in this process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import kit
from kit.augment.recipe import read_recipe
from kit.data.loader import PreparedScans, collate, epoch_batches
from kit.data.split import participant_hash, participant_ids, shuffled
from kit.data.store import Store
from kit.models.encoder_file import load_encoder, save_encoder
from kit.models.encoders import build_encoder
from kit.models.mae import MaskedAutoencoder, reconstruct
from kit.params import Pretrain
from kit.runs import Run
from kit.train import checkpoint
from kit.train.distributed import launch, process_group, rank, synchronise_batch_norm
from kit.train.loop import Settings, fit
from kit.train.objectives import MaskedReconstruction, SimCLR


def pretrain(params: Pretrain, run: Run) -> pd.DataFrame:
    """Pretrain an encoder, or go on where the run stopped; a finished run is only read.

    Leaves `checkpoints/`, `log.csv` and `encoder.safetensors`, the last epoch's encoder with its record.

    Returns:
        one row an epoch, see `kit.train.loop.fit`.
    """
    if (run / "encoder.safetensors").exists():
        return pd.read_csv(run / "log.csv")
    if params.workers == 1:
        _train(params, run.folder)
    else:
        launch(_worker, (params.plain(), str(run.folder)), params.workers)
    return pd.read_csv(run / "log.csv")


def choose_scans(params: Pretrain, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the index to learn from, and those of the participants that are held out."""
    index = store.index
    rows = index[index["split"] == params.split] if "split" in index else index
    ids = participant_ids(rows)
    out = set(shuffled(ids, params.seed, "held out")[:round(params.validation_fraction * ids.nunique())])
    return rows[~ids.isin(out)], rows[ids.isin(out)]


def build_objective(params: Pretrain, store: Store) -> nn.Module:
    """The objective with an encoder of random weights, both decided by the seed."""
    encoder = build_encoder(params.architecture, store.grid.shape, params.seed)
    if params.objective == "mae":
        return MaskedReconstruction(encoder, params.mask_ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        return SimCLR(encoder, read_recipe(params.recipe), projection=params.projection,
                      temperature=params.temperature, seed=params.seed, spacing_mm=store.grid.spacing_mm)


def reconstructions(params: Pretrain, run: Run, scans: int = 3) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Held-out scans of an MAE run: the scan, what the network sees, what it fills in; each (depth, height, width)."""
    store = Store.open(params.prepared)
    model = build_objective(params, store)
    model.load_state_dict(checkpoint.load(run / "checkpoints")["model"])
    held_out = PreparedScans(store, choose_scans(params, store)[1])
    images = collate([held_out[number] for number in range(min(scans, len(held_out)))]).images.float()
    seen, filled = reconstruct(MaskedAutoencoder(model.encoder, params.mask_ratio).eval(), images, params.seed)
    return [tuple(part[number, 0].numpy() for part in (images, seen, filled)) for number in range(len(images))]


def pretrained_encoder(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder that a run left, with its record."""
    from kit.models.encoder_file import read_record

    record = read_record(run.folder)
    return load_encoder(run.folder, record["preparation"])


def _worker(plain: dict[str, Any], folder: str) -> None:
    """One of several processes; see `kit.train.distributed.launch`."""
    with process_group():
        _train(Pretrain.model_validate(plain), Path(folder))


def _train(params: Pretrain, folder: Path) -> None:
    store = Store.open(params.prepared)
    learned, held_out = choose_scans(params, store)
    objective = build_objective(params, store)
    if params.workers > 1:
        synchronise_batch_norm(objective)
    participants = participant_ids(learned).tolist()
    fit(objective, PreparedScans(store, learned),
        lambda epoch: epoch_batches(participants, params.batch_size, params.seed, epoch),
        PreparedScans(store, held_out), Settings.of(params), folder)
    if rank() == 0:
        seen = sorted({participant_hash(name) for name in participant_ids(pd.concat([learned, held_out]))})
        save_encoder(folder / "encoder.safetensors", objective.encoder, {
            "kit": kit.__version__, "architecture": params.architecture, "objective": params.objective,
            "preparation": store.record, "participants": seen, "params": params.plain()})
