"""Whatever tables look like: one person is on one side, a label stays on its row, the order of rows says nothing."""

import csv
import io
import json
import re
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.cohort.identity import (
    SPREADSHEETS_OWN,
    IdentityError,
    joined,
    key,
    normalised,
    participant_ids,
    read_aliases,
    read_id,
    site_names,
    unnamed_datasets,
)
from kit.cohort.labels import read_labels
from kit.cohort.split import Splitting, check_unseen, label_subset, participant_hash, salt, splits
from kit.cohort.tables import read_cohort
from kit.cohort.tabular import CohortError
from kit.preprocess.index import scan_names
from kit.runs import write_table
from kit.store.store import read_index

FEW = settings(max_examples=60, deadline=None)
STEMS = st.text(st.sampled_from("abxyzNA"), max_size=3)
HEADINGS = st.fixed_dictionaries({
    "participant": st.sampled_from(["participant", "Participant ", " PARTICIPANT_ID", "subject", "Subject ID"]),
    "session": st.sampled_from(["session", "Session", "session_id "]),
    "image_path": st.sampled_from(["image_path", "Image_Path", " image_path"]),
    "dataset": st.sampled_from(["dataset", " Dataset"])})
SPACE = st.sampled_from(["", " ", "  ", "\t", "\u00a0", "\u200b"])
WORDS = st.sampled_from(["NA", "None", "null", "nan", "inf", "01", "1", "F", "M", "1.50", "2021-01-02", "", "n/a"])


@st.composite
def people(draw):
    """Names, none of which may be another's with other zeros or case."""
    names = draw(st.lists(st.tuples(STEMS, st.integers(0, 999), st.integers(1, 4)), min_size=5, max_size=12,
                          unique_by=lambda name: (name[0].casefold(), name[1])))
    return [stem + f"{number:0{width}d}" for stem, number, width in names]


@st.composite
def cohorts(draw):
    """Rows (dataset, participant, session, image, age, word) as they are meant, and the same as somebody typed them."""
    meant, typed = [], []
    for name in draw(people()):
        dataset = draw(st.sampled_from(["adni", "NA", "OASIS 3"]))
        for session in range(draw(st.integers(1, 3))):
            age, word = draw(st.integers(20, 90)) + 0.5, draw(WORDS)
            row = (dataset, name, f"{session:02d}", f"{len(meant)}.nii.gz", age, word)
            meant.append(row)
            left, right = draw(SPACE), draw(SPACE)
            sub, ses = draw(st.sampled_from(["", "sub-", "Sub-"])), draw(st.sampled_from(["", "ses-"]))
            typed.append({
                "dataset": left + dataset + right, "participant": left + sub + name + right,
                "session": ses + row[2] + right, "image_path": row[3] + right, "age": f"{left}{age}{right}",
                "word": left + word + right})
    between, order = draw(st.sampled_from([",", ";", "\t"])), draw(st.permutations(range(len(meant))))
    return meant, typed, draw(HEADINGS), between, order


def written(folder, typed, headings, between, order, name="site.csv", encoding="utf-8"):
    text = io.StringIO()
    table = csv.DictWriter(text, list(typed[0]), delimiter=between)
    text.write(between.join(headings.get(column, column) for column in typed[0]) + "\n")
    table.writerows(typed[row] for row in order)
    (folder / name).write_text(text.getvalue(), encoding=encoding)
    return read_cohort(folder / name)


@FEW
@given(cohorts(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_everybody_is_one_and_has_their_own_labels(cohort, encoding):
    meant, typed, headings, between, order = cohort
    with tempfile.TemporaryDirectory() as folder:
        table = written(Path(folder), typed, headings, between, range(len(meant)), encoding=encoding)
        turned = written(Path(folder), typed, headings, between, order, "turned.csv")
        index = table.drop(columns=["image_path", "mask_path"]).assign(scan=scan_names(table))
        again = read_index(write_table(Path(folder) / "index.csv", index))
    for found, rows in ((table, meant), (turned, [meant[row] for row in order]), (again, meant)):
        assert found["participant"].tolist() == [row[1] for row in rows]
        assert found["dataset"].tolist() == [row[0] for row in rows]
        assert found["session"].tolist() == [row[2] for row in rows]
        assert read_labels(found, "age", "regression").values.tolist() == [row[4] for row in rows]
        words = [row[5] for row in rows]
        if found["word"].dtype != float:  # text, for one cell at least is no number
            assert found["word"].fillna("").tolist() == ["" if word == "n/a" else word for word in words]
        else:
            assert not set(words) - {"1", "1.50", "", "n/a"}
    for seed in (0, 1):
        ways = [Splitting(split_seed=seed)] + [Splitting(2, split_seed=seed)] * (participant_ids(table).nunique() > 1)
        for way in ways:
            place = splits(table, way).groupby(participant_ids(table)).nunique()
            assert (place == 1).all()
            here, there = (dict(zip(rows["image_path"].map(lambda path: Path(path).name), splits(rows, way),
                                    strict=True)) for rows in (table, turned))
            assert here == there
        few, turned_few = (set(rows["image_path"][label_subset(
            participant_ids(rows), rows["age"].to_numpy(), "regression", 0.5, seed)]) for rows in (table, turned))
        assert few == turned_few


@FEW
@given(people(), st.data())
def test_a_person_is_seen_under_any_spelling(names, data):
    seen = {participant_hash(key(f"ADNI/{name}"), salt()) for name in names[::2]}
    zeros = data.draw(st.lists(st.sampled_from(["", " ", "sub-", "SUB-"]), min_size=len(names), max_size=len(names)))
    spelled = pd.Series([f"adni /{prefix}{name.upper()} " for prefix, name in zip(zeros, names, strict=True)])
    assert check_unseen(spelled, seen, allow=True) == len(names[::2])
    assert check_unseen(spelled.str.replace("adni", "oasis"), seen) == 0
    assert len({key(name) for name in spelled}) == len(names)


@FEW
@given(people(), st.integers(0, 100), st.sampled_from([str.upper, str.lower, lambda name: "0" + name,
                                                       lambda name: name + ".0"]))
def test_two_spellings_in_one_table_are_always_asked_about(names, place, change):
    name = names[place % len(names)]
    other = change(name)
    rows = [{"participant": each, "image_path": f"{row}.nii"} for row, each in enumerate([*names, other])]
    with tempfile.TemporaryDirectory() as folder:
        if other == name:
            with pytest.raises(CohortError, match="scans have the dataset, participant and session of another"):
                written(Path(folder), rows, {}, ",", range(len(rows)))
        elif normalised(other) == normalised(name):
            with pytest.raises(CohortError, match="the same.* write them alike"):
                written(Path(folder), rows, {}, ",", range(len(rows)))


@FEW
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from(["", "_run-2", "_acq-x", "_ce-gd"]),
                          st.integers(20, 90), st.booleans()), min_size=1, max_size=12,
                unique_by=lambda row: row[:3]), st.randoms())
def test_a_bids_session_has_the_labels_of_its_row(rows, random):
    ages = {(person, session): age for person, session, _, age, _ in rows}
    listed = {(person, session) for person, session, _, _, listed in rows if listed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dataset_description.json").write_text(json.dumps({"Name": "site"}))
        (folder / "participants.tsv").write_text("participant_id\tage\n" + "".join(
            f"sub-{person:02d}\t{person}\n" for person in random.sample(range(1, 6), 5)))
        for person, session, entities, _, _ in rows:
            anat = folder / f"sub-{person:02d}/ses-{session}/anat"
            anat.mkdir(parents=True, exist_ok=True)
            (anat / f"sub-{person:02d}_ses-{session}{entities}_T1w.nii.gz").touch()
        for person in {person for person, _ in listed}:
            (folder / f"sub-{person:02d}/sub-{person:02d}_sessions.tsv").write_text("session_id\tage\n" + "".join(
                f"ses-{session}\t{ages[person, session]}\n" for session in (3, 1, 2) if (person, session) in listed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if all("ce-" in entities for _, _, entities, _, _ in rows):
                with pytest.raises(CohortError, match="no T1w scans"):
                    read_cohort(folder)
                return
            cohort = read_cohort(folder)
    expected = {(person, session) for person, session, entities, _, _ in rows if "ce-" not in entities}
    assert {(int(row.participant), int(row.session)) for row in cohort.itertuples()} == expected and len(
        cohort) == len(expected)
    for row in cohort.itertuples():
        person, session = int(row.participant), int(row.session)
        assert row.age == (ages[person, session] if (person, session) in listed else person)


def test_identities_are_trimmed_and_lose_bids_prefix():
    for text in ("sub-001", " 001", "001\u00a0", "\ufeff001", "\u200b001", "SUB-001", "０01"):
        assert read_id(text) == "001"
    assert read_id("ses-M024", "ses") == "M024" and read_id("subject-1") == "subject-1"
    assert key(" ADNI/sub-001") == key("adni/1") == "adni/1" and key("?site/001") == "?/1"


def test_aliases(tmp_path):
    path = tmp_path / "aliases.csv"
    path.write_text("Dataset;participant_id;person\nadni;sub-001;P\noasis;17;P\nadni;2;Q\n")
    aliases = read_aliases(path)
    assert aliases["adni/1"] == aliases["oasis/17"] == ("adni/1", "oasis/17") and aliases["adni/2"] == ("adni/2",)
    index = pd.DataFrame({"dataset": ["oasis", "ADNI", "ADNI"], "participant": ["17", "001", "3"]})
    assert participant_ids(joined(index, aliases)).tolist() == ["ADNI/001", "ADNI/001", "ADNI/3"]
    unnamed = index.assign(dataset="?site")
    with pytest.raises(IdentityError, match="the cohort has no column dataset, so nobody in the table of aliases"):
        joined(unnamed, aliases)
    with pytest.raises(IdentityError, match="dataset 'OA-SIS' of the cohort is 'oasis' in the table of aliases"):
        joined(index.replace("oasis", "OA-SIS"), aliases)  # its 17 would stay another person
    both = {name: ("oa-sis/17", "oasis/17") for name in ("oa-sis/17", "oasis/17")}  # both spellings are listed
    assert participant_ids(joined(index.replace("oasis", "OA-SIS"), both))[0] == "OA-SIS/17"
    assert participant_ids(joined(unnamed, {"?/1": ("?/1", "?/3"), "?/3": ("?/1", "?/3")})).nunique() == 2
    path.write_text("dataset,participant,person\nadni,1,P\nadni,001,Q\n")
    with pytest.raises(IdentityError, match="adni/1 is listed as several persons"):
        read_aliases(path)


@pytest.mark.parametrize(("first", "second"), [("001", "1"), ("P1", "p1")])
def test_two_spellings_of_one_person_are_asked_about(tmp_path, first, second):
    (tmp_path / "aliases.csv").write_text(f"dataset,participant,person\na,1,{first}\nb,2,{second}\n")
    with pytest.raises(IdentityError, match=f"aliases.csv: person: are '{first}' and '{second}' the same"):
        read_aliases(tmp_path / "aliases.csv")


def test_datasets_without_a_name_are_said_before_work():
    cohort = pd.DataFrame({"dataset": ["oasis", "?site", "?site"]})
    assert unnamed_datasets(cohort).startswith("site: the scans have no dataset name, and 3_finetune refuses")
    assert unnamed_datasets(cohort[:1]) == ""


@pytest.mark.parametrize("sites", [[1, 2, 10], [1.0, 2.0, 10.0], ["1.0", "2", "10.0"]])
def test_a_numbered_site_has_one_name_whether_or_not_a_cell_is_empty(sites):
    index = pd.DataFrame({"dataset": "adni", "site": sites})
    assert site_names(index).tolist() == ["adni/1", "adni/2", "adni/10"]
    assert site_names(index.rename(columns={"site": "Site"})).tolist() == ["adni/1", "adni/2", "adni/10"]
    empty = pd.concat([index, pd.DataFrame({"dataset": ["adni"], "site": [None]})], ignore_index=True)
    assert site_names(empty).tolist()[:3] == ["adni/1", "adni/2", "adni/10"] and pd.isna(site_names(empty)[3])
    named = pd.DataFrame({"dataset": "adni", "site": ["v1.0", "1.5", "01"]})
    assert site_names(named).tolist() == ["v1.0", "adni/1.5", "adni/01"]


@pytest.mark.parametrize("name", ["Pat-01", "Con-12", "12-Abc", "P-01"])
def test_three_letters_and_a_number_are_a_name(name):
    assert not re.fullmatch(SPREADSHEETS_OWN, name)


@pytest.mark.parametrize("name", ["Jan-02", "02-Jan", "2-Dec-19", "1.2E+11"])
def test_what_a_spreadsheet_makes_of_a_name_is_none(name):
    assert re.fullmatch(SPREADSHEETS_OWN, name)
