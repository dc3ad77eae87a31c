"""Check a notebook's parameters and print its run's folder: run_folder.py NOTEBOOK PARAMS [-p NAME VALUE]..."""

import sys
from pathlib import Path

import yaml

from kit.execute import defaults
from kit.params import NOTEBOOKS
from kit.reading import ParameterError, check, read_yaml


def main(notebook: str, params: str, *overrides: str) -> int:
    name = Path(notebook).stem
    if name not in NOTEBOOKS:
        print(f"{notebook}: the notebooks are {', '.join(NOTEBOOKS)}", file=sys.stderr)
        return 2
    if len(overrides) % 3 or any(flag != "-p" for flag in overrides[::3]):
        print(f"expected -p NAME VALUE, got {' '.join(overrides)}", file=sys.stderr)
        return 2
    values = {name: yaml.safe_load(value) for name, value in zip(overrides[1::3], overrides[2::3], strict=True)}
    try:
        print(check(NOTEBOOKS[name], {**defaults(name), **read_yaml(Path.cwd() / params), **values}).output_dir)
    except ParameterError as error:
        print(f"{params}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
