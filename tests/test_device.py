"""bfloat16 reaches the network's products while it trains, and nothing that is a number of its own."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kit.augment.recipe import Recipe, read_recipe
from kit.device import DeviceError, autocast, check_gpu, device, evaluation
from kit.evaluate.predict import predict
from kit.models.convolution import Conv3d, with_right_gradients
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import NOTEBOOKS
from kit.runs import Run, RunError
from kit.store.dataset import PreparedScans, collate
from kit.store.grid import Grid
from kit.train.loop import chunks_of, gradients, reads, run_model, validate
from kit.train.loss import nt_xent
from kit.train.monitor import embed
from kit.train.objectives import MaskedReconstruction, SimCLR, Supervised
from kit.train.pretrain import pretrain
from tests.conftest import GRID, SHAPE

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
BF16 = torch.autocast("cpu", torch.bfloat16)
ARCHITECTURES = ("resnet18_narrow", "vit_narrow")


def objective(kind="simclr"):
    encoder = build_encoder("vit_narrow" if kind == "mae" else "resnet18_narrow", GRID)
    torch.manual_seed(0)
    return {"simclr": lambda: SimCLR(encoder, Recipe(), projection=[16, 8], temperature=0.1, seed=0, spacing_mm=4.0),
            "mae": lambda: MaskedReconstruction(encoder, 0.75, seed=0),
            "supervised": lambda: Supervised(Predictor(encoder), "regression", flip=True, seed=0)}[kind]()


def test_the_loss_is_float32_under_autocast():
    torch.manual_seed(0)
    pair = torch.randn(2, 40, 64)
    plain, top1 = nt_xent(*pair, 0.1)
    with BF16:
        loss, same = nt_xent(*pair, 0.1)
    assert loss.dtype == torch.float32 and loss.item() == plain.item() and same == top1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_and_heads_are_float32_under_autocast(architecture):
    images = torch.randn(40, 1, *SHAPE)
    predictor = Predictor(build_encoder(architecture, GRID)).eval()
    with BF16, torch.no_grad():
        features, logits = predictor.encoder(images), predictor(images)[:, 0]
    assert features.dtype == logits.dtype == torch.float32
    assert len(set(logits.tolist())) == 40  # 28 different ones of 40 came out of bfloat16
    assert not torch.equal(features, features.bfloat16().float())  # the mean itself is finer than three digits
    exact = features.double() @ predictor.head.weight[0].double() + predictor.head.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_are_those_of_float32_whatever_stands_outside(store, architecture):
    model, scans = Predictor(build_encoder(architecture, GRID)), PreparedScans(store, store.index)
    plain = predict(model, scans)
    with BF16:
        assert np.array_equal(predict(model, scans), plain)
    assert len(set(plain[:, 0].tolist())) == len(store.index)


def test_what_is_measured_on_validation_scans_is_float32_whatever_stands_outside(store):
    model, scans = objective(), PreparedScans(store, store.index.head(8))
    plain, (features, views) = validate(model, scans, 8), embed(model, scans)
    with BF16:
        assert validate(model, scans, 8) == plain
        under = embed(model, scans)
    assert torch.equal(under[0], features) and torch.equal(under[1], views)


def test_convolutions_of_an_evaluation_take_no_tf32():
    before = torch.backends.cudnn.allow_tf32
    with evaluation(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_views_are_the_same_in_either_precision(store):
    model = objective().train()
    model.recipe = read_recipe("paper")
    batch = collate([PreparedScans(store, store.index)[0]]).to(torch.device("cpu"))
    plain = model.views(batch, 0)
    with BF16:
        assert all(torch.equal(one, other) for one, other in zip(plain, model.views(batch, 0), strict=True))


@pytest.mark.parametrize("kind", ["simclr", "mae", "supervised"])
def test_bf16_reaches_the_networks_products_and_leaves_the_loss_float32(store, kind):
    scans = PreparedScans(store, store.index.head(4), store.index["age"].head(4).to_numpy())
    batch, losses, seen, thin = collate([scans[number] for number in range(4)]), {}, {}, {}
    model = objective(kind).train()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv3d | nn.Linear):
            layer.register_forward_hook(lambda layer, given, out, name=name: (
                thin if isinstance(layer, nn.Conv3d) and min(given[0].shape[2:]) < layer.kernel_size[0] else seen
            ).setdefault(name, set()).add(out.dtype))
    for precision in ("fp32", "bf16"):
        seen.clear()
        out = run_model(model, replace(batch), 0, 0, precision)
        losses[precision], dtypes = out["loss"], dict(seen)
        assert out["loss"].dtype == torch.float32
        last = {"simclr": "head.", "mae": "encoder.autoencoder.decoder_pred", "supervised": "predictor.head"}[kind]
        assert {dtype for name, kinds in dtypes.items() if last in name for dtype in kinds} == {torch.float32}
        inside = {dtype for name, kinds in dtypes.items() if last not in name for dtype in kinds}
        assert inside == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(kinds == {torch.float32} for kinds in thin.values())  # see `kit.models.convolution`
    assert losses["bf16"] != losses["fp32"] and losses["bf16"].item() == pytest.approx(losses["fp32"].item(), rel=0.2)
    with BF16:  # what the parameter says counts, not what stands outside
        assert run_model(model, batch, 0, 0, "fp32")["loss"].dtype == torch.float32


@pytest.mark.parametrize(("shape", "kernel", "stride"), [((2, 3, 3), 3, 1), ((8, 1, 8), 3, 2), ((2, 8, 8), 3, 1),
                                                         ((3, 3, 3), 3, 1)])
def test_a_kernel_larger_than_its_input_has_the_right_gradient_in_bf16(shape, kernel, stride):
    """Of torch's own convolution it is made of memory that nobody wrote; see `kit.models.convolution`."""
    torch.manual_seed(0)
    layer = nn.Conv3d(16, 16, kernel, stride, kernel // 2, bias=False)
    with_right_gradients(network := nn.Sequential(layer))
    images, found = torch.randn(4, 16, *shape), []
    for context in (torch.autocast("cpu", enabled=False), BF16, BF16):
        with context:
            out = network(images)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad(out, layer.weight, upstream.to(out.dtype))[0])
    exact, one, other = found
    assert torch.equal(one, other)
    assert (one - exact).norm() < 0.01 * exact.norm()  # bfloat16 has three digits


@pytest.mark.parametrize("architecture", ["resnet18_narrow", "densenet121"])
def test_encoders_are_made_of_convolutions_with_right_gradients(architecture):
    encoder = build_encoder(architecture, GRID if architecture != "densenet121" else Grid((32, 36, 40), 4.0))
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv3d)]
    assert layers and {type(layer) for layer in layers} == {Conv3d}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_do_not_change_the_losss_precision(store, precision):
    scans, losses = PreparedScans(store, store.index), []
    for chunk in (0, 4):
        model = objective().eval()  # BatchNorm apart: what a scan gives does not depend on the chunk
        model.recipe = Recipe()
        step = [chunks_of(list(range(8)), chunk)]
        stream = iter([collate([scans[number] for number in part]) for part in reads(step, True)])
        losses.append(gradients(model, model, stream, step, [(0, 0)], 0, precision)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_run_trains_in_the_precision_that_it_was_asked_for(store, tmp_path):
    logs = {}
    for precision in ("fp32", "bf16"):
        asked = NOTEBOOKS["2_pretrain"].model_validate({
            "prepared": store.folder, "output_dir": tmp_path / precision, "epochs": 1, "batch_size": 8,
            "projection": [16, 8], "precision": precision})
        logs[precision] = pretrain(asked, Run.of(asked))["loss"][0]
    assert logs["fp32"] != logs["bf16"] == pytest.approx(logs["fp32"], rel=0.2)
    twice = asked.model_copy(update={"output_dir": tmp_path / "twice"})
    assert pretrain(twice, Run.of(twice))["loss"][0] == logs["bf16"]  # to the bit
    asked = asked.model_copy(update={"output_dir": tmp_path / "fp32"})
    with pytest.raises(RunError, match="precision: the folder has 'fp32', asked for 'bf16'"):
        Run.of(asked)


def test_the_precision_is_a_parameter_of_what_trains():
    for name in ("2_pretrain", "3_finetune", "5_benchmark"):
        assert NOTEBOOKS[name].model_fields["precision"].default == "fp32"  # as in the paper
    with autocast("bf16", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@no_gpu
@pytest.mark.parametrize(("name", "value"), [("SLURM_GPUS_ON_NODE", "1"), ("SLURM_JOB_GPUS", "0")])
def test_a_gpu_of_the_job_that_torch_does_not_see_is_refused(monkeypatch, name, value):
    for known in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(known, raising=False)
    assert device() == torch.device("cpu")
    monkeypatch.setenv(name, value)
    for refused in (device, check_gpu):
        with pytest.raises(DeviceError, match=rf"Slurm gave this job GPUs \({name}={value}\), but torch sees none; "
                                              rf"torch {re.escape(torch.__version__)} is built for"):
            refused()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU was asked for
    assert device() == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize(("name", "value"), [("SLURM_GPUS_ON_NODE", "0"), ("SLURM_JOB_GPUS", "")])
def test_a_job_without_gpus_runs_on_the_cpu(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert device() == torch.device("cpu")


@no_gpu
def test_pretraining_without_the_jobs_gpu_is_refused_before_it_reads_scans(store, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    params = NOTEBOOKS["2_pretrain"].model_validate({"prepared": store.folder, "output_dir": tmp_path / "run"})
    run = Run.of(params)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(DeviceError, match="SLURM_GPUS_ON_NODE=4"):
        pretrain(params, run)
    assert not (run / "damaged.csv").exists()
