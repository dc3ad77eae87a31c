"""Networks: MONAI's own, patches in order, encoder files that say what they are for."""

import json
import resource

import numpy as np
import pytest
import torch
from monai.networks.nets import DenseNet121, resnet18
from safetensors.torch import save_file

from kit.models.encoder_file import EncoderError, load_encoder, read_record, save_encoder
from kit.models.encoders import LEAST_OF_PATCH, GridError, brain_patches, build_encoder, patch_size, patches
from kit.models.heads import Predictor, projection_head
from kit.models.mae import MaskedAutoencoder, masks_for, reconstruct, reconstruction_loss
from kit.params import ARCHITECTURES
from kit.preprocess.template import template_on
from kit.store.grid import PAPER_GRID, Grid
from tests.conftest import GRID, SHAPE

DENSE = Grid((29, 36, 30), 4.0)  # the least that DenseNet121 takes
ROOMY = Grid((20, 28, 24), 8.0)  # has background on every side of the brain
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name == "vit" else name for name in ARCHITECTURES]  # ViT-B
PREPARATION = {"axes": "zyx", "shape": list(SHAPE), "spacing_mm": 4.0, "origin_mm": [0, 0, 0],
               "intensity": "zscore", "template": "t"}


def test_resnet18_is_monais_to_the_bit():
    ours, theirs = build_encoder("resnet18", GRID).eval(), resnet18(spatial_dims=3, n_input_channels=1).eval()
    theirs.load_state_dict({**ours.network.state_dict(), "fc.weight": theirs.fc.weight, "fc.bias": theirs.fc.bias})
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("architecture", EVERY)
def test_encoders_map_scans_to_features(architecture):
    grid = DENSE if architecture == "densenet121" else GRID
    encoder = build_encoder(architecture, grid, seed=3).eval()
    assert encoder(torch.zeros(2, 1, *grid.shape)).shape == (2, encoder.features)
    again = build_encoder(architecture, grid, seed=3).state_dict()
    assert all(torch.equal(again[name], value) for name, value in encoder.state_dict().items())


def test_weights_do_not_touch_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_encoder("resnet18_narrow", GRID, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_weights_do_not_touch_the_random_state_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds CUDA's generators"))
    build_encoder("resnet18_narrow", GRID, seed=1)


def test_an_unknown_architecture_is_no_resnet():
    with pytest.raises(ValueError, match="no architecture 'resnet50'; there are resnet18, resnet18_narrow, densenet"):
        build_encoder("resnet50", GRID)


def test_densenet121_is_monais_before_its_class_layer():
    ours, theirs = build_encoder("densenet121", DENSE).eval(), DenseNet121(3, in_channels=1, out_channels=2)
    theirs.load_state_dict({**ours.network.state_dict(), **{
        name: value for name, value in theirs.state_dict().items() if name.startswith("class_layers.out")}})
    images = torch.randn(2, 1, *DENSE.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs.eval().class_layers.out(ours(images)), theirs(images))
    with pytest.raises(GridError, match=r"needs sides of at least 29 voxels, but these are \(12, 18, 24\)"):
        build_encoder("densenet121", GRID)


@pytest.mark.parametrize(("grid", "size"), [
    (Grid((36, 48, 40), 4.0), (4, 4, 4)), (PAPER_GRID, (15, 16, 16)), (Grid((72, 96, 80), 2.0), (8, 8, 8)),
    (Grid((33, 35, 40), 4.0), (3, 5, 4)),
])
def test_patches_are_about_16_mm(grid, size):
    assert patch_size(grid) == size


def test_a_side_that_no_such_patch_divides_is_named():
    with pytest.raises(GridError, match=r"but 37 voxels of 4 mm have no divisor from 8 to 32 mm"):
        patch_size(Grid((37, 48, 40), 4.0))


def test_patches_lie_in_the_networks_order():
    images = torch.arange(2 * 12 * 18 * 24.0).view(2, 1, *SHAPE)
    tokens = patches(images, (4, 6, 8))
    assert tokens.shape == (2, 3 * 3 * 3, 4 * 6 * 8)
    assert torch.equal(tokens[0, 1].view(4, 6, 8), images[0, 0, :4, :6, 8:16])  # the next patch lies along x
    model = MaskedAutoencoder(build_encoder("vit_narrow", GRID))
    assert torch.equal(model.images_of(model.targets(images, normalise=False)), images)


def test_the_tokens_order_is_the_patches_order():
    # a scan whose one patch differs changes that patch's token and no other
    encoder, plain = build_encoder("vit_narrow", ROOMY), torch.zeros(1, 1, *ROOMY.shape)
    model = MaskedAutoencoder(encoder)
    marked = model.targets(plain, normalise=False)
    marked[0, 5] = 1.0
    with torch.no_grad():
        changed = (encoder.tokens(model.images_of(marked)) - encoder.tokens(plain)).abs().sum((0, 2))
    assert (changed > 1e-6).nonzero().tolist() == [[5]]


def test_tokens_are_the_patches_that_hold_brain():
    brain, size = template_on(ROOMY)[1], patch_size(ROOMY)
    corners = [range(0, side, width) for side, width in zip(ROOMY.shape, size, strict=True)]
    shares = [brain[z:z + size[0], y:y + size[1], x:x + size[2]].mean()
              for z in corners[0] for y in corners[1] for x in corners[2]]
    assert brain_patches(ROOMY).tolist() == [number for number, share in enumerate(shares) if share >= LEAST_OF_PATCH]
    assert 0.2 < len(brain_patches(ROOMY)) / len(shares) < 0.6
    assert len(brain_patches(GRID)) == 108  # all of them


def test_background_does_not_reach_the_features_nor_what_is_predicted():
    model = MaskedAutoencoder(build_encoder("vit_narrow", ROOMY)).eval()
    images = torch.randn(2, 1, *ROOMY.shape, generator=torch.Generator().manual_seed(0))
    inside = model.images_of(torch.ones(2, len(model.encoder.brain_patches), 8)) > 0
    other = torch.where(inside, images, 100.0)
    masked = masks_for([5, 6], len(model.encoder.brain_patches), 0.75, seed=1, epoch=0)
    with torch.no_grad():
        assert torch.equal(model.encoder(other), model.encoder(images))
        assert torch.equal(model(other, masked), model(images, masked))
        assert not torch.equal(model.encoder(images + inside), model.encoder(images))


def test_a_loss_counts_masked_patches_with_brain_and_each_scan_the_same():
    true = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    predicted = true + torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])[..., None]
    scored = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert reconstruction_loss(true, predicted, scored).item() == ((1 + 9) / 2 + 64) / 2
    model = MaskedAutoencoder(build_encoder("vit_narrow", ROOMY))
    masks = torch.zeros(1, 1, *ROOMY.shape, dtype=torch.bool)
    masks[..., :12] = True
    held = model.images_of(model.hold_brain(masks)[..., None].expand(-1, -1, 8).float())
    assert held[..., 12:].sum() == 0 and held[..., :12].sum() > 0


def test_targets_are_normalised_patch_by_patch():
    model = MaskedAutoencoder(build_encoder("vit_narrow", GRID))
    images = 5 + 3 * torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    target = model.targets(images, normalise=True)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 108), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(-1), torch.ones(2, 108))
    assert model.targets(torch.zeros_like(images), normalise=True).abs().max() == 0  # no spread, and no nan


@pytest.mark.parametrize("normalise", [False, True])
def test_the_picture_shows_what_is_predicted_and_lends_it_nothing(normalise):
    model = MaskedAutoencoder(build_encoder("vit_narrow", ROOMY)).eval()
    images = torch.randn(2, 1, *ROOMY.shape, generator=torch.Generator().manual_seed(0))
    masked = masks_for([5, 6], len(model.encoder.brain_patches), 0.75, seed=1, epoch=0)
    hidden = model.images_of(masked[..., None].expand(-1, -1, 8).float()) > 0
    true, seen, filled = reconstruct(model, images, masked, normalise)
    assert torch.equal(filled[~hidden], true[~hidden]) and torch.equal(seen, true * ~hidden)
    assert not torch.isclose(filled[hidden], true[hidden]).all()
    other = reconstruct(model, torch.where(hidden, 7 * images + 3, images), masked, normalise)[2]
    assert torch.equal(other, filled)  # what hides behind the mask has no part in it


def test_mae_predicts_what_monais_own_forward_does():
    model = MaskedAutoencoder(build_encoder("vit_narrow", GRID)).eval()  # all patches are tokens there
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs, masked = model.encoder.autoencoder(images, masking_ratio=0.75)
        ours = model(images, masked.bool())
    # theirs takes the patches in the order of the draw: attention sums in another order
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_masks_follow_seed_epoch_and_scan_alone():
    def mask(key: int = 5, seed: int = 0, epoch: int = 0) -> torch.Tensor:
        return masks_for([key], 108, 0.75, seed=seed, epoch=epoch)[0]

    assert torch.equal(masks_for([4, 5], 108, 0.75, seed=0, epoch=0)[1], mask())
    for other in (mask(key=6), mask(seed=1), mask(epoch=1)):
        assert not torch.equal(other, mask())


def test_projection_head_as_in_the_paper():
    head = projection_head(512, [512, 512, 64])
    assert [layer.weight.shape for layer in head if hasattr(layer, "weight")] == [(512, 512), (512, 512), (64, 512)]
    assert not any(layer.bias is not None for layer in head if hasattr(layer, "bias"))
    assert isinstance(head[-1], torch.nn.Linear)


def test_predictor_gives_one_number():
    assert Predictor(build_encoder("resnet18_narrow", GRID), 1, 60, 12)(torch.zeros(3, 1, *SHAPE)).shape == (3, 1)


@pytest.mark.parametrize("architecture", EVERY)
def test_encoder_file_round_trip_and_misfit(tmp_path, architecture):
    grid = DENSE if architecture == "densenet121" else GRID
    encoder, preparation = build_encoder(architecture, grid, seed=1), {**PREPARATION, "shape": list(grid.shape)}
    record = {"architecture": architecture, "preparation": preparation, "participants": ["ab"]}
    path = save_encoder(tmp_path / "encoder.safetensors", encoder, record)
    loaded, known = load_encoder(path, preparation)
    assert known == record == read_record(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in encoder.state_dict().items())
    images = torch.randn(2, 1, *grid.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval()(images), encoder.eval()(images))
    with pytest.raises(EncoderError, match=r"shape: encoder \[.*\], scans \[9, 9, 9\]\n.*spacing_mm: .*4.0, scans 2"):
        load_encoder(path, {**preparation, "shape": [9, 9, 9], "spacing_mm": 2.0})


def test_an_encoder_without_room_is_an_os_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_weights_of_another_architecture_are_listed(tmp_path):
    encoder = build_encoder("resnet18_narrow", GRID)
    for architecture, words in (("densenet121", "these are"), ("vit_narrow", "Missing key"), ("resnet50", "no archit")):
        path = save_encoder(tmp_path / "encoder.safetensors", encoder, {
            "architecture": architecture, "preparation": PREPARATION, "participants": ["ab"]})
        with pytest.raises(EncoderError, match=f"encoder.safetensors does not fit {architecture}: (.|\n)*{words}"):
            load_encoder(path, PREPARATION)


def test_a_format_before_the_kits_own_file_does_not_hide_whom_it_has_seen(tmp_path):
    record = {"architecture": "resnet18_narrow", "preparation": PREPARATION, "participants": ["ab"]}
    path = save_encoder(tmp_path / "encoder.safetensors", build_encoder("resnet18_narrow", GRID), record)
    assert read_record(f"resnet18_narrow:{path}") == load_encoder(f"resnet18_narrow:{path}", PREPARATION)[1] == record
    for other in ("resnet18", "neuro_simclr"):
        with pytest.raises(EncoderError, match=f"is an encoder of this kit, a resnet18_narrow, not {other}: give its"):
            read_record(f"{other}:{path}")


def test_files_that_are_no_encoders_are_named(tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match="encoder.safetensors"):
        read_record(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"x": json.dumps(1)})
    with pytest.raises(EncoderError, match="is not an encoder of this kit"):
        read_record(tmp_path / "other.safetensors")


def test_random_names_an_architecture():
    encoder, record = load_encoder("random:resnet18_narrow", PREPARATION, seed=2)
    assert record["participants"] == [] and encoder.features == 128
    assert np.array_equal(next(encoder.parameters()).detach().numpy(),
                          next(build_encoder("resnet18_narrow", GRID, 2).parameters()).detach().numpy())
