"""Quality figures measure what they say; a scan far from its cohort is flagged with the figure that flagged it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from kit.data.quality import FIGURES, flagged, outside_share, passing, signal_to_noise, worst_first
from kit.data.template import template


def cohort(**changes: float) -> pd.DataFrame:
    """Twenty scans that differ a little, the last one as told."""
    rng = np.random.default_rng(0)
    middle = {"template_similarity": 0.8, "mask_overlap": 0.95, "brain_ml": 1400, "snr": 25, "outside_share": 0.0}
    spread = {"template_similarity": 0.03, "mask_overlap": 0.01, "brain_ml": 120, "snr": 4, "outside_share": 0.0}
    table = pd.DataFrame({name: middle[name] + spread[name] * rng.uniform(-1, 1, 20) for name in FIGURES})
    for name, value in changes.items():
        table.loc[19, name] = value
    return table.assign(scan=[f"s{row}" for row in range(20)])


@pytest.mark.parametrize(("figure", "value", "flag"), [
    ("template_similarity", 0.3, "template_similarity low"), ("mask_overlap", 0.8, "mask_overlap low"),
    ("brain_ml", 300, "brain_ml low"), ("brain_ml", 2400, "brain_ml high"), ("snr", 2, "snr low"),
    ("outside_share", 0.2, "outside_share high"),
])
def test_what_is_far_off_is_flagged_by_name(figure: str, value: float, flag: str) -> None:
    index = flagged(cohort(**{figure: value}))
    assert index["flags"].tolist() == [""] * 19 + [flag]
    assert index["pass"].tolist() == [True] * 19 + [False]
    assert worst_first(index)["scan"].iloc[0] == "s19"
    assert passing(index)["scan"].tolist() == [f"s{row}" for row in range(19)]
    pd.testing.assert_frame_equal(flagged(index), index)


def test_what_is_usual_or_better_is_not_flagged() -> None:
    for changes in ({}, {"snr": 90}, {"template_similarity": 0.99}, {"outside_share": 0.01}):
        assert flagged(cohort(**changes))["pass"].all()
    assert flagged(cohort(snr=1).iloc[13:])["pass"].all()  # seven scans have no distribution
    assert len(passing(cohort())) == 20  # an index without the column


def test_two_reasons_are_both_named() -> None:
    assert flagged(cohort(snr=1, brain_ml=100))["flags"][19] == "brain_ml low; snr low"


@pytest.mark.parametrize("noise", [2.0, 5.0])
def test_signal_to_noise_sees_the_noise_and_not_the_anatomy(noise: float) -> None:
    values, brain, _ = template()
    image = 100 * ndimage.gaussian_filter(values, 0.5) + np.random.default_rng(1).normal(0, noise, values.shape)
    expected = np.median(100 * values[brain]) / noise
    assert signal_to_noise(image.astype(np.float32), brain) == pytest.approx(expected, rel=0.15)
    assert signal_to_noise(image, np.zeros_like(brain)) == 0.0


def test_share_outside_the_field_of_view() -> None:
    values, brain, affine = template()
    assert outside_share(values.shape, affine, np.eye(4)) == 0.0
    top = brain.nonzero()[0].max()
    for cut in (20, 60):
        shape = (int(top) - cut, *values.shape[1:])
        left_out = brain[shape[0]:].sum() / brain.sum()
        assert outside_share(shape, affine, np.eye(4)) == pytest.approx(left_out, abs=0.02)
    away = np.eye(4)
    away[2, 3] = 500
    assert outside_share(values.shape, affine, away) == 1.0
