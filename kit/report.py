"""HTML pages: an executed notebook's report, and the index of a run's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from kit.runs import shown, write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
HEADING = re.compile(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', re.DOTALL)
LINK = re.compile(r'<a href="(?!https?:|#|data:)[^"]+\.(?:ipynb|md)(?:#[^"]*)?">(.*?)</a>', re.DOTALL)
METRICS = 40  # most metrics that a run's index shows

STYLE = """<style>
body { font: 1rem/1.5 sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 0.7rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; width: 18rem; max-width: 100%; } figure img { width: 100%; border: 1px solid #ddd; }
figcaption { font-size: 0.8rem; overflow-wrap: anywhere; }
td { padding-right: 1.5rem; } td + td { text-align: right; font-variant-numeric: tabular-nums; }
</style>"""


def write_report(executed: Path, page: Path) -> None:
    """Render an executed notebook as one self-contained web page: contents on top, code folded, no external files.

    nbconvert's own pages fetch MathJax and RequireJS; no notebook of the kit needs them. Links to other notebooks and
    to docs become plain text, since the page is also read without the project's files.
    """
    from nbconvert import HTMLExporter

    nothing = "data:text/javascript,"
    exporter = HTMLExporter(template_file=str(TEMPLATE), exclude_input_prompt=True, exclude_output_prompt=True,
                            mathjax_url=nothing, require_js_url=nothing)
    html = LINK.sub(r"\1", exporter.from_filename(str(executed))[0])
    links = "".join(f'<a href="#{place}">{title.strip()}</a> ' for place, title in HEADING.findall(html))
    html = html.replace("<main>", f'<main>\n<nav class="contents">{links}</nav>', 1)
    write_whole(page, lambda aside: aside.write_text(html, encoding="utf-8"))


def write_index(folder: Path, report: Path | None = None) -> Path:
    """Write a run's `index.html`: its report, metrics, figures, tables and other files.

    Args:
        folder: the run's; its `index.html` links only files that exist.
        report: the report's path; None: `report.html` in the folder.
    """
    report = report or folder / "report.html"
    pages = [report, *sorted(path for path in folder.glob("*.html") if path.name not in ("index.html", report.name))]
    parts = [_list("Pages", [path for path in pages if path.exists()], folder)]
    if figures := sorted((folder / "figures").glob("*.png")):
        parts.append(f'<h2>Figures</h2><div class="figures">{"".join(_figure(path, folder) for path in figures)}</div>')
    if (metrics := folder / "metrics.json").exists():
        values = list(json.loads(metrics.read_text(encoding="utf-8")).items())
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{_number(value)}</td></tr>" for name, value in values[:METRICS])
        more = f"<p>{len(values) - METRICS} more in metrics.json</p>" if len(values) > METRICS else ""
        parts.append(f"<h2>Metrics</h2><table>{rows}</table>{more}")
    parts.append(_list("Tables", sorted(folder.glob("*.csv")), folder))
    parts.append(_list("Settings and provenance", [path for name in ("params.yaml", "environment.txt", "made_from.json")
                                                   if (path := folder / name).exists()], folder))
    kinds = ("*.safetensors", "*.ipynb", "*.txt", "*.tex", "*.md", "*.parquet", "maps/*.nii.gz", "native/*.nii.gz")
    parts.append(_list("Other files", sorted({path for kind in kinds for path in folder.glob(kind)
                                              if path.name != "environment.txt"}), folder))
    return _page(folder / "index.html", shown(folder), parts)


def write_overview(folder: Path, runs: Sequence[tuple[str, Path]]) -> Path:
    """Write the `index.html` of a folder of runs.

    Args:
        folder: the one that holds all runs.
        runs: (name, folder) of each, in the order in which they ran.
    """
    items = "".join(f'<li><a href="{_address(path / "index.html", folder)}">{escape(name)}</a></li>'
                    for name, path in runs)
    parts = [f"<ol>{items}</ol>"]
    for name, path in runs:
        if figures := sorted((path / "figures").glob("*.png"))[:3]:
            drawn = "".join(_figure(each, folder) for each in figures)
            parts.append(f'<h2>{escape(name)}</h2><div class="figures">{drawn}</div>')
    return _page(folder / "index.html", shown(folder), parts)


def _page(path: Path, title: str, parts: Iterable[str]) -> Path:
    head = (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{STYLE}</head>')
    body = "\n".join([f"<h1>{escape(title)}</h1>", *filter(None, parts)])
    return write_whole(path, lambda aside: aside.write_text(f"{head}<body>{body}</body></html>", encoding="utf-8"))


def _list(title: str, paths: Iterable[Path], folder: Path) -> str:
    items = "".join(f'<li><a href="{_address(path, folder)}">{escape(_name(path, folder))}</a></li>' for path in paths)
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _figure(path: Path, folder: Path) -> str:
    address = _address(path, folder)
    return (f'<figure><a href="{address}"><img loading="lazy" src="{address}" alt="{escape(path.stem)}"></a>'
            f"<figcaption>{escape(path.stem)}</figcaption></figure>")


def _address(path: Path, folder: Path) -> str:
    """A link that survives moving the folder, if the file lies in it."""
    return quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else path.resolve().as_uri()


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else shown(path)


def _number(value: object) -> str:
    if value is None:  # nan or infinite, see `Run.metrics`
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return escape(str(value))
