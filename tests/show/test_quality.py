"""Pictures of quality: each scan three times under the template's outline, flags in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kit.data.grid import Grid
from kit.data.quality import FIGURES, flagged
from kit.data.template import template_on
from kit.show.planes import PLANES
from kit.show.quality import quality_histograms, quality_montage
from kit.show.slices import _beside

GRID = Grid((20, 26, 22), 8.0)


def index() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({name: rng.uniform(0.5, 0.6, 16) for name in FIGURES})
    table.loc[3, "template_similarity"] = -0.9
    return flagged(table.assign(dataset=["A", "B"] * 8))


def test_montage_draws_every_scan_under_the_outline() -> None:
    image = template_on(GRID)[0]
    figure = quality_montage([image] * 4, GRID, [f"p{number}: snr low" for number in range(4)], note="procedural data")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == [f"p{number}: snr low" for number in range(4)]
    assert all(len(axes.collections) == 1 for axes in drawn)  # the outline
    assert "procedural data" in figure.get_supxlabel()
    with pytest.raises(ValueError, match="at most 24"):
        quality_montage([image] * 25, GRID, [""] * 25)


def test_planes_lie_side_by_side_upright() -> None:
    volume = np.zeros(GRID.shape, np.float32)
    volume[15, 13, 4] = 1  # above the middle, left
    picture = _beside(volume, GRID, tuple(PLANES))
    assert picture.shape == (26, 22 + 22 + 26)
    assert np.argwhere(picture).tolist() == [[3 + 20 - 1 - 15, 22 + 4]]  # in the coronal slice, three rows of margin


def test_histograms_mark_what_is_flagged() -> None:
    figure = quality_histograms(index(), note="procedural data")
    assert len(figure.axes) == len(FIGURES)
    marked = {axes.get_xlabel(): [line.get_xdata().tolist() for line in axes.lines] for axes in figure.axes}
    assert marked["template similarity"] == [[-0.9]]
    assert marked["snr"] == []
