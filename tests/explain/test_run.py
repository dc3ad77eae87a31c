"""What is known of a scan, and of whose."""

import numpy as np
import pandas as pd
import pytest

from kit.data.nifti import write_nifti
from kit.data.store import Store
from kit.explain.run import known_place
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
