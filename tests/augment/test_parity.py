"""Each transform against SciPy, MONAI or NumPy with the same numbers; a marked left side stays where it is due."""

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, GaussianSmooth, Resize, Rotate
from scipy import ndimage
from torch.nn.functional import interpolate

from kit.augment import contrast, physics
from kit.augment.draws import Draw
from kit.augment.spatial import bend, brain, cropped_box, scatter, spline, view_to_scan, warp

SHAPE = (20, 26, 23)  # unequal, so that swapped axes cannot hide
DRAWS = {
    "crop": Draw(crop_start=(0.1, 0.3, 0.2), crop_size=(0.6, 0.5, 0.7)),
    "flip": Draw(flip=(True, False, True)),
    "turn z": Draw(rotation_degrees=(25, 0, 0)),
    "turn y": Draw(rotation_degrees=(0, -20, 0)),
    "turn x": Draw(rotation_degrees=(0, 0, 35)),
    "turn": Draw(rotation_degrees=(12, -20, 8)),
    "zoom": Draw(zoom=1.3),
    "shear": Draw(shear_degrees=(5, -8, 10)),
    "translate": Draw(translation_mm=(2.3, -4, 3)),
    "paper": Draw(crop_start=(0.1, 0.3, 0.2), crop_size=(0.6, 0.5, 0.7), flip=(False, False, True),
                  rotation_degrees=(40, 0, 0)),
    "all": Draw(crop_start=(0.05, 0.1, 0.1), crop_size=(0.9, 0.8, 0.7), flip=(False, True, True), zoom=0.9,
                rotation_degrees=(10, 20, -15), shear_degrees=(4, 0, -6), translation_mm=(1, 2, -3)),
}


@pytest.fixture
def scan():
    """Noise, a little smoothed; and a mask with a ragged edge."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1).astype(np.float32)
    return torch.from_numpy(values), torch.from_numpy(values > -0.3)


def places(drawn: Draw, spacing_mm: float = 1.0, apart_mm: float = 8.0) -> np.ndarray:
    """Where each voxel of a view lies in the scan, in voxels (3, z, y, x), step by step as the text has it."""
    side = np.array(SHAPE)[:, None, None, None]
    point = np.indices(SHAPE).astype(float)
    if (bent := bend(drawn, SHAPE, spacing_mm, apart_mm)) is not None:
        weights = [spline(one, apart_mm / spacing_mm) for one in SHAPE]
        point += np.einsum("zi,yj,xk,cijk->czyx", *weights, bent)
    point += 0.5 - side / 2
    point -= np.array(drawn.translation_mm)[:, None, None, None] / spacing_mm
    point /= drawn.zoom
    for axis, degrees in reversed(list(enumerate(drawn.rotation_degrees))):  # undone in turn
        first, second = [other for other in range(3) if other != axis]
        sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
        point[first], point[second] = (cosine * point[first] + sine * point[second],
                                       cosine * point[second] - sine * point[first])
    zy, zx, yx = np.tan(np.deg2rad(drawn.shear_degrees))
    point[1] = point[1] - yx * point[2]
    point[0] = point[0] - zy * point[1] - zx * point[2]
    for axis in range(3):
        point[axis] *= -1 if drawn.flip[axis] else 1
    share = (point + side / 2) / side
    start, size = (np.array(one)[:, None, None, None] for one in (drawn.crop_start, drawn.crop_size))
    return (start + size * share) * side - 0.5


def resampled(image: torch.Tensor, mask: torch.Tensor, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """The view and its mask."""
    values, places = warp(image, mask, *options)
    return scatter(values, places, image.shape), scatter(torch.ones_like(places).bool(), places, image.shape)


@pytest.mark.parametrize("name", [*DRAWS, "elastic", "elastic and all"])
def test_geometry_matches_scipy(scan, name):
    image, mask = scan
    elastic = {"elastic_mm": 2.0, "field_seed": 3}
    drawn = Draw(**elastic) if name == "elastic" else DRAWS.get(name) or Draw(**DRAWS["all"].__dict__ | elastic)
    back, bent = view_to_scan(drawn, SHAPE), bend(drawn, SHAPE, 1.0, 8.0)
    where = places(drawn)
    wanted = ndimage.map_coordinates(image.double().numpy(), where, order=1, mode="grid-constant")
    near = ndimage.map_coordinates(mask.numpy().astype(np.uint8), where, order=0, mode="constant") > 0
    inner = np.all([(axis > 0.01) & (axis < side - 1.01) for axis, side in zip(where, SHAPE, strict=True)], axis=0)
    sure = inner & np.all(np.abs(where - np.floor(where) - 0.5) > 1e-3, axis=0)  # no voxel midway between two
    whole = torch.ones_like(mask)
    for slab in (None, 1, 7, 20):
        view, _ = resampled(image, whole, back, bent, 8.0, slab)
        # float32 coordinates of about 20 voxels: measured 2e-6 of the range
        np.testing.assert_allclose(view.numpy()[inner], wanted[inner], rtol=0, atol=1e-5)
        kept, moved = resampled(image, mask, back, bent, 8.0, slab)
        np.testing.assert_array_equal(moved.numpy()[sure], near[sure])
        assert not kept[~moved].any() and torch.equal(kept[moved], (view * moved)[moved])
    assert sure.sum() > 1000


@pytest.mark.parametrize("name", ["paper", "turn", "all"])
def test_border_padding_matches_scipy(scan, name):
    """What lies beyond the crop is its border stretched outwards, as MONAI's RandRotated has it."""
    image, mask = scan
    drawn = DRAWS[name]
    box = cropped_box(drawn, SHAPE)
    where = np.clip(places(drawn), *box[:, :, None, None, None])
    wanted = ndimage.map_coordinates(image.double().numpy(), where, order=1, mode="nearest")
    near = ndimage.map_coordinates(mask.numpy().astype(np.uint8), where, order=0, mode="nearest") > 0
    whole = torch.ones_like(mask)
    for slab in (None, 7):
        view, inside = resampled(image, whole, view_to_scan(drawn, SHAPE), None, 1.0, slab, box)
        assert inside.all()
        inner = np.all([(axis >= 0) & (axis <= side - 1) for axis, side in zip(where, SHAPE, strict=True)], axis=0)
        np.testing.assert_allclose(view.numpy()[inner], wanted[inner], rtol=0, atol=1e-5)
        sure = inner & np.all(np.abs(where - np.floor(where) - 0.5) > 1e-3, axis=0)
        np.testing.assert_array_equal(resampled(image, mask, view_to_scan(drawn, SHAPE), None, 1.0, slab, box)[1]
                                      .numpy()[sure], near[sure])
    zeros, _ = resampled(image, whole, view_to_scan(drawn, SHAPE))
    assert (zeros - view).abs().max() > 0.1


def test_padded_rotation_matches_monai(scan):
    """A crop of whole voxels, resized and turned by MONAI (which turns the other way), against the one map."""
    image, _ = scan
    start, size = (2, 4, 3), (16, 18, 17)
    drawn = Draw(crop_start=tuple(np.divide(start, SHAPE)), crop_size=tuple(np.divide(size, SHAPE)),
                 rotation_degrees=(-40.0, 0.0, 0.0))
    part = image[tuple(slice(low, low + side) for low, side in zip(start, size, strict=True))]
    resized = Resize(SHAPE, mode="trilinear")(part[None])
    wanted = Rotate((np.deg2rad(40.0), 0.0, 0.0), mode="bilinear", padding_mode="border")(resized)[0]
    view, _ = resampled(image, torch.ones_like(image).bool(), view_to_scan(drawn, SHAPE), None, 1.0, None,
                        cropped_box(drawn, SHAPE))
    # two linear interpolations against one: measured .997; .906 where both pad with zeros, whose edges differ
    assert np.corrcoef(view.flatten(), wanted.flatten())[0, 1] > 0.99


def test_flips_and_the_unchanged_are_exact(scan):
    image, mask = scan
    for flip in ((False, False, False), (False, False, True), (True, True, False)):
        view, moved = resampled(image, mask, view_to_scan(Draw(flip=flip), SHAPE))
        axes = [axis for axis in range(3) if flip[axis]]
        assert torch.equal(moved, mask.flip(axes)) and torch.equal(view, (image * mask).flip(axes))


@pytest.mark.parametrize(("drawn", "wanted"), [
    (Draw(flip=(False, False, True)), (4, 6, 20)),
    (Draw(flip=(True, False, False)), (15, 6, 2)),
    (Draw(flip=(False, True, False)), (4, 19, 2)),
    (Draw(rotation_degrees=(180, 0, 0)), (4, 19, 20)),
    (Draw(rotation_degrees=(0, 180, 0)), (15, 6, 20)),
    (Draw(rotation_degrees=(0, 0, 180)), (15, 19, 2)),
    # about z by 90 degrees: (y, x) about the middle (12.5, 11) goes from (-6.5, -9) to (9, -6.5)
    (Draw(rotation_degrees=(90, 0, 0)), (4, 21.5, 4.5)),
    (Draw(translation_mm=(2, -3, 5)), (6, 3, 7)),
])
def test_a_marked_left_side_is_where_it_should_be(drawn, wanted):
    image = torch.zeros(SHAPE)
    image[4, 6, 2] = 1  # low x: left
    view, _ = resampled(image, torch.ones(SHAPE, dtype=torch.bool), view_to_scan(drawn, SHAPE))
    assert np.allclose(ndimage.center_of_mass(view.numpy()), wanted, atol=1e-3)


def test_grey_levels_match_monai_and_numpy(scan):
    values, places = brain(*scan)

    def unit() -> torch.Tensor:
        return contrast.magnitude(values.clone())

    x = unit().numpy()
    assert x.min() == 0
    for exponent in (0.5, 1.7):
        wanted = AdjustContrast(gamma=exponent)(x)
        np.testing.assert_allclose(contrast.gamma(unit(), exponent), wanted, rtol=1e-4, atol=1e-6)
        wanted = x.max() * (1 - (1 - x / x.max()) ** exponent)
        np.testing.assert_allclose(contrast.gamma(unit(), exponent, True), wanted, rtol=1e-4, atol=1e-6)
    wanted = np.clip((x - x.mean()) * 1.5 + x.mean(), 0, x.max())
    np.testing.assert_allclose(contrast.contrast(unit(), 1.5), wanted, rtol=1e-4, atol=1e-6)
    levels = [0, 0.2, 0.7, 1]
    wanted = np.interp(x / x.max(), np.linspace(0, 1, 4), levels) * x.max()
    np.testing.assert_allclose(contrast.histogram(unit(), levels), wanted, rtol=1e-4, atol=1e-6)
    z = contrast.z_score(values.clone()).numpy()
    np.testing.assert_allclose(z, (values - values.mean()) / values.std(correction=0), rtol=1e-4, atol=1e-5)
    assert not contrast.z_score(torch.full((9,), 3.0)).any()


def test_fields_and_noise(scan):
    points, everywhere = (3, 4, 2), torch.arange(np.prod(SHAPE))
    field = contrast.bias_field(torch.ones(np.prod(SHAPE)), everywhere, SHAPE, 0.3, 5, points).log().view(SHAPE)
    drawn = contrast.normal(points, 5, field) * 0.3
    wanted = interpolate(drawn[None, None], SHAPE, mode="trilinear", align_corners=True)[0, 0]
    assert wanted.std() > 0.05
    np.testing.assert_allclose(field, wanted, atol=1e-6)
    _, places = brain(*scan)
    nothing = torch.zeros(len(everywhere))
    noise = contrast.noise(nothing.clone(), everywhere, SHAPE, 0.5, 1)
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(contrast.noise(nothing[places], places, SHAPE, 0.5, 1), noise[places])  # whatever the mask
    # Gudbjartsson and Patz 1995: where there is no signal, a Rayleigh distribution of mean sd * sqrt(pi / 2)
    rayleigh = contrast.rician(nothing.clone(), everywhere, SHAPE, 0.5, 1)
    assert rayleigh.mean().item() == pytest.approx(0.5 * np.sqrt(np.pi / 2), rel=0.03)


def test_blur_matches_scipy_and_monai(scan):
    image, _ = scan
    sd = 3 / np.sqrt(8 * np.log(2))
    blurred = physics.blur(image, 3).numpy()
    np.testing.assert_allclose(blurred, ndimage.gaussian_filter(image.numpy(), sd, mode="nearest"), atol=1e-6)
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(blurred[inner], GaussianSmooth(sd, "sampled")(image[None])[0][inner], atol=2e-3)
    sharp = physics.sharpen(image.abs(), 0.7, 3).numpy()
    wanted = image.abs().numpy() + 0.7 * (image.abs() - physics.blur(image.abs(), 3)).numpy()
    np.testing.assert_allclose(sharp, wanted.clip(0), atol=1e-5)


def test_k_space_matches_a_fourier_transform(scan):
    x = scan[0].abs().numpy()
    k = np.fft.fftn(x)
    cut = np.ones(SHAPE)
    for axis, side in enumerate(SHAPE):
        kept = np.abs(np.fft.fftfreq(side)) <= 0.25
        cut = cut * kept.reshape([-1 if other == axis else 1 for other in range(3)])
    np.testing.assert_allclose(physics.gibbs(scan[0].abs(), 2.0), np.abs(np.fft.ifftn(k * cut)), atol=1e-5)
    line = np.abs(np.rint(np.fft.fftfreq(SHAPE[1]) * SHAPE[1]))
    gain = np.where((line % 4 == 0) & (line > 0), 0.4, 1)[None, :, None]
    np.testing.assert_allclose(physics.ghosting(scan[0].abs(), 0.6, 4, 1), np.abs(np.fft.ifftn(k * gain)), atol=1e-5)
    waves = physics.spike(torch.full(SHAPE, 10.0), 0.5, Draw(field_seed=4)).numpy() - 10
    peak = np.abs(np.fft.fftn(waves, s=(256, 256, 256)))
    assert waves.std() == pytest.approx(0.5 / np.sqrt(2), rel=0.05) and peak.max() > 0.2 * waves.size


def test_thick_slices_are_means():
    ramp = torch.arange(24.0).view(1, 24, 1).expand(3, 24, 5).contiguous()
    thick = physics.thick_slices(ramp, 4.0, 1)[0, :, 0].numpy()
    np.testing.assert_allclose(thick[2:22], np.arange(2, 22), atol=1e-4)  # linear stays linear between the middles
    comb = torch.zeros(3, 24, 5)
    comb[:, 8] = 1
    # the slice 8..11 has mean 1/4 at its middle, 9.5, and falls to 0 at its neighbours' middles
    np.testing.assert_allclose(physics.thick_slices(comb, 4.0, 1)[0, :, 0], 0.25 * np.clip(
        1 - np.abs(np.arange(24) - 9.5) / 4, 0, None), atol=1e-6)


def test_motion_keeps_the_middle_of_k_space(scan):
    image = scan[0].abs()
    moved = physics.motion(image, Draw(motion_mm=3.0, motion_axis=1, field_seed=2), 2, 1.0)
    same, changed = (np.abs(np.fft.fft(one.numpy(), axis=1)[:, [0, 1, -1]]).sum() for one in (image, moved))
    assert changed == pytest.approx(same, rel=0.05) and (moved - image).abs().max() > 0.05
    still = physics.motion(image, Draw(motion_mm=1e-9, motion_axis=1, field_seed=2), 2, 1.0)
    np.testing.assert_allclose(still, image, atol=1e-5)


def test_occlusion():
    image = torch.ones(SHAPE)
    boxes = physics.cutout(image.clone(), 6, 1, Draw(field_seed=1))
    labels, count = ndimage.label(boxes.numpy() == 0)
    size = [part.stop - part.start for part in ndimage.find_objects(labels)[0]]
    assert count == 1 and max(size) <= 7 and (boxes == 0).sum() == np.prod(size)
    gone = physics.blank_patches(image.clone(), 0.5, 5, Draw(field_seed=1))[:20, :25, :20]
    shares = gone.unfold(0, 5, 5).unfold(1, 5, 5).unfold(2, 5, 5).float().mean((-1, -2, -3))
    assert set(shares.flatten().tolist()) == {0.0, 1.0}  # whole patches
