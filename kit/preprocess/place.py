"""Where a scan's voxels lie in millimetres: NIfTI's unit of length, and how far two affines are apart.

A NIfTI header may hold two forms, each an affine: the sform and the qform. The sform counts where there is one, as in
nibabel, FSL, SPM and FreeSurfer: alignments made after the scan are written there, and a quaternion cannot hold them
all. ITK and ANTs may go by the qform, so that a mask of theirs lies there: see `kit.preprocess.nifti.other_form`.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np

VOXEL_MM = (0.01, 100.0)  # sides of voxels beyond which a scan is none of a head
UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metres and microns; 2 is mm, and 0, unknown, is taken for it
# A quaternion in float32 is off by up to 0.46 mm at the corners of 256x256x192 voxels, in 20,000 random orientations.
ROUNDING_MM = 0.5


def no_codes(header: nib.Nifti1Header) -> bool:
    """Return whether a header has neither form."""
    return bool(header["sform_code"] <= 0 and header["qform_code"] <= 0)


def affine_of(header: nib.Nifti1Header) -> np.ndarray:
    """Return where a header puts its voxels (x, y, z) as they are stored, in millimetres, (4, 4)."""
    if no_codes(header):
        return as_stored(header["pixdim"][1:4] * unit_mm(header), header.get_data_shape())
    return in_mm(header.get_best_affine(), header)


def in_mm(affine: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """Return one of a header's affines (4, 4) in millimetres."""
    return np.diag([*3 * [unit_mm(header)], 1.0]) @ affine


def unit_mm(header: nib.Nifti1Header) -> float:
    """Return how many mm the header's unit of length is.

    1 where that unit makes voxels that no head has, and mm do not: few programs read the unit, and some write any.
    """
    unit = UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    sizes = header["pixdim"][1:4] if no_codes(header) else voxel_sizes(header.get_best_affine())
    return 1.0 if plausible(sizes) and not plausible(unit * sizes) else unit


def as_stored(sizes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine of voxels in RAS order with their middle at the origin; NIfTI's "method 1".

    nibabel takes NIfTI files without codes for Analyze's, with x to the left.
    """
    sizes = np.asarray(sizes, float)
    return nib.affines.from_matvec(np.diag(sizes), -sizes * (np.array(shape[:3]) - 1) / 2)


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """Return the lengths of a voxel's sides (x, y, z) under an affine (4, 4)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def plausible(sizes_mm: np.ndarray) -> bool:
    """Return whether heads are scanned in voxels of such sides."""
    return bool(((sizes_mm >= VOXEL_MM[0]) & (sizes_mm <= VOXEL_MM[1])).all())


def corners_apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Return how many mm apart two affines (4, 4) put a corner of an array (z, y, x), at most."""
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape[::-1]])).reshape(3, -1)
    return float(np.linalg.norm((one - other)[:3, :3] @ corners + (one - other)[:3, 3:], axis=0).max())


def same_place(one: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Return whether two affines (4, 4) put an array (z, y, x) at the same place, but for rounding."""
    return np.allclose(one, other, atol=1e-2) or corners_apart(one, other, shape) <= ROUNDING_MM
