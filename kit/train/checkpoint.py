"""Checkpoints of a run: `last.pt`, `previous.pt`, `best.pt`, each whole or not at all, without pickle."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from kit.runs import shown, write_whole


def save(folder: Path, state: dict[str, Any], best: bool = False) -> None:
    """Write `last.pt` and keep the one before it; with `best`, keep this one as `best.pt` too.

    Args:
        folder: of the checkpoints.
        state: tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only=True`.
        best: whether the monitored value was never better.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = write_whole(folder / "new.pt", lambda aside: torch.save(state, aside))
    if best:
        (folder / "best.new.pt").unlink(missing_ok=True)
        os.link(new, folder / "best.new.pt")
        os.replace(folder / "best.new.pt", folder / "best.pt")
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(new, folder / "last.pt")


def load(folder: Path, name: str | None = None) -> dict[str, Any] | None:
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
