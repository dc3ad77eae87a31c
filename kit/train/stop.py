"""Ask a run to stop, by a file in its folder that a batch script, a person or an interrupt creates.

The processes agree on it at each step, rank 0 writes a checkpoint, all return, and the notebook ends normally.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

NAME = "stop"  # in the run's folder
UNFINISHED = "unfinished.csv"  # the log so far of a run that was asked to stop
PREEMPTED = "preempted"  # beside it if Slurm asked, not a person: the job is then requeued; see slurm/papermill.sbatch


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint; `log` holds its rows so far."""

    def __init__(self, log: pd.DataFrame) -> None:
        super().__init__("stopped as asked; the checkpoint is written")
        self.log = log


@contextmanager
def interrupt_stops(file: Path) -> Iterator[None]:
    """Make the first interrupt (JupyterLab's Stop button, Ctrl-C) create the stop file; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        print("stopping: writing a checkpoint first; interrupt again to quit at once", flush=True)
        file.touch()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
