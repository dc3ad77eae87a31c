"""Reports of all notebooks in a real Chromium, from disk and offline, on a phone's and a desk's window.

Screenshots stay in `outputs/browser`, to be looked at.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.params import NOTEBOOKS
from kit.report import write_index, write_report
from kit.runs import ROOT, outputs_dir

pytestmark = pytest.mark.slow

SCREENSHOTS = outputs_dir() / "browser"
WIDER = "return document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture
def phone(offline: object) -> object:
    """The browser as a phone of 390 x 844 points."""
    offline.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    yield offline
    offline.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_report_reads_on_a_phone(phone: object, tmp_path: Path, notebook: str) -> None:
    from selenium.webdriver.common.by import By

    write_report(ROOT / f"notebooks/{notebook}.ipynb", tmp_path / "report.html")
    phone.get((tmp_path / "report.html").as_uri())
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    phone.save_screenshot(str(SCREENSHOTS / f"phone_{notebook}.png"))
    assert phone.execute_script(WIDER) <= 0, "the page is wider than the phone"
    links = phone.find_elements(By.CSS_SELECTOR, "nav.contents a")
    assert links and all(phone.execute_script(
        "return !!document.getElementById(decodeURIComponent(arguments[0].hash.slice(1)))", link) for link in links)
    folds = phone.find_elements(By.CSS_SELECTOR, "details.code")
    assert folds and not any(fold.get_attribute("open") for fold in folds)
    folds[0].find_element(By.TAG_NAME, "summary").click()
    assert folds[0].find_element(By.TAG_NAME, "pre").is_displayed()
    assert not [line for line in phone.get_log("browser") if line["level"] == "SEVERE"]


def test_an_index_reads_on_a_phone(phone: object, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a figure.png").write_bytes((ROOT / "notebooks/images/saliency.png").read_bytes())
    (tmp_path / "metrics.json").write_text('{"out_of_distribution_auc": 0.8123}', encoding="utf-8")
    phone.get(write_index(tmp_path).as_uri())
    assert phone.execute_script("return document.images[0].naturalWidth") > 100
    assert phone.execute_script(WIDER) <= 0
    assert not [line for line in phone.get_log("browser") if line["level"] == "SEVERE"]
