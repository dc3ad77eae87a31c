"""The interactive explorer of augmentations: choose a scan and a recipe, drag any range, and see two views.

It does not depend on how views are made: it takes a function `make_pair(scan, recipe, seed) -> Pair`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Required, TypedDict

import ipywidgets as widgets
import matplotlib
import numpy as np
from IPython.display import display
from PIL import Image, ImageDraw, ImageFont

from kit.augment.recipe import Recipe, save_recipe
from kit.runs import resolve, shown
from kit.show import planes
from kit.show.figure import png, small
from kit.show.planes import EDGES, PLANES, Pair, Point
from kit.show.recipe_controls import RecipeControls
from kit.show.similarity import Similarity, pair_facts
from kit.store.grid import Grid

Choice = tuple[str, Recipe, int]  # scan, recipe, seed
MakePair = Callable[[str, Recipe, int], Pair]

_MARGIN, _HEADER, _GAP, _SLICES = 110, 20, 4, 600  # pixels: row names, column names, gaps, all slices
class _Now(TypedDict, total=False):
    """The latest request, and the pair that is shown."""

    request: Required[int]
    pair: Pair


_ROWS = ("original", "view 1", "view 2", "view 1 − view 2")


def render_pair(pair: Pair, grid: Grid, position: Point | None = None, note: str = "") -> bytes:
    """Draw a pair of views as PNG: rows original, view 1, view 2, view 1 - view 2; columns the three planes.

    All share the original's grey levels. In the difference, red means that view 1 is brighter. It uses NumPy and
    Pillow because matplotlib would dominate the delay after moving a slider.

    Args:
        pair: volumes (depth, height, width) on the grid.
        position: (x, y, z) MNI mm through which all slices are cut, marked by lines; None: the grid's middle, unmarked.
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
    voxel = planes.voxel_at(grid, position)
    for plane, index in zip(PLANES, voxel, strict=True):
        draw.text((left, 3), planes.slice_name(grid, plane, index), "white", _font(11))
        slices = [planes.cut(volume, plane, index) for volume in (pair.original, pair.view_1, pair.view_2)]
        pictures = [(255 * planes.grey(picture, limits)).astype(np.uint8) for picture in slices]
        most = planes.FULL_COLOUR * (limits[1] - limits[0])
        pictures.append(_red_blue((slices[1].astype(np.float32) - slices[2]) / most))
        size = tuple(round(scale * side) for side in slices[0].shape[::-1])
        for picture, top in zip(pictures, tops, strict=False):
            above = top + (row_height - size[1]) // 2
            page.paste(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR), (left, above))
            middle = above + size[1] // 2
            if position is not None:
                across, up = (voxel[1 if plane == "sagittal" else 2], voxel[1 if plane == "axial" else 0])
                x, y = left + scale * (across + 0.5), above + size[1] - scale * (up + 0.5)
                draw.line((x, above, x, above + size[1] - 1), "#4fc3f7")
                draw.line((left, y, left + size[0] - 1, y), "#4fc3f7")
            for letter, x, side in zip(EDGES[plane], (left + 3, left + size[0] - 3), "lr", strict=False):
                draw.text((x, middle), letter, "white", _font(12), f"{side}m", stroke_width=1, stroke_fill=0)
        left += size[0] + _GAP
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def explorer(
    make_pair: MakePair, scans: Sequence[str], recipes: Mapping[str, Recipe], grid: Grid, seed: int = 0,
    note: str = "", similarity: Similarity | None = None, recipe_path: str = "outputs/recipes/mine.yaml",
) -> widgets.VBox:
    """Build the explorer. The first picture is made before this returns, and an error in making it is raised.

    Moving a slice slider redraws the current pair. Any other change makes a new pair in a background thread. Requests
    overtaken by a later one are dropped, and an error is shown in place of the pair's description. Grey levels and
    similarity follow the picture unless another request has arrived.

    Args:
        scans, recipes: to choose from; the first of each is shown first.
        grid: of the pair's volumes.
        seed: the first seed; "Draw again" takes the next.
        recipe_path: where "Save recipe" writes, unless another path is typed in; an existing file is kept, and the
            new one numbered.

    Returns:
        A box of controls, picture, text and plots for `display_explorer`.
    """
    number = widgets.IntText(seed, description="seed")
    scan = widgets.Dropdown(options=list(scans), description="scan")
    named = widgets.Dropdown(options=list(recipes), description="recipe")
    strength = widgets.FloatSlider(1, min=0, max=4, step=0.05, description="strength")
    again = widgets.Button(description="Draw again")
    sliders = [_slice_slider(grid, plane) for plane in ("sagittal", "coronal", "axial")]  # x, y, z
    words, picture = widgets.HTML(), widgets.Image(format="png")
    facts = widgets.Image(format="png", layout=widgets.Layout(width="760px"))
    worker = ThreadPoolExecutor(max_workers=1)
    now: _Now = {"request": 0}

    def redraw(_change: object = None) -> None:
        picture.value = render_pair(now["pair"], grid, tuple(slider.value for slider in sliders), note)

    def show(pair: Pair) -> None:
        now["pair"] = pair
        words.value = f"{html.escape(pair.drawn)} <i>({pair.seconds:.2f} s)</i>"
        redraw()

    def add_facts(request: int, chosen: Choice) -> None:
        if request != now["request"]:
            return
        try:
            found = similarity(list(scans).index(chosen[0]), *chosen[1:]) if similarity else []
            if request == now["request"]:
                facts.value = png(pair_facts(now["pair"], found, note))
        except Exception as error:  # an error in a thread would go unseen
            if request == now["request"]:
                words.value = _wrong(error)

    def make(request: int, chosen: Choice) -> None:
        if request != now["request"]:  # overtaken while waiting
            return
        try:
            pair = make_pair(*chosen)
            if request == now["request"]:
                show(pair)
                add_facts(request, chosen)
        except Exception as error:  # as in add_facts: an error in a thread would go unseen
            if request == now["request"]:
                words.value = _wrong(error)

    def chosen() -> Choice:
        return scan.value, controls.recipe(strength.value), number.value

    def request_pair(_change: object = None) -> None:
        now["request"] += 1
        try:
            worker.submit(make, now["request"], chosen())
        except ValueError as error:  # an impossible recipe
            words.value = _wrong(error)

    controls = RecipeControls(request_pair)

    def choose(_change: object = None) -> None:
        controls.show(recipes[named.value])
        strength.unobserve(request_pair, "value")
        strength.value = recipes[named.value].strength
        strength.observe(request_pair, "value")
        request_pair()

    controls.show(recipes[named.value])
    strength.value = recipes[named.value].strength
    first = chosen()
    show(make_pair(*first))
    worker.submit(add_facts, 0, first)
    for widget, answer in ((scan, request_pair), (named, choose), (strength, request_pair), (number, request_pair)):
        widget.observe(answer, "value")
    for slider in sliders:
        slider.observe(redraw, "value")
    again.on_click(lambda _button: setattr(number, "value", number.value + 1))
    transforms = widgets.Accordion([controls.box], titles=("transforms: switch on and off, drag the ranges",))
    return widgets.VBox([
        widgets.HBox([widgets.VBox([scan, named, strength, number, again, *sliders]), picture]), words, facts,
        transforms, _keep(lambda: chosen()[1], recipe_path)])


def _keep(recipe: Callable[[], Recipe], path: str) -> widgets.VBox:
    """Build controls that save the recipe as YAML, or show it for copying."""
    where = widgets.Text(path, description="file")
    save, copy = widgets.Button(description="Save recipe"), widgets.Button(description="Copy")
    said = widgets.HTML()
    text = widgets.Textarea(layout=widgets.Layout(width="760px", height="200px", display="none"))

    def keep(_button: object) -> None:
        try:
            said.value = (f"saved; 2_pretrain takes it: <code>recipe = "
                          f"&quot;{html.escape(shown(save_recipe(recipe(), _unused(where.value))))}&quot;</code>")
        except (OSError, ValueError) as error:
            said.value = _wrong(error)

    def reveal(_button: object) -> None:
        try:
            text.value = recipe().text()
            text.layout.display = "none" if text.layout.display == "flex" else "flex"
        except ValueError as error:
            said.value = _wrong(error)

    save.on_click(keep)
    copy.on_click(reveal)
    return widgets.VBox([widgets.HBox([where, save, copy, said]), text])


def _unused(path: str) -> Path:
    """The path itself, or if such a file exists, the first numbered one that does not: `mine.yaml`, `mine_2.yaml`."""
    first = found = resolve(path)
    number = 2
    while found.is_file():
        found = first.with_name(f"{first.stem}_{number}{first.suffix}")
        number += 1
    return found


def _wrong(error: Exception) -> str:
    return f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"


def display_explorer(box: widgets.VBox) -> None:
    """Show the explorer and, in the same output, its current picture as a small PNG for pages without widgets."""
    picture = base64.b64encode(small(bytes(box.children[0].children[1].value)).data).decode("ascii")
    display({**box._repr_mimebundle_(), "image/png": picture}, raw=True)


def _slice_slider(grid: Grid, plane: str) -> widgets.FloatSlider:
    side = grid.shape[list(PLANES).index(plane)]
    low, middle, high = (planes.slice_mm(grid, plane, index) for index in (0, side // 2, side - 1))
    return widgets.FloatSlider(middle, min=low, max=high, step=grid.spacing_mm, readout_format=".0f",
                               description=f"{PLANES[plane]} (mm)")


def _red_blue(change: np.ndarray) -> np.ndarray:
    """Colour a picture with values -1 to 1 as RGB uint8: blue below 0, black at 0, red above."""
    red, blue = np.clip(change, 0, 1), np.clip(-change, 0, 1)
    return (255 * np.stack([red, 0.35 * (red + blue), blue], axis=-1)).astype(np.uint8)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
