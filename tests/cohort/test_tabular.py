"""The kit's own tables come back as they were: text as text, numbers as numbers."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.cohort.tabular import TableError, ages, read_foreign, read_table
from kit.runs import write_table
from kit.store.store import read_index

WORDS = st.one_of(st.sampled_from(["001", "1", "1.0", "NA", "None", "null", "nan", "inf", "True", 'say "x"', "a,b"]),
                  st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, st.none() | WORDS, st.integers(-2**53, 2**53), st.none() | st.floats(allow_nan=False)),
                min_size=1, max_size=6))
def test_a_table_comes_back(tmp_path_factory, rows):
    table = pd.DataFrame(rows, columns=["scan", "site", "number", "score"])
    table["score"] = table["score"].astype(float)
    path = write_table(tmp_path_factory.mktemp("t") / "t.csv", table)
    found = read_table(path, text=("scan",))
    assert found["scan"].tolist() == table["scan"].tolist() and found["number"].tolist() == table["number"].tolist()
    assert np.array_equal(found["score"], table["score"], equal_nan=True)
    assert [None if pd.isna(cell) else cell for cell in found["site"]] == [
        None if pd.isna(cell) else cell for cell in table["site"]]


def test_a_columns_type_is_that_of_all_its_rows(tmp_path):
    (tmp_path / "t.tsv").write_text("site\tage\n" + "01\t60\n" * 100_000 + "1\t61\n" * 150_000 + "1\tn/a\n")
    found = read_foreign(tmp_path / "t.tsv", list)
    assert found["site"].value_counts().to_dict() == {"1": 150_001, "01": 100_000} and found["age"].sum() == 15_150_000


def test_text_that_looks_like_numbers_stays_text(tmp_path):
    table = pd.DataFrame({"encoder": ["001", "1"], "epoch": [1, 2], "loss": [0.5, None]})
    found = read_table(write_table(tmp_path / "t.csv", table))
    assert found["encoder"].tolist() == ["001", "1"] and found["epoch"].tolist() == [1, 2] and found["loss"][0] == 0.5
    assert found["epoch"].dtype == np.int64 and pd.isna(found["loss"][1])


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text('image_path,note\na.nii,"unclosed\nb.nii,"closed"\nc.nii,x\n')
    with pytest.raises(TableError, match="t.csv is not a table: .*look for a quote that is not closed"):
        read_foreign(tmp_path / "t.csv", list)
    (tmp_path / "t.csv").write_text('image_path,note\na.nii,"left" hand\nb.nii,x\n')
    assert read_foreign(tmp_path / "t.csv", list)["note"].tolist() == ["left hand", "x"]
    (tmp_path / "t.csv").write_text('image_path,note\na.nii,"two\nlines"\nb.nii,x\n')
    assert read_foreign(tmp_path / "t.csv", list)["note"].tolist() == ["two\nlines", "x"]


@pytest.mark.parametrize("quoted", [True, False])
def test_an_index_of_this_and_of_an_older_kit(tmp_path, quoted):
    index = pd.DataFrame({"scan": ["a", "b"], "participant": ["001", "2"], "session": ["NA", "1"],
                          "dataset": ["", "NA"], "site": ["01", "1"], "age": [60, 61],
                          "note": ["NA", None], "flags": ["", "snr low"], "unusable": ["", "contrast"]})
    write_table(tmp_path / "i.csv", index) if quoted else index.to_csv(tmp_path / "i.csv", index=False)
    found = read_index(tmp_path / "i.csv")
    for name in index:
        assert found[name].fillna("-").tolist() == index[name].fillna("-").tolist()


@pytest.mark.parametrize("cells", [["63", "999", "NA"], ["63", "999", "NA", "unknown", "n/a"]])
def test_ages_are_numbers_however_many_are_missing(cells):
    assert ages(pd.Series(cells)).dropna().tolist() == [63.0]


@pytest.mark.parametrize("cells", [["60-69", "70-79", "999"], ["60-69", "63"], ["NA", "NA"]])
def test_bands_of_ages_are_left_as_they_are(cells):
    assert ages(pd.Series(cells)).tolist() == cells
