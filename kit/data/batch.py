"""Some scans together, on a device or on their way between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Some scans, on one device.

    Attributes:
        images: (batch, 1, depth, height, width) float32, on the store's scale inside the mask, zero outside.
        masks: (batch, 1, depth, height, width) bool.
        keys: one 63-bit number a scan, the same wherever the scan is met; it keys the scan's random draws.
        labels: (batch,) float32, nan where there is none.
        damaged: names of scans whose place another scan took.
        piped: whether it came from a loading process that got no shared memory for it.
    """

    images: torch.Tensor
    masks: torch.Tensor
    keys: list[int]
    labels: torch.Tensor
    damaged: tuple[str, ...] = ()
    piped: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: tensors in shared memory, or arrays through the pipe where it has no room.

        torch would find that out while it writes to the pipe, in a thread whose errors nobody hears.
        """
        tensors = {name: value for name, value in self.__dict__.items() if isinstance(value, torch.Tensor)}
        try:
            for value in tensors.values():
                value.share_memory_()
        except (RuntimeError, OSError):  # a small /dev/shm, or too many open files
            arrays = {name: value.numpy() for name, value in tensors.items()}
            return {**self.__dict__, **arrays, "piped": True}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                              for name, value in state.items()})

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, as float32; the copy does not block where memory is pinned."""
        return Batch(self.images.to(device, non_blocking=True).float(), self.masks.to(device, non_blocking=True),
                     self.keys, self.labels.to(device, non_blocking=True), self.damaged)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader: memory that a CUDA device can copy from without waiting."""
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.keys, self.labels.pin_memory(),
                     self.damaged, self.piped)
