"""Parameters: unknown names, wrong types and impossible values are refused, all in one message."""

import re
import subprocess
import sys

import nbformat
import pytest
import yaml

from kit.augment.recipe import names, read_recipe
from kit.params import LONGEST_RETRY, NOTEBOOKS, Explore, Preprocess, Pretrain
from kit.reading import ParameterError, check, meanings, read_options, read_yaml
from kit.runs import ROOT, outputs_dir, resolve, shown
from kit.train.distributed import PATIENCE


@pytest.fixture
def prepared(tmp_path):
    """The least that counts as prepared scans: an index and its record."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "index.csv").write_text(
        "scan,participant,session,dataset,age,sex,note\n"
        + "".join(f"d_{n}_01,{n},01,d,{20 + n},{'FM'[n % 2]},{n if n < 4 else 'left'}\n" for n in range(6)))
    (folder / "preparation.json").write_text("{}")
    return folder


def refusal(model, **values):
    with pytest.raises(ParameterError) as error:
        check(model, values)
    return str(error.value)


def test_unknown_name_is_refused_with_its_nearest(prepared):
    text = refusal(Pretrain, output_dir="outputs/x", prepared=prepared, temprature=0.1)
    assert "temprature: unknown parameter; did you mean temperature?" in text


def test_all_faults_stand_in_one_message(prepared):
    text = refusal(NOTEBOOKS["3_finetune"], output_dir="outputs/x", prepared=prepared, encoder="random",
                   label_fraction=2, steps="many", learning_rats=1)
    assert text.startswith("3 things are wrong")
    assert "label_fraction: got 2" in text and "steps: got 'many'" in text and "did you mean learning_rates?" in text


def test_missing_files_say_what_to_run_first(tmp_path):
    text = refusal(NOTEBOOKS["3_finetune"], output_dir="outputs/x", prepared=tmp_path / "none",
                   encoder=str(tmp_path / "encoder.safetensors"))
    assert "prepared:" in text and "run 1_preprocess first" in text
    assert "encoder:" in text and "run 2_pretrain first" in text


@pytest.mark.parametrize(("task", "kind", "expected"), [
    ("tumour", "auto", "tumour: no such label column; the index has scan, participant"),
    ("sex", "regression", "sex: text where numbers are needed: F, M"),
    ("note", "auto", "note: text where numbers are needed: left"),
    ("age", "classification", "age: classification needs two classes, or up to 20 with at least two scans each; "
                              "found 6"),
])
def test_label_columns_are_looked_at_first(prepared, task, kind, expected):
    text = refusal(NOTEBOOKS["3_finetune"], output_dir="outputs/x", prepared=prepared, encoder="random",
                   task=task, task_type=kind)
    assert expected in text


def test_the_field_at_fault_is_named(prepared):
    text = refusal(NOTEBOOKS["5_benchmark"], output_dir="outputs/x", prepared=prepared, encoders={"a": "random"},
                   tasks=["sex", "tumour"], finetune_tasks=[])
    assert "\n  tasks: tumour: no such label column" in text


def test_pairs_of_sessions_and_balanced_sampling_exclude_each_other(prepared):
    values = {"output_dir": "outputs/x", "prepared": prepared, "session_pairs": True}
    assert check(Pretrain, values).session_pairs
    text = refusal(Pretrain, **values, sampling="balanced")
    assert "session_pairs: true takes each participant once" in text and "set sampling: all" in text


def test_numbers_that_yaml_reads_as_text_arrive_as_numbers(prepared):
    values = yaml.safe_load("learning_rate: 1e-4")
    assert values == {"learning_rate": "1e-4"}  # YAML 1.1 wants 1.0e-4
    assert check(Pretrain, {"output_dir": "outputs/x", "prepared": prepared, **values}).learning_rate == 1e-4


@pytest.mark.parametrize(("typed", "words"), [
    ("epochs: 010", "epochs: YAML reads 010 as 8 (octal); write 10 for the number, '010' in quotes for text"),
    ("epochs: 1:30", "epochs: YAML reads 1:30 as 90 (base 60, like minutes); write 90 for the number"),
    ("temperature: 0:30.5", "temperature: YAML reads 0:30.5 as 30.5 (base 60"),
    ("projection: [128, 064]", "projection.1: YAML reads 064 as 52 (octal); write 64"),
    ("epochs: 3\nseed: 1\nepochs: 5", "epochs: is given twice"),
    ("epochs: true", "epochs: got true, which would count as 1; write a number"),
    ("learning_rate: yes", "learning_rate: got true, which would count as 1"),
    ("projection: [128, on]", "projection.1: got true"),
    ("temperature: .inf", "temperature: got inf; input should be a finite number"),
    ("temperature: inf", "temperature: got 'inf'; input should be a finite number"),
    ("temperature: 1e999", "temperature: got '1e999'; input should be a finite number"),
    ("weight_decay: .nan", "weight_decay: got nan; input should be"),
])
def test_numbers_that_are_not_what_was_typed_are_refused(prepared, tmp_path, typed, words):
    (tmp_path / "mine.yaml").write_text(f"prepared: {prepared}\noutput_dir: outputs/x\n{typed}\n")
    with pytest.raises(ParameterError) as error:
        check(Pretrain, read_yaml(tmp_path / "mine.yaml"))
    assert words in str(error.value)


@pytest.mark.parametrize(("typed", "name", "value"), [
    ("learning_rate: 1e-4", "learning_rate", 1e-4), ("epochs: 10", "epochs", 10), ("epochs: 0", "epochs", 0),
    ("epochs: 08", "epochs", 8), ("epochs: 2.0", "epochs", 2), ("epochs: 1_000", "epochs", 1000),
    ("session_pairs: true", "session_pairs", True), ("session_pairs: no", "session_pairs", False),
    ("accept_flags: [contrast]", "accept_flags", ["contrast"]),
    ("split: '010'", "split", "010"), ("temperature: .5", "temperature", 0.5), ("ema: 0", "ema", 0.0),
])
def test_what_was_typed_arrives(prepared, tmp_path, typed, name, value):
    (tmp_path / "mine.yaml").write_text(f"prepared: {prepared}\noutput_dir: outputs/x\n{typed}\n")
    found = getattr(check(Pretrain, read_yaml(tmp_path / "mine.yaml")), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("typed", "read", "lost"), [
    ("run #1", "'run'", "#1"), ("[age, sex]  # two", "['age', 'sex']", "# two"), ("#1", "None", "#1"),
    ("A: run #1", "{'A': 'run'}", "#1")])
def test_an_option_of_which_yaml_drops_a_part_as_a_comment_is_refused(typed, read, lost):
    with pytest.raises(ParameterError) as error:
        read_options([("seed", "1"), ("task", typed)])
    assert f"task: YAML reads {typed!r} as {read} and drops {lost!r} as a comment" in str(error.value)


def test_an_option_may_hold_a_hash():
    assert read_options([("task", "'run #1'"), ("split", "run#1")]) == {"task": "run #1", "split": "run#1"}


@pytest.mark.parametrize("unset", ["", " ", "\ufeff"])
def test_an_option_without_a_value_does_not_select_the_default(unset):
    with pytest.raises(ParameterError) as error:
        read_options([("aliases", unset), ("volumes", unset), ("atlas", "null"), ("split", '""')])
    assert "2 things" in str(error.value) and "\n  aliases: got an empty value; write null for none" in str(error.value)
    assert read_options([("atlas", "null"), ("split", '""')]) == {"atlas": None, "split": ""}


def test_a_seed_that_the_benchmark_does_not_use_is_refused(prepared):
    values = {"output_dir": "outputs/x", "prepared": prepared, "encoders": {"a": "random"}, "tasks": ["sex"],
              "finetune_tasks": []}
    assert check(NOTEBOOKS["5_benchmark"], values | {"seeds": [3]}).seeds == [3]
    assert "seed: got 3; the benchmark does not use it; set seeds: [3]" in refusal(
        NOTEBOOKS["5_benchmark"], **values, seed=3)


@pytest.mark.parametrize("name", ["output_dir", "prepared", "aliases"])
def test_an_empty_path_is_not_the_current_folder(prepared, name):
    text = refusal(Pretrain, **{"output_dir": "outputs/x", "prepared": prepared, name: ""})
    assert f"\n  {name}: got ''; an empty path; name a file or folder" in text


def test_a_parameter_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("output_dir: outputs/Müller".encode("cp1252"))
    with pytest.raises(ParameterError, match=r"mine.yaml cannot be read as UTF-8 text: .*0xfc"):
        read_yaml(tmp_path / "mine.yaml")


def test_what_6_apply_says_of_an_encoder_that_is_not_there(tmp_path):
    text = refusal(NOTEBOOKS["6_apply"], output_dir="outputs/x", encoder=str(tmp_path / "none"))
    assert "run 2_pretrain or 3_finetune first" in text and "random" not in text


def test_a_recipes_numbers_are_what_was_typed(tmp_path):
    mine = tmp_path / "mine.yaml"
    for text, words in (("gamma: {range: [0.5, 01]}", "gamma.range.1: YAML reads 01 as 1"),
                        ("gamma: {range: [0.5, 1.5], probability: true}", "gamma.probability: got true"),
                        ("flip: {probability: 0.5}\nflip: {probability: 1.0}", "flip: is given twice"),
                        ("noise: {range: [0, .inf]}", "noise.range.1: got inf")):
        mine.write_text(text)
        with pytest.raises(ParameterError) as error:
            read_recipe(mine)
        assert words in str(error.value)
    assert [read_recipe(name) for name in names()]


def test_cohort_tables_are_looked_at_first(tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("participant,scan\n1,a.nii\n")
    assert "needs a column image_path; found participant, scan" in refusal(
        Preprocess, output_dir="outputs/x", cohort=str(table))
    assert "no such file" in refusal(Preprocess, output_dir="outputs/x", cohort=str(tmp_path / "none.csv"))


def test_batch_must_divide_over_workers(prepared):
    assert "batch_size: 15 cannot be split evenly over 2 workers" in refusal(
        Pretrain, output_dir="outputs/x", prepared=prepared, batch_size=15, workers=2)


def test_no_process_waits_for_room_on_the_disk_longer_than_the_others_wait_for_it(prepared):
    long = {"output_dir": "outputs/x", "prepared": prepared, "retry_minutes": 180}
    check(Pretrain, {**long, "workers": 1})
    check(Pretrain, {**long, "workers": 2, "retry_minutes": LONGEST_RETRY})
    assert "retry_minutes: got 180; set at most 100, " in refusal(Pretrain, **long, workers=2)
    assert PATIENCE.total_seconds() / 60 > LONGEST_RETRY


def test_relative_paths_mean_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve("params/demo") == ROOT / "params/demo"
    monkeypatch.setenv("KIT_OUTPUTS", str(tmp_path / "elsewhere"))
    assert resolve("outputs/run") == outputs_dir() / "run" == tmp_path / "elsewhere/run"
    assert shown(resolve("outputs/run")) == "outputs/run"
    assert resolve(shown(ROOT / "outputs/run")) == ROOT / "outputs/run"  # not those of $KIT_OUTPUTS
    plain = check(Explore, {"output_dir": "outputs/run"}).plain()
    assert check(Explore, plain).plain() == plain  # what is stored is enough to run again


def test_refusing_needs_neither_torch_nor_monai():
    code = "import sys, kit, kit.params; print({'torch', 'monai', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_cell_of_parameters_repeats_the_defaults(notebook):
    from kit.execute import defaults

    model, cell = NOTEBOOKS[notebook], defaults(notebook)
    assert set(cell) <= set(model.model_fields)
    paths = {name for name, field in model.model_fields.items() if field.is_required()}
    assert paths <= set(cell) and cell["output_dir"] == f"outputs/quick/{notebook}"
    recommended = model.model_validate({name: cell[name] for name in paths}).plain()
    assert model.model_validate(cell).plain() == recommended


@pytest.mark.parametrize(("notebook", "values", "named"), [
    ("1_preprocess", {"cohort": "COHORT"}, ["output_dir"]),
    ("2_pretrain", {"prepared": "PREPARED"}, ["output_dir"]),
    ("3_finetune", {"prepared": "PREPARED", "task": "sex", "output_dir": "outputs/mine"}, ["encoder"]),
    ("4_saliency", {"prepared": "PREPARED"}, ["model", "output_dir"]),
    ("5_benchmark", {"prepared": "PREPARED", "output_dir": "outputs/mine"}, ["encoders"]),
    ("6_apply", {"input": "COHORT"}, ["encoder"]),
])
def test_another_cohort_never_meets_the_samples_quick_runs(prepared, tmp_path, notebook, values, named):
    from kit.execute import parameters

    (tmp_path / "cohort.csv").write_text("image_path\na.nii\n")
    paths = {"COHORT": str(tmp_path / "cohort.csv"), "PREPARED": str(prepared)}
    with pytest.raises(ParameterError) as error:
        parameters(notebook, {name: paths.get(value, value) for name, value in values.items()})
    for name in named:
        assert f"{name}: outputs/quick/" in str(error.value) and "belongs to the sample cohort" in str(error.value)
    assert str(error.value).startswith(f"{len(named)} thing")


@pytest.mark.parametrize("file", sorted((ROOT / "params").rglob("[0-9]_*.yaml")), ids=lambda file: file.stem)
def test_parameter_files_fit_their_models(file):
    from kit.execute import notebook_of

    NOTEBOOKS[notebook_of(file)].model_validate(yaml.safe_load(file.read_text()))  # alone, without the defaults


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_parameter_says_what_it_means(notebook):
    model = NOTEBOOKS[notebook]
    said = meanings(model)
    assert [name for name in model.model_fields if len(said.get(name, "")) < 5] == []


def test_the_table_shows_what_differs_from_the_defaults(prepared, tmp_path):
    html = Pretrain(prepared=prepared, output_dir=tmp_path / "out", epochs=7, recipe="<weak>").table().data
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    cells = {row[0]: row[1:] for row in (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows) if row}
    assert list(cells) == list(Pretrain.model_fields)
    assert cells["epochs"] == ["7", "30", "0: only estimate what a run needs"] and cells["seed"][1] == ""
    assert cells["recipe"][:2] == ["&lt;weak&gt;", "weak"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_parameter_is_read_somewhere(notebook):
    cells = [cell.source for path in (ROOT / "notebooks").glob("*.ipynb")
             for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    code = "\n".join([*(path.read_text(encoding="utf-8") for path in (ROOT / "kit").rglob("*.py")), *cells])
    unread = [name for name in NOTEBOOKS[notebook].model_fields if not re.search(rf"\.{name}\b", code)]
    assert unread == []
