"""What is known of a scan, and of whose."""

import numpy as np
import pandas as pd

from kit.explain.maps import known_place, scans_to_explain
from kit.preprocess.nifti import write_nifti
from kit.runs import write_table
from kit.store.store import Store
from tests.conftest import make_store


def test_known_places_stand_in_the_prepared_folder(tmp_path):
    store = make_store(tmp_path / "store", participants=1)
    assert known_place(store, "made_000_01", "stroke") is None
    place = (np.indices(store.grid.shape)[0] > 6).astype(np.float32)
    write_nifti(store.folder / "effects/made_000_01_lesion.nii.gz", place, store.grid.affine)
    assert np.array_equal(known_place(store, "made_000_01", "stroke"), place > 0)
    assert known_place(store, "made_000_01", "age") is None and known_place(store, "made_000_01", "sex") is None


def test_participants_of_two_datasets_are_two(tmp_path):
    index = pd.DataFrame({"scan": ["1", "2", "3", "4"], "participant": ["001", "001", "001", "1"],
                          "session": ["01", "01", "02", "01"], "dataset": ["A", "B", "B", "A"]})
    write_table(tmp_path / "predictions.csv", index[["scan", "participant"]].assign(
        distribution="in_distribution", true=1.0, predicted=[1.0, 2.0, 3.0, 0.5]))
    chosen = scans_to_explain(tmp_path, Store(tmp_path, index, {"shape": [1, 1, 1], "spacing_mm": 1.0}), 3)
    assert chosen["scan"].tolist() == ["3", "1", "4"]
