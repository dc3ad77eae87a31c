"""The `# Parameters` cells of the running notebook: which of them count, and the values they set."""

from __future__ import annotations

import ast
import io
import linecache
import tokenize
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kit.errors import KitError

MARK = "# Parameters"  # the whole first line of a notebook's own cell, and of the cell that papermill injects


class CellError(KitError, ValueError):
    """A value differs from what its cell says; the message says which cell to run again."""


def current_values(shell: Any) -> dict[str, Any]:
    """Names assigned in a notebook's parameters cells, with their current values.

    Args:
        shell: IPython's.

    Raises:
        CellError: a value differs from what its cell says, or papermill's cell ran before the notebook's own.
    """
    sources, values = _cells_that_count(shell), {}
    said = literals(sources)
    for name in assigned_names(sources):
        values[name] = shell.user_ns.get(name)
        if name in said and (type(said[name]) is not type(values[name]) or said[name] != values[name]):
            raise CellError(f"{name}: the cell `{MARK}` says {said[name]!r}, but another cell has set it to "
                            f"{_short(values[name])}; run that cell again, then this one")
    return values


def assigned_names(sources: Iterable[str]) -> list[str]:
    """Names that the cells' sources assign, in order, each once; not those inside functions."""
    return list({name: None for source in sources for node in ast.parse(source).body for name in _targets(node)})


def literals(sources: Iterable[str]) -> dict[str, Any]:
    """Each name's value, where its last assignment is a literal.

    Left out are names last set by an expression, and names that a later statement mentions, as it may change them in
    place. An assignment to other names without a call cannot, and does not count.
    """
    values: dict[str, Any] = {}
    for node in (node for source in sources for node in ast.parse(source).body):
        value = None  # from `+=`, `for` and tuples no single value can be read
        if isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Assign)
                                               and all(isinstance(each, ast.Name) for each in node.targets)):
            value = node.value
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        may_change = value is None or any(isinstance(each, ast.Call) for each in ast.walk(value))
        for name in used if may_change else _targets(node):
            values.pop(name, None)
            if value is not None:
                with suppress(ValueError, TypeError):
                    values[name] = ast.literal_eval(value)
    return values


def _targets(node: ast.stmt) -> list[str]:
    """Names that a statement assigns, in tuples and in the bodies of `if` and the like, too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [each.id for target in targets if target is not None for each in ast.walk(target)
             if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
    return names + [name for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
                    for name in _targets(child)]


def _cells_that_count(shell: Any) -> list[str]:
    """The notebook's own cell as last run, then the one that papermill injected, if any."""
    cells = shell.history_manager.input_hist_raw
    if MARK not in map(_first_line, cells):  # no history, as under nbval: IPython keeps sources for tracebacks, too
        cells = ["".join(entry[2]) for entry in linecache.cache.values() if len(entry) == 4 and entry[1] is None]
    ran = [cell for cell in cells if _first_line(cell) == MARK]
    if not ran and (alike := [first for first in map(_first_line, cells) if first.startswith(MARK)]):
        raise CellError(f"the first line of the cell `{alike[-1]}` must be `{MARK}` and no more, or its values do not "
                        "count: correct and run it, then this one")
    if ran and not _parses(ran[-1]):
        raise CellError(f"the cell `{MARK}` was last run with a mistake in it: run it again, then this one")
    ran = [cell for cell in ran if _parses(cell)]
    own = [place for place, cell in enumerate(ran) if not from_papermill(cell)][-1:]
    injected = [place for place, cell in enumerate(ran) if from_papermill(cell)][-1:]
    if own and injected and injected < own:
        raise CellError(f"papermill's cell `{MARK}` ran before the notebook's own, which has overwritten its values: "
                        "run papermill's cell again, then this one (if it was deleted, restart the kernel)")
    return [ran[place] for place in own + injected]


def _first_line(cell: str) -> str:
    return cell.lstrip().partition("\n")[0].rstrip()


def _parses(cell: str) -> bool:
    try:
        ast.parse(cell)
    except SyntaxError:
        return False
    return True


def from_papermill(cell: str) -> bool:
    """Whether papermill wrote this parameters cell: its first line is its only comment."""
    tokens = tokenize.generate_tokens(io.StringIO(cell.strip()).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens) == 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
