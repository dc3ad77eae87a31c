"""What stands below a pair of views: their grey levels, and how alike an encoder finds them."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from kit.show.figure import TEXT, blank, label
from kit.show.planes import Pair
from kit.show.similarity import Similar


def pair_facts(pair: Pair, similar: Similar | None = None, note: str = "") -> Figure:
    """Draw the histograms of original and views and, where given, the pair's similarity beside all others'.

    Args:
        pair: volumes (depth, height, width), z-scored, zero outside the mask.
        similar: from `kit.show.similarity`, or None while it is not known.
        note: see `kit.show.figure.blank`.
    """
    figure = blank(760, 190, note=note)
    left, right = figure.subplots(1, 2)
    for name, volume, colour in (("original", pair.original, "#555555"), ("view 1", pair.view_1, "#c0392b"),
                                 ("view 2", pair.view_2, "#2471a3")):
        values = volume.ravel()[:: max(1, volume.size // 200_000)]
        density, edges = np.histogram(values[values != 0], bins=60, range=(-4, 4), density=True)
        left.stairs(np.nan_to_num(density), edges, label=name, color=colour)
    left.legend(fontsize=TEXT - 1, frameon=False)
    label(left, "grey level (standard deviations)", "density", "grey levels inside the mask")
    title = "similarity: not known yet" if similar is None else f"cosine similarity under {similar.encoder}"
    label(right, "cosine similarity", "", title)
    right.set_yticks([])
    if similar is not None:
        for height, values, name, colour in ((2, similar.pairs, "two views of another scan", "#2471a3"),
                                             (1, similar.strangers, "views of different scans", "#888888")):
            right.plot(values, np.full(len(values), height), "|", color=colour, markersize=16, label=name)
        right.axvline(similar.pair, ymax=0.55, color="#c0392b", label=f"this pair: {similar.pair:.3f}")
        right.set_ylim(0.4, 4.6)
        right.legend(fontsize=TEXT - 1, frameon=False, loc="upper left")
    return figure


def pair_facts_png(pair: Pair, similar: Similar | None = None, note: str = "") -> bytes:
    """The same as PNG bytes, for a widget."""
    buffer = io.BytesIO()
    pair_facts(pair, similar, note).savefig(buffer, format="png")
    return buffer.getvalue()
