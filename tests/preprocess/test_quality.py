"""QC metrics measure what they say; what is beyond a limit, or far from its site, is flagged by the metric's name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from kit.preprocess.quality import (
    CURES,
    QC_GRID,
    QC_METRICS,
    bright_edge,
    flagged,
    grey_levels,
    largest_piece,
    outside_share,
    signal_to_noise,
    t1_contrast,
    unusable_warning,
    usable,
    worst_first,
)
from kit.preprocess.settings import UNUSABLE
from kit.preprocess.template import template, template_on

USUAL = {"template_similarity": 0.55, "mask_overlap": 0.96, "contrast": 0.9, "brain_ml": 1400, "largest_piece": 1.0,
         "bright_edge": 0.05, "snr": 25, "grey_levels": 150, "outside_share": 0.0, "scale": 0.95, "stretch": 1.15,
         "orientation_deg": 0.0, "pose_deg": 1.0, "pose_mm": 0.6}


def cohort(rows: int = 24, **changes: float) -> pd.DataFrame:
    """Scans that differ a little, the last one as told."""
    rng = np.random.default_rng(0)
    spread = {"template_similarity": 0.03, "mask_overlap": 0.01, "contrast": 0.1, "brain_ml": 120, "snr": 4}
    table = pd.DataFrame({name: USUAL[name] + spread.get(name, 0.0) * rng.uniform(-1, 1, rows) for name in QC_METRICS})
    for name, value in changes.items():
        table.loc[rows - 1, name] = value
    return table.assign(scan=[f"s{row}" for row in range(rows)], dataset="made")


BEYOND = [
    ("template_similarity", 0.1, "low"), ("mask_overlap", 0.8, "low"), ("contrast", -0.5, "low"),
    ("brain_ml", 300, "low"), ("brain_ml", 2400, "high"), ("largest_piece", 0.9, "low"), ("bright_edge", 0.7, "high"),
    ("snr", 2, "low"), ("snr", 1000, "high"), ("grey_levels", 2, "low"), ("outside_share", 0.2, "high"),
    ("scale", 0.5, "low"), ("scale", 1.5, "high"), ("stretch", 2.0, "high"), ("orientation_deg", 180, "high"),
    ("pose_deg", 5, "high"), ("pose_mm", 7, "high"),
]


@pytest.mark.parametrize(("metric", "value", "side"), BEYOND)
@pytest.mark.parametrize("rows", [1, 24])
def test_what_is_beyond_a_limit_is_flagged_by_name_also_alone(rows: int, metric: str, value: float, side: str) -> None:
    index = flagged(cohort(rows, **{metric: value}))
    assert index["flags"].tolist() == [""] * (rows - 1) + [f"{metric} {side}"]
    assert worst_first(index)["scan"].iloc[0] == f"s{rows - 1}"
    assert index["unusable"].iloc[-1] == (metric if metric in UNUSABLE else "")
    assert usable(index).tolist() == [True] * (rows - 1) + [metric not in UNUSABLE]
    assert usable(index, accept=[metric]).all()
    pd.testing.assert_frame_equal(flagged(index), index)


def test_each_metric_with_limits_is_tried() -> None:
    limited = {name for name, metric in QC_METRICS.items() if np.isfinite([metric.low, metric.high]).any()}
    assert {metric for metric, *_ in BEYOND} == limited == set(QC_METRICS)


@pytest.mark.parametrize(("metric", "value"), [("template_similarity", 0.37), ("contrast", 0.25), ("brain_ml", 2090),
                                               ("snr", 3.5), ("stretch", 1.45)])
def test_what_is_far_from_its_site_is_flagged_within_the_limits(metric: str, value: float) -> None:
    side = "low" if value < USUAL[metric] else "high"
    index = flagged(cohort(**{metric: value}))
    assert index["flags"].iloc[-1] == f"{metric} {side}" and index["unusable"].iloc[-1] == ""
    assert usable(index).all()
    assert flagged(cohort(19, **{metric: value}))["flags"].eq("").all()  # so few have no distribution


def test_sites_are_judged_by_themselves() -> None:
    """A weak scanner is no outlier among its own scans; a few of its scans are one among another's."""
    strong, weak = cohort(40), cohort(24).assign(snr=lambda rows: rows["snr"] / 4)
    both = pd.concat([strong.assign(site="strong"), weak.assign(site="weak")], ignore_index=True)
    assert flagged(both)["flags"].eq("").all()
    few = pd.concat([strong.assign(site="strong"), weak.head(6).assign(site="weak")], ignore_index=True)
    few.loc[40:, "snr"] = 3.2
    assert flagged(few)["flags"].tolist() == [""] * 40 + ["snr low"] * 6


def test_numbered_sites_are_their_datasets_own_and_no_site_is_none() -> None:
    weak = cohort(24).assign(snr=lambda rows: rows["snr"] / 4, dataset="other")
    both = pd.concat([cohort(200), weak], ignore_index=True).assign(site=1)
    assert flagged(both)["flags"].eq("").all()  # with one site 1, the weak ones would be flagged
    # 24 scans without a site, their noise far from the others', do not hide behind each other
    nowhere = pd.concat([cohort(200), weak.assign(dataset="made", snr=3.2)], ignore_index=True)
    nowhere["site"] = ["a"] * 200 + [np.nan] * 24
    assert flagged(nowhere)["flags"].tolist() == [""] * 200 + ["snr low"] * 24


def test_brains_of_children_have_limits_of_their_own() -> None:
    index = cohort(1, brain_ml=600)
    assert flagged(index)["flags"].tolist() == ["brain_ml low"]
    assert flagged(index, (300, 1500))["flags"].tolist() == [""]


def test_a_metric_that_is_not_a_number_is_flagged() -> None:
    assert flagged(cohort(1, contrast=np.nan))["unusable"].tolist() == ["contrast"]
    for rows in (1, 40):  # alone, and beside a distribution
        for metric, side in (("contrast", "low"), ("template_similarity", "low"), ("brain_ml", "low"),
                             ("bright_edge", "high"), ("pose_mm", "high")):
            assert flagged(cohort(rows, **{metric: np.nan}))["flags"].iloc[-1] == f"{metric} {side}"


def test_what_is_usual_or_better_is_not_flagged() -> None:
    for changes in ({}, {"snr": 90}, {"template_similarity": 0.99}, {"outside_share": 0.01}):
        assert flagged(cohort(**changes))["flags"].eq("").all()
    assert usable(cohort()).all()  # an index without the column


def test_two_reasons_are_both_named() -> None:
    assert flagged(cohort(snr=1, brain_ml=100))["flags"].iloc[-1] == "brain_ml low; snr low"


def test_many_unusable_scans_are_a_warning_with_reason_and_cure() -> None:
    assert set(CURES) == set(UNUSABLE)
    far, dark = [0.1] * 3 + [0.55] * 17, [0.9] * 2 + [0.0] * 2 + [0.9] * 16
    table = flagged(cohort(20).assign(template_similarity=far, contrast=dark))
    assert table["unusable"].tolist()[1:5] == ["template_similarity", "template_similarity; contrast", "contrast", ""]
    assert unusable_warning(table, 0.2, "none") == ""  # 4 of 20 are not more than a fifth
    warns = ("WARNING: 4 of 20 scans are unusable and will not be used for training, most often because of "
             "template_similarity (3): ")
    assert unusable_warning(table, 0.19, "none") == (
        f"{warns}registration: none is for scans that already lie in MNI152 space; set registration: rigid or affine "
        "for all others")
    assert unusable_warning(table, 0.19, "rigid") == warns + CURES["template_similarity"]
    table["unusable"] = ["contrast"] * 15 + [None] * 5  # as read from a file
    assert unusable_warning(table, 0.5, "none").endswith(f"because of contrast (15): {CURES['contrast']}")
    assert unusable_warning(table[:0], 0.1, "none") == ""


def test_what_a_header_says_twice_is_a_flag() -> None:
    index = cohort(2, snr=1).assign(header_note=["sform and qform disagree by 9.0 mm, sform taken", np.nan])
    assert flagged(index)["flags"].tolist() == ["sform and qform disagree by 9.0 mm, sform taken", "snr low"]
    assert usable(flagged(index)).all()


def on_qc_grid() -> tuple[np.ndarray, np.ndarray]:
    image, brain = template_on(QC_GRID)
    return image, brain


def test_contrast_tells_t1_from_t2_through_a_bias_field() -> None:
    image, brain = on_qc_grid()
    assert t1_contrast(image, brain) > 0.5
    field = np.exp(np.linspace(-0.7, 0.7, image.shape[0]))[:, None, None].astype(np.float32)
    assert t1_contrast(image * field, brain) > 0.3
    assert t1_contrast((1.2 - image) * field, brain) < -0.3
    assert t1_contrast(np.ones_like(image), brain) == 0.0


def test_bright_edge_tells_a_cut_brain_from_a_whole_one() -> None:
    image, brain = on_qc_grid()
    assert bright_edge(image, brain) < 0.1
    assert bright_edge(image, ndimage.binary_erosion(brain, iterations=4)) > 0.5


def test_pieces_and_grey_levels_are_counted() -> None:
    mask = np.zeros((10, 10, 10), bool)
    mask[:3] = mask[5:6] = True
    assert largest_piece(mask) == pytest.approx(0.75)
    assert largest_piece(np.zeros_like(mask)) == 0.0
    assert grey_levels(np.arange(1000) % 7) == 7


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
