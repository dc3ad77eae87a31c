"""Reports and indexes of runs."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from kit.report import write_index, write_overview, write_report


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    (folder / "figures").mkdir(parents=True)
    for name in ("report.html", "figures/scan & map.png", "scores.csv", "params.yaml", "encoder.safetensors"):
        (folder / name).write_bytes(b"-")
    (folder / "metrics.json").write_text('{"auc": 0.81234567, "auc_low": null, "people": 123456.0}', encoding="utf-8")
    return folder


def targets(page: Path) -> list[Path]:
    text = page.read_text(encoding="utf-8")
    return [page.parent / unquote(link) for link in re.findall(r'(?:href|src)="([^"]+)"', text)]


def test_a_report_has_contents_and_folded_code(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Title\n\n## First part\n[next](2_pretrain.ipynb), [why](../docs/a.md#b), "
                                           "[paper](https://arxiv.org/abs/1)"),
             nbformat.v4.new_code_cell("print('<b>')", outputs=[nbformat.v4.new_output("stream", text="<b>\n")]),
             nbformat.v4.new_markdown_cell("## Which *scans*?")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    write_report(tmp_path / "one.ipynb", tmp_path / "one.html")
    html = (tmp_path / "one.html").read_text(encoding="utf-8")
    contents = re.search(r'<nav class="contents">(.*?)</nav>', html, re.DOTALL)[1]
    assert re.findall(r"<a[^>]*>(.*?)</a>", contents) == ["First part", "Which <em>scans</em>?"]
    for place in re.findall(r'href="#([^"]+)"', contents):
        assert f'id="{place}"' in html
    assert html.count('<details class="code">') == 1 and "&lt;b&gt;" in html
    assert re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', html) == ["https://arxiv.org/abs/1"]  # the page lies alone
    assert "next, why," in html


def test_an_index_links_what_is_there_and_nothing_else(run_folder):
    page = write_index(run_folder)
    found = targets(page)
    assert found and all(path.exists() for path in found)
    assert {path.name for path in found} == {"report.html", "scan & map.png", "scores.csv", "params.yaml",
                                             "encoder.safetensors"}
    text = page.read_text(encoding="utf-8")
    assert all(f"<td>{value}</td>" in text for value in ("0.8123", "–", "123456")) and "scan &amp; map" in text


def test_an_overview_leads_to_each_run(run_folder, tmp_path):
    write_index(run_folder)
    page = write_overview(tmp_path, [("first", run_folder)])
    assert run_folder / "index.html" in targets(page) and all(path.exists() for path in targets(page))


def test_a_report_elsewhere_is_linked_by_its_address(run_folder, tmp_path):
    (tmp_path / "elsewhere.html").write_text("-")
    assert (tmp_path / "elsewhere.html").as_uri() in write_index(run_folder, tmp_path / "elsewhere.html").read_text()
