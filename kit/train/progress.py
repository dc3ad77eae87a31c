"""Live progress of a run: `live.json` for the notebook's figure, TensorBoard's files, a progress bar."""

from __future__ import annotations

import json
import math
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from kit.runs import progress as bar
from kit.runs import write_whole
from kit.train.distributed import rank

EVERY_SECONDS = 1.0  # between two updates of live.json
POINTS = 400  # most points of the curve in live.json; of a longer run it has every second step, every fourth, ...


class Progress:
    """Report each step in a progress bar, `live.json` and `tensorboard/`, on rank 0 only.

    A full disk does not stop the run: `live.json` is written again at the next update, TensorBoard's curves end there.

    Args:
        folder: of the run; None shows only the bar.
        steps: of the whole run.
        done: steps that a resumed run has already done.
    """

    def __init__(self, folder: Path | None, steps: int, done: int) -> None:
        self.folder = folder if rank() == 0 else None
        self.steps, self.step, self.first = steps, done, done
        self.begun = self.written = time.monotonic()
        self.curve: list[tuple[int, float, float]] = []  # every `stride`-th step: (step, loss, learning rate)
        self.stride = 1
        self.bar = bar(total=steps, initial=done, desc="training", unit="step", disable=rank() > 0)
        self.board = None
        if self.folder:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            # TensorBoard hides the steps after `done` that a killed run has written
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done + 1)

    def note(self, epoch: int, report: dict[str, float], rate: float, scans: int, waited: float) -> None:
        """Report one step.

        Args:
            epoch: from 0.
            report: of the step; `loss` is plotted.
            rate: learning rate.
            scans: in this step, over all processes.
            waited: mean seconds that a step of this epoch waited for data.
        """
        self.step += 1
        self.steps = max(self.steps, self.step)  # epochs may have more batches than the first
        self.bar.set_postfix(loss=f"{report['loss']:.3f}", refresh=False)
        self.bar.update()
        if self.folder is None:
            return
        now = time.monotonic()
        each = (now - self.begun) / (self.step - self.first)
        point = (self.step, report["loss"], rate)
        if (self.step - self.first - 1) % self.stride == 0:
            self.curve.append(point)
        if len(self.curve) > POINTS:
            self.curve, self.stride = self.curve[::2], 2 * self.stride
        if now - self.written < EVERY_SECONDS and self.step < self.steps:
            return
        self.written = now
        live = {"step": self.step, "steps": self.steps, "epoch": epoch + 1, "scans_per_second": scans / each,
                "waiting": waited / each, "seconds_left": each * (self.steps - self.step),
                "curve": self.curve if self.curve[-1] == point else [*self.curve, point]}
        with suppress(OSError):  # a full disk: shown at the next update
            write_whole(self.folder / "live.json", lambda aside: aside.write_text(json.dumps(live), encoding="utf-8"))
        self.add({**report, "learning_rate": rate, "scans_per_second": scans / each}, "step")

    def add(self, values: dict[str, Any], kind: str) -> None:
        """Send numbers to TensorBoard, at the current step."""
        if self.board is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, float) and math.isfinite(value):
                    self.board.add_scalar(f"{kind}/{name}", value, self.step)
        except OSError as error:  # a full disk: its writer is gone, the training goes on
            warnings.warn(f"TensorBoard's curves end here ({error}); log.csv goes on", stacklevel=2)
            self.board = None

    def close(self) -> None:
        """Remove the bar and close TensorBoard's file."""
        self.bar.close()
        if self.board:
            try:
                self.board.close()
            except OSError:  # a full disk
                self.board = None
