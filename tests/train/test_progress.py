"""What `live.json` says of a run."""

import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kit.train import progress
from kit.train.progress import Progress


@pytest.mark.parametrize("done", [0, 30])
def test_the_curve_of_a_long_run_has_one_stride_from_its_first_step_to_its_last(tmp_path, monkeypatch, done):
    monkeypatch.setattr(progress, "POINTS", 8)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    shown = Progress(tmp_path, steps=done + 100, done=done)
    for number in range(100):
        shown.note(0, {"loss": float(number)}, 0.1, scans=8, waited=0.0)
    shown.close()
    curve = json.loads((tmp_path / "live.json").read_text())["curve"]
    assert curve == [[done + 1 + number, float(number), 0.1] for number in (0, 16, 32, 48, 64, 80, 96, 99)]


def test_curves_of_a_run_that_begins_anew_hide_those_before_it(tmp_path, monkeypatch):
    """As after a first step that needed too much memory, or a loss that was not finite before any checkpoint."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    for steps, loss in ((3, 9.0), (2, 1.0)):
        shown = Progress(tmp_path, steps=5, done=0)
        for _ in range(steps):
            shown.note(0, {"loss": loss}, 0.1, scans=8, waited=0.0)
        shown.close()
        time.sleep(1.1)  # the files' names hold seconds, and TensorBoard reads them by name
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("step/loss")] == [(1, 1.0), (2, 1.0)]
