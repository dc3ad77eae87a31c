"""Empty figures at most 900 pixels wide, with a title and a note; helpers for axes, legends and PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import matplotlib_inline.backend_inline  # noqa: F401  lets notebooks display figures made without pyplot
import PIL.Image
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist

DPI = 90
MAX_WIDTH = 900  # pixels
TEXT = 9  # points
LEGEND: dict[str, Any] = {"fontsize": TEXT - 1, "title_fontsize": TEXT - 1, "frameon": False}


def blank(width: float, height: float, title: str = "", note: str = "") -> Figure:
    """Make a figure of width × height pixels outside pyplot, so that figures do not accumulate in memory.

    Args:
        width, height: pixels; the width is capped at `MAX_WIDTH`.
        title: above the figure, which grows to make room.
        note: what readers must know about the data, such as "procedural data"; lower left corner.
    """
    height += 25 * bool(title) + 20 * bool(note)
    figure = Figure(figsize=(min(width, MAX_WIDTH) / DPI, height / DPI), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2)
    if note:  # a figure-wide label has its own space in the layout, so nothing overlaps it
        figure.supxlabel(note, fontsize=TEXT - 1, color="#b03a2e", x=0.01, ha="left")
    return figure


def in_words(words: str, title: str = "", note: str = "") -> Figure:
    """Make a figure of one sentence, where there is nothing to draw; arguments as for `blank`."""
    figure = blank(620, 40, title, note)
    axes = figure.subplots()
    bare(axes)
    axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=TEXT)
    return figure


def png(figure: Figure, **options: Any) -> bytes:
    """Convert a figure to PNG bytes for a widget; options as for `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def small(figure: Figure | bytes, colours: int = 128) -> Image:
    """Convert a figure or PNG to a PNG with few colours for notebooks: a third of the size, with the same look."""
    if isinstance(figure, Figure):
        figure = png(figure, bbox_inches="tight")
    picture, buffer = PIL.Image.open(io.BytesIO(figure)).convert("RGB"), io.BytesIO()
    # median cut, the default, gives the rare blue of a map's negative voxels away to the many greys
    picture.quantize(colours, PIL.Image.Quantize.MAXCOVERAGE, kmeans=1, dither=PIL.Image.Dither.NONE).save(
        buffer, format="PNG", optimize=True)
    return Image(buffer.getvalue())


def shared_legend(figure: Figure) -> None:
    """Add one legend for all panels at the upper right, without duplicates."""
    lines: dict[str, Artist] = {}
    for axes in figure.axes:
        lines |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", **LEGEND)


def bare(axes: Axes, title: str = "") -> None:
    """Remove ticks and frame from axes that hold a picture, and add a small title."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=TEXT)


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Label the axes of a plot in small type, and remove the upper and right frame."""
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.set_title(title, fontsize=TEXT)
    axes.tick_params(labelsize=TEXT - 1)
    axes.yaxis.get_offset_text().set_fontsize(TEXT - 1)
    axes.spines[["top", "right"]].set_visible(False)
