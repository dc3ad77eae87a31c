"""Parameters from a notebook's cells or a YAML file, refused where they cannot be used, all faults in one message."""

from __future__ import annotations

import ast
import difflib
import linecache
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kit.runs import resolve, shown


class ParameterError(ValueError):
    """Parameters or the files that they name cannot be used; the message lists everything that is wrong."""


def _resolved(value: Any) -> Any:
    return resolve(value) if isinstance(value, str | Path) and str(value) else value


ProjectPath = Annotated[Path, BeforeValidator(_resolved)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Shape = tuple[Positive, Positive, Positive]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Parameters(BaseModel):
    """What all notebooks share: unknown names are errors, and paths mean the project's root."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    may_change: ClassVar[frozenset[str]] = frozenset({"workers"})

    output_dir: ProjectPath

    def problems(self) -> list[str]:
        """What is wrong with the files that the parameters name; looked at before any work."""
        return []

    def plain(self) -> dict[str, Any]:
        """The parameters as YAML values, paths as the project's people write them."""
        return {name: _plain(value) for name, value in self}


Model = TypeVar("Model", bound=Parameters)


def read(model: type[Model]) -> Model:
    """The running notebook's parameters, checked.

    Takes the names assigned in the notebook's cells that start with ``# Parameters`` (the cell of defaults
    and the one that papermill injects) and their present values.

    Raises:
        ParameterError: with every unknown name, wrong type, impossible value and unusable file.
    """
    shell = sys.modules["IPython"].get_ipython()
    # IPython keeps each cell's source here, for tracebacks. `In` lacks cells run without history, as nbval runs them.
    cells = ["".join(entry[2]) for entry in linecache.cache.values() if len(entry) == 4 and entry[1] is None]
    sources = [cell for cell in cells if cell.lstrip().startswith("# Parameters")]
    return check(model, {name: shell.user_ns[name] for name in assigned_names(sources)})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Names and values of a YAML file.

    Raises:
        ParameterError: the file is missing, is no YAML, or does not map names to values.
    """
    path = resolve(path)
    if not path.is_file():
        raise ParameterError(f"{shown(path)}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ParameterError(f"{shown(path)} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParameterError(f"{shown(path)}: expected `name: value` lines, found a {type(values).__name__}")
    return values


def check(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Build the model, then look at the files that it names.

    Raises:
        ParameterError: one message that lists all that is wrong.
    """
    try:
        params = model.model_validate(dict(values))
    except ValidationError as error:
        raise ParameterError(_listing([_wording(model, fault) for fault in error.errors()])) from None
    if problems := getattr(params, "problems", list)():  # a recipe has nothing outside itself to check
        raise ParameterError(_listing(problems))
    return params


def assigned_names(sources: Iterable[str]) -> list[str]:
    """Names assigned at the top level of the cells' sources, in order, each once."""
    names: dict[str, None] = {}
    for source in sources:
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update({target.id: None for target in targets if isinstance(target, ast.Name)})
    return list(names)


def _wording(model: type[Parameters], fault: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1)
        return f"{name}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] == "missing":
        return f"{name}: missing"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{name}: got {fault['input']!r}; {message}"


def _listing(problems: list[str]) -> str:
    head = "1 thing is wrong" if len(problems) == 1 else f"{len(problems)} things are wrong"
    return f"{head}:\n  " + "\n  ".join(problems)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return shown(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
