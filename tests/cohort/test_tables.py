"""Cohorts from tables and BIDS folders."""

import json
import warnings

import pandas as pd
import pytest

from kit.cohort.tables import read_cohort
from kit.cohort.tabular import COLUMNS, CohortError


def test_three_columns_are_enough(tmp_path):
    table = tmp_path / "site.csv"
    table.write_text("image_path,mask_path,label\na.nii.gz,,1\nsub/b.nii.gz,m.nii.gz,0\n")
    cohort = read_cohort(table)
    assert cohort.columns.tolist() == ["participant", "session", "dataset", "image_path", "mask_path", "label"]
    assert cohort["image_path"].tolist() == [str(tmp_path / "a.nii.gz"), str(tmp_path / "sub/b.nii.gz")]
    assert cohort["mask_path"].tolist() == ["", str(tmp_path / "m.nii.gz")]
    assert cohort["participant"].tolist() == ["?a", "?b"] and set(cohort["dataset"]) == {"?site"}  # ?: nobody said


@pytest.mark.parametrize("name", ["COHORT.CSV", "Cohort.Csv"])
def test_a_suffix_in_capitals_is_a_tables(tmp_path, name):
    assert table_of(tmp_path, "participant,image_path\n001,a.nii\n", name)["participant"].tolist() == ["001"]


def test_leading_zeros_and_missing_values_survive(tmp_path):
    table = tmp_path / "site.tsv"
    table.write_text("participant\tsession\timage_path\tage\n007\t1\ta.nii\t71.5\n008\t\tb.nii\tn/a\n")
    cohort = read_cohort(table)
    assert cohort["participant"].tolist() == ["007", "008"] and cohort["session"].tolist() == ["1", "01"]
    assert cohort["age"].isna().tolist() == [False, True]


def test_scans_listed_twice_are_refused(tmp_path):
    table = tmp_path / "site.csv"
    table.write_text("participant,image_path\n1,a.nii\n1,b.nii\n")
    with pytest.raises(CohortError, match="1 scans have the dataset, participant and session of another, the first: "
                                          "participant 1, session 01"):
        read_cohort(table)


def test_bids_with_sessions_labels_and_masks(tmp_path):
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "site", "BIDSVersion": "1.9.0"}))
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\tage\nsub-01\tF\t60\nsub-02\tM\tn/a\n")
    for scan in ("sub-01/ses-a/anat/sub-01_ses-a", "sub-01/ses-b/anat/sub-01_ses-b", "sub-02/anat/sub-02",
                 "sub-02/anat/sub-02_run-2"):
        file = tmp_path / f"{scan}_T1w.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    mask = tmp_path / "derivatives/x/sub-01/ses-b/anat/sub-01_ses-b_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    mask.touch()
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-b\t62\n")
    with pytest.warns(UserWarning, match="1 further scans of a session"):
        cohort = read_cohort(tmp_path)
    assert cohort[["participant", "session"]].values.tolist() == [
        ["01", "a"], ["01", "b"], ["02", "01"]]
    assert cohort["age"].tolist()[:2] == [60, 62] and cohort["age"].isna().tolist()[2:] == [True]
    assert cohort["mask_path"].tolist() == ["", str(mask), ""] and set(cohort["dataset"]) == {"site"}


def test_a_mask_of_the_t1w_is_not_given_to_another_contrast(tmp_path):
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "site"}))
    for participant, contrasts in (("01", ("T1w", "FLAIR")), ("02", ("FLAIR",))):
        names = [f"sub-{participant}_{contrast}.nii.gz" for contrast in contrasts]
        for file in (*(f"sub-{participant}/anat/{name}" for name in names),
                     f"derivatives/x/sub-{participant}/anat/sub-{participant}_desc-brain_mask.nii.gz"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
    masks = [str(tmp_path / f"derivatives/x/sub-{who}/anat/sub-{who}_desc-brain_mask.nii.gz") for who in ("01", "02")]
    with pytest.warns(UserWarning, match=f"1 masks are not used, .*T1w scan of the same name, the first: {masks[0]};"):
        assert read_cohort(tmp_path, "FLAIR")["mask_path"].tolist() == ["", masks[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_cohort(tmp_path)["mask_path"].tolist() == [masks[0]]


def test_masks_of_two_pipelines_are_not_mixed_in_silence(tmp_path):
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "site"}))
    for file in ("sub-01/anat/sub-01_T1w.nii.gz", "derivatives/synthstrip/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
                 "sub-02/anat/sub-02_T1w.nii.gz", "derivatives/synthstrip/sub-02/anat/sub-02_desc-brain_mask.nii.gz",
                 "derivatives/fmriprep/sub-02/anat/sub-02_desc-brain_mask.nii.gz"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.warns(UserWarning, match="has brain masks of fmriprep, synthstrip. .*fmriprep for 1 scans, synthst"):
        pipelines = [path.split("/")[-4] for path in read_cohort(tmp_path)["mask_path"]]
    assert pipelines == ["synthstrip", "fmriprep"]


@pytest.mark.parametrize(("file", "text", "message"), [
    ("participants.tsv", "participant_id\tsession\nsub-01\ta\n", "participants.tsv: its column session .* rename"),
    ("participants.tsv", "participant_id\tage\nsub-01\t6\n01\t7\n", "participant_id 01 is listed twice; keep one row a "
     "participant; rows of its sessions belong in sub-.*/sub-.*_sessions.tsv, or in a table of scans with a column"),
    ("participants.tsv", "id\tage\nsub-01\t6\n", "participants.tsv: needs a column participant_id; found id, age"),
    ("participants.tsv", "", "participants.tsv is not a table"),
    ("sub-01/sub-01_sessions.tsv", "session\tage\nses-a\t6\n",
     "sub-01_sessions.tsv: needs a column session_id; found session, age"),
    ("sub-01/sub-01_sessions.tsv", "session_id\tage\nses-a\t6\nses-a\t7\n",
     "session_id a is listed twice; keep one row a session$"),
    ("dataset_description.json", "{", "dataset_description.json is not a JSON object"),
    ("sub-01/ses-a/anat/scan_T1w.nii.gz", "", "scan_T1w.nii.gz: its name must begin with sub-01_"),
    ("sub-01/ses-a/anat/sub-01_ses-a_T1w.nii", "", "1 scans have the dataset, participant and session of another"),
])
def test_faults_of_a_bids_folder_name_file_and_cure(tmp_path, file, text, message):
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "site"}))
    (tmp_path / "sub-01/ses-a/anat").mkdir(parents=True)
    (tmp_path / "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz").touch()
    if file != "sub-01/sub-01_sessions.tsv":
        (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t62\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(CohortError, match=message):
        read_cohort(tmp_path)


def table_of(folder, text, name="site.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return read_cohort(folder / name)


@pytest.mark.parametrize("heading", ["participant", "Participant", " participant", "participant ", "participant_id",
                                     "PARTICIPANT ID", "subject", "Subject_ID", "\ufeffparticipant"])
def test_a_participant_is_read_whatever_the_heading(tmp_path, heading):
    cohort = table_of(tmp_path, f"{heading},Session,Image_Path,age\nsub-001,ses-01,a.nii,60\n 001 ,02,b.nii,61\n")
    assert cohort["participant"].tolist() == ["001", "001"] and cohort["session"].tolist() == ["01", "02"]
    assert cohort.columns.tolist() == [*COLUMNS, "age"] and cohort["age"].tolist() == [60, 61]


def test_a_second_name_of_a_participant_is_a_column_like_others(tmp_path):
    cohort = table_of(tmp_path, "subject_id,participant,image_path\nX1,007,a.nii\n")
    assert cohort["participant"].tolist() == ["007"] and cohort["subject_id"].tolist() == ["X1"]


@pytest.mark.parametrize(("first", "second"), [("001", "1"), ("A01", "a01"), ("IXI_1", "IXI_001"), ("7", "7.0")])
def test_names_that_may_be_one_persons_are_asked_about(tmp_path, first, second):
    with pytest.raises(CohortError, match=f"are '({first}|{second})' and '({first}|{second})' the same"):
        table_of(tmp_path, f"participant,image_path\n{first},a.nii\n{second},b.nii\n")
    cohort = table_of(tmp_path, f"participant,dataset,image_path\n{first},x,a.nii\n{second},y,b.nii\n")
    assert cohort["participant"].tolist() == [first, second]  # in two datasets they are two


@pytest.mark.parametrize(("text", "message"), [
    ("participant,image_path\n1.2E+11,a.nii\n",
     "1.2E\\+11: a spreadsheet has turned the name into a date or a rounded number"),
    ("participant,image_path\n02-Jan,a.nii\n", "02-Jan: a spreadsheet has turned the name into a date"),
    ("participant,image_path,age\n1,a.nii,#REF!\n", "age holds #REF!, a spreadsheet error, in 1 rows"),
    ("participant,Participant,image_path\n1,2,a.nii\n", "several columns are participant"),
    ("participant,image_path,age,age \n1,a.nii,60,61\n", "several columns are age"),
    ("participant,image_path\n1,a.nii,60\n", "row 2 has more cells than the header"),
    ("participant,image_path,\n1,a.nii,60\n", "column 3 has no name"),
    ('participant,image_path\n1,"a.nii\n2,b.nii\n', "a quote that is not closed"),
    ("participant,dataset,image_path\n1,ADNI,a.nii\n2,adni,b.nii\n", "dataset: are 'ADNI' and 'adni' the same"),
])
def test_tables_that_cannot_be_read_say_why(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        table_of(tmp_path, text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("between", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_any_mark_between_cells_and_a_byte_order_mark(tmp_path, encoding, between, suffix):
    text = "participant;image_path;score;sex\n001;a.nii;1.5;F\n002;b.nii;n/a;M \n".replace(";", between)
    (tmp_path / f"a.{suffix}").write_bytes(text.encode(encoding))
    cohort = read_cohort(tmp_path / f"a.{suffix}")
    assert cohort["participant"].tolist() == ["001", "002"] and cohort["sex"].tolist() == ["F", "M"]
    assert cohort["score"][0] == 1.5 and pd.isna(cohort["score"][1])


def test_decimal_commas_are_numbers_beside_semicolons(tmp_path):
    cohort = table_of(tmp_path, "participant;image_path;age;mixed\n1;a.nii;63,5;1,5\n2;b.nii;71;1.5\n")
    assert cohort["age"].tolist() == [63.5, 71] and cohort["mixed"].tolist() == ["1,5", "1.5"]


@pytest.mark.parametrize("cells", [("1,234", "987"), ("n/a", "12,345", "40", "1,234"), ("-1,234", "-987"),
                                   ("3,412", "n/a", "1,234")])
def test_commas_that_may_separate_thousands_are_asked_about(tmp_path, cells):
    text = "image_path\tvolume\n" + "".join(f"{row}.nii\t{cell}\n" for row, cell in enumerate(cells))
    with pytest.raises(CohortError, match="site.tsv: volume holds '-?1,234'( beside '-?[0-9]+')?: does the comma"):
        table_of(tmp_path, text, "site.tsv")
    with pytest.raises(CohortError, match=": volume holds '-?1,234'"):
        bids(tmp_path, [f"sub-{row}" for row in range(len(cells))], {
            "participants.tsv": "participant_id volume\n" + "".join(f"sub-{row} {cell}\n"
                                                                    for row, cell in enumerate(cells))})


@pytest.mark.parametrize(("cells", "values"), [
    (("1,234", "987,5"), [1.234, 987.5]), (("0,123", "1"), [0.123, 1]),
    (("2,345", "1", "0"), [2.345, 1, 0])])
def test_three_decimals_behind_a_comma_are_read(tmp_path, cells, values):
    text = "image_path\tvolume\n" + "".join(f"{row}.nii\t{cell}\n" for row, cell in enumerate(cells))
    assert table_of(tmp_path, text, "site.tsv")["volume"].tolist() == values
    text = "image_path;thickness\na.nii;2,512\nb.nii;2,431\n"  # as a spreadsheet writes decimal commas
    assert table_of(tmp_path, text)["thickness"].tolist() == [2.512, 2.431]


def test_latin_1_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_bytes("image_path,site\na.nii,Zürich\n".encode("latin-1"))
    with pytest.raises(CohortError, match="not a UTF-8 table .* save it as `CSV UTF-8`"):
        read_cohort(tmp_path / "a.csv")


def test_only_an_empty_cell_and_bids_own_word_are_missing(tmp_path):
    words = ["None", "NA", "null", "nan", "NaN", "N/A", "n/a", ""]
    cohort = table_of(tmp_path, "participant,dataset,image_path,class,split\n"
                      + "".join(f"{word or 'x'},NA,{row}.nii,{word} ,Test\n" for row, word in enumerate(words)
                                if word not in ("nan", "n/a")))
    assert cohort["participant"].tolist() == ["None", "NA", "null", "NaN", "N/A", "x"]
    assert set(cohort["dataset"]) == {"NA"} and set(cohort["split"]) == {"test"}
    assert cohort["class"].tolist()[:5] == ["None", "NA", "null", "NaN", "N/A"] and pd.isna(cohort["class"][5])


def test_columns_are_numbers_only_where_every_cell_is(tmp_path):
    cohort = table_of(tmp_path, "participant,image_path,site,code,age\n1,a.nii,01,1,7\n2,b.nii,1,A,inf\n")
    assert cohort["site"].tolist() == ["01", "1"] and cohort["code"].tolist() == ["1", "A"]
    assert cohort["age"].tolist() == ["7", "inf"]


def test_one_file_for_two_participants_is_said(tmp_path):
    (tmp_path / "a.nii").touch()
    (tmp_path / "b.nii").symlink_to(tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="1 files are the scans of several participants"):
        table_of(tmp_path, "participant,image_path\n1,a.nii\n2,b.nii\n")
    with pytest.warns(UserWarning, match="1 files are the scans of several participants"):
        table_of(tmp_path, "dataset,participant,image_path\nA,01,a.nii\nB,01,a.nii\n")


def test_what_is_said_points_at_the_line_that_reads_the_cohort(tmp_path):
    (tmp_path / "a.csv").write_text("participant,image_path\n1,a.nii\n2,a.nii\n")
    for folder, scans in (("bids", ("anat/sub-01_ses-1_T1w.nii", "anat/sub-01_ses-1_run-2_T1w.nii")),
                          ("fomo/PT001_A", ("t1.nii",))):
        for scan in scans:
            file = tmp_path / folder / "sub-01/ses-1" / scan
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    (tmp_path / "bids/dataset_description.json").write_text("{}")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\nsub-02\n")
    (tmp_path / "fomo/participants.tsv").write_text("participant_id\nsub-02\n")
    for name, count in (("a.csv", 1), ("bids", 2), ("fomo", 1)):
        with pytest.warns(UserWarning) as said:
            read_cohort(tmp_path / name)
        assert [each.filename for each in said] == [__file__] * count


def test_linked_scans_keep_their_own_names(tmp_path):
    """As DVC and git-annex keep them: a link in the table's folder to a file that is named by its content."""
    (tmp_path / "annex").mkdir()
    (tmp_path / "scans").mkdir()
    for name in ("ab12.nii", "cd34.nii"):
        (tmp_path / "annex" / name).touch()
    (tmp_path / "scans" / "anna.nii").symlink_to("../annex/ab12.nii")
    (tmp_path / "scans" / "mask.nii").symlink_to("../annex/cd34.nii")
    row = table_of(tmp_path, "image_path,mask_path\nscans/anna.nii,./scans/../scans/mask.nii\n").iloc[0]
    assert row["participant"] == "?anna"
    assert row["image_path"] == str(tmp_path / "scans" / "anna.nii")
    assert row["mask_path"] == str(tmp_path / "scans" / "mask.nii")


@pytest.mark.parametrize("name", ["患者（1）/scan.nii", "m².nii", "u\u0308.nii", "می\u200cروم.nii"])
def test_a_file_is_looked_for_under_the_name_that_it_has(tmp_path, name):
    row = table_of(tmp_path, f"participant,image_path,mask_path\n０1, {name}\u200b,{name}\u00a0\n").iloc[0]
    assert row[["participant", "image_path", "mask_path"]].tolist() == ["01", *[str(tmp_path / name)] * 2]


def test_rows_of_an_unknown_split_are_said(tmp_path):
    text = "participant,image_path,split\n1,a.nii,Train\n2,b.nii,ood\n3,c.nii,\n4,d.nii,travelling\n"
    with pytest.warns(UserWarning, match="site.csv: split has 'ood': 2_pretrain uses such rows if") as said:
        table_of(tmp_path, text)
    assert len(said) == 1


def test_names_by_file_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = ["x/t1.nii.gz", "y/t1.nii.gz", "z/other.nii"]
    found = [table_of(tmp_path, "image_path\n" + "\n".join(order)).set_index("image_path")["participant"]
             for order in (rows, rows[::-1])]
    assert found[0].nunique() == 3 and found[0].to_dict() == found[1].to_dict()
    assert found[0].iloc[2] == "?other"


def bids(folder, scans, tables):
    """A BIDS folder with such scans and tables, by their paths; ` ` stands for a tab."""
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "site"}))
    for scan in scans:
        file = folder / "/".join(part for part in scan.split("_") if part.startswith(("sub-", "ses-")))
        (file / "anat").mkdir(parents=True, exist_ok=True)
        (file / "anat" / f"{scan}_T1w.nii.gz").touch()
    for name, text in tables.items():
        (folder / name).write_text(text.replace(" ", "\t"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return read_cohort(folder), " | ".join(str(each.message) for each in said)


@pytest.mark.parametrize("entities", ["", "_acq-mprage", "_run-1", "_acq-mprage_run-1", "_rec-norm"])
def test_a_session_has_the_labels_of_its_own_row_whatever_else_its_file_is_called(tmp_path, entities):
    cohort, said = bids(tmp_path, [f"sub-01_ses-{number}{entities}" for number in ("01", "02")], {
        "participants.tsv": "participant_id age diagnosis\nsub-01 60 CN\n",
        "sub-01/sub-01_sessions.tsv": "session_id age diagnosis\nses-01 60 CN\nses-02 72 AD\n"})
    assert cohort[["session", "age", "diagnosis"]].values.tolist() == [["01", 60, "CN"], ["02", 72, "AD"]] and not said


def test_several_runs_are_one_session_and_contrast_agents_are_left_out(tmp_path, capsys):
    cohort, said = bids(tmp_path, ["sub-01_run-10", "sub-01_run-2", "sub-02_ce-gadolinium", "sub-02", "sub-03_acq-b",
                                   "sub-03_run-2_acq-a", "sub-04_ce-gadolinium"], {})
    assert [path.rsplit("/", 1)[1] for path in cohort["image_path"]] == [
        "sub-01_run-2_T1w.nii.gz", "sub-02_T1w.nii.gz", "sub-03_run-2_acq-a_T1w.nii.gz"]
    assert set(cohort["session"]) == {"01"}
    assert "left out: 2 T1ce" in capsys.readouterr().out and "2 further scans of a session" in said


@pytest.mark.parametrize(("participants", "sessions", "message"), [
    ("participant_id age\nsub-1 60\n", "", "participants.tsv: has sub-1, but the folder is sub-01"),
    ("participant_id age\nsub-01 60\n", "session_id age\nses-M024 72\n", "has ses-M024, but the folder is ses-M24"),
    ("participant_id age\nsub-01 60\nsub-001 61\n", "", "are '001' and '01' the same"),
])
def test_names_that_nearly_match_a_folders_are_refused(tmp_path, participants, sessions, message):
    tables = {"participants.tsv": participants} | ({"sub-01/sub-01_sessions.tsv": sessions} if sessions else {})
    with pytest.raises(CohortError, match=message):
        bids(tmp_path, ["sub-01_ses-M24"], tables)


def test_a_broken_link_to_labels_is_refused(tmp_path):
    (tmp_path / "participants.tsv").symlink_to(tmp_path / "gone.tsv")
    with pytest.raises(CohortError, match="participants.tsv cannot be read: a link to a file that is not there"):
        bids(tmp_path, ["sub-01"], {})


def test_participants_in_one_table_only_are_counted(tmp_path):
    cohort, said = bids(tmp_path, ["sub-01", "sub-02"],
                        {"participants.tsv": "participant_id age\nsub-01 60\nsub-03 5\n"})
    assert "1 participants with scans are not listed; 1 who are listed" in said
    assert cohort["age"][0] == 60 and pd.isna(cohort["age"][1])


def test_the_contrast_asked_for_is_named(tmp_path):
    (tmp_path / "sub-01" / "anat").mkdir(parents=True)
    (tmp_path / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz").touch()
    bids(tmp_path, ["sub-02"], {"participants.tsv": "participant_id age\nsub-01 60\nsub-03 5\n"})
    with pytest.warns(UserWarning, match="1 who are listed have no FLAIR scan"):
        read_cohort(tmp_path, "flair")


def test_a_session_that_says_nothing_is_known_has_no_label(tmp_path):
    cohort, said = bids(tmp_path, ["sub-01_ses-1", "sub-01_ses-2", "sub-01_ses-3", "sub-02_ses-1"], {
        "participants.tsv": "participant_id diagnosis site\nsub-01 CN 01\nsub-02 AD 1\n",
        "sub-01/sub-01_sessions.tsv": "session_id diagnosis\nses-1 CN\nses-2 n/a\n"})
    assert cohort["diagnosis"].fillna("-").tolist() == ["CN", "-", "CN", "AD"]
    assert "1 sessions are not listed" in said and cohort["site"].tolist() == ["01", "01", "01", "1"]


def test_later_sessions_that_get_the_labels_of_the_first_are_counted(tmp_path):
    scans = ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1", "sub-02_ses-2", "sub-03_ses-1"]
    participants = "participant_id age diagnosis split\nsub-01 60 CN test\nsub-02 70 AD test\nsub-03 80 AD test\n"
    words = "{} participants have several sessions and no sessions.tsv: all their sessions have the labels of " \
            "participants.tsv (age, diagnosis); if any change, give those in sub-*/sub-*_sessions.tsv"
    cohort, said = bids(tmp_path, scans, {"participants.tsv": participants})
    assert said.endswith(f": {words.format(2)}") and cohort["age"].tolist() == [60, 60, 70, 70, 80]
    sessions = "session_id age\nses-1 60\nses-2 62\n"
    cohort, said = bids(tmp_path, scans, {"participants.tsv": participants, "sub-01/sub-01_sessions.tsv": sessions})
    assert said.endswith(f": {words.format(1)}") and cohort["age"].tolist() == [60, 62, 70, 70, 80]
    _, said = bids(tmp_path, scans, {"participants.tsv": participants, "sub-01/sub-01_sessions.tsv": sessions,
                                     "sub-02/sub-02_sessions.tsv": sessions})
    assert not said
    (tmp_path / "bare").mkdir()
    names = "".join(f"sub-0{number} test\n" for number in (1, 2, 3))
    assert not bids(tmp_path / "bare", scans, {"participants.tsv": f"participant_id split\n{names}"})[1]  # no labels


def test_types_are_those_of_all_files_together(tmp_path):
    cohort, _ = bids(tmp_path, ["sub-01_ses-1", "sub-02_ses-1"], {
        "sub-01/sub-01_sessions.tsv": "session_id site\nses-1 1\n",
        "sub-02/sub-02_sessions.tsv": "session_id site\nses-1 A3\n"})
    assert cohort["site"].tolist() == ["1", "A3"]


def test_a_scan_in_anothers_folder_is_refused(tmp_path):
    bids(tmp_path, ["sub-01_ses-1"], {})
    (tmp_path / "sub-01/ses-1/anat/sub-02_ses-1_T1w.nii.gz").touch()
    with pytest.raises(CohortError, match="its name must begin with sub-01_ses-1_; rename it"):
        read_cohort(tmp_path)
