"""Weights out: whoever reads them, with the kit or without, has the same features; the card says whose they are."""

import json
import os
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import run as run_bundle
from monai.networks.nets import resnet18

from kit.evaluate.benchmark import run_benchmark
from kit.export import ExportError, export, main
from kit.models.card import _ages_and_sexes, _data, description
from kit.models.encoder_file import EncoderError, load_encoder, read_record, save_encoder
from kit.models.encoders import build_encoder
from kit.params import Benchmark, Pretrain
from kit.preprocess.nifti import write_nifti
from kit.provenance import MadeFrom, write
from kit.reading import check
from kit.runs import ROOT, Run
from kit.store.grid import Grid
from kit.store.store import Store
from kit.train.pretrain import pretrain
from tests.conftest import GRID, make_store

DENSE = Grid((29, 36, 30), 4.0)  # the least that DenseNet121 takes
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI warns of configs, ours too
ARCHITECTURES = [pytest.param("resnet18", marks=pytest.mark.slow), "resnet18_narrow", "densenet121", "vit_narrow"]
# what MONAI's meta_schema_20240725.json requires of metadata.json, and of a tensor that goes in or comes out
REQUIRED = {"schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
            "task", "description", "authors", "copyright", "network_data_format"}
TENSOR = {"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str, "value_range": list}
WITHOUT_KIT = "import sys; sys.modules['kit'] = None; from monai.bundle import run; run(config_file=sys.argv[1], " \
    "bundle_root=sys.argv[2])"


def preparation(grid):
    return {"axes": "zyx", "shape": list(grid.shape), "spacing_mm": 4.0, "origin_mm": list(grid.origin_mm),
            "intensity": "zscore", "template": "t"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, tmp_path_factory):
    """A folder, the encoder that it is of, three scans and their features; batch norms have seen scans."""
    grid, folder = DENSE if request.param == "densenet121" else GRID, tmp_path_factory.mktemp(request.param)
    encoder = build_encoder(request.param, grid, seed=1)
    scans = torch.randn(3, 1, *grid.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder(2 * scans + 1)
        features = encoder.eval()(scans)
    save_encoder(folder / "run/encoder.safetensors", encoder, {
        "architecture": request.param, "objective": "simclr", "preparation": preparation(grid),
        "participants": ["ab"]})
    return export(folder / "run", folder / "out"), grid, scans, features


def test_the_cards_own_lines_give_the_features_in_plain_monai(exported, monkeypatch):
    folder, _, scans, features = exported
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    found = {"scans": scans}
    assert "strict=True" in code and "kit" not in code
    exec(code, found)
    torch.testing.assert_close(found["features"], features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_program_takes_any_batch(exported, batch):
    folder, grid, scans, features = exported
    more = {"config.json": ""}
    program = torch.export.load(folder / "program.pt2", extra_files=more).module()
    torch.testing.assert_close(program(scans[:batch]), features[:batch], atol=1e-5, rtol=1e-5)
    assert json.loads(more["config.json"]) == json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(AssertionError, match=str(grid.shape[0])):
        program(scans[:, :, 1:])


def test_nothing_of_this_machine_is_in_the_files(exported):
    words = str(ROOT).encode(), f"{platform.node()}-{os.getpid()}".encode()
    for path in exported[0].rglob("*.p*"):
        content = path.read_bytes()
        assert not [word for word in words if word in content], path.name


def test_the_bundle_gives_the_features_where_there_is_no_kit(exported):
    folder, grid, scans, features = exported
    for number, image in enumerate(scans[:, 0].numpy()):
        write_nifti(folder / f"scans/{number}.nii.gz", image, grid.affine)
    turned = grid.affine @ np.array([[-1, 0, 0, grid.shape[2] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_nifti(folder / "scans/turned.nii.gz", scans[0, 0].numpy()[:, :, ::-1], turned)  # the first, stored as LAS
    if "vit" in folder.parent.name or "narrow" in folder.parent.name:
        subprocess.run([sys.executable, "-c", WITHOUT_KIT, str(folder / "configs/inference.json"), str(folder)],
                       check=True, cwd=folder.parent)
    else:
        run_bundle(config_file=str(folder / "configs/inference.json"), bundle_root=str(folder))
    table = pd.read_csv(folder / "features/features.csv", header=None, index_col=0)
    assert [name.rpartition("/")[2] for name in table.index] == [
        "0.nii.gz", "1.nii.gz", "2.nii.gz", "turned.nii.gz"]
    expected = torch.cat([features, features[:1]]).numpy()
    np.testing.assert_allclose(table.to_numpy(np.float32), expected, atol=1e-5, rtol=1e-5)


def test_the_kit_reads_back_what_it_wrote_for_others(exported):
    folder, grid, scans, features = exported
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    files = [path for path in (folder / "models/model.pt", folder / "model.safetensors") if path.exists()]
    assert len(files) == (1 if "vit" in architecture else 2)  # a ViT's bundle runs the program
    for file in files:
        record = {"shape": list(grid.shape), "spacing_mm": grid.spacing_mm}
        network, _ = load_encoder(f"{architecture}:{file}", record)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(scans), features, atol=1e-5, rtol=1e-5)


def test_the_bundle_refuses_a_scan_of_another_shape(exported, tmp_path):
    folder, grid, scans, _ = exported
    write_nifti(tmp_path / "small.nii", scans[0, 0, 1:].numpy(), grid.affine)
    with pytest.raises(RuntimeError):
        run_bundle(config_file=str(folder / "configs/inference.json"), bundle_root=str(folder),
                   dataset_dir=str(tmp_path), output_dir=str(tmp_path))
    assert not (tmp_path / "features.csv").exists()


def test_the_bundles_metadata_has_what_monais_schema_requires(exported):
    folder, grid, _, features = exported
    metadata = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
    assert set(metadata) >= REQUIRED and metadata["monai_version"] == version("monai")
    data = metadata["network_data_format"]
    image, pred = data["inputs"]["image"], data["outputs"]["pred"]
    for tensor in (image, pred):
        assert all(isinstance(tensor[name], kind) for name, kind in TENSOR.items())
    assert image["spatial_shape"] == list(grid.shape) and image["preparation"]["intensity"] == "zscore"
    assert pred["num_channels"] == features.shape[1]
    model = folder / "models/model.pt"
    assert model.exists() != ("vit" in folder.parent.name)
    assert not model.exists() or torch.load(model, weights_only=True)


def test_a_neighbours_reference_is_not_exported(tmp_path):
    for name in ("encoder.safetensors", "other.safetensors"):
        save_encoder(tmp_path / "run" / name, build_encoder("resnet18_narrow", GRID), {
            "architecture": "resnet18_narrow", "objective": "simclr", "preparation": preparation(GRID),
            "participants": []})
    (tmp_path / "run" / "reference.safetensors").write_bytes(b"of encoder.safetensors")
    assert (export(tmp_path / "run", tmp_path / "one") / "reference.safetensors").exists()
    assert not (export(tmp_path / "run" / "other.safetensors", tmp_path / "two") / "reference.safetensors").exists()


def test_the_folder_is_an_encoder_of_the_kit(exported):
    folder, _, scans, features = exported
    prepared = read_record(folder)["preparation"]
    again, record = load_encoder(folder, prepared)
    assert torch.equal(again.eval()(scans), features) and record["participants"] == ["ab"]
    with pytest.raises(EncoderError, match="prepared differently"):
        load_encoder(folder, {**prepared, "intensity": "whitematter"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["preparation"] == prepared and config["input"] == ["batch", 1, *prepared["shape"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a pretraining on people with telling names, and a benchmark of both beside a third encoder."""
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder / "prepared", 70, dataset="procedural-A")
    number = store.index["participant"].astype(int)
    index = store.index.assign(participant="Meier" + store.index["participant"], split=np.where(
        number < 18, "pretrain", np.array(["train", "validation", "test", "test"])[number // 2 % 4]))
    index.loc[number == 1, "dataset"] = "clinic"
    index.to_csv(store.folder / "index.csv", index=False)
    store = Store.open(store.folder)
    for name, seed in (("pre0", 0), ("pre1", 1), ("other", 2)):
        params = Pretrain.model_validate({
            "prepared": store.folder, "output_dir": folder / name, "epochs": 2, "batch_size": 8, "seed": seed,
            "projection": [16, 8], "architecture": "resnet18_narrow", "validation_fraction": 0.2})
        pretrain(params, Run.of(params))
        torch.save(build_encoder("resnet18_narrow", GRID, seed).state_dict(), folder / f"{seed}.pt")
    params = check(Benchmark, {
        "prepared": str(store.folder), "output_dir": str(folder / "benchmark"), "tasks": ["lesion"],
        "encoders": {"Ours": str(folder / "pre{seed}"), "Theirs": str(folder / "other"),
                     "Published": f"resnet18_narrow:{folder}/{{seed}}.pt"}, "baselines": ["guess"],
        "label_fractions": [1.0], "finetune_tasks": [], "seeds": [0, 1], "allow_seen_participants": True})
    return folder, run_benchmark(params, Run.of(params)).scores


def test_the_card_says_whose_data_and_no_name(runs, tmp_path):
    folder, scores = runs
    out = export(folder / "pre1", tmp_path / "out", folder / "benchmark", "cc-by-4.0")
    text = (out / "README.md").read_text(encoding="utf-8")
    made = pd.read_csv(folder / "pre1/made_from.csv", dtype=str)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "monai" and "TO BE FILLED IN" not in text
    assert f"Procedural data: {len(made) - 1} of {len(made)} scans" in text and "Clinical use" in text
    for (dataset, part), rows in made.groupby(["dataset", "part"]):
        assert f"| {dataset} | {part} | {rows['participant'].nunique()} | {len(rows)} |" in text
    for path in out.rglob("*"):  # the copy of encoder.safetensors, too
        content = path.read_bytes() if path.is_file() else b""
        assert b"Meier" not in content and b"made_0" not in content
    index, learned = Store.open(folder / "prepared").index, made.loc[made["part"] == "learned from", "scan"]
    index = index[index["scan"].isin(learned)]
    people = index["participant"].nunique()
    assert (f"Age {index['age'].min():.0f} to {index['age'].max():.0f} in {people} of {people} participants learned "
            "from. To be added before publication: sex of the participants, not known here.") in text
    loss = pd.read_csv(folder / "pre1/log.csv")["loss"].iloc[-1]
    assert f"| measure | last value |\n| --- | --- |\n| loss | {loss:.4g} |" in text and "| temperature | 0.1 |" in text
    ours = scores[scores["encoder"] == "Ours"].iloc[0]
    assert f"| {ours['value']:.3f} | {ours['low']:.3f} to {ours['high']:.3f} |" in text
    assert len(re.findall(r"\| lesion \| probe", text)) == 1 and "baseline |" not in text


def test_a_dataset_of_people_is_not_called_procedural_for_its_name():
    config = {"shape": [1, 2, 3], "spacing_mm": 4.0, "features": 8, "kit": "1", "fingerprint": "f", "weights": "w"}
    for name, said in (("procedural_pain", False), ("procedural", False), ("procedural-A", True)):
        assert ("Procedural data: all" in description({"seen": {"dataset": {name: 3}}}, config)) == said


def test_the_card_counts_people_by_sex_and_takes_no_code_for_an_age(tmp_path):
    make_store(tmp_path / "prepared", 3)  # the third has two sessions
    index = pd.read_csv(tmp_path / "prepared/index.csv", dtype={"participant": str, "session": str})
    index.assign(sex=["F", "M", "F", "F"], age=[31.2, 999, 64, 66]).to_csv(tmp_path / "prepared/index.csv", index=False)
    rows = index[["scan", "participant"]].assign(part="learned from")
    said = _ages_and_sexes(MadeFrom({"prepared": {"from": str(tmp_path / "prepared")}}, rows))
    assert said == "Age 31 to 66 in 2 of 3 participants learned from. Sex: F 2, M 1."
    fewer = pd.read_csv(tmp_path / "prepared/index.csv", dtype={"participant": str, "session": str})
    fewer.drop(index=1).to_csv(tmp_path / "prepared/index.csv", index=False)  # the man has left the store
    left = _ages_and_sexes(MadeFrom({"prepared": {"from": str(tmp_path / "prepared")}}, rows))
    assert left == "Age 31 to 66 in 2 of 3 participants learned from. Sex: F 2, not known 1."
    gone = _ages_and_sexes(MadeFrom({"prepared": {"from": str(tmp_path / "gone")}}, rows))
    assert gone == "To be added before publication: age and sex of the participants, not known here."


@pytest.mark.parametrize("its_table_is_there", [True, False])
def test_the_name_of_a_folder_that_stands_for_a_dataset_is_not_published(tmp_path, its_table_is_there):
    rows = pd.DataFrame({"scan": ["a", "b"], "participant": ["?clinic_x/a", "OASIS/b"], "part": "learned from",
                         "dataset": ["?clinic_x", "OASIS"]})
    if its_table_is_there:
        write(tmp_path, MadeFrom({"kit": "1", "fingerprint": "f1"}, rows))
    text = "\n".join(_data({"made_from": {"fingerprint": "f1"}, "seen": {"dataset": {"?clinic_x": 1, "OASIS": 1}}},
                           tmp_path))
    assert "clinic_x" not in text and "| (no name) |" in text and "| OASIS |" in text
    assert ("| learned from |" in text) == its_table_is_there


def test_an_encoder_that_names_no_version_is_not_said_to_be_of_this_one(exported):
    folder, *_ = exported
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["kit"] is None
    assert "Made by an older kit, weights " in (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_without_a_run_says_what_is_not_known(runs, tmp_path):
    out = export(runs[0] / "pre0", tmp_path / "out")
    again = export(out, tmp_path / "again")  # of the exported folder: the run's tables do not lie there
    text = (again / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| procedural-A \| \d+ \|\n\| clinic \| 1 \|", text)
    assert "log does not lie beside" in text and "None were given" in text
    assert text.count("TO BE FILLED IN") == 1 and yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in again.glob("*.safetensors")}


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(runs, tmp_path, capsys):
    folder, _ = runs
    out = tmp_path / "out"
    for encoder, words in (("nowhere", "no such file; give an encoder.safetensors or a run of 2_pretrain"),
                           ("random:resnet18", "random weights have nothing to export")):
        assert main([encoder, "--output", str(out)]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(EncoderError, match="is not an encoder of this kit"):
        export(folder / "pre0/made_from.csv", out)
    torch.save(resnet18(spatial_dims=3, n_input_channels=1).state_dict(), folder / "theirs.pt")
    with pytest.raises(ExportError, match=r"theirs.pt holds third-party weights \(resnet18\), .* only an encoder.saf"):
        export(folder / "theirs.pt", out)
    for benchmark in (folder / "pre0", ""):  # of an unset variable
        with pytest.raises(ExportError, match="is not a finished run of 5_benchmark"):
            export(folder / "pre0", out, benchmark)
    with pytest.raises(ExportError, match=r"has no score of this encoder \(weights .*; it has Ours .*, Theirs"):
        export(_another(tmp_path), out, folder / "benchmark")
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["another.safetensors"]

    out.mkdir()
    (out / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"holds thesis.tex; give another folder as --output"):
        export(folder / "pre0", out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_hubs_clone_takes_it_by_the_command_line(runs, tmp_path, capsys):
    out = tmp_path / "clone"
    (out / ".git").mkdir(parents=True)
    assert main([str(runs[0] / "pre0"), "--output", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        ".git", "README.md", "config.json", "model.safetensors", "encoder.safetensors", "reference.safetensors",
        "program.pt2", "configs",
        "models"}
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


def test_a_disk_that_takes_no_more_leaves_nothing_half_done(runs, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))  # the weights have 8 MB
    try:
        code = main([str(runs[0] / "pre0"), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "File too large" in capsys.readouterr().err and not list(tmp_path.iterdir())


def _another(folder):
    """An encoder that no benchmark has tested."""
    preparation = {"axes": "zyx", "shape": list(GRID.shape), "spacing_mm": 4.0}
    return save_encoder(folder / "another.safetensors", build_encoder("resnet18_narrow", GRID, 7), {
        "architecture": "resnet18_narrow", "objective": "simclr", "preparation": preparation})
