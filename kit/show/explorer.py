"""The interactive explorer of augmentations: choose scan, recipe, strength and seed; look at two views.

It knows nothing of how views are made: it takes a function `make_pair(scan, recipe, strength, seed) -> Pair`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import ipywidgets as widgets
import matplotlib
import numpy as np
from IPython.display import display
from PIL import Image, ImageDraw, ImageFont

from kit.data.grid import Grid
from kit.show import planes
from kit.show.planes import EDGES, PLANES, Pair, Point

MakePair = Callable[[str, str, float, int], Pair]

_MARGIN, _HEADER, _GAP, _SLICES = 110, 20, 4, 600  # pixels: rows' names, columns' names, gaps, all slices
_ROWS = ("original", "view 1", "view 2", "view 1 − view 2")


def render_pair(pair: Pair, grid: Grid, position: Point | None = None, note: str = "") -> bytes:
    """Draw a pair of views as PNG: rows original, view 1, view 2, view 1 - view 2; columns the three planes.

    All share the original's grey levels. In the difference red means that view 1 is brighter. By NumPy and
    Pillow: matplotlib would take most of the time between a slider's move and its picture.

    Args:
        pair: volumes (depth, height, width) on the grid.
        position: (x, y, z) MNI mm of the voxel that all slices go through; the grid's middle by default.
        note: small print below, such as "procedural data".
    """
    depth, height, width = grid.shape
    scale, limits = _SLICES / (2 * width + height), planes.window(pair.original)
    row_height = round(scale * max(depth, height))
    tops = [_HEADER + number * (row_height + _GAP) for number in range(len(_ROWS) + 1)]
    page = Image.new("RGB", (_MARGIN + _SLICES + 3 * _GAP, tops[-1] + 18), "black")
    draw, left = ImageDraw.Draw(page), _MARGIN
    for name, top in zip(_ROWS, tops, strict=False):
        draw.text((6, top + row_height // 2), name, "white", _font(11), anchor="lm")
    draw.text((6, tops[-1]), planes.footer(note), "#ff9d8a", _font(11))
    for plane, index in zip(PLANES, planes.voxel_at(grid, position), strict=True):
        draw.text((left, 3), planes.slice_name(grid, plane, index), "white", _font(11))
        slices = [planes.cut(volume, plane, index) for volume in (pair.original, pair.view_1, pair.view_2)]
        pictures = [(255 * planes.grey(picture, limits)).astype(np.uint8) for picture in slices]
        pictures.append(_red_blue((slices[1].astype(np.float32) - slices[2]) / (limits[1] - limits[0])))
        size = tuple(round(scale * side) for side in slices[0].shape[::-1])
        for picture, top in zip(pictures, tops, strict=False):
            above = top + (row_height - size[1]) // 2
            page.paste(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR), (left, above))
            middle = above + size[1] // 2
            for letter, x, side in zip(EDGES[plane], (left + 3, left + size[0] - 3), "lr", strict=False):
                draw.text((x, middle), letter, "white", _font(12), f"{side}m", stroke_width=1, stroke_fill=0)
        left += size[0] + _GAP
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def static_picture(
    make_pair: MakePair, scan: str, recipe: str, grid: Grid, strength: float = 1.0, seed: int = 0,
    position: Point | None = None, note: str = "",
) -> bytes:
    """Return, as PNG, the picture that the explorer shows for these choices; needs no browser."""
    return render_pair(make_pair(scan, recipe, strength, seed), grid, position, note)


def explorer(
    make_pair: MakePair, scans: Sequence[str], recipes: Sequence[str], grid: Grid, seed: int = 0,
    note: str = "",
) -> widgets.VBox:
    """Build the explorer; its first picture is made before this returns, and an error in making it is raised.

    Moving a slice's slider redraws the pair at hand. Any other change makes a pair in a background thread:
    requests overtaken by a later one are dropped, and an error is written in place of the pair's words.

    Args:
        make_pair: (scan, recipe, strength, seed) -> Pair.
        scans, recipes: what to choose from; the first of each is shown first.
        grid: the grid of the pair's volumes.
        seed: the first seed; "Draw again" takes the next.
        note: printed on every picture, such as "procedural data".

    Returns:
        A box of controls, picture and words: give it to `display_explorer`.
    """
    number = widgets.IntText(seed, description="seed")
    choices = [
        widgets.Dropdown(options=list(scans), description="scan"),
        widgets.Dropdown(options=list(recipes), description="recipe"),
        widgets.FloatSlider(1, min=0, max=2, step=0.1, description="strength", continuous_update=False),
        number,
    ]
    again = widgets.Button(description="Draw again")
    sliders = [_slice_slider(grid, plane) for plane in ("sagittal", "coronal", "axial")]  # x, y, z
    words, picture = widgets.HTML(), widgets.Image(format="png")
    worker, now = ThreadPoolExecutor(max_workers=1), {"request": 0, "pair": None}

    def redraw(_change: object = None) -> None:
        picture.value = render_pair(now["pair"], grid, tuple(slider.value for slider in sliders), note)

    def show(pair: Pair) -> None:
        now["pair"] = pair
        words.value = f"{html.escape(pair.drawn)} <i>({pair.seconds:.2f} s)</i>"
        redraw()

    def make(request: int, asked: list) -> None:
        if request != now["request"]:  # overtaken while it waited
            return
        try:
            pair = make_pair(*asked)
            if request == now["request"]:
                show(pair)
        except Exception as error:  # a thread's error would be seen by nobody
            words.value = f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"

    def ask(_change: object = None) -> None:
        now["request"] += 1
        worker.submit(make, now["request"], [choice.value for choice in choices])

    show(make_pair(*(choice.value for choice in choices)))
    for choice in choices:
        choice.observe(ask, "value")
    for slider in sliders:
        slider.observe(redraw, "value")
    again.on_click(lambda _button: setattr(number, "value", number.value + 1))
    return widgets.VBox([widgets.HBox([widgets.VBox([*choices, again, *sliders]), picture]), words])


def display_explorer(box: widgets.VBox) -> None:
    """Show the explorer and, in the same output, its present picture as PNG for pages that run no widgets."""
    picture = base64.b64encode(box.children[0].children[1].value).decode("ascii")
    display({**box._repr_mimebundle_(), "image/png": picture}, raw=True)


def _slice_slider(grid: Grid, plane: str) -> widgets.FloatSlider:
    side = grid.shape[list(PLANES).index(plane)]
    low, middle, high = (planes.slice_mm(grid, plane, index) for index in (0, side // 2, side - 1))
    return widgets.FloatSlider(middle, min=low, max=high, step=grid.spacing_mm, readout_format=".0f",
                               description=f"{PLANES[plane]} (mm)")


def _red_blue(change: np.ndarray) -> np.ndarray:
    """Colour a picture of -1..1 as RGB uint8: blue below 0, black at 0, red above."""
    red, blue = np.clip(change, 0, 1), np.clip(-change, 0, 1)
    return (255 * np.stack([red, 0.35 * (red + blue), blue], axis=-1)).astype(np.uint8)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
