"""What holds for every transform and any input: found by hypothesis, on small volumes of unequal sides."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kit.augment.draws import TRANSFORMS
from kit.augment.recipe import Recipe, alone, names, read_recipe
from kit.augment.views import apply, make_views

SHAPE = (5, 7, 6)
RECIPES = {name: alone(name) for name in TRANSFORMS} | {name: read_recipe(name) for name in names()}
KEY = {"seed": 0, "epoch": 0, "view": 0}
finite = st.floats(-(2.0**100), 2.0**100, width=32)
volumes = arrays(np.float32, SHAPE, elements=st.one_of(finite, st.floats(-3, 3, width=32)))
quick = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("name", RECIPES)
@quick
@given(volume=volumes, mask=arrays(bool, SHAPE), key=st.integers(0, 2**63 - 1))
def test_finite_stays_finite_and_inside_the_mask(name, volume, mask, key):
    images, masks = torch.from_numpy(volume)[None, None], torch.from_numpy(mask)[None, None]
    images = images * masks
    before = images.clone()
    views, moved, drawn = make_views(images, masks, [key], RECIPES[name], **KEY, spacing_mm=20.0)
    assert views.isfinite().all() and not views[~moved].any() and views.dtype == torch.float32
    assert torch.equal(images, before)
    again, again_mask = apply(images, masks, drawn, RECIPES[name], 20.0)
    assert torch.equal(again, views) and torch.equal(again_mask, moved)


@pytest.mark.parametrize("name", TRANSFORMS)
@quick
@given(key=st.integers(0, 2**63 - 1))
def test_zero_strength_is_the_identity(name, key):
    images = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    masks = images > -0.5
    wanted, _, _ = make_views(images * masks, masks, [key], Recipe(), **KEY)
    for recipe in (alone(name, 0), alone(name).model_copy(update={"strength": 0.0})):
        views, moved, _ = make_views(images * masks, masks, [key], recipe, **KEY)
        assert torch.equal(views, wanted) and torch.equal(moved, masks)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "shift"])  # the z-score undoes any shift
def test_what_is_drawn_is_applied(name):
    images = torch.randn(1, 1, 10, 14, 12, generator=torch.Generator().manual_seed(1))  # ghosts need many lines
    masks = images > -1
    without = alone("noise") if name == "scale" else Recipe()  # the z-score undoes a scale, unless there is noise
    with_it = without.model_copy(update={name: getattr(alone(name), name)})
    (changed, _, drawn), (plain, _, bare) = (make_views(images * masks, masks, [1], recipe, **KEY, spacing_mm=4.0)
                                             for recipe in (with_it, without))
    assert drawn != bare and not torch.allclose(changed, plain, atol=1e-2)


@pytest.mark.parametrize("name", RECIPES)
def test_odd_inputs(name):
    recipe = RECIPES[name]
    whole = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    constant, _, _ = make_views(torch.full((1, 1, *SHAPE), 7.0), whole, [1], Recipe(), **KEY)
    assert not constant.any()
    one = torch.zeros_like(whole)
    one[..., 2, 3, 4] = True
    views, moved, _ = make_views(one.float(), one, [1], recipe, **KEY, spacing_mm=20.0)
    assert views.isfinite().all() and not views[~moved].any()
    images = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(2))
    wanted, _, _ = make_views(images, whole.expand(2, -1, -1, -1, -1), [1, 2], recipe, **KEY, spacing_mm=20.0)
    turned = images.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)  # not contiguous
    assert torch.equal(make_views(turned, whole.expand(2, -1, -1, -1, -1), [1, 2], recipe, **KEY,
                                  spacing_mm=20.0)[0], wanted)
    double = make_views(images.double(), whole.expand(2, -1, -1, -1, -1), [1, 2], recipe, **KEY, spacing_mm=20.0)[0]
    assert double.dtype == torch.float64 and (double - wanted).abs().median() < 1e-4
    for kind in (torch.float16, torch.bfloat16):
        small = images.to(kind)
        same = make_views(small.float(), whole.expand(2, -1, -1, -1, -1), [1, 2], recipe, **KEY, spacing_mm=20.0)[0]
        assert torch.equal(make_views(small, whole.expand(2, -1, -1, -1, -1), [1, 2], recipe, **KEY,
                                      spacing_mm=20.0)[0], same)
