"""Networks of others: their input and features, against a plain reading of what their public code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import ResNet, ViT, resnet50
from monai.transforms import NormalizeIntensity, Resize, ScaleIntensity
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from kit.evaluate.predict import predict
from kit.models.encoder_file import load_encoder, noted, weights_digest
from kit.models.encoders import build_encoder
from kit.models.third_party_networks import SLAB, MedicalNet, nearest
from kit.preprocess.settings import Preparation
from kit.store.dataset import PreparedScans
from kit.store.grid import PAPER_GRID
from kit.store.store import Store
from tests.conftest import GRID

PAPER = Preparation(PAPER_GRID, "rigid", "auto", "n4").record()


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    """A brain without symmetry in the paper's box, (150, 192, 192) float32: 0 outside, almost 0 where it is darkest."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in PAPER_GRID.shape), indexing="ij")
    brain = (z + 0.1) ** 2 / 0.6 + (y - 0.05) ** 2 / 0.7 + (x + 0.1) ** 2 / 0.4 < 1
    values = 3 + np.sin(5 * z + 2 * y) + np.cos(7 * x - y) + x
    return np.where(brain, values - values[brain].min() + 1e-6, 0).astype(np.float32)


@pytest.fixture(scope="module")
def scan(raw: np.ndarray) -> np.ndarray:
    """The same, z-scored in the brain."""
    brain = raw > 0
    return np.where(brain, (raw - raw[brain].mean(dtype=float)) / raw[brain].std(), 0).astype(np.float32)


def in_nifti_order(scan: np.ndarray) -> np.ndarray:
    """The scan in the whole ICBM152 2009a box, (x, y, z) = (197, 233, 189) from (-98, -134, -72) mm.

    The paper's box begins at (-95, -113, -68).
    """
    whole = np.zeros((197, 233, 189), np.float32)
    whole[3:195, 21:213, 4:154] = scan.transpose(2, 1, 0)
    return whole


def features(encoder: nn.Module, scan: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return encoder.eval()(torch.from_numpy(scan)[None, None])[0].numpy()


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms that have seen data: means, variances and biases count."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var") or (name.endswith("bias") and value.ndim == 1):
            value.uniform_(0.1, 0.3, generator=generator)
        if name.endswith("running_mean"):
            value.uniform_(-0.2, 0.2, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def plain_vit() -> ViT:
    """As BrainIAC's `ViTBackboneNet` builds it."""
    torch.manual_seed(1)
    return ViT(in_channels=1, img_size=(96, 96, 96), patch_size=(16, 16, 16), hidden_size=768, mlp_dim=3072,
               num_layers=12, num_heads=12).eval()


@pytest.mark.parametrize("cross_attention", ["none", "as some of MONAI's versions save it"])
def test_brainiac(tmp_path: Path, raw: np.ndarray, scan: np.ndarray, plain_vit: ViT, cross_attention: str,
                  capsys: pytest.CaptureFixture[str]) -> None:
    """The first patch's token of their transforms' output: resize, z-score where not zero."""
    names = dict(plain_vit.state_dict())
    if cross_attention == "none":
        names = {name: value for name, value in names.items() if "cross_attn" not in name}
    else:
        names["blocks.0.cross_attn.to_q.weight"] = torch.zeros(768, 768)
    state = {f"backbone.{name}": value for name, value in names.items()}
    state["projection_head.0.weight"] = torch.zeros(4, 768)
    torch.save({"state_dict": state, "epoch": 2}, tmp_path / "BrainIAC.ckpt")
    encoder, record = load_encoder(tmp_path / "BrainIAC.ckpt", PAPER)
    assert (record["format"], record["architecture"]) == ("brainiac", "brainiac")
    said = capsys.readouterr().out
    assert "non-commercial" in said and "ignored: epoch, " in said and "projection_head (1)" in said
    assert ("cross_attn (1)" in said) == (cross_attention != "none")

    resized = Resize((96, 96, 96), mode="trilinear")(in_nifti_order(raw)[None])
    with torch.no_grad():
        wanted = plain_vit(torch.as_tensor(NormalizeIntensity(nonzero=True, channel_wise=True)(resized))[None])[0][0, 0]
    np.testing.assert_allclose(features(encoder, scan), wanted.numpy(), rtol=1e-4, atol=1e-4)
    assert encoder.features == 768 and wanted.std() > 0.1
    digest = weights_digest(encoder)
    assert noted(tmp_path / "BrainIAC.ckpt", encoder, record)["weights"] != digest, "results on other input are stale"


def test_brainiac_resnet50(tmp_path: Path, raw: np.ndarray, scan: np.ndarray) -> None:
    """Their ResNet50_3D on intensities from 0 to 1 at 128x128x128, resized as MONAI's `Resized` does by default."""
    torch.manual_seed(2)
    plain = resnet50(pretrained=False)
    plain.conv1, plain.fc = nn.Conv3d(1, 64, kernel_size=7, stride=2, padding=3, bias=False), nn.Identity()
    randomised(plain)
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in plain.state_dict().items()}},
               tmp_path / "BrainIAC.ckpt")
    encoder, record = load_encoder(tmp_path / "BrainIAC.ckpt", PAPER)
    assert record["format"] == "brainiac_resnet50" and encoder.features == 2048

    values = ScaleIntensity(0.0, 1.0)(Resize((128, 128, 128))(in_nifti_order(raw)[None]))
    with torch.no_grad():
        wanted = plain(torch.as_tensor(values)[None])[0].numpy()
    # random weights give features from 1e12 to 7e16; some differed by 3e-8 of the largest
    np.testing.assert_allclose(features(encoder, scan), wanted, rtol=1e-4, atol=1e-6 * wanted.max())
    assert np.ptp(wanted) > 0.1


def med3d(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """MedicalNet's forward pass from its weights alone: strides 2, 2, 1, 2, 1, 1, dilations 2 and 4 at the end."""
    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(normed(F.conv3d(images, state["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool3d(x, 3, 2, 1)
    for stage, (first_stride, rate) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], start=1):
        for block in range(8):
            name, stride = f"layer{stage}.{block}", first_stride if block == 0 else 1
            if f"{name}.conv1.weight" not in state:
                break
            y = F.conv3d(x, state[f"{name}.conv1.weight"], stride=stride, padding=rate, dilation=rate)
            y = F.conv3d(F.relu(normed(y, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=rate, dilation=rate)
            y = normed(y, f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:  # shortcut B
                x = normed(F.conv3d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
            elif x.shape != y.shape:  # shortcut A
                x = F.avg_pool3d(x, 1, stride)
                x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            x = F.relu(x + y)
    return x.mean((2, 3, 4))


@pytest.mark.parametrize(("depth", "layers", "shortcut"), [(10, [1, 1, 1, 1], "B"), (18, [2, 2, 2, 2], "A")])
def test_medicalnet(tmp_path: Path, store: Store, depth: int, layers: list[int], shortcut: str) -> None:
    """A file as they wrote it: an old torch's, under `module.`, here with the segmentation head; any box is taken."""
    torch.manual_seed(3)
    plain = randomised(ResNet("basic", layers, [64, 128, 256, 512], n_input_channels=1, conv1_t_stride=2,
                              feed_forward=False, shortcut_type=shortcut, bias_downsample=False))
    state = {name: value for name, value in plain.state_dict().items() if "num_batches" not in name}
    path = tmp_path / f"resnet_{depth}.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}
                | {"module.conv_seg.0.weight": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    encoder, record = load_encoder(path, store.record)
    assert record["architecture"] == f"medicalnet_resnet{depth}" and encoder.features == 512

    image = store.read(store.index["scan"][0])[0].astype(np.float32)
    encoder.shape = (16, 40, 32)  # its own takes seconds
    places = ndimage.zoom(image, np.divide(encoder.shape, image.shape), order=0)
    values = np.where(places != 0, (places - places[places != 0].mean()) / places[places != 0].std(), 0)
    with torch.no_grad():
        wanted = med3d(state, torch.from_numpy(values.astype(np.float32))[None, None])[0].numpy()
    np.testing.assert_allclose(features(encoder, image), wanted, rtol=1e-4, atol=1e-5)
    assert np.ptp(wanted) > 0.1
    assert encoder.rescales
    np.testing.assert_allclose(features(encoder, 3 * image), wanted, rtol=1e-4, atol=1e-5)


def test_medicalnet_enlarges_one_scan_at_a_time_in_evaluation() -> None:
    """The features are those of the batch to float rounding, not to the bit: convolutions of other sizes sum anew."""
    encoder, sizes = MedicalNet(10, (16, 40, 32)).eval(), []
    encoder.network.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    images = torch.randn(3, 1, 6, 9, 8, generator=torch.Generator().manual_seed(0))
    together = encoder(images)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), together)
        encoder.train()(images)
    assert sizes == [3, 1, 1, 1, 3], "training and gradients take the batch whole"


def test_a_state_dict_of_the_kits_own_medicalnet_is_read_again(tmp_path: Path) -> None:
    state = build_encoder("medicalnet_resnet10", GRID, seed=1).state_dict()
    torch.save(state, tmp_path / "a.pt")
    loaded = load_encoder(tmp_path / "a.pt", PAPER)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_resizing_is_scipys() -> None:
    values = np.random.default_rng(0).normal(size=(9, 14, 11)).astype(np.float32)
    ours = nearest(torch.from_numpy(values)[None, None], SLAB)[0, 0].numpy()
    np.testing.assert_array_equal(ours, ndimage.zoom(values, np.divide(SLAB, values.shape), order=0))


@pytest.mark.slow
def test_medicalnet_at_its_own_size(store: Store) -> None:
    encoder = build_encoder("medicalnet_resnet10", GRID, seed=1)
    found = predict(encoder, PreparedScans(store, store.index.head(1)))
    assert found.shape == (1, 512) and np.isfinite(found).all() and np.ptp(found) > 0
