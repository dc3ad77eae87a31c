"""Locate voxels in millimetres: NIfTI's unit of length, and the distance between two affines.

A NIfTI header may hold two forms, each giving an affine: the sform and the qform. The sform is used if present, as in
nibabel, FSL, SPM and FreeSurfer: later alignments are written there, and a quaternion cannot represent all of them.
ITK and ANTs may use the qform, so masks that they wrote may be placed by it: see `kit.preprocess.nifti.other_form`.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np

VOXEL_MM = (0.01, 100.0)  # voxel sizes outside this range are no head scan's
UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metres and microns; 2 is mm, and 0 (unknown) is read as mm
# A float32 quaternion is off by up to 0.46 mm at the corners of 256x256x192 voxels (20,000 random orientations).
ROUNDING_MM = 0.5


def no_codes(header: nib.Nifti1Header) -> bool:
    """Return whether a header has neither sform nor qform."""
    return bool(header["sform_code"] <= 0 and header["qform_code"] <= 0)


def affine_of(header: nib.Nifti1Header) -> np.ndarray:
    """Return a header's (4, 4) affine from voxels (x, y, z) as stored to millimetres."""
    if no_codes(header):
        return as_stored(header["pixdim"][1:4] * unit_mm(header), header.get_data_shape())
    return in_mm(header.get_best_affine(), header)


def in_mm(affine: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """Convert one of a header's (4, 4) affines to millimetres."""
    return np.diag([*3 * [unit_mm(header)], 1.0]) @ affine


def unit_mm(header: nib.Nifti1Header) -> float:
    """Return the header's unit of length in mm.

    Falls back to 1 if voxel sizes are implausible for a head in that unit, but plausible in mm: few programs read the
    unit, and some write a wrong one.
    """
    unit = UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    sizes = header["pixdim"][1:4] if no_codes(header) else voxel_sizes(header.get_best_affine())
    return 1.0 if plausible(sizes) and not plausible(unit * sizes) else unit


def as_stored(sizes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine of voxels stored in RAS order with their centre at the origin; NIfTI's "method 1".

    nibabel would treat NIfTI files without codes as Analyze files, with x pointing left.

    Args:
        sizes: voxel sizes along (x, y, z), mm.
        shape: voxels along (x, y, z), unlike arrays elsewhere.
    """
    sizes = np.asarray(sizes, float)
    return nib.affines.from_matvec(np.diag(sizes), -sizes * (np.array(shape[:3]) - 1) / 2)


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """Return the voxel sizes (x, y, z) of a (4, 4) affine, in its unit of length."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def plausible(sizes_mm: np.ndarray) -> bool:
    """Return whether voxel sizes are plausible for a head scan."""
    return bool(((sizes_mm >= VOXEL_MM[0]) & (sizes_mm <= VOXEL_MM[1])).all())


def corners_apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Return the largest distance, in mm, between the corners of an array (z, y, x) under two (4, 4) affines."""
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape[::-1]])).reshape(3, -1)
    return float(np.linalg.norm((one - other)[:3, :3] @ corners + (one - other)[:3, 3:], axis=0).max())


def same_affine(one: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Return whether two (4, 4) affines put an array (z, y, x) in the same place, up to rounding."""
    return corners_apart(one, other, shape) <= ROUNDING_MM
