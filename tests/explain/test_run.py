"""What is known of a scan, and of whose."""

import numpy as np
import pandas as pd
import pytest

from kit.data.nifti import write_nifti
from kit.data.store import Store
from kit.explain.run import cohort_of, known_place
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
