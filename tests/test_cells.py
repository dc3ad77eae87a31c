"""Cells run by hand, in a real kernel: again, edited, in another order, two notebooks in one kernel."""

import json

import nbformat
import pytest
import yaml
from jupyter_client.manager import start_new_kernel
from papermill.translators import PythonTranslator

from kit.cells import assigned_names, from_papermill, literals
from kit.execute import FOLDER
from kit.params import NOTEBOOKS
from kit.runs import ROOT
from tests.conftest import make_store


class Kernel:
    """A kernel as JupyterLab starts it: cells run one by one, and may fail."""

    def __init__(self, manager, client):
        self.manager, self.client = manager, client

    def run(self, source: str, fails: str = "", history: bool = True) -> str:
        """Run a cell; what it printed. With `fails`, it must raise an error whose text holds that."""
        said = []

        def note(message):
            said.append(message["content"].get("text", ""))

        reply = self.client.execute_interactive(source, store_history=history, output_hook=note, timeout=300)["content"]
        if fails:
            assert reply["status"] == "error" and fails in reply["evalue"], reply.get("evalue", "it went well")
        else:
            assert reply["status"] == "ok", f"{source}\n{reply.get('evalue')}"
        return "".join(said)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel of its own, with outputs of its own."""
    monkeypatch.setenv("KIT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("KIT_PROGRESS", "off")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    yield Kernel(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def cells(name: str) -> list[str]:
    """The code cells of a notebook."""
    return [cell.source for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
            if cell.cell_type == "code"]


def parameters(name: str, **values: object) -> str:
    """A notebook's own cell of parameters, edited by hand."""
    lines = cells(name)[0].splitlines()
    for key, value in values.items():
        lines = [line for line in lines if not line.startswith(f"{key} = ")] + [f"{key} = {value!r}"]
    return "\n".join(lines)


def injected(**values: object) -> str:
    """The cell that papermill would inject."""
    return PythonTranslator.codify(values)


def stored(folder) -> dict:
    return yaml.safe_load((folder / "params.yaml").read_text())


READ = cells("0_explore_augmentations")[1]


def test_names_come_from_the_source():
    sources = ["# Parameters\nseed = 0\nshape: list = [1]\n", "# Parameters\nsed = 1\nprint(seed)"]
    assert assigned_names(sources) == ["seed", "shape", "sed"]
    assert literals([*sources, "seed = 3 * 4\nsed = 2"]) == {"shape": [1], "sed": 2}
    tuples = ["seed = 0\nseed, epochs = 1, 2\nif True:\n    steps = 3\ndef of(x):\n    local = x\n"]
    assert assigned_names(tuples) == ["seed", "epochs", "steps"] and literals(tuples) == {}


def test_a_literal_that_its_own_cell_changes_in_place_is_read_as_it_came_out(kernel):
    assert literals(["tasks = []\nencoders = {}\nseed = 1\ntasks.append('sex')\nencoders['B'] = 'b'"]) == {"seed": 1}
    kernel.run(parameters("0_explore_augmentations", shape=[36, 48, 40]) + "\nshape[2] = 48")
    kernel.run(READ)
    kernel.run("assert params.shape == (36, 48, 48)")


def test_papermills_cell_is_told_from_the_notebooks_own():
    assert from_papermill(injected(task="#1", encoders={"a": "random"}, epochs=3, none=None))
    assert not from_papermill("# Parameters\nepochs = 3  # or more\n")


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name[0] in "01"])
def test_the_first_two_cells_run_again(kernel, name):
    first, second = cells(name)[:2]
    for _ in range(3):
        kernel.run(first)
        kernel.run(second)
    kernel.run(second)
    # what another kernel asks for is still refused while this one holds it, and given when it is closed
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        other = Kernel(manager, client)
        other.run(first)
        other.run(second, fails="another process is writing this run")
        kernel.run("run.close()")
        other.run(second)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_second_notebook_of_the_same_kernel_writes_the_same_run(kernel):
    """Both hold it: one that is closed leaves it to the other."""
    kernel.run(cells("0_explore_augmentations")[0])
    kernel.run(READ)
    kernel.run(READ.replace("run = ", "second = "))
    kernel.run("run.close()")
    kernel.run("from kit.machine import Lock; assert len(Lock._held) == 1")
    kernel.run("second.close()")
    kernel.run("assert not Lock._held")


def test_a_parameter_that_was_deleted_is_back_at_its_default(kernel, tmp_path):
    kernel.run(parameters("0_explore_augmentations", seed=7, output_dir="outputs/a"))
    kernel.run(READ)
    assert stored(tmp_path / "outputs/a")["seed"] == 7
    without = parameters("0_explore_augmentations", seed=7, output_dir="outputs/b").replace("seed = 7", "")
    kernel.run(without)
    kernel.run(READ)
    assert stored(tmp_path / "outputs/b")["seed"] == 0


def test_a_bracket_that_was_left_open_costs_one_run_of_the_cell(kernel):
    kernel.run("# Parameters\nshape = (36, 48, 40", fails="incomplete input")
    kernel.run(READ, fails="was last run with a mistake in it: run it again")
    kernel.run(parameters("0_explore_augmentations", seed=7, output_dir="outputs/a"))
    kernel.run(READ)
    kernel.run("assert params.seed == 7")


def test_a_typo_that_was_corrected_is_forgotten(kernel, tmp_path):
    kernel.run(parameters("0_explore_augmentations", sed=7, output_dir="outputs/a"))
    kernel.run(READ, fails="sed: unknown parameter; did you mean seed?")
    kernel.run(parameters("0_explore_augmentations", sede=7, output_dir="outputs/a"))  # before it is read
    kernel.run(parameters("0_explore_augmentations", seed=7, output_dir="outputs/a"))
    kernel.run(READ)
    assert stored(tmp_path / "outputs/a")["seed"] == 7
    kernel.run(parameters("0_explore_augmentations", seed=8, output_dir="outputs/b"))  # and back to an old version
    kernel.run(parameters("0_explore_augmentations", seed=7, output_dir="outputs/a"))
    kernel.run(READ)
    kernel.run("assert params.seed == 7")


def test_a_name_that_another_cell_assigned_is_refused_not_read(kernel):
    kernel.run(cells("0_explore_augmentations")[0])
    kernel.run("seed = 3")
    kernel.run(READ, fails="seed: the cell `# Parameters` says 0, but another cell has set it to 3; run that cell")
    kernel.run("import pandas; seed = pandas.DataFrame({'a': [1, 2]})")
    kernel.run(READ, fails="another cell has set it to a DataFrame")
    kernel.run(cells("0_explore_augmentations")[0])
    kernel.run(READ)


def test_expressions_are_read_as_they_came_out(kernel):
    kernel.run(parameters("0_explore_augmentations") + "\nimport os\nseed = 3 * 4\nscans = len(os.sep) + 3")
    kernel.run(READ)
    kernel.run("assert (params.seed, params.scans) == (12, 4)")


@pytest.mark.parametrize("history", [True, False])
def test_papermills_cell_counts_beside_the_notebooks_own(kernel, history):
    own = cells("0_explore_augmentations")[0]
    kernel.run(own, history=history)
    kernel.run(injected(seed=5, recipe="none", output_dir="outputs/a"), history=history)
    kernel.run(READ, history=history)
    kernel.run("assert (params.seed, params.recipe, params.scans) == (5, 'none', 6)", history=history)


@pytest.mark.parametrize("history", [True, False])
def test_a_cell_whose_comment_only_begins_alike_is_not_the_notebooks_own(kernel, history):
    kernel.run(parameters("0_explore_augmentations", seed=7), history=history)
    kernel.run("# Parameters of the second run\nlearning_rate = 0.1", history=history)
    kernel.run(READ, history=history)
    kernel.run("assert params.seed == 7", history=history)


@pytest.mark.parametrize("history", [True, False])
def test_values_of_a_cell_that_says_more_than_parameters_are_not_lost_in_silence(kernel, history):
    kernel.run("# Parameters (mine)\nseed = 7  # another", history=history)
    kernel.run(READ, fails="the first line of the cell `# Parameters (mine)` must be `# Parameters` and no more",
               history=history)
    kernel.run(parameters("0_explore_augmentations", seed=7), history=history)
    kernel.run(READ, history=history)


def test_an_executed_notebook_of_papermill_is_edited_by_hand(kernel):
    own = cells("0_explore_augmentations")[0]
    kernel.run(own)
    kernel.run(injected(sed=5, output_dir="outputs/a"))
    kernel.run(READ, fails="sed: unknown parameter")
    kernel.run(injected(seed=5, output_dir="outputs/a"))  # the typo is corrected there
    kernel.run(READ)
    kernel.run(own)  # and now the upper cell alone: whose values count cannot be told
    for _ in range(2):
        kernel.run(READ, fails="papermill's cell `# Parameters` ran before the notebook's own")
    kernel.run(injected(seed=6, output_dir="outputs/b"))
    kernel.run(READ)
    kernel.run("assert params.seed == 6")


def test_two_notebooks_of_one_kernel_keep_their_parameters_apart(kernel, tmp_path):
    store = make_store(tmp_path)
    tune = parameters("3_finetune", prepared=str(store.folder), out_of_distribution=None,
                      encoder="random:resnet18_narrow", task="lesion", output_dir="outputs/run")
    for _ in range(2):
        kernel.run(cells("0_explore_augmentations")[0])
        kernel.run(READ)
        kernel.run(tune)
        kernel.run(cells("3_finetune")[1])
        kernel.run("assert params.task == 'lesion'")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2_pretrain", "3_finetune"])
def test_a_whole_notebook_runs_twice_and_then_from_its_second_cell(kernel, tmp_path, name):
    store = make_store(tmp_path)
    changes = {"prepared": str(store.folder), "output_dir": str(tmp_path / "run")}
    if name == "2_pretrain":
        changes |= {"epochs": 2}
    else:
        changes |= {"steps": 4, "check_steps": 2, "out_of_distribution": None, "task": "lesion",
                    "encoder": "random:resnet18_narrow"}
    first, *rest = [parameters(name, **changes), *cells(name)[1:]]
    for turn in range(3):
        for cell in ([first] if turn < 2 else []) + rest:
            kernel.run(cell)
    assert json.loads((tmp_path / "run/metrics.json").read_text())


def few(folder, rows, **columns):
    """A store of these rows of the made-up index, with these columns besides."""
    store = make_store(folder, participants=12)
    store.index.iloc[list(rows)].assign(**columns).to_csv(folder / "index.csv", index=False)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "words"), [
    (range(16), {"split": ["test"] * 10 + ["train"] * 6},
     "split: 'pretrain' leaves 0 scans of 0 participants to learn from, besides 0 for validation; at least two "
     "participants are needed. In PLACE the column split of its index has test 10 scans of 8 participants, train 6 "
     "scans of 4 participants"),
    (range(16), {"split": ["test"] * 14 + ["pretrain"] * 2}, "pretrain 2 scans of 1 participants"),
    (range(2, 4), {}, "its index has 2 scans of 1 participants and no column split"),
    (range(2), {"split": None}, "the column split of its index has empty 2 scans of 2 participants"),
])
def test_what_cannot_be_learned_from_is_said_with_what_the_table_has(kernel, tmp_path, rows, columns, words):
    kernel.run(parameters("2_pretrain", prepared=few(tmp_path, rows, **columns), output_dir="outputs/run"))
    kernel.run(cells("2_pretrain")[1])
    kernel.run(cells("2_pretrain")[2], fails=words.replace("PLACE", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(("split", "words"), [
    (["train"] * 10 + ["test"] * 6, "age: the validation split has 0 usable scans with this label, of 0 participants; "
     "it needs two scans. In PLACE the column split of its index has train 10 scans of 8 participants, test 6 scans"),
    (["validation"] * 2 + ["train"] * 2 + ["test"] * 12, "the train split has 2 usable scans with this label, of 1 "
     "participants; it needs two scans and two participants"),
])
def test_a_split_that_lacks_somebody_is_said_with_what_the_table_has(kernel, tmp_path, split, words):
    kernel.run(parameters("3_finetune", prepared=few(tmp_path, range(16), split=split), out_of_distribution=None,
                          encoder="random:resnet18_narrow", task="age", output_dir="outputs/run"))
    kernel.run(cells("3_finetune")[1])
    kernel.run(cells("3_finetune")[2], fails=words.replace("PLACE", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "changes"), [
    ("2_pretrain", range(2), {"epochs": 2, "validation_fraction": 0.0}),
    ("2_pretrain", [0, 1, 4], {"epochs": 2}),  # three participants, one of them left out for testing
    ("2_pretrain", range(8), {"epochs": 1, "validation_fraction": 0.0, "objective": "mae",
                              "architecture": "vit_narrow"}),
    ("0_explore_augmentations", range(1), {}),
    ("0_explore_augmentations", range(3), {}),
])
def test_few_scans_go_through_the_whole_notebook(kernel, tmp_path, name, rows, changes):
    folder = few(tmp_path, rows)
    for cell in [parameters(name, prepared=folder, output_dir="outputs/run", **changes), *cells(name)[1:]]:
        kernel.run(cell)


def test_numbers_that_nobody_means_are_refused_in_a_cell_too(kernel):
    kernel.run(parameters("0_explore_augmentations", seed=True))
    kernel.run(READ, fails="seed: got true, which would count as 1; write a number")
    kernel.run(parameters("0_explore_augmentations", seed=True) + "\nspacing_mm = float('inf')")
    kernel.run(READ, fails="1 thing is wrong:\n  spacing_mm: got inf; input should be a finite number")
