"""An empty figure: at most 900 pixels wide, with room for its title and its note."""

from __future__ import annotations

import matplotlib_inline.backend_inline  # noqa: F401  a notebook then draws figures that pyplot never saw
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 90
MAX_WIDTH = 900  # pixels
TEXT = 9  # points


def blank(width: float, height: float, title: str = "", note: str = "") -> Figure:
    """Make a figure of width × height pixels that pyplot does not know, so that none piles up in memory.

    Args:
        width, height: pixels; the width is cut to `MAX_WIDTH`.
        title: above the figure, which grows for it.
        note: what a reader must know of the data, such as "procedural data", in the lower left corner.
    """
    height += 25 * bool(title) + 20 * bool(note)
    figure = Figure(figsize=(min(width, MAX_WIDTH) / DPI, height / DPI), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2)
    if note:  # a label of the whole figure has its own room in the layout: nothing is drawn over it
        figure.supxlabel(note, fontsize=TEXT - 1, color="#b03a2e", x=0.01, ha="left")
    return figure


def bare(axes: Axes, title: str = "") -> None:
    """Take ticks and frame off axes that hold a picture, and give them a small title."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=TEXT)


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Label the axes of a plot in small type, and take away the upper and right frame."""
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.set_title(title, fontsize=TEXT)
    axes.tick_params(labelsize=TEXT - 1)
    axes.yaxis.get_offset_text().set_fontsize(TEXT - 1)
    axes.spines[["top", "right"]].set_visible(False)
