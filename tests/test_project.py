"""The project's own promises: one list of dependencies, commands that exist, budgets that add up."""

import importlib
import re
import sysconfig
import tomllib
from importlib import metadata

import pytest
import yaml

from kit.execute import steps_of
from kit.params import NOTEBOOKS
from kit.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
NAMED = {re.match(r"[\w.-]+", line).group().lower(): line for line in [*PROJECT["dependencies"], *EXTRAS]}
LOCK = dict(line.lower().split("==") for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#"))
CARD = {"jupyterlab", "torch", "monai", "nibabel", "nilearn", "matplotlib", "ipywidgets", "papermill", "pytest",
        "nbval"}


def plainly(name):
    """A package's name as indexes compare it: fill_voids and fill-voids are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_every_dependency_within_its_range():
    requirement = pytest.importorskip("packaging.requirements").Requirement
    assert set(NAMED) >= CARD
    for name, line in NAMED.items():
        assert name in LOCK, f"requirements.lock does not pin {name}"
        assert requirement(line).specifier.contains(LOCK[name]), f"{line} against {LOCK[name]}"
    assert LOCK["torch"] == "2.13.0"


def test_the_kit_runs_without_what_tests_and_benchmarks_need():
    extras = {re.match(r"[\w-]+", line).group().replace("-", "_") for line in EXTRAS} | {"importlinter"}
    named = {name for path in (ROOT / "kit").rglob("*.py")
             for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert extras and not extras & named


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_name_only_what_is_there(module):
    importlib.import_module(f"benchmarks.{module}")


def test_every_dependency_says_what_it_is_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in [*PROJECT["dependencies"], *EXTRAS]:
        assert re.search(rf'"{re.escape(line)}",\s+# \w', text), f"{line}: no reason beside it"


def test_the_lock_is_what_is_installed():
    # of this environment alone: once setuptools is imported (torch.compile does), sys.path has its own old copies
    places = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    installed = {dist.metadata["Name"].lower(): dist.version.partition("+")[0]
                 for dist in metadata.distributions(path=places) if dist.metadata["Name"]}
    differ = {name: (version, installed.get(name)) for name, version in LOCK.items() if installed.get(name) != version}
    assert not differ, "run `make clean setup`: the tests must run on what the lock pins"


def test_the_lock_holds_what_its_packages_need():
    """Without setuptools, which `pip freeze` leaves out, and what torch needs, which differs between its builds."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    locked, missing = {plainly(name) for name in LOCK}, {}
    for name in sorted(set(LOCK) - {"torch"}):
        needs = map(requirement, metadata.requires(name) or [])
        here = {plainly(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})}
        missing |= {need: name for need in here - locked - {"setuptools"}}
    assert not missing, "add these to requirements.lock, each needed by the package beside it"


def test_conda_takes_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    python, pip = (next(part for part in environment if str(part).startswith(name)) for name in ("python=", "pip"))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11) and pip == "pip"
    assert environment[-1] == {"pip": ["-r requirements.lock", "-e ."]}


def test_readme_names_every_command_and_no_other():
    makefile = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    readme = set(re.findall(r"`make ([a-z]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert readme <= set(makefile)
    assert set(makefile) - {"help", "setup"} <= readme


def test_the_demo_fits_in_its_fifteen_minutes():
    folder = ROOT / "params" / "demo"
    budget = yaml.safe_load((folder / "budget.yaml").read_text(encoding="utf-8"))
    assert {f"{name}.yaml" for name in budget} == {path.name for path in folder.glob("[0-9]*.yaml")}
    assert list(budget) == sorted(budget) and {name[0] for name in budget} == {name[0] for name in NOTEBOOKS}
    assert sum(step.seconds / step.at_once for step in steps_of(folder)) <= 15 * 60


