"""The table is complete, is not made twice, and does not depend on who wins."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import yaml

import kit
from kit.cohort.split import LeakageError, participant_hash, salt
from kit.cohort.tabular import TableError
from kit.evaluate import benchmark, benchmark_cells
from kit.evaluate.benchmark import BenchmarkError, reliabilities, run_benchmark
from kit.evaluate.benchmark_cells import cells_of
from kit.evaluate.reliability import reliability_of
from kit.models.encoder_file import save_encoder
from kit.models.encoders import build_encoder
from kit.params import BASELINES, Benchmark
from kit.preprocess.nifti import write_nifti
from kit.reading import ParameterError, check
from kit.runs import Run, RunError
from kit.show.comparison import scores_table, summary
from kit.store.leakage import voxel_hashes
from kit.store.store import Store
from kit.train.loop import TrainingError
from kit.train.stop import Stopped
from tests.conftest import GRID, make_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return make_store(folder / "here", 60), make_store(folder / "elsewhere", seed=1, dataset="elsewhere")


def params_for(stores, folder, **changes):
    return check(Benchmark, {
        "prepared": str(stores[0].folder), "out_of_distribution": str(stores[1].folder), "output_dir": str(folder),
        "encoders": {"ResNet": "random:resnet18_narrow"}, "tasks": ["lesion", "age"], "finetune_tasks": ["lesion"],
        "label_fractions": [0.5, 1.0], "finetune_fractions": [0.5], "seeds": [0, 1], "steps": 4, "check_steps": 2,
        "batch_size": 8, **changes})


def filled(params):
    run = Run.of(params)
    try:
        return run_benchmark(params, run)
    finally:
        run.close()


def cell_files(folder, pattern="seed*.csv"):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob(f"cells/**/{pattern}")}


@pytest.mark.slow
def test_table_is_complete_and_resumes(stores, tmp_path):
    params = params_for(stores, tmp_path / "run")
    results = filled(params)
    scores = results.scores
    # five baselines and the untrained probe on 2 tasks x 2 fractions, one fine-tuned; each on two test sets; but
    # where age is asked, there is no column of demographics besides
    assert not results.missing and len(scores) == (6 * 4 + 1) * 2 - 4
    assert set(scores["encoder"]) == {*BASELINES, "ResNet"} and scores["value"].notna().all()
    assert not scores.duplicated(["encoder", "mode", "task", "label_fraction", "distribution"]).any()
    guess = scores[scores["encoder"] == "guess"].set_index(["task", "distribution"])["value"]
    assert (guess.loc["lesion"] == 0.5).all()
    assert set(scores.loc[scores["mode"] == "finetune", "seeds"]) == {2}
    assert set(results.tidy["seed"]) == {0, 1} and results.tidy["fingerprint"].str.startswith("f").all()
    whole = results.tidy[(results.tidy["mode"] == "baseline") & (results.tidy["label_fraction"] == 1)]
    assert set(whole["seed"]) == {0}, "nothing random in it: fitted once"

    # what is missing is made again, what is there is not, and all comes out the same
    before = cell_files(tmp_path / "run")
    lost, tries = [path for path in before if "ResNet" in str(path)], cell_files(tmp_path / "run", "tries_seed*.csv")
    for path in lost:
        (tmp_path / "run" / path).unlink()
    again = filled(params)
    after = cell_files(tmp_path / "run")
    assert {path for path in before if after[path] != before[path]} == set(lost) and len(lost) == 2
    assert cell_files(tmp_path / "run", "tries_seed*.csv") == tries and len(tries) == 2  # with all rates tried
    pd.testing.assert_frame_equal(again.scores, scores)

    text = summary(scores, results.differences, "made-up data")
    assert "nan" not in text and "made-up data" in text
    assert (scores_table(scores) != "").any(axis=None)


@pytest.mark.slow
def test_shards_share_the_cells(stores, tmp_path):
    whole = filled(params_for(stores, tmp_path / "whole", finetune_tasks=[]))
    for shard in (0, 1):
        part = filled(params_for(stores, tmp_path / "run", finetune_tasks=[], shards=2, shard=shard))
    assert not part.missing and (tmp_path / "run/shards/1-of-2/scores.csv").exists()
    before = cell_files(tmp_path / "run")
    together = filled(params_for(stores, tmp_path / "run", finetune_tasks=[]))
    assert cell_files(tmp_path / "run") == before, "nothing was computed twice"
    pd.testing.assert_frame_equal(together.scores, whole.scores)


def test_a_shard_before_any_predictions_says_so(stores, tmp_path):
    values = {"finetune_tasks": [], "seeds": [0], "label_fractions": [1.0], "tasks": ["age"], "shards": 3}
    with pytest.raises(BenchmarkError, match=r"shards/2-of-3: no cell has predictions yet \(0 of 1 cells are done, and "
                                             "shard 2 of 3 computes 0\\): run it again when other shards are done, and "
                                             "set shards to at most 1"):
        filled(params_for(stores, tmp_path / "run", baselines=["guess"], shard=2, **values))
    with pytest.raises(BenchmarkError, match="1 of 1 cells are done"):  # this cohort has no other covariate than age
        filled(params_for(stores, tmp_path / "other", baselines=["demographics"], shard=0, **values))


def test_folds_test_everybody_once(stores, tmp_path):
    params = params_for(stores, tmp_path / "run", folds=3, baselines=["guess", "voxels"], finetune_tasks=[],
                        label_fractions=[1.0])
    results = filled(params)
    own = results.predictions[(results.predictions["distribution"] == "in_distribution")]
    for _, rows in own.groupby(["encoder", "task"]):
        assert sorted(rows["scan"]) == sorted(stores[0].index["scan"]) and set(rows["fold"]) == {0, 1, 2}
    other = results.predictions[results.predictions["distribution"] == "out_of_distribution"]
    assert (other.groupby(["encoder", "task", "scan"]).size() == 3).all()
    voxels = results.scores.set_index(["encoder", "task", "distribution"])["value"]
    assert voxels["voxels", "lesion", "in_distribution"] > 0.9, "a bright corner says lesion"


def test_the_number_of_training_participants_is_the_mean_over_folds(tmp_path):
    store = make_store(tmp_path / "store", 20)
    results = filled(params_for((store, store), tmp_path / "run", out_of_distribution=None, folds=3, tasks=["lesion"],
                                baselines=["guess"], finetune_tasks=[], label_fractions=[1.0]))
    folds = results.predictions.groupby("fold")["train_participants"].agg(["first", "size"]).to_numpy().tolist()
    assert folds == [[10, 7], [9, 10], [9, 9]], "folds of unequal sizes: participants trained on, scans tested"
    assert results.tidy["train_participants"].tolist() == [28 / 3]


def test_among_people_who_are_alike(tmp_path):
    stores = make_store(tmp_path / "here", 60), make_store(tmp_path / "elsewhere", seed=1, dataset="elsewhere")
    index = stores[0].index
    number = index["participant"].astype(int)
    index.assign(sex=np.where(number % 5 == 0, None, np.where(number % 3 == 0, "F", "M"))).to_csv(
        stores[0].folder / "index.csv", index=False)
    stores = Store.open(stores[0].folder), stores[1]
    params = params_for(stores, tmp_path / "run", baselines=["demographics", "voxels"], finetune_tasks=[], seeds=[0],
                        label_fractions=[1.0], folds=3, age_bands=[20, 50, 90], match_age_sex=True)
    results = filled(params)
    subgroups = results.subgroups[results.subgroups["distribution"] == "in_distribution"]
    of = {task: set(rows["subgroup"]) for task, rows in subgroups.groupby("task")}
    assert of["age"] == {"age 20 to 50", "age 50 to 90"}  # no classes to match
    assert of["lesion"] == {"age 20 to 50", "age 50 to 90", "pairs of one sex and age"}
    tested = results.predictions.query("task == 'lesion' and encoder == 'voxels' and distribution == 'in_distribution'")
    voxels = subgroups.query("task == 'lesion' and encoder == 'voxels'").set_index("subgroup")
    pairs = voxels.loc[["pairs of one sex and age"]].iloc[0]
    known = tested.loc[tested["sex"].isin(["F", "M"]), "participant"].nunique()
    assert 0 < pairs["participants"] <= known < tested["participant"].nunique() and pairs["participants"] % 2 == 0
    young = subgroups.query("task == 'lesion' and encoder == 'voxels' and subgroup == 'age 20 to 50'").iloc[0]
    assert young["participants"] == tested.loc[tested["age"] < 50, "participant"].nunique()


def test_the_pull_to_the_mean_is_undone_on_validation(stores, tmp_path):
    def slope(results):
        rows = results.predictions.query("distribution == 'in_distribution' and encoder == 'voxels'")
        return np.polyfit(rows["true"], rows["predicted"], 1)[0]

    values = {"baselines": ["guess", "voxels"], "finetune_tasks": [], "seeds": [0], "label_fractions": [1.0],
              "tasks": ["age"]}
    as_they_are = filled(params_for(stores, tmp_path / "run", **values))
    corrected = filled(params_for(stores, tmp_path / "corrected", correct_bias=True, **values))
    prints = [table.tidy.groupby("encoder")["fingerprint"].first() for table in (as_they_are, corrected)]
    assert prints[0]["voxels"] != prints[1]["voxels"] and prints[0]["guess"] == prints[1]["guess"]
    assert set(corrected.predictions["distribution"]) == {"in_distribution", "out_of_distribution"}
    assert slope(as_they_are) != slope(corrected)


def test_settings_decide_what_is_stale(stores, tmp_path, capsys):
    params = params_for(stores, tmp_path / "run", baselines=["guess"], seeds=[0])
    filled(params)
    before = cell_files(tmp_path / "run")
    other = params_for(stores, tmp_path / "run", baselines=["guess"], seeds=[0], steps=6)
    (tmp_path / "run" / "params.yaml").write_text(yaml.safe_dump(other.plain()))  # else it is refused at once
    filled(other)
    said = capsys.readouterr().out
    assert "computed again" in said and "steps: 4 then, 6 now: ResNet on lesion (1 cells)" in said
    after = cell_files(tmp_path / "run")
    assert {path for path in before if after[path] != before[path]} == {
        path for path in before if "ResNet" in str(path)}


def test_covariates_that_changed_are_seen(tmp_path, capsys):
    """By the baseline that reads them: none reads the scanner."""
    stores = make_store(tmp_path / "here", 60), make_store(tmp_path / "elsewhere", seed=1, dataset="elsewhere")
    values = {"baselines": ["guess", "demographics", "site"], "seeds": [0], "finetune_tasks": [], "tasks": ["lesion"]}
    filled(params_for(stores, tmp_path / "run", **values))
    before = cell_files(tmp_path / "run")
    index = pd.read_csv(tmp_path / "here/index.csv", dtype={"participant": str, "session": str})
    index.assign(age=index["age"] + 1, scanner="new").to_csv(tmp_path / "here/index.csv", index=False)
    results = filled(params_for(stores, tmp_path / "run", **values))
    after = cell_files(tmp_path / "run")
    assert {path.parts[2] for path in before if after[path] != before[path]} == {"demographics"}
    here = results.predictions[results.predictions["distribution"] == "in_distribution"]
    own = index.set_index("scan")["age"] + 1
    assert here["age"].tolist() == pytest.approx(own.loc[here["scan"]].tolist())  # of every row, computed anew or not
    assert "columns: " in capsys.readouterr().out


def test_covariates_in_another_case_are_seen_too(tmp_path):
    stores = make_store(tmp_path / "here", 60), make_store(tmp_path / "elsewhere", seed=1, dataset="elsewhere")
    index = pd.read_csv(tmp_path / "here/index.csv", dtype={"participant": str, "session": str})
    index.rename(columns={"age": "Age"}).to_csv(tmp_path / "here/index.csv", index=False)
    values = {"baselines": ["demographics"], "demographics": ["Age"], "seeds": [0], "finetune_tasks": [],
              "tasks": ["lesion"]}
    filled(params_for(stores, tmp_path / "run", **values))
    before = cell_files(tmp_path / "run")
    theirs = pd.read_csv(tmp_path / "elsewhere/index.csv", dtype={"participant": str, "session": str})
    theirs.assign(age=theirs["age"] + 1).to_csv(tmp_path / "elsewhere/index.csv", index=False)
    filled(params_for(stores, tmp_path / "run", **values))
    after = cell_files(tmp_path / "run")
    assert {path.parts[2] for path in before if after[path] != before[path]} == {"demographics"}


def test_a_stop_after_a_cells_last_step_ends_it_before_the_next_cell(stores, tmp_path, monkeypatch):
    """Whatever the cell: a baseline reads no stop file, and fine-tuning none after its last step."""
    run, done, real = tmp_path / "run", [], benchmark_cells.Bench.fill
    values = {"baselines": ["guess"], "seeds": [0], "finetune_tasks": ["lesion", "age"], "tasks": ["lesion", "age"],
              "check_converged": False}

    def fill(bench, cell, home):
        real(bench, cell, home)
        done.append(cell)
        if len(done) == 1:
            (home / "stop").touch()

    def tuned(*arguments, real=benchmark_cells.tune, **more):
        found = real(*arguments, **more)
        (run / "stop").touch()
        return found

    whole = filled(params_for(stores, tmp_path / "whole", **values))
    monkeypatch.setattr(benchmark_cells.Bench, "fill", fill)
    monkeypatch.setattr(benchmark_cells, "tune", tuned)
    params = params_for(stores, run, **values)
    for count in (1, 5):
        with pytest.raises(Stopped) as stopped:
            filled(params)
        assert len(done) == len(cell_files(run)) == count and not (run / "stop").exists()
        left = pd.read_csv(run / "unfinished.csv")
        assert len(left) == len(stopped.value.log) == 6 - count
        assert left.iloc[-1].tolist() == ["ResNet", "finetune", "age", 0.5, 0]
    monkeypatch.undo()
    pd.testing.assert_frame_equal(filled(params).scores, whole.scores)
    assert not (run / "unfinished.csv").exists()


HOLDS = """
import fcntl, sys
files = [open(name, "a") for name in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(*files):
    """Another process holds these locks."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", HOLDS, *files], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        yield
        other.stdin.close()


def lock_of(cell):
    """The lock of a cell, by its folder cells/TASK/ENCODER/NAME."""
    cells = cell.parents[2]
    return cells / ".locks" / quote(cell.relative_to(cells.parent).as_posix(), safe=" ")


def test_a_cell_that_another_process_computes_is_left_to_it(stores, tmp_path, capsys):
    run = tmp_path / "run"
    params = params_for(stores, run, baselines=["guess"], seeds=[0], finetune_tasks=[], label_fractions=[1.0])
    theirs, ours = (run / f"cells/{task}/guess/baseline 100% fold 0" for task in ("age", "lesion"))
    with held_by_another(lock_of(theirs)):
        results = filled(params)
        assert [cell.task for cell in results.missing] == ["age"] and "1 of 2 cells are left to other processes" in (
            capsys.readouterr().out)
        assert not theirs.exists() and (ours / "seed0.csv").exists()
    assert not filled(params).missing and "left to other" not in capsys.readouterr().out


def test_a_cell_of_other_settings_that_another_process_computes_is_not_removed(stores, tmp_path):
    run, values = tmp_path / "run", {"baselines": ["guess"], "seeds": [0], "tasks": ["lesion"]}
    filled(params_for(stores, run, **values))
    before = cell_files(run)
    cell = run / "cells/lesion/ResNet/finetune 50% fold 0"
    other = params_for(stores, run, steps=6, **values)
    (run / "params.yaml").write_text(yaml.safe_dump(other.plain()))  # else it is refused at once
    with held_by_another(lock_of(cell)), pytest.raises(RunError, match=(
            r"finetune 50% fold 0: another process computes this cell from other inputs or settings:\n"
            r"  steps: 4 then, 6 now\n")):
        filled(other)
    assert cell_files(run) == before


def test_a_cell_that_another_process_has_begun_since_with_other_settings_is_not_mixed(stores, tmp_path, monkeypatch):
    run, values = tmp_path / "run", {"baselines": [], "seeds": [0], "tasks": ["lesion"]}
    real = benchmark_cells.Bench.fill
    other = params_for(stores, tmp_path / "other", steps=6, **values)
    filled(other)

    def fill(bench, cell, home):
        shutil.copytree(tmp_path / "other/cells", run / "cells", dirs_exist_ok=True)
        (bench.file(cell, 0)).unlink()
        real(bench, cell, home)

    monkeypatch.setattr(benchmark_cells.Bench, "fill", fill)
    with pytest.raises(RunError, match=r"from other inputs or settings:\n  steps: 6 then, 4 now\n"):
        filled(params_for(stores, run, **values))


def test_a_shard_of_other_parameters_is_refused_while_another_fills_the_table(stores, tmp_path):
    """As when somebody edits the parameter file while tasks of the array run."""
    run = tmp_path / "run"
    values = {"baselines": ["guess"], "seeds": [0], "finetune_tasks": [], "label_fractions": [1.0], "shards": 3}
    filled(params_for(stores, run, shard=0, **values))
    before = cell_files(run)
    with held_by_another(run / "shards/0-of-3/.lock"):
        with pytest.raises(RunError, match=r"shards/0-of-3 fills this table with other parameters now:\n"
                                           r"  split_seed: it has 0, asked for 1\nwait until"):
            filled(params_for(stores, run, shard=1, split_seed=1, **values))
        assert cell_files(run) == before
        filled(params_for(stores, run, shard=1, **values | {"shards": 2}))  # `shards` may differ
    filled(params_for(stores, run, shard=1, split_seed=1, **values))


def test_shards_that_all_have_new_parameters_fill_the_table_side_by_side(stores, tmp_path):
    """As an array that ran out of memory is sent again with other parameters: shard 0 runs, with the same as ours."""
    run = tmp_path / "run"
    values = {"baselines": ["guess"], "seeds": [0], "finetune_tasks": [], "label_fractions": [1.0], "shards": 2}
    filled(params_for(stores, run, shard=0, **values))
    new = params_for(stores, run, shard=0, split_seed=1, **values)
    (run / "shards/0-of-2/params.yaml").write_text(yaml.safe_dump(new.plain()))
    with held_by_another(run / "shards/0-of-2/.lock"):
        assert len(filled(params_for(stores, run, shard=1, split_seed=1, **values)).missing) == 1  # shard 0's


def test_a_cell_that_diverges_is_named_once_all_others_are_done(stores, tmp_path, monkeypatch):
    def tuned(task, encoder, params, seed, *arguments, real=benchmark_cells.tune, **more):
        if task.labels.task == "lesion" and seed == 1:
            raise TrainingError("the loss is nan")
        return real(task, encoder, params, seed, *arguments, **more)

    run = tmp_path / "run"
    params = params_for(stores, run, baselines=["guess"], finetune_tasks=["lesion", "age"], check_converged=False,
                        label_fractions=[1.0])
    monkeypatch.setattr(benchmark_cells, "tune", tuned)
    with pytest.raises(TrainingError, match=r"run: 1 of 4 cells could not be trained; all others are done. Tables are "
                                            r"made once these are, too:\n  ResNet on lesion, finetune, "
                                            r"label_fraction 0.5, fold 0, seed 1: the loss is nan$"):
        filled(params)
    assert not (run / "tidy.csv").exists()
    before = cell_files(run)
    assert {path.parts[-3:] for path in before if "ResNet" in str(path)} == {
        ("ResNet", "finetune 50% fold 0", "seed0.csv"), ("ResNet", "finetune 50% fold 0", "seed1.csv")}
    assert [path.parent.parts[1:] for path in before if path.name == "seed1.csv"] == [
        ("age", "ResNet", "finetune 50% fold 0")]
    monkeypatch.undo()
    assert not filled(params).missing
    after = cell_files(run)
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 1


@pytest.mark.slow
def test_a_killed_benchmark_goes_on(stores, tmp_path):
    """`kill -9` amid fine-tuning: the same table, and no cell is computed twice."""
    whole = filled(params_for(stores, tmp_path / "whole", baselines=["guess"], steps=20))
    values = params_for(stores, tmp_path / "run", baselines=["guess"], steps=20).plain()
    code = ("import json, sys; from kit.params import Benchmark; from kit.runs import Run; "
            "from kit.evaluate.benchmark import run_benchmark; "
            "params = Benchmark.model_validate(json.loads(sys.argv[1])); run_benchmark(params, Run.of(params))")
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(values)])
    until = time.monotonic() + 120
    while not list(tmp_path.glob("run/cells/lesion/ResNet/*/seed0.csv")) and time.monotonic() < until:
        assert process.poll() is None, "it was faster than the test"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = cell_files(tmp_path / "run")
    assert before
    again = filled(params_for(stores, tmp_path / "run", baselines=["guess"], steps=20))
    after = cell_files(tmp_path / "run")
    assert {path: after[path] for path in before} == before and len(after) > len(before)
    pd.testing.assert_frame_equal(again.scores, whole.scores)


def test_cells_have_folders_of_their_own(stores):
    params = params_for(stores, "outputs/x", encoders={"a/b": "random:vit", "a%2Fb": "random:vit", "c": "random:vit"},
                        finetune_tasks=["lesion", "age"])
    cells = cells_of(params, {"lesion": [0, 1], "age": [0]})
    assert len({cell.folder for cell in cells}) == len(cells) and all(len(cell.folder.parts) == 4 for cell in cells)


@pytest.mark.parametrize(("values", "words"), [
    ({"encoders": {}}, "encoders: got {}; name one at least, such as {'ResNet': 'random:resnet18'}"),
    ({"demographics": ["age", "height"]}, "demographics: no column height in the index of .*/here; it has scan, "),
    ({"volumes": "nowhere.csv"}, "volumes: .*nowhere.csv cannot be read: No such file or directory"),
    ({"volumes": "text.csv"}, "volumes: .*text.csv: row 2 has more cells than the header"),
    ({"atlas": "nowhere.nii"}, "atlas: .*nowhere.nii: no such file"),
    ({"atlas": "text.csv"}, "atlas: .*text.csv: not a NIfTI file"),
    ({"atlas": "thickness.nii"}, "atlas: .*thickness.nii holds 2.5; give a map of whole-numbered regions"),
])
def test_what_baselines_need_is_checked_before_work(stores, tmp_path, values, words):
    (tmp_path / "text.csv").write_text("participant\n1,2\n")
    write_nifti(tmp_path / "thickness.nii", np.arange(27, dtype=np.float32).reshape(3, 3, 3) * 2.5, np.eye(4))
    values = {name: str(tmp_path / value) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(ParameterError, match=f"1 thing is wrong:\n  {words}"):
        params_for(stores, tmp_path / "run", **({"finetune_tasks": []} | values))


def test_a_table_of_volumes_that_cannot_be_used_is_refused_before_work(stores, tmp_path):
    (tmp_path / "volumes.csv").write_text("name,ml\nx,1\n")
    with pytest.raises(TableError, match="volumes.csv: needs a column participant"):
        filled(params_for(stores, tmp_path / "run", volumes=str(tmp_path / "volumes.csv")))
    assert not cell_files(tmp_path / "run")


def test_probes_embed_the_tasks_scans_once(stores, tmp_path, monkeypatch):
    index = stores[0].index
    labelled = index["participant"].astype(int) < 40
    some = Store(stores[0].folder, index.assign(lesion=index["lesion"].where(labelled), age=index["age"].where(
        ~labelled & (index["participant"].astype(int) < 50))), stores[0].record)
    read, real = [], benchmark_cells.predict
    monkeypatch.setattr(benchmark_cells, "open_stores", lambda params: {"prepared": some})
    monkeypatch.setattr(benchmark_cells, "predict", lambda model, scans: read.extend(scans.scans) or real(model, scans))
    values = {"baselines": ["random init"], "seeds": [0], "finetune_tasks": [], "label_fractions": [1.0],
              "out_of_distribution": None}
    first = filled(params_for(stores, tmp_path / "run", **values))
    expected = index["scan"][index["participant"].astype(int) < 50].tolist()
    assert read == expected and len(expected) < len(index)
    shutil.rmtree(tmp_path / "run/cells")
    pd.testing.assert_frame_equal(filled(params_for(stores, tmp_path / "run", **values)).scores, first.scores)
    assert read == expected, "the features are kept"
    monkeypatch.setattr(kit, "__version__", "0.0.0+other")
    filled(params_for(stores, tmp_path / "run", **values))
    assert read == 2 * expected, "those of another kit are not"


def test_names_of_baselines_are_taken(stores):
    with pytest.raises(ParameterError, match="encoders.volumes: a baseline has this name"):
        params_for(stores, "outputs/x", encoders={"volumes": "random:vit"})


def test_an_encoder_of_each_seed(stores, tmp_path, monkeypatch):
    """`{seed}` in an encoder's name: a probe on all labels has as many replicates as there are encoders."""
    seen = []
    real = benchmark_cells.load_encoder
    monkeypatch.setattr(benchmark_cells, "load_encoder", lambda spec, *more: seen.append(spec) or real(
        "random:resnet18_narrow", *more))
    monkeypatch.setattr(benchmark_cells, "side_of", lambda spec: {})
    monkeypatch.setattr(benchmark_cells, "noted", lambda spec, network, record: {"from": spec, "weights": spec,
                                                                                 "objective": "simclr"})
    monkeypatch.setattr(benchmark_cells, "read_record", lambda spec: {"architecture": "resnet18_narrow"})
    params = params_for(stores, tmp_path / "run", baselines=["guess"], finetune_tasks=[], label_fractions=[1.0])
    results = filled(params.model_copy(update={"encoders": {"SimCLR": "outputs/fold{fold}/seed{seed}"}}))
    assert {"outputs/fold0/seed0", "outputs/fold0/seed1"} <= set(seen)
    probe = results.scores[results.scores["encoder"] == "SimCLR"]
    assert set(probe["seeds"]) == {2} and np.isfinite(probe["value"]).all()
    assert set(results.differences["rival"]) == {"guess"}


def test_reliability_of_scans_seen_under_other_names_is_refused_or_allowed(stores, tmp_path, capsys):
    """What `allow_seen_participants` allows elsewhere, it allows here."""
    store = stores[0]
    record = {"architecture": "resnet18_narrow", "objective": "simclr", "preparation": store.record,
              "participants": [], "voxels": sorted(voxel_hashes(store, store.index["scan"]).values()),
              "salt": participant_hash("salt", salt()), "made_from": {"prepared": {}}}
    save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), record)
    values = {"encoders": {"SimCLR": str(tmp_path / "encoder.safetensors")}, "baselines": [], "tasks": ["lesion"],
              "finetune_tasks": [], "allow_seen_participants": True}
    params = params_for(stores, tmp_path / "run", **values)
    table = reliabilities(params, run := Run.of(params))
    run.close()
    assert table["encoder"].tolist() == ["SimCLR", "random init"] and np.isfinite(table["icc"]).all()
    assert "SEEN IN PRETRAINING: 0 of 20 participants, 40 of 40 scans\n" in capsys.readouterr().out
    with pytest.raises(LeakageError, match="40 of 40 scans to be evaluated were seen in pretraining"):
        reliability_of(build_encoder("resnet18_narrow", GRID), store, record=record)


def test_a_gain_from_longer_training_is_judged_over_folds():
    def judged(*folds):
        return benchmark._converged(*(pd.Series(each, dtype=float) for each in zip(*folds, strict=True)))

    assert judged((0.5, 1)) is True and judged((1.5, 1)) is False and judged((0, 0), (-3, 0.1)) is True
    assert judged(*3 * [(0.5, 1)]) is True and judged(*5 * [(0.5, 1)]) is False  # errors of means: .58, .45
    unknown = (np.nan, np.nan)
    assert judged(unknown) is judged((0.5, 1), unknown) is None and judged((1.5, 1), unknown) is False


def test_models_that_predict_nearly_one_number_are_counted():
    people = pd.DataFrame({"true": [20.0, 40, 60, 80]})
    rows = [people.assign(predicted=50 + share * (people["true"] - 50), seed=seed, fold=fold, distribution=where)
            for seed, fold, share, where in ((0, 0, 0.19, "in_distribution"), (0, 1, 0.21, "in_distribution"),
                                             (1, 0, 0.0, "in_distribution"), (1, 1, -1.0, "in_distribution"),
                                             (1, 1, 0.0, "elsewhere"))]
    assert benchmark._flat(pd.concat(rows)) == (4, 2)


def test_a_last_age_band_holds_its_upper_edge():
    """De-identified tables have 90 for all who are older."""
    scans = pd.DataFrame({"participant": list("abcd"), "true": 0.0, "predicted": 0.0, "age": [59.9, 60, 90, 91]})
    params = Benchmark.model_construct(age_bands=[20, 60, 90], match_age_sex=False)
    found = {name: rows["participant"].tolist() for name, rows in benchmark._alike(scans, "age", "regression", params)}
    assert found == {"age 20 to 60": ["a"], "age 60 to 90": ["b", "c"]}


def test_two_of_three_classes_make_no_pairs():
    """Another task's column `predicted` is there, but empty."""
    scans = pd.DataFrame({"participant": list("ab"), "true": [0.0, 1], "age": 70, "sex": "F"})
    several = scans.assign(predicted=np.nan, predicted_0=0.0, predicted_1=0.0, predicted_2=0.0)
    params = Benchmark.model_construct(age_bands=[], match_age_sex=True)
    assert not list(benchmark._alike(several, "stage", "classification", params))
    assert list(benchmark._alike(scans.assign(predicted=0.0), "stage", "classification", params))


def test_who_changed_class_is_in_no_pair():
    scans = pd.DataFrame([("a", 0, 70, "F"), ("a", 1, 71, "F"), ("b", 1, 70, "F"), ("c", 0, 71, "F")],
                         columns=["participant", "true", "age", "sex"]).assign(predicted=0.0)
    params = Benchmark.model_construct(age_bands=[], match_age_sex=True)
    (_, pairs), = benchmark._alike(scans, "dementia", "classification", params)
    assert pairs["participant"].tolist() == ["b", "c"]
