"""Pictures of saliency maps: what stands on the page, where, and what a viewer's page would load."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from kit.explain.maps import class_means
from kit.explain.regions import ELSEWHERE, region_intervals
from kit.preprocess.template import template_on
from kit.runs import Run
from kit.show.planes import cut
from kit.show.saliency_figures import Scale, group_figure, mosaic, region_bars, scan_figure, smoothed, viewer
from kit.store.grid import PAPER_GRID, Grid
from kit.store.store import Store
from tests.show.test_slices import pixels, texts

GRID = Grid((18, 24, 20), 8.0)


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    image, brain = template_on(GRID)
    return np.where(brain, image, 0)


@pytest.fixture
def found(scan) -> np.ndarray:
    """A positive map with a strong place around one voxel: left, anterior and superior."""
    values = np.where(scan != 0, 0.01, 0).astype(np.float32)
    values[10:13, 15:18, 5:8] = 2
    return values


def test_a_scan_is_drawn_plain_and_under_both_maps_through_the_strongest_place(scan, found):
    outline = found > 1
    figure = scan_figure(scan, found, GRID, "sub-1, integrated gradients", "output / SD",
                         outline, "procedural data")
    panels, bar = figure.axes[:9], figure.axes[9]
    assert [len(axes.images) for axes in panels] == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["scan", "map, smoothed 8 mm", "map as it is"]
    z, y, x = (GRID.origin_mm[axis] + 8 * at for axis, at in ((2, 11), (1, 16), (0, 6)))
    for row in range(3):
        assert [axes.get_title() for axes in panels[3 * row:3 * row + 3]] == [
            f"axial, z = {z:g} mm", f"coronal, y = {y:g} mm", f"sagittal, x = {x:g} mm"]
        assert all(len(axes.collections) == 1 for axes in panels[3 * row:3 * row + 3])  # the outline
    raw = np.asarray(panels[6].images[1].get_array())
    assert raw[24 - 1 - 16, 6] == raw.max()  # upper left: left and anterior
    opacity = panels[6].images[1].get_alpha()
    assert opacity[24 - 1 - 16, 6] > 0.8 and opacity[12, 12] == 0  # weak values let the scan through
    assert all(axes.images[1].get_clim() == (0, 1) for axes in panels[3:])
    assert re.fullmatch(r"1 = .* smoothed, .* as it is \(output / SD\)", bar.get_ylabel())
    assert "".join(text for text in texts(figure) if len(text) == 1) == "LRALRSPAS" * 3
    assert figure.get_suptitle() == "sub-1, integrated gradients"
    assert "procedural data · neurological view" in figure.get_supxlabel()
    assert figure.get_size_inches()[0] * figure.dpi <= 900 and plt.get_fignums() == []


def test_slices_go_through_a_strongest_place_at_the_brains_edge(scan):
    """Smoothed once more over the edge, it would lose to a weaker place inside."""
    z, y, x = next(place for place in np.argwhere(scan != 0) if place[0] == 12)  # at the cortex
    values = np.where(scan != 0, 0.01, 0).astype(np.float32)
    values[8:11, 11:14, 9:12] = 1
    values[z, y, x] = 1.2 / smoothed((np.arange(values.size) == np.ravel_multi_index((z, y, x), values.shape)).reshape(
        values.shape).astype(np.float32), GRID, scan != 0)[z, y, x]
    figure = scan_figure(scan, values, GRID)
    assert figure.axes[0].get_title() == f"axial, z = {GRID.origin_mm[2] + 8 * z:g} mm"


def test_what_is_not_supported_says_so_in_red(scan, found):
    title = "sub-1 · true M, predicted F · gradient: not supported"
    # Matplotlib's own way to a figure's title is its list of texts.
    for figure, red in ((scan_figure(scan, found, GRID, title), True), (mosaic(scan, found, GRID, title), True),
                        (scan_figure(scan, found, GRID, "sub-1, gradient"), False)):
        top = pixels(figure)[:30].reshape(-1, 3)
        reddish = ((top[:, 0] > top[:, 1] + 60) & (top[:, 0] > 120)).any()
        assert reddish == red


def test_signed_maps_have_both_colours_around_zero(scan, found):
    figure = scan_figure(scan, np.where(found > 1, -found, found), GRID)
    assert figure.axes[6].images[1].get_clim() == (-1, 1)
    assert Scale.of(np.array([-3.0, 0, 1])).signed and Scale.of(np.zeros(3)) == Scale(1.0, False)


def test_both_maps_have_the_bars_colours_if_one_of_them_is_signed(scan, found):
    found[tuple(np.argwhere(scan)[0])] = -0.001  # no smoothed value is below 0
    assert smoothed(found, GRID, scan != 0).min() >= 0
    figure = scan_figure(scan, found, GRID)
    assert all(axes.images[1].get_clim() == (-1, 1) for axes in figure.axes[3:9])
    assert figure.axes[9].get_ylim() == (-1, 1)


def test_smoothing_is_in_millimetres_and_stays_in_the_mask():
    point = np.zeros((25, 25, 25), np.float32)
    point[12, 12, 12] = 1
    smooth = smoothed(point, Grid((25, 25, 25), 2.0))
    assert smooth[12, 12, 14] == pytest.approx(smooth[12, 12, 12] / 2, rel=0.05)  # 4 mm from the peak
    mask = np.zeros(point.shape, bool)
    mask[12] = True
    assert not smoothed(point, Grid((25, 25, 25), 2.0), mask)[~mask].any()


def test_smoothing_leaves_a_uniform_map_uniform_up_to_the_brains_edge(scan):
    brain = scan != 0
    np.testing.assert_allclose(smoothed(np.ones(brain.shape), GRID, brain), brain, atol=1e-5)


def test_a_mosaic_runs_through_the_brain(scan, found):
    figure = mosaic(scan, found, GRID, "a map", "output", slices=8)
    panels = [axes for axes in figure.axes if axes.images]
    heights = [float(axes.get_title().split()[2]) for axes in panels]
    assert len(panels) == 8 and heights == sorted(heights)
    inside = np.flatnonzero((scan != 0).any(axis=(1, 2))) * 8 + GRID.origin_mm[2]
    assert heights[0] <= inside[0] + 16 and heights[-1] >= inside[-1] - 16
    with pytest.raises(ValueError, match="image is empty"):
        mosaic(np.zeros(GRID.shape), found, GRID)
    with pytest.raises(ValueError, match=r"saliency_map.*\(20, 24, 18\)"):
        mosaic(scan, found.T, GRID)


def test_groups_share_a_scale_and_differ_in_another(scan, found):
    means = {"patients": 3 * found, "controls": found[:, :, ::-1].copy()}
    figure = group_figure(means, GRID, "means", outline=found > 1)
    panels = figure.axes[:9]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["patients", "controls", "controls − patients"]
    limits = [axes.images[1].get_clim() for axes in panels]
    assert limits[0] == limits[5] and limits[8][0] == -limits[8][1] < 0
    difference = np.asarray(panels[6].images[1].get_array())
    assert difference[24 - 1 - 16, 6] < 0
    assert {axes.get_title() for axes in panels[::3]} == {panels[0].get_title()}  # one place
    assert [bar.get_ylabel() for bar in figure.axes[9:]] == [
        "multiples of a uniform map's mean", "multiples of a uniform map's mean\nabove 0: higher in controls"]
    assert len(group_figure({"all": found}, GRID).axes) == 3 + 1


def test_a_difference_has_one_sign_in_colours_label_and_file(scan, found, tmp_path):
    index = pd.DataFrame({"scan": ["a", "b"], "participant": ["1", "2"], "dataset": "A", "ill": [0, 1]})
    store = Store(tmp_path, index, {"shape": list(GRID.shape), "spacing_mm": GRID.spacing_mm})
    store.read = lambda scan: (found, found != 0)
    record = {"task": "ill", "kind": "classification", "classes": ["0", "1"]}
    maps = {("a", "gradient"): (found != 0).astype(np.float32), ("b", "gradient"): found}
    means = class_means(maps, index, record, store, Run.open(tmp_path / "run", {}))
    *groups, difference = (what for what, _ in means)
    assert difference == "ill=1 less ill=0"
    figure = group_figure({what: means[what, "gradient"] for what in groups}, GRID)
    assert figure.axes[6].get_ylabel() == "mean ill=1 (n=1) − mean ill=0 (n=1)"
    written = nib.load(tmp_path / "run/maps/ill=1_less_ill=0_gradient.nii.gz").get_fdata().T
    drawn = np.asarray(figure.axes[6].images[1].get_array())
    expected = cut(smoothed(written, GRID, template_on(GRID)[1]), "axial", 11)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert drawn.max() > 1 and figure.axes[10].get_ylabel().endswith("above 0: higher in mean ill=1 (n=1)")
    above = group_figure({"less": found, "more": 2 * found}, GRID).axes[6].images[1]  # no voxel is below 0
    assert above.get_cmap().name == "RdBu_r" and above.get_clim()[0] == -above.get_clim()[1]


def test_where_every_map_is_zero_a_sentence_says_so(store):
    """Grad-CAM's are where nothing raises the output: the notebook goes on."""
    nothing = region_intervals({}, store, {}, {})
    for figure in (group_figure({}, GRID, "means"), region_bars(nothing, note="procedural data")):
        assert [text.get_text() for text in figure.axes[0].texts] == ["every map is zero: nothing to draw"]


def test_region_bars_show_intervals_and_an_even_map():
    table = pd.DataFrame({
        "method": ["gradient"] * 3 + ["occlusion"] * 2, "region": ["Hippocampus", "Pons", "Insula"] + ["Insula"] * 2,
        "side": ["left", "both", "right", "left", "right"], "share_of_saliency": [0.1, 0.05, 0.3, 0.2, 0.1],
        "low": [0.08, 0.04, 0.2, np.nan, np.nan], "high": [0.12, 0.06, 0.4, np.nan, np.nan],
        "share_of_brain": [0.01, 0.02, 0.02, 0.02, 0.02], "ratio": 1.0, "participants": [7, 7, 7, 1, 1]})
    figure = region_bars(table, top=2, note="procedural data")
    first, second = figure.axes[:2]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["Hippocampus, left", "Insula, right"]
    np.testing.assert_allclose([bar.get_width() for bar in first.patches], [10, 30])
    np.testing.assert_allclose([segment[:, 0] for segment in first.collections[0].get_segments()], [[8, 12], [20, 40]])
    np.testing.assert_allclose(first.lines[0].get_xdata(), [1, 2])
    assert first.get_title() == "gradient, 7 participants" and second.get_title() == "occlusion, 1 participant"
    assert "procedural data" in figure.get_supxlabel()
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "share of the brain: a uniform map", "left", "right", "both, or no side"]
    with pytest.raises(ValueError, match="lacks low, high"):
        region_bars(table.drop(columns=["low", "high"]))


def test_a_method_with_brain_in_no_region_only_has_a_panel_without_bars():
    table = pd.DataFrame({"method": ["gradient", "occlusion"], "region": ["Pons", ELSEWHERE], "side": "both",
                          "share_of_saliency": [0.1, 1.0], "low": [0.05, 1], "high": [0.2, 1],
                          "share_of_brain": [0.02, 1], "ratio": 1.0, "participants": 7})
    figure = region_bars(table)
    assert [axes.get_title() for axes in figure.axes] == ["gradient, 7 participants", "occlusion"]
    assert [len(axes.patches) for axes in figure.axes] == [1, 0]


def loaded(page: str) -> list[str]:
    """What a page fetches when it is opened: addresses of its tags, and of the styles' urls."""
    tags = re.findall(r"<(?:link|script|img|iframe|source|video|audio|object|embed)\b[^>]*?(?:src|href|data)\s*=\s*"
                      r"[\"']?([^\"'\s>]+)", page, re.IGNORECASE)
    return [each for each in tags + re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", page)
            if not str(each).startswith(("data:", "#"))]


def test_a_viewers_page_loads_nothing_and_says_what_it_shows(scan, found):
    view = viewer(found, GRID, title="gradient, not supported")
    assert "gradient, not supported" in view.html and "data:image" in view.html
    assert not loaded(view.html) and not re.search(r"[\"'](?:https?:)?//[a-z]", view.html)
    assert len(view.html) < 0.5e6
    frame = view._repr_html_()  # what a notebook and its HTML report show
    assert frame.lstrip().startswith("<iframe srcdoc=")
    assert loaded('<link rel="icon" href="https://example.org/a.ico">') == ["https://example.org/a.ico"]
    with pytest.raises(ValueError, match="saliency_map has shape"):
        viewer(found.T, GRID)


@pytest.mark.slow
def test_a_full_size_viewer_stays_small():
    brain = template_on(PAPER_GRID)[1]
    noise = np.random.default_rng(0).normal(size=PAPER_GRID.shape).astype(np.float32)
    assert len(viewer(noise * brain, PAPER_GRID).html) < 3e6
