"""Weights of others: read as encoders, every name accounted for; what does not fit or may do harm is refused."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.networks.nets import DenseNet121, resnet18
from safetensors.torch import save_file
from torch import nn

from kit.evaluate.finetune import load_predictor, run_finetune
from kit.evaluate.tasks import check_tested, overlap, read_tasks
from kit.models.encoder_file import EncoderError, load_encoder, noted, read_record, side_of
from kit.models.encoders import build_encoder
from kit.models.third_party_formats import FORMATS, PUBLISHED
from kit.models.weights import DOWNLOADS, fetch, keep, main
from kit.params import ARCHITECTURES, Benchmark, Finetune, Preprocess
from kit.preprocess.settings import Preparation
from kit.problems import WEIGHTS, encoder_parts
from kit.provenance import MisfitError, Side, check_fit
from kit.reading import ParameterError, check
from kit.runs import ROOT, Run
from kit.store.grid import PAPER_GRID, Grid
from kit.store.store import Store
from tests.conftest import GRID, make_store

PAPER = Preparation(PAPER_GRID, "rigid", "auto", "n4").record()
IMAGES = torch.randn(2, 1, 16, 20, 12, generator=torch.Generator().manual_seed(0))


@cache
def paper_network() -> nn.Module:
    """Nobody changes it."""
    torch.manual_seed(5)
    return resnet18(spatial_dims=3, n_input_channels=1, feed_forward=False)


def checkpoint(network: nn.Module, path: Path, **changes: Any) -> Path:
    """What the paper's code saves: the encoder and its projector under DataParallel's names, and Adam's state.

    Adam's of one small weight, to spare the disk.
    """
    names = {f"module.encoder.{name}": value for name, value in network.state_dict().items()}
    names |= {"module.projector.0.weight": torch.zeros(512, 512), "module.projector.2.weight": torch.zeros(64, 512)}
    weight = nn.Parameter(torch.zeros(3))
    weight.grad, optimizer = torch.ones(3), torch.optim.Adam([weight])
    optimizer.step()
    names = {name: value for name, value in (names | changes).items() if value is not None}
    torch.save({"epoch": 7, "model_state_dict": names, "optimizer_state_dict": optimizer.state_dict()}, path)
    return path


@pytest.mark.parametrize("words", ["", "neuro_simclr:", "auto:"])
def test_the_papers_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    """A file of torch.save called .tar, with an optimiser's state, becomes MONAI's network to the bit."""
    path = checkpoint(paper_network(), tmp_path / "simclr_3d_brain_foundation.tar")
    held = torch.load(path, weights_only=True)
    plain = resnet18(spatial_dims=3, n_input_channels=1, feed_forward=False)
    plain.load_state_dict({name.removeprefix("module.encoder."): value for name, value in
                           held["model_state_dict"].items() if ".encoder." in name}, strict=True)

    spec = f"{words}{path}"
    encoder, record = load_encoder(spec, PAPER)
    assert all(torch.equal(encoder.network.state_dict()[name], value) for name, value in plain.state_dict().items())
    with torch.no_grad():
        assert torch.equal(encoder.eval()(IMAGES), plain.eval()(IMAGES))

    assert (record["format"], record["architecture"], record["objective"]) == ("neuro_simclr", "resnet18", "simclr")
    assert record == read_record(spec)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    said = capsys.readouterr().out
    assert record["sha256"] == digest and f"sha256 {digest} is not known here" in said
    assert said.count("licence: ") == 1, "it is said once for a file"
    assert "no tar archive" in said
    assert "ignored: epoch, optimizer_state_dict, projector (2)" in said
    assert side_of(spec)["encoder"].where == path.as_posix() == noted(spec, encoder, record)["from"]
    record["preparation"]["mask"] = "changed by a caller"
    assert read_record(spec)["preparation"]["mask"] == "any"


def test_random_weights_are_known_by_their_seed_whatever_their_last_bits() -> None:
    """torch 2.11 and 2.13 draw a ViT that differs there, and shards may run under either."""
    def digest(spec: str, seed: int, change: float = 0.0) -> str:
        encoder, record = load_encoder(spec, PAPER, seed)
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.mul_(1 + change)
        return noted(spec, encoder, record)["weights"]

    assert digest("random:vit_narrow", 1) == digest("random:vit_narrow", 1, change=1e-6)
    assert len({digest(spec, seed) for spec in ("random:vit_narrow", "random:resnet18_narrow") for seed in (0, 1)}) == 4


def test_scans_that_were_prepared_otherwise_are_refused_with_the_differences(tmp_path: Path) -> None:
    path = checkpoint(paper_network(), tmp_path / "a.pt")
    with pytest.raises(EncoderError) as error:
        load_encoder(path, Preparation(Grid((9, 9, 9), 4.0), "none", "deepbet").record())
    lines = str(error.value).splitlines()
    assert {line.split(":")[0].strip() for line in lines[1:-1]} == {"shape", "spacing_mm", "origin_mm", "registration",
                                                                   "bias_correction"}, "of masks any will do"
    assert "[150, 192, 192]" in str(error.value)


# files that do not fit


@pytest.mark.parametrize(("changes", "words"), [
    ({"module.encoder.bn1.weight": None, "module.encoder.layer3.1.conv2.weight": None},
     r"missing: 2: bn1\.weight, layer3\.1\.conv2\.weight"),
    ({"module.encoder.layer9.weight": torch.zeros(2), "module.classifier.weight": torch.zeros(2)},
     r"left over: 2: layer9\.weight, classifier\.weight"),
    ({"module.encoder.conv1.weight": torch.zeros(64, 1, 3, 3, 3)},
     r"misshapen: 1: conv1\.weight \(64, 1, 3, 3, 3\), not \(64, 1, 7, 7, 7\)"),
    ({"module.encoder.bn1.weight": None, "module.encoder.more": torch.zeros(2),
      "module.encoder.bn1.bias": torch.zeros(9)},
     r"a.tar does not fit resnet18.*\n  missing: 1: bn1\.weight\n  left over: 1: more\n  misshapen: 1: bn1\.bias \(9"),
])
def test_names_that_are_missing_left_over_or_misshapen_are_listed(tmp_path: Path, changes: dict[str, Any],
                                                                  words: str) -> None:
    path = checkpoint(paper_network(), tmp_path / "a.tar", **changes)
    with pytest.raises(EncoderError, match=words):
        load_encoder(path, PAPER)


def test_counters_of_old_files_may_be_missing(tmp_path: Path) -> None:
    without = {f"module.encoder.{name}": None for name in paper_network().state_dict() if "num_batches" in name}
    assert without and load_encoder(checkpoint(paper_network(), tmp_path / "a.tar", **without), PAPER)


class Harmful:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model_state_dict": {"module.encoder.conv1.weight": Harmful(tmp_path / "harm")}}, path)
    with pytest.raises(EncoderError, match=r"weights\.pt is not a plain file of tensors: .* run \w+\.system, "):
        load_encoder(f"neuro_simclr:{path}", PAPER)
    assert not (tmp_path / "harm").exists()
    torch.load(path, weights_only=False)  # so that the test can fail
    assert (tmp_path / "harm").exists()


def test_a_real_tar_archive_is_told_from_a_file_that_is_called_one(tmp_path: Path) -> None:
    inner = checkpoint(paper_network(), tmp_path / "inner.pt")
    with tarfile.open(tmp_path / "real.tar", "w") as archive:
        archive.add(inner, "inner.pt")
    with pytest.raises(EncoderError, match=r"real\.tar is a tar archive \(in it: inner\.pt\); unpack it"):
        read_record(tmp_path / "real.tar")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("page.tar", b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE ht'"),
    ("empty.pt", b"", "it begins with b''"),
    ("a.safetensors", b"no weights", "is not an encoder of this kit"),
    ("cut.pt", None, "central directory"),
])
def test_files_that_are_no_weights_are_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        torch.save({"a": torch.zeros(999)}, tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()[:3000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=f"{name}.*{words}"):
        read_record(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pt", "a.tar", "a.safetensors"])
def test_a_file_of_somebody_elses_says_that_it_cannot_be_read(name: str) -> None:
    owner = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (path := Path(folder) / name).touch(mode=0)
        os.seteuid(owner or 65534)  # root may read everything
        try:
            for spec in (path, f"neuro_simclr:{path}"):
                with pytest.raises(EncoderError, match=f"{name} cannot be read .*Permission denied"):
                    read_record(spec)
        finally:
            os.seteuid(owner)


@pytest.mark.parametrize(("held", "words"), [
    ([torch.zeros(2)], "holds a list, not weights by name"),
    ({"epoch": 3}, "holds no weights by name, but epoch"),
    ({"state_dict": {"a": 3}}, "a in its state_dict are not tensors"),
    ({"odd.weight": torch.zeros(2)}, "match no format that the kit knows: odd.weight; .*FORMAT is neuro_simclr"),
])
def test_checkpoints_without_weights_and_unknown_names_are_refused(tmp_path: Path, held: Any, words: str) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=f"a.pt.*{words}"):
        read_record(tmp_path / "a.pt")


def test_the_wrong_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(paper_network().state_dict(), path)
    with pytest.raises(EncoderError, match=r"does not fit resnet18_narrow, .*:\n  misshapen: .*conv1"):
        load_encoder(f"resnet18_narrow:{path}", PAPER)
    with pytest.raises(EncoderError, match=r"densenet121.*\n  missing: .*\n  left over: .*, and \d+ more\n"):
        load_encoder(f"densenet121:{path}", PAPER)
    with pytest.raises(EncoderError, match=r"read as medicalnet:\n  left over: \d+: layer2\.0\.downsample"):
        load_encoder(f"medicalnet:{path}", PAPER)
    torch.save({"layer1.0.conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(EncoderError, match=r"\[1, 0, 0, 0\] basic blocks"):
        read_record(f"medicalnet:{path}")


# any state dict under MONAI's names


@pytest.mark.parametrize("words", ["auto:", "FORMAT:"])
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("architecture", ["resnet18", "densenet121", "resnet18_narrow", "vit_narrow"])
def test_a_plain_state_dict(tmp_path: Path, architecture: str, file: str, words: str,
                            capsys: pytest.CaptureFixture[str]) -> None:
    """MONAI's classifiers lose their last layer; the kit's own keep their names; what was prepared how is not known."""
    grid = Grid((32, 36, 40), 4.0)
    torch.manual_seed(1)
    plain = {"resnet18": lambda: resnet18(spatial_dims=3, n_input_channels=1),
             "densenet121": lambda: DenseNet121(3, in_channels=1, out_channels=2)}.get(
        architecture, lambda: build_encoder(architecture, grid, seed=3))()
    state = plain.state_dict()
    (save_file if file.endswith("tensors") else torch.save)(state, tmp_path / file)
    spec = f"{words.replace('FORMAT', architecture)}{tmp_path / file}"
    preparation = Preparation(grid).record()
    encoder, record = load_encoder(spec, preparation)
    said = capsys.readouterr().out
    assert record["format"] == record["architecture"] == architecture and record["preparation"] is None
    assert "how its scans were prepared is not known" in said and side_of(spec) == {}
    assert "does not know which datasets and participants it was trained on: check yourself" in said
    assert f"only if the network was built with those of the kit's {architecture}" in said, "another stride would load"
    if architecture == "resnet18":
        plain.fc = None
    if architecture == "densenet121":
        plain.class_layers.out = nn.Identity()
    assert ("ignored: " in said) == (architecture in ("resnet18", "densenet121"))
    images = torch.randn(1, 1, *grid.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images), plain.eval()(images))


def test_a_vit_of_another_grid_is_misshapen(tmp_path: Path) -> None:
    torch.save(build_encoder("vit_narrow", GRID).state_dict(), tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=r"misshapen: .*patch_embedding\.position_embeddings \(1, \d+, 96\), not"):
        load_encoder(tmp_path / "a.pt", Preparation(Grid((32, 36, 40), 4.0)).record())


# where an encoder is asked for


def test_every_words_meaning() -> None:
    assert encoder_parts("random") == ("random", "") and encoder_parts("random:vit") == ("random", "vit")
    assert encoder_parts("outputs/a:b/c.pt") == ("auto", "outputs/a:b/c.pt")
    assert encoder_parts(r"C:\weights\a.pt") == ("auto", r"C:\weights\a.pt")
    assert encoder_parts("brainiac:a.pt") == ("brainiac", "a.pt")
    assert tuple(PUBLISHED) == WEIGHTS and tuple(FORMATS) == (*WEIGHTS, *ARCHITECTURES)


@pytest.mark.parametrize(("encoder", "words"), [
    ("simclr:weights/a.tar", "encoder: got 'simclr:weights/a.tar'; give FORMAT:PATH, where FORMAT is "
                             "auto, neuro_simclr, brainiac, brainiac_resnet50, medicalnet, resnet18, "),
    ("neuro_simclr:weights/no.tar", "encoder: no file weights/no.tar; docs/weights.md says where to get it"),
    ("weights/no.tar", "encoder: no file weights/no.tar; run 2_pretrain first"),
    ("random:brainy", "encoder: got 'random:brainy'; the architectures are"),
])
def test_unknown_formats_and_absent_files_are_refused_before_work(store: Store, encoder: str, words: str) -> None:
    values = {"prepared": str(store.folder), "output_dir": "outputs/x", "task": "age", "encoder": encoder}
    with pytest.raises(ParameterError, match=words):
        check(Finetune, values)
    with pytest.raises(ParameterError, match=words.replace("encoder: ", "encoders.theirs: ", 1)):
        check(Benchmark, {"prepared": str(store.folder), "output_dir": "outputs/x", "encoders": {"theirs": encoder},
                          "tasks": ["age"], "finetune_tasks": []})


def test_fine_tuned_weights_of_others_are_saved_and_loaded(store: Store, tmp_path: Path) -> None:
    encoder = build_encoder("resnet18_narrow", GRID, seed=9)
    torch.save(encoder.network.state_dict(), tmp_path / "theirs.pt")
    params = check(Finetune, {
        "prepared": str(store.folder), "output_dir": str(tmp_path / "run"), "task": "lesion", "steps": 2,
        "check_steps": 1, "check_converged": False, "batch_size": 4,
        "encoder": f"resnet18_narrow:{tmp_path / 'theirs.pt'}"})
    task, predictions, _ = run_finetune(params, Run.of(params))
    predictor, record = load_predictor(tmp_path / "run", store.record)
    assert record["architecture"] == "resnet18_narrow"
    assert record["made_from"]["encoder"]["from"].endswith("theirs.pt")
    with torch.no_grad():
        first = predictor(torch.from_numpy(np.stack([
            store.read(scan)[0].astype(np.float32) for scan in task.parts["test"].rows["scan"]]))[:, None])[:, 0]
    tested = predictions[predictions["distribution"] == "in_distribution"]
    np.testing.assert_allclose(first.numpy(), tested["predicted"], atol=1e-4)


@pytest.mark.parametrize("architecture", ["brainiac_resnet50", "medicalnet_resnet10"])
def test_networks_of_others_are_built_by_name_as_saved_models_need(architecture: str) -> None:
    one, other = (build_encoder(architecture, GRID, seed=seed).state_dict() for seed in (4, 4))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# who was seen


@pytest.mark.parametrize(("dataset", "seen"), [("habs_hd", True), ("Adni", True), ("IXI", False), ("HABS", False)])
def test_datasets_that_an_encoder_was_trained_on_are_said(tmp_path: Path, dataset: str, seen: bool) -> None:
    record = read_record(checkpoint(paper_network(), tmp_path / "a.tar"))
    (tmp_path / "store").mkdir()
    store = make_store(tmp_path / "store", 12, dataset=dataset)
    task, = read_tasks({"prepared": store}, "age")
    warnings = check_tested(task, record, False, {})
    assert len(warnings) == seen and all(
        dataset in line and "neuro_simclr" in line and "no list of its participants" in line for line in warnings)
    assert (f"dataset {dataset} (pretraining)" in overlap(task, record)["shares"][0]) == seen
    assert check_tested(task, {"participants": []}, False, {}) == []


# how scans are to be prepared


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_prepare_scans_as_each_format_wants_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / f"params/weights/1_preprocess_{name.removesuffix('_resnet50')}.yaml"
    values = Preprocess.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    record = Preparation(Grid(values.shape, values.spacing_mm), values.registration, values.mask,
                         values.bias_correction, values.intensity).record()
    side = Side("theirs", PUBLISHED[name].preparation)
    assert check_fit({"encoder": side, "prepared": Side("ours", record)}) == []
    assert capsys.readouterr().out == "", "of libraries' versions they say nothing"
    with pytest.raises(MisfitError, match="intensity: encoder zscore, prepared whitematter"):
        check_fit({"encoder": side, "prepared": Side("ours", {**record, "intensity": "whitematter"})})


# downloads


def test_a_download_appears_only_with_the_right_hash(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(EncoderError, match=rf"a.pt broke off or is another file \(sha256 {digest}, not ff\)"):
        keep(io.BytesIO(b"weights"), tmp_path / "a.pt", "ff")
    assert list(tmp_path.iterdir()) == []
    assert keep(io.BytesIO(b"weights"), tmp_path / "a.pt", digest.upper()).read_bytes() == b"weights"


def test_the_command_checks_the_hash_first_and_downloads_no_file_twice(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    to = str(tmp_path)
    for typed, words in ((["sha256=aa"], "unrecognized arguments: sha256=aa"),
                         (["--sha256", "aa"], "--sha256: got 'aa'; give 64 hexadecimal digits")):
        with pytest.raises(SystemExit):
            main(["medicalnet_resnet18", to, *typed])
        assert words in capsys.readouterr().err
    assert main(["medicalnet_resnet18", to]) == 2 and "give it with --sha256" in capsys.readouterr().err
    (tmp_path / "resnet_18_23dataset.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert main(["medicalnet_resnet18", to, "--sha256", digest.upper()]) == 0
    assert capsys.readouterr().out.strip().endswith("resnet_18_23dataset.pth")
    assert main(["medicalnet_resnet18", to, "--sha256", "a" * 64]) == 2
    assert "could not be downloaded" in capsys.readouterr().err


class BreaksOff(BaseHTTPRequestHandler):
    """Announces a chunk of 16 bytes, sends 4 and hangs up."""

    def do_GET(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_download_that_breaks_off_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        monkeypatch.setitem(DOWNLOADS, "cut", (f"http://127.0.0.1:{server.server_port}/a.pt", "a" * 64))
        thread = Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(EncoderError, match=r"cut could not be downloaded \(IncompleteRead.*By hand: get http"):
            fetch("cut", tmp_path)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_how_to_do_it_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(EncoderError, match=r"By hand: get https://github.com/.*\.tar .*f046dafe009d.*98f5"):
        fetch("neuro_simclr", tmp_path)
    with pytest.raises(EncoderError, match="does not know the sha256 of https://huggingface.co/.*sha256="):
        fetch("medicalnet_resnet18", tmp_path)
    with pytest.raises(EncoderError, match="could not be downloaded .*resnet_18_23dataset.pth .*aa$"):
        fetch("medicalnet_resnet18", tmp_path, "aa")
    with pytest.raises(EncoderError, match="got 'brainiac'; only neuro_simclr, .* can be downloaded.*docs/weights.md"):
        fetch("brainiac", tmp_path)
    assert list(tmp_path.iterdir()) == [] and all(url.startswith("https://") for url, _ in DOWNLOADS.values())
