"""Parameters: unknown names, wrong types and impossible values are refused, all in one message."""

import subprocess
import sys

import pytest
import yaml

from kit.params import NOTEBOOKS, Explore, Preprocess, Pretrain
from kit.reading import ParameterError, check
from kit.runs import ROOT, outputs_dir, resolve, shown


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
                   label_fraction=2, epochs="many", learning_rte=1)
    assert text.startswith("3 things are wrong")
    assert "label_fraction: got 2" in text and "epochs: got 'many'" in text and "did you mean learning_rate?" in text


def test_missing_files_say_what_to_run_first(tmp_path):
    text = refusal(NOTEBOOKS["3_finetune"], output_dir="outputs/x", prepared=tmp_path / "none",
                   encoder=str(tmp_path / "encoder.safetensors"))
    assert "prepared:" in text and "run 1_preprocess first" in text
    assert "encoder:" in text and "run 2_pretrain first" in text


@pytest.mark.parametrize(("task", "kind", "expected"), [
    ("tumour", "auto", "tumour: no such label column; the index has scan, participant"),
    ("sex", "regression", "sex: text where numbers are needed: F, M"),
    ("note", "auto", "note: text where numbers are needed: left"),
    ("age", "classification", "age: classification needs two classes, found 6"),
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


def test_cohort_tables_are_looked_at_first(tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("participant,scan\n1,a.nii\n")
    assert "needs a column image_path; found participant, scan" in refusal(
        Preprocess, output_dir="outputs/x", cohort=str(table))
    assert "no such file" in refusal(Preprocess, output_dir="outputs/x", cohort=str(tmp_path / "none.csv"))


def test_batch_must_divide_over_workers(prepared):
    assert "batch_size: 15 does not divide over 2 workers" in refusal(
        Pretrain, output_dir="outputs/x", prepared=prepared, batch_size=15, workers=2)


def test_relative_paths_mean_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve("params/demo") == ROOT / "params/demo"
    monkeypatch.setenv("KIT_OUTPUTS", str(tmp_path / "elsewhere"))
    assert resolve("outputs/run") == outputs_dir() / "run" == tmp_path / "elsewhere/run"
    assert shown(resolve("outputs/run")) == "outputs/run"
    plain = check(Explore, {"output_dir": "outputs/run"}).plain()
    assert check(Explore, plain).plain() == plain  # what is stored is enough to run again


def test_refusing_needs_neither_torch_nor_monai():
    code = "import sys, kit, kit.params; print({'torch', 'monai', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("file", sorted((ROOT / "params").rglob("[0-9]_*.yaml")), ids=lambda file: file.stem)
def test_parameter_files_fit_their_models(file):
    from kit.execute import notebook_of

    NOTEBOOKS[notebook_of(file)].model_validate(yaml.safe_load(file.read_text()))  # alone, without the defaults
