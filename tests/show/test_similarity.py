"""Grey levels and similarity of a pair: what the figure says, and what the numbers are."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kit.augment.recipe import Recipe, read_recipe
from kit.show.figure import png, small
from kit.show.planes import Pair, window
from kit.show.similarity import pair_facts, similarity_under
from kit.store.dataset import Batch

SHAPE = (6, 8, 7)


def scans(count: int = 3) -> Batch:
    images = torch.randn(count, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.ones_like(images, dtype=torch.bool), list(range(count)), torch.zeros(count))


class Voxels(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_similarity_is_the_cosine_of_the_features():
    similarity = similarity_under({"voxels": Voxels()}, scans(), 4.0)
    same, = similarity(1, Recipe(), 0)  # without augmentation both views are the scan
    assert abs(same.pair - 1) < 1e-6 and np.allclose(same.pairs, 1) and len(same.pairs) == 2
    z = scans().images.flatten(1)
    wanted = np.corrcoef(z)[~np.eye(3, dtype=bool)]  # of z-scored voxels the cosine is the correlation
    assert np.allclose(same.different_scans, wanted, atol=1e-5)
    changed, = similarity(1, read_recipe("weak"), 0)
    assert changed.pair < 0.99 and changed.pair == similarity(1, read_recipe("weak"), 0)[0].pair
    assert changed.pair != similarity(1, read_recipe("weak"), 1)[0].pair


def test_the_figure_shows_both():
    volume = scans().images[0, 0].numpy()
    pair = Pair(volume, 2 * volume, volume)
    waiting = pair_facts(pair)
    assert "not known yet" in waiting.axes[1].get_title()
    found = similarity_under({"voxels": Voxels()}, scans(), 4.0)(0, read_recipe("weak"), 0)
    figure = pair_facts(pair, found, "procedural data")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["original", "view 1", "view 2"]
    low, high = window(volume)
    edges = left.patches[0].get_data().edges
    assert (edges[0], edges[-1]) == pytest.approx((low - (high - low) / 2, high + (high - low) / 2))
    assert right.get_title() == "similarity by voxels" and "procedural data" in figure.get_supxlabel()
    assert f"this pair: {found[0].pair:.3f}" in [text.get_text() for text in right.get_legend().get_texts()]
    assert Image.open(io.BytesIO(png(pair_facts(pair, found)))).width <= 900
    both = similarity_under({"voxels": Voxels(), "random weights": nn.Flatten()}, scans(), 4.0)
    titles = [axes.get_title() for axes in pair_facts(pair, both(0, read_recipe("weak"), 0)).axes]
    assert titles[1:] == ["similarity by voxels", "similarity by random weights"]


def test_a_small_picture_looks_the_same():
    volume = scans().images[0, 0].numpy()
    whole = png(pair_facts(Pair(volume, volume, volume)))
    reduced = small(whole).data
    assert len(reduced) < 0.7 * len(whole)
    one, other = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in (whole, reduced))
    assert one.shape == other.shape and np.abs(one - other).mean() < 3


def test_a_small_picture_keeps_rare_colours():
    """The few blue voxels of a map, among many greys."""
    picture = np.repeat(np.arange(0, 256, 1, np.uint8)[:, None], 300, axis=1)[..., None].repeat(3, 2)
    picture[100:104, 100:104] = 40, 60, 200
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    kept = np.asarray(Image.open(io.BytesIO(small(buffer.getvalue()).data)).convert("RGB")).astype(int)
    assert np.abs(kept[100:104, 100:104] - (40, 60, 200)).max() < 15
