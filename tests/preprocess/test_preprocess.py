"""Scans go in in any orientation and come out upright, scored, indexed; bad ones are set aside."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from kit.preprocess import preprocess
from kit.preprocess.index import PreparationError
from kit.preprocess.intensity import z_score
from kit.preprocess.nifti import ScanError, write_nifti
from kit.preprocess.pool import run_all
from kit.preprocess.preprocess import ScanJob, prepare
from kit.preprocess.register import ORIENTATIONS, RegistrationError
from kit.preprocess.settings import Preparation
from kit.preprocess.template import template
from kit.runs import ROOT
from kit.store.grid import Grid
from kit.store.store import Store, StoreError, read_transform

GRID = Grid((25, 32, 33), 6.0)  # coarse, so that the box is small
# The scans' voxels, near MNI space: 4 mm, three unequal sides.
SHAPE_XYZ = (46, 52, 42)
AFFINE = nib.affines.from_matvec(np.diag([4.0, 4.0, 4.0]), [-90, -122, -75])


def points_mm() -> np.ndarray:
    """The MNI millimetres (x, y, z) of a scan's voxels, (46, 52, 42, 3)."""
    return nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE_XYZ), 0, -1))


def brain() -> np.ndarray:
    """(x, y, z) an ellipsoid with a hole in it, brighter towards the top, zero outside: 1,290 ml."""
    middle, radii = np.array([0, -18, 8]), np.array([62, 78, 64])
    reach = (((points_mm() - middle) / radii) ** 2).sum(-1)
    values = np.where(reach < 1, 100 + points_mm()[..., 2] / 4, 0).astype(np.float32)
    values[np.linalg.norm(points_mm() - middle, axis=-1) < 12] = 0
    return values


def save(path: Path, values: np.ndarray, codes: str = "RAS") -> str:
    image = nib.Nifti1Image(values, AFFINE)
    nib.save(image.as_reoriented(ornt_transform(io_orientation(AFFINE), axcodes2ornt(codes))), path)
    return str(path)


def table(paths: list[str], **columns: list) -> pd.DataFrame:
    names = [f"00{row}" for row in range(len(paths))]
    return pd.DataFrame({"participant": names, "session": "ses 1", "dataset": "Test", "image_path": paths, **columns})


def settings(mask: str = "nonzero", registration: str = "none") -> Preparation:
    return Preparation(GRID, registration, mask)


@pytest.fixture
def cohort(tmp_path: Path) -> pd.DataFrame:
    """Four scans, the second one truncated."""
    paths = [save(tmp_path / f"{row}.nii.gz", brain() * (row + 1)) for row in range(4)]
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:3000])
    return table(paths, age=[60.5, 61, 62, 63], lesion_path=["/private/lesion.nii"] * 4)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "ASL", "SRP"])
def test_marked_left_front_top_stays_there(tmp_path: Path, codes: str) -> None:
    values = brain()
    values[np.linalg.norm(points_mm() - [-30, 20, 30], axis=-1) < 9] = 2000
    prepare(table([save(tmp_path / "a.nii.gz", values, codes)]), tmp_path / "out", settings(), workers=0)
    image, _ = Store.open(tmp_path / "out").read("Test_000_ses-1")
    brightest = np.unravel_index(image.argmax(), image.shape)
    np.testing.assert_allclose(nib.affines.apply_affine(GRID.affine, brightest[::-1]), [-30, 20, 30], atol=6)


def test_prepared_folder(cohort: pd.DataFrame, tmp_path: Path) -> None:
    index, failed = prepare(cohort, tmp_path / "out", settings(), workers=0)
    assert index.scan.tolist() == ["Test_000_ses-1", "Test_002_ses-1", "Test_003_ses-1"]
    assert index.age.tolist() == [60.5, 62, 63]
    assert failed.scan.tolist() == ["Test_001_ses-1"]
    assert "truncated gzip" in failed.reason[0]
    assert failed.image_path[0] == cohort.image_path[1]
    text = (tmp_path / "out" / "index.csv").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "lesion" not in text
    store = Store.open(tmp_path / "out")
    assert store.index.participant.tolist() == ["000", "002", "003"]
    assert (store.record["registration"], store.record["mask"]) == ("none", "nonzero")
    assert index["mask_source"].tolist() == ["nonzero"] * 3
    np.testing.assert_array_equal(read_transform(tmp_path / "out", "Test_000_ses-1"), np.eye(4))
    image, mask = store.read("Test_000_ses-1")
    assert image[mask].astype(float).mean() == pytest.approx(0, abs=1e-3)
    assert image[mask].astype(float).std() == pytest.approx(1, abs=1e-3)
    assert not image[~mask].any()
    # Brighter towards the top: scored, not only shifted. Other scales are the same scan.
    assert image[20][mask[20]].mean() > image[5][mask[5]].mean() + 1
    np.testing.assert_allclose(store.read("Test_002_ses-1")[0], image, atol=2e-3)


def test_brain_volume_is_the_scans_and_holes_are_filled(cohort: pd.DataFrame, tmp_path: Path) -> None:
    index, _ = prepare(cohort, tmp_path / "out", settings(), workers=0)
    ellipsoid_ml = 4 / 3 * np.pi * 62 * 78 * 64 / 1000
    assert index.brain_ml[0] == pytest.approx(ellipsoid_ml, rel=0.02)
    _, mask = Store.open(tmp_path / "out").read(index.scan[0])
    assert mask.sum() * 6**3 / 1000 == pytest.approx(ellipsoid_ml, rel=0.05)


def test_similarity_tells_upright_from_upside_down(tmp_path: Path) -> None:
    values, _, affine = template()
    paths = [tmp_path / "upright.nii.gz", tmp_path / "upside_down.nii.gz"]
    for path, scan in zip(paths, (values, values[::-1]), strict=True):
        write_nifti(path, scan[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1]))
    index, _ = prepare(table([str(path) for path in paths]), tmp_path / "out", settings("nonzero"), workers=0)
    assert index.template_similarity[0] > 0.97
    assert index.template_similarity[1] < 0.5


def test_same_scans_are_not_prepared_again(
    cohort: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    first, _ = prepare(cohort, folder, settings(), workers=0)
    dates = {path.name: path.stat().st_mtime_ns for path in (folder / "scans").iterdir()}
    save(tmp_path / "1.nii.gz", brain())  # repaired
    save(tmp_path / "2.nii.gz", brain() + 5 * (brain() > 0))  # changed
    (folder / "scans" / "Test_003_ses-1.b2nd").write_bytes(b"damaged")
    second, failed = prepare(cohort, folder, settings(), workers=0)
    assert failed.empty
    assert len(second) == 4
    assert second.seconds[0] == first.seconds[0]
    now = {path.name: path.stat().st_mtime_ns for path in (folder / "scans").iterdir()}
    assert [name[5:8] for name in sorted(now) if now[name] != dates.get(name)] == ["001", "002", "003"]
    assert Store.open(folder).read("Test_003_ses-1")[1].any()
    monkeypatch.setattr(preprocess, "METHOD", preprocess.METHOD + 1)  # a kit that prepares otherwise
    prepare(cohort, folder, settings(), workers=0)
    newer = {path.name: path.stat().st_mtime_ns for path in (folder / "scans").iterdir()}
    assert all(newer[name] > now[name] for name in now)


@pytest.mark.slow
def test_a_changed_setting_redoes_what_it_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    values, _, affine = template()
    path = tmp_path / "moved.nii.gz"
    write_nifti(path, values[::2, ::2, ::2], nib.affines.from_matvec(np.eye(3), [6, -9, 4]) @ affine
                @ np.diag([2, 2, 2, 1]))
    cohort, first = table([str(path)]), settings("nonzero", "rigid")
    other = replace(first, intensity="whitematter", grid=Grid((20, 26, 24), 8.0))
    prepare(cohort, tmp_path / "fresh", other, workers=0)
    prepare(cohort, tmp_path / "out", first, workers=0)
    before = Store.open(tmp_path / "out").read("Test_000_ses-1")[0]

    def searched(*_: object) -> None:
        raise RegistrationError("searched again")

    monkeypatch.setattr(preprocess, "find_transforms", searched)
    capsys.readouterr()
    prepare(cohort, tmp_path / "out", other, workers=0)
    assert "intensity: zscore there, whitematter asked" in capsys.readouterr().out
    new, fresh = (Store.open(tmp_path / name) for name in ("out", "fresh"))
    assert new.record == fresh.record and new.grid.shape == (20, 26, 24)
    for one, same in zip(new.read("Test_000_ses-1"), fresh.read("Test_000_ses-1"), strict=True):
        np.testing.assert_array_equal(one, same)
    prepare(cohort, tmp_path / "out", first, workers=0)  # and back again
    np.testing.assert_array_equal(Store.open(tmp_path / "out").read("Test_000_ses-1")[0], before)

    with pytest.raises(PreparationError, match="searched again"):  # the search looks at what N4 leaves
        prepare(cohort, tmp_path / "out", replace(first, bias_correction="n4"), workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["nonzero", "given"])
def test_a_header_that_says_another_orientation_is_put_right_and_flagged(tmp_path: Path, mask: str) -> None:
    """A scan in LPS whose header says RAS: turned by 180 degrees about z. The stored transform is to its own header."""
    values, brain_mask, affine = template()
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.05, 0.12), [6, -9, 4]) @ affine
    turn = nib.affines.from_matvec(next(turn for turn in ORIENTATIONS if np.array_equal(turn, np.diag([-1, -1, 1]))))
    paths = {}
    for name, header in (("right", affine), ("wrong", turn @ affine)):
        for kind, array in (("scan", values * brain_mask), ("mask", brain_mask)):
            paths[name, kind] = str(tmp_path / f"{name}-{kind}.nii.gz")
            image = nib.Nifti1Image(array.T[::2, ::2, ::2].astype(np.float32), header @ np.diag([2, 2, 2, 1]))
            nib.save(image, paths[name, kind])
    cohort = table([paths["right", "scan"], paths["wrong", "scan"]],
                   mask_path=[paths["right", "mask"], paths["wrong", "mask"]])
    index, failed = prepare(cohort, tmp_path / "out", settings(mask, "rigid"), workers=2)
    assert failed.empty and index["mask_source"].tolist() == [mask, mask]
    assert index["orientation_deg"].tolist() == [0, 180]
    assert [("orientation_deg high" in flags) for flags in index["flags"]] == [False, True]
    store = Store.open(tmp_path / "out")
    (one, _), (other, _) = (store.read(scan) for scan in index["scan"])
    np.testing.assert_allclose(one, other, atol=0.1)
    right, wrong = (read_transform(tmp_path / "out", scan) for scan in index["scan"])
    np.testing.assert_allclose(wrong, turn @ right, atol=0.05)
    again, _ = prepare(cohort, tmp_path / "out", replace(settings(mask, "rigid"), intensity="whitematter"), workers=0)
    assert again["orientation_deg"].tolist() == [0, 180]  # what the first search found
    np.testing.assert_allclose(read_transform(tmp_path / "out", index["scan"][1]), wrong, atol=1e-9)


def test_z_scores_need_no_white_matter(cohort: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "tissue_on", lambda *_: pytest.fail("worked out for nothing"))
    assert len(prepare(cohort, tmp_path / "out", settings(), workers=0)[0]) == 3


def test_a_folder_whose_preparation_changed_cannot_be_opened_before_its_scans_are_there(
    cohort: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(cohort, tmp_path / "out", settings(), workers=0)
    monkeypatch.setattr(preprocess, "run_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(cohort, tmp_path / "out", replace(settings(), intensity="whitematter"), workers=0)
    with pytest.raises(StoreError, match="no index.csv; run 1_preprocess first, to its end"):
        Store.open(tmp_path / "out")


def test_impossible_cohort_is_refused_before_work(cohort: pd.DataFrame, tmp_path: Path) -> None:
    cohort.loc[3, "participant"] = "00 0"
    cohort.loc[2, "participant"] = "00-0"
    with pytest.raises(PreparationError) as caught:
        prepare(cohort.assign(seconds=1), tmp_path / "out", settings("given"), workers=0)
    for part in ("called Test_00-0_ses-1", "adds itself: seconds", "needs a column mask_path"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    for name in ("registration", "mask"):
        with pytest.raises(ValueError, match=f"{name}\n  Input should be '.*input_value='best'"):
            Preparation(GRID, **{name: "best"})


def test_unusable_masks_are_reasons(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii.gz", brain())
    good = save(tmp_path / "m.nii.gz", (brain() > 0).astype(np.uint8), "LPS")
    corner = np.zeros(SHAPE_XYZ, np.uint8)
    corner[:2, :2, :2] = 1
    masks = [good, None, str(tmp_path / "absent.nii"), save(tmp_path / "c.nii.gz", corner)]
    index, failed = prepare(table([scan] * 4, mask_path=masks), tmp_path / "out", settings("given"), workers=0)
    assert index.participant.tolist() == ["000"]
    expected = ["no mask_path", "mask: no such file", "no brain: its mask .given. has 1 ml"]
    for reason, pattern in zip(failed.reason, expected, strict=True):
        assert pd.Series([reason]).str.contains(pattern)[0], reason


def save_forms(path: Path, values: np.ndarray, sform: np.ndarray, qform: np.ndarray, unit: str = "mm") -> str:
    image = nib.Nifti1Image(values, sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return str(path)


def test_units_do_not_matter(tmp_path: Path) -> None:
    paths = []
    for unit, scale in {"mm": 1, "meter": 0.001, "micron": 1000, "unknown": 1}.items():
        stored = np.diag([scale] * 3 + [1]) @ AFFINE
        paths.append(save_forms(tmp_path / f"{unit}.nii.gz", brain(), stored, stored, unit))
    index, failed = prepare(table(paths), tmp_path / "out", settings(), workers=0)
    assert failed.empty
    np.testing.assert_allclose(index.brain_ml, index.brain_ml[0], rtol=1e-6)
    first, *others = (Store.open(tmp_path / "out").read(scan)[0] for scan in index["scan"])
    for other in others:
        np.testing.assert_allclose(other, first, atol=2e-3)


def test_two_forms_that_disagree_are_said_and_a_mask_by_the_other_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The sform counts; an ANTs mask lies by the qform, on the same voxels. Another scan's mask is still refused."""
    values, mask = brain(), (brain() > 0).astype(np.uint8)
    qform = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.05, -0.08), [12, -5, 9]) @ AFFINE
    elsewhere = nib.affines.from_matvec(np.eye(3), [0, 30, 0]) @ AFFINE
    plain = save(tmp_path / "a.nii.gz", values)
    two = save_forms(tmp_path / "b.nii.gz", values, AFFINE, qform)
    masks = {name: save_forms(tmp_path / f"{name}.nii.gz", mask, form, form)
             for name, form in {"same": AFFINE, "by qform": qform, "other": elsewhere}.items()}
    cohort = table([plain, two, two, two, plain],
                   mask_path=[masks[name] for name in ("same", "same", "by qform", "other", "by qform")])
    index, failed = prepare(cohort, tmp_path / "out", settings("given"), workers=0)
    corners = list(itertools.product(*[(0, side - 1) for side in SHAPE_XYZ]))
    apart = np.subtract(*(nib.affines.apply_affine(form, corners) for form in (AFFINE, qform)))
    says = f"sform and qform disagree by {np.linalg.norm(apart, axis=1).max():.1f} mm, sform taken"
    assert index["participant"].tolist() == ["000", "001", "002"]
    assert index["header_note"].tolist() == [
        "", says, f"{says}, mask aligned only by the qform, applied voxel by voxel"]
    assert [note in flags for note, flags in zip(index["header_note"], index["flags"], strict=True)] == [True] * 3
    assert (f"2 scans whose sform and qform, or their mask's, disagree: Test_001_ses-1 ({says}), Test_002"
            in capsys.readouterr().out)
    assert failed["reason"].str.contains("mask: it is not aligned with the scan").tolist() == [True, True]
    store = Store.open(tmp_path / "out")
    assert store.index["header_note"].fillna("").tolist() == index["header_note"].tolist()
    one, *others = (store.read(scan) for scan in index["scan"])
    for other in others:
        np.testing.assert_array_equal(other[0], one[0])
        np.testing.assert_array_equal(other[1], one[1])


def test_masks_in_percent_are_prepared_and_inverted_ones_refused(tmp_path: Path) -> None:
    scan, mask = save(tmp_path / "a.nii.gz", brain()), ndimage.binary_fill_holes(brain() > 0)
    soft = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)
    masks = {"one": mask * 1.0, "percent": np.rint(100 * soft), "bytes": np.rint(255 * soft), "inverted": 1.0 - mask}
    paths = [save(tmp_path / f"{name}.nii.gz", values.astype(np.uint8)) for name, values in masks.items()]
    index, failed = prepare(table([scan] * 4, mask_path=paths), tmp_path / "out", settings("given"), workers=0)
    np.testing.assert_allclose(index.brain_ml, index.brain_ml[0], rtol=0.01)
    assert failed["participant"].tolist() == ["003"]
    around_ml = np.count_nonzero(~mask) * 4**3 / 1000
    assert f"mask: inverted (2 different values from 0 to 1): its {around_ml:.0f} ml lie" in failed["reason"][0]


@pytest.mark.parametrize("background", ["zero", "its own"])
def test_a_z_scored_brain_is_prepared_whole(tmp_path: Path, background: str) -> None:
    values = brain()
    inside = values[ndimage.binary_fill_holes(values > 0)]
    scored = (values - inside.mean()) / inside.std()
    if background == "zero":
        scored = np.where(ndimage.binary_fill_holes(values > 0), scored, 0)
    paths = [save(tmp_path / "a.nii.gz", values), save(tmp_path / "b.nii.gz", scored)]
    index, _ = prepare(table(paths), tmp_path / "out", settings(), workers=0)
    assert index.brain_ml[0] == index.brain_ml[1]
    (image, mask), (other, other_mask) = (Store.open(tmp_path / "out").read(scan) for scan in index["scan"])
    np.testing.assert_array_equal(other_mask, mask)
    within = ndimage.binary_erosion(mask)  # at the rim the background is mixed in
    assert np.corrcoef(other[within].astype(float), image[within].astype(float))[0, 1] > 0.99


def test_white_matter_scaling_refuses_a_z_scored_brain(tmp_path: Path) -> None:
    """It divides by the peak, so the zero of z-scores would stay where it is and grey matter end below it."""
    values = brain()
    mask = ndimage.binary_fill_holes(values > 0)
    scored = np.where(mask, (values - values[mask].mean()) / values[mask].std(), 0)
    paths = [save(tmp_path / "a.nii.gz", values), save(tmp_path / "b.nii.gz", scored)]
    index, failed = prepare(table(paths), tmp_path / "out", replace(settings(), intensity="whitematter"), workers=0)
    assert index["participant"].tolist() == ["000"]
    assert "white-matter scaling needs intensities above zero, found" in failed["reason"][0]
    assert failed["reason"][0].endswith("was the scan z-scored? Give it as it was before, or set intensity: zscore")


def test_whole_head_is_no_nonzero_mask(tmp_path: Path) -> None:
    head = np.random.default_rng(0).uniform(1, 9, SHAPE_XYZ).astype(np.float32)
    with pytest.raises(PreparationError, match="zero is not its background"):
        prepare(table([save(tmp_path / "a.nii.gz", head)]), tmp_path / "out", settings(), workers=0)
    head[[0, -1]] = head[:, [0, -1]] = head[:, :, [0, -1]] = 0
    with pytest.raises(PreparationError, match="is the scan skull-stripped"):
        prepare(table([save(tmp_path / "a.nii.gz", head)]), tmp_path / "out", settings(), workers=0)
    assert len(pd.read_csv(tmp_path / "out" / "failed.csv")) == 1


@pytest.mark.parametrize(("image", "reason"), [(np.zeros((2, 3, 4)), "constant"), (np.ones((2, 3, 4)), "constant")])
def test_constant_brain_is_refused(image: np.ndarray, reason: str) -> None:
    with pytest.raises(ScanError, match=reason):
        z_score(image, image == image)
    with pytest.raises(ScanError, match="no brain inside the grid"):
        z_score(image, image != image)


def test_two_processes_prepare_what_one_prepares(cohort: pd.DataFrame, tmp_path: Path) -> None:
    one, _ = prepare(cohort, tmp_path / "one", settings(), workers=0)
    two, failed = prepare(cohort, tmp_path / "two", settings(), workers=2)
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))
    assert len(failed) == 1
    for scan in one.scan:
        for left, right in zip(*(Store.open(tmp_path / name).read(scan) for name in ("one", "two")), strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_file_that_cannot_be_looked_at_is_not_called_missing(cohort: pd.DataFrame, tmp_path: Path) -> None:
    name = tmp_path / ("x" * 300)  # longer than file systems allow
    table = cohort.assign(image_path=[str(tmp_path / "gone.nii.gz"), str(name), *cohort["image_path"][2:]])
    _, failed = prepare(table, tmp_path / "out", settings(), workers=0)
    assert failed["reason"].tolist() == ["no such file", "cannot be read: File name too long"]


@pytest.mark.parametrize(("place", "number"), [("stat", errno.ESTALE), ("read_bytes", errno.ETIMEDOUT)])
def test_a_disk_that_fails_ends_the_preparation_and_is_no_scans_fault(
    cohort: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    """`stat` is called for the digest of a scan's files, `read_bytes` for its voxels."""
    assert {errno.ENOSPC, errno.ENOTCONN, errno.EHOSTDOWN, errno.ESHUTDOWN} < preprocess.DISK_ERRORS
    third, real = cohort["image_path"][2], getattr(Path, place)

    def fails(path: Path, **options: bool) -> object:
        if str(path) == third:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, place, fails)
    with pytest.raises(PreparationError, match=f"Test_002_ses-1: {os.strerror(number)} .*/2.nii.gz.*Run it again"):
        prepare(cohort, tmp_path / "out", settings(), workers=0)
    assert not (tmp_path / "out" / "index.csv").exists()
    monkeypatch.undo()
    assert len(prepare(cohort, tmp_path / "out", settings(), workers=0)[0]) == 3


def test_a_file_that_cannot_be_read_is_its_own_fault(
    cohort: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third, real = cohort["image_path"][2], Path.read_bytes

    def fails(path: Path) -> bytes:
        if str(path) == third:
            raise OSError(errno.EIO, os.strerror(errno.EIO), third)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    index, failed = prepare(cohort, tmp_path / "out", settings(), workers=0)
    assert failed["reason"][1] == "cannot be read: Input/output error; check its permissions and the disk"


def test_a_script_without_a_guard_is_told_so(cohort: pd.DataFrame, tmp_path: Path) -> None:
    cohort.head(1).to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "script.py").write_text(f"""
from kit.cohort.tables import read_cohort
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.store.grid import Grid
prepare(read_cohort({str(tmp_path / "cohort.csv")!r}), {str(tmp_path / "out")!r}, Preparation(Grid((9, 9, 9), 20.0)))
""", encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert "for lack of memory (use fewer workers), or because the script" in done.stderr
    assert 'outside `if __name__ == "__main__":`' in done.stderr


def _shout_or_die(job: ScanJob) -> str:
    if job.scan == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return job.scan.upper()


def test_killed_process_costs_its_own_scan_only() -> None:
    jobs = [ScanJob(name, "", "", Path(), settings()) for name in ("a", "b", "deadly", "c", "d")]
    results = {job.scan: result for job, result in run_all(_shout_or_die, jobs, workers=2)}
    assert results == {"a": "A", "b": "B", "c": "C", "d": "D", "deadly": None}
