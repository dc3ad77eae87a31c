"""The kit's own errors, as a notebook shows them."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import kit
from kit.errors import KitError
from kit.train.stop import Stopped


def errors() -> list[type[Exception]]:
    """All exception classes of the kit's modules."""
    modules = [importlib.import_module(each.name) for each in pkgutil.walk_packages(kit.__path__, "kit.")
               if each.name != "kit.__main__"]
    return list({found for module in modules for _, found in inspect.getmembers(module, inspect.isclass)
                 if issubclass(found, Exception) and found.__module__.startswith("kit.")})


def test_all_errors_for_people_are_kit_errors():
    for_people = [each for each in errors() if each.__name__.endswith("Error") and each.__name__ != "CellError"]
    assert len(for_people) > 20 and all(issubclass(each, KitError) for each in for_people)
    assert not issubclass(Stopped, KitError)  # asked for, no fault


@pytest.mark.parametrize(("line", "short"), [("raise MisfitError('prepared: another grid; prepare again')", True),
                                             ("raise ValueError('a fault of ours')", False)])
def test_a_notebook_shows_the_message_alone(line, short):
    shell = InteractiveShell()
    with capture_output() as said:
        shell.run_cell(f"from kit.provenance import MisfitError\n{line}")
    assert ("Traceback" not in said.stdout + said.stderr) == short
    if short:
        assert said.stdout.strip().splitlines() == ["MisfitError: prepared: another grid; prepare again"]


def test_they_travel_between_processes():
    from kit.reading import ParameterError

    again = pickle.loads(pickle.dumps(ParameterError("epochs: got -1")))
    assert isinstance(again, ParameterError) and isinstance(again, ValueError) and str(again) == "epochs: got -1"
