"""Checkpoints of a run: `last.pt`, `previous.pt`, `best.pt`, each written atomically, without pickled objects."""

from __future__ import annotations

import errno
import io
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kit.errors import KitError
from kit.runs import differences, link_whole, shown, write_whole

FULL = {errno.ENOSPC, errno.EDQUOT}
AGAIN_SECONDS = 10.0  # between two attempts while the disk is full


class CheckpointError(KitError, RuntimeError):
    """A checkpoint cannot be written or read, or was made with other parameters; the message says what to do."""


def save(folder: Path, state: dict[str, Any], best: bool = False) -> None:
    """Write `last.pt`, keeping the one before as `previous.pt`; with `best`, keep this one as `best.pt` too.

    Args:
        folder: of the checkpoints.
        state: tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only=True`.
        best: whether the monitored value is the best so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # serialise in memory first: `torch.save` to a file hides ENOSPC
    torch.save(state, buffer)
    new = write_whole(folder / "new.pt", lambda aside: aside.write_bytes(buffer.getbuffer()))
    if best:
        link_whole(new, folder / "best.pt")
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(new, folder / "last.pt")


class Saver:
    """Write a run's checkpoints when they are due, and keep trying for a while if the disk is full.

    Args:
        folder: of the run; None writes nothing.
        minutes: between two checkpoints.
        retry_minutes: how long the disk may stay full before the run gives up.
    """

    def __init__(self, folder: Path | None, minutes: float, retry_minutes: float) -> None:
        self.folder, self.minutes, self.retry_minutes = folder, minutes, retry_minutes
        self._saved = self._tried = time.monotonic()
        self._full_since: float | None = None
        for aside in (folder / "checkpoints").glob(".*.pt") if folder else []:  # left by a killed process
            aside.unlink()

    def due(self) -> bool:
        """Whether a checkpoint is due, or a failed one should be tried again."""
        now = time.monotonic()
        if self.folder is None:
            return False
        if self._full_since is not None:
            return now - self._tried >= AGAIN_SECONDS
        return now - self._saved > 60 * self.minutes

    def save(self, state: dict[str, Any], best: bool = False, wait: bool = False,
             also: Callable[[], Any] | None = None) -> bool:
        """Write a checkpoint, then call `also`.

        Args:
            state, best: see `save`.
            wait: retry until it is written; otherwise give up on a full disk for now.
            also: writes other files that must stay in step with the checkpoint.

        Returns:
            whether it was written.

        Raises:
            CheckpointError: the disk has been full for `retry_minutes`.
        """
        while self.folder is not None:
            try:
                save(self.folder / "checkpoints", state, best)
                if also:
                    also()
                self._saved, self._full_since = time.monotonic(), None
                return True
            except OSError as error:
                self._failed(self.folder, error)
                if not wait:
                    return False
                time.sleep(AGAIN_SECONDS)
        return False

    def _failed(self, folder: Path, error: OSError) -> None:
        """Warn about a full disk or quota; raise if it has been full for too long, or for any other error."""
        free = shutil.disk_usage(folder).free / 1e6
        if error.errno not in FULL:
            raise error
        self._tried = time.monotonic()
        self._full_since = self._full_since or self._tried
        left = self.retry_minutes - (self._tried - self._full_since) / 60
        kept = folder / "checkpoints/last.pt"
        what = "quota" if error.errno == errno.EDQUOT else "disk"
        word = (f"the {what} is full: no checkpoint could be written to {shown(folder)} ({free:.0f} MB free on its "
                "file system); " + (f"{shown(kept)} stays as it was" if kept.exists() else "there is none yet"))
        if left <= 0:
            raise CheckpointError(f"{word}; gave up after {self.retry_minutes:g} minutes. Make room, then run again "
                                  "to resume") from error
        warnings.warn(f"{word}; trying again for {left:.1f} minutes", stacklevel=3)


def read_checkpoint(folder: Path, name: str | None = None, set_aside: bool = False) -> dict[str, Any] | None:
    """Read the newest readable checkpoint, or the named one; None if there is no such file.

    Args:
        folder: of the checkpoints.
        name: `best`, for instance; None takes `last`, or `previous` if `last` cannot be read, which a warning says.
        set_aside: rename a `last.pt` that cannot be read to `last.damaged.pt`, which later checkpoints do not
            overwrite.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
        OSError, MemoryError: the disk or the machine failed; the file may be whole, so it is not set aside.
    """
    damaged: dict[Path, str] = {}
    for path in [folder / f"{name}.pt"] if name else [folder / "last.pt", folder / "previous.pt"]:
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # another process has just set it aside
            continue
        except (OSError, MemoryError):  # of the disk or the machine: the file may be whole
            raise
        except Exception as error:  # torch raises several kinds of error for a damaged file
            damaged[path] = type(error).__name__
            continue
        for bad, kind in damaged.items():
            if set_aside:
                os.replace(bad, bad.with_suffix(".damaged.pt"))
            warnings.warn(f"{shown(bad)} cannot be read ({kind}); "
                          + ("it is kept as last.damaged.pt" if set_aside else "this process leaves it as it is")
                          + f", and {path.name} is used", stacklevel=2)
        return state
    if damaged:
        listed = " and ".join(f"{shown(path)} ({kind})" for path, kind in damaged.items())
        raise CheckpointError(f"{listed} cannot be read. Restore one from a backup to resume, or remove "
                              f"{shown(folder)} to start again")
    return None


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights to keep from a checkpoint: their moving average if there is one."""
    average = {name.removeprefix("module."): value for name, value in state.get("average", {}).items()
               if name.startswith("module.")}
    return average or state["model"]


def check_same(state: dict[str, Any], params: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint made with other parameters; those that it does not hold are not compared.

    Raises:
        CheckpointError: lists every difference.
    """
    then = state.get("params", {})
    if listed := differences(then, {name: value for name, value in params.items() if name in then}, "the checkpoint"):
        raise CheckpointError(f"{shown(folder / 'checkpoints')} were made with other parameters:\n  {listed}\n"
                              "give another output_dir, or delete that folder")
