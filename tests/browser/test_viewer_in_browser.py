"""The viewer of a saliency map in a real Chromium: a page from disk, without network, scrolled by hand.

Screenshots stay in `outputs/browser`, to be looked at.
"""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nilearn.plotting.html_stat_map import StatMapView
from scipy import ndimage

from kit.report import write_report
from kit.runs import outputs_dir
from kit.show.saliency_figures import save_viewer, viewer
from kit.store.grid import Grid

pytestmark = pytest.mark.slow

GRID = Grid((36, 48, 40), 4.0)
SCREENSHOTS = outputs_dir() / "browser"
# Is anything but black drawn, and what: a digest of the canvas that has the three slices.
PICTURE = """const all = [...document.querySelectorAll('canvas')], big = all.find(one => one.width > 200);
if (!big) return null;
const data = big.getContext('2d').getImageData(0, 0, big.width, big.height).data;
let sum = 0, coloured = 0;
for (let at = 0; at < data.length; at += 4) {
  sum = (sum * 31 + data[at] + 7 * data[at + 1]) % 1000000007;
  coloured += Math.abs(data[at] - data[at + 2]) > 40;
}
return [sum, coloured, big.width, big.height];"""


@pytest.fixture(scope="module")
def view() -> StatMapView:
    """A map with one cluster, left in the brain."""
    values = np.zeros(GRID.shape, np.float32)
    values[20, 24, 11] = 1
    return viewer(ndimage.gaussian_filter(values, 2), GRID, title="gradient, not supported")


def drawn(browser: object) -> list[int]:
    """The picture, once it stands still."""
    end = time.monotonic() + 20
    before = None
    while time.monotonic() < end:
        now = browser.execute_script(PICTURE)
        if now and now == before and now[1]:
            return now
        before = now
        time.sleep(0.3)
    raise AssertionError(f"no picture: {before}")


def scrolls(browser: object, name: str) -> None:
    """Click and drag in the slices: each time another picture."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    pictures = [drawn(browser)]
    browser.save_screenshot(str(SCREENSHOTS / f"{name}_opened.png"))
    canvas = max(browser.find_elements(By.CSS_SELECTOR, "canvas"), key=lambda one: one.size["width"])
    for act in (lambda chain: chain.move_to_element_with_offset(canvas, -200, -20).click(),
                lambda chain: chain.move_to_element_with_offset(canvas, -200, -20).click_and_hold()
                .move_by_offset(30, 20).move_by_offset(30, 10).release()):
        act(ActionChains(browser)).perform()
        pictures.append(drawn(browser))
    browser.save_screenshot(str(SCREENSHOTS / f"{name}_dragged.png"))
    assert len({tuple(each) for each in pictures}) == 3, "a click or a drag changed nothing"
    assert "gradient, not supported" in browser.page_source
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_page_from_disk_scrolls_without_network(offline: object, view: StatMapView, tmp_path: Path) -> None:
    offline.get(save_viewer(tmp_path / "viewer.html", view).as_uri())
    scrolls(offline, "viewer")


def test_it_scrolls_in_the_report_of_a_notebook(offline: object, view: StatMapView, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    cell = nbformat.v4.new_code_cell("viewer(...)", outputs=[nbformat.v4.new_output(
        "display_data", {"text/html": view._repr_html_()})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "4_saliency.ipynb")
    write_report(tmp_path / "4_saliency.ipynb", tmp_path / "report.html")
    offline.get((tmp_path / "report.html").as_uri())
    offline.switch_to.frame(offline.find_element(By.CSS_SELECTOR, "iframe"))
    scrolls(offline, "report")
