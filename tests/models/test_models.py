"""Networks: MONAI's own, patches in order, encoder files that say what they are for."""

import json

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet18
from safetensors.torch import save_file

from kit.augment.masking import over_voxels
from kit.models.encoder_file import EncoderError, load_encoder, read_record, save_encoder
from kit.models.encoders import build_encoder, patch_size
from kit.models.heads import Predictor, projection_head
from kit.models.mae import MaskedAutoencoder, masks_for, patches, reconstruct, reconstruction_loss, unpatches

SHAPE = (12, 18, 24)
PREPARATION = {"axes": "zyx", "shape": list(SHAPE), "spacing_mm": 4.0, "origin_mm": [0, 0, 0],
               "intensity": "zscore", "template": "t"}


def test_resnet18_is_monais_to_the_bit():
    ours, theirs = build_encoder("resnet18", SHAPE).eval(), resnet18(spatial_dims=3, n_input_channels=1).eval()
    theirs.load_state_dict({**ours.network.state_dict(), "fc.weight": theirs.fc.weight, "fc.bias": theirs.fc.bias})
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet18_narrow", "vit_narrow"])
def test_encoders_map_scans_to_features(architecture):
    encoder = build_encoder(architecture, SHAPE, seed=3).eval()
    assert encoder(torch.zeros(2, 1, *SHAPE)).shape == (2, encoder.features)
    again = build_encoder(architecture, SHAPE, seed=3).state_dict()
    assert all(torch.equal(again[name], value) for name, value in encoder.state_dict().items())


def test_weights_do_not_touch_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_encoder("resnet18_narrow", SHAPE, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_patches():
    images = torch.arange(2 * 12 * 18 * 24.0).view(2, 1, *SHAPE)
    size = patch_size((36, 48, 40))
    assert size == (6, 8, 8) and patch_size((150, 192, 192)) == (15, 16, 16)
    tokens = patches(images, (4, 6, 8))
    assert tokens.shape == (2, 3 * 3 * 3, 4 * 6 * 8)
    assert torch.equal(tokens[0, 1].view(4, 6, 8), images[0, 0, :4, :6, 8:16])  # the next patch lies along x
    assert torch.equal(unpatches(tokens, (4, 6, 8), SHAPE), images)
    with pytest.raises(ValueError, match="37 has no divisor"):
        patch_size((37, 48, 40))


def test_the_tokens_order_is_the_patches_order():
    # a scan whose one patch differs changes that patch's token and no other
    encoder = build_encoder("vit_narrow", SHAPE)
    size = patch_size(SHAPE)
    plain = torch.zeros(1, 1, *SHAPE)
    marked = patches(plain, size)
    marked[0, 5] = 1.0
    embed = encoder.autoencoder.patch_embedding
    with torch.no_grad():
        changed = (embed(unpatches(marked, size, SHAPE)) - embed(plain)).abs().sum((0, 2))
    assert (changed > 1e-6).nonzero().tolist() == [[5]]


def test_mae_counts_masked_patches_only():
    model = MaskedAutoencoder(build_encoder("vit_narrow", SHAPE)).eval()
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    masked = masks_for([5, 6], SHAPE, 0.75, seed=1, epoch=0)
    assert masked.float().mean(1).tolist() == pytest.approx([0.75, 0.75], abs=0.51 / masked.shape[1])
    size = patch_size(SHAPE)
    perfect = torch.where(masked[..., None], patches(images, size), torch.tensor(99.0))
    assert reconstruction_loss(images, perfect, masked).item() == 0
    seen, filled = reconstruct(model, images, masked)
    kept = seen != 0
    assert torch.equal(filled[kept], images[kept]) and kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    hidden = torch.from_numpy(np.stack([over_voxels(row, size, SHAPE) for row in masked.numpy()]))[:, None]
    assert torch.equal(hidden, ~kept)


def test_mae_predicts_what_monais_own_forward_does():
    model = MaskedAutoencoder(build_encoder("vit_narrow", SHAPE)).eval()
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs, masked = model.encoder.autoencoder(images, masking_ratio=0.75)
        ours = model(images, masked.bool())
    # theirs takes the patches in the order of the draw: attention sums in another order
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_masks_follow_seed_epoch_and_scan_alone():
    def mask(key: int = 5, seed: int = 0, epoch: int = 0) -> torch.Tensor:
        return masks_for([key], SHAPE, 0.75, seed=seed, epoch=epoch)[0]

    assert torch.equal(masks_for([4, 5], SHAPE, 0.75, seed=0, epoch=0)[1], mask())
    for other in (mask(key=6), mask(seed=1), mask(epoch=1)):
        assert not torch.equal(other, mask())


def test_projection_head_as_in_the_paper():
    head = projection_head(512, [512, 512, 64])
    assert [layer.weight.shape for layer in head if hasattr(layer, "weight")] == [(512, 512), (512, 512), (64, 512)]
    assert not any(layer.bias is not None for layer in head if hasattr(layer, "bias"))
    assert isinstance(head[-1], torch.nn.Linear)


def test_predictor_gives_one_number():
    assert Predictor(build_encoder("resnet18_narrow", SHAPE), 1, 60, 12)(torch.zeros(3, 1, *SHAPE)).shape == (3, 1)


def test_encoder_file_round_trip_and_misfit(tmp_path):
    encoder = build_encoder("resnet18_narrow", SHAPE, seed=1)
    record = {"architecture": "resnet18_narrow", "preparation": PREPARATION, "participants": ["ab"]}
    path = save_encoder(tmp_path / "encoder.safetensors", encoder, record)
    loaded, known = load_encoder(path, PREPARATION)
    assert known == record == read_record(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in encoder.state_dict().items())
    with pytest.raises(EncoderError, match=r"shape: .*\[12, 18, 24\], these \[9, 9, 9\]\n.*spacing_mm: .*4.0, these 2"):
        load_encoder(path, {**PREPARATION, "shape": [9, 9, 9], "spacing_mm": 2.0})


def test_files_that_are_no_encoders_are_named(tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match="encoder.safetensors"):
        read_record(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"x": json.dumps(1)})
    with pytest.raises(EncoderError, match="is no encoder of this kit"):
        read_record(tmp_path / "other.safetensors")


def test_random_names_an_architecture():
    encoder, record = load_encoder("random:resnet18_narrow", PREPARATION, seed=2)
    assert record["participants"] == [] and encoder.features == 128
    assert np.array_equal(next(encoder.parameters()).detach().numpy(),
                          next(build_encoder("resnet18_narrow", SHAPE, 2).parameters()).detach().numpy())
