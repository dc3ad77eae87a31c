"""Reading and writing NIfTI: any orientation in, float32 (z, y, x) in RAS order out."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from kit.runs import write_whole

# A header can claim any size: more voxels than this (4 GB as float32) is taken for a broken header.
MOST_VOXELS = 10**9


class ScanError(ValueError):
    """A scan that cannot be used. Its message is a plain reason without file names or header text."""


def read_nifti(path: str | Path, no_codes_ok: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3D NIfTI-1 or NIfTI-2 file (`.nii` or `.nii.gz`) in RAS order.

    Axes are flipped and swapped to the nearest RAS orientation (nibabel's `as_closest_canonical`), never
    resampled; an oblique scan keeps its rotation in the affine. Intensities are scaled as the header says,
    and trailing dimensions of length one are dropped.

    Args:
        path: the file.
        no_codes_ok: take a scan whose header does not say where it lies (both codes 0) as it is stored: x to the
            right, y to the front, z upwards, the header's voxel sizes, its middle at the origin. Left and right
            may then be swapped, and nothing can tell.

    Returns:
        The image, float32 (z, y, x), and its (4, 4) affine from a voxel (x, y, z) to millimetres, RAS+.

    Raises:
        ScanError: the file is missing, damaged or truncated, not NIfTI, not one 3D volume of grey values,
            constant, has values that are not finite, or does not say where it lies in space.
    """
    image = _open(_whole_bytes(Path(path)), no_codes_ok)
    try:
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError) as error:
        raise ScanError("truncated: fewer voxels than the header promises") from error
    affine = _as_stored(image.header) if _no_codes(image.header) else image.affine
    return upright(values.reshape(values.shape[:3]), affine)


def upright(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume with its axes flipped and swapped to the nearest RAS orientation.

    Args:
        values: (x, y, z), in whatever order and direction they are stored.
        affine: (4, 4), voxel to millimetres, RAS+.

    Returns:
        Float32 (z, y, x) and its (4, 4) affine from a voxel (x, y, z).

    Raises:
        ScanError: values that are not finite, or all the same.
    """
    if not np.isfinite(values).all():
        raise ScanError("NaN or infinite intensities")
    if values.min() == values.max():
        raise ScanError("all zero" if values.flat[0] == 0 else f"constant: each voxel is {values.flat[0]:g}")
    turn = nib.orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise ScanError("its affine is singular: a voxel size is zero")
    affine = affine @ nib.orientations.inv_ornt_aff(turn, values.shape)
    values = nib.orientations.apply_orientation(values, turn)
    return np.ascontiguousarray(values.T, np.float32), affine


def read_mask(path: str | Path, array_zyx: np.ndarray, affine: np.ndarray, no_codes_ok: bool = False) -> np.ndarray:
    """Read a scan's mask, bool (z, y, x): what is above one half.

    Raises:
        ScanError: as `read_nifti`, an empty mask among it, or the mask lies on other voxels than the scan.
    """
    try:
        values, mask_affine = read_nifti(path, no_codes_ok)
    except ScanError as error:
        raise ScanError(f"mask: {error}") from error
    if values.shape != array_zyx.shape:
        raise ScanError(f"mask: its shape {values.shape} is not the scan's {array_zyx.shape} (z, y, x)")
    if not np.allclose(mask_affine, affine, atol=1e-2):
        raise ScanError("mask: it lies elsewhere in space than the scan (their affines differ)")
    return values > 0.5


def write_nifti(path: str | Path, array_zyx: np.ndarray, affine: np.ndarray) -> None:
    """Write a (z, y, x) array as NIfTI-1, gzipped if the name ends in `.gz`; the same bytes each time.

    Args:
        path: the file, `.nii` or `.nii.gz`.
        array_zyx: 3D; bool is stored as uint8, float16 and float64 as float32, int64 as int32.
        affine: (4, 4), voxel (x, y, z) to millimetres, RAS+.
    """
    stored = {"bool": "uint8", "float16": "float32", "float64": "float32", "int64": "int32"}
    array = np.asarray(array_zyx)
    array = array.astype(stored.get(array.dtype.name, array.dtype), copy=False)
    image = nib.Nifti1Image(array.T, affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned")  # some programs read only this one
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_whole(Path(path), lambda aside: aside.write_bytes(data))


def _whole_bytes(path: Path) -> bytes:
    """Return the file's bytes, unzipped. Read whole, so that gzip's checksum is verified."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ScanError("no such file") from error
    except OSError as error:
        raise ScanError(f"cannot be read: {error.strerror}") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ScanError("truncated gzip: the file ends too early") from error
    except (OSError, zlib.error) as error:
        raise ScanError("damaged gzip: the contents do not match their checksum") from error


def _open(data: bytes, no_codes_ok: bool) -> nib.Nifti1Image:
    """Return the image whose header has passed all checks; its voxels are not read yet."""
    size_of_header = {struct.pack(order + "i", size): size for size in (348, 540) for order in "<>"}
    kind = {348: nib.Nifti1Image, 540: nib.Nifti2Image}.get(size_of_header.get(data[:4], 0))
    if kind is None or not kind.header_class.may_contain_header(data[: kind.header_class.sizeof_hdr]):
        raise ScanError("not a NIfTI file (.nii or .nii.gz)")
    header_size = kind.header_class.sizeof_hdr
    try:
        # Unchecked: nibabel's check repairs voxel sizes of zero or less in silence.
        header = kind.header_class(data[:header_size], check=False)
        _check(header, no_codes_ok)
        return kind.from_bytes(data)
    except nib.spatialimages.HeaderDataError as error:
        raise ScanError("damaged NIfTI header") from error


def _check(header: nib.Nifti1Header, no_codes_ok: bool) -> None:
    shape = header.get_data_shape()
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape[:3]) < 2:
        raise ScanError(f"expected one 3D volume, got dimensions {'x'.join(map(str, shape))}")
    if np.prod(shape, dtype=float) > MOST_VOXELS:
        raise ScanError(f"too large: {'x'.join(map(str, shape))} voxels")
    if header.get_data_dtype().kind not in "iuf":
        raise ScanError("no grey values: voxels are colours or complex numbers")
    if not (header["pixdim"][1:4] > 0).all():
        raise ScanError("a voxel size is zero or negative")
    if _no_codes(header) and not no_codes_ok:
        raise ScanError("does not say where it lies in space (sform and qform codes are both 0); if it is stored "
                        "as RAS, say orientation_unknown: assume_ras")
    affine = _as_stored(header) if _no_codes(header) else header.get_best_affine()
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ScanError("its affine is singular: a voxel size is zero")


def _no_codes(header: nib.Nifti1Header) -> bool:
    return header["sform_code"] <= 0 and header["qform_code"] <= 0


def _as_stored(header: nib.Nifti1Header) -> np.ndarray:
    """Return NIfTI's own reading of a header without codes (its "method 1"), with the middle at the origin.

    nibabel takes such files for Analyze's, with x to the left.
    """
    sizes = np.array(header["pixdim"][1:4], float)
    return nib.affines.from_matvec(np.diag(sizes), -sizes * (np.array(header.get_data_shape()[:3]) - 1) / 2)
