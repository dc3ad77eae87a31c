"""What `live.json` says of a run."""

import json

import pytest

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
