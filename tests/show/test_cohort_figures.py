"""The cohort and its fate as bars that add up."""

from __future__ import annotations

import pandas as pd

from kit.show.cohort_figures import cohort_figure, outcome_figure

SCANS = pd.DataFrame({
    "participant": [*"abcdefghij"], "session": "01", "dataset": ["A"] * 6 + ["B"] * 4, "image_path": "x",
    "mask_path": "",
    "split": ["train"] * 4 + ["test"] * 2 + [None] * 4, "age": [20.0, 30, 40, 50, 60, 61, 62, 63, 64, None],
    "sex": ["F"] * 5 + ["M"] * 3 + ["", ""]})


def widths(axes):
    return [round(bar.get_width(), 3) for bar in axes.patches]


def test_a_cohort_is_counted_by_dataset_split_and_label():
    left, right = cohort_figure(SCANS, "a note").axes
    assert sorted(widths(left)) == [0, 0, 0, 2, 4, 4] and sum(widths(left)) == len(SCANS)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["train", "test", "no split"]
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["sex", "age"]
    assert widths(right) == [0.5, 0.3, 0.2, 0.9, 0.1]  # F, M, missing; a range, missing
    assert "20 to 64, median 60" in [text.get_text() for text in right.texts]


def test_every_scan_has_one_fate():
    index = SCANS.iloc[:8].assign(flags=["", "snr low", "contrast low", "", "", "", "", ""],
                                  unusable=["", "", "contrast", "", "", "", "", ""])
    axes, = outcome_figure(index, SCANS.iloc[8:]).axes
    assert sum(widths(axes)) == len(SCANS)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    by_fate = {name: sum(widths(axes)[2 * number:2 * number + 2]) for number, name in enumerate(names)}
    assert by_fate == {"prepared": 6, "flagged": 1, "unusable": 1, "refused": 2}
