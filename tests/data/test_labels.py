"""Label columns: what kind they are, what stands for 1, what is missing."""

import numpy as np
import pandas as pd

from kit.data.labels import read_labels

INDEX = pd.DataFrame({"sex": ["F", "M", None, "M"], "stroke": [1.0, np.nan, 0.0, 1.0], "age": [20.5, 30, np.nan, 50]})


def test_text_makes_classes_in_sorted_order():
    labels = read_labels(INDEX, "sex")
    assert labels.kind == "classification" and labels.classes == ("F", "M")
    assert np.array_equal(labels.values, [0, 1, np.nan, 1], equal_nan=True)


def test_two_numbers_make_classes():
    labels = read_labels(INDEX, "stroke")
    assert labels.classes == ("0", "1") and np.array_equal(labels.values, [1, np.nan, 0, 1], equal_nan=True)


def test_many_numbers_make_a_regression():
    labels = read_labels(INDEX, "age")
    assert labels.kind == "regression" and np.array_equal(labels.values, INDEX["age"], equal_nan=True)
