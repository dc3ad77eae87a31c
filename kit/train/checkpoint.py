"""Checkpoints of a run: `last.pt`, `previous.pt`, `best.pt`, each whole or not at all, without pickle."""

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
from kit.runs import differences, shown, write_whole

FULL = {errno.ENOSPC, errno.EDQUOT}
AGAIN_SECONDS = 10.0  # between two tries on a full disk


class CheckpointError(KitError, RuntimeError):
    """A checkpoint could not be written, or is of other parameters; the message says what to do."""


def save(folder: Path, state: dict[str, Any], best: bool = False) -> None:
    """Write `last.pt` and keep the one before it; with `best`, keep this one as `best.pt` too.

    Args:
        folder: of the checkpoints.
        state: tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only=True`.
        best: whether the monitored value was never better.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # written by Python, a full disk is an OSError that says so; torch's writer says anything
    torch.save(state, buffer)
    new = write_whole(folder / "new.pt", lambda aside: aside.write_bytes(buffer.getbuffer()))
    if best:
        (folder / "best.new.pt").unlink(missing_ok=True)
        os.link(new, folder / "best.new.pt")
        os.replace(folder / "best.new.pt", folder / "best.pt")
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(new, folder / "last.pt")


class Saver:
    """Writes a run's checkpoints when they are due, and outlives a full disk for a while.

    Args:
        folder: of the run; None writes nothing.
        minutes: between two checkpoints.
        retry_minutes: how long a full disk may last before the run gives up.
    """

    def __init__(self, folder: Path | None, minutes: float, retry_minutes: float) -> None:
        self.folder, self.minutes, self.retry_minutes = folder, minutes, retry_minutes
        self._saved = self._tried = time.monotonic()
        self._full_since: float | None = None
        for aside in (folder / "checkpoints").glob(".*.pt") if folder else []:  # of a process that was killed
            aside.unlink()

    def due(self) -> bool:
        """Whether the last checkpoint is old enough, or a failed one should be tried again."""
        now = time.monotonic()
        if self.folder is None:
            return False
        if self._full_since is not None:
            return now - self._tried >= AGAIN_SECONDS
        return now - self._saved > 60 * self.minutes

    def save(self, state: dict[str, Any], best: bool = False, wait: bool = False,
             also: Callable[[], Any] | None = None) -> bool:
        """Write a checkpoint, then what `also` writes.

        Args:
            state, best: see `save`.
            wait: stay until it is written; otherwise a full disk is left for later.
            also: other files that must keep step with the checkpoint.

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
                self._failed(error)
                if not wait:
                    return False
                time.sleep(AGAIN_SECONDS)
        return False

    def _failed(self, error: OSError) -> None:
        """Say what happened; raise when it is no full disk, or has been one for too long."""
        free = shutil.disk_usage(self.folder).free / 1e6
        if error.errno not in FULL:
            raise error
        self._tried = time.monotonic()
        self._full_since = self._full_since or self._tried
        left = self.retry_minutes - (self._tried - self._full_since) / 60
        kept = self.folder / "checkpoints/last.pt"
        word = (f"the disk is full: no checkpoint could be written to {shown(self.folder)} ({free:.0f} MB free); "
                + (f"{shown(kept)} stays as it was" if kept.exists() else "there is none yet"))
        if left <= 0:
            raise CheckpointError(f"{word}; given up after {self.retry_minutes:g} minutes. Make room, then run again: "
                                  "it goes on from there") from error
        warnings.warn(f"{word}; trying again for {left:.1f} minutes", stacklevel=3)


def read_checkpoint(folder: Path, name: str | None = None) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or the named one; None where there is none.

    A checkpoint that cannot be read is named in a warning and left where it is.
    """
    for path in [folder / f"{name}.pt"] if name else [folder / "last.pt", folder / "previous.pt"]:
        if path.exists():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises several kinds for a damaged file
                warnings.warn(f"{shown(path)} cannot be read ({type(error).__name__}); it is left as it is",
                              stacklevel=2)
    return None


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint's run keeps: their moving average where it has one."""
    average = {name.removeprefix("module."): value for name, value in state.get("average", {}).items()
               if name.startswith("module.")}
    return average or state["model"]


def check_same(state: dict[str, Any], params: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of other parameters.

    Raises:
        CheckpointError: every difference is listed.
    """
    if listed := differences(state.get("params", {}), params, "the checkpoint"):
        raise CheckpointError(f"{shown(folder / 'checkpoints')} are of other parameters:\n  {listed}\n"
                              "give another output_dir, or delete that folder")
