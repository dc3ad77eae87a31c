"""Manage the tables of a prepared folder: scan names, `index.csv`, `failed.csv`, and merging shards into one folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.cohort.tabular import read_table
from kit.errors import KitError
from kit.machine import NO_LOCKS
from kit.preprocess.quality import QC_METRICS, flagged
from kit.runs import link_whole, shown, write_table
from kit.store.store import claim, read_index, scan_path

# QUALITY_COLUMNS come from the notes in each scan's file; ADDED are all of the index's columns besides the cohort's.
QUALITY_COLUMNS = ("mask_source", *QC_METRICS, "seconds")
FAILED = ("scan", "participant", "session", "dataset", "image_path", "reason")  # columns of failed.csv
ADDED = ("scan", *QUALITY_COLUMNS, "header_note", "flags", "unusable")

MISSING = "no such file"  # a scan's reason if its file is missing; `mask: no such file` if its mask is
FEW = 5  # up to this many missing files in a shard may be chance; more suggest an unmounted disk


class PreparationError(KitError, ValueError):
    """A preparation cannot start, was stopped by a failing disk, or prepared nothing; the message says why."""


def scan_names(cohort: pd.DataFrame) -> list[str]:
    """Name each row dataset_participant_session.

    All but A-Z, a-z, 0-9, dot and hyphen become hyphens, so two may collide.
    """
    parts = cohort[["dataset", "participant", "session"]].fillna("").astype(str)
    safe = parts.map(lambda part: re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-."))
    return ["_".join(filter(None, row)) for row in safe.itertuples(index=False)]


def check_cohort(cohort: pd.DataFrame, names: list[str], mask: str) -> None:
    """Check a cohort before its preparation starts, given the setting `mask`.

    Raises:
        PreparationError: listing every problem.
    """
    wrong = []
    folded = pd.Series(names, dtype=str).str.casefold()
    if folded.duplicated().any():
        twice = sorted({names[row] for row in np.flatnonzero(folded.duplicated())})
        some = ", ".join(twice[:5]) + " ..." * (len(twice) > 5)
        wrong.append(f"several rows are called {some}: each needs its own dataset, participant and session, distinct "
                     "in A-Z (in any case), 0-9, dot and hyphen (others become hyphens)")
    if taken := sorted(set(ADDED) & set(cohort)):
        wrong.append(f"columns that the index adds itself: {', '.join(taken)}; rename them in the cohort")
    if mask == "given" and ("mask_path" not in cohort or not cohort["mask_path"].fillna("").any()):
        wrong.append("mask: 'given' needs a column mask_path; otherwise use 'auto'")
    if wrong:
        raise PreparationError("; ".join(wrong))


def write_tables(cohort: pd.DataFrame, names: list[str], outcomes: Mapping[str, dict[str, Any] | str], folder: Path,
                 brain_ml: tuple[float, float] | None = None, part: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return the index of prepared scans and the table of failed ones.

    Args:
        cohort: one scan a row.
        names: the scans' names.
        outcomes: each scan's QC metrics, or the reason why it failed.
        folder: where `index.csv` and `failed.csv` are written. The index has no paths; `failed.csv` has the image_path
            of failed scans.
        brain_ml: see `kit.preprocess.quality.flagged`.
        part: whether the cohort is a shard of a larger one, so that it may have no good scan.

    Raises:
        PreparationError: no scan was prepared. Nothing is written if the folder already has an index of prepared scans
            (the disk with the scans may only be unmounted), or if all files of a shard are missing, and they are more
            than `FEW` or none of their folders exists (else it would be merged without them). Otherwise the tables are
            written, and a shard raises nothing.
    """
    table = cohort.reset_index(drop=True)
    table.insert(0, "scan", names)
    found = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, dict)}
    good = np.array([name in found for name in names], dtype=bool)
    index = table[good].drop(columns=[name for name in table if name.endswith("_path")]).reset_index(drop=True)
    for column in QUALITY_COLUMNS:
        index[column] = [found[name][column] for name in index["scan"]]
    index["header_note"] = [found[name].get("header_note", "") for name in index["scan"]]  # absent in older ones
    failed = table[~good].reset_index(drop=True)
    failed["reason"] = [outcomes[name] for name in failed["scan"]]
    index, failed = flagged(index, brain_ml), failed[list(FAILED)]
    if index.empty:
        none = (f"none of {len(failed)} scans could be prepared; the first, {failed.scan[0]}: {failed.reason[0]} "
                f"({failed.image_path[0]})")
        if _lists_scans(folder / "index.csv"):
            raise PreparationError(f"{none}. {shown(folder / 'index.csv')} lists scans prepared earlier and is kept: "
                                   "is the disk with the scans' files mounted? To give up those scans, delete this "
                                   "index.csv")
        missing, folders = failed["reason"].str.endswith(MISSING), {Path(path).parent for path in failed["image_path"]}
        if part and missing.all() and (len(failed) > FEW or not any(folder.exists() for folder in folders)):
            raise PreparationError(f"{none}. All have this reason: is the disk with the scans' files mounted on this "
                                   "node? The shard is not merged. Run it again where they are, or correct the "
                                   "cohort's paths")
    write_table(folder / "failed.csv", failed)
    write_table(folder / "index.csv", index)
    if index.empty and not part:
        raise PreparationError(none)
    return index, failed


def _lists_scans(path: Path) -> bool:
    """Return whether there is an index with at least one scan."""
    return path.is_file() and len(path.read_text(encoding="utf-8").splitlines()) > 1


def shard_of(cohort: pd.DataFrame, shard: int, shards: int, mask: str = "auto") -> pd.DataFrame:
    """Return one shard of a cohort: the scans whose names' hashes fall to it.

    So each shard mixes the sites, and adding, deleting or sorting rows leaves every other scan in its shard. Sizes
    vary: of 60,000 scans in 100 shards by a standard deviation of 4 %, of 1,000 in 200 by 45 %.

    Raises:
        PreparationError: a shard would be empty, two scans would have one name, or none has the mask that
            `mask: given` asks for.
    """
    names = scan_names(cohort)
    check_cohort(cohort, names, mask)  # `prepare` sees one shard only
    home = _shards(names, shards)
    if empty := sorted(set(range(shards)) - set(home)):
        most = next(fewer for fewer in range(shards - 1, 0, -1) if len(set(_shards(names, fewer))) == fewer)
        raise PreparationError(f"shards: {len(cohort)} scans leave {len(empty)} of {shards} shards empty "
                               f"({_some(empty)}), as the hashes of their names assign them; use at most {most}")
    return cohort[[each == shard for each in home]].reset_index(drop=True)


def _shards(names: list[str], shards: int) -> list[int]:
    """Return each scan's shard."""
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % shards for name in names]


def _some(numbers: list[int]) -> str:
    """Write at most ten numbers."""
    return ", ".join(map(str, numbers[:10])) + ", ..." * (len(numbers) > 10)


def set_aside_merged(cohort: pd.DataFrame, folder: str | Path, record: dict[str, Any]) -> None:
    """Rename a merged `index.csv` of other scans or settings to `index.old.csv` before a shard starts, and say so.

    So nobody trains on the old index if a shard never ends. An index without the files that say what it was made of is
    renamed too. Several shards may do this at once.

    Args:
        cohort: the whole cohort.
        folder: the folder of the merged preparation.
        record: from `kit.preprocess.settings.Preparation.record`.
    """
    folder, path = Path(folder), Path(folder) / "index.csv"
    if not path.is_file():
        return
    with _locked(folder), suppress(FileNotFoundError):  # without locks: another shard has just renamed it
        try:
            before = json.loads((folder / "preparation.json").read_text(encoding="utf-8"))
            there, wanted = set(_outcomes(folder)), set(scan_names(cohort))
            differ = [f"{name}: {before.get(name)} there, {record[name]} asked" for name in record
                      if name != "versions" and before.get(name) != record[name]]
            if there != wanted:
                differ.append(f"{len(wanted - there)} scans are new, {len(there - wanted)} no longer in the cohort")
            fault = f"is of another preparation ({'; '.join(differ)})" if differ else ""
        except FileNotFoundError as error:
            fault = f"cannot be compared with this preparation (no {Path(error.filename).name})"
        if fault:
            path.replace(folder / "index.old.csv")
            print(f"{shown(path)} {fault}: renamed to index.old.csv until all shards are merged")


def merge_shards(cohort: pd.DataFrame, folder: str | Path, shards: int,
                 brain_ml: tuple[float, float] | None = None) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Merge the shards in `<folder>/shards` into the folder once all are done; the last to finish does it.

    Scans are hard-linked to the shards' (copied if the file system has no hard links), so either can be deleted.
    Labels are those of `cohort`. Scans are flagged again, against the whole cohort. Merging twice, or concurrently,
    gives the same folder.

    Args:
        cohort: the whole cohort.
        folder: the folder of the merged preparation.
        shards: the number of shards.
        brain_ml: see `kit.preprocess.quality.flagged`.

    Returns:
        The index and the failed scans, in the cohort's order; None, after printing why, while a shard is missing or
        holds the scans of another cohort (an older one, say), or if shards were prepared with different settings.

    Raises:
        PreparationError: no scan of any shard was prepared.
    """
    folder = Path(folder)
    parts = [folder / "shards" / f"{shard}-of-{shards}" for shard in range(shards)]
    if missing := [shard for shard, part in enumerate(parts) if not (part / "index.csv").is_file()]:
        print(f"not merged yet: waiting for {len(missing)} of {shards} shards ({_some(missing)}); the last to finish "
              "merges all. Run those that failed again")
        return None
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        records = [json.loads((part / "preparation.json").read_text(encoding="utf-8")) for part in parts]
        if differ := sorted({name for record in records for name in record
                             if name != "versions" and record[name] != records[0].get(name)}):
            print(f"shards of different preparations ({', '.join(differ)}) are not merged: prepare all of them again")
            return None
        names, outcomes = scan_names(cohort), [_outcomes(part) for part in parts]
        wanted: list[set[str]] = [set() for _ in parts]
        for name, shard in zip(names, _shards(names, shards), strict=True):
            wanted[shard].add(name)
        if others := [part.name for part, outcome, own in zip(parts, outcomes, wanted, strict=True)
                      if set(outcome) != own]:
            print(f"shards of another cohort ({', '.join(others)}) are not merged: prepare them again")
            return None
        claim(folder, records[0])
        for part, outcome in zip(parts, outcomes, strict=True):
            for scan, found in outcome.items():
                if isinstance(found, dict):
                    link_whole(scan_path(part, scan), scan_path(folder, scan))
        return write_tables(cohort, names, {scan: found for each in outcomes for scan, found in each.items()}, folder,
                            brain_ml)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the merged folder; without locks, shards that end together merge twice, which is harmless."""
    with open(folder / ".merge", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _outcomes(part: Path) -> dict[str, dict[str, Any] | str]:
    """Return each scan's QC metrics, or the reason why it failed, from the tables of a shard."""
    index = read_index(part / "index.csv")
    found = index[[name for name in (*QUALITY_COLUMNS, "header_note") if name in index]].to_dict("records")
    failed = read_table(part / "failed.csv", text=FAILED)
    return dict(zip(index["scan"], found, strict=True)) | dict(zip(failed["scan"], failed["reason"], strict=True))
