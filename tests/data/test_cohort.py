"""Cohorts from tables and BIDS folders."""

import json

import pytest

from kit.data.cohort import CohortError, read_cohort


def test_three_columns_are_enough(tmp_path):
    table = tmp_path / "site.csv"
    table.write_text("image_path,mask_path,label\na.nii.gz,,1\nsub/b.nii.gz,m.nii.gz,0\n")
    cohort = read_cohort(table)
    assert cohort.columns.tolist() == ["participant", "session", "dataset", "image_path", "mask_path", "label"]
    assert cohort["image_path"].tolist() == [str(tmp_path / "a.nii.gz"), str(tmp_path / "sub/b.nii.gz")]
    assert cohort["mask_path"].tolist() == ["", str(tmp_path / "m.nii.gz")]
    assert cohort["participant"].tolist() == ["00001", "00002"] and set(cohort["dataset"]) == {"site"}


def test_leading_zeros_and_missing_values_survive(tmp_path):
    table = tmp_path / "site.tsv"
    table.write_text("participant\tsession\timage_path\tage\n007\t1\ta.nii\t71.5\n008\t\tb.nii\tn/a\n")
    cohort = read_cohort(table)
    assert cohort["participant"].tolist() == ["007", "008"] and cohort["session"].tolist() == ["1", "01"]
    assert cohort["age"].isna().tolist() == [False, True]


def test_scans_listed_twice_are_refused(tmp_path):
    table = tmp_path / "site.csv"
    table.write_text("participant,image_path\n1,a.nii\n1,b.nii\n")
    with pytest.raises(CohortError, match="1 scans are listed twice, the first: participant 1, session 01"):
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
    cohort = read_cohort(tmp_path)
    assert cohort[["participant", "session"]].values.tolist() == [
        ["01", "a"], ["01", "b"], ["02", "01"], ["02", "01_run-2"]]
    assert cohort["age"].tolist()[:2] == [60, 62] and cohort["age"].isna().tolist()[2:] == [True, True]
    assert cohort["mask_path"].tolist() == ["", str(mask), "", ""] and set(cohort["dataset"]) == {"site"}


@pytest.mark.parametrize(("file", "text", "message"), [
    ("participants.tsv", "participant_id\tsession\nsub-01\ta\n", "participants.tsv: a column session .* rename"),
    ("participants.tsv", "participant_id\tage\nsub-01\t6\n01\t7\n", "participant_id 01 is listed twice; keep"),
    ("participants.tsv", "id\tage\nsub-01\t6\n", "participants.tsv: needs a column participant_id; found id, age"),
    ("participants.tsv", "", "participants.tsv is no table"),
    ("sub-01/sub-01_sessions.tsv", "session\tage\nses-a\t6\n",
     "sub-01_sessions.tsv: needs a column session_id; found session, age"),
    ("sub-01/sub-01_sessions.tsv", "session_id\tage\nses-a\t6\nses-a\t7\n", "session_id a is listed twice"),
    ("dataset_description.json", "{", "dataset_description.json is no JSON object"),
    ("sub-01/ses-a/anat/scan_T1w.nii.gz", "", "scan_T1w.nii.gz: its name must begin with sub-01_"),
    ("sub-01/ses-a/anat/sub-01_ses-a_T1w.nii", "", "1 scans are listed twice"),
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
