"""Read and write NIfTI: any orientation in, float32 (z, y, x) in RAS order out."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np

from kit.errors import KitError
from kit.preprocess.header import ROUNDING_MM, affine_of, corners_apart, in_mm, no_codes, plausible, voxel_sizes
from kit.runs import write_whole

# A header can claim any size; beyond this many voxels (4 GB as float32) it is taken to be broken.
MOST_VOXELS = 10**9
HALVES = {"hdr": "img", "img": "hdr"}
_HALF = re.compile(rf"(.+\.)({'|'.join(HALVES)})(\.gz)?", re.IGNORECASE)
TRUNCATED = "truncated: fewer voxels than the header promises; copy the file again"
ASSUME_RAS = "if it is stored as RAS, set orientation_unknown: assume_ras"
SINGULAR = "its affine is singular: a voxel size is zero; convert the scan anew, from DICOM if you have it"


class ScanError(KitError, ValueError):
    """A scan cannot be used. The message gives a plain reason and a remedy, without file names or header text."""


def read_nifti(path: str | Path, no_codes_ok: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3D NIfTI-1 or NIfTI-2 file (`.nii`, `.nii.gz`, or either half of `.hdr` and `.img`) in RAS order.

    Axes are flipped and swapped to the nearest RAS orientation (nibabel's `as_closest_canonical`), never
    resampled; an oblique scan keeps its rotation in the affine. Intensities are scaled as the header says,
    and trailing dimensions of length one are dropped. If the header has both an sform and a qform, the sform is used
    (see `kit.preprocess.header`). Metres and microns become millimetres.

    Args:
        path: the file.
        no_codes_ok: accept a scan whose header does not say where it lies (both codes 0), and assume that it is
            stored in RAS order with the header's voxel sizes and its centre at the origin. Left and right may then
            be swapped without any way to tell.

    Returns:
        The image, float32 (z, y, x), and its (4, 4) affine from a voxel (x, y, z) to millimetres, RAS+.

    Raises:
        ScanError: the file or its other half is missing, damaged or truncated; it is not NIfTI or not one 3D
            greyscale volume; it is constant or has values that are not finite; or it does not say where it lies.
    """
    image = _open(*both_halves(Path(path)), no_codes_ok)
    try:
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError) as error:
        raise ScanError(TRUNCATED) from error
    header = image.header
    return upright(values.reshape(values.shape[:3]), affine_of(header))


def other_form(path: str | Path) -> np.ndarray | None:
    """Return where a scan's qform puts it, if that differs from its sform, which `read_nifti` uses.

    Returns:
        (4, 4), voxel (x, y, z) of `read_nifti`'s array to millimetres; None if the header has only one form, if both
        agree up to rounding, and for other formats and files that `read_nifti` refuses.
    """
    path = Path(path)
    half = _HALF.fullmatch(path.name)
    file = (other_half(path) or path) if half and half[2].lower() == "img" else path
    try:
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
        with gzip.open(file) if zipped else file.open("rb") as stream:
            data = stream.read(540)
        kind = _kind(data)
        header = _header(kind, data) if kind else None
        if header is None or header["sform_code"] <= 0 or header["qform_code"] <= 0:
            return None
        shape, sform, qform = header.get_data_shape()[:3], affine_of(header), in_mm(header.get_qform(), header)
        turn = nib.orientations.io_orientation(sform)
    except (OSError, EOFError, zlib.error, ValueError, nib.spatialimages.HeaderDataError):
        return None
    if len(shape) < 3 or np.isnan(turn).any() or corners_apart(sform, qform, shape[::-1]) <= ROUNDING_MM:
        return None
    return qform @ nib.orientations.inv_ornt_aff(turn, shape)


def upright(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and swap a volume's axes to the nearest RAS orientation.

    Args:
        values: (x, y, z), stored in any axis order and direction.
        affine: (4, 4), voxel to millimetres, RAS+.

    Returns:
        Float32 (z, y, x) and its (4, 4) affine from a voxel (x, y, z).

    Raises:
        ScanError: values are not finite or all the same, or voxel sizes are zero or implausible for a head.
    """
    if not np.isfinite(values).all():
        raise ScanError("NaN or infinite intensities; set them to 0, or leave the scan out")
    if values.min() == values.max():
        raise ScanError(("all zero" if values.flat[0] == 0 else f"constant: each voxel is {values.flat[0]:g}")
                        + "; export it again, or leave it out")
    _check_affine(affine)
    turn = nib.orientations.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, values.shape)
    values = nib.orientations.apply_orientation(values, turn)
    return np.ascontiguousarray(values.T, np.float32), affine


def write_nifti(path: str | Path, array_zyx: np.ndarray, affine: np.ndarray) -> None:
    """Write a (z, y, x) array as NIfTI-1, gzipped if the name ends in `.gz`, with the same bytes each time.

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
    image.set_qform(affine, code="aligned")  # some programs read only the qform
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, compresslevel=1, mtime=0)  # nibabel's level; higher ones hardly shrink noise
    write_whole(Path(path), lambda aside: aside.write_bytes(data))


def file_bytes(path: Path) -> bytes:
    """Return a file's bytes, decompressed if gzipped. Reading it whole verifies gzip's checksum."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ScanError("no such file; correct its path") from error
    except OSError as error:
        raise ScanError(f"cannot be read: {error.strerror}; check its permissions and the disk") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ScanError("truncated gzip: the file ends too early; copy it again") from error
    except (OSError, zlib.error) as error:
        raise ScanError("damaged gzip: the contents do not match their checksum; copy the file again") from error


def other_half(path: Path) -> Path | None:
    """Return the other file of a `.hdr` and `.img` pair; None if there is none."""
    name = _HALF.fullmatch(path.name)
    if name is None:
        return None
    wanted = HALVES[name[2].lower()]
    others = (path.with_name(name[1] + half + gz) for half in (wanted, wanted.upper()) for gz in ("", ".gz"))
    return next((each for each in others if each.is_file()), None)


def both_halves(path: Path) -> tuple[bytes, bytes | None]:
    """Return the bytes of a pair's header and voxels, whichever half is given; for a single file the second is None."""
    name = _HALF.fullmatch(path.name)
    if name is None or not path.exists():
        return file_bytes(path), None
    other = other_half(path)
    if other is None:
        raise ScanError(f"half of it is missing: no .{HALVES[name[2].lower()]} beside the .{name[2]}; put both into "
                        "one folder")
    header, voxels = (path, other) if name[2].lower() == "hdr" else (other, path)
    return file_bytes(header), file_bytes(voxels)


def check_volume(shape: tuple[int, ...], dtype_kind: str, sizes: np.ndarray) -> None:
    """Refuse anything but one 3D greyscale volume, before its voxels are read.

    Args:
        shape: voxels along each axis, x first.
        dtype_kind: numpy's kind letter for the voxel type.
        sizes: voxel sizes along x, y (and z), in the header's unit.

    Raises:
        ScanError: not 3D, too large, colours or complex numbers, or a voxel size of zero or less.
    """
    dimensions = "x".join(map(str, shape))
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape[:3]) < 2:
        raise ScanError(f"expected one 3D volume, got dimensions {dimensions}; list one volume of it, as a file of its "
                        "own")
    if np.prod(shape, dtype=float) > MOST_VOXELS:
        raise ScanError(f"too large: {dimensions} voxels; is its header damaged? Else resample it")
    if dtype_kind not in "iuf":
        raise ScanError("no grey values: voxels are colours or complex numbers; export magnitudes")
    if not (np.asarray(sizes) > 0).all():
        raise ScanError("a voxel size is zero or negative; convert the scan anew, from DICOM if you have it")


def _open(data: bytes, voxels: bytes | None, no_codes_ok: bool) -> nib.Nifti1Pair:
    """Return the image once its header passes all checks; its voxels are not read yet."""
    kind: type[nib.Nifti1Pair] | None = _kind(data)
    if kind is None:
        if _header_size(data) == 348 and voxels is not None and len(data) >= 348:
            raise ScanError("Analyze 7.5: it does not say where left and right are; convert it to NIfTI with an "
                            "orientation that you know, such as mri_convert --in_orientation LAS")
        if data.startswith(b"version https://git-lfs"):
            raise ScanError("a Git LFS pointer in place of the scan; fetch the scan with git lfs pull")
        raise ScanError("not a NIfTI file (.nii, .nii.gz, or .hdr with .img); convert it with mri_convert, or DICOM "
                        "with dcm2niix")
    files = {"image": data}
    if (data[344:346] if kind is nib.Nifti1Image else data[4:6]) == b"ni":  # the magic of a header and image pair
        if voxels is None:
            raise ScanError("the header of a pair in a single file; name the two halves .hdr and .img")
        kind = nib.Nifti1Pair if kind is nib.Nifti1Image else nib.Nifti2Pair
        files = {"header": data, "image": voxels}
    try:
        _check(_header(kind, data), no_codes_ok)
        return kind.from_file_map({name: nib.FileHolder(fileobj=BytesIO(each)) for name, each in files.items()})
    except ScanError:
        raise
    except (nib.spatialimages.HeaderDataError, KeyError, ValueError, OverflowError) as error:
        raise ScanError("damaged NIfTI header; copy the file again, or convert the scan anew") from error


def _header(kind: type[nib.Nifti1Pair], data: bytes) -> nib.Nifti1Header:
    """Return a file's header without nibabel's check, which silently repairs voxel sizes of zero or less.

    Only `pixdim[0]`, the handedness of the qform, is repaired as there: all but -1 mean 1.
    """
    header = kind.header_class(data[: kind.header_class.sizeof_hdr], check=False)
    if header["pixdim"][0] != -1:
        header["pixdim"][0] = 1
    return header


def _check(header: nib.Nifti1Header, no_codes_ok: bool) -> None:
    shape, sizes = header.get_data_shape(), header["pixdim"][1:4]
    check_volume(shape, header.get_data_dtype().kind, sizes)
    if no_codes(header) and not no_codes_ok:
        raise ScanError(f"does not say where it lies in space (sform and qform codes are both 0); {ASSUME_RAS}")
    _check_affine(affine_of(header))


def _check_affine(affine: np.ndarray) -> None:
    """Refuse singular affines and voxel sizes (mm) that are implausible for a head."""
    if not np.isfinite(affine).all() or not voxel_sizes(affine).all():
        raise ScanError(SINGULAR)
    if not plausible(sizes := voxel_sizes(affine)):
        raise ScanError(f"voxels of {' x '.join(f'{size:.4g}' for size in sizes)} mm do not fit a head; correct the "
                        "voxel sizes in its header, or their unit (NIfTI: xyzt_units)")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        raise ScanError(SINGULAR)


def _header_size(data: bytes) -> int:
    sizes = {struct.pack(order + "i", size): size for size in (348, 540) for order in "<>"}
    return sizes.get(data[:4], 0)


def _kind(data: bytes) -> type[nib.Nifti1Image] | None:
    """Return the NIfTI class that matches a file's first bytes."""
    kind = {348: nib.Nifti1Image, 540: nib.Nifti2Image}.get(_header_size(data))
    return kind if kind and kind.header_class.may_contain_header(data[: kind.header_class.sizeof_hdr]) else None
