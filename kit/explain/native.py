"""A map on the prepared grid, carried back to the voxels of the scan's own file, for a clinician's viewer."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from kit.preprocess.nifti import ScanError, file_bytes
from kit.preprocess.place import affine_of
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan
from kit.runs import shown, write_whole
from kit.store.store import Store, read_transform


def native_map(store: Store, scan: str, saliency_map: np.ndarray, image_path: str | Path) -> nib.Nifti1Image:
    """Resample a map linearly onto the voxels of the scan's original file, by the transform that its preparation
    stored.

    Values stay what they are; on voxels coarser than the grid's they are smoothed first, as scans are. What lies beyond
    the prepared grid is 0.

    Args:
        store: where the scan lies.
        scan: its name in the index.
        saliency_map: (depth, height, width) on the store's grid.
        image_path: the file or folder that the scan was prepared from: the cohort's `image_path`.

    Returns:
        float32 (x, y, z). Of a NIfTI in the file's own order of voxels, with its header's sform and qform, so that any
        program shows both in one place; of other formats in RAS order, with the scan's own affine.

    Raises:
        ValueError: the map is not on the store's grid, or none of it lies in the file: another scan's.
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


def write_native(path: str | Path, store: Store, scan: str, saliency_map: np.ndarray, image_path: str | Path) -> Path:
    """Write `native_map` as `.nii.gz` or `.nii`, whole or not at all; see there for arguments and errors."""
    data = native_map(store, scan, saliency_map, image_path).to_bytes()
    data = gzip.compress(data, compresslevel=6, mtime=0) if str(path).endswith(".gz") else data
    return write_whole(Path(path), lambda aside: aside.write_bytes(data))


def _header(path: Path) -> nib.Nifti1Header | None:
    """The header of a NIfTI that is one file, to be changed freely; None of other formats.

    Raises:
        ScanError: the file is missing or damaged.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return None
    data = file_bytes(path)
    kind = next((kind for kind in (nib.Nifti1Image, nib.Nifti2Image) if kind.header_class.may_contain_header(data)),
                None)
    if kind is None:
        raise ScanError(f"{shown(path)}: not a NIfTI file, whatever its name says")
    return nib.Nifti1Header.from_header(kind.header_class(data[: kind.header_class.sizeof_hdr], check=False))
