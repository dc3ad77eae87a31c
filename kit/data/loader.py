"""Batches of prepared scans, in an order that (seed, epoch) alone decide."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from kit.data.batch import Batch
from kit.data.identity import participant_ids
from kit.data.store import Store, StoreError

# of malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

# Substitutes that are tried for a damaged scan: if all are damaged the store is gone, not a scan.
MOST_DAMAGED = 8
Item = tuple[np.ndarray, np.ndarray, int, float, tuple[str, ...]]  # image, mask, key, label, damaged scans in its place


class LoaderError(RuntimeError):
    """Loading processes could not be started, or one died; the message says what to do."""


def scan_key(scan: str) -> int:
    """63-bit number of a scan's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(scan.encode(), digest_size=8).digest(), "big") >> 1


def keyed(*numbers: int) -> np.random.Generator:
    """Random numbers that these decide, the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


class PreparedScans(Dataset):
    """Rows of a store as a torch dataset; workers open files themselves and share no memory.

    Args:
        store: prepared scans.
        rows: rows of `store.index` to serve, in the order of their numbers here.
        labels: (rows,) float, or None for unlabelled scans.
        skip_damaged: for training: another scan takes a damaged one's place, so that batches keep their size on every
            process, and `load` warns of it by name. It is another scan of the participant; where none can be read,
            one of a participant who is not in the batch, a different one for each that is. So no participant comes
            twice into a batch, and a pair of sessions stays one participant's. Where nobody is left, and without
            `skip_damaged`, a damaged scan is an error. What else is in the batch is known from the scans that are
            asked for together, and of batches that are cut over chunks or processes from `batches`.

    Attributes:
        damaged: how often `load` met each damaged scan, by name.
        batches: the epoch's global batches, which `kit.train.loop` notes here.
    """

    def __init__(self, store: Store, rows: pd.DataFrame, labels: np.ndarray | None = None,
                 skip_damaged: bool = False) -> None:
        self.store = store
        self.skip_damaged, self.damaged = skip_damaged, Counter()
        self.scans, self.participants = rows["scan"].tolist(), participant_ids(rows).tolist()
        self.batches: Sequence[Sequence[int]] = ()
        self.labels = np.full(len(rows), np.nan) if labels is None else np.asarray(labels, np.float64)

    def __len__(self) -> int:
        return len(self.scans)

    def __getstate__(self) -> dict[str, Any]:
        """What loading processes get: they read scans by name, and need no copy of a large index."""
        return {**self.__dict__, "store": Store(self.store.folder, None, self.store.record)}

    def __getitem__(self, number: int) -> Item:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """What a DataLoader asks for: the scans of a batch, or of a process's part of it."""
        return [self._item(number, numbers) for number in numbers]

    def _item(self, number: int, together: Sequence[int]) -> Item:
        try:
            return self._read(number)
        except StoreError:
            damaged = [self.scans[number]]
            for place in self._substitutes(number, together)[:MOST_DAMAGED] if self.skip_damaged else ():
                try:
                    return (*self._read(place)[:-1], tuple(damaged))
                except StoreError:
                    damaged.append(self.scans[place])
            raise

    def _read(self, number: int) -> Item:
        image, mask = self.store.read(self.scans[number])
        return image, mask, scan_key(self.scans[number]), float(self.labels[number]), ()

    def _substitutes(self, number: int, together: Sequence[int]) -> list[int]:
        """Scans that may take a damaged one's place, the best first; see the class."""
        asked = set(together)
        batch = [each for batch in self.batches if asked <= set(batch) for each in batch] or together
        present = list(dict.fromkeys(self.participants[each] for each in batch))
        own, busy = self.participants[number], set(present)
        free = [name for name in dict.fromkeys(self.participants) if name not in busy]
        rank = {name: place for place, name in enumerate([own, *free[present.index(own)::len(present)]])}
        scans = [each for each, name in enumerate(self.participants) if name in rank and each != number]
        return sorted(scans, key=lambda each: rank[self.participants[each]])


def collate(items: Sequence[Item]) -> Batch:
    """Stack scans; they stay float16 until they reach the device."""
    images, masks, keys, labels, damaged = zip(*items, strict=True)
    return Batch(torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(masks)[:, None]),
                 list(keys), torch.tensor(labels, dtype=torch.float32), tuple(chain.from_iterable(damaged)))


def epoch_batches(participants: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Global batches of one epoch: every scan once, a participant at most once in a batch.

    Two scans of one brain are no negatives of each other. The order depends on (seed, epoch) alone, not on
    workers; batches that stay smaller than `batch_size` are dropped when there are others, and the scans left
    over come in other epochs.

    Args:
        participants: each scan's.
        batch_size: scans in a global batch.

    Returns:
        lists of scan numbers.
    """
    order = keyed(seed, epoch).permutation(len(participants))
    batches: list[list[int]] = []
    present: list[set[str]] = []
    first_open = 0
    for number in order.tolist():
        for place in range(first_open, len(batches)):
            if len(batches[place]) < batch_size and participants[number] not in present[place]:
                break
        else:
            place = len(batches)
            batches.append([])
            present.append(set())
        batches[place].append(number)
        present[place].add(participants[number])
        while first_open < len(batches) and len(batches[first_open]) == batch_size:
            first_open += 1
    full = [batch for batch in batches if len(batch) == batch_size]
    return full or batches


def balanced(datasets: Sequence[str], seed: int, epoch: int) -> list[int]:
    """As many scans of each dataset, as many in all as there are: the chosen scans' numbers.

    A large dataset is drawn from without replacement; of a small one each scan comes as often as any other, give
    or take one.
    """
    codes, names = pd.factorize(np.asarray(datasets))
    rng, chosen = keyed(seed, epoch, 1), []
    for code in range(len(names)):
        own = np.flatnonzero(codes == code)
        wanted = len(codes) // len(names)
        chosen += np.concatenate([rng.permutation(own) for _ in range(-(-wanted // len(own)))])[:wanted].tolist()
    return chosen


def session_batches(participants: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of twos: a scan, then another scan of the participant (itself where there is no other).

    Each participant comes once in an epoch.

    Returns:
        lists of 2 x `batch_size` scan numbers.
    """
    codes, names = pd.factorize(np.asarray(participants))
    rng = keyed(seed, epoch, 2)
    scans = [rng.permutation(np.flatnonzero(codes == code))[:2].tolist() for code in range(len(names))]
    return [[number for one in batch for number in (scans[one][0], scans[one][-1])]
            for batch in epoch_batches(list(names), batch_size, seed, epoch)]


def batches_of(participants: Sequence[str], datasets: Sequence[str], batch_size: int, seed: int, epoch: int,
               sampling: str = "all") -> list[list[int]]:
    """An epoch's batches with a participant at most once in each: of "all" scans, or "balanced" over datasets."""
    if sampling == "all":
        return epoch_batches(participants, batch_size, seed, epoch)
    chosen = balanced(datasets, seed, epoch)
    return [[chosen[place] for place in batch]
            for batch in epoch_batches([participants[number] for number in chosen], batch_size, seed, epoch)]


def load(scans: PreparedScans, batches: Sequence[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
    """Load batches in the given order, with pinned memory where there is a CUDA device.

    Damaged scans that were skipped are counted in `scans.damaged`; the first time, a warning names them.

    Raises:
        LoaderError: loading processes cannot be started. What torch raises when one dies, `loading_may_fail` words.
    """
    options = {"multiprocessing_context": "spawn", "prefetch_factor": 2,
               "worker_init_fn": keep_freed_memory} if workers else {}
    loader = DataLoader(scans, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        pin_memory=torch.cuda.is_available(), **options)
    piped = False
    try:
        batches = iter(loader)  # loading processes start here, and their queues take a little of /dev/shm
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LoaderError("loading processes cannot be started, as /dev/shm is full. Set loader_workers: 0, which "
                          "loads in the training process, or make room there (docker: --shm-size)") from error
    for batch in batches:
        if batch.piped and not piped:
            piped = True
            warnings.warn("loading processes get no shared memory (is /dev/shm small? docker: --shm-size): batches "
                          "come through pipes, which is slower", stacklevel=2)
        if new := sorted(set(batch.damaged) - set(scans.damaged)):
            warnings.warn(f"skipped {', '.join(new)}: missing or damaged in {scans.store.folder}; delete what is left "
                          "of them and run 1_preprocess again", stacklevel=2)
        scans.damaged.update(batch.damaged)
        yield batch


@contextmanager
def loading_may_fail() -> Iterator[None]:
    """Name the cure where a loading process dies.

    torch raises that wherever the main thread is at that moment, so this stands around all of the training.

    Raises:
        LoaderError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        first = str(error).splitlines()[0]
        raise LoaderError(f"a loading process died, for want of memory perhaps ({first}). Set loader_workers: 0, which "
                          "loads in the training process, or give the job more memory") from error


def keep_freed_memory(*_: object) -> None:
    """Have glibc keep what this process frees, instead of asking the system for zeroed pages again and again.

    Reading a scan of 150x192x192 then takes 2 ms instead of 4, and a CPU training step of resnet18_narrow (64 views of
    36x48x40 on two threads) 1.0 s instead of 2.0.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems' libraries have none
    if mallopt is not None:
        for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(option, size)


def in_order(count: int, batch_size: int) -> list[list[int]]:
    """Batches of `0 … count - 1` in order, the last one smaller."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
