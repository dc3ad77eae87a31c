"""What is computed once for each scan and kept in a file: features, volumes, voxels.

The file's name ends in a digest of the kit's version and of whatever else determines the values, such as the atlas or
the encoder's weights. Its keys are the scans' names and checksums. If any of these changes, the values are computed
again; a change of code within one version goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

import kit
from kit.runs import write_whole
from kit.store.store import Store

SAVED_TOGETHER = 512  # scans between two saves: what a killed run loses at most

Scan = TypeVar("Scan")


def measured_file(folder: Path, what: str, *made_with: object) -> Path:
    """Path of the file for these values.

    Args:
        what: the beginning of the file's name.
        made_with: what else determines the values; each `repr` must be complete, and the same in every run.
    """
    digest = hashlib.blake2b(repr((kit.__version__, *made_with)).encode(), digest_size=6).hexdigest()
    return folder / f"{what}-{digest}.safetensors"


def key_in_file(store: Store, scan: str) -> str:
    """A scan's key in the file: its name and its array's checksum."""
    return f"{scan} {store.checksum(scan):08x}"


def measured(scans: Mapping[str, Scan], measure: Callable[[list[Scan]], Iterable[np.ndarray]],
             path: Path | None) -> dict[str, np.ndarray]:
    """Measure those scans that the file lacks, `SAVED_TOGETHER` at a time, and add them to it.

    Args:
        scans: what `measure` takes for each scan, by `key_in_file`.
        measure: returns an array for each scan, in order.
        path: of the file, see `measured_file`; None keeps nothing.

    Returns:
        all arrays of the file by key: those of `scans`, and any others there.
    """
    known = load_file(path) if path and path.exists() else {}
    todo = [key for key in scans if key not in known]
    for start in range(0, len(todo), SAVED_TOGETHER):
        keys = todo[start:start + SAVED_TOGETHER]
        known.update(zip(keys, measure([scans[key] for key in keys]), strict=True))
        if path:  # another shard may have written to it meanwhile
            known.update((load_file(path) if path.exists() else {}) | known)
            write_whole(path, lambda aside: save_file(known, aside))  # gigabytes, so not by way of memory
    return known
