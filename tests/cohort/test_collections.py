"""Public collections are read as they are downloaded; only the contrast that is asked for is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.cohort.collections import contrast_of
from kit.cohort.tables import read_cohort
from kit.cohort.tabular import CohortError

FIRST = ["participant", "session", "dataset", "image_path", "mask_path"]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def fomo60k(folder: Path) -> Path:
    touch(folder, "PT001_OASIS1/sub_1/ses_1/t1.nii.gz", "PT001_OASIS1/sub_1/ses_1/t1_2.nii.gz",
          "PT001_OASIS1/sub_1/ses_2/t1.nii.gz", "PT001_OASIS1/sub_1/ses_2/flair.nii.gz",
          "PT002_MSD/sub_1/ses_1/t1.nii.gz", "PT002_MSD/sub_1/ses_1/t1c.nii.gz", "PT002_MSD/sub_1/ses_1/t2.nii.gz",
          "PT002_MSD/sub_2/ses_1/t1c.nii.gz", "PT002_MSD/sub_2/ses_1/mprage.nii.gz",
          "PT002_MSD/sub_2/ses_1/t1.nii.gz", "PT003_X/sub-7/ses-1/anat/FLAIR.nii.gz",
          "PT003_X/sub-7/ses-1/dwi/dwi.nii.gz", "PT003_X/sub-7/ses-1/anat/scan.nii.gz")
    (folder / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tsex\tage\tgroup\nPT001_OASIS1\tsub_1\tses_1\tF\t71\tnondemented\n"
        "PT001_OASIS1\tsub_1\tses_2\tF\t73\tnondemented\nPT002_MSD\tsub_1\tses_1\tM\tn/a\tBrain Tumor\n")
    (folder / "mapping.tsv").write_text("dataset\tparticipant_id\tsession_id\tfilename\n")
    return folder


def test_fomo60k_with_its_labels_and_without_other_contrasts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cohort = read_cohort(fomo60k(tmp_path / "FOMO60K"))
    assert cohort.columns.tolist() == [*FIRST, "sex", "age", "group"]
    assert cohort[["dataset", "participant", "session"]].values.tolist() == [
        ["PT001_OASIS1", "1", "1"], ["PT001_OASIS1", "1", "1_run-2"], ["PT001_OASIS1", "1", "2"],
        ["PT002_MSD", "1", "1"], ["PT002_MSD", "2", "1"], ["PT002_MSD", "2", "1_t1"]]
    assert cohort["image_path"][1] == str(tmp_path / "FOMO60K/PT001_OASIS1/sub_1/ses_1/t1_2.nii.gz")
    assert cohort["image_path"][4].endswith("mprage.nii.gz")
    assert cohort["age"].tolist()[:3] == [71, 71, 73] and cohort["age"].isna().tolist()[3:] == [True] * 3
    assert cohort["group"][3] == "Brain Tumor" and set(cohort["mask_path"]) == {""}
    assert capsys.readouterr().out.endswith(
        "FOMO60K: 6 T1w scans; left out: 2 FLAIR, 2 T1ce, 1 T2w, 1 dwi, 1 scan\n")


def test_the_archive_of_an_unzipped_session_may_stay(tmp_path: Path) -> None:
    touch(tmp_path, "PT001_A/sub-01/ses-1/t1.nii.gz", "PT001_A/sub-01/ses-1.zip", "PT001_A/sub-01/ses-2/t1.nii.gz")
    assert read_cohort(tmp_path)["session"].tolist() == ["1", "2"]
    touch(tmp_path, "PT001_A/sub-01/ses-3.zip")
    with pytest.raises(CohortError, match="1 of its sessions are still zipped"):
        read_cohort(tmp_path)


@pytest.mark.parametrize("place", ["PT001_A/sub-01/ses-1", "sub-01/anat", "sub-01/ses-1/anat"])
def test_hidden_files_of_macos_are_no_scans(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    name = "_".join(part for part in place.split("/") if "-" in part) + "_T1w.nii.gz"
    touch(tmp_path, f"{place}/{name}", f"{place}/._{name}", f"{place}/._FLAIR.nii")
    if not place.startswith("PT"):
        (tmp_path / "dataset_description.json").write_text('{"Name": "site"}')
    assert read_cohort(tmp_path)["image_path"].tolist() == [str(tmp_path / place / name)]
    assert capsys.readouterr().out == ""  # nor are they counted among those left out


@pytest.mark.parametrize(("asked", "count"), [("FLAIR", 2), ("flair", 2), ("T1ce", 2), ("t1c", 2), ("T2w", 1),
                                              ("scan", 1), ("t1", 6)])
def test_another_contrast_is_asked_for_by_name(tmp_path: Path, asked: str, count: int) -> None:
    assert len(read_cohort(fomo60k(tmp_path), contrast=asked)) == count


def test_fomo300k_and_one_of_its_datasets(tmp_path: Path) -> None:
    touch(tmp_path, *(f"PT030_OpenNeuro/ds000001/sub-01/ses-01/anat/sub-01_ses-01_{name}.nii.gz"
                      for name in ("run-1_T1w", "run-2_T1w", "T2w")),
          "PT030_OpenNeuro/ds000002/sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz",
          "PT001_A/sub-01/ses-01/t1w.nii.gz", "PT001_A/sub-01/ses-01/dwi/sub-01_ses-01_dwi_bval1000.nii.gz")
    for place, age in (("PT030_OpenNeuro/ds000001", 30), ("PT030_OpenNeuro/ds000002", 40)):
        (tmp_path / place / "participants.tsv").write_text(f"participant_id\tsession_id\tage\nsub-01\tses-01\t{age}\n")
    cohort = read_cohort(tmp_path)
    assert cohort[["dataset", "participant", "session"]].values.tolist() == [
        ["PT001_A", "01", "01"], ["PT030_OpenNeuro/ds000001", "01", "01_run-1"],
        ["PT030_OpenNeuro/ds000001", "01", "01_run-2"], ["PT030_OpenNeuro/ds000002", "01", "01"]]
    assert cohort["age"].fillna(0).tolist() == [0, 30, 30, 40]
    one = read_cohort(tmp_path / "PT030_OpenNeuro" / "ds000002")
    assert one["dataset"].tolist() == ["ds000002"] and one["age"].tolist() == [40]


def test_each_table_is_joined_by_its_own_columns_and_labels_without_scans_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/sub-01/ses-{visit}/t1w.nii.gz" for name in ("PT001_A", "PT002_B") for visit in (1, 2)))
    (tmp_path / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tage\nPT001_A\tsub-01\tses-1\t30\nPT001_A\tsub-01\tses-2\tn/a\n"
        "PT001_A\tsub-09\tses-1\t7\n")
    (tmp_path / "PT001_A/participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t50\tF\n")
    (tmp_path / "PT002_B/participants.tsv").write_text("participant_id\tsex\nsub-01\tM\nsub-02\tF\n")
    with pytest.warns(UserWarning) as said:
        cohort = read_cohort(tmp_path).fillna(-1)
    assert cohort[["dataset", "session", "age", "sex"]].values.tolist() == [
        ["PT001_A", "1", 30, "F"], ["PT001_A", "2", 50, "F"], ["PT002_B", "1", -1, "M"], ["PT002_B", "2", -1, "M"]]
    assert [str(each.message).removeprefix(f"{tmp_path}/") for each in said] == [
        "participants.tsv: 1 of 3 rows are of no scan taken; their labels are not used",
        "PT002_B/participants.tsv: 1 of 2 rows are of no scan taken; their labels are not used"]


def test_what_is_lost_of_bids_that_is_read_as_fomo_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "A/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "B/sub-01/anat/sub-01_T1w.nii.gz",
          "A/sub-01/sub-01_sessions.tsv", "A/derivatives/x/sub-01/ses-1/anat/sub-01_ses-1_desc-brain_mask.nii.gz")
    with pytest.warns(UserWarning, match="FOMO .*, so participants without a session folder are left out, sessions.tsv "
                                         "is not read, masks in derivatives/ are not used; if it is BIDS") as said:
        assert len(read_cohort(tmp_path)) == 1
    assert [each.filename for each in said] == [__file__]


def image(path: str, modality: str, **info: object) -> dict:
    return {"name": Path(path).name, "image_path": path, "modality": modality, "image_info": info,
            "associated_masks": {"anatomy_mask": f"{path}.mask", "anonymization_mask": None}}


def nnssl(folder: Path) -> Path:
    """What nnssl's conversion script writes, in small."""
    sessions = {"ses-DEFAULT": {"session_info": None, "images": [
        image("$collections/OpenMind/ds000001/sub-01/anat/sub-01_T1w.nii.gz", "T1w", manufacturer="X"),
        image("$collections/OpenMind/ds000001/sub-01/anat/sub-01_acq-2_T1w.nii.gz", "T1w"),
        image("$collections/OpenMind/ds000001/sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz", "T1w"),
        image("$collections/OpenMind/ds000001/sub-01/anat/sub-01_FLAIR.nii.gz", "FLAIR")]}}
    other = {"ses-a": {"images": [image("ds000002/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "T1w")]}}
    collection = {"collection_index": 1, "collection_name": "Dataset001_OpenMind", "datasets": {
        "ds000001": {"dataset_index": "ds000001", "subjects": {"sub-01": {
            "subject_id": "sub-01", "subject_info": {"age": 30, "sex": "F"}, "sessions": sessions}}},
        "ds000002": {"dataset_index": "ds000002", "subjects": {"sub-01": {"subject_info": None, "sessions": other}}}}}
    (folder / "pretrain_data.json").write_text(json.dumps(collection))
    return folder / "pretrain_data.json"


@pytest.mark.parametrize("named", ["file", "folder"])
def test_nnssls_collection(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    file = nnssl(tmp_path)
    monkeypatch.setenv("collections", "/data")
    cohort = read_cohort(file if named == "file" else tmp_path)
    assert cohort[["dataset", "participant", "session", "image_path"]].values.tolist() == [
        ["ds000001", "01", "01", "/data/OpenMind/ds000001/sub-01/anat/sub-01_T1w.nii.gz"],
        ["ds000001", "01", "01_acq-2", "/data/OpenMind/ds000001/sub-01/anat/sub-01_acq-2_T1w.nii.gz"],
        ["ds000002", "01", "a", str(tmp_path / "ds000002/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz")]]
    assert cohort["sex"].tolist()[:2] == ["F", "F"] and cohort["manufacturer"][0] == "X"
    assert set(cohort["mask_path"]) == {""}
    assert capsys.readouterr().out.endswith("3 T1w scans; left out: 1 FLAIR, 1 T1ce\n")


def test_labels_of_nnssls_collection_are_typed_as_those_of_tables(tmp_path: Path) -> None:
    ages: list = ["71", "63.5", None, "n/a", 30, float("nan")]
    subjects = {f"sub-0{number}": {"subject_info": {"age": age, "site": f"0{number}", "visits": number}, "sessions": {
        "ses-a": {"images": [image(f"{number}_T1w.nii.gz", "T1w")]}}} for number, age in enumerate(ages)}
    (tmp_path / "pretrain_data.json").write_text(json.dumps({"datasets": {"d": {"subjects": subjects}}}))
    cohort = read_cohort(tmp_path)
    assert cohort["age"].dtype == float and cohort["age"].fillna(-1).tolist() == [71, 63.5, -1, -1, 30, -1]
    assert cohort["site"].tolist() == ["00", "01", "02", "03", "04", "05"]
    assert cohort["visits"].dtype == int and cohort["visits"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_sessions_own_labels_and_a_contrast_with_a_hyphen_are_read(tmp_path: Path) -> None:
    sessions = {f"ses-{age}": {"session_info": {"age": age}, "images": [image(f"{age}_T1w.nii.gz", "T1-weighted")]}
                for age in (60, 65)}
    (tmp_path / "pretrain_data.json").write_text(json.dumps({"datasets": {"d": {"subjects": {
        "sub-01": {"subject_info": {"age": 1, "sex": "F"}, "sessions": sessions}}}}}))
    cohort = read_cohort(tmp_path)
    assert cohort["age"].tolist() == [60, 65] and cohort["sex"].tolist() == ["F", "F"]


def test_openmind_as_it_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "openneuro_metadata.csv").write_text(
        "unique_id,image_path,modality,anat_mask_path,age,sex,image_quality_score\n"
        "u1,ds000001/sub-01/anat/sub-01_T1w.nii.gz,T1w,ds000001/sub-01/anat/sub-01_T1w__Data/fb_mask.nii.gz,30,F,1.5\n"
        "u2,ds000001/sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz,T1w,,,M,\n"
        "u3,ds000001/sub-02/ses-b/dwi/sub-02_ses-b_dwi__Data/FA.nii.gz,FA,,,M,\n")
    for path in (tmp_path, tmp_path / "openneuro_metadata.csv"):
        cohort = read_cohort(path)
        assert cohort.columns.tolist() == [*FIRST, "age", "sex", "image_quality_score"]
        assert cohort[["dataset", "participant", "session"]].values.tolist() == [
            ["ds000001", "01", "01"], ["ds000001", "02", "b"]]
        assert cohort["image_path"][0] == str(tmp_path / "OpenMind/ds000001/sub-01/anat/sub-01_T1w.nii.gz")


def test_only_an_empty_cell_and_bidss_word_are_missing(tmp_path: Path) -> None:
    fomo, openmind = fomo60k(tmp_path / "FOMO60K"), tmp_path / "openneuro_metadata.csv"
    (fomo / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tgroup\tsite\tage\nPT001_OASIS1\tsub_1\tses_1\tNA\t01\t71,5\n"
        "PT001_OASIS1\tsub_1\tses_2\tNone\t1\tn/a\nPT002_MSD\tsub_1\tses_1\t\t1\t7\n")
    cohort = read_cohort(fomo).fillna("missing")
    assert cohort["group"].tolist() == ["NA", "NA", "None", "missing", "missing", "missing"]
    assert cohort["site"].tolist()[:4] == ["01", "01", "1", "1"]
    assert cohort["age"].tolist()[:4] == [71.5, 71.5, "missing", 7]
    openmind.write_text(",image_path,modality,group\n0,NA/sub-null/anat/sub-null_T1w.nii.gz,T1w,NA\n"
                        "1,NA/sub-02/anat/sub-02_T1w.nii.gz,T1w,n/a\n")
    cohort = read_cohort(openmind).fillna("missing")
    assert cohort[["dataset", "participant", "group"]].values.tolist() == [
        ["NA", "null", "NA"], ["NA", "02", "missing"]]


def test_contrast_agent_is_left_out_of_bids_folders_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
          "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_acq-mp_T1w.nii")
    (tmp_path / "dataset_description.json").write_text('{"Name": "site"}')
    assert read_cohort(tmp_path)[["participant", "session"]].values.tolist() == [["02", "a"], ["01", "01"]]
    assert capsys.readouterr().out.endswith("2 T1w scans; left out: 1 FLAIR, 1 T1ce\n")
    enhanced = read_cohort(tmp_path, "T1ce")
    assert enhanced["session"].tolist() == ["01"] and set(enhanced["dataset"]) == {"site"}


@pytest.mark.parametrize(("name", "contrast"), [
    ("t1.nii.gz", "T1w"), ("t1_2.nii.gz", "T1w"), ("sub-01_ses-1_run-2_T1w.nii", "T1w"), ("mprage.nii.gz", "T1w"),
    ("t1c.nii.gz", "T1ce"), ("sub-01_ce-gd_acq-x_T1w.nii.gz", "T1ce"), ("sub-01_ce-gd_FLAIR.nii.gz", "FLAIRce"),
    ("t2star.nii.gz", "t2star"), ("sub-01_UNIT1.nii.gz", "UNIT1"), ("sub-01_dwi_bval1000.nii.gz", "dwi_bval1000"),
    ("scan.nii.gz", "scan"), ("sub-01_T1map.nii.gz", "T1map"), ("sub-01_inplaneT1.nii.gz", "inplaneT1"),
])
def test_contrast_stands_in_the_files_name(name: str, contrast: str) -> None:
    assert contrast_of(name) == contrast


@pytest.mark.parametrize(("file", "text", "message"), [
    ("PT001_A/sub-01/ses-01.zip", "", "1 of its sessions are still zipped; unzip each"),
    ("PT001_A/sub-01/ses-01/scan.nii.gz", "", "no T1w scans in it, but 1 scan; ask for another contrast"),
    ("PT001_A/sub-01/ses-01/t1.txt", "", "no T1w scans in it; is it the right folder"),
    ("pretrain_data.json", "{", "pretrain_data.json is not an nnssl collection .*create it again"),
    ("pretrain_data.json", '{"datasets": {"a": {"subjects": []}}}', "is not an nnssl collection"),
    ("pretrain_data.json", json.dumps({"datasets": {"a": {"subjects": {"b": {"sessions": {"c": {"images": [
        image("$nowhere_set/x_T1w.nii.gz", "T1w")]}}}}}}}), "set the environment variable nowhere_set"),
    ("openneuro_metadata.csv", "id,age\n1,2\n", "needs the columns image_path, modality; download it again"),
    ("openneuro_metadata.csv", "", "is not a table: .*; download it again"),
    *(("openneuro_metadata.csv", f"image_path,modality\n{path},T1w\n",
       f"openneuro_metadata.csv: image_path is '{path}', not dataset/participant/.../scan; download it again")
      for path in ("", "ds1", "ds1/sub-1_T1w.nii.gz", "/ds1/a.nii")),
])
def test_faults_name_the_file_and_a_cure(tmp_path: Path, file: str, text: str, message: str) -> None:
    touch(tmp_path, file)
    (tmp_path / file).write_text(text)
    with pytest.raises(CohortError, match=message):
        read_cohort(tmp_path)


def test_labels_of_a_collection_of_several_datasets_name_the_dataset(tmp_path: Path) -> None:
    for name in ("PT001_A", "PT002_B"):
        touch(tmp_path, f"{name}/sub_1/ses_1/t1.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub_1\t7\n")
    with pytest.raises(CohortError, match="participants.tsv: needs a column dataset, as the collection has several"):
        read_cohort(tmp_path)


def test_participants_table_without_ids_is_named(tmp_path: Path) -> None:
    (fomo60k(tmp_path) / "participants.tsv").write_text("id\tage\nsub_1\t7\n")
    with pytest.raises(CohortError, match="participants.tsv: needs a column participant_id; found id, age"):
        read_cohort(tmp_path)
