"""Reading a folder that holds one DICOM series, by SimpleITK (GDCM)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.affines import from_matvec

from kit.data.nifti import ScanError, upright

# From DICOM's LPS+ millimetres to RAS+.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_dicom(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the one DICOM series of a folder in RAS order, its slices sorted by where they lie.

    Voxels and geometry are taken, no other header field. Files that are no DICOM are passed over.

    Returns:
        The image, float32 (z, y, x), and its (4, 4) affine from a voxel (x, y, z) to millimetres, RAS+.

    Raises:
        ScanError: no series or several, slices that are missing or of other shapes, or no grey volume.
    """
    warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # they show header text
    try:
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) != 1:
            raise ScanError(f"expected one DICOM series in the folder, found {len(series) or 'none'}")
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
        if len(files) < 2:
            raise ScanError("expected one DICOM series of several slices, found a single file")
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        reader.SetOutputPixelType(sitk.sitkFloat32)  # rescale slope and intercept applied
        image = reader.Execute()
        _check_slices(files, image)
    except RuntimeError as error:  # SimpleITK's, with a page of C++ in its message
        raise ScanError("damaged DICOM series: a slice cannot be read, or has another shape than the first") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings)
    affine = from_matvec(np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), image.GetOrigin())
    return upright(sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine)


def _check_slices(files: tuple[str, ...], image: sitk.Image) -> None:
    """Refuse gaps: GDCM sorts slices by their place, and takes the first distance for all of them."""
    normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
    reader, places = sitk.ImageFileReader(), []
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        places.append(np.dot(reader.GetOrigin(), normal))
    steps = np.diff(places)
    if np.ptp(steps) > 0.1 * abs(np.median(steps)) + 1e-3:
        raise ScanError(f"DICOM slices are not evenly spaced ({np.abs(steps).min():.2f} to "
                        f"{np.abs(steps).max():.2f} mm): is one missing or doubled?")
