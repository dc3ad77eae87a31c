"""Shards prepare a cohort in parts; the last one merges them into what one run would have made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from kit.params import Preprocess
from kit.preprocess import index as index_module
from kit.preprocess import preprocess
from kit.preprocess.index import PreparationError, merge_shards, set_aside_merged, shard_of
from kit.preprocess.nifti import write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.reading import ParameterError, check
from kit.store.grid import Grid
from kit.store.store import Store, StoreError

SETTINGS = Preparation(Grid((12, 16, 14), 12.0), "none", "nonzero")


def cohort(folder: Path, scans: int = 11) -> pd.DataFrame:
    """Noise in a box of brain's size, zeros around it; the fourth file is no scan."""
    rng = np.random.default_rng(0)
    affine = np.diag([12.0, 12, 12, 1])
    affine[:3, 3] = [-70, -100, -60]
    for row in range(scans):
        write_nifti(folder / f"{row}.nii.gz", np.pad(rng.uniform(10, 100 + row, (8, 9, 10)), 1), affine)
    (folder / "3.nii.gz").write_text("no scan", encoding="utf-8")
    names = [f"{row:04d}" for row in range(scans)]
    return pd.DataFrame({"participant": names, "session": "NA", "dataset": "d", "age": [*range(scans - 1), None],
                         "image_path": [str(folder / f"{row}.nii.gz") for row in range(scans)]})


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard}-of-3"


def test_names_must_differ_in_the_whole_cohort_not_only_in_a_shard(tmp_path: Path) -> None:
    table = cohort(tmp_path, 4).assign(participant=["P_1", "P-1", "Q", "R"])
    with pytest.raises(PreparationError, match="d_P-1_NA"):
        shard_of(table, 0, 2)


def test_masks_that_nobody_has_are_missed_before_a_shard_begins(tmp_path: Path) -> None:
    table = cohort(tmp_path, 4)
    with pytest.raises(PreparationError, match="mask"):
        shard_of(table.assign(mask_path=""), 0, 2, "given")
    parts = [shard_of(table.assign(mask_path=["", "m.nii", "", ""]), shard, 2, "given") for shard in (0, 1)]
    assert sum(map(len, parts)) == 4


def test_merged_shards_are_what_one_run_makes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = cohort(tmp_path)
    one, one_failed = prepare(table, tmp_path / "one", SETTINGS, workers=0)
    for shard, waits in ((2, "3 of 3 shards (0, 1, 2)"), (0, "2 of 3 shards (0, 1)"), (1, "1 of 3 shards (1)")):
        assert merge_shards(table, tmp_path / "merged", 3) is None
        assert f"not merged yet: waiting for {waits}; the last to finish merges all" in capsys.readouterr().out
        prepare(shard_of(table, shard, 3), shard_folder(tmp_path / "merged", shard), SETTINGS, workers=0)
    for _ in range(2):  # merging again changes nothing
        index, failed = merge_shards(table, tmp_path / "merged", 3)
        pd.testing.assert_frame_equal(index.drop(columns="seconds"), one.drop(columns="seconds"), check_dtype=False)
        assert failed["scan"].tolist() == one_failed["scan"].tolist() == ["d_0003_NA"]
    store, whole = Store.open(tmp_path / "merged"), Store.open(tmp_path / "one")
    assert store.index["session"].tolist() == ["NA"] * 10 and store.index["participant"][0] == "0000"
    for scan in store.index["scan"]:
        np.testing.assert_array_equal(store.read(scan)[0], whole.read(scan)[0])
    assert len(list((tmp_path / "merged" / "scans").iterdir())) == 10
    # A shard that is prepared again is merged again.
    changed = tmp_path / "0.nii.gz"
    write_nifti(changed, np.pad(np.random.default_rng(5).uniform(10, 90, (8, 9, 10)), 1), np.diag([12.0, 12, 12, 1]))
    prepare(shard_of(table, 2, 3), shard_folder(tmp_path / "merged", 2), SETTINGS, workers=0)
    merge_shards(table, tmp_path / "merged", 3)
    assert not np.array_equal(Store.open(tmp_path / "merged").read("d_0000_NA")[0], whole.read("d_0000_NA")[0])


def test_a_shard_without_masks_does_not_end_the_preparation(tmp_path: Path) -> None:
    table, merged, settings = cohort(tmp_path, 6), tmp_path / "merged", Preparation(SETTINGS.grid, "none", "given")
    ball = np.linalg.norm(np.moveaxis(np.indices((10, 11, 12)), 0, -1) - [4.5, 5, 5.5], axis=-1) < 4.2
    write_nifti(tmp_path / "mask.nii.gz", ball, nib.load(table["image_path"][4]).affine)
    table["mask_path"] = ["", "", "", "", str(tmp_path / "mask.nii.gz"), ""]  # one scan of shard 2
    for shard in range(3):
        prepare(shard_of(table, shard, 3), shard_folder(merged, shard), settings, workers=0, part=True)
    index, failed = merge_shards(table, merged, 3)
    assert index["participant"].tolist() == ["0004"]
    without = failed["reason"].str.startswith("mask: no mask_path given for this scan; add it")
    assert without.tolist() == [True, True, True, False, True]  # the fourth file is no scan
    with pytest.raises(PreparationError, match="mask: 'given' needs a column mask_path; otherwise use 'auto'"):
        prepare(table.assign(mask_path=""), tmp_path / "none", settings, workers=0)


def test_shards_of_other_settings_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    other = Preparation(SETTINGS.grid, "none", "nonzero", intensity="whitematter")
    for shard in range(3):
        prepare(shard_of(table, shard, 3), shard_folder(merged, shard), SETTINGS, workers=0)
    assert len(merge_shards(table, merged, 3)[0]) == 10
    for shard in range(3):  # all are prepared anew, one by one
        prepare(shard_of(table, shard, 3), shard_folder(merged, shard), other, workers=0)
        found = merge_shards(table, merged, 3)
        said = "shards of different preparations (intensity) are not merged" in capsys.readouterr().out
        assert (found is None) == said == (shard < 2)
    assert Store.open(merged).record["intensity"] == "whitematter"


def test_a_merged_index_of_other_scans_or_settings_is_set_aside_before_a_shard_starts(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, merged, record = cohort(tmp_path), tmp_path / "merged", SETTINGS.record()
    set_aside_merged(table, merged, record)  # nothing is there
    for shard in range(3):
        prepare(shard_of(table, shard, 3), shard_folder(merged, shard), SETTINGS, workers=0)
    merge_shards(table, merged, 3)
    index = (merged / "index.csv").read_bytes()
    set_aside_merged(table[::-1].assign(age=50), merged, record | {"versions": {}})  # the same scans and settings
    assert (merged / "index.csv").read_bytes() == index and capsys.readouterr().out == ""
    for rows, settings, why in ((table.iloc[:9], record, "0 scans are new, 2 no longer in the cohort"),
                                (table, record | {"intensity": "whitematter"},
                                 "intensity: zscore there, whitematter asked")):
        for said in (f"merged/index.csv is of another preparation ({why}): renamed to index.old.csv until all", ""):
            set_aside_merged(rows, merged, settings)  # the second shard finds nothing to do
            out = capsys.readouterr().out
            assert said in out and bool(said) == bool(out)
        assert (merged / "index.old.csv").read_bytes() == index
        with pytest.raises(StoreError, match=r"no index\.csv"):
            Store.open(merged)
        merge_shards(table, merged, 3)
        assert (merged / "index.csv").read_bytes() == index


def test_shards_that_set_the_merged_index_aside_at_once_do_not_crash(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    prepare(table, merged, SETTINGS, workers=0)
    outcomes = index_module._outcomes
    monkeypatch.setattr(index_module, "_outcomes", lambda folder: (
        outcomes(folder), (folder / "index.csv").rename(folder / "index.old.csv"))[0])  # on a disk without locks
    set_aside_merged(table.iloc[:9], merged, SETTINGS.record())
    assert (merged / "index.old.csv").is_file()


@pytest.mark.parametrize("missing", ["failed.csv", "preparation.json"])
def test_a_merged_index_that_cannot_be_compared_is_set_aside(
        tmp_path: Path, capsys: pytest.CaptureFixture, missing: str) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    prepare(table, merged, SETTINGS, workers=0)
    (merged / missing).unlink()
    capsys.readouterr()
    set_aside_merged(table.iloc[:9], merged, SETTINGS.record())
    assert f"merged/index.csv cannot be compared with this preparation (no {missing}): renamed to index.old.csv" in (
        capsys.readouterr().out)
    assert (merged / "index.old.csv").is_file() and not (merged / "index.csv").exists()


def test_every_scan_is_in_one_shard(tmp_path: Path) -> None:
    table = cohort(tmp_path)
    parts = pd.concat([shard_of(table, shard, 3) for shard in range(3)])
    assert sorted(parts["participant"]) == table["participant"].tolist()
    said = r"11 scans leave 6 of 13 shards empty \(2, 3, 4, 7, 8, 12\), .* use at most 4"
    for shard in (0, 12):  # refused in all of them, before any work
        with pytest.raises(PreparationError, match=said):
            shard_of(table, shard, 13)


def many(scans: int) -> pd.DataFrame:
    return pd.DataFrame({"participant": [f"p{row:05d}" for row in range(scans)], "session": "1", "dataset": "d",
                         "image_path": ""})


def test_a_changed_row_leaves_all_other_scans_in_their_shards() -> None:
    whole = many(6000)
    fewer = whole.drop(index=100).sample(frac=1, random_state=0)  # one row deleted, the rest in another order
    before, after = ([set(shard_of(rows, shard, 10)["participant"]) for shard in range(10)] for rows in (whole, fewer))
    assert min(map(len, before)) > 500 and max(map(len, before)) < 700
    assert [one - other for one, other in zip(before, after, strict=True) if one != other] == [{"p00100"}]
    assert set().union(*after) < set().union(*before)


@pytest.mark.parametrize("once_merged", [True, False])
def test_scans_are_not_prepared_again_after_a_change_of_shards(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once_merged: bool) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    parts = [prepare(shard_of(table, shard, 3), shard_folder(merged, shard), SETTINGS, workers=0, part=True)[0]
             for shard in range(3)]
    first = pd.concat(parts).sort_values("scan", ignore_index=True)
    if once_merged:
        merge_shards(table, merged, 3)
    write_nifti(tmp_path / "5.nii.gz", np.pad(np.random.default_rng(5).uniform(10, 90, (8, 9, 10)), 1),
                np.diag([12.0, 12, 12, 1]))
    done, prepare_scan = [], preprocess.prepare_scan
    monkeypatch.setattr(preprocess, "prepare_scan", lambda job: (done.append(job.scan), prepare_scan(job))[1])
    for shard in range(2):
        prepare(shard_of(table, shard, 2), merged / "shards" / f"{shard}-of-2", SETTINGS, workers=0, part=True)
    assert sorted(done) == ["d_0003_NA", "d_0005_NA"]  # no scan, and one that has changed
    second = merge_shards(table, merged, 2)[0].sort_values("scan", ignore_index=True)
    assert (second["seconds"] == first["seconds"])[second["scan"] != "d_0005_NA"].all()


def test_a_shard_has_a_folder_of_its_own(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path / "out"), "shards": 4, "shard": 3}
    params = check(Preprocess, values)
    assert params.run_dir == tmp_path / "out" / "shards" / "3-of-4" and params.output_dir == tmp_path / "out"
    assert check(Preprocess, params.plain()) == params
    alone = check(Preprocess, {"output_dir": str(tmp_path / "out")})
    assert alone.output_dir == alone.run_dir == tmp_path / "out"
    with pytest.raises(ParameterError, match="shard: got 4; 4 shards are numbered 0 to 3"):
        check(Preprocess, values | {"shard": 4})


def test_labels_come_out_of_shards_as_the_text_that_they_were(tmp_path: Path) -> None:
    table = cohort(tmp_path, 13).drop(index=3).reset_index(drop=True)
    site = ["001", "001", "002", "A3", "1", "NA", "1", "2", "3", "1", "1", "1"]
    table = table.assign(site=site, count=range(12))
    for shard in range(3):  # sites 1, 1, 1 in the first, 002, NA, 2, 1, 1 in the second, 001, 001, A3, 3 in the third
        prepare(shard_of(table, shard, 3), shard_folder(tmp_path / "merged", shard), SETTINGS, workers=0)
    merge_shards(table, tmp_path / "merged", 3)
    index = Store.open(tmp_path / "merged").index
    assert index["site"].tolist() == site and index["count"].tolist() == list(range(12))


def test_a_shard_of_an_older_cohort_is_not_merged_and_labels_are_the_present_ones(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    for shard in range(3):
        prepare(shard_of(table.iloc[:10], shard, 3), shard_folder(merged, shard), SETTINGS, workers=0)
    assert len(merge_shards(table.iloc[:10], merged, 3)[0]) == 9
    renewed = table.assign(age=table["age"] + 50)
    assert merge_shards(renewed, merged, 3) is None  # the eleventh scan belongs into shard 0
    assert "shards of another cohort (0-of-3) are not merged: prepare them again" in capsys.readouterr().out
    assert len(Store.open(merged).index) == 9
    prepare(shard_of(renewed, 0, 3), shard_folder(merged, 0), SETTINGS, workers=0)
    index, failed = merge_shards(renewed, merged, 3)
    assert index["age"].dropna().tolist() == [50, 51, 52, *range(54, 60)] and len(index) == 10 and len(failed) == 1


def test_a_shard_without_good_scans_is_merged_and_a_cohort_without_them_refused(tmp_path: Path) -> None:
    table, merged = cohort(tmp_path), tmp_path / "merged"
    for name in shard_of(table, 0, 3)["image_path"]:
        Path(name).write_text("no scan", encoding="utf-8")
    for shard in (1, 2, 0):
        index, failed = prepare(shard_of(table, shard, 3), shard_folder(merged, shard), SETTINGS, 0, part=True)
        assert (len(index), len(failed)) == ((0, 4) if shard == 0 else (3 if shard == 1 else 4, 0))
    index, failed = merge_shards(table, merged, 3)
    assert len(index) == 7 and failed["participant"].tolist() == ["0003", "0005", "0007", "0010"]
    for shard in (1, 2):
        for name in shard_of(table, shard, 3)["image_path"]:
            Path(name).write_text("no scan", encoding="utf-8")
        (shard_folder(merged, shard) / "index.csv").unlink()
        prepare(shard_of(table, shard, 3), shard_folder(merged, shard), SETTINGS, 0, part=True)
    with pytest.raises(PreparationError, match=r"none of 11 scans could be prepared.*index\.csv lists scans"):
        merge_shards(table, merged, 3)
    (merged / "index.csv").unlink()
    with pytest.raises(PreparationError, match="none of 11 scans could be prepared; the first, d_0000_NA: "):
        merge_shards(table, merged, 3)


@pytest.mark.parametrize("mask", ["", "mask.nii"])
def test_a_shard_on_a_node_without_the_data_is_not_merged(tmp_path: Path, mask: str) -> None:
    table = cohort(tmp_path, 8).drop(index=3).assign(mask_path=mask and str(tmp_path / "disk" / mask))
    if not mask:
        table["image_path"] = str(tmp_path / "disk" / "scan.nii.gz")
    settings, own = replace(SETTINGS, mask="auto"), shard_folder(tmp_path, 0)
    reason = "mask: no such file" if mask else "no such file"
    with pytest.raises(PreparationError, match=f"none of 6 scans .*, d_0000_NA: {reason} .* mounted on this node"):
        prepare(table[:6], own, settings, workers=0, part=True)
    assert not (own / "index.csv").exists()
    if not mask:
        with pytest.raises(PreparationError, match="none of 2 scans .* mounted on this node"):
            prepare(table[:2], own, settings, workers=0, part=True)
    (tmp_path / "disk").mkdir()
    index, failed = prepare(table[:5], own, settings, workers=0, part=True)  # the folder is there: so few may be chance
    assert index.empty and len(failed) == 5
    (own / "index.csv").unlink()
    (tmp_path / "disk" / (mask or "scan.nii.gz")).write_text("no scan", encoding="utf-8")  # the disk is there
    index, failed = prepare(table[:7], own, settings, workers=0, part=True)
    assert index.empty and len(failed) == 7 and (own / "index.csv").is_file()


@pytest.mark.parametrize("part", [False, True])
def test_an_index_survives_a_rerun_without_the_scans_files(tmp_path: Path, part: bool) -> None:
    (tmp_path / "disk").mkdir()
    table = cohort(tmp_path / "disk")
    prepare(table, tmp_path / "out", SETTINGS, workers=0)
    before = [(tmp_path / "out" / name).read_bytes() for name in ("index.csv", "failed.csv")]
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(PreparationError, match=r"d_0000_NA: no such file \(.*/disk/0\.nii\.gz\)\. .*/out/index\.csv "
                                               "lists scans prepared earlier and is kept: is the disk .* mounted"):
        prepare(table, tmp_path / "out", SETTINGS, workers=0, part=part)
    assert [(tmp_path / "out" / name).read_bytes() for name in ("index.csv", "failed.csv")] == before
