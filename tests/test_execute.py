"""Notebooks headless: mistakes are refused before work, by the command line and by plain papermill."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from kit.cohort.tabular import read_table
from kit.execute import FOLDER, _losses, _say_where, defaults, main, notebook_of, run, run_folder, steps_of
from kit.params import NOTEBOOKS
from kit.reading import ParameterError
from kit.runs import ROOT, RunError
from tests.conftest import absent, make_store


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_OUTPUTS", str(tmp_path / "outputs"))


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "kit.execute", *arguments], capture_output=True, text=True, cwd=ROOT,
                          check=False)


def test_mistakes_on_the_command_line_are_listed_together():
    done = command("3_finetune", "-p", "label_fraction", "2", "-p", "temprature", "0.1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("2 things are wrong", "label_fraction: got 2", "temprature: unknown parameter"):
        assert part in done.stderr


def test_numbers_that_yaml_misreads_are_refused_together_on_the_command_line():
    done = command("2_pretrain", "-p", "epochs", "010", "-p", "projection", "[128, 1:30]", "-p", "temperature", "1e-4")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "2 things are wrong" in done.stderr
    assert "epochs: YAML reads 010 as 8" in done.stderr and "projection.1: YAML reads 1:30 as 90" in done.stderr
    done = command("2_pretrain", "-p", "ema", ".nan", "-p", "temperature", ".inf", "-p", "learning_rate", "1e-4")
    assert "ema: got nan" in done.stderr and "temperature: got inf" in done.stderr
    assert "learning_rate" not in done.stderr


def test_check_only_says_where_the_run_would_write(tmp_path):
    done = command(str(FOLDER / "1_preprocess.ipynb"), "-p", "output_dir", "outputs/here", "--check")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "outputs" / "here")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("what", ["1_preprocess", "1_preprocess.ipynb", "notebooks/1_preprocess.ipynb",
                                  str(FOLDER / "1_preprocess.ipynb")])
def test_the_kits_own_notebook_is_run_by_its_name_or_path(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["kit.execute", what, "--check"])
    assert main() == 0 and str(tmp_path / "outputs") in capsys.readouterr().out


@pytest.mark.parametrize("what", ["1_preprocess.ipynb", "./mine/1_preprocess.ipynb"])
def test_a_copy_of_a_notebook_is_refused_not_run_as_the_kits_own(what, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    shutil.copy(FOLDER / "1_preprocess.ipynb", tmp_path / what)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kit.execute", what, "--check"])
    with pytest.raises(SystemExit):
        main()
    assert f"{what} is not notebooks/1_preprocess.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "fails"), [("# Parameters\nseed = 0  # of all draws", False),
                                               ("# Parameters\nseed = 0", True)])
def test_a_parameters_cell_that_passes_for_papermills_is_refused(source, fails, tmp_path, monkeypatch):
    monkeypatch.setattr("kit.execute.FOLDER", tmp_path)
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "2_pretrain.ipynb")
    if fails:
        with pytest.raises(ParameterError, match="2_pretrain: the cell `# Parameters` needs a comment besides its fir"):
            defaults("2_pretrain")
    else:
        assert defaults("2_pretrain") == {"seed": 0}


def test_a_notebook_run_alone_says_what_to_run_first():
    done = command("3_finetune")
    assert done.returncode == 2
    assert "run 1_preprocess first" in done.stderr and "run 2_pretrain first" in done.stderr


def test_another_runs_folder_is_refused_before_the_kernel_starts(tmp_path):
    folder = tmp_path / "outputs" / "quick" / "1_preprocess"
    folder.mkdir(parents=True)
    params = NOTEBOOKS["1_preprocess"].model_validate({**defaults("1_preprocess"), "seed": 7})
    (folder / "params.yaml").write_text(yaml.safe_dump(params.plain()))
    (folder / "index.csv").touch()
    done = command("1_preprocess")
    assert done.returncode == 2 and "seed: the folder has 7, asked for 0" in done.stderr


def test_plain_papermill_refuses_an_unknown_name_in_the_second_cell(tmp_path):
    with pytest.raises(PapermillExecutionError) as error:
        papermill.execute_notebook(FOLDER / "1_preprocess.ipynb", tmp_path / "out.ipynb", {"wrokers": 1}, cwd=tmp_path,
                                   progress_bar=False)
    assert error.value.ename == "ParameterError"
    assert "wrokers: unknown parameter; did you mean workers?" in error.value.evalue
    assert not (tmp_path / "outputs" / "sample").exists(), "work was done before"


def test_an_empty_name_of_a_parameter_file_does_not_run_the_defaults():
    done = command("1_preprocess", "-f", "", "--check")
    assert done.returncode == 2 and "the parameter file's name is empty" in done.stderr


def test_a_job_whose_parameter_file_is_not_there_ends_at_once(tmp_path):
    """Also in a folder that is not there, for which `realpath` prints nothing."""
    for file in ("none/mine.yaml", "none.yaml"):
        done = subprocess.run(["bash", ROOT / "slurm" / "papermill.sbatch", "notebooks/1_preprocess.ipynb",
                               tmp_path / "out.ipynb", tmp_path / file], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "KIT_PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT)})
        assert done.returncode == 2 and file in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_losses_in_words(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss\n1,4.08\n2,2.0\n3,1.137\n")
    assert _losses(tmp_path / "log.csv") == "loss 4.08 in the first, 1.14 in the last of 3 epochs"


def test_a_parameter_file_is_named_after_its_notebook(tmp_path):
    assert notebook_of(ROOT / "params/demo/2_pretrain_mae.yaml") == "2_pretrain"
    with pytest.raises(ParameterError, match="must start with a notebook's"):
        notebook_of(tmp_path / "pretrain.yaml")


@pytest.fixture(scope="module")
def quick_pretraining(tmp_path_factory):
    """Parameters of a pretraining of seconds, whose folder says its seed."""
    store = make_store(tmp_path_factory.mktemp("store"), 12)
    return {"prepared": str(store.folder), "epochs": 1, "batch_size": 4, "monitor_epochs": 0, "leave_out_test": False,
            "output_dir": "outputs/of{seed}"}


def test_a_parameter_that_the_cell_leaves_out_brings_no_warning(quick_pretraining, tmp_path, monkeypatch, caplog):
    notebook = nbformat.read(FOLDER / "2_pretrain.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    nbformat.write(notebook, tmp_path / "2_pretrain.ipynb")
    monkeypatch.setattr("kit.execute.FOLDER", tmp_path)
    assert "leave_out_test" not in notebook.cells[0].source
    page = run("2_pretrain", quick_pretraining | {"output_dir": "outputs/rare"})
    assert "leave_out_test = False" in nbformat.read(page.with_name("2_pretrain.ipynb"), as_version=4).cells[1].source
    assert "unknown parameter" not in caplog.text
    logging.getLogger("papermill").warning("another warning")
    assert "another warning" in caplog.text


def only(cell, folder, monkeypatch):
    """A notebook of the parameters and this one cell, in place of 2_pretrain."""
    notebook = nbformat.read(FOLDER / "2_pretrain.ipynb", as_version=4)
    kept = [each for each in notebook.cells if "parameters" in each.metadata.get("tags", [])]
    notebook.cells = [*kept, nbformat.v4.new_code_cell(cell)]
    nbformat.write(notebook, folder / "2_pretrain.ipynb")
    monkeypatch.setattr("kit.execute.FOLDER", folder)


def test_the_output_lies_where_paths_of_parameters_lie(quick_pretraining, tmp_path, monkeypatch):
    only("1 + 1", tmp_path, monkeypatch)
    page = run("2_pretrain", quick_pretraining | {"output_dir": "outputs/rare"}, Path("outputs/own/seed-0.ipynb"))
    assert page == tmp_path / "outputs/own/seed-0.html" and page.with_suffix(".ipynb").exists()


def test_a_report_that_cannot_be_written_does_not_hide_why_the_notebook_failed(quick_pretraining, tmp_path, monkeypatch,
                                                                              capsys):
    only("raise ValueError('the first')", tmp_path, monkeypatch)
    asked = []
    monkeypatch.setattr("kit.execute.write_report", lambda *paths: asked.append(paths) or {}["no space left"])
    with pytest.raises(PapermillExecutionError, match="the first"):
        run("2_pretrain", quick_pretraining | {"output_dir": "outputs/rare"})
    assert len(asked) == 1 and "no report is written: 'no space left'" in capsys.readouterr().err


def test_the_notebook_is_not_written_within_a_cell(quick_pretraining, tmp_path, monkeypatch):
    """papermill would, every 30 s; on a full disk that ends its task that reads the cell's outputs."""
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **options: options["autosave_cell_every"] and {}["on"])
    run("2_pretrain", quick_pretraining | {"output_dir": "outputs/rare"})


@pytest.mark.slow
def test_a_folder_of_parameters_runs_in_order_and_ends_with_where_things_lie(quick_pretraining, tmp_path, capsys):
    params = tmp_path / "params"
    params.mkdir()
    (params / "budget.yaml").write_text("2_pretrain: 60\n")
    values = quick_pretraining | {"output_dir": "outputs/few"}
    (params / "2_pretrain.yaml").write_text(yaml.safe_dump(values))
    run_folder(params)
    text = capsys.readouterr().out
    assert "[1/1] 2_pretrain, about 60 s" in text and "outputs/few/report.html" in text
    assert "2_pretrain: loss" in text
    names = {path.name for path in (tmp_path / "outputs" / "few").iterdir()}
    assert names >= {"2_pretrain.ipynb", "report.html", "index.html", "params.yaml", "metrics.json", "log.csv"}
    (params / "2_pretrain.yaml").write_text(yaml.safe_dump(values | {"batch_size": 6}))
    with pytest.raises(RunError, match="batch_size: the folder has 4, asked for 6"):
        run_folder(params)


def test_a_file_is_run_once_for_each_combination(tmp_path):
    (tmp_path / "2_pretrain.yaml").write_text("prepared: outputs/one\noutput_dir: outputs/fold{fold}-seed{seed}\n")
    (tmp_path / "budget.yaml").write_text("2_pretrain: {seconds: 9, each: {fold: [0, 1], seed: [3, 4]}}\n")
    steps = steps_of(tmp_path)
    assert [step.values["output_dir"] for step in steps] == [
        f"outputs/fold{fold}-seed{seed}" for fold in (0, 1) for seed in (3, 4)]
    assert [step.values["seed"] for step in steps] == [3, 4, 3, 4] and steps[1].name == "2_pretrain fold 0 seed 4"
    assert {step.values["prepared"] for step in steps} == {"outputs/one"}
    for entry in ("{'minutes': 9}", "{'seconds': 9, 'each': {'seed': 3}}", "{'seconds': 9, 'at_once': 0}"):
        (tmp_path / "budget.yaml").write_text(f"2_pretrain: {entry}\n")
        with pytest.raises(ParameterError) as error:
            steps_of(tmp_path)
        assert f"budget.yaml: 2_pretrain: got {entry}; give seconds" in str(error.value)


def test_places_in_lists_and_tables_are_filled_as_well(tmp_path):
    (tmp_path / "5_benchmark.yaml").write_text("encoders: {A: 'outputs/{seed}'}\ntasks: ['{task}', age]\n")
    (tmp_path / "budget.yaml").write_text("5_benchmark: {seconds: 9, each: {seed: [3], task: [sex]}}\n")
    step, = steps_of(tmp_path)
    assert step.values == {"encoders": {"A": "outputs/3"}, "tasks": ["sex", "age"], "seed": 3, "task": "sex"}


def test_shards_that_would_be_dropped_and_an_empty_budget_are_refused(tmp_path):
    for name, entry in (("5_benchmark", "{'seconds': 9, 'shards': 2, 'at_once': 2}"),
                        ("2_pretrain", "{'seconds': 9, 'shards': 2}")):
        (tmp_path / f"{name}.yaml").write_text("output_dir: outputs/few\n")
        (tmp_path / "budget.yaml").write_text(f"{name}: {entry}\n")
        with pytest.raises(ParameterError) as error:
            steps_of(tmp_path)
        assert f"budget.yaml: {name}: got {entry}; shards are for 5_benchmark, and not beside" in str(error.value)
    (tmp_path / "budget.yaml").write_text("# nothing yet\n")
    with pytest.raises(ParameterError, match=r"budget.yaml: is empty; give lines such as `2_pretrain: 60`"):
        run_folder(tmp_path)


@pytest.mark.slow
def test_a_notebook_runs_without_any_network(quick_pretraining, tmp_path):
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "alone"]  # kernels talk over the loopback
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        absent("no user namespaces, or no `ip`: apt-get install util-linux iproute2")
    reach = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"
    assert subprocess.run([*alone, sys.executable, "-c", reach], capture_output=True).returncode, "there is a network"
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(quick_pretraining | {"output_dir": "outputs/offline"}))
    done = subprocess.run([*alone, sys.executable, "-m", "kit.execute", "2_pretrain", "-f", tmp_path / "values.yaml"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"encoder.safetensors", "report.html"} <= {path.name for path in (tmp_path / "outputs/offline").iterdir()}


@pytest.mark.slow
def test_runs_at_once_have_a_core_each_and_after_a_failure_no_other_starts(quick_pretraining, tmp_path, capfd):
    (tmp_path / "2_pretrain.yaml").write_text(yaml.safe_dump(quick_pretraining))
    entry = "2_pretrain: {{seconds: 9, each: {{seed: {}}}, at_once: 2}}\n"
    (tmp_path / "budget.yaml").write_text(entry.format([40, 41]))
    run_folder(tmp_path)
    said = capfd.readouterr()
    assert "[2/2] 2_pretrain seed 41" in said.out and "outputs/of41/report.html" in said.out
    overview = (tmp_path / "outputs/index.html").read_text()
    for seed in (40, 41):
        assert f"2_pretrain seed {seed}: 100%" in said.err and f"of{seed}/index.html" in overview
        assert yaml.safe_load((tmp_path / f"outputs/of{seed}/params.yaml").read_text())["seed"] == seed
        assert len(read_table(tmp_path / f"outputs/of{seed}/log.csv")) == 1
    (tmp_path / "outputs" / "of42").mkdir()
    (tmp_path / "outputs" / "of42" / "params.yaml").write_text("seed: 41\n")
    (tmp_path / "outputs" / "of42" / "log.csv").write_text("of another run\n")
    (tmp_path / "budget.yaml").write_text(entry.format([42, 41, 43]))
    with pytest.raises(RunError, match="2_pretrain seed 42: failed with exit code 2; see its output above"):
        run_folder(tmp_path)
    assert "seed: the folder has 41, asked for 42" in capfd.readouterr().err
    assert not (tmp_path / "outputs" / "of43").exists()


@pytest.mark.slow
def test_shards_fill_the_cells_of_the_table_that_the_last_run_makes(tmp_path, capfd):
    make_store(tmp_path / "store", 40)
    (tmp_path / "budget.yaml").write_text("5_benchmark: {seconds: 9, shards: 2}\n")
    (tmp_path / "5_benchmark.yaml").write_text(yaml.safe_dump({
        "prepared": str(tmp_path / "store"), "encoders": {"ResNet": "random:resnet18_narrow"}, "tasks": ["lesion"],
        "baselines": ["guess", "voxels"], "label_fractions": [1.0], "finetune_tasks": ["lesion"],
        "finetune_fractions": [1.0], "steps": 4, "out_of_distribution": None, "output_dir": "outputs/table"}))
    run_folder(tmp_path)
    table = tmp_path / "outputs/table"
    made = [path.stat().st_mtime for path in table.glob("cells/**/seed*.csv")]
    assert len(made) == 3 and max(made) < (table / "scores.csv").stat().st_mtime
    assert {path.name for path in (table / "shards").iterdir()} == {"0-of-2", "1-of-2"}
    assert not list(table.glob("shards/*/*.ipynb")) and (table / "report.html").exists()
    assert "outputs/table/index.html, or a report" in capfd.readouterr().out


def test_the_last_files_mistakes_are_told_before_the_first_runs(tmp_path):
    (tmp_path / "budget.yaml").write_text("1_preprocess: 60\n5_benchmark: 60\n")
    (tmp_path / "1_preprocess.yaml").write_text("output_dir: outputs/few\n")
    (tmp_path / "5_benchmark.yaml").write_text("taks: [age]\n")
    with pytest.raises(ParameterError, match="taks: unknown parameter; did you mean tasks"):
        run_folder(tmp_path)
    assert not (tmp_path / "outputs").exists()


def test_two_runs_of_one_folder_are_refused_before_the_first_runs(tmp_path):
    (tmp_path / "budget.yaml").write_text("1_preprocess: {seconds: 9, each: {intensity: [zscore, whitematter]}}\n")
    (tmp_path / "1_preprocess.yaml").write_text("output_dir: outputs/few\n")
    with pytest.raises(ParameterError, match="1_preprocess intensity zscore and 1_preprocess intensity whitematter "
                                             "would both write to outputs/few; give each its own output_dir"):
        run_folder(tmp_path)
    assert not (tmp_path / "outputs").exists()


def runs_in(folder, *names):
    """Finished runs, as `run_folder` lists them."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "index.html").write_text("its own")
    return [(name, 1.0, folder / name) for name in names]


def test_the_overview_of_runs_replaces_no_runs_own_index(tmp_path, capsys):
    _say_where(runs_in(tmp_path, "one", "one/plan"))
    assert (tmp_path / "one/index.html").read_text() == "its own"
    assert f"To open in a browser: {tmp_path}/one/plan/index.html" in capsys.readouterr().out
    _say_where(runs_in(tmp_path, "two"))
    assert (tmp_path / "two/index.html").read_text() == "its own"


def test_runs_that_share_no_folder_are_listed_without_an_overview(tmp_path, capsys):
    _say_where([*runs_in(tmp_path, "one"), ("elsewhere", 1.0, Path("/elsewhere/two"))])
    said = capsys.readouterr().out
    assert not Path("/index.html").exists() and f"{tmp_path}/one/report.html" in said
    assert "/elsewhere/two/report.html" in said


def test_a_benchmarks_summary_is_printed_wherever_it_stands_in_the_order(tmp_path, capsys):
    lines = runs_in(tmp_path, "5_benchmark", "6_apply")
    (tmp_path / "5_benchmark/summary.txt").write_text("SimCLR 0.81")
    _say_where(lines)
    assert "5_benchmark\nSimCLR 0.81" in capsys.readouterr().out and (tmp_path / "index.html").exists()


def test_a_folder_without_a_budget_is_refused():
    done = command("params/paper")
    assert done.returncode == 2 and "params/paper: no budget.yaml" in done.stderr


@pytest.mark.parametrize(("options", "words"), [
    (["params/demo", "--check"], "a folder is run as its files say, without options"),
    (["params/demo", "-p", "epochs", "1"], "a folder is run as its files say, without options"),
    (["2_pretrain", "--cells"], "--cells is for 5_benchmark")])
def test_options_that_would_be_ignored_are_refused(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kit.execute", *options])
    monkeypatch.setattr("kit.execute.run_folder", lambda folder: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err
