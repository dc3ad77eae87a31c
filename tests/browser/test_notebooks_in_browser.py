"""Every notebook in JupyterLab in a real Chromium: each cell is run twice in a row, from top to bottom.

A notebook finds what the one before it left, as for a person who works through them. Screenshots stay in
`outputs/browser`, to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import nbformat
import pytest

from kit.execute import FOLDER
from kit.params import NOTEBOOKS
from kit.runs import outputs_dir
from tests.browser.lab import jupyter_lab, kernel_status, open_notebook, until

pytestmark = pytest.mark.slow

SCREENSHOTS = outputs_dir() / "browser"
QUICK = {"sample_participants = 160": "sample_participants = 40", "epochs = 30": "epochs = 3",
         "steps = 400": "steps = 40", "label_fractions = [0.2, 1.0]": "label_fractions = [1.0]",
         'tasks = ["alzheimers", "age", "stroke", "sex"]': 'tasks = ["stroke", "age"]',
         '"smoothgrad", "integrated_gradients", "grad_cam"]': '"grad_cam"]'}
MINUTES = 15  # for one notebook, on two cores beside other tests
RUN_EACH_TWICE = """
const panel = window.jupyterapp.shell.currentWidget, notebook = panel.content;
notebook.widgets.forEach((cell, index) => {
  if (cell.model.type !== 'code') return;
  for (const turn of [1, 2]) {
    notebook.activeCellIndex = index;
    notebook.deselectAll();
    window.jupyterapp.commands.execute('notebook:run-cell');
  }
});"""
CELLS = """
return window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code').map(cell => ({
  count: cell.model.executionCount, prompt: cell.inputArea.promptNode.textContent,
  errors: cell.model.outputs.toJSON().filter(out => out.output_type === 'error').map(out => out.evalue)}));"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A JupyterLab on copies of all notebooks, without outputs and with less to do."""
    folder, shorter = tmp_path_factory.mktemp("lab"), set()
    for name in NOTEBOOKS:
        book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        for cell in book.cells:
            if "parameters" in cell.metadata.get("tags", []):
                shorter |= {words for words in QUICK if words in cell.source}
                for words, quick in QUICK.items():
                    cell.source = cell.source.replace(words, quick)
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(book, folder / f"{name}.ipynb")
    assert shorter == set(QUICK)
    with jupyter_lab(folder) as address:
        yield address


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_any_cell_may_be_run_twice(name: str, address: Callable[[str], str], browser: object) -> None:
    open_notebook(browser, address(f"{name}.ipynb"))
    browser.get_log("browser")
    browser.execute_script(RUN_EACH_TWICE)

    def done() -> bool:
        cells = browser.execute_script(CELLS)
        assert not [cell["errors"] for cell in cells if cell["errors"]], f"{name}: a cell failed"
        return not any("*" in cell["prompt"] for cell in cells) and kernel_status(browser) == "idle"

    until(lambda: browser.execute_script(CELLS)[0]["count"], 120, f"{name} did not begin")
    until(done, 60 * MINUTES, f"{name} did not end")
    counts = [cell["count"] for cell in browser.execute_script(CELLS)]
    assert counts == [2 * number for number in range(1, len(counts) + 1)]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(SCREENSHOTS / f"twice_{name}.png"))
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    browser.execute_script("window.jupyterapp.commands.execute('kernelmenu:shutdown')")
