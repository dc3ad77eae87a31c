"""Fine-tuning: train all weights on a label, with learning rate and stopping point chosen on validation.

`tune` makes the choices and calls `train` for each try; `train` runs `train_here`, in this process or in several.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from kit.device import device
from kit.evaluate.metrics import NotFiniteError, bootstrap, per_participant, predicted_of, statistic
from kit.evaluate.predict import in_label_units, predict
from kit.evaluate.tasks import Task
from kit.models.encoder import Encoder
from kit.models.encoders import VIT_SIZES
from kit.models.heads import Predictor
from kit.params import Tuning
from kit.reading import ParameterError
from kit.runs import link_whole, write_table, write_whole
from kit.store.sampler import all_batches, batches_between
from kit.train import checkpoint
from kit.train.distributed import (
    launch,
    launch_on_nodes,
    process_group,
    rank,
    synchronise_batch_norm,
    worker_of_slurm,
    world_size,
)
from kit.train.loop import MAY_CHANGE, Settings, TrainingError, fit
from kit.train.objectives import Supervised
from kit.train.stop import NAME as STOP
from kit.train.stop import UNFINISHED, Stopped, interrupt_stops

TRIES = "tries"  # in `tune`'s folder: each try's log and checkpoints
JOB = "job.pt"  # in the run's folder: the `Job` that worker processes read
DIVERGED = "diverged.txt"  # beside job.pt: why training in worker processes diverged
LONGER = 3  # times the steps and the patience, in the check of whether training was long enough
# may differ when a longer training continues a shorter one at a constant rate: the warm-up has as many steps, which are
# a smaller fraction of more epochs
LENGTH = {"epochs", "patience", "warmup_fraction"}
VALIDATION_DRAWS = 200  # of the bootstrap, for a validation score


class Choice(NamedTuple):
    """Hyperparameters chosen on validation."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model and how it was trained.

    Attributes:
        predictor: with the weights of the best validation check: lowest loss, or best AUC (`select_by`).
        log: of its training, one row per validation check; see `kit.train.loop.fit`.
        choice: learning rate and weight decay.
        tries: one row per try: learning_rate, weight_decay, steps, best_step (of the check whose weights are kept),
            stopped_early, validation_loss (of that check), validation_score, device (cpu or cuda); all but the first
            two are empty where training diverged.
        validation_score: AUC, or mean absolute error in the label's unit, over validation participants.
        standard_error: of that score, by the bootstrap over validation participants; nan for fewer than two, or if
            fewer than two draws have a score.
        longer_score: the score with three times the steps and patience, nan if training diverged there;
            `validation_score` itself if there was no such training.
        longer_steps: steps that this longer training took; 0 if it diverged or there was none.
        change_error: standard error of the difference of the two scores, the same participants drawn for both.
        converged: False if the longer training's score is better by more than that, else True; None if not checked, if
            it diverged, or if an error is nan. One standard error is exceeded by chance in up to a sixth of all cases.
    """

    predictor: Predictor
    log: pd.DataFrame
    choice: Choice
    tries: pd.DataFrame
    validation_score: float
    standard_error: float
    longer_score: float
    longer_steps: int
    change_error: float
    converged: bool | None


@dataclass(frozen=True)
class Job:
    """One training run, in a form that can be passed to another process.

    Attributes:
        settings: an epoch ends at each validation check, every `check_steps` steps.
        steps: at most.
        by_score: compare checks by validation AUC instead of loss; only if validation has every class.
        folder: for `log.csv` and `checkpoints/`, from which training resumes; None keeps nothing on disk.
        home: the run's folder, watched for a stop file.
    """

    task: Task
    encoder: Encoder
    settings: Settings
    steps: int
    check_steps: int
    flip: bool
    standardise: bool = True
    by_score: bool = False
    folder: Path | None = None
    home: Path | None = None

    @classmethod
    def of(cls, task: Task, encoder: Encoder, params: Tuning, seed: int, choice: Choice, times: int = 1,
           folder: Path | None = None, home: Path | None = None) -> Job:
        """Make a job with `times` the parameters' steps and patience; the warm-up keeps its number of steps."""
        steps, warm, each = times * params.steps, params.warmup_steps, params.check_steps
        epochs = math.ceil(steps / each)
        full = (epochs - 1) * each  # steps before the last epoch, which may be shorter
        # warm-up in epochs, as `fit` counts: a step of a shorter last epoch is a larger part of it
        warm_epochs = warm / each if warm <= full else epochs - 1 + (warm - full) / (steps - full)
        settings = Settings.of(params, **choice._asdict(), seed=seed, epochs=epochs, patience=times * params.patience,
                               warmup_fraction=warm_epochs / epochs)
        by_score = params.select_by == "score" and task.labels.kind == "classification" and not _unvalidated(task)
        return cls(task, encoder, settings, steps, params.check_steps, params.flip, params.standardise, by_score,
                   folder, home)

    def objective(self) -> Supervised:
        """Copy the encoder and add a new head, initialised from the seed."""
        train, scaled = self.task.parts["train"], self.task.labels.kind == "regression" and self.standardise
        mean, sd = (float(train.labels.mean()), float(train.labels.std()) or 1.0) if scaled else (0.0, 1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            predictor = Predictor(copy.deepcopy(self.encoder), self.task.labels.outputs, mean, sd)
        return Supervised(predictor, self.task.labels.kind, flip=self.flip, seed=self.settings.seed,
                          zscored=train.store.zscored)


def rules(params: Tuning, architecture: str) -> dict[str, str]:
    """Training rules that no parameter sets; recorded with a result's inputs, so that a new rule trains it again."""
    found = {"average": "rising"} if params.ema else {}  # its decay was constant until November 2026
    if params.layer_decay < 1 and architecture in VIT_SIZES:  # the final norm counted as a block until November 2026
        found["layer_decay"] = "final norm with the head"
    return found


def tune(task: Task, encoder: Encoder, params: Tuning, seed: int, folder: Path | None = None,
         choice: Choice | None = None, home: Path | None = None, check: bool | None = None) -> Tuned:
    """Fine-tune a copy of an encoder on a task's training part; every choice is made on its validation part.

    Each learning rate is tried with each weight decay. The try with the lowest validation loss (or best AUC, see
    `select_by`, if validation has every class; of equal ones the lower loss) is kept, at its best weights. Tries that
    diverge are out. Then `tune` checks whether training was long enough: it trains with three times the steps and the
    patience, to see whether the validation score gets better. At a constant learning rate this goes on from the try's
    checkpoint, if there is a folder and `check_steps` divides `steps`.

    Args:
        seed: of the head, the batches and the augmentation.
        folder: for `tries.csv` and `tries/`, from which a killed or stopped run resumes; None keeps nothing on disk.
            The caller removes `tries/` once the results are written.
        choice: hyperparameters already known; then there is one try.
        home: the run's folder, watched for the file `stop`, which the caller removes (see `stoppable`); None: `folder`
            is watched, and its file removed at the end.
        check: whether to train three times as long, too; None: as the parameters say (`check_converged`).

    Raises:
        Stopped: the run was asked to stop; the checkpoint and `unfinished.csv` in `home` are written.
        TrainingError: every try diverged.
        ParameterError, and errors of worker processes: see `train`.
        StoreError, MemoryError, CheckpointError, LoaderError: see `kit.train.loop.fit`.
    """
    if folder is None and params.processes() > 1:
        with tempfile.TemporaryDirectory() as place:  # worker processes read their job from here
            return tune(task, encoder, params, seed, Path(place), choice, home, check)
    watch = stoppable(folder) if home is None else nullcontext()
    home, check_converged = home or folder, params.check_converged if check is None else check
    kind = task.labels.kind

    def job(choice: Choice, times: int = 1) -> Job:
        name = f"rate {choice.learning_rate:g} decay {choice.weight_decay:g} times {times}"
        return Job.of(task, encoder, params, seed, choice, times, folder and folder / TRIES / name, home)

    if params.select_by == "score" and (lacking := _unvalidated(task)):
        print(f"{task.labels.task}: no validation scan of class {', '.join(lacking)}, so there is no AUC: the loss "
              "selects instead (select_by)")
    choices = [choice] if choice else [Choice(*pair) for pair in itertools.product(params.learning_rates,
                                                                                  params.weight_decays)]
    with watch:
        rows, best = [], None
        diverged: TrainingError | None = None
        for each in choices:
            try:
                predictor, log = train(job(each), params)
            except TrainingError as failed:
                print(f"learning_rate {each.learning_rate:g}, weight_decay {each.weight_decay:g}: {failed}")
                rows.append(each._asdict())
                diverged = failed
                continue
            row = {**each._asdict(), "steps": min(params.steps, len(log) * params.check_steps),
                   "best_step": min(params.steps, (_best_check(log) + 1) * params.check_steps),
                   "stopped_early": len(log) < math.ceil(params.steps / params.check_steps),
                   "validation_loss": log["validation_loss"][_best_check(log)],
                   "validation_score": _score(found := _validation(task, predictor), kind), "device": device().type}
            rows.append(row)
            order = log["monitor"].min(), row["validation_loss"]
            if best is None or order < best[0]:
                best = order, predictor, log, each, row["validation_score"], found
        if best is None:
            assert diverged is not None  # there is a choice
            raise diverged
        _, predictor, log, each, score, found = best
        error = standard_error(found, kind, seed)
        longer, longer_steps, change_error = score, 0, 0.0
        if check_converged:
            once, again = job(each), job(each, LONGER)
            whole = params.steps % params.check_steps == 0  # else the try's last epoch is shorter than the longer one's
            if once.folder and again.folder and params.schedule == "constant" and whole:
                _go_on(once.folder, again.folder)
            try:
                trained_longer, log_longer = train(again, params)
                longer_steps = min(LONGER * params.steps, len(log_longer) * params.check_steps)
                found_longer = _validation(task, trained_longer)
                longer, change_error = _score(found_longer, kind), standard_error(found_longer, kind, seed, found)
            except TrainingError as failed:
                print(f"with {LONGER} times the steps and patience: {failed}")
                longer = change_error = math.nan
    tries = pd.DataFrame(rows)
    if folder:
        write_table(folder / "tries.csv", tries)
    judged = check_converged and math.isfinite(error + change_error)
    converged = not gain(kind, score, longer) > change_error if judged else None
    return Tuned(predictor, log, each, tries, score, error, longer, longer_steps, change_error, converged)


def train(job: Job, params: Tuning) -> tuple[Predictor, pd.DataFrame]:
    """Train in as many processes as the parameters say; the predictor has the weights of the best validation check.

    Returns:
        the predictor and the log; see `kit.train.loop.fit`.

    Raises:
        TrainingError: training diverged, in one process or in several.
        ParameterError: a batch has fewer scans than there are processes.
        Stopped: the run was asked to stop; the checkpoint and `unfinished.csv` are written.
        ChildFailedError, NodesError: a worker process failed for another reason, which its output says; see
            `kit.train.distributed`. In one process that error itself is raised; see `kit.train.loop.fit`.
    """
    if params.processes() == 1:
        objective, log = train_here(job)
        if job.folder is None:
            return objective.predictor, log
    else:
        assert job.home is not None  # `tune` gives several processes a folder
        scans = len(job.task.parts["train"].rows)
        least = min(map(len, all_batches(scans, job.settings.batch_size, job.settings.seed, 0)))
        if least < params.processes():
            raise ParameterError(f"workers: {params.processes()} processes, but {least} scans in the smallest batch of "
                                 f"{job.task.labels.task}: use fewer workers")
        file, failure = write_whole(job.home / JOB, lambda aside: torch.save(job, aside)), job.home / DIVERGED
        failure.unlink(missing_ok=True)
        try:
            if params.all_nodes() > 1:
                launch_on_nodes("kit.evaluate.tune", job.home, params.all_nodes(), params.workers)
            else:
                launch(_worker, (str(job.home),), params.workers)
        finally:
            file.unlink()
        if (job.home / UNFINISHED).exists():
            raise Stopped(pd.read_csv(job.home / UNFINISHED))
        if failure.exists():
            said = failure.read_text(encoding="utf-8")
            failure.unlink()
            raise TrainingError(said)
    assert job.folder is not None
    best, last = (checkpoint.read_checkpoint(job.folder / "checkpoints", name) for name in ("best", None))
    assert best is not None and last is not None  # the training has ended
    objective = job.objective()
    objective.load_state_dict(checkpoint.weights(best))
    return objective.predictor, pd.DataFrame(last["log"])


def train_here(job: Job) -> tuple[Supervised, pd.DataFrame]:
    """Train in this process, alone or as one of several workers.

    Returns:
        the objective as `kit.train.loop.fit` leaves it, and the log.

    Raises:
        TrainingError: see `kit.train.loop.fit`; or the validation loss is never finite.
    """
    objective, scans, settings = job.objective(), job.task.parts["train"].scans(), job.settings
    if world_size() > 1:
        synchronise_batch_norm(objective)
    a_pass = len(all_batches(len(scans), settings.batch_size, settings.seed, 0))

    def batches(epoch: int) -> list[list[int]]:
        first, last = epoch * job.check_steps, min((epoch + 1) * job.check_steps, job.steps)
        return batches_between(len(scans), settings.batch_size, settings.seed, first * settings.accumulate,
                       (last - first) * settings.accumulate)

    def place(epoch: int, number: int) -> tuple[int, int]:
        return divmod(epoch * job.check_steps * settings.accumulate + number, a_pass)

    def by_score(objective: Supervised, _: int) -> dict[str, float]:
        try:
            return {"monitor": -score_validation(job.task, objective.predictor)}
        except NotFiniteError:
            return {"monitor": math.nan}  # the worst, as for a loss

    free = MAY_CHANGE | LENGTH if settings.schedule == "constant" else MAY_CHANGE
    same = {name: value for name, value in asdict(settings).items() if name not in free}
    try:
        log = fit(objective, scans, batches, job.task.parts["validation"].scans(), settings, job.folder, params=same,
                  stop=job.home and job.home / STOP, place=place, monitor=by_score if job.by_score else None)
    except Stopped as stopped:
        if rank() == 0:
            assert job.home is not None  # where the stop file lay
            write_table(job.home / UNFINISHED, stopped.log)
        raise
    if not np.isfinite(log["monitor"]).any():  # in all processes, as they have one log
        raise TrainingError("the validation loss is never finite; lower learning_rate, or set clip: 1")
    return objective, log


def score_validation(task: Task, predictor: Predictor) -> float:
    """AUC (one-vs-rest mean for K > 2 classes) or mean absolute error on validation; participants count equally.

    Raises:
        NotFiniteError: a prediction is not finite.
    """
    return _score(_validation(task, predictor), task.labels.kind)


def gain(kind: str, before: float, after: float) -> float:
    """By how much a score has become better, in its own unit: an AUC higher, an error lower."""
    return after - before if kind == "classification" else before - after


def standard_error(found: pd.DataFrame, kind: str, seed: int, other: pd.DataFrame | None = None) -> float:
    """Standard error of a score, or of its difference from that of another predictor.

    By the bootstrap over participants, the same draws for both; nan for fewer than two participants, or if fewer than
    two draws have a score. The bootstrap underestimates the variance by a factor of (n - 1) / n; this is corrected.

    Args:
        found, other: predictions of the same participants; see `kit.evaluate.metrics.per_participant`.
        kind: classification or regression.
    """
    drawn = _drawn_scores(found, kind, seed)
    if other is not None:
        drawn = drawn - _drawn_scores(other, kind, seed)
    drawn = drawn[np.isfinite(drawn)]
    people = found["participant"].nunique()
    if min(len(drawn), people) < 2:
        return math.nan
    return float(np.std(drawn, ddof=1) * math.sqrt(people / (people - 1)))


def _drawn_scores(found: pd.DataFrame, kind: str, seed: int) -> np.ndarray:
    codes, names = pd.factorize(found["participant"])
    weight = found["weight"].to_numpy()
    return np.concatenate([_scores(found, counts[:, codes] * weight, kind)
                           for counts in bootstrap(len(names), VALIDATION_DRAWS, seed)])


def _score(found: pd.DataFrame, kind: str) -> float:
    return float(_scores(found, found["weight"].to_numpy()[None], kind)[0])


def _scores(found: pd.DataFrame, weights: np.ndarray, kind: str) -> np.ndarray:
    return statistic(found["true"].to_numpy(), predicted_of(found), weights, kind)


def _validation(task: Task, predictor: Predictor) -> pd.DataFrame:
    """Validation predictions, one row per participant and label; see `kit.evaluate.metrics.per_participant`."""
    part = task.parts["validation"]
    predicted = in_label_units(predictor, predict(predictor, part.scans()))
    return per_participant(part.labels, predicted, part.participants)


def _unvalidated(task: Task) -> list[str]:
    """Classes that the validation part lacks; without them it has no AUC."""
    present = set(task.parts["validation"].labels)
    return [name for number, name in enumerate(task.labels.classes) if number not in present]


def _best_check(log: pd.DataFrame) -> int:
    """Row of the best validation check; nan counts as the worst, as in `fit`."""
    return int(log["monitor"].fillna(math.inf).to_numpy().argmin())


def _go_on(ended: Path, longer: Path) -> None:
    """Give a longer training the checkpoints of an ended one, unless it has begun."""
    if not longer.exists():
        aside = longer.with_name(f"{longer.name} copying")
        shutil.rmtree(aside, ignore_errors=True)  # of a run killed here
        # as links: all of these files are only ever replaced whole
        shutil.copytree(ended, aside, copy_function=lambda one, other: link_whole(Path(one), Path(other)))
        os.replace(aside, longer)


@contextmanager
def stoppable(home: Path | None) -> Iterator[None]:
    """Let an interrupt create the stop file; remove it at the end, and an older run's unfinished.csv at the start."""
    if home is None:
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    (home / UNFINISHED).unlink(missing_ok=True)
    try:
        with interrupt_stops(home / STOP):
            yield
    finally:
        (home / STOP).unlink(missing_ok=True)


def _worker(home: str) -> None:
    """Run as one of several worker processes; see `kit.train.distributed.launch`."""
    with process_group():
        _train_noted(Path(home))


def _train_noted(home: Path) -> None:
    try:
        train_here(torch.load(home / JOB, map_location="cpu", weights_only=False))
    except Stopped:
        pass
    except TrainingError as error:  # in all processes at the same step
        if rank() == 0:
            (home / DIVERGED).write_text(str(error), encoding="utf-8")


if __name__ == "__main__":  # python -m kit.evaluate.tune FOLDER WORKERS, started through srun by `launch_on_nodes`
    worker_of_slurm(Path(sys.argv[1]), int(sys.argv[2]), _train_noted)
