"""JupyterLab in a real Chromium: the explorer is opened, run, used by hand, and its recipe saved.

Screenshots stay in `outputs/browser`, to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from kit.augment.recipe import read_recipe
from kit.execute import FOLDER
from kit.params import Pretrain
from kit.preprocess.template import template_on
from kit.reading import check
from kit.runs import Run, outputs_dir
from kit.store.grid import Grid
from kit.store.store import FORMAT, scan_path, write_scan
from kit.train.pretrain import pretrain
from tests.browser.lab import jupyter_lab, open_notebook, until

pytestmark = pytest.mark.slow

NOTEBOOK = "0_explore_augmentations.ipynb"
SCREENSHOTS = outputs_dir() / "browser"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared scans: the template with noise of different seeds."""
    folder, grid = tmp_path_factory.mktemp("prepared"), Grid((36, 48, 40), 4.0)
    image, mask = template_on(grid)
    rows = []
    for number in range(3):
        noisy = image + np.random.default_rng(number).normal(0, 0.05, image.shape)
        scan = f"template_{number}"
        write_scan(scan_path(folder, scan), np.where(mask, (noisy - noisy[mask].mean()) / noisy[mask].std(), 0), mask,
                   scan, grid.affine)
        rows.append({"scan": scan, "participant": str(number), "session": "1", "dataset": "template"})
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    (folder / "preparation.json").write_text(json.dumps({
        "format": FORMAT, "axes": "zyx", "shape": list(grid.shape), "spacing_mm": 4.0,
        "origin_mm": list(grid.origin_mm), "registration": "none", "mask": "given", "intensity": "zscore",
        "template": "t"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lab(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab on a copy of the notebook: its address, and the folder of its outputs."""
    folder = tmp_path_factory.mktemp("lab")
    book = nbformat.read(FOLDER / NOTEBOOK, as_version=4)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace("prepared = None", f"prepared = {str(prepared)!r}")
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(book, folder / NOTEBOOK)
    with jupyter_lab(folder) as address:
        yield address(NOTEBOOK), folder / "outputs"


def test_the_explorer_by_hand(lab: tuple[str, Path], browser: object, prepared: Path, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    address, outputs = lab
    shots = iter(range(1, 100))

    def all_of(css: str) -> list:
        return browser.find_elements(By.CSS_SELECTOR, css)

    def shoot(name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(SCREENSHOTS / f"{next(shots)}_{name}.png"))

    def row(label: str, css: str) -> object:
        """The first widget that carries this label."""
        rows = [one for one in all_of(".widget-inline-hbox")
                if (names := one.find_elements(By.CSS_SELECTOR, ".widget-label")) and names[0].text == label]
        return rows[0].find_element(By.CSS_SELECTOR, css)

    def button(text: str) -> object:
        return next(one for one in all_of("button.jupyter-button") if one.text == text)

    def picture() -> str:
        return all_of("img.widget-image")[0].get_attribute("src")

    def changes(act: object) -> None:
        before = picture()
        act()
        until(lambda: picture() != before, 60, "the picture did not change")

    open_notebook(browser, address)
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: all_of("img.widget-image"), 240, "the explorer did not appear")
    until(lambda: "similarity.png" in browser.page_source, 120, "the notebook did not run to its end")
    image = all_of("img.widget-image")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    assert image.size["width"] > 500 and image.size["height"] > 500
    shoot("explorer")

    changes(lambda: Select(row("recipe", "select")).select_by_visible_text("physics"))
    handle = row("strength", ".noUi-handle")
    changes(lambda: ActionChains(browser).drag_and_drop_by_offset(handle, 40, 0).perform())
    changes(lambda: ActionChains(browser).drag_and_drop_by_offset(row("x (mm)", ".noUi-handle"), -30, 0).perform())
    shoot("physics_stronger")
    facts = all_of("img.widget-image")[1]
    until(lambda: facts.size["height"] > 150, 60, "no grey levels and similarity")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", facts)
    shoot("facts")
    title = next(one for one in all_of(".jupyter-widget-Collapse-header, .lm-AccordionPanel-title")
                 if "transforms" in one.text)
    browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", title)
    title.click()
    until(lambda: [one for one in all_of(".widget-checkbox label") if one.text == "blur" and one.is_displayed()], 20,
           "no list of transforms")
    cutout = next(one for one in all_of(".widget-checkbox label") if one.text == "cutout")
    changes(lambda: cutout.click())
    shoot("transforms")
    save = button("Save recipe")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", save)
    save.click()
    saved = outputs / "recipes" / "mine.yaml"
    until(saved.is_file, 20, "no recipe was saved")
    button("Copy").click()
    until(lambda: all_of("textarea")[-1].is_displayed(), 20, "no YAML to copy")
    shoot("saved")

    recipe = read_recipe(saved)
    assert recipe.cutout is not None and recipe.gibbs == read_recipe("physics").gibbs and recipe.strength > 1
    params = check(Pretrain, {"prepared": prepared, "recipe": str(saved), "epochs": 1, "batch_size": 2,
                              "validation_fraction": 0, "output_dir": tmp_path / "pretrained"})
    assert np.isfinite(pretrain(params, run := Run.of(params))["loss"]).all(), "2_pretrain does not take the recipe"
    assert yaml.safe_load((run / "params.yaml").read_text(encoding="utf-8"))["recipe"] == str(saved)
    errors = all_of(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], "
                    ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")
    assert not [one.text for one in errors]
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
