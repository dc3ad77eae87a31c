"""Training on a CUDA device: `make gpu` runs these; the tests around them hold the same of a CPU."""

import numpy as np
import pytest
import torch
from torch import nn

from kit.device import device
from kit.params import Pretrain
from kit.runs import Run
from kit.store.dataset import PreparedScans, collate
from kit.train import checkpoint
from kit.train.distributed import launch, synchronise_batch_norm
from kit.train.loop import run_model
from kit.train.pretrain import build_objective, pretrain
from tests.train.test_loss import _curves

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def asked(store, folder, **changes):
    return Pretrain.model_validate({
        "prepared": store.folder, "output_dir": folder, "epochs": 3, "batch_size": 8, "projection": [16, 8],
        "validation_fraction": 0.2, "checkpoint_minutes": 0, **changes})


def losses(store, folder, **changes):
    params = asked(store, folder, **changes)
    return pretrain(params, Run.of(params))["loss"].to_numpy()


@pytest.mark.parametrize("changes", [
    {}, {"precision": "bf16"}, {"chunk": 4}, {"architecture": "resnet18"},
    {"architecture": "resnet18", "precision": "bf16"}, {"objective": "mae", "architecture": "vit_narrow"},
    {"objective": "mae", "architecture": "vit_narrow", "precision": "bf16"}])
def test_the_same_seed_twice_gives_the_same_bits(store, tmp_path, changes):
    one, other = (losses(store, tmp_path / name, **changes) for name in ("one", "other"))
    assert np.isfinite(one).all() and (one == other).all()


def test_a_compiled_encoder_learns_the_same(store, tmp_path):
    plain, compiled = (losses(store, tmp_path / str(chosen), torch_compile=chosen) for chosen in (False, True))
    assert np.allclose(compiled[0], plain[0], rtol=1e-2)  # TF32 has three digits, and eight steps drift


def test_a_run_that_was_stopped_goes_on(store, tmp_path, monkeypatch):
    whole = losses(store, tmp_path / "whole")
    real, calls = checkpoint.save, []

    def save(*arguments, **options):
        real(*arguments, **options)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save)
        losses(store, tmp_path / "broken")
    assert (losses(store, tmp_path / "broken") == whole).all()


@pytest.mark.parametrize("objective", ["simclr", "mae"])
def test_bf16_reaches_the_network_and_leaves_the_loss_float32(store, tmp_path, objective):
    params = asked(store, tmp_path, objective=objective,
                   architecture="vit_narrow" if objective == "mae" else "resnet18_narrow")
    model, seen = build_objective(params, store).to(device()).train(), set()
    for layer in model.encoder.modules():
        if isinstance(layer, nn.Conv3d | nn.Linear):
            layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    scans = PreparedScans(store, store.index.head(4))
    loss = run_model(model, collate([scans[number] for number in range(4)]).to(device()), 0, 0, "bf16")["loss"]
    assert loss.dtype == torch.float32 and torch.bfloat16 in seen


def test_synchronised_batch_norm_of_one_device_is_batch_norm():
    torch.manual_seed(0)
    plain = nn.BatchNorm3d(4).to(device())
    synchronised = synchronise_batch_norm(nn.Sequential(nn.BatchNorm3d(4))).to(device())
    images = torch.randn(6, 4, 5, 7, 6, device=device())
    torch.testing.assert_close(synchronised(images), plain(images))


def test_as_many_processes_as_devices_go_the_way_of_one(tmp_path):
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    processes = torch.cuda.device_count()
    _curves(str(tmp_path / "one"), "cuda")
    launch(_curves, (str(tmp_path / "many"), "cuda"), processes)  # by NCCL
    one, many = (np.load(tmp_path / name / f"{torch.float64}-{count}-0.npz")
                 for name, count in (("one", 1), ("many", processes)))
    assert np.allclose(many["losses"], one["losses"], rtol=1e-9, atol=0)
