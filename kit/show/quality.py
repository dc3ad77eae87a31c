"""Pictures for judging prepared scans: each in three planes under the template's outline, figures by site."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kit.data.grid import Grid
from kit.data.quality import FIGURES
from kit.data.template import template_on
from kit.show.figure import MAX_WIDTH, blank, label, shared_legend
from kit.show.planes import PLANES
from kit.show.slices import montage

HIGHEST_MONTAGE = 24  # scans; more are no picture that a person looks at


def quality_montage(images: Sequence[np.ndarray], grid: Grid, titles: Sequence[str], note: str = "",
                    title: str = "") -> Figure:
    """Draw scans in three planes each, the template's brain outlined over them; see `kit.show.slices.montage`.

    Raises:
        ValueError: more than 24 scans.
    """
    if len(images) > HIGHEST_MONTAGE:
        raise ValueError(f"a montage shows at most {HIGHEST_MONTAGE} scans, got {len(images)}")
    return montage(images, grid, titles, note, title, tuple(PLANES), template_on(grid)[1])


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
    shared_legend(figure)
    return figure
