"""Pictures of quality: prepared scans, heads under their masks, refused scans; flags in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from kit.preprocess.nifti import write_nifti
from kit.preprocess.quality import QC_GRID, QC_METRICS, flagged
from kit.preprocess.template import template_on
from kit.show.planes import PLANES
from kit.show.quality_figures import head_montage, quality_histograms, quality_montage, refused_montage
from kit.show.slices import _beside
from kit.store.grid import Grid
from kit.store.store import Store, scan_path, write_scan

GRID = Grid((20, 26, 22), 8.0)


def index() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({name: rng.uniform(0.5, 0.6, 16) for name in QC_METRICS})
    table.loc[3, "template_similarity"] = -0.9
    return flagged(table.assign(dataset=["A", "B"] * 8))


def test_montage_draws_every_scan_under_the_outline() -> None:
    image = template_on(GRID)[0]
    figure = quality_montage([image] * 4, GRID, [f"p{number}: snr low" for number in range(4)], note="procedural data")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == [f"p{number}: snr low" for number in range(4)]
    assert all(len(axes.collections) == 1 for axes in drawn)  # the outline
    assert "procedural data" in figure.get_supxlabel()


def test_planes_lie_side_by_side_upright() -> None:
    volume = np.zeros(GRID.shape, np.float32)
    volume[15, 13, 4] = 1  # above the middle, left
    picture = _beside(volume, GRID, tuple(PLANES))
    assert picture.shape == (26, 22 + 22 + 26)
    assert np.argwhere(picture).tolist() == [[3 + 20 - 1 - 15, 22 + 4]]  # in the coronal slice, three rows of margin


def test_histograms_mark_what_is_flagged_and_the_limits() -> None:
    figure = quality_histograms(index(), note="procedural data")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == len(QC_METRICS)
    marked = {axes.get_xlabel(): [line.get_xdata() for line in axes.lines if line.get_marker() == "x"]
              for axes in shown}
    assert [each.tolist() for each in marked["template similarity"]] == [[-0.9]]
    assert marked["pose deg"] == []
    dashed = {axes.get_xlabel(): [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
              for axes in shown}
    assert dashed["template similarity"] == [QC_METRICS["template_similarity"].low]


def test_scans_without_a_site_are_in_the_histograms() -> None:
    figure = quality_histograms(index().assign(site=["S1", "S2", None, None] * 4))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"S1 (n = 4)", "S2 (n = 4)", "no site (n = 8)"} <= set(named)


def test_heads_are_drawn_whole_under_the_mask_that_was_made(tmp_path: Path) -> None:
    """What the mask cut off shows: the head is the file's, moved to the template, and the outline the store's mask."""
    image, brain = template_on(QC_GRID)
    shift = np.eye(4)
    shift[:3, 3] = [4, -6, 8]
    write_nifti(tmp_path / "head.nii.gz", 100 * image, shift @ QC_GRID.affine)
    mask = template_on(GRID)[1]
    write_scan(scan_path(tmp_path, "s"), np.ones(GRID.shape), mask, "s", GRID.affine, {"transform": shift.tolist()})
    store = Store(tmp_path, pd.DataFrame(), {"shape": GRID.shape, "spacing_mm": GRID.spacing_mm})
    rows = pd.DataFrame({"scan": ["s"], "participant": ["p"], "flags": ["snr low"],
                         "image_path": [str(tmp_path / "head.nii.gz")]})
    figure = head_montage(rows, store, note="procedural data")
    drawn = next(axes for axes in figure.axes if axes.images)
    assert drawn.get_title() == "p: snr low" and len(drawn.collections) == 1
    expected = quality_montage([image], QC_GRID, [""]).axes[0].images[0].get_array()
    assert np.corrcoef(drawn.images[0].get_array().ravel(), expected.ravel())[0, 1] > 0.999


def test_refused_scans_are_drawn_with_their_reasons_and_black_where_no_file_can_be_read(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ball.nii.gz", *ball())
    (tmp_path / "text.nii.gz").write_text("not a scan", encoding="utf-8")
    failed = pd.DataFrame({"participant": ["a", "b", "c"], "reason": ["no brain", "not a NIfTI file", "no such file"],
                           "image_path": [str(tmp_path / name) for name in ("ball.nii.gz", "text.nii.gz", "none.nii")]})
    drawn = [axes for axes in refused_montage(failed).axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["a: no brain", "b: not a NIfTI file", "c: no such file"]
    bright = [float(np.asarray(axes.images[0].get_array()).max()) for axes in drawn]
    assert bright[0] > 0.9 and bright[1:] == [0, 0]


def ball() -> tuple[np.ndarray, np.ndarray]:
    """A ball of 60 mm around a far place, and its affine."""
    z, y, x = np.indices((30, 30, 30)) - 14.5
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = 500
    return np.where(x**2 + y**2 + z**2 < 15**2, 100 + x, 0).astype(np.float32), affine
