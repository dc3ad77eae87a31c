"""Every kind of scan comes in at its place, in RAS order; what cannot be used is refused with a reason and a cure."""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from kit.preprocess.mask import read_mask
from kit.preprocess.nifti import ScanError
from kit.preprocess.scan_file import read_scan, scan_files

AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -7], [0, 0, 3, -11], [0, 0, 0, 1]])  # RAS+
SECRET = "Jane Doe"


def ramp() -> np.ndarray:
    """(x, y, z) with three unequal sides, each voxel another value."""
    return np.arange(7 * 8 * 9, dtype=np.int16).reshape(7, 8, 9)


def stored(values: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its axes in another order and direction."""
    image = nib.Nifti1Image(values, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    return np.asarray(image.dataobj), image.affine


def write(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, codes: str = "RAS") -> Path:
    """Write (x, y, z) values by the writer of the path's format, the axes stored as `codes` say."""
    values, affine = stored(values, affine, codes)
    if path.suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        lps = np.diag([-1, -1, 1]) @ affine[:3]
        image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
        image.SetSpacing(sizes.tolist())
        image.SetDirection((lps[:, :3] / sizes).ravel().tolist())
        image.SetOrigin(lps[:, 3].tolist())
        image.SetMetaData("Patient", SECRET)
        sitk.WriteImage(image, path, useCompression="packed" in path.stem)
    elif path.suffix in (".mgh", ".mgz"):
        nib.save(nib.MGHImage(values, affine), path)
    else:
        kind = nib.Nifti2Pair if "nifti2" in path.stem else nib.Nifti1Pair
        image = kind(values, affine)
        image.header["descrip"] = SECRET.encode()
        nib.save(image, path)
    return path


KINDS = ["a.mgh", "a.mgz", "a.nrrd", "packed.nrrd", "a.nhdr", "a.mha", "packed.mha", "a.mhd", "packed.mhd",
         "a.hdr", "a.img", "nifti2.hdr", "a.img.gz"]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("name", KINDS)
def test_every_format_and_orientation_reads_the_same(tmp_path: Path, name: str, codes: str) -> None:
    array, affine = read_scan(write(tmp_path / name, ramp(), codes=codes))
    np.testing.assert_array_equal(array, ramp().T)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    assert array.dtype == np.float32 and array.flags.c_contiguous


@pytest.mark.parametrize("name", ["a.mgz", "a.nrrd", "a.mha", "a.hdr"])
def test_oblique_scan_keeps_its_rotation(tmp_path: Path, name: str) -> None:
    oblique = AFFINE.copy()
    oblique[:3, :3] = nib.eulerangles.euler2mat(0.2, 0.1, 0.05) @ oblique[:3, :3]
    array, affine = read_scan(write(tmp_path / name, ramp(), oblique))
    np.testing.assert_allclose(affine, oblique, atol=1e-4)
    np.testing.assert_array_equal(array, ramp().T)


def test_nrrd_in_ras_is_not_taken_for_lps(tmp_path: Path) -> None:
    header = ("NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 7 8 9\nspace directions: "
              "(2,0,0) (0,1.5,0) (0,0,3)\nspace origin: (-9,-7,-11)\nendian: little\nencoding: raw\n\n")
    (tmp_path / "a.nrrd").write_bytes(header.encode() + ramp().astype("<i2").tobytes("F"))
    array, affine = read_scan(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(array, ramp().T)
    np.testing.assert_allclose(affine, AFFINE)


@pytest.mark.parametrize(("given", "other"), [("a.hdr", "a.img"), ("a.img", "a.hdr")])
def test_either_half_is_enough_to_name_and_both_must_be_there(tmp_path: Path, given: str, other: str) -> None:
    write(tmp_path / "a.hdr", ramp())
    given, other = tmp_path / given, tmp_path / other
    np.testing.assert_array_equal(read_scan(given)[0], ramp().T)
    assert scan_files(given) == [given, other]
    other.unlink()
    with pytest.raises(ScanError, match=rf"half of it is missing: no {other.suffix.lower()} beside"):
        read_scan(given)


def test_voxels_in_a_file_of_their_own_count_as_the_scans_files(tmp_path: Path) -> None:
    assert scan_files(write(tmp_path / "packed.mhd", ramp())) == [tmp_path / "packed.mhd", tmp_path / "packed.zraw"]
    (tmp_path / "packed.zraw").unlink()
    with pytest.raises(ScanError, match="half of it is missing"):
        read_scan(tmp_path / "packed.mhd")
    write(tmp_path / "a.nhdr", ramp())
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ScanError, match="the file with its voxels is missing; copy"):
        read_scan(tmp_path / "a.nhdr")


def test_scan_without_a_place_is_taken_as_stored_where_asked(tmp_path: Path) -> None:
    header = ("NRRD0004\ntype: short\ndimension: 3\nsizes: 7 8 9\nspacings: 2 1.5 3\nendian: little\nencoding: raw\n\n")
    (tmp_path / "a.nrrd").write_bytes(header.encode() + ramp().astype("<i2").tobytes("F"))
    meta = ("ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 2 1.5 3\nDimSize = 7 8 9\n"
            "ElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    (tmp_path / "a.mha").write_bytes(meta.encode() + ramp().astype("<i2").tobytes("F"))
    for name in ("a.nrrd", "a.mha"):
        with pytest.raises(ScanError, match="does not say where it lies.*orientation_unknown: assume_ras"):
            read_scan(tmp_path / name)
        array, affine = read_scan(tmp_path / name, no_codes_ok=True)
        np.testing.assert_array_equal(array, ramp().T)
        np.testing.assert_allclose(affine, [[2, 0, 0, -6], [0, 1.5, 0, -5.25], [0, 0, 3, -12], [0, 0, 0, 1]])


FORMATS = ["a.mgh", "a.mgz", "a.nrrd", "packed.nrrd", "a.mha", "packed.mha", "a.hdr"]


def noise() -> np.ndarray:
    """Values that hardly compress, so that a byte in the middle is a voxel's."""
    return np.random.default_rng(0).integers(-9000, 9000, (7, 8, 9)).astype(np.int16)


def voxels_of(path: Path) -> Path:
    return path.with_suffix(".img") if path.suffix == ".hdr" else path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("kind", "reason"), [
    ("nan", "NaN or infinite"), ("constant", "constant: each voxel is 3"), ("zero", "all zero"),
    ("series", "one 3D volume, got dimensions 7x8x9x2"), ("slice", "one 3D volume, got dimensions 7x8x1"),
    ("cut", "truncated|damaged"), ("empty", "damaged|not a NIfTI|truncated"), ("missing", "no such file"),
])
def test_each_format_is_held_to_the_same_checks(tmp_path: Path, name: str, kind: str, reason: str,
                                                capfd: pytest.CaptureFixture) -> None:
    path, values = tmp_path / name, noise()
    if kind == "nan":
        values = np.where(values > 8000, np.nan, values).astype(np.float32)
    elif kind in ("constant", "zero"):
        values = np.full_like(values, 3 if kind == "constant" else 0)
    elif kind == "slice":
        values = values[..., :1]
    elif kind == "series":
        values = np.stack([values, values], -1)
        if path.suffix in (".nrrd", ".mha"):
            sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(values.T), isVector=False), path)
            values = None
    if values is not None and kind != "missing":
        write(path, values)
    if kind in ("cut", "empty"):
        file = voxels_of(path) if kind == "cut" else path
        file.write_bytes(file.read_bytes()[:-150] if kind == "cut" else b"")
    with pytest.raises(ScanError, match=reason) as caught:
        read_scan(path)
    says = str(caught.value)
    assert str(tmp_path) not in says and name not in says
    assert SECRET not in says + "".join(capfd.readouterr())
    assert ";" in says, f"no way out: {says}"


def test_single_time_point_is_dropped(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(ramp().T)[None], isVector=False)
    image.SetSpacing([2.0, 1.5, 3.0, 1.0])
    sitk.WriteImage(image, tmp_path / "a.mha")
    array, affine = read_scan(tmp_path / "a.mha")
    np.testing.assert_array_equal(array, ramp().T[:, ::-1, ::-1])  # stored as LPS
    np.testing.assert_allclose(np.diag(affine), [2, 1.5, 3, 1])
    sitk.WriteImage(image, tmp_path / "packed.mha", useCompression=True)
    header = (tmp_path / "packed.mha").read_bytes().replace(b"ElementDataFile = LOCAL", b"ElementDataFile = Local")
    (tmp_path / "packed.mha").write_bytes(header)  # as ITK accepts it
    np.testing.assert_array_equal(read_scan(tmp_path / "packed.mha")[0], array)


@pytest.mark.parametrize("name", ["a.mgz", "packed.nrrd", "packed.mha", "packed.mhd"])
def test_one_flipped_bit_is_found_where_there_is_a_checksum(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, noise())
    file = path.with_suffix(".zraw") if path.suffix == ".mhd" else path
    raw = bytearray(file.read_bytes())
    raw[-300] ^= 4
    file.write_bytes(raw)
    with pytest.raises(ScanError, match="damaged"):
        read_scan(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_colours_complex_numbers_and_bad_headers_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((9, 8, 7, 3), np.uint8), isVector=True), path)
    with pytest.raises(ScanError, match="no grey values"):
        read_scan(path)
    write(path, ramp())
    text = path.read_bytes()
    zero = text.replace(b"(-2,0,0)", b"(0,0,0)").replace(b"ElementSpacing = 2 ", b"ElementSpacing = 0 ")
    path.write_bytes(zero)
    with pytest.raises(ScanError, match="zero or negative"):
        read_scan(path)
    flat = text.replace(b"(0,-1.5,0)", b"(-2,0,0)").replace(b"= -1 0 0 0 -1 0 0 0 1", b"= -1 0 0 -1 0 0 0 0 1")
    path.write_bytes(flat)
    with pytest.raises(ScanError, match="singular"):
        read_scan(path)
    path.write_bytes(re.sub(rb"(sizes: |DimSize = )7 8 9", rb"\g<1>30000 30000 30000", text))
    with pytest.raises(ScanError, match="too large"):
        read_scan(path)


def test_mgh_without_a_place_or_with_voxels_of_no_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mgh", ramp())
    raw = path.read_bytes()
    path.write_bytes(raw[:28] + struct.pack(">h", 0) + raw[30:])
    with pytest.raises(ScanError, match="does not say where it lies.*mri_convert"):
        read_scan(path)
    path.write_bytes(raw[:30] + struct.pack(">f", 0) + raw[34:])
    with pytest.raises(ScanError, match="zero or negative"):
        read_scan(path)


def test_analyze_is_refused_as_it_does_not_say_where_left_is(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(ramp(), AFFINE), tmp_path / "a.img")
    for half in ("a.hdr", "a.img"):
        with pytest.raises(ScanError, match="Analyze 7.5: .*convert it to NIfTI"):
            read_scan(tmp_path / half)


@pytest.mark.parametrize(("name", "reason"), [
    ("a.mnc", "MINC is not read; convert it to NIfTI with mnc2nii"), ("a.PAR", "PAR/REC.*dcm2niix"),
    ("a.rec", "PAR/REC.*dcm2niix"), ("a.tar.gz", "an archive; unpack it"), ("a.ZIP", "an archive; unpack it"),
    ("a.txt", "not a NIfTI file.*convert it"), ("a.png", "no scan with a place in space; give NIfTI"),
])
def test_other_kinds_are_refused_by_name_with_a_cure(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(SECRET.encode())
    with pytest.raises(ScanError, match=reason):
        read_scan(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(ScanError, match="no such file"):
        read_scan(tmp_path / name)


def test_scan_that_git_has_not_fetched_says_how(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:80fa\nsize 8781091\n")
    with pytest.raises(ScanError, match="git lfs pull"):
        read_scan(tmp_path / "a.nii.gz")


def test_zip_of_a_scan_is_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(write(tmp_path / "a.mgz", ramp()), "a.mgz")
    with pytest.raises(ScanError, match="unpack it, and give the file or the folder in it"):
        read_scan(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["m.mgz", "m.nrrd", "m.mha", "m.hdr"])
def test_masks_may_be_of_another_format_than_the_scan(tmp_path: Path, name: str) -> None:
    mask = (ramp() > 100).astype(np.int16)
    path = write(tmp_path / name, mask, codes="LPS")
    np.testing.assert_array_equal(read_mask(path, ramp().T, AFFINE).mask, mask.T > 0)
    shutil.move(path, tmp_path / "gone")
    with pytest.raises(ScanError, match="mask: (no such file|half of it)"):
        read_mask(path, ramp().T, AFFINE)
