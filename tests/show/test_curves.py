"""Curves of a training: the numbers that stand in them."""

import numpy as np
import pandas as pd
import pytest

from kit.show.curves import training_curves

NOTE = "procedural data"


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_training_curves_draw_what_the_log_has():
    log = pd.DataFrame({"epoch": [0, 1, 2], "train_loss": [3.0, 2, 1], "validation_loss": [3.5, np.nan, 1.5],
                        "learning_rate": [1e-3, 5e-4, 0], "seconds": [6.0, 5, 5.5]})
    figure = training_curves(log, note=NOTE)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "seconds per epoch"]
    assert names(figure.axes[0]) == ["train loss", "validation loss"]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xydata(), [[0, 3.5], [2, 1.5]])
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [1e-3, 5e-4, 0])
    assert figure.axes[2].get_ylim()[0] == 0
    assert figure.get_supxlabel() == NOTE
    assert len(training_curves(log[["epoch", "train_loss"]]).axes) == 1
    lines = training_curves(log.assign(mean_scan_loss=2.0)).axes[0].lines
    assert {line.get_label(): line.get_linestyle() for line in lines} == {
        "train loss": "-", "validation loss": "-", "mean scan loss": "--"}
    simclr = log.assign(top1=[0.1, 0.5, 0.6], validation_top1=[0.2, np.nan, 0.7], rank=[2.0, 3, 4], alignment=1.0,
                        uniformity=-2.0, probe_age=[np.nan, 0.1, 0.2], probe_sex=np.nan)
    panels = {axes.get_ylabel(): axes for axes in training_curves(simclr, chance=1 / 7).axes}
    assert list(panels) == ["loss", "top-1 accuracy", "effective rank", "alignment and uniformity", "probes",
                            "learning rate", "seconds per epoch"]
    assert [line.get_label() for line in panels["probes"].lines] == ["probe age"]  # nobody has a sex
    assert panels["loss"].lines[-1].get_ydata()[0] == pytest.approx(np.log(7))  # of seven views, six are wrong
    assert panels["top-1 accuracy"].lines[-1].get_ydata()[0] == pytest.approx(1 / 7)
    assert "chance (training)" in names(panels["top-1 accuracy"])
    with pytest.raises(ValueError, match="log lacks loss; its columns are epoch, seconds"):
        training_curves(log[["epoch", "seconds"]])
    with pytest.raises(ValueError, match="no rows"):
        training_curves(log[:0])
