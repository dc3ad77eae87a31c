"""The explorer: its picture, and what its controls do to it. The widgets run here without a browser."""

import base64
import io
import threading
import time

import ipywidgets as widgets
import numpy as np
import pytest
from PIL import Image

from kit.augment.draws import TRANSFORMS
from kit.augment.recipe import Recipe, alone, names, read_recipe
from kit.show import explorer as module
from kit.show.explorer import display_explorer, explorer, render_pair
from kit.show.planes import Pair
from kit.show.recipe_controls import RecipeControls
from kit.show.similarity import Similar
from kit.store.grid import Grid

GRID = Grid((12, 16, 14), 12.0)
TOP, LEFT, SIDE = 20, 110, 600  # of the first picture; the width of all slices


def scan() -> np.ndarray:
    """Tissue of 1, with a bright block left, anterior and superior of the middle."""
    volume = np.zeros(GRID.shape, dtype=np.float32)
    volume[2:10, 2:14, 2:12] = 1
    volume[6:9, 8:13, 2:5] = 3
    return volume


RECIPES = {"paper": read_recipe("paper"), "none": Recipe()}


def make_pair(name: str, recipe: Recipe, seed: int) -> Pair:
    """A view that is brighter by seed and strength, and one that is flipped left to right."""
    if recipe.crop is None:
        raise RuntimeError("no such <recipe>")
    strength = recipe.strength
    original = scan() * (2 if name == "second" else 1)
    original[2:5, 2:5, 8:12] *= 1 + strength + seed
    return Pair(original, original + 0.3 * strength * (original > 0), original[:, :, ::-1],
                f"{name} by {recipe.crop.probability:g}, strength {strength}, seed {seed}", 0.25)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def walk(box: widgets.Widget) -> list[widgets.Widget]:
    return [box, *(below for child in getattr(box, "children", ()) for below in walk(child))]


def find(box: widgets.Widget, description: str = "", kind: type = widgets.Widget) -> widgets.Widget:
    return next(widget for widget in walk(box) if getattr(widget, "description", "") == description
                and (type(widget) is kind or kind is widgets.Widget))


def until(condition) -> None:
    """Wait for the background thread, 5 s at most."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "the explorer did not answer"
        time.sleep(0.005)


def test_block_is_left_and_up_in_the_picture_and_right_in_the_flipped_view():
    page = pixels(render_pair(Pair(scan(), scan(), scan()[:, :, ::-1]), GRID))
    scale = SIDE / (14 + 14 + 16)
    tall = round(scale * 16)
    width = round(scale * 14)

    def bright(row: int) -> np.ndarray:
        cell = page[TOP + row * (tall + 4) :, LEFT:][:tall, :width]
        return (cell.min(axis=-1) > 250)[: tall // 2]

    for row, side in ((0, "left"), (1, "left"), (2, "right")):
        left, right = bright(row)[:, : width // 2].sum(), bright(row)[:, width // 2 :].sum()
        assert (left > 10 * right) if side == "left" else (right > 10 * left)
    change = page[TOP + 3 * (tall + 4) :, LEFT:][:tall, :width]
    red, blue = change[..., 0] - change[..., 2] > 100, change[..., 2] - change[..., 0] > 100
    assert red[:, : width // 2].sum() > 500 and red[:, width // 2 :].sum() == 0  # view 1 is brighter at the left
    assert blue[:, width // 2 :].sum() > 500 and blue[:, : width // 2].sum() == 0


def test_the_note_stands_below_and_changes_nothing_else():
    pair = Pair(scan(), scan(), scan())
    plain, noted = (pixels(render_pair(pair, GRID, note=note)) for note in ("", "procedural data"))
    differs = np.flatnonzero((plain != noted).any(axis=(1, 2)))
    assert len(differs) and differs.min() >= len(plain) - 20
    assert (plain[-18:] != 0).any()  # the side's convention is always written


def test_slices_go_through_the_position():
    volume = np.zeros(GRID.shape, dtype=np.float32)
    volume[3] = 1.0
    pair = Pair(volume, volume, volume)
    at, off = (pixels(render_pair(pair, GRID, (0, 0, GRID.origin_mm[2] + index * 12.0)))[TOP:200, LEFT:280, 0].mean()
               for index in (3, 4))
    assert at > 10 * off


def test_a_picture_of_96_cubed_is_quick():
    volume = np.random.default_rng(0).normal(size=(96, 96, 96)).astype(np.float32)
    pair, grid, seconds = Pair(volume, volume[::-1], volume[:, ::-1]), Grid((96, 96, 96), 2.0), []
    for _ in range(5):
        start = time.perf_counter()
        png = render_pair(pair, grid)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15
    assert pixels(png).shape[1] <= 900


def test_first_picture_is_the_pair_at_the_sliders_places():
    box = explorer(make_pair, ["first", "second"], {"paper": RECIPES["paper"]}, GRID, seed=3, note="procedural data")
    picture, words = find(box, kind=widgets.Image), find(box, kind=widgets.HTML)
    place = tuple(find(box, f"{axis} (mm)").value for axis in "xyz")
    still = render_pair(make_pair("first", RECIPES["paper"], 3), GRID, place, "procedural data")
    assert place == tuple(GRID.affine[:3] @ (7, 8, 6, 1))  # the middle voxel
    np.testing.assert_array_equal(pixels(picture.value), pixels(still))
    assert words.value == "first by 1, strength 1.0, seed 3 <i>(0.25 s)</i>"


@pytest.mark.parametrize(("control", "value", "word"), [
    ("scan", "second", "second by"), ("strength", 2.0, "strength 2.0"), ("seed", 7, "seed 7"),
])
def test_a_changed_control_makes_a_new_picture(control, value, word):
    box = explorer(make_pair, ["first", "second"], {"paper": RECIPES["paper"]}, GRID)
    picture, words = find(box, kind=widgets.Image), find(box, kind=widgets.HTML)
    before = picture.value
    find(box, control).value = value
    until(lambda: word in words.value and picture.value != before)


def test_draw_again_takes_the_next_seed():
    box = explorer(make_pair, ["first"], {"paper": RECIPES["paper"]}, GRID, seed=4)
    find(box, "Draw again").click()
    assert find(box, "seed").value == 5
    until(lambda: "seed 5" in find(box, kind=widgets.HTML).value)


def test_a_slice_slider_redraws_without_a_new_pair():
    made = []

    def counted(*asked) -> Pair:
        made.append(asked)
        return make_pair(*asked)

    box = explorer(counted, ["first"], {"paper": RECIPES["paper"]}, GRID)
    for axis in "xyz":
        slider = find(box, f"{axis} (mm)")
        before = find(box, kind=widgets.Image).value
        slider.value = slider.min + 3 * GRID.spacing_mm
        assert find(box, kind=widgets.Image).value != before
    assert len(made) == 1
    assert find(box, "x (mm)").max == pytest.approx(GRID.origin_mm[0] + 13 * 12)


def test_overtaken_requests_are_never_made():
    made, held = [], threading.Event()

    def slow(name: str, recipe: Recipe, seed: int) -> Pair:
        if made:
            held.wait(5)
        made.append(seed)
        return make_pair(name, recipe, seed)

    box = explorer(slow, ["first"], {"paper": RECIPES["paper"]}, GRID)
    seed, words = find(box, "seed"), find(box, kind=widgets.HTML)
    for value in (1, 2, 3, 4):
        seed.value = value
    time.sleep(0.05)
    held.set()
    until(lambda: "seed 4" in words.value)
    assert made[0] == 0 and made[-1] == 4 and not {2, 3} & set(made)


def test_errors_are_seen():
    with pytest.raises(RuntimeError, match="recipe"):  # the first: a notebook's run must fail
        explorer(make_pair, ["first"], {"none": Recipe()}, GRID)
    box = explorer(make_pair, ["first"], RECIPES, GRID)
    words = find(box, kind=widgets.HTML)
    find(box, "recipe").value = "none"
    until(lambda: words.value == "<b>RuntimeError</b>: no such &lt;recipe&gt;")
    find(box, "recipe").value = "paper"
    until(lambda: "first by 1" in words.value)


def test_widget_and_png_are_one_output(monkeypatch):
    shown = []
    monkeypatch.setattr(module, "display", lambda bundle, raw: shown.append((bundle, raw)))
    box = explorer(make_pair, ["first"], {"paper": RECIPES["paper"]}, GRID)
    display_explorer(box)
    bundle, raw = shown[0]
    assert raw and bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    still = pixels(base64.b64decode(bundle["image/png"]))  # of a palette
    assert still.shape[:2] == pixels(find(box, kind=widgets.Image).value).shape[:2]


def test_transforms_are_switched_and_dragged(tmp_path):
    asked = []

    def noted(name: str, recipe: Recipe, seed: int) -> Pair:
        asked.append(recipe)
        return make_pair(name, recipe, seed)

    box = explorer(noted, ["first"], {"paper": RECIPES["paper"]}, GRID, recipe_path=str(tmp_path / "mine.yaml"))
    assert asked[0] == RECIPES["paper"]  # what the widgets say is the recipe itself
    find(box, "blur", widgets.Checkbox).value = True
    find(box, "shift", widgets.Checkbox).value = False
    find(box, "strength").value = 0.5
    until(lambda: asked[-1].blur is not None and asked[-1].shift is None and asked[-1].strength == 0.5)
    row = next(w for w in walk(box) if isinstance(w, widgets.HBox) and w.children
               and getattr(w.children[0], "description", "") == "gamma")
    row.children[2].value = (0.8, 2.0)
    row.children[1].value = 0.3
    until(lambda: asked[-1].gamma.range == (0.8, 2.0) and asked[-1].gamma.probability == 0.3)
    find(box, "Save recipe").click()
    assert read_recipe(tmp_path / "mine.yaml") == asked[-1]
    find(box, "Copy").click()
    shown = find(box, kind=widgets.Textarea)
    assert shown.value == (tmp_path / "mine.yaml").read_text(encoding="utf-8") and shown.layout.display == "flex"


def test_saving_never_overwrites_a_file(tmp_path):
    box = explorer(make_pair, ["first"], {"paper": RECIPES["paper"]}, GRID, recipe_path=str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("somebody's", encoding="utf-8")
    for file in ("mine_2.yaml", "mine_3.yaml"):
        find(box, "Save recipe").click()
        assert read_recipe(tmp_path / file) == RECIPES["paper"]
        assert any(file in widget.value for widget in walk(box) if isinstance(widget, widgets.HTML))
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "somebody's"


def test_every_recipe_survives_the_widgets():
    controls = RecipeControls(lambda: pytest.fail("a change by hand"))
    for name in names():
        controls.show(read_recipe(name))
        assert controls.recipe() == read_recipe(name)
    for name in TRANSFORMS:
        controls.show(alone(name))
        assert controls.recipe() == alone(name)


def test_what_the_browser_rounds_is_not_a_change():
    controls, odd = RecipeControls(lambda: None), Recipe.model_validate({"gamma": {"range": [0.7004, 1.5]}})
    controls.show(odd)
    slider = controls.rows["gamma"].sliders["range", None]
    slider.value = (0.7, 1.5)  # noUiSlider sends back the nearest step
    assert controls.recipe() == odd
    slider.value = (0.71, 1.5)
    assert controls.recipe().gamma.range == (0.71, 1.5)


def test_grey_levels_and_similarity_follow(monkeypatch):
    found = []

    def similarity(number: int, recipe: Recipe, seed: int) -> list[Similar]:
        found.append((number, recipe.strength, seed))
        return [Similar(0.9, np.array([0.8]), np.array([0.1, 0.2]), "a network")]

    box = explorer(make_pair, ["first", "second"], {"paper": RECIPES["paper"]}, GRID, similarity=similarity)
    facts = [widget for widget in walk(box) if isinstance(widget, widgets.Image)]
    assert len(facts) == 2
    until(lambda: all(image.value for image in facts))
    find(box, "scan").value = "second"
    until(lambda: found[-1] == (1, 1.0, 0))
