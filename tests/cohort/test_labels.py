"""Label columns: what kind they are, what stands for 1, what is missing."""

import numpy as np
import pandas as pd
import pytest

from kit.cohort.labels import LabelError, read_labels, sexes

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


def labels(values, kind="auto", missing_codes=()):
    return read_labels(pd.DataFrame({"x": values}), "x", kind, missing_codes)


@pytest.mark.parametrize(("values", "counts"), [
    ([0, 1, 2] * 5, "0 (5), 1 (5), 2 (5)"),
    ([0, 1] * 5 + [9], "0 (5), 1 (5), 9 (1)"),
    ([0.0, 1.0] * 5 + [999, np.nan], "0 (5), 1 (5), 999 (1)"),
    ([1, 2] * 5 + [9], "1 (5), 2 (5), 9 (1)"),
    ([0, 1] * 5 + [-9], "-9 (1), 0 (5), 1 (5)"),
    (list(range(1, 14)) * 3, "1 (3), 2 (3)"),  # numbers of sites
    ([1, 1, 999], "1 (2), 999 (1)"),
    (["0", "1", "9", "1"], "0 (1), 1 (2), 9 (1)"),
])
def test_codes_are_asked_about_and_can_be_named(values, counts):
    with pytest.raises(LabelError) as error:
        labels(values)
    assert counts in str(error.value) and "task_type" in str(error.value) and "missing_codes" in str(error.value)


def test_codes_for_missing_are_missing():
    found = labels([0, 1, 9, 999, 1], missing_codes=[9, "999"])
    assert found.classes == ("0", "1") and np.array_equal(found.values, [0, 1, np.nan, np.nan, 1], equal_nan=True)
    found = labels(["F", "M", "unknown", "NA"], missing_codes=["unknown", "NA"])
    assert found.classes == ("F", "M") and np.array_equal(found.values, [0, 1, np.nan, np.nan], equal_nan=True)
    found = labels(["63.5", "NA", "71", "80"], missing_codes=["NA"])
    assert found.kind == "regression" and np.array_equal(found.values, [63.5, np.nan, 71, 80], equal_nan=True)


@pytest.mark.parametrize(("cell", "code"), [("NA", "na"), ("na", "NA"), ("-9.0", -9), ("-9", -9.0), ("-9.00", "-9"),
                                            ("999", "999.0"), ("Unknown ", " unknown")])
def test_a_code_for_missing_in_text_is_found_however_it_is_written(cell, code):
    found = labels(["F", "M", cell], missing_codes=[code])
    assert found.classes == ("F", "M") and np.array_equal(found.values, [0, 1, np.nan], equal_nan=True)
    assert labels(["009", "M", "009"], missing_codes=[9]).classes == ("009", "M")  # a name, not the number 9


@pytest.mark.parametrize("values", [[0, 1, 2] * 5, [5, 6, 7, 8]])
def test_a_kind_that_is_said_is_taken(values):
    assert labels(values, "regression").values.tolist() == values


def test_several_classes():
    found = labels(["MCI", "CN", "AD", None, "CN", "AD", "MCI "])
    assert found.kind == "classification" and found.classes == ("AD", "CN", "MCI") and found.outputs == 3
    assert np.array_equal(found.values, [2, 1, 0, np.nan, 1, 0, 2], equal_nan=True)
    found = labels([10, 2, 1, 2, 9, 1, 10], "classification", missing_codes=[9])
    assert found.classes == ("1", "2", "10")
    assert np.array_equal(found.values, [2, 1, 0, 1, np.nan, 0, 2], equal_nan=True)
    assert labels(["F", "M", "M"]).outputs == labels([1.5, 2, 3]).outputs == 1
    for values, kind in ((["a", "b", "c", "b", "a"], "auto"), (list(range(21)) * 2, "classification"), (["a"], "auto"),
                         ([f"name {number}" for number in range(21)] * 2, "auto")):
        with pytest.raises(LabelError, match=r"two classes, or up to 20 with at least two scans each; found \d+: "):
            labels(values, kind)


@pytest.mark.parametrize(("words", "classes"), [
    (["AD", "CN"], ("CN", "AD")), (["ASD", "control"], ("control", "ASD")), (["Autism", "HC"], ("HC", "Autism")),
    (["depr", "Healthy"], ("Healthy", "depr")), (["CN", "MCI"], ("CN", "MCI")), (["F", "M"], ("F", "M")),
    (["CN", "HC"], ("CN", "HC")), (["AD", "CN", "MCI"], ("AD", "CN", "MCI"))])
def test_of_two_classes_that_of_controls_is_the_negative_one(words, classes):
    found = labels(words * 2)
    assert found.classes == classes and found.values.tolist() == [classes.index(word) for word in words * 2]


def test_a_test_cohorts_labels_are_of_the_classes_that_are_learned():
    there = pd.DataFrame({"x": ["MCI", "CN", None, "CN"]})
    found = read_labels(there, "x", "classification", (), ("AD", "CN", "MCI"))
    assert found.classes == ("AD", "CN", "MCI") and np.array_equal(found.values, [2, 1, np.nan, 1], equal_nan=True)
    with pytest.raises(LabelError, match="the training classes are AD, CN, but here they are CN, MCI; rename MCI"):
        read_labels(there, "x", "classification", (), ("AD", "CN"))
    codes = read_labels(pd.DataFrame({"x": [1.0, 2.0]}), "x", "classification", (), ("1", "2", "3"))
    assert codes.values.tolist() == [0, 1]


def test_a_code_for_missing_in_a_test_set_is_asked_about_beside_the_numbers_that_are_learned():
    there = pd.DataFrame({"x": [61, 72, -9, 999, 70.5, -4]})
    with pytest.raises(LabelError, match="x: -9, -4, 999 in 3 rows looks like a code for a missing value among numbers "
                                         "from 55 to 80: list it in missing_codes"):
        read_labels(there, "x", "regression", (), beside=[55.0, 80.0])
    assert read_labels(there, "x", "regression", [999], beside=[-20.0, -3.0, 80.0]).values[2] == -9  # as learned
    assert read_labels(there, "x", "regression").values[3] == 999


@pytest.mark.parametrize(("values", "code"), [([63, 71, 999, 55], "999"), ([63.5, 71, -99, 55], "-99"),
                                              ([20.5, 30, -1, 40, 50], "-1"),
                                              ([-1.5, 0.3, 2.1, -999], "-999"), ([-1.5, 0.3, 2.1, -9], "-9")])
def test_a_code_for_missing_among_numbers_is_asked_about(values, code):
    with pytest.raises(LabelError, match=f"x: {code} in 1 rows looks like a code for a missing value among numbers "
                                         "from"):
        labels(values)
    assert labels(values, missing_codes=[float(code)]).kind == "regression"
    assert labels(values, "regression").values.tolist() == values


@pytest.mark.parametrize(("task", "values", "codes"), [
    ("age", [60, -4, 71.5, -2, 80], [-4, -2]), ("Age", [60, 71.5, 80, 635], [635]),
    ("age", [60, 999, -4, 70, 81], [-4, 999]), ("mmse", [28, -4, 30, 12, -4], [-4]),
    ("mmse", [28, -4, 30, -9, 12], [-9, -4]), ("cigarettes", [*range(41), -10, -3, -1], [-10, -3, -1])])
def test_ages_that_cannot_be_and_few_negative_numbers_are_asked_about(task, values, codes):
    def read(kind="auto", missing_codes=()):
        return read_labels(pd.DataFrame({task: values}), task, kind, missing_codes)

    rest = [value for value in values if value not in codes]
    listed, rows = ", ".join(map(str, codes)), len(values) - len(rest)
    with pytest.raises(LabelError, match=f"{task}: {listed} in {rows} rows looks like a code for a missing value among "
                                         f"numbers from {min(rest)} to {max(rest)}: list it in missing_codes"):
        read()
    assert read(missing_codes=codes).kind == "regression" and read("regression").values.tolist() == values


@pytest.mark.parametrize(("task", "values"), [
    ("age", [0.5, 3.25, 119.5]), ("age", [280, 300, 310]), ("months", [20, 300, 310]), ("change", [-20, 12, -4, 30]),
    ("change", [-4.5, 12, 30]), ("change", [*range(-3, 60)]), ("change", [-5, -3, 20, 30, 40, 50, 60])])
def test_numbers_that_can_be_are_not_asked_about(task, values):
    assert read_labels(pd.DataFrame({task: values}), task).values.tolist() == values


@pytest.mark.parametrize("values", [[35, 34, 29, 33, 31, 30], [15, 20, 20, 22, 29, 29, 30] * 4, [1, -1, 1], [8, 9, 8],
                                    [77.5, 88, 99, 60], [0, 1, 1], list(range(20, 90)), [-1.5, 0.3, 2.1, -1],
                                    [-60.5, 12, -99, 40]])
def test_what_is_clear_is_not_asked_about(values):
    assert labels(values).kind == ("regression" if len(set(values)) > 2 else "classification")


def test_text_is_trimmed_and_case_is_asked_about():
    found = labels(["F", "M", "M ", " F", ""])
    assert found.classes == ("F", "M") and np.array_equal(found.values, [0, 1, 1, 0, np.nan], equal_nan=True)
    for one, other in (("yes", "YES"), ("01", "1"), ("AD", "Ad")):
        with pytest.raises(LabelError, match=f"({one}|{other}) and ({one}|{other}) differ only by case or zeros"):
            labels([one, other, "x"])


@pytest.mark.parametrize(("code", "words"), [("-9", "-9"), ("-9.0", "-9.0"), ("NA", "NA"), ("n/a ", "n/a"),
                                             ("Unknown", "Unknown"), (".", r"\."), ("?", r"\?"), ("999", "999")])
def test_text_that_looks_like_a_code_for_missing_is_asked_about(code, words):
    with pytest.raises(LabelError, match=rf"x: {words} \(3\) looks like a code for a missing value among AD \(2\), "
                                         r"CN \(2\): list it in missing_codes, or, .* set task_type: classification"):
        labels(["AD", "CN"] * 2 + [code] * 3)
    assert labels(["AD", "CN", code], missing_codes=[code]).classes == ("CN", "AD")
    assert set(labels(["AD", "CN", code] * 2, "classification").classes) == {"AD", "CN", code.strip()}
    with pytest.raises(LabelError, match="x: NA .1., None .2. looks like a code for a missing value: list it"):
        labels(["None", "NA", "None"])
    assert labels(["NA1", "-", "NA1"], missing_codes=["x"], kind="classification").classes == ("-", "NA1")
    assert labels(["009", "010"] * 2).classes == ("009", "010")  # names, not numbers


@pytest.mark.parametrize("kind", ["auto", "classification"])
@pytest.mark.parametrize("task", ["sex", "Gender"])
def test_a_sex_written_in_two_ways_is_asked_about(task, kind):
    column = pd.Series(["F", "Male", "M", "Male"])
    with pytest.raises(LabelError, match=rf"{task}: M and Male: one class or two\? Found F \(1\), M \(1\), Male \(2\). "
                                         "Write each class in one way"):
        read_labels(pd.DataFrame({task: column}), task, kind)
    assert read_labels(pd.DataFrame({"x": ["M", "Male"]}), "x", kind).classes == ("M", "Male")
    assert read_labels(pd.DataFrame({task: column.replace("M", None)}), task, kind).classes == ("F", "Male")


def test_sexes_that_share_a_letter_and_effect_codes_are_two():
    assert sexes(pd.Series(["XX", "xy", None, "x"])).fillna("").tolist() == ["XX", "XY", "", "X"]
    assert read_labels(pd.DataFrame({"sex": ["XX", "XY", "XX"]}), "sex").classes == ("XX", "XY")
    assert sexes(pd.Series([-1, 1.0, None, "1"])).tolist()[:2] == ["-1", "1"]


def test_sexes_of_cells_that_look_missing_are_unknown():
    found = sexes(pd.Series(["male", " f", "NA", "-9", -9.0, "unknown", None, 1.0, "n/a", 9]))
    assert found.fillna("").tolist() == ["M", "F", "", "", "", "", "", "1", "", ""]


def test_words_that_others_read_as_missing_are_classes_if_that_is_said():
    found = labels(["None", "NA", "NA"], "classification")
    assert found.classes == ("NA", "None") and found.values.tolist() == [1, 0, 0]


def test_names_of_zeros_are_no_numbers():
    with pytest.raises(LabelError, match=r"with at least two scans each; found 3: 001 \(2\), 002 \(1\), A3 \(1\)"):
        labels(["001", "001", "002", "A3"])


@pytest.mark.parametrize(("values", "message"), [
    (["63", "inf", "70", "71"], "text where numbers are needed: inf"),
    ([63, np.inf, 70], "1 numbers are infinite"),
    (["63,5", "70", "71", "72"], "63,5; decimal commas"),
    (["03.04.2021", "70", "71", "72"], "03.04.2021; dates"),
    (["2021-04-03", "70", "71", "72"], "2021-04-03; dates"),
    (["NA", "70", "71", "72"], "NA; .* list its codes in missing_codes"),
])
def test_what_is_no_number_is_named(values, message):
    with pytest.raises(LabelError, match=message):
        labels(values)
