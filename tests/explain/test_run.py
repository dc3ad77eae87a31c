"""What is known of a scan, and of whose."""

import numpy as np
import pandas as pd
import pytest

from kit.data.nifti import write_nifti
from kit.data.store import Store
from kit.explain.run import choose_scans, cohort_of, known_place
from kit.runs import write_table
from tests.conftest import make_store


@pytest.mark.parametrize(("dataset", "known"), [("procedural-A", True), ("made", False), ("proceduralists", False)])
def test_only_the_sample_has_known_places(tmp_path, dataset, known):
    store = make_store(tmp_path / "store", participants=1)
    index = pd.DataFrame({"scan": ["made_000_01"], "participant": "000", "session": "01", "dataset": dataset})
    anat = tmp_path / "bids/derivatives/sample/sub-000/ses-01/anat"
    anat.mkdir(parents=True)
    write_nifti(anat / "sub-000_ses-01_label-lesion_mask.nii.gz",
                np.indices(store.grid.shape)[0] > 6, store.grid.affine)
    place = known_place(tmp_path / "bids", Store(store.folder, index, store.record), "made_000_01", "stroke")
    assert (place is not None) == known and (not known or place.any())


def test_the_cohort_is_the_one_that_was_prepared(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", participants=1)
    assert cohort_of(store, 1) is None  # not noted
    asked = []
    monkeypatch.setattr("kit.explain.run.sample_cohort", lambda *numbers: asked.append(numbers) or tmp_path)
    for cohort, found in (("sample", tmp_path), (str(tmp_path / "store"), tmp_path / "store"), ("my/cohort.csv", None)):
        (store.folder / "params.yaml").write_text(
            f"cohort: {cohort}\nsample_participants: 80\nseed: 3\n", encoding="utf-8")
        assert cohort_of(store, 1) == found
    assert asked == [(80, 3, 1)]


def test_participants_of_two_datasets_are_two(tmp_path):
    index = pd.DataFrame({"scan": ["1", "2", "3", "4"], "participant": ["001", "001", "001", "1"],
                          "session": ["01", "01", "02", "01"], "dataset": ["A", "B", "B", "A"]})
    write_table(tmp_path / "predictions.csv", index[["scan", "participant"]].assign(
        distribution="in_distribution", true=1.0, predicted=[1.0, 2.0, 3.0, 0.5]))
    chosen = choose_scans(tmp_path, Store(tmp_path, index, {"shape": [1, 1, 1], "spacing_mm": 1.0}), 3)
    assert chosen["scan"].tolist() == ["3", "1", "4"]
