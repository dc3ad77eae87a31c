"""A map survives the way to the scan's own file: the peak stays within a voxel, left stays left."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from kit.explain.native import native_map, write_native
from kit.preprocess.nifti import ScanError, write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.store.grid import Grid
from kit.store.store import Store, read_transform, scan_path, write_scan
from tests.conftest import GRID, make_store

# A rigid transform, MNI to the scan's own millimetres, as registration finds it.
TRANSFORM = np.eye(4)
TRANSFORM[:3, :3] = Rotation.from_euler("xyz", [12, -7, 9], degrees=True).as_matrix()
TRANSFORM[:3, 3] = 5, -14, 22
SCAN = "made_000_01"


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = make_store(tmp_path_factory.mktemp("moved"), participants=1)
    mask = store.read(SCAN)[1]
    write_scan(scan_path(store.folder, SCAN), np.where(mask, 1.0, 0), mask, SCAN, GRID.affine,
               {"transform": TRANSFORM.tolist()})
    return Store.open(store.folder)


def native_affine(codes: str, oblique: float, sides: tuple[float, float, float]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Voxels of a file (x, y, z as stored) around the scan's middle, turned by some degrees; their affine and shape."""
    shape = (70, 60, 50)
    turn = Rotation.from_euler("zyx", [oblique, oblique / 2, -oblique], degrees=True).as_matrix()
    flips = np.diag([-1.0 if code in "LPI" else 1.0 for code in codes])
    matrix = turn @ flips @ np.diag(sides)
    middle = TRANSFORM @ [0.5, -17.5, 6.5, 1]
    return nib.affines.from_matvec(matrix, middle[:3] - matrix @ (np.array(shape) - 1) / 2), shape


@pytest.mark.parametrize(("codes", "oblique"), [("RAS", 0), ("LPS", 0), ("LAS", 0), ("LPS", 17), ("RAS", 25)])
def test_a_peak_comes_back_within_a_voxel(moved, tmp_path, codes, oblique):
    affine, shape = native_affine(codes, oblique, (1.6, 2.0, 2.4))
    image = nib.Nifti1Image(np.random.default_rng(0).integers(1, 99, shape).astype(np.int16), affine)
    nib.save(image, tmp_path / "scan.nii.gz")
    peak = np.zeros(GRID.shape, np.float32)
    peak[8, 4, 6] = -1  # left: x = 6 of 24
    peak = ndimage.gaussian_filter(peak, 1.0)
    found = nib.load(write_native(tmp_path / "map.nii.gz", moved, SCAN, peak, tmp_path / "scan.nii.gz"))
    assert found.shape == shape and found.get_data_dtype() == np.float32
    np.testing.assert_allclose(found.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    for form in ("sform_code", "qform_code"):
        assert found.header[form] == image.header[form]
    values = found.get_fdata()
    expected = np.linalg.solve(affine, TRANSFORM @ GRID.affine @ [6, 4, 8, 1])[:3]
    assert np.abs(np.array(np.unravel_index(values.argmin(), shape)) - expected).max() <= 1
    assert values.max() <= 0 and values.min() == pytest.approx(peak.min(), rel=0.15)  # signs and values stay

    # ... and back: the map, seen again from the grid, peaks where it did.
    onto = np.linalg.inv(affine) @ TRANSFORM @ GRID.affine
    back = ndimage.affine_transform(values, onto, output_shape=GRID.shape[::-1], order=1)
    assert np.abs(np.array(np.unravel_index(back.argmin(), back.shape)) - [6, 4, 8]).max() <= 1


def test_left_stays_left(moved, tmp_path):
    """By the scan's own millimetres, in a file stored from right to left."""
    affine, shape = native_affine("LPS", 10, (2.0, 2.0, 2.0))
    nib.save(nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), affine), tmp_path / "a.nii.gz")
    marked = np.zeros(GRID.shape, np.float32)
    marked[:, :, :12] = 1  # width runs to the right: the left half
    values = native_map(moved, SCAN, marked, tmp_path / "a.nii.gz").get_fdata()
    points = nib.affines.apply_affine(affine, np.argwhere(values > 0.5))
    in_mni = nib.affines.apply_affine(np.linalg.inv(TRANSFORM), points)
    assert in_mni[:, 0].max() < 2.5 and len(points) > 3000


def test_other_formats_and_wrong_files(moved, tmp_path):
    affine, shape = native_affine("LPS", 0, (2.0, 2.0, 2.0))
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nib.save(nib.MGHImage(values, affine), tmp_path / "scan.mgz")
    marked = np.zeros(GRID.shape, np.float32)
    marked[8, 4, 6] = 1
    found = native_map(moved, SCAN, marked, tmp_path / "scan.mgz")
    assert nib.aff2axcodes(found.affine) == ("R", "A", "S")
    at = nib.affines.apply_affine(found.affine, np.unravel_index(found.get_fdata().argmax(), found.shape))
    assert np.abs(at - (TRANSFORM @ GRID.affine @ [6, 4, 8, 1])[:3]).max() <= 2

    write_nifti(tmp_path / "far.nii.gz", values, nib.affines.from_matvec(np.eye(3), [900, 0, 0]))
    with pytest.raises(ValueError, match="far.nii.gz: no part of the map of made_000_01"):
        native_map(moved, SCAN, marked, tmp_path / "far.nii.gz")
    with pytest.raises(ValueError, match=r"\(24, 18, 12\); the store's grid is \(12, 18, 24\)"):
        native_map(moved, SCAN, marked.T, tmp_path / "far.nii.gz")
    (tmp_path / "text.nii").write_text("no scan", encoding="utf-8")
    with pytest.raises(ScanError, match="not a NIfTI"):
        native_map(moved, SCAN, marked, tmp_path / "text.nii")
    with pytest.raises(ScanError, match="no such file"):
        native_map(moved, SCAN, marked, tmp_path / "none.nii.gz")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("oblique", [False, True], ids=["LPS", "oblique"])
def test_the_real_scan_and_back(oblique, tmp_path):
    """The LPS scan of a patient, as it is and turned by 20 degrees in its header, through registration and back."""
    from tests.real.conftest import SCANS

    image = nib.load(_real(SCANS["tumour"]))
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    affine = image.affine.copy()
    if oblique:
        turn = nib.affines.from_matvec(Rotation.from_euler("xyz", [14, 8, -11], degrees=True).as_matrix())
        affine = turn @ affine
    values = image.get_fdata().astype(np.float32)
    points = nib.affines.apply_affine(image.affine, np.argwhere(values > 0))
    ball = np.linalg.norm(points - (points.mean(0) - [32, 0, 0]), axis=1) < 7  # left of the brain's middle
    marked = np.zeros_like(values)
    marked[tuple(np.argwhere(values > 0)[ball].T)] = 1
    nib.save(nib.Nifti1Image(np.where(marked > 0, 4 * values.max(), values), affine), tmp_path / "scan.nii.gz")
    cohort = pd.DataFrame({"participant": ["1"], "session": "1", "dataset": "real",
                           "image_path": [str(tmp_path / "scan.nii.gz")]})
    index, failed = prepare(cohort, tmp_path / "store", Preparation(
        grid=Grid((75, 96, 96), 2.0), registration="rigid", mask="nonzero"), workers=0)
    assert failed.empty
    store, scan = Store.open(tmp_path / "store"), index["scan"].item()
    prepared, mask = store.read(scan)
    bright = ndimage.gaussian_filter(np.where(mask, prepared, 0).astype(np.float32), 3)
    assert np.unravel_index(bright.argmax(), bright.shape)[2] < 48  # the ball is left in the prepared scan
    found = nib.load(write_native(tmp_path / "map.nii.gz", store, scan, bright, tmp_path / "scan.nii.gz"))
    np.testing.assert_allclose(found.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    peak = np.array(np.unravel_index(found.get_fdata().argmax(), found.shape))
    middle = np.argwhere(marked > 0).mean(0)
    assert np.abs(peak - middle).max() <= 1, (peak, middle)  # 0.5 at most, of the file's voxels of 1 mm
    assert read_transform(store.folder, scan).shape == (4, 4)


def _real(path: Path) -> Path:
    from tests.conftest import absent

    if not path.is_file():
        absent(f"no {path} (KIT_REAL_SCANS names its folder)")
    return path
