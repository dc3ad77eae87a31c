"""Resample a map from the prepared grid to the voxels of the scan's original file, for a clinician's viewer."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from kit.preprocess.header import affine_of
from kit.preprocess.nifti import ScanError, file_bytes
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan, scan_files
from kit.runs import shown, write_whole
from kit.store.store import Store, read_transform, scan_path


def native_map(store: Store, scan: str, saliency_map: np.ndarray, image_path: str | Path) -> nib.Nifti1Image:
    """Resample a map linearly onto the scan's original voxels, using the transform stored at preparation.

    Values are not rescaled. If the original voxels are coarser than the grid, the map is smoothed first, as scans are.
    Outside the prepared grid the result is 0.

    Args:
        store: holds the scan.
        scan: its name in the index.
        saliency_map: (depth, height, width) on the store's grid.
        image_path: the file or folder that the scan was prepared from: the cohort's `image_path`.

    Returns:
        float32 (x, y, z). For .nii and .nii.gz, in the file's own voxel order with its header's sform and qform, so
        that every program overlays the two correctly. For others, in RAS order with the scan's own affine.

    Raises:
        ValueError: the map is not on the store's grid, or does not overlap the file (it is another scan's).
        ScanError, StoreError: the file or the prepared scan cannot be read.
    """
    if saliency_map.shape != store.grid.shape:
        raise ValueError(f"the map has shape {saliency_map.shape}; the store's grid is {store.grid.shape}, (z, y, x)")
    onto = np.linalg.inv(read_transform(store.folder, scan))  # the scan's own millimetres to MNI
    header = _header(Path(image_path))
    if header is None:
        image, affine = read_scan(image_path, no_codes_ok=True)
        shape = image.shape
    else:
        affine, shape = affine_of(header), header.get_data_shape()[2::-1]
    values = resample(saliency_map, store.grid.affine, onto, shape, affine)  # (z, y, x)
    if saliency_map.any() and not values.any():
        raise ValueError(f"{shown(image_path)}: no part of the map of {scan} lies in it; is it another scan's file?")
    if header is None:
        found = nib.Nifti1Image(values.T, affine)
        found.set_sform(affine, code="scanner")
        found.set_qform(affine, code="scanner")
        return found
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    return nib.Nifti1Image(values.T, None, header)


def changed_since(store: Store, scan: str, image_path: str | Path) -> bool:
    """Whether a scan's file was written after the scan was prepared, so that the stored transform may not fit it.

    Told by modification times: a copy that keeps an older time is not noticed.
    """
    prepared = scan_path(store.folder, scan).stat().st_mtime_ns
    return any(file.stat().st_mtime_ns > prepared for file in scan_files(image_path) if file.exists())


def write_native(path: str | Path, store: Store, scan: str, saliency_map: np.ndarray, image_path: str | Path) -> Path:
    """Write `native_map` atomically as `.nii.gz` or `.nii`; see there for arguments and errors."""
    data = native_map(store, scan, saliency_map, image_path).to_bytes()
    data = gzip.compress(data, compresslevel=6, mtime=0) if str(path).endswith(".gz") else data
    return write_whole(Path(path), lambda aside: aside.write_bytes(data))


def _header(path: Path) -> nib.Nifti1Header | None:
    """Read the header of a single-file NIfTI, as a copy to modify; None for other formats.

    Raises:
        ScanError: the file is missing or damaged.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        data = file_bytes(path)
    except ScanError as error:
        raise ScanError(f"{shown(path)}: {error}") from error
    kind = next((kind for kind in (nib.Nifti1Image, nib.Nifti2Image) if kind.header_class.may_contain_header(data)),
                None)
    if kind is None:
        raise ScanError(f"{shown(path)}: not a NIfTI file, whatever its name says")
    return nib.Nifti1Header.from_header(kind.header_class(data[: kind.header_class.sizeof_hdr], check=False))
