"""Run notebooks headless: parameters checked first, papermill, then an HTML report beside the results.

    python -m kit.execute 2_pretrain -f params/paper/2_pretrain.yaml -p epochs 10
    python -m kit.execute 2_pretrain -f params/paper/2_pretrain.yaml --check   # only say where it would write
    python -m kit.execute params/demo        # every file of a folder that its budget.yaml names, in that order

With `--output FILE.ipynb` the executed notebook and its report, `FILE.html`, go there; else into the run's folder.
Relative paths start at the project's root; `outputs/...` lies in $KIT_OUTPUTS, if set.
Plain `papermill notebooks/2_pretrain.ipynb OUTPUT.ipynb -f FILE.yaml` does the same without the report.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby, product
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any, NamedTuple, cast

import nbformat
import yaml

from kit.cells import assigned_names, from_papermill, literals
from kit.errors import KitError
from kit.machine import keep_to, shares_of_cores
from kit.params import NOTEBOOKS, Benchmark
from kit.reading import ParameterError, Parameters, built, check, filled, read_options, read_yaml
from kit.report import write_index, write_overview, write_report
from kit.runs import ROOT, Run, RunError, resolve, shown

FOLDER = ROOT / "notebooks"


def defaults(notebook: str) -> dict[str, Any]:
    """The values in a notebook's `parameters` cell, which holds literals only.

    Raises:
        ParameterError: an expression stands there, or the cell cannot be told from papermill's.
    """
    cells = nbformat.read(FOLDER / f"{notebook}.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    if from_papermill(source):
        raise ParameterError(f"{notebook}: the cell `# Parameters` needs a comment besides its first line, by which it "
                             "is told from the cell that papermill adds")
    values = literals([source])
    if others := [name for name in assigned_names([source]) if name not in values]:
        raise ParameterError(f"{notebook}: in the cell `# Parameters`, {', '.join(others)} must be plain values")
    return values


def parameters(notebook: str, values: dict[str, Any]) -> Parameters:
    """A notebook's checked parameters: these values over its defaults.

    Raises:
        ParameterError: all that is wrong, in one message.
    """
    return check(NOTEBOOKS[notebook], {**defaults(notebook), **values})


def run(notebook: str, values: dict[str, Any], output: Path | None = None, log: bool = False,
        bar: dict[str, Any] | None = None) -> Path:
    """Execute a notebook with these parameters over its defaults.

    Args:
        notebook: its name, one of `kit.params.NOTEBOOKS`.
        values: of its parameters.
        output: the executed notebook, see `kit.runs.resolve`; None: it lies in the run's folder.
        log: print what its cells print, for the log of a job, instead of a bar.
        bar: tqdm's options for the bar.

    Returns:
        the report, beside the executed notebook.

    Raises:
        ParameterError, RunError: before the notebook starts.
        papermill.exceptions.PapermillExecutionError: a cell failed; the notebook so far is written, and the report, if
            it can be.
    """
    import papermill

    params = parameters(notebook, values)
    Run.of(params).close()  # another run's folder is refused here, not after the kernel has started
    executed = resolve(output) if output else params.run_dir / f"{notebook}.ipynb"
    page = executed.with_suffix(".html") if output else params.run_dir / "report.html"
    executed.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").addFilter(_is_not_unknown_parameter)
    if log:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        papermill.execute_notebook(FOLDER / f"{notebook}.ipynb", executed, values, cwd=ROOT, kernel_name="python3",
                                   progress_bar=not log and (bar or True), log_output=log,
                                   autosave_cell_every=0,  # else a full disk ends the task that reads outputs
                                   extra_arguments=["--log-level=ERROR"])  # of the kernel, not its cells
    except BaseException:
        try:
            _write_pages(executed, page, params.run_dir)
        except Exception as error:  # such as a full disk; why the notebook failed counts more
            print(f"kit.execute: no report is written: {error}", file=sys.stderr)
        raise
    _write_pages(executed, page, params.run_dir)
    return page


def _write_pages(executed: Path, page: Path, folder: Path) -> None:
    """Write the report of an executed notebook, if it was begun, and its run's index."""
    if executed.exists():
        write_report(executed, page)
        write_index(folder, page)


def _is_not_unknown_parameter(record: logging.LogRecord) -> bool:
    """Log filter: False for papermill's warning of a parameter that the notebook's cell leaves out."""
    return not record.getMessage().startswith("Passed unknown parameter: ")


def fill(values: dict[str, Any], bar: dict[str, Any] | None = None) -> Path:
    """Compute a shard's cells of `5_benchmark` in this process, without the notebook.

    Args:
        values, bar: see `run`.

    Returns:
        the shard's folder.

    Raises:
        ParameterError, MisfitError, LeakageError, ...: before any work; see `kit.evaluate.benchmark.run_benchmark`.
        RunError: another process is filling this table from other inputs or parameters; checked before each cell.
        TrainingError: some cells could not be trained; all others are done.
        Stopped: it was asked to stop; the same parameters resume it.
    """
    from kit.evaluate.benchmark_cells import fill_cells

    params = cast(Benchmark, parameters("5_benchmark", values))
    record = Run.of(params)
    try:
        fill_cells(params, record, bar)
    finally:
        record.close()
    return params.run_dir


class Step(NamedTuple):
    """One run of a folder of parameter files."""

    name: str
    notebook: str
    values: dict[str, Any]
    seconds: float  # expected
    file: str
    at_once: int  # runs of this file
    shards: int


def steps_of(folder: Path) -> list[Step]:
    """The runs that a folder's `budget.yaml` names, in its order.

    Each entry gives a file's name, without .yaml, the seconds that a run should take on two cores, or a table of:
        seconds: of each run.
        each: names and lists of values, all combinations of which are run; `{name}` in the file's other values is
            replaced by the value.
        at_once: how many of these run side by side, each on its share of the cores; for small networks this is a
            sixth faster than one after the other on all cores.
        shards: for `5_benchmark`, number of processes that compute cells side by side; one more run makes the tables.

    Raises:
        ParameterError: the folder has none, or an entry says something else.
    """
    if not (folder / "budget.yaml").exists():
        raise ParameterError(f"{shown(folder)}: no budget.yaml, which lists the files to run and their seconds; "
                             f"run a single file: NOTEBOOK -f {shown(folder)}/NOTEBOOK.yaml")
    steps, budget = [], read_yaml(folder / "budget.yaml")
    if not budget:
        raise ParameterError(f"{shown(folder)}/budget.yaml: is empty; give lines such as `2_pretrain: 60`, the seconds")
    for name, entry in budget.items():
        entry = entry if isinstance(entry, dict) else {"seconds": entry}
        file, each = folder / f"{name}.yaml", entry.get("each", {})
        lists = isinstance(each, dict) and all(isinstance(values, list) and values for values in each.values())
        counts = all(isinstance(entry.get(key, 1), int) and entry.get(key, 1) > 0 for key in ("at_once", "shards"))
        if (set(entry) - {"seconds", "each", "at_once", "shards"} or not lists or not counts
                or not isinstance(entry.get("seconds"), int | float)):
            raise ParameterError(f"{shown(folder)}/budget.yaml: {name}: got {entry}; give seconds, or "
                                 "{seconds: ..., each: {seed: [0, 1]}, at_once: 2}")
        can_shard = notebook_of(file) == "5_benchmark"
        if entry.get("shards", 1) > 1 and (entry.get("at_once", 1) > 1 or not can_shard):
            raise ParameterError(f"{shown(folder)}/budget.yaml: {name}: got {entry}; shards are for 5_benchmark, and "
                                 "not beside at_once: they run side by side already")
        values = read_yaml(file)
        for chosen in product(*each.values()):
            choice = dict(zip(each, chosen, strict=True))
            own = {key: filled(value, choice) for key, value in values.items()} | choice
            words = [name, *(f"{key} {value}" for key, value in choice.items())]
            steps.append(Step(" ".join(words), notebook_of(file), own, entry["seconds"], name,
                              entry.get("at_once", 1), entry.get("shards", 1)))
    return steps


def run_folder(folder: Path) -> None:
    """Execute what a folder's `budget.yaml` names, see `steps_of`, then print where things lie.

    Raises:
        ParameterError: see `steps_of`; or a value cannot be used, or two runs would write to one folder.
        RunError: one of several runs side by side failed; those already started were allowed to finish.
    """
    steps, lines, started = steps_of(folder), [], time.monotonic()
    writers: dict[Path, str] = {}
    for step in steps:  # all values are checked before the first run, but not files that earlier steps will make
        where = built(NOTEBOOKS[step.notebook], {**defaults(step.notebook), **step.values}).run_dir
        if where in writers:
            raise ParameterError(f"{shown(folder)}/budget.yaml: {writers[where]} and {step.name} would both write to "
                                 f"{shown(where)}; give each its own output_dir, such as outputs/seed{{seed}}")
        writers[where] = step.name
    for _, group in groupby(enumerate(steps, start=1), key=lambda numbered: numbered[1].file):
        lines += _run_file(list(group), len(steps))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.", end=" ")
    _say_where(lines)


def _say_where(lines: Sequence[tuple[str, float, Path]]) -> None:
    """Write the overview of runs (name, seconds, folder of each), and print where things lie, losses and summaries."""
    folders = [where for *_, where in lines]
    above, overview = Path(os.path.commonpath(folders)), folders[-1] / "index.html"  # a run's own
    if above not in folders and above != above.parent:  # no run's folder, nor the root of the disks
        with suppress(OSError):  # perhaps not ours to write to
            overview = write_overview(above, [(name, where) for name, _, where in lines])
    print(f"To open in a browser: {shown(overview)}, or a report, each with its executed notebook beside it:")
    for name, seconds, where in lines:
        print(f"  {seconds:5.0f} s  {name:28s} {shown(where / 'report.html')}")
    print()
    for name, _, where in lines:
        if (where / "log.csv").exists():
            print(f"  {name}: {_losses(where / 'log.csv')}")
    for name, _, where in lines:
        if (summary := where / "summary.txt").exists():
            print(f"\n{name}\n{summary.read_text(encoding='utf-8')}")


def _run_file(numbered: Sequence[tuple[int, Step]], total: int) -> list[tuple[str, float, Path]]:
    """Run the steps of one parameter file, numbered among `total`; return each one's name, seconds and folder."""
    lines, at_once = [], numbered[0][1].at_once
    for number, step in numbered:
        print(f"\n[{number}/{total}] {step.name}, about {step.seconds:.0f} s", flush=True)
        if step.at_once == 1:
            begun = time.monotonic()
            if step.shards > 1:
                _side_by_side([step._replace(values={**step.values, "shards": step.shards, "shard": shard},
                                             name=f"{step.name} {shard + 1}/{step.shards}")
                               for shard in range(step.shards)], step.shards)
            where = run(step.notebook, step.values).parent
            lines.append((step.name, time.monotonic() - begun, where))
    return lines if at_once == 1 else _side_by_side([step for _, step in numbered], at_once)


def _side_by_side(steps: Sequence[Step], at_once: int) -> list[tuple[str, float, Path]]:
    """Run steps in processes of their own, each on its share of the cores; after a failure no other is started."""
    places: Queue[tuple[int, set[int]]] = Queue()
    for place in enumerate(shares_of_cores(at_once)):
        places.put(place)

    failed = Event()

    def one(step: Step) -> tuple[str, float, Path]:
        (bar_row, cores), begun = places.get(), time.monotonic()
        try:
            if not failed.is_set():
                _run_on(step, bar_row, cores)
        except BaseException:
            failed.set()
            raise
        finally:
            places.put((bar_row, cores))
        return step.name, time.monotonic() - begun, parameters(step.notebook, step.values).run_dir

    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(one, step) for step in steps]
        try:
            return [run.result() for run in runs]
        except BaseException:  # Ctrl-C too, which the runs have heard as well
            failed.set()
            raise


def _run_on(step: Step, bar_row: int, cores: set[int]) -> None:
    """Run a step in another process, on these cores, with its bar in this row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.yaml"
        file.write_text(yaml.safe_dump(step.values), encoding="utf-8")
        # a benchmark's shards only compute cells; the run that follows them makes the tables and figures
        cells = ["--cells"] if step.notebook == "5_benchmark" and step.values.get("shards", 1) > 1 else []
        process = subprocess.Popen([sys.executable, "-m", "kit.execute", step.notebook, "-f", str(file), *cells,
                                    "--line", str(bar_row), step.name], stdout=subprocess.DEVNULL)
        keep_to(process.pid, cores)  # it is still importing; its kernel inherits them
        if code := process.wait():
            raise RunError(f"{step.name}: failed with exit code {code}; see its output above")


def _losses(log: Path) -> str:
    """The first and last loss of a training run, in words; an epoch of fine-tuning is `check_steps` steps."""
    with log.open(encoding="utf-8", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return f"loss {losses[0]:.2f} in the first, {losses[-1]:.2f} in the last of {len(losses)} epochs"


def notebook_of(file: Path) -> str:
    """The notebook that a parameter file is for: `2_pretrain_mae.yaml` belongs to `2_pretrain`.

    Raises:
        ParameterError: the file's name starts with no notebook's.
    """
    for notebook in NOTEBOOKS:
        if file.stem.startswith(notebook):
            return notebook
    raise ParameterError(f"{shown(file)}: its name must start with a notebook's: {', '.join(NOTEBOOKS)}")


def main() -> int:
    """Run the command line; see the module's docstring.

    Returns:
        the exit status: 0; 2 if parameters, inputs or a cell of `--cells` are at fault; 3 if `--cells` was asked to
        stop. A notebook that fails raises, which ends with 1.
    """
    parser = argparse.ArgumentParser(prog="python -m kit.execute", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="?", help="a notebook's name or file, or a folder of parameter files")
    parser.add_argument("-f", "--file", help="YAML file of parameters")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("-o", "--output", type=Path, help="the executed notebook; its report lies beside it")
    parser.add_argument("--log", action="store_true", help="print what the cells print, for the log of a job")
    parser.add_argument("--cells", action="store_true", help="5_benchmark only: compute a shard's cells, and no tables")
    parser.add_argument("--line", nargs=2, help=argparse.SUPPRESS)  # row and name of the bar, from `_run_on`
    parser.add_argument("--check", action="store_true", help="check the parameters and print the run's folder")
    arguments = parser.parse_args()
    try:
        if arguments.what and resolve(arguments.what).is_dir():
            if any(value for name, value in vars(arguments).items() if name != "what"):
                parser.error("a folder is run as its files say, without options; name a notebook with -f FILE instead")
            run_folder(resolve(arguments.what))
        elif (notebook := Path(arguments.what or "").name.removesuffix(".ipynb")) in NOTEBOOKS:
            given, own = Path(arguments.what), FOLDER / f"{notebook}.ipynb"
            spelled = [place.with_suffix(".ipynb") for place in (given, resolve(given))]
            if (given.is_file() or given.parent != Path()) and not any(
                    each.is_file() and each.samefile(own) for each in spelled):
                parser.error(f"{arguments.what} is not {shown(own)}, and only the kit's own notebooks are run; give "
                             f"{notebook}, or run your copy with papermill")
            values = {} if arguments.file is None else read_yaml(arguments.file)
            values.update(read_options(arguments.parameter))
            bar = {"position": int(arguments.line[0]), "desc": arguments.line[1]} if arguments.line else None
            if arguments.cells and notebook != "5_benchmark":
                parser.error("--cells is for 5_benchmark")
            if arguments.check:
                print(parameters(notebook, values).run_dir)
            else:
                done = (fill(values, bar) if arguments.cells
                        else run(notebook, values, arguments.output, arguments.log, bar))
                print(shown(done))
        else:
            parser.error(f"name a notebook ({', '.join(NOTEBOOKS)}) or a folder of parameter files")
    except KitError as error:
        print(f"kit.execute: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from kit.train.stop import Stopped  # imports pandas, not needed to refuse a mistake in parameters

        if not isinstance(error, Stopped):
            raise
        print(f"kit.execute: {error}; the same parameters resume it", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
