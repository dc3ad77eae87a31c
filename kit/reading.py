"""Read and check parameters from a notebook's cells, YAML or a command line; one message reports all problems."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kit.cells import CellError, current_values
from kit.errors import KitError
from kit.runs import resolve, shown


class ParameterError(KitError, ValueError):
    """Parameters or the files that they name cannot be used; the message lists everything that is wrong."""


def _resolved(value: Any) -> Any:
    if value == "":
        raise ValueError("an empty path; name a file or folder")
    return resolve(value) if isinstance(value, str | Path) else value


ProjectPath = Annotated[Path, BeforeValidator(_resolved)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Shape = tuple[Positive, Positive, Positive]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Parameters(BaseModel):
    """Base of all notebooks' parameters: unknown names are errors, and relative paths start at the project's root."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    may_change: ClassVar[frozenset[str]] = frozenset({"workers"})  # may differ when a run is resumed
    feeds_others: ClassVar[bool] = True  # whether other notebooks read this one's output

    output_dir: ProjectPath  # folder of this run

    @property
    def run_dir(self) -> Path:
        """The folder of this run: `output_dir`, or a folder inside it."""
        return self.output_dir

    def problems(self) -> list[str]:
        """Problems with the files that the parameters name, checked before any work."""
        return []

    def plain(self) -> dict[str, Any]:
        """The parameters as YAML values, with paths as `kit.runs.shown` writes them."""
        return {name: _plain(value) for name, value in self}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each parameter that has one, as YAML values."""
        return {name: _plain(field.get_default(call_default_factory=True)) for name, field in cls.model_fields.items()
                if not field.is_required()}

    def table(self) -> Any:
        """All parameters as a folded HTML table: value, default, and what each one means."""
        from IPython.display import HTML

        meaning, fields, rows = meanings(type(self)), type(self).model_fields, []
        for name, value in self.plain().items():
            default = "" if fields[name].is_required() else _text(_plain(fields[name].default))
            cells = [name, _text(value), "" if default == _text(value) else default, meaning.get(name, "")]
            rows.append("".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in cells))
        head = "".join(f"<th>{title}</th>" for title in ("parameter", "value", "default, if different", "meaning"))
        return HTML(f"<details><summary>{len(rows)} parameters</summary><table><tr>{head}</tr>"
                    f"{''.join(f'<tr>{row}</tr>' for row in rows)}</table></details>")


Model = TypeVar("Model", bound=BaseModel)


def meanings(model: type[Parameters]) -> dict[str, str]:
    """Read what each field means from the comments beside or above it, those of base classes included."""
    found = {}
    for kind in reversed([each for each in model.__mro__ if issubclass(each, Parameters)]):
        source = inspect.getsource(kind)
        comments = {token.start[0]: token.string.lstrip("# ") for token in
                    tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
        whole = {number for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
        for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = node.lineno - 1
                while above in whole:
                    above -= 1
                lines = [*range(above + 1, node.lineno), *range(node.lineno, (node.end_lineno or node.lineno) + 1)]
                found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def read(model: type[Model]) -> Model:
    """Read and check the running notebook's parameters.

    Takes the names assigned in the notebook's cells whose first line is ``# Parameters``, as last run: the cell of
    defaults, and the one that papermill injects.

    Raises:
        ParameterError: lists every unknown name, wrong type, impossible value and unusable file; or a value differs
            from what its cell says; or papermill's cell ran before the other one.
    """
    try:
        values = current_values(sys.modules["IPython"].get_ipython())
    except CellError as error:
        raise ParameterError(str(error)) from None
    return check(model, values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read names and values from a YAML file.

    Raises:
        ParameterError: the file is missing, is not UTF-8 or YAML, does not map names to values, repeats a name, or
            has numbers that YAML reads as other numbers.
    """
    if path == "":
        raise ParameterError("the parameter file's name is empty; perhaps a variable of the shell is not set")
    path = resolve(path)
    if not path.is_file():
        raise ParameterError(f"{shown(path)}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"{shown(path)} cannot be read as UTF-8 text: {error}") from None
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ParameterError(f"{shown(path)} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParameterError(f"{shown(path)}: expected `name: value` lines, found a {type(values).__name__}")
    if misread := _misread(yaml.compose(text, yaml.SafeLoader)):
        raise ParameterError(f"{shown(path)}: {_listing(misread)}")
    return values


def read_options(options: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read names and values from a command line; each value is YAML.

    Raises:
        ParameterError: lists values that are empty or not YAML, numbers that YAML reads as other numbers, and text
            that YAML reads in part as a comment.
    """
    values, problems = {}, []
    for name, text in options:
        text = text.lstrip("\ufeff")
        if not text.strip():  # null to YAML: an unset variable of the shell would select the default
            problems.append(f"{name}: got an empty value; write null for none, or '\"\"' for an empty text")
            continue
        try:
            values[name], tokens = yaml.safe_load(text), list(yaml.scan(text, yaml.SafeLoader))
            problems += _misread(yaml.compose(text, yaml.SafeLoader), name)
            between = (text[one.end_mark.index:other.start_mark.index] for one, other in pairwise(tokens))
            if "\n" not in text.strip() and (lost := " ".join("".join(between).split())):  # what no token holds
                problems.append(f"{name}: YAML reads {text!r} as {values[name]!r} and drops {lost!r} as a comment; "
                                "put quotes inside the quotes, as in \"'run #1'\"")
        except yaml.YAMLError as error:
            problems.append(f"{name}: {text!r} is not YAML: {str(error).splitlines()[0]}")
    if problems:
        raise ParameterError(_listing(problems))
    return values


def filled(value: Any, choice: Mapping[str, Any]) -> Any:
    """Fill the values of a choice into a parameter: `runs/seed{seed}` with {"seed": 1} becomes `runs/seed1`.

    Texts in lists and tables are filled, too; names in tables are not.
    """
    if isinstance(value, list):
        return [filled(item, choice) for item in value]
    if isinstance(value, dict):
        return {key: filled(item, choice) for key, item in value.items()}
    for name, chosen in choice.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", str(chosen))
    return value


OCTAL, SIXTIES = re.compile(r"[-+]?0[0-7_]+"), re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def _misread(node: yaml.Node | None, name: str = "") -> list[str]:
    """Problems with numbers that YAML 1.1 reads differently from a person, and with repeated names."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        return [f"{_dotted(name, key)}: is given twice" for key in twice] + [
            fault for key, value in node.value for fault in _misread(value, _dotted(name, str(key.value)))]
    if isinstance(node, yaml.SequenceNode):
        return [fault for place, item in enumerate(node.value) for fault in _misread(item, _dotted(name, str(place)))]
    if node is None or not node.tag.endswith((":int", ":float")):
        return []
    text, read = node.value, yaml.safe_load(node.value)
    if OCTAL.fullmatch(text):
        return [f"{name}: YAML reads {text} as {read} (octal); write {int(text)} for the number, "
                f"'{text}' in quotes for text"]
    if SIXTIES.fullmatch(text):
        return [f"{name}: YAML reads {text} as {read} (base 60, like minutes); write {read} for the number, "
                f"'{text}' in quotes for text"]
    return []


def _dotted(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def check(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Build the model, then check the files that it names.

    Raises:
        ParameterError: lists everything that is wrong.
    """
    params = built(model, values)
    # `kit.augment.recipe` checks recipes here, too; they are no Parameters, and name no files
    if isinstance(params, Parameters) and (problems := _of_the_sample(params) or params.problems()):
        raise ParameterError(_listing(problems))
    return params


def built(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Build the model from these values, without checking the files that it names.

    Raises:
        ParameterError: lists unknown names, wrong types and impossible values.
    """
    try:
        params = model.model_validate(dict(values))
    except ValidationError as error:
        raise ParameterError(_listing([_wording(model, fault) for fault in error.errors()])) from None
    if odd := _odd(values, dict(params)):
        raise ParameterError(_listing(odd))
    return params


def _of_the_sample(params: Parameters) -> list[str]:
    """Problems with paths still at their defaults, the sample's runs in outputs/quick, when the cohort is another."""
    values, quick = dict(params), resolve("outputs/quick")
    source = next((name for name in ("prepared", "cohort", "input") if values.get(name) is not None), "")
    if not source or values[source] == "sample" or _is_within(values[source], quick):
        return []
    if source == "input" and _is_within(values[source], resolve("outputs/sample")):
        return []  # a scan of the sample
    paths = {name: list(value.values()) if isinstance(value, dict) else [value] for name, value in values.items()}
    return [f"{name}: {shown(resolve(path))} belongs to the sample cohort, but {source} does not; give your own"
            for name, found in paths.items() for path in found
            if _is_within(path, quick) and (name != "output_dir" or params.feeds_others)]


def _is_within(value: Any, folder: Path) -> bool:
    return isinstance(value, str | Path) and resolve(value).is_relative_to(folder)


def _odd(given: Any, read: Any, name: str = "") -> list[str]:
    """Problems with values that pydantic accepts and nobody means: true for a number.

    Args:
        given: the values.
        read: what the model made of them.
        name: dotted name of the part that is checked.
    """
    read = dict(read) if isinstance(read, BaseModel) else read
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        return [fault for key, value in given.items() for fault in _odd(value, read[key], _dotted(name, str(key)))]
    if isinstance(given, list | tuple) and isinstance(read, list | tuple):
        return [fault for place, (value, part) in enumerate(zip(given, read, strict=True))
                for fault in _odd(value, part, _dotted(name, str(place)))]
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        return [f"{name}: got {str(given).lower()}, which would count as {read:g}; write a number"]
    return []


def _wording(model: type[BaseModel], fault: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = model.model_fields if len(fault["loc"]) == 1 else ()  # names of nested models are not looked up
        near = difflib.get_close_matches(name, known, n=1)
        return f"{name}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] == "missing":
        return f"{name}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name}: got {fault['input']!r}; {message[0].lower() + message[1:]}"


def _listing(problems: list[str]) -> str:
    head = "1 thing is wrong" if len(problems) == 1 else f"{len(problems)} things are wrong"
    return f"{head}:\n  " + "\n  ".join(problems)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return shown(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    value = dict(value) if isinstance(value, BaseModel) else value
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _text(value: Any) -> str:
    """A value as it stands in a YAML file, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
