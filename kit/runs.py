"""A run's folder: what a notebook writes, each file atomically.

``params.yaml`` (enough to run again), ``environment.txt``, ``metrics.json`` (flat names to numbers, and the
fingerprint), ``made_from.json``, ``figures/*.png`` and the notebook's own files. One writer at a time holds ``.lock``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kit.errors import KitError
from kit.machine import Lock

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
LOCK_SECONDS = 600  # how long a requeued job waits for the lock that its dead node held: file servers notice in minutes
UMASK = os.umask(0o022)  # the mode bits that this process keeps from new files; reading it means setting it
os.umask(UMASK)
# files that a run overwrites or deletes; in a folder without params.yaml they are somebody else's. Executed notebooks
# and their pages are left out, as a job may put them there before the run
WRITTEN = ("*.csv", "*.json", "*.safetensors", "*.parquet", "*.npy", "environment.txt", "summary.txt", "table.md",
           "table.tex", "figures/*", "maps/*", "checkpoints/*")
MADE_FROM = "made_from.json"  # what a run's results were made from; see `kit.provenance`


class RunError(KitError, RuntimeError):
    """A run folder cannot be used; the message says whether it has another writer or other parameters."""


def outputs_dir() -> Path:
    """Folder of all runs: ``$KIT_OUTPUTS``, or ``outputs`` at the project's root."""
    return Path(os.environ.get("KIT_OUTPUTS") or ROOT / "outputs").resolve()


def resolve(path: str | Path) -> Path:
    """Make a path absolute: relative ones start at the project's root, and ``outputs/...`` follows ``$KIT_OUTPUTS``."""
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    if path.parts[:1] == ("outputs",):
        return outputs_dir().joinpath(*path.parts[1:])
    return ROOT / path


def shown(path: str | Path) -> str:
    """Write a path relative to the project, the same on every machine (the inverse of `resolve`)."""
    path = Path(path)
    for folder, prefix in ((outputs_dir(), Path("outputs")), (ROOT, Path())):
        inside = path.is_relative_to(folder)
        if inside and (prefix.parts or path.relative_to(folder).parts[:1] != ("outputs",)):
            return (prefix / path.relative_to(folder)).as_posix()
    return path.as_posix()


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Write a file atomically: `write(aside)` writes a temporary file, which is fsynced and renamed.

    The file gets the permissions that the umask allows; safetensors' `save_file` alone would make it readable by its
    owner only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{platform.node()}-{os.getpid()}{path.suffix}")
    try:
        write(aside)
        status, wanted = aside.stat(), 0o666 & ~UMASK
        if wanted & ~status.st_mode and status.st_nlink == 1:  # a link has its source's mode
            aside.chmod(stat.S_IMODE(status.st_mode) | wanted)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically."""
    return write_whole(path, lambda aside: aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def write_table(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a CSV atomically, with text in quotes and without row numbers; `kit.cohort.tabular.read_table` reads it."""
    table = table.astype({name: str for name in table.select_dtypes(bool)})
    return write_whole(path, lambda aside: table.to_csv(aside, index=False, quoting=csv.QUOTE_NONNUMERIC))


def progress(items: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> Any:
    """A tqdm bar with the time left, removed when it is done; ``KIT_PROGRESS=off`` hides all bars.

    Set it where a notebook's outputs are compared or committed: the file would keep the bar as first drawn, at 0 %.
    """
    from tqdm.auto import tqdm

    hidden = disable or os.environ.get("KIT_PROGRESS") == "off"
    return tqdm(items, leave=False, disable=hidden, **options)


def environment() -> str:
    """Python, machine type and the installed packages with their versions, one per line."""
    lines = [f"python=={platform.python_version()}", f"machine {platform.machine()} {platform.system()}"]
    return "\n".join(lines + sorted({_named(dist) for dist in metadata.distributions()}, key=str.lower)) + "\n"


def _named(dist: metadata.Distribution) -> str:
    """A package with its version, or its folder if its metadata cannot be read."""
    try:
        name, version = dist.metadata["Name"], dist.metadata["Version"]
    except Exception:  # damaged metadata may raise anything
        name, version = "", ""
    folder = Path(getattr(dist, "_path", "a package")).name
    return f"{name}=={version}" if name and version else f"{folder} (its metadata are broken)"


def link_whole(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system has no hard links."""
    def link(aside: Path) -> None:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:  # exFAT, some SMB shares
            shutil.copyfile(source, aside)

    if not (target.exists() and target.samefile(source)):
        write_whole(target, link)


def _has_begun(folder: Path) -> bool:
    """Whether a run's folder holds results or a checkpoint; until it does, its parameters may change.

    What a run writes before that (figures, what it reads, its curve so far) is written again. Executed notebooks and
    the logs of jobs are no results.
    """
    before = {"params.yaml", "environment.txt", "figures", "plan", MADE_FROM, "made_from.csv", "damaged.csv",
              "tensorboard", "live.json", "stop", "preempted"}
    return any(path.name not in before and not path.name.startswith(".")  # .lock, .ipynb_checkpoints
               and path.suffix not in (".ipynb", ".html", ".out", ".err", ".log") for path in folder.iterdir())


def _of_others(folder: Path) -> list[str]:
    """Files in a folder without params.yaml that a run would overwrite or delete; shards merge into a run's folder."""
    if (folder / "preparation.json").exists():
        return []
    return sorted(path.relative_to(folder).as_posix() for pattern in WRITTEN for path in folder.glob(pattern)
                  if not path.name.startswith("."))


def _take(folder: Path) -> Lock:
    """Lock a run's folder; a job that Slurm has requeued waits for it, because its node may have died with the lock.

    Raises:
        RunError: another process holds it.
    """
    waits = LOCK_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0
    begun, said = time.monotonic(), False
    while True:
        try:
            return Lock.take(folder / ".lock")
        except BlockingIOError:
            if time.monotonic() - begun >= waits:
                raise RunError(f"{shown(folder)}: another process is writing this run; "
                               "wait for it, or give another output_dir") from None
        if not said:
            print(f"{shown(folder)}: another process holds this run, perhaps on the node that this requeued job had "
                  f"before; waiting for at most {waits / 60:g} minutes", flush=True)
            said = True
        time.sleep(min(5.0, waits))


class Run:
    """A run folder that this process holds until its last `Run` is closed or deleted. Open one with `Run.open`."""

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder = folder
        self._lock: Lock | None = lock

    @classmethod
    def open(cls, folder: str | Path, params: Mapping[str, Any], may_change: frozenset[str] = frozenset(),
             defaults: Mapping[str, Any] | None = None) -> Run:
        """Take the folder for these parameters; the same parameters resume what is there.

        Args:
            folder: the run's folder, created if absent.
            params: resolved parameters, plain YAML values.
            may_change: names that may differ when a run is resumed (such as ``workers``).
            defaults: values assumed for parameters that a stored `params.yaml` lacks because an older kit wrote it.

        Raises:
            RunError: another process holds the folder, or it contains a run with other parameters that has begun
                (every difference is listed), or files that are no run's.
        """
        folder = resolve(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(folder)
        stored = folder / "params.yaml"
        if not stored.exists() and (others := _of_others(folder)):
            raise RunError(f"{shown(folder)} has no params.yaml, so it is no run of the kit, which could overwrite or "
                           f"delete {', '.join(others[:3])}; give another output_dir, or move these files")
        if stored.exists() and _has_begun(folder) and (
                listed := other_parameters(stored, params, may_change, defaults or {}, "the folder")):
            raise RunError(f"{shown(folder)} holds a run with other parameters:\n  {listed}\n"
                           "give another output_dir, or delete that folder")
        text = yaml.safe_dump(dict(params), sort_keys=False)
        write_whole(stored, lambda aside: aside.write_text(text, encoding="utf-8"))
        write_whole(folder / "environment.txt", lambda aside: aside.write_text(environment(), encoding="utf-8"))
        return cls(folder, lock)

    @classmethod
    def of(cls, params: Any) -> Run:
        """Take the folder that a notebook's parameters name; see `open`."""
        return cls.open(params.run_dir, params.plain(), params.may_change, params.defaults())

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def close(self) -> None:
        """Release the folder, unless this process has another `Run` of it. Deleting the object does the same."""
        self._lock = None

    def figure(self, figure: Figure, name: str) -> Figure:
        """Save `figures/<name>.png` and return the figure, to be shown."""
        write_whole(self.folder / "figures" / f"{name.replace('/', '%2F')}.png",
                    lambda aside: figure.savefig(aside, format="png", bbox_inches="tight"))
        return figure

    def metrics(self, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Add flat names and numbers to `metrics.json`, nan and infinity as null; return all that it now holds.

        Its `fingerprint` is that of `made_from.json`, if the run has one.
        """
        path, made_from = self.folder / "metrics.json", self.folder / MADE_FROM
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.update({name: None if value is None or not math.isfinite(value) else float(value)
                      for name, value in values.items()})
        if made_from.exists():
            known["fingerprint"] = json.loads(made_from.read_text(encoding="utf-8"))["fingerprint"]
        write_json(path, known)
        return known


def other_parameters(stored: Path, params: Mapping[str, Any], may_change: frozenset[str], defaults: Mapping[str, Any],
                     where: str) -> str:
    """List what a run's `params.yaml` has other than these parameters; see `Run.open` and `differences`."""
    old, new = ({name: value for name, value in values.items() if name not in may_change} for values in
                ({**defaults, **(yaml.safe_load(stored.read_text(encoding="utf-8")) or {})}, params))
    return differences(old, new, where)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str, within: str = "") -> str:
    """List differences between stored and requested parameters, one line each, nested ones by dotted name."""
    lines = []
    for name in {**old, **new}:
        one, other = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines.append(differences(one, other, where, f"{within}{name}."))
        elif one != other:
            lines.append(f"{within}{name}: {where} has {one!r}, asked for {other!r}")
    return "\n  ".join(filter(None, lines))
