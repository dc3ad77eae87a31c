"""A folder with one DICOM series comes in upright, at its place, scaled; gaps and several series are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from kit.data.dicom import read_dicom
from kit.data.nifti import ScanError
from kit.data.resample import resample

SHAPE = (12, 16, 14)  # z, y, x: slices, rows, columns
SECRET = "Jane^Doe"
SERIES = "1.2.826.0.1.3680043.2.1"


def write_series(folder: Path, values: np.ndarray, direction: np.ndarray, series: str = SERIES) -> Path:
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
            "0008|0060": "MR", "0010|0010": SECRET, "0020|000e": series, "0008|0018": f"{series}.{number + 1}",
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
])
def test_unusable_series_is_refused(tmp_path: Path, kind: str, reason: str) -> None:
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
    elif kind == "single":
        for number in range(2, SHAPE[0] + 1):
            (folder / f"{number:03d}.dcm").unlink()
    with pytest.raises(ScanError, match=reason) as caught:
        read_dicom(folder)
    assert SECRET not in str(caught.value) and str(tmp_path) not in str(caught.value)
