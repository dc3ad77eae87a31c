"""Fine-tuning: stopped by validation, at the rate chosen there, resumed to the bit, in two processes as in one."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kit.evaluate import tune as tune_module
from kit.evaluate.metrics import NotFiniteError, per_participant
from kit.evaluate.predict import predict
from kit.evaluate.tasks import read_tasks
from kit.evaluate.tune import TRIES, Choice, Job, rules, score_validation, standard_error, train, train_here, tune
from kit.models.encoders import build_encoder
from kit.params import Finetune
from kit.reading import ParameterError
from kit.store.sampler import all_batches
from kit.train import checkpoint
from kit.train.loop import TrainingError
from kit.train.optimizers import learning_rate
from kit.train.stop import Stopped
from tests.conftest import GRID

ENCODER = build_encoder("resnet18_narrow", GRID)


def params(store, **changes):
    return Finetune.model_validate({
        "prepared": store.folder, "output_dir": "outputs/none", "encoder": "random:resnet18_narrow", "task": "lesion",
        "steps": 12, "check_steps": 4, "patience": 0, "batch_size": 6, "learning_rates": [1e-3],
        "weight_decays": [1e-2], "checkpoint_minutes": 0, **changes})


def task_of(store, label="lesion", fraction=1.0):
    return read_tasks({"prepared": store}, label)[0].with_labels_for(fraction, 0)


def same(first, second):
    """Weights, bit for bit."""
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("architecture", "layer_decay", "recorded"), [
    ("vit_narrow", 0.75, True), ("vit_narrow", 1.0, False), ("resnet18", 0.75, False), ("brainiac", 0.75, False)])
def test_models_that_a_new_rule_leaves_as_they_were_are_not_trained_again(store, architecture, layer_decay, recorded):
    """The final norm counted as a block, in the kit's ViTs alone."""
    assert ("layer_decay" in rules(params(store, layer_decay=layer_decay), architecture)) == recorded


def losses(log):
    return log.drop(columns="seconds")


def test_it_stops_where_validation_gets_no_better_and_is_asked_again_with_more_patience(store, tmp_path):
    asked = params(store, steps=60, check_steps=2, patience=2, learning_rates=[3e-3])
    tuned = tune(task_of(store), ENCODER, asked, 0, tmp_path)
    best = tuned.log["validation_loss"].argmin()
    assert len(tuned.log) == best + 3 < 30
    assert tuned.tries.iloc[0]["stopped_early"] and tuned.tries.iloc[0]["steps"] == 2 * len(tuned.log)
    assert sorted(path.name for path in (tmp_path / TRIES).iterdir()) == [
        f"rate 0.003 decay 0.01 times {times}" for times in (1, 3)]
    longer, log = train(Job.of(task_of(store), ENCODER, asked, 0, tuned.choice, times=3), asked)
    assert len(log) == log["validation_loss"].argmin() + 7 and tuned.longer_steps == 2 * len(log)
    assert losses(log)[:len(tuned.log)].equals(losses(tuned.log))
    gone_on = pd.read_csv(tmp_path / TRIES / "rate 0.003 decay 0.01 times 3" / "log.csv")
    assert gone_on["seconds"][:len(tuned.log)].tolist() == tuned.log["seconds"].tolist()  # not trained a second time
    assert losses(gone_on).to_numpy() == pytest.approx(losses(log).to_numpy(), rel=1e-12)  # the digits of a CSV
    assert score_validation(task_of(store), longer) == tuned.longer_score


def test_a_patience_that_is_too_short_is_found(store):
    """Two worse checks in a row ended the training at 16 years of error, where it goes on to 2."""
    tuned = tune(task_of(store, "age"), ENCODER, params(store, task="age", steps=60, check_steps=1, patience=2), 0)
    assert tuned.tries["stopped_early"].tolist() == [True] and tuned.converged is False
    assert tuned.longer_score < tuned.validation_score / 3 and tuned.longer_steps > 2 * len(tuned.log)


def test_few_steps_are_no_training(store):
    tuned = tune(task_of(store, "age"), ENCODER, params(store, task="age", steps=8), 0)
    assert tuned.converged is False and tuned.longer_score < tuned.validation_score
    unasked = tune(task_of(store, "age"), ENCODER, params(store, task="age", steps=8), 0, check=False)
    assert unasked.converged is None and unasked.validation_score == tuned.validation_score


def test_the_rate_of_the_lowest_validation_loss_is_chosen_and_can_be_given(store, tmp_path):
    asked = params(store, steps=4, learning_rates=[1e-6, 3e-2], weight_decays=[0.0, 10.0])
    tuned = tune(task_of(store), ENCODER, asked, 0, tmp_path, check=False)
    tries = pd.read_csv(tmp_path / "tries.csv")
    tried = tries[["learning_rate", "weight_decay"]].to_numpy().tolist()
    assert tried == [[1e-6, 0], [1e-6, 10], [3e-2, 0], [3e-2, 10]]
    lowest = tries.loc[tries["validation_loss"].idxmin()]
    assert tuned.choice == (lowest["learning_rate"], lowest["weight_decay"]) and tries["validation_loss"].nunique() == 4
    assert tuned.validation_score == lowest["validation_score"] == score_validation(task_of(store), tuned.predictor)
    alone = tune(task_of(store), ENCODER, asked, 0, choice=tuned.choice, check=False)
    assert len(alone.tries) == 1 and same(alone.predictor, tuned.predictor)


def test_a_class_that_validation_lacks_leaves_the_choice_to_the_loss(store, capsys):
    whole = task_of(store)
    part = whole.parts["validation"]
    task = replace(whole, parts=whole.parts | {"validation": part.only(part.labels == 0)})
    asked = params(store, steps=8, select_by="score", learning_rates=[1e-6, 3e-2])
    tuned = tune(task, ENCODER, asked, 0, check=False)
    assert capsys.readouterr().out.splitlines() == [
        "lesion: no validation scan of class 1, so there is no AUC: the loss selects instead (select_by)"]
    by_loss = tune(task, ENCODER, params(store, steps=8, learning_rates=[1e-6, 3e-2]), 0, check=False)
    assert tuned.choice == by_loss.choice and same(tuned.predictor, by_loss.predictor)
    assert tuned.log["monitor"].equals(tuned.log["validation_loss"])
    assert (tune(whole, ENCODER, asked, 0, check=False).log["monitor"] <= 0).all() and not capsys.readouterr().out


DIVERGES = 1e20  # weight decay, which multiplies the weights by 1 - 1e17 a step


def test_a_try_that_diverges_is_out(store, tmp_path, capsys):
    asked = params(store, task="age", steps=8, weight_decays=[1e-2, DIVERGES])
    tuned = tune(task_of(store, "age"), ENCODER, asked, 0, tmp_path, check=False)
    tries = pd.read_csv(tmp_path / "tries.csv")
    assert tuned.choice.weight_decay == 1e-2 and tries["weight_decay"].tolist() == [1e-2, DIVERGES]
    assert tries["validation_loss"].isna().tolist() == tries["steps"].isna().tolist() == [False, True]
    assert capsys.readouterr().out.startswith(
        "learning_rate 0.001, weight_decay 1e+20: the gradient is not finite (the loss is ")
    with pytest.raises(TrainingError, match="the loss is .* in epoch 1, step "):
        tune(task_of(store, "age"), ENCODER, params(store, task="age", steps=8, weight_decays=[DIVERGES]), 0)


@pytest.mark.parametrize("select_by", ["loss", "score"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_try_that_diverges_in_the_last_step_before_a_check_is_out(store, tmp_path, capsys, select_by, kept):
    asked = params(store, steps=1, check_steps=1, select_by=select_by, weight_decays=[DIVERGES, 1e-2])
    folder = tmp_path if kept else None
    tuned = tune(task_of(store), ENCODER, asked, 0, folder, check=False)
    said = "the validation loss is never finite; lower learning_rate, or set clip: 1"
    assert capsys.readouterr().out == f"learning_rate 0.001, weight_decay 1e+20: {said}\n"
    assert tuned.choice.weight_decay == 1e-2 and tuned.tries["steps"].isna().tolist() == [True, False]
    with pytest.raises(TrainingError, match=f"^{said}$"):
        tune(task_of(store), ENCODER, asked, 0, folder, choice=Choice(1e-3, DIVERGES))


def test_a_check_that_is_nan_is_the_worst(store, monkeypatch):
    """The first check is nan, the best one is the second: training stops two checks later, not one."""
    scores = iter([np.nan, 0.9, 0.8, 0.7])

    def scored(task, predictor):
        if np.isnan(found := next(scores)):
            raise NotFiniteError
        return found

    monkeypatch.setattr(tune_module, "score_validation", scored)
    asked = params(store, steps=12, check_steps=1, patience=2, select_by="score")
    tuned = tune(task_of(store), ENCODER, asked, 0, check=False)
    assert tuned.log["monitor"].tolist() == pytest.approx([np.nan, -0.9, -0.8, -0.7], nan_ok=True)
    assert tuned.tries["stopped_early"].tolist() == [True]
    assert tuned.tries["validation_loss"].tolist() == [tuned.log["validation_loss"][1]]


@pytest.mark.parametrize(("steps", "early"), [(3, False), (4, True)])
def test_patience_that_runs_out_at_the_last_check_stops_nothing_early(store, monkeypatch, steps, early):
    monkeypatch.setattr(tune_module, "score_validation", lambda task, predictor: 0.5)  # so the first check is the best
    asked = params(store, steps=steps, check_steps=1, patience=2, select_by="score")
    tuned = tune(task_of(store), ENCODER, asked, 0, check=False)
    assert tuned.tries[["steps", "best_step", "stopped_early"]].values.tolist() == [[3, 1, early]]


def test_of_equal_aucs_the_lower_loss_is_chosen(store):
    asked = params(store, steps=4, select_by="score", learning_rates=[1e-7, 2e-7])
    tuned = tune(task_of(store), ENCODER, asked, 0, check=False)
    assert tuned.tries["validation_score"].nunique() == 1 and tuned.tries["validation_loss"].nunique() == 2
    assert tuned.choice.learning_rate == tuned.tries.loc[tuned.tries["validation_loss"].idxmin(), "learning_rate"]
    backwards = tune(task_of(store), ENCODER, params(store, steps=4, select_by="score", learning_rates=[2e-7, 1e-7]),
                     0, check=False)
    assert backwards.choice == tuned.choice


def test_the_seed_decides(store):
    first, again, other = (tune(task_of(store), ENCODER, params(store, steps=4), seed, check=False)
                           for seed in (0, 0, 1))
    assert same(first.predictor, again.predictor) and not same(first.predictor, other.predictor)


def test_warm_up_is_in_steps_whatever_the_budget(store):
    logs = [train_here(Job.of(task_of(store), ENCODER, params(store, steps=8, warmup_steps=6), 0, Choice(1e-3, 0.0),
                            times))[1] for times in (1, 3)]
    assert logs[0]["learning_rate"].tolist() == pytest.approx([5e-4, 1e-3])
    assert np.allclose(losses(logs[0]), losses(logs[1])[:2], rtol=1e-4)


@pytest.mark.parametrize("warmup", [3, 10, 45])
@pytest.mark.parametrize("times", [1, 3])
def test_warm_up_ends_at_its_step_even_if_the_last_epoch_is_short(store, warmup, times):
    asked = params(store, steps=50, check_steps=20, warmup_steps=warmup)
    job, epochs = Job.of(task_of(store), ENCODER, asked, 0, Choice(1e-3, 0.0), times), {1: 3, 3: 8}[times]
    lengths = [20] * (epochs - 1) + [10]  # steps of each epoch
    progress = np.concatenate([epoch + np.arange(steps) / steps for epoch, steps in enumerate(lengths)]) / epochs
    rates = [learning_rate(job.settings, each) for each in progress]
    assert job.settings.epochs == epochs and len(rates) == 50 * times
    assert sum(rate < 1e-3 * (1 - 1e-9) for rate in rates) == warmup


def test_the_moving_average_is_what_is_kept(store, tmp_path):
    job = Job.of(task_of(store), ENCODER, params(store, ema=0.9), 0, Choice(1e-3, 0.0), folder=tmp_path)
    predictor, _ = train(job, params(store))
    best = checkpoint.read_checkpoint(tmp_path / "checkpoints", "best")
    average, last = (best[kind][f"{start}predictor.head.weight"] for kind, start in (("average", "module."),
                                                                                  ("model", "")))
    assert torch.equal(predictor.head.weight, average) and not torch.equal(average, last)


def test_few_labels_are_few_on_validation_too(store):
    parts = {fraction: task_of(store, "lesion", fraction).parts for fraction in (0.2, 0.5, 1.0)}
    people = {fraction: [set(parts[fraction][name].participants) for name in ("train", "validation", "test")]
              for fraction in parts}
    assert all(set(part["validation"].labels) == {0, 1} for part in parts.values())
    assert [len(people[fraction][1]) for fraction in parts] == [4, 4, 4]  # two of each class at least
    assert all(few <= half <= whole for few, half, whole in zip(*people.values(), strict=True))
    assert people[0.2][2] == people[1.0][2]
    assert len(set(task_of(store, "age", 0.5).parts["validation"].participants)) == 2


def test_the_standard_error_is_that_of_the_mean(store):
    task = task_of(store, "age")
    part = task.parts["train"].only(~task.parts["train"].participants.duplicated().to_numpy())
    task = replace(task, parts={**task.parts, "validation": part})
    predictor = Job.of(task, ENCODER, params(store), 0, Choice(1e-3, 0.0)).objective().predictor
    found = predict(predictor, part.scans())[:, 0] * float(predictor.sd) + float(predictor.mean)
    errors = np.abs(found - part.labels)
    assert score_validation(task, predictor) == pytest.approx(errors.mean())
    before = per_participant(part.labels, found, part.participants)
    assert standard_error(before, "regression", 0) == pytest.approx(errors.std(ddof=1) / np.sqrt(len(errors)), rel=0.15)
    change = np.abs(found + 1 - part.labels) - errors  # participant by participant: 1 or -1 where nothing is crossed
    error = change.std(ddof=1) / np.sqrt(len(change))
    higher = before.assign(predicted=before["predicted"] + 1)
    assert standard_error(higher, "regression", 0, before) == pytest.approx(error, rel=0.15)
    assert np.isnan(standard_error(before[:1], "regression", 0))


def test_each_model_predicts_validation_once(store, monkeypatch):
    """For its score, that score's error and the error of the gain from longer training."""
    models = []
    monkeypatch.setattr(tune_module, "predict", lambda model, scans: models.append(model) or predict(model, scans))
    tuned = tune(task_of(store), ENCODER, params(store, steps=2, check_steps=2), 0)
    assert len(models) == len(set(models)) == 2 and models[0] is tuned.predictor
    assert np.isfinite([tuned.standard_error, tuned.change_error]).all()


def test_a_gain_in_most_participants_is_not_by_chance(store):
    """The scores differ by less than one score's error (1.7 and 3.0 years), but nearly everybody's error is less."""
    tuned = tune(task_of(store, "age"), ENCODER, params(store, task="age", steps=4), 0)
    assert 0 < tuned.validation_score - tuned.longer_score < tuned.standard_error and tuned.converged is False


@pytest.mark.slow
def test_a_stop_file_ends_it_and_it_goes_on_from_there(store, tmp_path):
    asked = params(store, learning_rates=[1e-4, 1e-3], checkpoint_minutes=10)
    whole = tune(task_of(store), ENCODER, asked, 0, tmp_path / "whole")
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "stop").touch()
    with pytest.raises(Stopped):
        tune(task_of(store), ENCODER, asked, 0, folder)
    assert len(pd.read_csv(folder / "unfinished.csv")) == 1 and not (folder / "stop").exists()
    resumed = tune(task_of(store), ENCODER, asked, 0, folder)
    assert not (folder / "unfinished.csv").exists()
    assert same(whole.predictor, resumed.predictor) and losses(whole.log).equals(losses(resumed.log))
    assert whole.tries.equals(resumed.tries)


def run(store, folder):
    tune(task_of(store), ENCODER, params(store, steps=40, check_steps=2, patience=2, learning_rates=[1e-3, 3e-3]), 0,
         folder)


@pytest.mark.slow
def test_killed_in_either_try_or_the_longer_training_it_ends_as_if_undisturbed(store, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.evaluate.test_tune"])

    def start(name):
        process = context.Process(target=run, args=(store, tmp_path / name))
        process.start()
        return process

    whole = start("whole")
    for sign in ("rate 0.001 decay 0.01 times 1/log.csv", "rate 0.003 decay 0.01 times 1/checkpoints/last.pt",
                 "rate * times 3/checkpoints/last.pt"):
        process, until = start("broken"), time.monotonic() + 300
        while not any((tmp_path / "broken" / TRIES).glob(sign)):
            assert process.is_alive() and time.monotonic() < until
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (tmp_path / "broken/tries.csv").exists()
    process = start("broken")
    for each in (whole, process):
        each.join()
        assert each.exitcode == 0
    one, two = (pd.read_csv(tmp_path / name / "tries.csv") for name in ("whole", "broken"))
    assert one.equals(two) and one["stopped_early"].any()
    for path in (tmp_path / "whole").glob("tries/*/checkpoints"):
        first, second = (checkpoint.read_checkpoint(tmp_path / name / path.relative_to(tmp_path / "whole"))
                         for name in ("whole", "broken"))
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
        assert losses(pd.DataFrame(first["log"])).equals(losses(pd.DataFrame(second["log"])))


@pytest.mark.slow
def test_two_processes_equal_one(store, tmp_path):
    """With batches that two processes cannot share equally, and an early stop that only one of them sees."""
    task, logs = task_of(store), []
    train_part = task.parts["train"]
    task = replace(task, parts=task.parts | {"train": train_part.only(np.arange(len(train_part.rows)) < 15)})
    assert {len(batch) for batch in all_batches(len(task.parts["train"].rows), 6, 0, 0)} == {5}
    for workers in (1, 2):
        asked = params(store, workers=workers, steps=24, patience=1)
        job = Job.of(task, ENCODER, asked, 0, Choice(0.1, 0.0), folder=tmp_path / str(workers), home=tmp_path)
        # not Adam: its first steps follow the signs of gradients, which rounding turns where they are near zero
        logs.append(train(replace(job, settings=replace(job.settings, optimizer="lars")), asked)[1])
    for name in ("loss", "validation_loss"):
        assert logs[0][name][0] == pytest.approx(logs[1][name][0], abs=1e-4)
    for log in logs:
        assert len(log) == min(log["validation_loss"].argmin() + 2, 6)
    assert not (tmp_path / "job.pt").exists()


@pytest.mark.slow
def test_two_processes_stop_as_asked(store, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        tune(task_of(store), ENCODER, params(store, workers=2), 0, tmp_path)
    assert len(pd.read_csv(tmp_path / "unfinished.csv")) == 1


def test_more_processes_than_scans_are_no_divergence(store, tmp_path):
    part = task_of(store).parts["train"]
    task = replace(task_of(store), parts=task_of(store).parts | {"train": part.only(np.arange(len(part.rows)) < 3)})
    asked = params(store, workers=4, batch_size=8, learning_rates=[1e-3, 1e-4])
    with pytest.raises(ParameterError, match="workers: 4 processes, but 3 scans in the smallest batch of lesion"):
        tune(task, ENCODER, asked, 0, tmp_path)


@pytest.mark.slow
def test_two_processes_diverge_as_one_does(store, tmp_path):
    asked = params(store, task="age", workers=2, steps=8, weight_decays=[1e-2, DIVERGES])
    tuned = tune(task_of(store, "age"), ENCODER, asked, 0, tmp_path, check=False)
    assert tuned.choice.weight_decay == 1e-2 and tuned.tries["validation_loss"].isna().tolist() == [False, True]
    assert not (tmp_path / "diverged.txt").exists()
