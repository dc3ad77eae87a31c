"""Pictures for judging prepared scans: each in three planes under the template's outline, figures by site."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kit.data.grid import Grid
from kit.data.quality import FIGURES
from kit.data.template import template_on
from kit.show.figure import MAX_WIDTH, TEXT, bare, blank, label
from kit.show.planes import PLANES, cut, footer, grey, voxel_at, window

HIGHEST_MONTAGE = 24  # scans; more are no picture that a person looks at


def quality_montage(
    images: Sequence[np.ndarray], grid: Grid, titles: Sequence[str], note: str = "", title: str = "", columns: int = 3
) -> Figure:
    """Draw scans in an axial, a coronal and a sagittal slice each, the template's brain outlined over them.

    Args:
        images: (depth, height, width) each, on the grid, at most 24; each with its own grey levels.
        grid: where they lie in MNI152.
        titles: a short line per scan, such as its name and its flags.
        title, note: see `kit.show.figure.blank`.
        columns: scans per row.

    Raises:
        ValueError: more than 24 scans.
    """
    if len(images) > HIGHEST_MONTAGE:
        raise ValueError(f"a montage shows at most {HIGHEST_MONTAGE} scans, got {len(images)}")
    depth, height, width = grid.shape
    outline = _beside(template_on(grid)[1], grid)
    rows = max(1, math.ceil(len(images) / columns))
    tall = MAX_WIDTH / columns * max(depth, height) / (2 * width + height)
    figure = blank(MAX_WIDTH, rows * (tall + 24), title, footer(note))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        bare(axes)
    for axes, image, text in zip(panels, images, titles, strict=False):
        picture = grey(_beside(image, grid), window(image))
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axes.contour(outline, levels=[0.5], colors="#ffd54a", linewidths=0.7)
        axes.set_title(text, fontsize=TEXT - 1)
    return figure


def quality_histograms(index: pd.DataFrame, by: str = "dataset", title: str = "", note: str = "") -> Figure:
    """Count scans by each quality figure, a line per site; flagged scans are marked below.

    Args:
        index: of prepared scans, with the columns of `kit.data.quality.FIGURES` and `flags`.
        by: the column that tells sites apart.
    """
    figure = blank(MAX_WIDTH, 230, title, note)
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    for axes, name in zip(panels, FIGURES, strict=True):
        edges = np.histogram_bin_edges(index[name], bins=16)
        for site, group in index.groupby(by):
            axes.hist(group[name], bins=edges, histtype="step", linewidth=1.3, label=f"{site} (n = {len(group)})")
        flagged = index[name][index["flags"].str.contains(name)]
        if len(flagged):
            axes.plot(flagged, 0 * flagged, "x", color="#b03a2e", markersize=6, clip_on=False, label="flagged")
        label(axes, name.replace("_", " "), "scans" if axes is panels[0] else "")
    lines = {}
    for axes in panels:
        lines |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize=TEXT - 1)
    return figure


def _beside(volume: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the middle slice of each plane, side by side, (rows, columns) float32, lower ones centred."""
    cuts = [cut(volume, plane, index) for plane, index in zip(PLANES, voxel_at(grid), strict=True)]
    tall = max(len(each) for each in cuts)
    padded = []
    for each in cuts:
        above = (tall - len(each)) // 2
        padded.append(np.pad(each.astype(np.float32), ((above, tall - len(each) - above), (0, 0))))
    return np.hstack(padded)
