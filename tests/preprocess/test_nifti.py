"""Any orientation comes in as RAS (z, y, x); what cannot be used is refused with a plain reason."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from kit.preprocess.mask import read_mask
from kit.preprocess.nifti import ScanError, read_nifti, write_nifti

AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -7], [0, 0, 3, -11], [0, 0, 0, 1]])
SECRET = b"Jane Doe"


def ramp() -> np.ndarray:
    """(x, y, z) RAS with three unequal sides, each voxel another value."""
    return np.arange(7 * 8 * 9, dtype=np.float32).reshape(7, 8, 9)


def saved(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, codes: str = "RAS") -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = SECRET
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL", "SRP"])
def test_every_orientation_reads_the_same(tmp_path: Path, codes: str) -> None:
    array, affine = read_nifti(saved(tmp_path / "a.nii.gz", ramp(), codes=codes))
    np.testing.assert_array_equal(array, ramp().T)
    np.testing.assert_allclose(affine, AFFINE)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous


def test_oblique_scan_keeps_its_rotation(tmp_path: Path) -> None:
    oblique = AFFINE.copy()
    oblique[:3, :3] = nib.eulerangles.euler2mat(0.2, 0.1, 0.05) @ oblique[:3, :3]
    array, affine = read_nifti(saved(tmp_path / "a.nii", ramp(), affine=oblique))
    np.testing.assert_allclose(affine, oblique, atol=1e-5)
    np.testing.assert_array_equal(array, ramp().T)


def test_slope_is_applied_and_single_time_point_dropped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp()[..., None].astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii.gz")[0], 0.5 * ramp().T + 10)


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(ramp(), AFFINE), tmp_path / "a.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii")[0], ramp().T)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, bool, np.uint8, np.int64])
def test_written_array_comes_back(tmp_path: Path, name: str, dtype: type) -> None:
    array = (ramp().T % 2).astype(dtype)
    write_nifti(tmp_path / name, array, AFFINE)
    back, affine = read_nifti(tmp_path / name)
    np.testing.assert_array_equal(back, array.astype(np.float32))
    np.testing.assert_allclose(affine, AFFINE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_same_array_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, ramp().T, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def header_edit(path: Path, offset: int, value: bytes) -> Path:
    raw = bytearray(saved(path, ramp()).read_bytes())
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)
    return path


def broken(kind: str, folder: Path) -> Path:
    """Write a file that is broken in one way."""
    path, zipped, values = folder / "a.nii", folder / "a.nii.gz", ramp()
    if kind == "missing":
        return path
    if kind == "text":
        path.write_text("subject,age\n", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut gzip":
        zipped.write_bytes(saved(zipped, ramp()).read_bytes()[:-200])
    elif kind == "flipped gzip":
        raw = bytearray(saved(zipped, np.random.default_rng(0).normal(size=(7, 8, 9)).astype("f4")).read_bytes())
        raw[-4 - 300] ^= 1
        zipped.write_bytes(raw)
    elif kind == "cut":
        path.write_bytes(saved(path, ramp()).read_bytes()[:-200])
    elif kind == "cut header":
        path.write_bytes(saved(path, ramp()).read_bytes()[:200])
    elif kind == "series":
        saved(path, np.stack([values, values], -1))
    elif kind == "slice":
        saved(path, values[:, :, :1])
    elif kind == "huge":
        header_edit(path, 42, np.array([30000, 30000, 30000], np.int16).tobytes())
    elif kind == "negative size":
        header_edit(path, 80, np.float32(-1).tobytes())
    elif kind == "zero size":
        header_edit(path, 84, np.float32(0).tobytes())
    elif kind == "no codes":
        header_edit(path, 252, bytes(4))
    elif kind == "half":
        header_edit(path, 344, b"ni1")
    elif kind == "singular":
        header_edit(path, 280, bytes(16))  # the first row of the sform
    elif kind == "constant":
        saved(path, np.full_like(values, 3))
    elif kind in ("nan", "inf"):
        values[3, 4, 5] = float(kind)
        saved(path, values)
    elif kind == "colours":
        nib.save(nib.Nifti1Image(np.zeros((7, 8, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE), path)
    return zipped if zipped.exists() else path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("text", "not a NIfTI"),
        ("empty", "not a NIfTI"),
        ("cut gzip", "truncated gzip"),
        ("flipped gzip", "damaged gzip"),
        ("cut", "truncated"),
        ("cut header", "not a NIfTI|damaged"),
        ("series", "one 3D volume, got dimensions 7x8x9x2"),
        ("slice", "7x8x1"),
        ("huge", "too large"),
        ("negative size", "zero or negative"),
        ("zero size", "zero or negative"),
        ("no codes", "both 0"),
        ("half", "the header of a pair in a single file"),
        ("singular", "singular"),
        ("constant", "constant: each voxel is 3"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("colours", "no grey values"),
    ],
)
def test_unusable_file_is_refused_with_its_reason(tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(ScanError, match=reason) as caught:
        read_nifti(broken(kind, tmp_path))
    assert SECRET.decode() not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert re.search("[;?]", str(caught.value)), "no way out"


def test_mask_must_lie_on_the_scans_voxels(tmp_path: Path) -> None:
    mask = (ramp() > 100).astype(np.uint8)
    path = saved(tmp_path / "m.nii.gz", mask, codes="LPS")
    np.testing.assert_array_equal(read_mask(path, ramp().T, AFFINE).mask, mask.T > 0)
    with pytest.raises(ScanError, match="mask: its shape"):
        read_mask(path, ramp(), AFFINE)
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] += 1
    with pytest.raises(ScanError, match="mask: it is not aligned with the scan"):
        read_mask(path, ramp().T, elsewhere)
    with pytest.raises(ScanError, match="mask: all zero"):
        read_mask(saved(tmp_path / "e.nii.gz", np.zeros_like(mask)), ramp().T, AFFINE)


def test_scan_without_codes_is_read_as_nifti_says_where_asked(tmp_path: Path) -> None:
    array, affine = read_nifti(header_edit(tmp_path / "a.nii", 252, bytes(4)), no_codes_ok=True)
    np.testing.assert_array_equal(array, ramp().T)  # not mirrored: x runs to the right
    np.testing.assert_allclose(affine, [[2, 0, 0, -6], [0, 1.5, 0, -5.25], [0, 0, 3, -12], [0, 0, 0, 1]], atol=1e-5)
