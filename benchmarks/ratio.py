"""What a benchmark reports, and how it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """One line of bench.json.

    Attributes:
        name: of the comparison.
        ours, peer: measured, in `unit`.
        ratio: how many times better than the peer, unless `what` says that it is a share.
        better: whether a higher or a lower ratio is better.
        goal: what the ratio should reach.
        unit: of ours and peer.
        what: what was measured, on which data, against which public interface.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    better: Literal["higher", "lower"]
    goal: float
    unit: str
    what: str

    def row(self) -> dict[str, Any]:
        """As JSON values, rounded to four digits."""
        return {name: float(f"{value:.4g}") if isinstance(value, float) else value
                for name, value in asdict(self).items()}

    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal


def times_better(name: str, ours: float, peer: float, goal: float, unit: str, what: str) -> Ratio:
    """A ratio of costs: peer over ours, the higher the better."""
    return Ratio(name, ours, peer, peer / ours, "higher", goal, unit, what)


def share(name: str, ours: float, peer: float, goal: float, unit: str, what: str) -> Ratio:
    """A ratio of costs as a share: ours over peer, the lower the better."""
    return Ratio(name, ours, peer, ours / peer, "lower", goal, unit, what)


def cpu_seconds(*functions: Callable[[int], Any], repeats: int) -> list[float]:
    """Median CPU-seconds of each function, called in turn so that a change of the machine's speed meets them all.

    Args:
        functions: called with the repeat's number; each once before, unmeasured.
        repeats: measured calls of each.
    """
    spent: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function(0)
    for repeat in range(repeats):
        for function, taken in zip(functions, spent, strict=True):
            begun = time.process_time()
            function(repeat)
            taken.append(time.process_time() - begun)
    return [float(np.median(taken)) for taken in spent]


def memory_bytes(name: str) -> int:
    """Bytes that this process holds now (VmRSS), or has held at most (VmHWM; ru_maxrss starts from its parent's)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[name].split()[0])
