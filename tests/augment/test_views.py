"""Views: keyed by (seed, epoch, scan, view) alone, geometry that keeps left left, masks that keep up."""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from kit.augment.draws import TRANSFORMS, Draw, draw
from kit.augment.recipe import (
    Flip,
    Recipe,
    alone,
    at_strength,
    names,
    read_recipe,
    save_recipe,
    strength_in_words,
    transform_types,
)
from kit.augment.views import apply, make_views
from kit.reading import ParameterError
from kit.store.dataset import PreparedScans, load_batches
from kit.store.sampler import epoch_batches

SHAPE = (10, 14, 12)  # unequal, so that swapped axes cannot hide


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, 1, *SHAPE, dtype=torch.bool)
    masks[:, :, 2:8, 3:12, 2:10] = True
    return torch.randn(3, 1, *SHAPE, generator=generator) * masks, masks, [11, 2**62, 7]


@pytest.mark.parametrize("recipe", [name for name in names() if name != "none"])
def test_a_view_depends_on_its_key_alone(batch, recipe):
    images, masks, keys = batch
    recipe = read_recipe(recipe)

    def views(order, **key):
        made = make_views(images[order], masks[order], [keys[i] for i in order], recipe,
                          **{"seed": 0, "epoch": 0, "view": 0, **key})[0]
        return dict(zip(order, made, strict=True))

    whole, alone, turned = views([0, 1, 2]), views([1]), views([2, 1, 0])
    assert torch.equal(whole[1], alone[1]) and all(torch.equal(whole[i], turned[i]) for i in range(3))
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert not torch.equal(whole[0], views([0, 1, 2], **other)[0])


def hashes(store, workers):
    """Of both views of every scan, over two epochs, by scan and epoch; what two runs must agree in."""
    made, recipe = {}, read_recipe("physics")
    for epoch in (0, 1):
        order = epoch_batches(store.index.participant.tolist(), 8, 0, epoch)
        for batch in load_batches(PreparedScans(store, store.index), order, workers):
            batch = batch.to(torch.device("cpu"))
            for view in (0, 1):
                views, _, _ = make_views(batch.images, batch.masks, batch.keys, recipe, seed=0, epoch=epoch, view=view,
                                         spacing_mm=4.0)
                made |= {(key, epoch, view): hashlib.sha256(one.numpy().tobytes()).hexdigest()
                         for key, one in zip(batch.keys, views, strict=True)}
    return made


@pytest.mark.slow
def test_runs_agree_and_workers_epochs_and_views_differ(store):
    # MONAI's random transforms in a plain DataLoader draw the same in every worker and every epoch
    here = hashes(store, workers=0)
    assert len(set(here.values())) == len(here) > 60
    assert hashes(store, workers=2) == here
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(hashes, store, 0).result() == here


def test_known_draw():
    # the same numbers on every machine: NumPy's Philox, keyed by a SeedSequence
    drawn = draw(read_recipe("paper"), seed=0, epoch=3, scan=1234, view=1)
    assert drawn.crop_size == pytest.approx((0.47128961004972514, 0.3990003040423709, 0.5307861528010718), abs=1e-12)


def test_switching_a_transform_off_leaves_the_others_alone():
    recipe = read_recipe("weak")
    without = recipe.model_copy(update={"rotate": None})
    assert draw(recipe, 0, 0, 5, 0).gamma == draw(without, 0, 0, 5, 0).gamma


def test_nothing_drawn_changes_nothing(batch):
    images, masks, keys = batch
    views, moved, drawn = make_views(images, masks, keys, Recipe(), seed=0, epoch=0, view=0)
    assert torch.equal(moved, masks) and {item.in_words() for item in drawn} == {"unchanged"}
    inside = images[0][masks[0]]
    assert torch.allclose(views[0][masks[0]], (inside - inside.mean()) / inside.std(correction=0), atol=1e-5)


def test_views_are_z_scored_inside_their_mask_and_zero_outside(batch):
    images, masks, keys = batch
    views, moved, _ = make_views(images, masks, keys, read_recipe("paper"), seed=0, epoch=0, view=0)
    for view, mask in zip(views, moved, strict=True):
        assert mask.any() and not view[~mask].any()
        assert view[mask].mean().item() == pytest.approx(0, abs=1e-4)
        assert view[mask].std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_views_keep_the_scale_of_scans_that_are_not_z_scored(batch):
    images, masks, keys = batch
    key = {"seed": 0, "epoch": 0, "view": 0}
    white = (0.8 + 0.25 * images) * masks  # as after `intensity: whitematter`
    still, _, _ = make_views(white, masks, keys, Recipe(), **key, zscored=False)
    torch.testing.assert_close(still, white.float(), rtol=1e-4, atol=1e-5)
    mirrored, _, _ = make_views(white, masks, keys, alone("flip"), **key, zscored=False)
    torch.testing.assert_close(mirrored, white.float().flip(-1), rtol=1e-4, atol=1e-5)
    grey = Recipe.model_validate({"flip": {"axes": ["x"]}, "gamma": {"range": [0.7, 1.4]}, "noise": {"range": [0, 1]}})
    views, moved, drawn = make_views(white, masks, keys, grey, **key, zscored=False)
    images, _, _ = make_views(images, masks, keys, Recipe(), **key)  # z-scored
    scores, _, _ = make_views(images, masks, keys, grey, **key)  # noise is drawn in deviations, on any scale
    for view, mask, score, scan in zip(views, moved, scores, white, strict=True):
        torch.testing.assert_close(view, (score * scan[mask].std(correction=0) + scan[mask].mean()) * mask,
                                   rtol=1e-3, atol=1e-4)
    assert torch.equal(apply(white, masks, drawn, grey, zscored=False)[0], views)
    assert torch.isfinite(make_views(white, masks & False, keys, Recipe(), **key, zscored=False)[0]).all()


def test_a_marked_left_side_after_a_flip():
    image, mask = torch.zeros(1, 1, *SHAPE), torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    image[..., 2, 5, 1] = 1  # low x: left
    flipped, _ = apply(image, mask, [Draw(flip=(False, False, True))], Recipe())
    assert np.unravel_index(flipped[0, 0].argmax().item(), SHAPE) == (2, 5, SHAPE[2] - 2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quarter_turns_match_rot90(axis):
    # a cube, so that a quarter turn maps voxels on voxels
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, 11, 11, 11, generator=generator)
    mask = torch.ones_like(image, dtype=torch.bool)
    degrees = tuple(90.0 if i == axis else 0.0 for i in range(3))
    turned, _ = apply(image, mask, [Draw(rotation_degrees=degrees)], Recipe())
    first, second = [2 + i for i in range(3) if i != axis]
    wanted = apply(torch.rot90(image, 1, (first, second)), mask, [Draw()], Recipe())[0]
    assert torch.allclose(turned, wanted, atol=1e-4)


def test_crop_is_the_box_resized():
    image = torch.arange(8.0).view(1, 1, 1, 1, 8).expand(1, 1, 4, 6, 8).contiguous()
    mask = torch.ones_like(image, dtype=torch.bool)
    view, _ = apply(image, mask, [Draw(crop_start=(0, 0, 0.5), crop_size=(1, 1, 0.5))], Recipe())
    wanted = torch.nn.functional.interpolate(image[..., 4:], size=(4, 6, 8), mode="trilinear", align_corners=False)
    inner = (..., slice(1, -1))  # at the box's edge the crop still sees its neighbours
    z = (wanted - wanted.mean()) / wanted.std(correction=0)
    assert torch.corrcoef(torch.stack([view[inner].flatten(), z[inner].flatten()]))[0, 1] > 0.999


def test_a_box_that_misses_the_brain_is_centred_on_it():
    image, mask = torch.zeros(1, 1, 40, 44, 36), torch.zeros(1, 1, 40, 44, 36, dtype=torch.bool)
    mask[..., 36:39, 40:43, 32:35] = True
    image[mask] = torch.arange(27.0)
    small = Recipe.model_validate({"crop": {"smallest": [0.2, 0.2, 0.2]}})
    for key in range(20):
        assert make_views(image, mask, [key], small, seed=0, epoch=0, view=0)[1].any()


def test_noise_and_bias_act_inside_the_mask_only(batch):
    images, masks, keys = batch
    recipe = Recipe.model_validate({"noise": {"range": [0.5, 0.5]}, "bias": {"range": [0.3, 0.3]}})
    views, _, _ = make_views(images, masks, keys, recipe, seed=0, epoch=0, view=0)
    plain, _, _ = make_views(images, masks, keys, Recipe(), seed=0, epoch=0, view=0)
    assert not views[~masks].any() and (views - plain)[masks].abs().mean() > 0.1


@pytest.mark.parametrize("recipe", names())
def test_strength_scales_about_what_changes_nothing(batch, recipe):
    images, masks, keys = batch
    whole = read_recipe(recipe)
    assert at_strength(whole, 1) == whole and Recipe.model_validate(whole.plain()) == whole
    half = whole.model_copy(update={"strength": 0.5})
    assert draw(half, 0, 0, 3, 0) == draw(at_strength(whole, 0.5), 0, 0, 3, 0)
    still = make_views(images, masks, keys, whole.model_copy(update={"strength": 0.0}), seed=0, epoch=0, view=0)
    plain = make_views(images, masks, keys, Recipe(), seed=0, epoch=0, view=0)
    assert torch.equal(still[0], plain[0]) and torch.equal(still[1], masks)
    assert {item.in_words() for item in still[2]} == {"unchanged"}


def test_a_recipe_is_written_in_code_too():
    recipe = Recipe(flip=Flip(probability=0.5, axes=["x"]))
    assert recipe.plain() == {"strength": 1.0, "flip": {"probability": 0.5, "axes": ["x"]}}
    assert {draw(recipe, 0, 0, key, 0).flip for key in range(20)} == {(False, False, False), (False, False, True)}


def test_a_saved_recipe_reads_back(tmp_path):
    for name in names():
        recipe = read_recipe(name)
        assert read_recipe(save_recipe(recipe, tmp_path / "mine.yaml")) == recipe


def test_every_transform_is_drawn_and_put_in_words():
    # the place in the list is the number of the random stream: the first eight are those of the first recipes
    assert TRANSFORMS[:8] == ("crop", "flip", "rotate", "zoom", "shift", "gamma", "bias", "noise")
    assert sorted(TRANSFORMS) == sorted(transform_types())
    for name in TRANSFORMS:
        drawn = draw(alone(name), 0, 0, 5, 0)
        assert drawn.in_words() != "unchanged"
    assert draw(alone("ghosting"), 0, 0, 5, 0).in_words()[:15] == "ghosting 1.00 a"


def test_a_strength_in_words_is_what_is_drawn():
    words = {name: strength_in_words(name, 0.5) for name in TRANSFORMS}
    assert (words["rotate"], words["translate"], words["blur"], words["crop"]) == ("±45°", "±20 mm", "6 mm", "≥ 60%")
    assert draw(alone("gamma", 0.5), 0, 0, 5, 0).gamma == pytest.approx(float(words["gamma"]), abs=0.005)
    assert words["flip"] == "along x"


def test_faults_in_a_recipe_are_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("gamma: {range: [0.0, 1.5]}\nrotate: {degrees: [500, 0, 0]}\n", encoding="utf-8")
    with pytest.raises(ParameterError, match=r"(?s)rotate.degrees.0.*gamma.range.*the range must lie within 0.2 to 5"):
        read_recipe(path)
    path.write_text("gama: {range: [0.5, 1.5]}\nnoise: {range: [1, 0]}\n", encoding="utf-8")
    with pytest.raises(ParameterError, match=r"(?s)noise.range.*gama: unknown parameter; did you mean gamma\?"):
        read_recipe(path)
    with pytest.raises(ParameterError, match="no such file"):
        read_recipe("papr")
