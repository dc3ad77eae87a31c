"""The committed notebooks: executed in order, short cells, few unchecked outputs, nothing of one machine in them."""

import ast
import re

import nbformat
import pytest

from kit.cells import from_papermill
from kit.execute import FOLDER, defaults
from kit.params import NOTEBOOKS

BOOKS = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NOTEBOOKS}
each = pytest.mark.parametrize("name", BOOKS)


def code(name):
    return [cell for cell in BOOKS[name].cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_all_notebooks_have_parameters():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@each
def test_executed_from_top_to_bottom(name):
    assert [cell.execution_count for cell in code(name)] == list(range(1, len(code(name)) + 1))
    assert not [out for cell in code(name) for out in cell.outputs if out.output_type == "error"]


@each
def test_cells_are_short(name):
    long = {cell.id: cell.source.count("\n") + 1 for cell in code(name) if cell.source.count("\n") >= 25}
    assert not long, f"{name}: cells of more than 25 lines"


@each
def test_at_most_a_third_of_the_outputs_are_unchecked(name):
    ignored = [cell for cell in code(name) if "nbval-ignore-output" in tags(cell)]
    assert len(ignored) <= len([cell for cell in code(name) if cell.outputs]) / 3
    assert not {tag for cell in code(name) for tag in tags(cell)} - {"parameters", "nbval-ignore-output"}


@each
def test_parameters_are_the_models_own(name):
    cell, = (cell for cell in code(name) if "parameters" in tags(cell))
    assert cell.source.startswith("# Parameters\n")
    assert not from_papermill(cell.source), "a comment tells it from the cell that papermill injects"
    NOTEBOOKS[name].model_validate(defaults(name))
    optional = {field for field, info in NOTEBOOKS[name].model_fields.items() if not info.is_required()}
    needed = set(NOTEBOOKS[name].model_fields) - optional
    assert needed <= set(defaults(name)), "a needed parameter is not shown"


@each
def test_opens_with_a_promise_and_closes_with_where_things_lie(name):
    first = BOOKS[name].cells[0].source
    assert first.startswith(f"# {name[0]} · ")
    assert all(f"| **{word}** |" in first for word in ("in", "out", "takes"))
    last = [cell for cell in BOOKS[name].cells if cell.cell_type == "markdown"][-1]
    assert last.source.startswith("## ") and re.search("Where things lie", last.source)


@each
def test_every_figure_is_saved_and_small(name):
    size = (FOLDER / f"{name}.ipynb").stat().st_size
    assert size < 1_500_000, f"{size / 1e6:.1f} MB: too large to be read on a code host"
    assert any("image/png" in out.get("data", {}) for cell in code(name) for out in cell.outputs)


def bound(node):
    """Names that a cell's statement binds in the notebook: not those of functions, lambdas and comprehensions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    names = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del) else set()
    if isinstance(node, ast.alias):
        names = {(node.asname or node.name).partition(".")[0]}
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        names = {node.name}
    return names.union(*map(bound, ast.iter_child_nodes(node)))


def test_what_a_statement_binds():
    code = ("import a.b, c as d\nfor e, (f, *g) in h:\n    i = j\nwith k as l: pass\ntry: pass\nexcept m as n: pass\n"
            "def o(p): q = 1\nr = [s for s in t]\nu += 1\nif (v := w): pass\nx: int = 1\ny.z = 1")
    assert bound(ast.parse(code)) == set("adefgilnoruvx")


@each
def test_no_cell_rebinds_a_parameter(name):
    """Or a cell that reads the parameters again would read what the other one left."""
    fields = set(NOTEBOOKS[name].model_fields)
    for cell in code(name):
        if "parameters" not in tags(cell):
            assert not bound(ast.parse(cell.source)) & fields, cell.source


@each
def test_nothing_of_one_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/tmp/|/home/|/root/|/work/|/Users/", text)
    assert not re.search(r"\?(it|scan|step)/s\]", text), "a progress bar stands frozen"


@each
def test_the_kit_does_the_work(name):
    """No shell, no eval, no absolute path, no function of more than a few lines."""
    for cell in code(name):
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)
        for node in ast.walk(ast.parse(cell.source)):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"))
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 12
