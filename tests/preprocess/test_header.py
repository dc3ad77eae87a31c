"""Units become millimetres; a header's two forms are compared, and rounding alone is no difference."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.preprocess.header import ROUNDING_MM, corners_apart
from kit.preprocess.mask import read_mask
from kit.preprocess.nifti import ScanError, other_form, read_nifti
from kit.preprocess.scan_file import read_scan

AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -7], [0, 0, 3, -11], [0, 0, 0, 1]])
SHAPE_XYZ = (7, 8, 9)


def ramp() -> np.ndarray:
    """(x, y, z) with three unequal sides, each voxel another value."""
    return np.arange(7 * 8 * 9, dtype=np.float32).reshape(SHAPE_XYZ)


def save(path: Path, sform: np.ndarray | None, qform: np.ndarray | None = None, unit: int = 2,
         values: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> Path:
    """Write an image with these forms, None: code 0, and this code as its unit."""
    image = kind(ramp() if values is None else values, sform if sform is not None else qform)
    image.set_sform(sform, 1 if sform is not None else 0)
    image.set_qform(qform, 1 if qform is not None else 0)
    image.header["xyzt_units"] = unit + 8  # with seconds
    nib.save(image, path)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize(("unit", "in_mm"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0), (5, 1.0)])
def test_metres_and_microns_become_millimetres(tmp_path: Path, unit: int, in_mm: float, form: str, kind: type) -> None:
    stored = np.diag([1 / in_mm] * 3 + [1]) @ AFFINE
    path = save(tmp_path / "a.nii", kind=kind, unit=unit, **{"sform": None, "qform": None, form: stored})
    array, affine = read_nifti(path)
    np.testing.assert_array_equal(array, ramp().T)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize(("unit", "in_mm"), [(1, 1000.0), (3, 0.001)])
def test_units_of_a_scan_without_a_place_are_read(tmp_path: Path, unit: int, in_mm: float) -> None:
    image = nib.Nifti1Image(ramp(), None)
    image.header["pixdim"][1:4] = np.array([2, 1.5, 3]) / in_mm
    image.header["xyzt_units"] = unit
    nib.save(image, tmp_path / "a.nii")
    _, affine = read_nifti(tmp_path / "a.nii", no_codes_ok=True)
    np.testing.assert_allclose(affine, [[2, 0, 0, -6], [0, 1.5, 0, -5.25], [0, 0, 3, -12], [0, 0, 0, 1]], rtol=1e-5)


@pytest.mark.parametrize("unit", [1, 3])
def test_a_unit_that_no_head_is_scanned_in_is_not_believed(tmp_path: Path, unit: int) -> None:
    np.testing.assert_allclose(read_nifti(save(tmp_path / "a.nii", AFFINE, unit=unit))[1], AFFINE)


@pytest.mark.parametrize("name", ["a.nii", "a.mgh"])
@pytest.mark.parametrize("scale", [0.001, 1000.0])
def test_voxels_of_no_head_are_refused_by_their_size(tmp_path: Path, name: str, scale: float) -> None:
    stored = np.diag([scale] * 3 + [1]) @ AFFINE
    kind = nib.MGHImage if name.endswith("mgh") else nib.Nifti1Image
    nib.save(kind(ramp(), stored), tmp_path / name)
    with pytest.raises(ScanError, match=r"voxels of .* mm do not fit a head; correct the voxel sizes .*xyzt_units"):
        read_scan(tmp_path / name)


def rotated(angles: tuple[float, float, float] = (0.2, 0.1, 0.05), shift: float = 6.0) -> np.ndarray:
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles), [shift, -9, 4])
    return turn @ AFFINE


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.img"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_the_sform_counts_and_the_qform_is_found(tmp_path: Path, name: str, codes: str) -> None:
    """Whatever the order of axes in the file; the qform is given for the voxels as they are returned."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    stored = nib.Nifti1Image(ramp(), AFFINE).as_reoriented(turn)
    undo = np.linalg.inv(AFFINE) @ stored.affine  # from stored voxels to those returned
    pair = name.endswith(("hdr", "img"))
    path = save(tmp_path / name, stored.affine, rotated() @ undo, values=np.asarray(stored.dataobj),
                kind=nib.Nifti1Pair if pair else nib.Nifti1Image)
    array, affine = read_nifti(path)
    np.testing.assert_array_equal(array, ramp().T)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    np.testing.assert_allclose(other_form(path), rotated(), atol=1e-3)


def test_one_form_and_two_that_agree_are_no_disagreement(tmp_path: Path) -> None:
    for number, forms in enumerate([(AFFINE, AFFINE), (AFFINE, None), (None, AFFINE), (rotated(), rotated())]):
        assert other_form(save(tmp_path / f"{number}.nii.gz", *forms)) is None
    assert other_form(tmp_path / "absent.nii") is None
    nib.save(nib.MGHImage(ramp(), AFFINE), tmp_path / "a.mgz")
    assert other_form(tmp_path / "a.mgz") is None


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_qform_whose_handedness_is_zero_is_right_handed(tmp_path: Path, kind: type) -> None:
    """Of `pixdim[0]` NIfTI says that 0 means 1."""
    paths = [save(tmp_path / "one.nii", None, rotated(), kind=kind),
             save(tmp_path / "two.nii", AFFINE, rotated(), kind=kind)]
    for path in paths:
        raw = bytearray(path.read_bytes())
        offset, number = (76, np.float32) if kind is nib.Nifti1Image else (104, np.float64)
        assert np.frombuffer(raw, number, 1, offset) == 1
        raw[offset : offset + number().nbytes] = number(0).tobytes()
        path.write_bytes(raw)
    np.testing.assert_allclose(read_nifti(paths[0])[1], rotated(), atol=1e-4)
    np.testing.assert_allclose(other_form(paths[1]), rotated(), atol=1e-4)


@given(st.tuples(*[st.floats(-1, 1)] * 4), st.tuples(*[st.floats(0.5, 1.2)] * 3))
def test_rounding_of_a_quaternion_is_no_disagreement(quaternion: tuple, sizes: tuple) -> None:
    length = np.linalg.norm(quaternion)
    turn = nib.quaternions.quat2mat(np.array(quaternion) / length) if length > 0.1 else np.eye(3)
    affine = nib.affines.from_matvec(turn @ np.diag(sizes), [-90, -120, 70])
    header = nib.Nifti1Header()
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    assert corners_apart(header.get_sform(), header.get_qform(), (192, 256, 256)) < ROUNDING_MM


def labels() -> np.ndarray:
    """(x, y, z) a mask without any symmetry."""
    return (ramp() > 300).astype(np.uint8)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("quarter", [0, 1])
def test_a_mask_by_the_other_form_is_taken_voxel_by_voxel(tmp_path: Path, codes: str, quarter: int) -> None:
    """As ITK and ANTs write it. A qform may even turn the axes (quarter): the voxels stay the same."""
    qform = nib.affines.from_matvec(nib.eulerangles.euler2mat(quarter * np.pi / 2), [0, 0, 0]) @ rotated()
    scan = save(tmp_path / "a.nii", AFFINE, qform)
    turn = nib.orientations.ornt_transform(nib.io_orientation(qform), nib.orientations.axcodes2ornt(codes))
    mask = nib.Nifti1Image(labels(), qform).as_reoriented(turn)
    nib.save(mask, tmp_path / "m.nii")
    array, affine = read_scan(scan)
    found = read_mask(tmp_path / "m.nii", array, affine, other=other_form(scan))
    np.testing.assert_array_equal(found.mask, labels().T > 0)
    assert found.by_other_form
    with pytest.raises(ScanError, match="mask: "):  # of a scan without such a qform, it is another scan's
        read_mask(tmp_path / "m.nii", array, affine)


def test_a_mask_with_the_scans_place_as_its_qform_is_taken(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii", AFFINE, AFFINE)
    save(tmp_path / "m.nii", rotated(), AFFINE, values=labels())
    found = read_mask(tmp_path / "m.nii", *read_scan(scan))
    np.testing.assert_array_equal(found.mask, labels().T > 0)
    assert found.by_other_form


def test_a_mask_of_another_scan_is_refused_with_how_far_it_lies(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii", AFFINE, rotated())
    array, affine = read_scan(scan)
    save(tmp_path / "m.nii", rotated(shift=10), rotated(), values=labels())  # the same qform, as of one scanner
    with pytest.raises(ScanError, match=r"mask: it is not aligned with the scan .* by up to \d+\.\d mm\); "
                       "is it another scan's"):
        read_mask(tmp_path / "m.nii", array, affine, other=other_form(scan))
    save(tmp_path / "m.nii", AFFINE, AFFINE, values=labels())
    found = read_mask(tmp_path / "m.nii", array, affine, other=other_form(scan))
    assert not found.by_other_form
