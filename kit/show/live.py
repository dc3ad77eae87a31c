"""A figure that follows a run while it trains, by reading its `live.json`; the run may be on another machine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kit.show.figure import blank, label

SECONDS = 3.0  # between updates


def progress_figure(live: dict[str, Any], note: str = "") -> Figure:
    """Draw a run's loss and learning rate so far, with its speed and the time left.

    Args:
        live: contents of `live.json`: `curve` of (step, loss, learning rate), `step`, `steps`, `epoch`,
            `scans_per_second`, `waiting` (share of the time spent waiting for data), `seconds_left`.
        note: a remark on the data.
    """
    left = live["seconds_left"]
    left = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
    figure = blank(640, 260, f"epoch {live['epoch']}, step {live['step']} of {live['steps']}, {left} left; "
                             f"{live['scans_per_second']:.1f} scans/s, {live['waiting']:.0%} waiting for data", note)
    steps, losses, rates = zip(*live["curve"], strict=True)
    for axes, values, name in zip(figure.subplots(1, 2), (losses, rates), ("loss", "learning rate"), strict=True):
        axes.plot(steps, values, linewidth=1)
        axes.set_xlim(0, live["steps"])
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        label(axes, "step", name)
    return figure


@contextmanager
def live_figure(folder: Path, note: str = "") -> Iterator[None]:
    """Show `progress_figure` under the cell and update it every few seconds until the block ends.

    ``KIT_PROGRESS=off`` disables it, like progress bars.
    """
    if os.environ.get("KIT_PROGRESS") == "off":
        yield
        return
    from IPython.display import DisplayHandle

    done, path = threading.Event(), folder / "live.json"
    handle = DisplayHandle()
    handle.display({}, raw=True)  # an empty display to update

    def follow() -> None:
        seen = None
        while not done.wait(SECONDS):
            if path.exists() and (text := path.read_text(encoding="utf-8")) != seen:
                seen = text
                handle.update(progress_figure(json.loads(text), note))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if path.exists():
            handle.update(progress_figure(json.loads(path.read_text(encoding="utf-8")), note))
