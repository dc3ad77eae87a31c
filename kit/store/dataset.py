"""Serve prepared scans as a torch dataset, and batches of them, on a device or between processes."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kit.errors import KitError
from kit.machine import keep_freed_memory
from kit.seeding import scan_key
from kit.store.store import Store

Item = tuple[np.ndarray, np.ndarray, int, float]  # image float16 and mask bool, both (z, y, x); key; label (nan: none)


@dataclass(frozen=True)
class Batch:
    """Scans on one device.

    Attributes:
        images: (batch, 1, depth, height, width) float16 as loaded, float32 after `to`; on the store's intensity scale
            inside the mask, zero outside.
        masks: (batch, 1, depth, height, width) bool.
        keys: one 63-bit number per scan, the same wherever the scan occurs; it seeds the scan's augmentations.
        labels: (batch,) float32, nan where there is no label.
    """

    images: torch.Tensor
    masks: torch.Tensor
    keys: list[int]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, as float32; the copy does not block if memory is pinned."""
        return Batch(self.images.to(device, non_blocking=True).float(), self.masks.to(device, non_blocking=True),
                     self.keys, self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Pin memory, so that a CUDA device can copy from it asynchronously; the DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.keys, self.labels.pin_memory())


class LoaderError(KitError, RuntimeError):
    """Loading processes could not start, or one died; the message says what to do."""


class PreparedScans(Dataset):
    """Rows of a store as a torch dataset; each loading process opens the files itself.

    Args:
        store: prepared scans.
        rows: rows of `store.index` to serve; item numbers follow their order.
        labels: (rows,) float, or None for unlabelled scans.

    Raises:
        StoreError: when reading an item whose scan is missing or damaged; see `kit.store.store.unreadable`.
    """

    def __init__(self, store: Store, rows: pd.DataFrame, labels: np.ndarray | None = None) -> None:
        self.store, self.scans = store, rows["scan"].tolist()
        self.labels = np.full(len(rows), np.nan) if labels is None else np.asarray(labels, np.float64)

    def __len__(self) -> int:
        return len(self.scans)

    def __getstate__(self) -> dict[str, Any]:
        """Return what loading processes get: they read scans by name, and need no copy of a large index."""
        no_rows = pd.DataFrame(columns=self.store.index.columns)
        return {**self.__dict__, "store": Store(self.store.folder, no_rows, self.store.record)}

    def __getitem__(self, number: int) -> Item:
        image, mask = self.store.read(self.scans[number])
        return image, mask, scan_key(self.scans[number]), float(self.labels[number])


def collate(items: Sequence[Item]) -> Batch:
    """Stack scans into a batch; images stay float16 until they reach the device."""
    images, masks, keys, labels = zip(*items, strict=True)
    tensors = [torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(masks)[:, None]),
               torch.tensor(labels, dtype=torch.float32)]
    if get_worker_info():  # here, because torch's queue thread would later fail silently if /dev/shm is small
        tensors = [tensor.share_memory_() for tensor in tensors]
    return Batch(tensors[0], tensors[1], list(keys), tensors[2])


def load_batches(scans: PreparedScans, batches: Sequence[list[int]], workers: int = 0) -> Iterator[Batch]:
    """Load batches in the given order, with pinned memory if there is a CUDA device.

    Raises:
        LoaderError: loading processes cannot start, or one dies while it hands over a batch. If one dies at another
            time, `loading_may_fail` explains torch's error.
    """
    options: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 2,
                               "worker_init_fn": keep_freed_memory} if workers else {}
    loader = DataLoader(scans, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        pin_memory=torch.cuda.is_available(), **options)
    try:
        loaded = iter(loader)  # loading processes start here, and their queues use a little of /dev/shm
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LoaderError("loading processes cannot be started, as /dev/shm is full. Set loader_workers: 0, which "
                          "loads in the training process, or make room there (docker: --shm-size)") from error
    try:
        yield from loaded
    except (ConnectionError, EOFError) as error:
        raise _failed(error) from error


def _failed(error: Exception) -> LoaderError:
    said = (str(error) or type(error).__name__).splitlines()[-1]
    return LoaderError(f"a loading process failed, perhaps for lack of memory ({said}). Set "
                       "loader_workers: 0, which loads in the training process, or give the job more memory "
                       "(shared memory in docker: --shm-size)")


@contextmanager
def loading_may_fail() -> Iterator[None]:
    """Explain what to do if a loading process dies.

    torch raises its error wherever the main thread happens to be, so this must enclose the whole training.

    Raises:
        LoaderError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        known = str(error).startswith(("DataLoader worker", "Pin memory thread")) or (
            "shared memory" in str(error) and "out of resource" not in str(error))  # not Triton's error about a GPU's
        if isinstance(error, LoaderError) or not known:
            raise
        raise _failed(error) from error
