"""2_pretrain: train an encoder on unlabelled scans, in one process or several."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

import kit
from kit.augment.recipe import read_recipe
from kit.cohort.identity import joined, participant_ids, read_aliases
from kit.cohort.split import Splitting, fold_count, left_out, shuffled
from kit.cohort.tabular import read_table
from kit.device import check_gpu, device
from kit.machine import why_alone
from kit.models.encoder import Encoder
from kit.models.encoder_file import load_encoder, read_record, save_encoder
from kit.models.encoders import ViTEncoder, build_encoder
from kit.models.mae import reconstruct
from kit.models.reference import SCANS, Reference, fit_reference, save_reference
from kit.params import Pretrain
from kit.preprocess.quality import usable
from kit.provenance import OLDER, MadeFrom, Used, changes, made_from, read_made_from, write
from kit.reading import ParameterError, read_yaml
from kit.runs import Run, shown, write_table
from kit.seeding import rng_for
from kit.store.dataset import PreparedScans, collate
from kit.store.leakage import check_apart, seen_by
from kit.store.sampler import batches_of, session_batches
from kit.store.store import Store, unreadable
from kit.train import checkpoint
from kit.train.checkpoint import CheckpointError
from kit.train.distributed import (
    launch,
    launch_on_nodes,
    process_group,
    rank,
    synchronise_batch_norm,
    worker_of_slurm,
    world_size,
)
from kit.train.loop import Settings, TrainingError, as_counted, fit
from kit.train.monitor import embed, monitor_of
from kit.train.objectives import MaskedReconstruction, SimCLR
from kit.train.stop import NAME as STOP
from kit.train.stop import UNFINISHED, Stopped, interrupt_stops

DAMAGED = "damaged.csv"  # scans that cannot be read
Pretext = SimCLR | MaskedReconstruction  # the objectives of this step
OBJECTIVES: dict[str, type[Pretext]] = {"simclr": SimCLR, "mae": MaskedReconstruction}


def pretrain(params: Pretrain, run: Run) -> pd.DataFrame:
    """Pretrain an encoder, or resume where the run stopped; a finished run is only read.

    Writes `made_from.json`, `checkpoints/`, `log.csv`, `tensorboard/`, `reference.safetensors` (its training features,
    see `kit.models.reference`) and `encoder.safetensors`, the last epoch's encoder with its record. When asked to stop
    (by a file `stop` in the run's folder, or one interrupt), it writes a checkpoint and `unfinished.csv` and returns;
    the same parameters resume from there. With `epochs: 0` it trains nothing.

    Returns:
        one row per epoch, see `kit.train.loop.fit`; for an unfinished epoch, the means so far.

    Raises:
        CheckpointError: the run has other parameters or only damaged checkpoints, or its recipe's file, the scans that
            it learned from or their participants have changed since.
        LeakageError: a test participant or scan would be learned from, under another name or in another session.
        ParameterError: too few participants, or a batch has fewer scans than there are processes.
        DeviceError: torch does not see the GPUs of this Slurm job.
        NodesError, ChildFailedError: a worker process failed. In one process: see `kit.train.loop.fit`.
    """
    if (run / "encoder.safetensors").exists():
        if "views" in (record := read_record(run.folder)):
            now = {"views": read_recipe(recipe_of(params)).plain()}
            checkpoint.check_same({"params": {"views": record["views"]}}, now, run.folder)
        check_inputs(params, run.folder)
        return pd.read_csv(run / "log.csv")
    if params.epochs == 0:
        return pd.DataFrame()
    check_gpu()
    if not params.nodes and (words := why_alone()):
        print(words)
    check_start(params)
    check_files(params, run.folder)
    check_workers(params, run.folder)
    check_inputs(params, run.folder)
    stop, unfinished = run / STOP, run / UNFINISHED
    unfinished.unlink(missing_ok=True)
    try:
        with interrupt_stops(stop):
            if params.all_nodes() > 1:
                launch_on_nodes("kit.train.pretrain", run.folder, params.all_nodes(), params.workers)
            elif params.workers > 1:
                launch(_worker, (params.plain(), str(run.folder)), params.workers)
            else:
                train(params, run.folder)
    finally:
        stop.unlink(missing_ok=True)
    return pd.read_csv(unfinished if unfinished.exists() else run / "log.csv")


def check_files(params: Pretrain, folder: Path) -> None:
    """Check the scans' files before training; warn of missing or damaged ones and leave them out.

    Writes `damaged.csv` (scan, reason), which the training processes read. A scan left out when a run began stays out
    when it resumes, even if it has been repaired.

    Raises:
        CheckpointError: a scan that a resumed run learns from is missing or damaged now.
    """
    store, resumes = Store.open(params.prepared), _has_checkpoint(folder)
    damaged_before = _damaged(folder) if resumes else {}
    scans = pd.concat(choose_scans(params, store))["scan"].tolist()
    found = unreadable(store, [scan for scan in scans if scan not in damaged_before], params.verify)
    if resumes and found:
        raise CheckpointError(f"{len(found)} scans that {shown(folder)} began with are missing or damaged now: "
                              f"{', '.join(list(found)[:5])}{', ...' * (len(found) > 5)}. "
                              "Restore them, and it resumes; or give another output_dir")
    damaged = damaged_before | found
    write_table(folder / DAMAGED, pd.DataFrame({"scan": list(damaged), "reason": list(damaged.values())}, dtype=str))
    if damaged:
        warnings.warn(f"{len(damaged)} of {len(scans)} scans are missing or damaged and left out: "
                      f"{', '.join(list(damaged)[:5])}{', ...' * (len(damaged) > 5)}; see {shown(folder / DAMAGED)}. "
                      "Delete what is left of them and run 1_preprocess again", stacklevel=2)


def check_workers(params: Pretrain, folder: Path) -> None:
    """Check that every process gets a share of each batch.

    Raises:
        ParameterError: the smallest batch has fewer scans, or pairs of scans, than there are processes.
    """
    if params.processes() == 1:
        return
    every = batches_for(params, readable_scans(params, Store.open(params.prepared), folder)[0])
    epochs = range(params.epochs if params.sampling == "balanced" else 1)  # others have the same sizes in each
    least = min(len(batch) for epoch in epochs for batch in every(epoch)) // (2 if params.session_pairs else 1)
    if least < params.processes():
        raise ParameterError(f"workers: {params.processes()} processes, but {least} "
                             f"{'pairs of scans' if params.session_pairs else 'scans'} in the smallest batch (one per "
                             "participant): use fewer workers, a smaller batch_size, or more participants")


def readable_scans(params: Pretrain, store: Store, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Like `choose_scans`, without the scans that `check_files` found damaged when the folder's run began.

    Raises:
        ParameterError: fewer than two participants are left to learn from.
    """
    damaged = _damaged(folder)
    learned, validation = (rows[~rows["scan"].isin(damaged)] for rows in choose_scans(params, store))
    if participant_ids(learned).nunique() < 2:
        raise ParameterError(f"prepared: fewer than two participants are left to learn from: {len(damaged)} scans "
                             f"are missing or damaged; see {shown(folder / DAMAGED)}")
    return learned, validation


def _damaged(folder: Path) -> dict[str, str]:
    if not (folder / DAMAGED).exists():
        return {}
    table = read_table(folder / DAMAGED, text=("scan", "reason"))
    return dict(zip(table["scan"], table["reason"], strict=True))


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / f"checkpoints/{name}.pt").exists() for name in ("last", "previous"))


def pretrain_inputs(params: Pretrain, store: Store, folder: Path) -> MadeFrom:
    """What an encoder is made from; of the index, only the scans used and their participants count."""
    parts = zip(("learned from", "validation"), readable_scans(params, store, folder), strict=True)
    return made_from([Used("prepared", part, store, rows, participant_ids(rows)) for part, rows in parts],
                     read_aliases(params.aliases))


def check_inputs(params: Pretrain, folder: Path) -> None:
    """Check that a resumed run has the inputs that it began with; record those of a new run.

    The training processes read this record, and each checkpoint holds it too.

    Raises:
        CheckpointError: lists everything that has changed.
    """
    now = pretrain_inputs(params, Store.open(params.prepared), folder)
    if finished := (folder / "encoder.safetensors").exists():
        kept = read_record(folder)  # the record beside the weights counts
    elif begun := checkpoint.read_checkpoint(folder / "checkpoints"):
        kept = begun["params"]
    else:
        write(folder, now)
        return
    if "made_from" not in kept:
        raise CheckpointError(f"{shown(folder)} is {OLDER}; give another output_dir, or delete that folder")
    before = read_made_from(folder)
    if before is None or before.record != kept["made_from"]:
        before = MadeFrom(kept["made_from"])
    if before.record["kit"] != kit.__version__:
        print(f"{shown(folder)} was started with kit {before.record['kit']}; this is {kit.__version__}")
    if lines := changes(before._replace(record={**before.record, "kit": kit.__version__}), now):
        raise CheckpointError(f"{shown(folder)} was trained on other inputs than are there now:\n  "
                              + "\n  ".join(lines) + "\ngive another output_dir, or delete that folder"
                              + ("" if finished else "; or restore the inputs, and it resumes"))
    if read_made_from(folder) is None:
        write(folder, MadeFrom(before.record, now.rows))


def status(params: Pretrain, run: Run) -> str:
    """Say in one line how far a run is."""
    if (run / "encoder.safetensors").exists():
        return f"finished: {params.epochs} epochs"
    state = checkpoint.read_checkpoint(run / "checkpoints")
    if state is None:
        return "nothing trained yet"
    place = state["position"]
    if place["epoch"] >= params.epochs:
        return "UNFINISHED: all epochs are done, but not the encoder's file; run again with the same parameters"
    return (f"UNFINISHED: stopped in epoch {place['epoch'] + 1} of {params.epochs} after {place['step']} of its steps; "
            "run again with the same parameters to go on")


def choose_scans(params: Pretrain, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the index to learn from, and rows of the validation participants.

    Unless `leave_out_test` is false, both exclude the test participants: of this fold or, if the index has no column
    `split`, of the single split; see `kit.cohort.split.left_out`.

    Raises:
        ParameterError: fewer than two participants are left to learn from.
    """
    every = joined(store.index, read_aliases(params.aliases))
    index = every[usable(every, params.accept_flags)]
    asked = index[index["split"] == params.split] if "split" in index else index
    rows = asked[~_tested(params, every, asked)]
    ids = participant_ids(rows)
    validating = set(shuffled(ids, params.seed, "held out")[:round(params.validation_fraction * ids.nunique())])
    learned, validation = rows[~ids.isin(validating)], rows[ids.isin(validating)]
    if (people := participant_ids(learned).nunique()) < 2:
        flagged = f", {len(every) - len(index)} of them unusable and left out"
        tests = f", {len(asked) - len(rows)} left out for testing (leave_out_test)" * _leaves_out(params, every)
        raise ParameterError(
            f"split: {params.split!r} leaves {len(learned)} scans of {people} participants to learn from, besides "
            f"{len(validation)} for validation; at least two participants are needed. In {shown(store.folder)} "
            f"{store.contents()}{flagged}{tests}")
    return learned, validation


def _leaves_out(params: Pretrain, index: pd.DataFrame) -> bool:
    """Whether test participants must be left out here; outside cross-validation, a column `split` already does so."""
    return params.leave_out_test and (Splitting.of(params).cross_validated or "split" not in index)


def _tested(params: Pretrain, every: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """Which rows are of participants who will be tested, decided on the whole index."""
    if not _leaves_out(params, every):
        return pd.Series(False, rows.index)
    ids = participant_ids(every)
    return participant_ids(rows).isin(set(ids[left_out(every, Splitting.of(params), params.fold)]))


def check_start(params: Pretrain) -> None:
    """Print who is left out of pretraining, and check that no test participant and no test scan is learned from.

    Raises:
        LeakageError: a test participant or scan would be learned from, under another name or in another session.
    """
    store, aliases = Store.open(params.prepared), read_aliases(params.aliases)
    index, splitting = joined(store.index, aliases), Splitting.of(params)
    if not params.leave_out_test:
        print("leave_out_test: false: nobody is left out, and 3_finetune and 5_benchmark refuse to test the encoder on "
              "whom it has seen; test it on others")
        return
    learned = pd.concat(choose_scans(params, store))
    if _leaves_out(params, index):
        test = index[_tested(params, index, index)]
        folds = splitting.cross_validated and fold_count(index, splitting)
        why = f"fold {params.fold} of {folds}" if folds else "no column split"
        print(f"{why}: {participant_ids(test).nunique()} of {participant_ids(index).nunique()} participants are left "
              "out, for testing (leave_out_test)")
        if "split" in index:
            test = pd.concat([test, index[index["split"] == "out_of_distribution"]])
    else:
        test = index[index["split"].isin(["test", "out_of_distribution"])]
    check_apart({name: (store, rows, participant_ids(rows)) for name, rows in (("pretrain", learned), ("test", test))},
                aliases)


def build_objective(params: Pretrain, store: Store) -> Pretext:
    """Build the objective, with random weights drawn from the seed.

    Raises:
        ValueError: the objective has no branch here.
    """
    encoder = build_encoder(params.architecture, store.grid, params.seed)
    if params.objective == "mae":
        return MaskedReconstruction(
            cast(ViTEncoder, encoder), params.mask_ratio, seed=params.seed, normalise=params.normalise_patches,
            recipe=read_recipe(recipe_of(params)), spacing_mm=store.grid.spacing_mm, zscored=store.zscored)
    if params.objective == "simclr":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(params.seed)
            return SimCLR(encoder, read_recipe(recipe_of(params)), projection=params.projection,
                          temperature=params.temperature, seed=params.seed, spacing_mm=store.grid.spacing_mm,
                          paired=params.session_pairs, zscored=store.zscored)
    raise ValueError(f"no objective {params.objective!r}; there are {', '.join(OBJECTIVES)}")


def compared_rows(params: Pretrain, validation: pd.DataFrame) -> pd.DataFrame:
    """Validation rows for the loss and the monitor: one per participant if the objective compares scans, else all.

    Two sessions of one person must not be negatives of each other; training batches see to that, too.
    """
    first = ~participant_ids(validation).duplicated()
    return validation[first] if OBJECTIVES[params.objective].compares else validation


def batches_for(params: Pretrain, learned: pd.DataFrame) -> Callable[[int], list[list[int]]]:
    """The global batches of each epoch, as set by the parameters."""
    participants, datasets = participant_ids(learned).tolist(), learned["dataset"].astype(str).tolist()
    if params.session_pairs:
        return lambda epoch: session_batches(participants, params.batch_size, params.seed, epoch)
    return lambda epoch: batches_of(participants, datasets, params.batch_size, params.seed, epoch, params.sampling)


def by_chance(params: Pretrain, learned: pd.DataFrame) -> float:
    """Share of views that find their partner by chance, averaged over batches, as their sizes may differ."""
    sizes = [len(batch) // (2 if params.session_pairs else 1) for batch in batches_for(params, learned)(0)]
    return float(np.mean([1 / (2 * size - 1) for size in sizes]))


def _restored(params: Pretrain, run: Run) -> tuple[Pretext, Store]:
    """The objective with the last checkpoint's weights, and its store."""
    store = Store.open(params.prepared)
    model = build_objective(params, store)
    state = checkpoint.read_checkpoint(run / "checkpoints")
    if state is None:
        raise CheckpointError(f"{shown(run / 'checkpoints')}: no checkpoint; restore it, or pretrain again")
    model.load_state_dict(checkpoint.weights(state))
    return model, store


def reconstructions(params: Pretrain, run: Run, scans: int = 3) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Validation scans of an MAE run: the scan, what the network sees, and the same with its predictions filled in.

    Each is (depth, height, width) on the scale of the targets, see `kit.models.mae.reconstruct`: with
    `normalise_patches`, each patch minus its mean, over its SD. Without validation scans, training scans are shown.
    """
    objective, store = _restored(params, run)
    model = cast(MaskedReconstruction, objective)
    learned, validation = readable_scans(params, store, run.folder)
    some = PreparedScans(store, validation if len(validation) else learned)
    batch = collate([some[number] for number in range(min(scans, len(some)))]).to(torch.device("cpu"))
    masked = model.eval().masks(batch, 0)
    true, seen, filled = (part[:, 0].numpy() for part in
                          reconstruct(model.autoencoder, batch.images, masked, params.normalise_patches))
    return list(zip(true, seen, filled, strict=True))


def pretrained_encoder(run: Run, params: Pretrain | None = None) -> tuple[Encoder, dict[str, Any]]:
    """Load a run's encoder with its record; with `params`, an unfinished run's from its last checkpoint."""
    if params and not (run / "encoder.safetensors").exists():
        model, store = _restored(params, run)
        return model.encoder, record_of(params, store, model, _made(run.folder), run.folder)
    record = read_record(run.folder)
    return load_encoder(run.folder, record["preparation"])


def recipe_of(params: Pretrain) -> str:
    """Name or file of the recipe for the objective's views."""
    return params.mae_recipe if params.objective == "mae" else params.recipe


def _made(folder: Path) -> MadeFrom:
    """What a run that has begun is made from, as `check_inputs` wrote it."""
    made = read_made_from(folder)
    assert made is not None
    return made


def views_of(objective: Pretext) -> dict[str, Any]:
    """The recipe as it was when the objective was built, under `views`, because its file may change later."""
    return {"views": objective.recipe.plain()}


def record_of(params: Pretrain, store: Store, objective: Pretext, made: MadeFrom, folder: Path) -> dict[str, Any]:
    """Record for an encoder's file, see `kit.models.encoder_file`; the folder is the run's."""
    rows = pd.concat(readable_scans(params, store, folder))
    return {"kit": kit.__version__, "architecture": params.architecture, "objective": params.objective,
            "preparation": store.record, "params": params.plain(),
            **seen_by(store, rows, participant_ids(rows), read_aliases(params.aliases)), **views_of(objective),
            "made_from": made.record}


def _pass_of_each_batch(epoch: int, number: int) -> tuple[int, int]:
    """The `Place` (pass, batch within it) for balanced epochs: each batch is a pass of its own.

    Such an epoch repeats the scans of small datasets, and views are keyed by the pass, so that a repeated scan gets new
    ones. Passes of two epochs stay apart as long as an epoch has fewer than 65,536 batches.
    """
    return (epoch << 16) + number, 0


def train(params: Pretrain, folder: Path) -> None:
    """Train in this process, alone or as one of several that `pretrain` started."""
    if rank() == 0 and (where := device()).type == "cuda":
        print(f"training on {world_size()} x {torch.cuda.get_device_name(where)}", flush=True)
    store = Store.open(params.prepared)
    learned, validation = readable_scans(params, store, folder)
    objective = build_objective(params, store)
    if world_size() > 1:
        synchronise_batch_norm(objective)
    same = {name: value for name, value in params.plain().items() if name not in {*params.may_change, "output_dir"}}
    made = _made(folder)  # written by the process that started this one
    same |= views_of(objective) | {"made_from": made.record}
    try:
        compared = compared_rows(params, validation)
        scans, held_out = PreparedScans(store, learned), PreparedScans(store, compared)
        fit(objective, scans, batches_for(params, learned), held_out, Settings.of(params), folder, params=same,
            stop=folder / STOP, live=True, place=_pass_of_each_batch if params.sampling == "balanced" else as_counted,
            monitor=monitor_of(scans, held_out, compared, params.monitor_epochs, params.epochs))
    except Stopped as stopped:
        if rank() == 0:
            write_table(folder / UNFINISHED, stopped.log)
        return
    if rank() == 0:
        if lines := changes(made, pretrain_inputs(params, store, folder)):
            print("CHANGED WHILE IT WAS TRAINED: " + "; ".join(lines))
            made.record["changed"] = lines
        record = record_of(params, store, objective, made, folder)
        save_reference(folder, _reference_of(params, objective, store, learned, validation))
        save_encoder(folder / "encoder.safetensors", objective.encoder, record)


def _reference_of(params: Pretrain, objective: Pretext, store: Store, learned: pd.DataFrame,
                  validation: pd.DataFrame) -> Reference:
    """Fit the encoder's reference features; of many training scans a subset, drawn by the seed."""
    drawn = rng_for(params.seed).permutation(len(learned))[:SCANS]
    features = embed(objective, PreparedScans(store, learned.iloc[drawn]), views=False)[0].numpy()
    held_out = embed(objective, PreparedScans(store, validation), views=False)[0].numpy() if len(validation) else None
    if not np.isfinite(features).all():
        raise TrainingError("the network's features are not finite after the last step: lower learning_rate, or set "
                            "clip: 1")
    return fit_reference(features, features[:0] if held_out is None else held_out)


def _worker(plain: dict[str, Any], folder: str) -> None:
    """Train as one of several processes; see `kit.train.distributed.launch`."""
    with process_group():
        train(Pretrain.model_validate(plain), Path(folder))


def _train_noted(folder: Path) -> None:
    train(Pretrain.model_validate(read_yaml(folder / "params.yaml")), folder)


if __name__ == "__main__":  # python -m kit.train.pretrain FOLDER WORKERS, started by `launch_on_nodes`
    worker_of_slurm(Path(sys.argv[1]), int(sys.argv[2]), _train_noted)
