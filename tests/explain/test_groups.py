"""Mean maps of groups."""

from __future__ import annotations

import numpy as np
import pytest

from kit.explain.groups import difference, group_means


def test_participants_count_once_and_steep_maps_count_no_more():
    mask = np.zeros((2, 3, 4), bool)
    mask[:, 1:] = True
    rng = np.random.default_rng(0)
    shapes = {name: rng.normal(size=mask.shape) for name in ("a", "b", "c", "d")}
    maps = {(name, "gradient"): 10.0**number * values for number, (name, values) in enumerate(shapes.items())}
    maps |= {(name, "other"): np.ones(mask.shape) for name in shapes}
    people = {"a": "1", "b": "1", "c": "2", "d": "3"}
    means = group_means(maps, dict.fromkeys(shapes, mask), "gradient", {"patients": ["a", "b", "c"], "controls": ["d"]},
                        people)
    even = {name: np.where(mask, values / np.abs(values[mask]).mean(), 0) for name, values in shapes.items()}
    np.testing.assert_allclose(means["patients"], (even["a"] / 2 + even["b"] / 2 + even["c"]) / 2, rtol=1e-5)
    np.testing.assert_allclose(means["controls"], even["d"], rtol=1e-5)
    np.testing.assert_allclose(difference(means, "patients", "controls"), means["patients"] - means["controls"])
    with pytest.raises(ValueError, match="group controls: no map by gradient of its 1 scans"):
        group_means(maps, {}, "gradient", {"controls": ["x"]}, people)
    with pytest.raises(ValueError, match="a, gradient: the map is zero"):
        group_means({("a", "gradient"): np.zeros(mask.shape)}, {"a": mask}, "gradient", {"all": ["a"]}, people)
