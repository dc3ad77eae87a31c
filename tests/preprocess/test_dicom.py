"""DICOM series come in upright, at their place, scaled; gaps are refused, series are chosen."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from kit.cohort.tables import read_cohort
from kit.preprocess.dicom import read_dicom
from kit.preprocess.nifti import ScanError, write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan, scan_files
from kit.preprocess.settings import Preparation
from kit.store.grid import Grid

SHAPE = (12, 16, 14)  # z, y, x: slices, rows, columns
SECRET = "Jane^Doe"
SERIES = "1.2.826.0.1.3680043.2.1"


def write_series(folder: Path, values: np.ndarray, direction: np.ndarray, series: str = SERIES,
                 series_number: int = 1) -> Path:
    """Write (slices, rows, columns) int16 as one file a slice, the last slice first; LPS+ directions, in columns."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    step = np.array([2.0, 1.5, 3.0])
    for number, slice_ in enumerate(values):
        image = sitk.GetImageFromArray(slice_[None].astype(np.int16))
        image.SetSpacing(step.tolist())
        place = np.array([-10.0, -20.0, 30.0]) + direction[:, 2] * step[2] * number
        tags = {
            "0008|0060": "MR", "0010|0010": SECRET, "0008|103e": f"of {SECRET}", "0020|000e": series,
            "0020|0011": str(series_number),
            "0008|0018": f"{series}.{number + 1}",
            "0020|0037": "\\".join(f"{value:.8f}" for value in [*direction[:, 0], *direction[:, 1]]),
            "0020|0032": "\\".join(f"{value:.6f}" for value in place), "0020|0013": str(len(values) - number),
            "0028|1052": "5", "0028|1053": "2",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{len(values) - number:03d}.dcm"))
        writer.Execute(image)
    return folder


def numbers() -> np.ndarray:
    return np.arange(np.prod(SHAPE)).reshape(SHAPE) + 7


def test_sagittal_series_lies_where_its_header_says(tmp_path: Path) -> None:
    # Columns run to the back, rows to the feet, slices to the left: none of the axes as RAS has them.
    direction = np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], float)
    array, affine = read_dicom(write_series(tmp_path / "scan", numbers(), direction))
    assert array.dtype == np.float32
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    k, j, i = 4, 5, 6  # slice, row, column
    lps = np.array([-10, -20, 30]) + direction @ ([2.0, 1.5, 3.0] * np.array([i, j, k]))
    x, y, z = np.rint(np.linalg.inv(affine) @ [-lps[0], -lps[1], lps[2], 1])[:3].astype(int)
    # SimpleITK writes the rescaled value: slope and intercept are undone on the way in, and applied here.
    assert array[z, y, x] == numbers()[k, j, i]


def test_oblique_series_keeps_its_rotation(tmp_path: Path) -> None:
    direction = nib.eulerangles.euler2mat(0.2, 0.1, -0.15)
    array, affine = read_dicom(write_series(tmp_path / "scan", numbers(), direction))
    assert array.shape == SHAPE
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(sizes, [2, 1.5, 3], atol=1e-4)
    expected = np.diag([-1, -1, 1]) @ direction @ np.diag([-1, -1, 1])
    np.testing.assert_allclose(affine[:3, :3] / sizes, expected, atol=1e-4)
    assert np.isfinite(resample(array, affine, np.eye(4), (5, 5, 5), np.eye(4))).all()


@pytest.mark.parametrize(("kind", "reason"), [
    ("empty", "one DICOM series in the folder, found none"), ("two", "found 2"), ("gap", "not evenly spaced"),
    ("cut", "damaged DICOM series|not evenly spaced"), ("single", "single file"), ("constant", "constant"),
    ("colours", "no grey values"),
])
def test_unusable_series_is_refused(tmp_path: Path, kind: str, reason: str, capfd: pytest.CaptureFixture) -> None:
    folder = write_series(tmp_path / "scan", numbers() if kind != "constant" else np.full(SHAPE, 3), np.eye(3))
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "two":
        write_series(tmp_path / "other", numbers(), np.eye(3), series=SERIES + ".2")
        for file in (tmp_path / "other").iterdir():
            file.rename(folder / f"other_{file.name}")
    elif kind == "gap":
        (folder / "006.dcm").unlink()
    elif kind == "cut":
        file = folder / "006.dcm"
        file.write_bytes(file.read_bytes()[:-200])
    elif kind == "colours":
        for number, file in enumerate(sorted(folder.iterdir())):
            image = sitk.GetImageFromArray(np.full((1, *SHAPE[1:], 3), number, np.uint8), isVector=True)
            image.SetMetaData("0020|000e", SERIES)
            image.SetMetaData("0010|0010", SECRET)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(file))
            writer.Execute(image)
    elif kind == "single":
        for number in range(2, SHAPE[0] + 1):
            (folder / f"{number:03d}.dcm").unlink()
    with pytest.raises(ScanError, match=reason) as caught:
        read_dicom(folder)
    assert SECRET not in str(caught.value) + "".join(capfd.readouterr()) and str(tmp_path) not in str(caught.value)
    assert re.search("[;?]", str(caught.value)), "no way out"


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("volumes", [2, 3])
def test_several_volumes_in_one_series_are_counted_with_the_tag_that_differs(tmp_path: Path, volumes: int,
                                                                             aborted: bool) -> None:
    folder = tmp_path / "scan"
    for volume in range(volumes):
        write_series(tmp_path / str(volume), numbers() + volume, np.eye(3))
        for file in (tmp_path / str(volume)).iterdir():
            data = pydicom.dcmread(file)
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{data.SOPInstanceUID}.{volume + 1}"
            data.EchoTime, data.RepetitionTime = 2.5 + volume, 8
            folder.mkdir(exist_ok=True)
            data.save_as(folder / f"{volume}_{file.name}")
    if aborted:  # the last volume lacks a slice
        min(folder.glob(f"{volumes - 1}_*")).unlink()
    times = ", ".join(f"{2.5 + volume}" for volume in range(volumes))
    as_many = "up to that many" if aborted else "as many"
    with pytest.raises(ScanError, match=re.escape(
            f"found {volumes} ({as_many} slices at each of 12 positions; they differ in echo time {times}); keep")):
        read_dicom(folder)


@pytest.mark.parametrize(("degrees", "refused"), [(0.0, False), (1.0, False), (-5.0, True), (20.0, True)])
def test_a_sheared_stack_is_refused(tmp_path: Path, degrees: float, refused: bool) -> None:
    """Up to one pixel (1.5 mm) over the stack is rounding: 1 degree moves the last of 12 slices by 0.58 mm."""
    direction = nib.eulerangles.euler2mat(0.2, 0.1, -0.15)
    tilted = direction.copy()
    tilted[:, 2] += np.tan(np.deg2rad(degrees)) * direction[:, 1]  # write_series places slices along the last column
    folder = write_series(tmp_path / "scan", numbers(), tilted)
    if refused:
        beside = f"{abs(33 * np.tan(np.deg2rad(degrees))):.1f}"
        with pytest.raises(ScanError, match=f"sheared: the last lies {beside} mm beside the first.*dcm2niix"):
            read_dicom(folder)
    else:
        assert read_dicom(folder)[0].shape == SHAPE


@pytest.mark.parametrize("change", ["PixelSpacing", "ImageOrientationPatient"])
def test_two_stacks_under_one_series_are_refused(tmp_path: Path, change: str) -> None:
    folder = write_series(tmp_path / "scan", numbers(), np.eye(3))
    for file in sorted(folder.iterdir())[:6]:
        data = pydicom.dcmread(file)
        setattr(data, change, [1, 1] if change == "PixelSpacing" else [0.8, 0.6, 0, -0.6, 0.8, 0])
        data.save_as(file)
    with pytest.raises(ScanError, match="differ in orientation or pixel size, .*; keep the files of one in a folder"):
        read_dicom(folder)


def test_multi_frame_files_are_refused_with_the_way_out(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    image = sitk.GetImageFromArray(numbers().astype(np.uint16))
    image.SetMetaData("0010|0010", SECRET)
    sitk.WriteImage(image, tmp_path / "a.dcm")
    for path in (tmp_path / "a.dcm", tmp_path):
        with pytest.raises(ScanError, match="multi-frame DICOM file is not read; convert it to NIfTI with dcm2niix"):
            read_scan(path)
    assert SECRET not in "".join(capfd.readouterr())


def test_one_slice_asks_for_its_folder(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", numbers(), np.eye(3))
    with pytest.raises(ScanError, match="found a single file; give the folder with all its slices"):
        read_scan(folder / "003.dcm")
    with pytest.raises(ScanError, match="no such file"):
        read_scan(folder / "999.dcm")


def test_series_in_subfolders_is_found_even_in_pieces(tmp_path: Path) -> None:
    expected = read_scan(write_series(tmp_path / "expected", numbers(), np.eye(3)))
    deep = write_series(tmp_path / "deep" / "study" / "T1", numbers(), np.eye(3))
    (tmp_path / "deep" / "notes.txt").write_text("no DICOM")
    np.testing.assert_array_equal(read_scan(tmp_path / "deep")[0], expected[0])
    assert len(scan_files(tmp_path / "deep")) == SHAPE[0] + 1
    (deep.parent / "more").mkdir()
    for file in sorted(deep.iterdir())[::2]:
        file.rename(deep.parent / "more" / file.name)
    array, affine = read_scan(tmp_path / "deep")
    np.testing.assert_array_equal(array, expected[0])
    np.testing.assert_allclose(affine, expected[1])


def test_reports_and_annotations_beside_a_series_are_passed_over(tmp_path: Path) -> None:
    expected = read_scan(write_series(tmp_path / "scan", numbers(), np.eye(3)))
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"  # a text report
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID = f"{SERIES}.99"
    report.SeriesInstanceUID, report.SeriesNumber, report.PatientName, report.Modality = f"{SERIES}.9", 99, SECRET, "SR"
    report.save_as(tmp_path / "scan" / "report.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_scan(tmp_path / "scan")[0], expected[0])


def test_series_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    for file in write_series(tmp_path / "scan" / "bad", numbers(), np.eye(3), series=f"{SERIES}.9").iterdir():
        data = pydicom.dcmread(file)
        data.BitsAllocated = 13  # no voxel has 13 bits
        data.save_as(file)
    with pytest.raises(ScanError, match="none of the folder's series can be read; export it again"):
        read_scan(tmp_path / "scan")
    expected = read_scan(write_series(tmp_path / "scan" / "good", numbers(), np.eye(3)))
    np.testing.assert_array_equal(read_scan(tmp_path / "scan")[0], expected[0])


def three_series(folder: Path) -> Path:
    write_series(folder / "b", numbers(), np.eye(3), series_number=4)
    write_series(folder / "a", numbers()[:3, :10], np.eye(3), series=SERIES + ".2", series_number=2)
    write_series(folder / "c", numbers()[::-1], np.eye(3), series=SERIES + ".3", series_number=11)
    return folder


def test_several_series_are_listed_without_names_and_chosen_by_number(tmp_path: Path) -> None:
    folder = three_series(tmp_path / "scan")
    listed = r"2 \(14x10, 3 slices of 2x1.5x3 mm\); 4 \(14x16, 12 slices of 2x1.5x3 mm\); 11 \(14x16, 12 slices"
    with pytest.raises(ScanError, match=r"found 3; .* such as folder#2: " + listed) as caught:
        read_scan(folder)
    assert SECRET not in str(caught.value) and str(tmp_path) not in str(caught.value)
    with pytest.raises(ScanError, match="no DICOM series 3; .*" + listed):
        read_scan(f"{folder}#3")
    for number, place in ((4, "b"), (11, "c")):
        np.testing.assert_array_equal(read_scan(f"{folder}#{number}")[0], read_scan(folder / place)[0])
    write_series(folder / "d", numbers() + 9, np.eye(3), series=SERIES + ".0", series_number=4)
    with pytest.raises(ScanError, match=r"4\.1 \(.*; 4\.2 \(") as caught:
        read_scan(f"{folder}#4")
    np.testing.assert_array_equal(read_scan(f"{folder}#4.2")[0], read_scan(folder / "d")[0])  # UIDs ...2.1, ...2.1.0


def test_a_table_names_a_series_of_a_folder(tmp_path: Path) -> None:
    z, y, x = np.indices((36, 50, 44))
    ball = np.where((z - 18) ** 2 + (y - 25) ** 2 + (x - 22) ** 2 < 17**2, 500 + (z * y + x) % 97, 0)
    write_series(tmp_path / "scan" / "a", ball, np.eye(3), series_number=4)
    write_series(tmp_path / "scan" / "b", numbers(), np.eye(3), series=SERIES + ".2", series_number=5)
    array, affine = read_scan(tmp_path / "scan#4")
    write_nifti(tmp_path / "mask.nii.gz", array > 100, affine)
    (tmp_path / "site.csv").write_text(
        "participant,image_path,mask_path\n1,scan#4,mask.nii.gz\n2,scan,mask.nii.gz\n3,scan/a/003.dcm,mask.nii.gz\n")
    settings = Preparation(Grid((25, 32, 33), 6.0), "none", "given")
    index, failed = prepare(read_cohort(tmp_path / "site.csv"), tmp_path / "out", settings, workers=0)
    assert index["participant"].tolist() == ["1"]
    assert failed["participant"].tolist() == ["2", "3"]
    assert pd.Series(failed["reason"]).str.contains("found 2; end the folder's path with #|give the folder").all()
