"""Views of a whole batch at once, as a GPU makes them, are those made one by one; all here runs on the CPU too."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kit.augment import batched, views
from kit.augment.batched import normal, philox
from kit.augment.contrast import bias_control_points
from kit.augment.draws import TRANSFORMS, draw
from kit.augment.recipe import Recipe, alone, names, read_recipe
from kit.augment.views import ATTEMPTS

SHAPE, KEYS = (20, 28, 24), [11, 2**62, 7, 3]
RANDOM = ("noise", "rician")  # per voxel, where the two draw by different generators
# views of memory; with several threads, a CPU joins large arrays by these
NO_LAUNCH = ("aten::as_strided", "aten::narrow", "aten::slice")
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]


def scans(count=4):
    """Smooth heads, so that a difference of 1e-4 is of the method and not of a steep edge."""
    generator, axes = torch.Generator().manual_seed(0), [torch.linspace(-1, 1, side) for side in SHAPE]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    masks = (z**2 + y**2 + x**2 < 0.7).expand(count, 1, *SHAPE).contiguous()
    coarse = torch.randn(count, 1, 5, 7, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=SHAPE, mode="trilinear")
    inside = images[masks].view(count, -1)
    mean, sd = (part.view(-1, 1, 1, 1, 1) for part in (inside.mean(1), inside.std(1, correction=0)))
    return (images - mean) / sd * masks, masks


def both_ways(recipe, device, zscored=True, images=None):
    """Views made one by one on the CPU, and together on the device."""
    volumes, masks = scans()
    volumes = volumes if images is None else images

    def made(way, where):
        found = way(volumes.to(where), masks.to(where), lambda number, attempt: draw(
            recipe, 0, 0, KEYS[number], 0, attempt), ATTEMPTS, recipe, 8.0, zscored)
        return found[0].cpu(), found[1].cpu(), found[2]

    return made(views._one_by_one, "cpu"), made(views._together, device)


def same(one, other):
    """In a voxel at a mask's edge the nearest neighbour may round to either side; each such voxel moves the z-score."""
    assert one[2] == other[2]
    assert (one[1] != other[1]).sum() <= 2e-3 * one[1].sum()
    both = one[1] & other[1]
    assert both.sum() > 0.01 * both.numel()
    assert (one[0] - other[0])[both].abs().median() < 1e-4
    assert (one[0] - other[0])[both].abs().quantile(0.99) < 5e-3
    assert not other[0][~other[1]].any() and other[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in RANDOM])
@pytest.mark.parametrize("share", [0.31, 0.73])  # at 0.3 whole planes lie halfway between two voxels
def test_each_transform_is_that_of_one_scan_at_a_time(name, share, device):
    same(*both_ways(alone(name, share), device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zscored", [True, False])
@pytest.mark.parametrize("name", names())
def test_each_recipe_is_that_of_one_scan_at_a_time(name, zscored, device):
    recipe = read_recipe(name).model_copy(update=dict.fromkeys(RANDOM))
    images, masks = scans()
    same(*both_ways(recipe, device, zscored, images if zscored else (0.8 + 0.25 * images) * masks))


def test_a_border_is_stretched_and_what_misses_the_brain_is_drawn_again():
    border = Recipe.model_validate({"rotate": {"degrees": [40, 40, 40], "padding": "border"},
                                    "crop": {"smallest": [0.6, 0.6, 0.6]}})
    same(*both_ways(border, "cpu"))
    image, mask = torch.zeros(4, 1, *SHAPE), torch.zeros(4, 1, *SHAPE, dtype=torch.bool)
    mask[..., 16:19, 24:27, 20:23] = True
    image[mask] = torch.arange(27.0).repeat(4)
    small = Recipe.model_validate({"crop": {"smallest": [0.2, 0.2, 0.2]}})

    def drawn_for(number, attempt):
        return draw(small, 0, 0, KEYS[number], 0, min(attempt, ATTEMPTS - 1))

    one, other = (way(image, mask, drawn_for, ATTEMPTS, small, 8.0, True) for way in (
        views._one_by_one, views._together))
    assert one[2] == other[2] and torch.equal(one[1], other[1])
    assert any(drawn != drawn_for(number, 0) for number, drawn in enumerate(one[2]))  # some were drawn again


@pytest.mark.parametrize("device", DEVICES)
def test_noise_has_its_size_and_depends_on_the_key_alone(device):
    recipe, plain = alone("noise", 0.5), alone("noise", 0)
    images, masks = (part.to(device) for part in scans())

    def made(recipe, order):
        return views._together(images[order], masks[order], lambda number, attempt: draw(
            recipe, 0, 0, KEYS[order[number]], 0, attempt), 0, recipe, 8.0, True)

    noisy, order = made(recipe, [0, 1, 2, 3])[0], [2, 0]
    # a sum's order depends on the batch's size: 1e-6 at most on the CPU
    torch.testing.assert_close(made(recipe, order)[0], noisy[order], rtol=0, atol=1e-5)
    assert torch.equal(made(recipe, [0, 1, 2, 3])[0], noisy)
    ratio = (noisy[masks] - made(plain, [0, 1, 2, 3])[0][masks]).std().item()
    assert 0.3 < ratio < 0.6  # 0.5 before the last z-score, which divides by sqrt(1.25)
    brighter = made(alone("rician", 0.5), [0, 1, 2, 3])[0]
    assert brighter.isfinite().all() and not torch.equal(brighter, noisy)


@pytest.mark.parametrize("device", DEVICES)
def test_philox_gives_the_published_words(device):
    # the known answer of Random123's kat_vectors: philox4x32, 10 rounds, counter and key zero
    words = [int(word[0, 0]) for word in philox(1, [0], torch.device(device))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_normal_numbers_are_normal_and_keyed():
    one, other = normal((50, 60, 70), [5, 2**40 + 5], torch.device("cpu")).flatten(1).double()
    assert torch.equal(one.float(), normal((50, 60, 70), [5], torch.device("cpu"))[0].flatten())
    for drawn in (one, other):  # five standard errors of 210,000 numbers
        assert abs(drawn.mean()) < 0.011 and abs(drawn.std() - 1) < 0.008 and abs((drawn**4).mean() - 3) < 0.11
        assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.011
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.011


def launches(recipe, count, monkeypatch):
    """Operations on a batch of equal draws, seen by the profiler; a bias field's control points are drawn before.

    These few numbers are drawn on the CPU wherever the batch lies, and launch nothing.
    """
    images, masks = (part[:1].repeat(count, 1, 1, 1, 1) for part in scans(1))
    points = bias_control_points([2, 2, 2], 0.2, 0).numpy()
    monkeypatch.setattr(batched, "bias_control_points", lambda *_: SimpleNamespace(numpy=lambda: points))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        views._together(images, masks, lambda _, attempt: draw(recipe, 0, 0, 11, 0, attempt), ATTEMPTS, recipe, 8.0,
                        True)
    return sum(event.count for event in seen.key_averages()
               if event.key.startswith("aten::") and event.key not in NO_LAUNCH)


def test_launches_do_not_grow_with_the_batch(monkeypatch):
    bias = alone("bias", 0.2).bias.model_copy(update={"spacing_mm": 500.0})
    everything = {name: getattr(alone(name, 0.2), name) for name in TRANSFORMS}
    for recipe, most in ((read_recipe("paper"), 250), (Recipe(**everything | {"bias": bias}), 2500)):
        few, many = (launches(recipe, count, monkeypatch) for count in (4, 32))
        assert many == few < most
