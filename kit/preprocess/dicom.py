"""Read one DICOM series of a folder with SimpleITK (GDCM)."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.affines import from_matvec

from kit.preprocess.nifti import ScanError, check_volume, upright

# From DICOM's LPS+ millimetres to RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MOST_LISTED = 20  # series, or values of a tag, listed in an error message
# Tags by which the volumes of one series usually differ; numbers only, nothing that identifies anyone.
VOLUME_TAGS = {"0018|0081": "echo time", "0018|0082": "inversion time", "0018|1314": "flip angle",
               "0018|9087": "b-value", "0020|0100": "temporal position", "0020|0012": "acquisition number"}


def read_dicom(path: str | Path, series: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a DICOM series in RAS order, with its slices sorted by position.

    Only voxels and geometry are read from the header. Files that are not DICOM images are skipped.

    Args:
        path: a folder, searched with its subfolders; a single file is refused.
        series: the Series Number (as viewers show it) if the folder holds several series. Where series share a
            number, or have none (counted as 0), a counter in the order of their UIDs follows: "3.1", "3.2".

    Returns:
        The image, float32 (z, y, x), and its (4, 4) affine from a voxel (x, y, z) to millimetres, RAS+.

    Raises:
        ScanError: no series, or several and none chosen (they are listed, without names or descriptions), missing
            slices, slices of different shapes, pixel sizes or orientations, a multi-frame file, or not a greyscale
            volume.
    """
    with quiet():
        try:
            files = _files(Path(path), series) if Path(path).is_dir() else [str(path)]
            first = _information(files[0])
            if first.GetDimension() > 2 and first.GetSize()[2] > 1:
                raise ScanError("a multi-frame DICOM file is not read; convert it to NIfTI with dcm2niix")
            if len(files) == 1:
                raise ScanError("expected a DICOM series of several slices, found a single file; give the folder with "
                                "all its slices")
            check_volume((*first.GetSize()[:2], len(files)), voxel_kind(first), first.GetSpacing()[:2])
            return _read_slices(files)
        except RuntimeError as error:  # SimpleITK's message is a page of C++
            raise ScanError("damaged DICOM series: a slice cannot be read, or has another shape than the first; export "
                            "it again") from error


def from_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return a SimpleITK image (LPS+) as float32 (z, y, x) in RAS order and its affine, RAS+."""
    affine = from_matvec(np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), image.GetOrigin())
    return upright(sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine)


def voxel_kind(reader: sitk.ImageFileReader) -> str:
    """Return numpy's kind letter for a file's voxel type; "V" for colours and other vectors."""
    if reader.GetNumberOfComponents() > 1:
        return "V"
    return "c" if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()) else "f"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress SimpleITK's warnings: they contain header text."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _files(folder: Path, series: str | None) -> list[str]:
    """Return the files of the folder's only series, or of the chosen one, sorted by slice position."""
    found: defaultdict[str, list[str]] = defaultdict(list)  # series UID: the folders that hold it
    for place, _, inside in os.walk(folder):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(place) if inside else ():
            found[uid].append(place)
    if not found:
        raise ScanError("expected one DICOM series in the folder, found none; give a folder that holds DICOM files")
    files = {uid: _sorted_files(folder, uid, places) for uid, places in sorted(found.items())}
    files = {uid: each for uid, each in files.items() if each and _is_image(each[0])}
    if not files:
        raise ScanError("damaged DICOM: none of the folder's series can be read; export it again")
    if len(files) == 1 and series is None:
        return files.popitem()[1]
    numbers = {uid: _number(each[0]) for uid, each in files.items()}
    shared = Counter(numbers.values())
    names: dict[str, str] = {}
    for uid in sorted(files, key=lambda uid: (numbers[uid], uid)):
        number = numbers[uid]
        earlier = sum(numbers[other] == number for other in names.values())
        names[str(number) if shared[number] == 1 and number else f"{number}.{earlier + 1}"] = uid
    if series in names:
        return files[names[series]]
    listed = "; ".join(f"{name} ({_facts(files[uid])})" for name, uid in list(names.items())[:MOST_LISTED])
    more = f"; and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    wrong = f"no DICOM series {series}" if series else f"expected one DICOM series in the folder, found {len(names)}"
    raise ScanError(f"{wrong}; end the folder's path with # and the number of one, such as "
                    f"folder#{next(iter(names))}: {listed}{more}")


def _sorted_files(folder: Path, uid: str, places: list[str]) -> list[str]:
    if len(places) == 1:
        return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(places[0], uid))
    return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid, recursive=True))


def _number(file: str) -> int:
    reader = _information(file)
    text = reader.GetMetaData("0020|0011").strip(" \0") if reader.HasMetaDataKey("0020|0011") else ""
    return int(text) if text.lstrip("+-").isdigit() else 0


def _facts(files: list[str]) -> str:
    """Describe a series without identifying anyone: matrix size, number of slices and voxel size."""
    first = _information(files[0])
    (columns, rows, frames), sizes = (*first.GetSize(), 1)[:3], list((*first.GetSpacing(), 1.0)[:3])
    if len(files) > 1:
        sizes[2] = float(np.linalg.norm(np.subtract(_information(files[1]).GetOrigin(), first.GetOrigin())))
    count = max(frames, len(files))
    return f"{columns}x{rows}, {count} slice{'s' * (count > 1)} of {'x'.join(f'{size:.3g}' for size in sizes)} mm"


def _is_image(file: str) -> bool:
    try:
        return min(_information(file).GetSize()) > 0
    except RuntimeError:
        return False


def _information(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def _read_slices(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    slices = [_information(file) for file in files]
    _check_alike(slices)
    origins = np.array([each.GetOrigin() for each in slices])
    normal = np.reshape(slices[0].GetDirection(), (3, 3))[:, 2]
    _check_volumes(slices, origins @ normal)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetOutputPixelType(sitk.sitkFloat32)  # rescale slope and intercept applied
    image = reader.Execute()
    # ITK takes the first slice's orientation and pixel size, and assumes an unsheared stack with even spacing,
    # (last - first) / (n - 1): others must be refused here.
    _check_steps(np.diff(origins @ normal))
    _check_shear(origins[-1] - origins[0], normal, min(slices[0].GetSpacing()[:2]))
    return from_itk(image)


def _check_alike(slices: list[sitk.ImageFileReader]) -> None:
    """Refuse slices of different orientations or pixel sizes, such as two stacks under one series UID."""
    turns, sizes = np.array([each.GetDirection() for each in slices]), np.array([each.GetSpacing() for each in slices])
    if np.ptp(turns, axis=0).max() > 1e-3 or (np.ptp(sizes[:, :2], axis=0) > 1e-3 * sizes[0, :2]).any():
        raise ScanError("DICOM slices differ in orientation or pixel size, so they are not one volume; keep the files "
                        "of one in a folder of their own, or convert them to NIfTI with dcm2niix")


def _check_volumes(slices: list[sitk.ImageFileReader], places: np.ndarray) -> None:
    """Refuse several slices at each place (echoes, a time series); `places` (slices,) is mm along the slice normal."""
    distinct, volumes = np.unique(places.round(2), return_counts=True)
    if len(distinct) < 2 or np.median(volumes) < 2:  # a single doubled slice is left to _check_steps
        return
    fullest, most = distinct[volumes.argmax()], volumes.max()
    same = [each for each, place in zip(slices, places.round(2), strict=True) if place == fullest]
    found = {name: [each.GetMetaData(tag).strip(" \0") for each in same if each.HasMetaDataKey(tag)]
             for tag, name in VOLUME_TAGS.items()}
    differ = [f"{name} {', '.join(list(dict.fromkeys(values))[:MOST_LISTED])}" for name, values in found.items()
              if len(set(values)) > 1]
    which = f"; they differ in {' and '.join(differ)}" if differ else ""
    as_many = "up to that many" if np.ptp(volumes) else "as many"
    raise ScanError(f"expected one volume in the DICOM series, found {most} ({as_many} slices at each of "
                    f"{len(distinct)} positions{which}); keep the files of one in a folder of their own, or "
                    "convert them to NIfTI with dcm2niix and give one volume")


def _check_shear(across: np.ndarray, normal: np.ndarray, pixel_mm: float) -> None:
    """Refuse a stack whose last slice lies more than a pixel beside the normal of the first, such as a tilted gantry's.

    `across` (3,) leads from the first slice's corner to the last one's, in mm.
    """
    beside = float(np.linalg.norm(across - (across @ normal) * normal))
    if beside > pixel_mm:
        raise ScanError(f"DICOM slices are sheared: the last lies {beside:.1f} mm beside the first (a tilted gantry?); "
                        "convert the series to NIfTI with dcm2niix, which corrects this")


def _check_steps(steps: np.ndarray) -> None:
    """Refuse uneven slice spacing, given the distances along the slice normal."""
    if len(steps) and abs(np.median(steps)) < 1e-3:
        raise ScanError("DICOM slices without positions, or all at one: where they lie is not known; export the series "
                        "again, with its geometry")
    if np.ptp(steps) > 0.1 * abs(np.median(steps)) + 1e-3:
        raise ScanError(f"DICOM slices are not evenly spaced ({np.abs(steps).min():.2f} to "
                        f"{np.abs(steps).max():.2f} mm): is one missing or doubled? Export the series again")
