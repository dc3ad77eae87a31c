"""The figure that follows a run."""

import json

import pytest

from kit.show.live import live_figure, progress_figure

LIVE = {"step": 30, "steps": 100, "epoch": 2, "scans_per_second": 12.3, "waiting": 0.04, "seconds_left": 7200.0,
        "curve": [[1, 3.4, 0.0], [15, 2.9, 1e-3], [30, 2.5, 9e-4]]}


def test_it_says_how_far_how_fast_and_how_long():
    figure = progress_figure(LIVE, "procedural data")
    title = figure.get_suptitle()
    assert title == "epoch 2, step 30 of 100, 2.0 h left; 12.3 scans/s, 4% waiting for data"
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate"]
    assert figure.axes[0].get_xlim() == (0, 100) and figure.get_supxlabel() == "procedural data"


@pytest.mark.parametrize(("seconds", "left"), [(40, "40 s"), (600, "10 min")])
def test_time_left_in_units_for_people(seconds, left):
    assert f"{left} left" in progress_figure({**LIVE, "seconds_left": seconds}).get_suptitle()


def test_it_ends_with_the_block_and_shows_the_last_state(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KIT_PROGRESS", raising=False)
    with live_figure(tmp_path):
        (tmp_path / "live.json").write_text(json.dumps(LIVE), encoding="utf-8")
    assert "Figure" in capsys.readouterr().out
