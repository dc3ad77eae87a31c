"""Pictures of scans: what stands on the page, and where."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kit.show.planes import Pair, grey, window
from kit.show.slices import montage, strengths_sheet, three_planes, views_sheet
from kit.store.grid import Grid

GRID = Grid((12, 16, 14), 12.0)


@pytest.fixture
def scan() -> np.ndarray:
    """Tissue of 1, with a bright block far left, anterior and superior of the middle."""
    volume = np.zeros(GRID.shape, dtype=np.float32)
    volume[2:10, 2:14, 2:12] = 1
    volume[6:9, 8:13, 2:5] = 3
    return volume


def texts(figure: Figure) -> list[str]:
    own = [text.get_text() for text in figure.texts]
    return own + [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes.yaxis.label]]


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_left_block_is_on_the_left_of_the_page(scan):
    figure = three_planes(scan, GRID)
    page = pixels(figure)
    for axes in figure.axes[:2]:  # axial and coronal: the block is left and up in both
        box = axes.get_window_extent()
        rows, columns = slice(len(page) - int(box.y1), len(page) - int(box.y0)), slice(int(box.x0), int(box.x1))
        panel = page[rows, columns][3:-3, 3:-3]  # without the page's white at the edge
        white = (panel > 250).all(axis=-1)  # the letters are white too, but small
        height, width = white.shape
        upper_left = white[: height // 2, : width // 2].sum()
        assert upper_left > 0.02 * white.size
        assert upper_left > 10 * (white.sum() - upper_left)


def test_three_planes_draw_the_arrays_and_say_what_they_are(scan):
    figure = three_planes(scan, GRID, scan > 0, "a scan", "procedural data", (-42, 30, 20))
    axial, coronal, sagittal = figure.axes
    for axes, picture in ((axial, scan[7, ::-1]), (coronal, scan[::-1, 11]), (sagittal, scan[::-1, :, 3])):
        np.testing.assert_array_equal(axes.images[0].get_array(), grey(picture, window(scan)))
    assert len(axial.collections) == 1  # the outline
    assert {line.get_xdata()[0] for line in axial.lines} == {3, 0}  # x; the other line runs from edge to edge
    assert {line.get_ydata()[0] for line in axial.lines} == {0, 16 - 1 - 11}
    written = texts(figure)
    assert "".join(text for text in written if len(text) == 1) == "LRALRSPAS"
    assert "procedural data · neurological view: left is on the left" in figure.get_supxlabel()
    assert figure.get_suptitle() == "a scan" and "axial, z = 24.5 mm" in written


def test_a_volume_of_another_shape_is_refused(scan):
    with pytest.raises(ValueError, match=r"outline.*\(16, 12, 14\).*\(12, 16, 14\)"):
        three_planes(scan, GRID, outline=scan.transpose(1, 0, 2))


def test_montage_has_a_tile_per_scan(scan):
    figure = montage([scan, 2 * scan, -scan, scan], GRID, ["one", "two", "three", "four"], "procedural data")
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 1, 0, 0]
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three", "four", "", ""]
    tile = np.asarray(figure.axes[0].images[0].get_array())
    assert tile.shape == (16, 14) and "".join(text.get_text() for text in figure.axes[0].texts) == "LRA"
    assert tile[3:7, 2:5].min() == 1 and tile[3:7, 9:12].max() < 1  # the block: upper left
    assert "procedural data" in figure.get_supxlabel()


def test_views_sheet_shows_the_difference_and_shared_grey_levels(scan):
    figure = views_sheet([Pair(scan, 2 * scan, scan), Pair(scan, scan, scan[:, :, ::-1])], GRID, ["gamma", "flip"],
                         "procedural data")
    assert [axes.get_title() for axes in figure.axes[:4]] == ["original", "view 1", "view 2", "view 1 − view 2"]
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["gamma", "flip"]
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), scan[6, ::-1])
    original, brighter = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:2])
    assert brighter[8, 7] > original[8, 7] > 0
    flipped = np.asarray(figure.axes[7].images[0].get_array())
    assert flipped[5, 3] == 2 and flipped[5, 10] == -2
    assert "procedural data" in figure.get_supxlabel()


def test_figures_are_small_and_pyplot_keeps_none(scan):
    pair = Pair(scan, scan, scan)
    for figure in (three_planes(scan, GRID, scan), montage([scan] * 7, GRID, [""] * 7), views_sheet([pair], GRID)):
        assert figure.get_size_inches()[0] * figure.dpi <= 900
    assert plt.get_fignums() == []


def test_strengths_sheet_has_a_panel_per_transform(scan):
    figure = strengths_sheet({"gamma_inverted": {"1.5": scan, "2": 2 * scan},
                              "flip": {"none": scan, "along x": scan[:, :, ::-1]}}, scan, GRID, "procedural data")
    assert [text.get_text() for text in figure.axes[1].texts] == ["none", "along x"]
    assert [axes.get_title() for axes in figure.axes] == ["gamma inverted", "flip", ""]
    flip = np.asarray(figure.axes[1].images[0].get_array())
    assert flip.shape == (16, 28) and flip[5, 3] == 1 and flip[5, 14 + 10] == 1  # left, then right
    assert "procedural data" in figure.get_supxlabel()
