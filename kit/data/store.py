"""Prepared scans on disk: a folder with an index and one blosc2 array a scan.

``index.csv`` (a scan a row, with labels and quality figures), ``failed.csv``, ``preparation.json`` (the record of how
all of them were prepared) and ``scans/<scan>.b2nd``: (2, depth, height, width) float16, the z-scored image and its
mask, compressed by LZ4 after bit-shuffling. Crops are read without reading the whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pandas as pd

from kit.data.grid import Grid
from kit.runs import shown, write_whole

FORMAT = 1  # of the arrays and their metadata
CHUNK_DEPTH = 32  # slices that are compressed together

Crop = tuple[slice, slice, slice]


class StoreError(RuntimeError):
    """Prepared scans are missing or damaged; the message names the file and what to do."""


@dataclass
class Store:
    """A folder of prepared scans. Open one with `Store.open`.

    Attributes:
        folder: where it lies.
        index: one scan a row: scan, participant, session, dataset, labels, brain_ml, template_similarity, checksum.
        record: how the scans were prepared: axes, shape, spacing_mm, origin_mm, registration, mask, intensity, ...
        grid: where the arrays lie in MNI152 millimetres.
    """

    folder: Path
    index: pd.DataFrame
    record: dict[str, Any]
    grid: Grid
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Open a folder that 1_preprocess made.

        Raises:
            StoreError: the folder lacks its index or record, or is of another format.
        """
        folder = Path(folder)
        for name in ("index.csv", "preparation.json"):
            if not (folder / name).is_file():
                raise StoreError(f"{shown(folder)} holds no {name}; run 1_preprocess first")
        record = json.loads((folder / "preparation.json").read_text())
        if record.get("format") != FORMAT:
            raise StoreError(f"{shown(folder)} has format {record.get('format')}, this kit reads {FORMAT}; "
                             "prepare the scans again")
        index = pd.read_csv(folder / "index.csv", low_memory=False,
                            dtype={"scan": str, "participant": str, "session": str, "dataset": str, "checksum": str})
        return cls(folder, index, record, Grid(record["shape"], record["spacing_mm"]))

    def read(self, scan: str, crop: Crop | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read a scan, or a box of it.

        The checksum is verified when a scan is first read whole.

        Args:
            scan: its name in the index.
            crop: slices along (z, y, x); the whole without one.

        Returns:
            image (depth, height, width) float16, zero outside the mask; mask (depth, height, width) bool.

        Raises:
            StoreError: the scan's file is missing or damaged.
        """
        path = scan_path(self.folder, scan)
        try:
            array = blosc2.open(str(path), mode="r")
            both = array[(slice(None), *(crop or (slice(None),) * 3))]
            expected = array.schunk.vlmeta["checksum"]
        except Exception as error:  # blosc2 raises several kinds for a damaged file
            raise StoreError(f"{shown(path)} cannot be read ({type(error).__name__}); "
                             "delete it and run 1_preprocess again") from None
        if crop is None and scan not in self._verified:
            if checksum(both) != expected:
                raise StoreError(f"{shown(path)} is damaged: its checksum differs; delete it and run 1_preprocess again")
            self._verified.add(scan)
        return both[0], both[1] != 0


def scan_path(folder: Path, scan: str) -> Path:
    """File of a prepared scan."""
    return Path(folder) / "scans" / f"{scan}.b2nd"


def checksum(array: np.ndarray) -> str:
    """16 hex digits of the array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def write_scan(path: str | Path, image: np.ndarray, mask: np.ndarray, meta: dict[str, Any]) -> str:
    """Write a prepared scan, whole or not at all.

    Args:
        path: of the file, see `scan_path`.
        image: (depth, height, width) float; stored as float16, zero outside the mask.
        mask: (depth, height, width) bool.
        meta: JSON values kept with the array: the scan's name, its transform, what it was made from.

    Returns:
        the checksum, which is kept with the array too.
    """
    both = np.stack([np.where(mask, image, 0), mask]).astype(np.float16)
    chunk = (1, min(CHUNK_DEPTH, both.shape[1]), *both.shape[2:])
    settings = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.BITSHUFFLE], "clevel": 5, "nthreads": 1}
    found = checksum(both)

    def write(aside: Path) -> None:
        array = blosc2.asarray(both, urlpath=str(aside), mode="w", chunks=chunk, cparams=settings)
        for name, value in {**meta, "format": FORMAT, "checksum": found}.items():
            array.schunk.vlmeta[name] = value

    write_whole(path, write)
    return found


def read_meta(path: Path) -> dict[str, Any] | None:
    """What is kept with a prepared scan; None where the file is missing or cannot be read."""
    try:
        meta = blosc2.open(str(path), mode="r").schunk.vlmeta
        return {name: meta[name] for name in meta}
    except Exception:  # blosc2 raises several kinds for a damaged file
        return None
