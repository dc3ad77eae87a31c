"""Read every supported scan format: NIfTI, MGH, NRRD, MetaImage and DICOM."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from kit.preprocess.dicom import from_itk, quiet, read_dicom, voxel_kind
from kit.preprocess.header import as_stored
from kit.preprocess.nifti import (
    ASSUME_RAS,
    SINGULAR,
    TRUNCATED,
    ScanError,
    check_volume,
    file_bytes,
    other_half,
    read_nifti,
    upright,
)

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
REFUSED = {
    ARCHIVES: "an archive; unpack it, and give the file or the folder in it",
    # SimpleITK reads MINC's RAS+ millimetres as LPS+, so left and right would be swapped.
    (".mnc", ".mnc.gz"): "MINC is not read; convert it to NIfTI with mnc2nii",
    (".head", ".brik", ".brik.gz"): "AFNI is not read; convert it to NIfTI with 3dAFNItoNIFTI",
    (".par", ".rec"): "Philips PAR/REC is not read; convert it to NIfTI with dcm2niix",
    (".xml", ".json", ".npy", ".npz", ".mat", ".png", ".jpg", ".jpeg", ".tif", ".tiff"):
        "no scan with a place in space; give NIfTI, DICOM, MGH, NRRD or MetaImage",
}


def read_scan(path: str | Path, no_codes_ok: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3D scan of any supported format in RAS order, never resampled.

    - NIfTI: `.nii`, `.nii.gz`, either half of `.hdr` and `.img`
    - FreeSurfer: `.mgh`, `.mgz`
    - NRRD: `.nrrd`, `.nhdr`; MetaImage: `.mha`, `.mhd`
    - DICOM: a folder with one series, in it or below it; `folder#4` is series number 4 of several (see
      `kit.preprocess.dicom.read_dicom`)

    Args:
        path: the file or folder.
        no_codes_ok: assume RAS order for a NIfTI, NRRD or MetaImage that does not say where it lies (see
            `read_nifti`); an MGH without a position is always refused.

    Returns:
        The image, float32 (z, y, x), and its (4, 4) affine from a voxel (x, y, z) to millimetres, RAS+.

    Raises:
        ScanError: with a plain reason and a remedy: missing, damaged, truncated, of an unsupported format, not one 3D
            greyscale volume, constant, not finite, or without a position in space.
    """
    path, series = _folder_and_series(Path(path))
    name = path.name.lower()
    if path.is_dir():
        return read_dicom(path, series)
    for endings, reason in REFUSED.items():
        if name.endswith(endings):
            raise ScanError(reason if path.exists() else "no such file; correct its path")
    if name.endswith((".mgh", ".mgz", ".mgh.gz")):
        return _read_mgh(path)
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        return _read_itk(path, no_codes_ok)
    if is_dicom(path):
        return read_dicom(path)
    return read_nifti(path, no_codes_ok)


def scan_files(path: str | Path) -> list[Path]:
    """Return the files a scan is read from, as far as names and headers tell; the path itself if it is missing."""
    path, _ = _folder_and_series(Path(path))
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    if path.suffix.lower() in (".nhdr", ".mhd") and path.is_file():
        return [path, *filter(Path.is_file, [_data_file(path, path.read_bytes())])]
    return [path, *filter(None, [other_half(path)])]


def _folder_and_series(path: Path) -> tuple[Path, str | None]:
    """Split `folder#4` into the folder and its series "4"; other paths have no series."""
    folder, mark, series = path.name.rpartition("#")
    its = path.with_name(folder) if folder else path.parent
    if mark and not path.exists() and its.is_dir():
        return its, series
    return path, None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or by its first bytes."""
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_mgh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = file_bytes(path)
    try:
        image = nib.MGHImage.from_bytes(data)
        kind = image.get_data_dtype().kind
    except (nib.spatialimages.HeaderDataError, nib.freesurfer.mghformat.MGHError, KeyError, TypeError, ValueError,
            OSError) as error:
        raise ScanError("damaged MGH header; copy the file again, or convert the scan anew") from error
    check_volume(image.shape, kind, image.header["delta"])
    if struct.unpack(">h", data[28:30])[0] <= 0:  # without this flag nibabel makes up a position
        raise ScanError("does not say where it lies in space (goodRASFlag is 0); convert it with mri_convert "
                        "--in_orientation")
    try:
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError) as error:
        raise ScanError(TRUNCATED) from error
    return upright(values.reshape(values.shape[:3]), image.affine)


def _read_itk(path: Path, no_codes_ok: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read NRRD or MetaImage with SimpleITK, which converts NRRD's other spaces to LPS+."""
    header = _verified_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with quiet():
        try:
            reader.ReadImageInformation()
            check_volume(reader.GetSize(), voxel_kind(reader), reader.GetSpacing()[:3])
            if path.suffix.lower() in (".nrrd", ".nhdr"):
                placed = (b"space directions:" in header and reader.HasMetaDataKey("NRRD_space")
                          and reader.GetMetaData("NRRD_space") == "left-posterior-superior")
            else:
                placed = re.search(rb"(?m)^(TransformMatrix|Rotation|Orientation)\s*=", header) is not None
            if not placed and not no_codes_ok:
                raise ScanError(f"does not say where it lies in space (no orientation in its header); {ASSUME_RAS}")
            if abs(np.linalg.det(np.reshape(reader.GetDirection(), 2 * (reader.GetDimension(),)))) < 1e-6:
                raise ScanError(SINGULAR)
            reader.SetOutputPixelType(sitk.sitkFloat32)
            image = reader.Execute()
        except RuntimeError as error:
            raise ScanError("damaged or truncated, or the file with its voxels is missing; copy it again") from error
    while image.GetDimension() > 3:
        image = image[..., 0]
    if not placed:
        return upright(sitk.GetArrayFromImage(image).T, as_stored(image.GetSpacing(), image.GetSize()))
    return from_itk(image)


def _verified_header(path: Path) -> bytes:
    """Return the header of an NRRD or MetaImage file, after checking compressed voxels against their checksum.

    SimpleITK ignores the checksums and returns whatever it decompresses from damaged MetaImage voxels.
    """
    data = file_bytes(path)
    end = re.search(rb"\r?\n\r?\n" if data.startswith(b"NRRD") else rb"(?m)^ElementDataFile\s*=.*\r?\n?", data)
    header, voxels = (data[: end.end()], data[end.end():]) if end else (data, b"")
    compressed = re.search(rb"(?mi)^(encoding:\s*gz(ip)?|CompressedData\s*=\s*True)\s*$", header)
    if compressed is None or re.search(rb"(?mi)^(line|byte) skip:", header):
        return header
    if (file := _data_file(path, data)) != path:
        if not file.is_file():
            raise ScanError("half of it is missing: the file with its voxels; put both into one folder")
        voxels = file.read_bytes()
    try:
        zlib.decompress(voxels, wbits=47)  # zlib or gzip
    except zlib.error as error:
        raise ScanError("damaged or truncated: the contents do not match their checksum; copy it again") from error
    return header


def _data_file(path: Path, data: bytes) -> Path:
    """Return the file that an NRRD or MetaImage header names for its voxels; often the header file itself."""
    name = re.search(rb"(?mi)^(?:data ?file:|ElementDataFile\s*=)[ \t]*(.+?)\s*$", data)
    text = name.group(1).decode("utf-8", "replace") if name else "LOCAL"
    return path if text.upper() == "LOCAL" else path.with_name(text) if "/" not in text else path.parent / text
