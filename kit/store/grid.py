"""Define where prepared arrays lie: a box in MNI152 millimetres.

Arrays are (z, y, x), and points in millimetres are (x, y, z), RAS+.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.affines import from_matvec

Shape = tuple[int, int, int]  # voxels along (z, y, x)

# Centre, as (x, y, z), of the box of Kaczmarek et al. 2025: z -68..81, y -113..78, x -95..96 mm.
PAPER_CENTRE_MM = (0.5, -17.5, 6.5)


@dataclass(frozen=True)
class Grid:
    """An isotropic voxel grid around the centre of the paper's box.

    Args:
        shape: voxels along (z, y, x).
        spacing_mm: distance between the centres of neighbouring voxels, the same along each axis.

    Raises:
        ValueError: a side is not a positive whole number, or the spacing is not a positive number.
    """

    shape: Shape
    spacing_mm: float

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        if len(shape) != 3 or not all(int(side) == side and side > 0 for side in shape):
            raise ValueError(f"shape: expected three positive whole numbers (z, y, x), got {self.shape}")
        if not (np.isfinite(self.spacing_mm) and self.spacing_mm > 0):
            raise ValueError(f"spacing_mm: expected a positive number of millimetres, got {self.spacing_mm}")
        # A list from YAML or JSON must compare and hash like the tuple it stands for.
        object.__setattr__(self, "shape", tuple(int(side) for side in shape))
        object.__setattr__(self, "spacing_mm", float(self.spacing_mm))

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """MNI millimetres (x, y, z) of the first voxel's centre."""
        sides_xyz = self.shape[::-1]
        x, y, z = (centre - (side - 1) / 2 * self.spacing_mm
                   for centre, side in zip(PAPER_CENTRE_MM, sides_xyz, strict=True))
        return x, y, z

    @property
    def affine(self) -> np.ndarray:
        """The (4, 4) float64 matrix from a voxel (x, y, z) to MNI millimetres, RAS+."""
        return from_matvec(np.diag([self.spacing_mm] * 3), self.origin_mm)


# 150 x 192 x 192 voxels of 1 mm: the box on which the paper's models were trained.
PAPER_GRID = Grid((150, 192, 192), 1.0)
