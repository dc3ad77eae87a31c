"""Settings of the preparation, and their allowed values."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from kit.store.grid import Grid

Registration = Literal["none", "rigid", "affine"]
Mask = Literal["auto", "given", "nonzero", "deepbet", "hd-bet", "mri_synthstrip"]
BiasCorrection = Literal["none", "n4"]
Intensity = Literal["zscore", "whitematter"]
OrientationUnknown = Literal["refuse", "assume_ras"]
Allowed = Literal["registration", "mask", "bias_correction"]  # settings that may differ between preparations on request
# A scan beyond the limits of these QC metrics is not used for training; see `kit.preprocess.quality`.
UNUSABLE = ("template_similarity", "contrast", "grey_levels")
TEMPLATE_NAME = "ICBM152 2009a (nilearn)"


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared.

    Args:
        grid: the grid of prepared arrays.
        registration: "affine", "rigid", or "none" for scans that already lie near MNI space.
        mask: "auto" (the cohort's mask_path if given, a stripped scan's own voxels, else deepbet's), "given"
            (mask_path), "nonzero" (a skull-stripped scan's voxels outside its background, holes filled), "deepbet"
            (a network, installed with the kit), or the command "hd-bet" or "mri_synthstrip".
        bias_correction: "n4" or "none".
        intensity: "zscore" inside the mask, or "whitematter", which scales the white-matter peak to 1.
        orientation_unknown: what to do if a header does not say where the scan lies: "refuse" it, or "assume_ras"
            (stored in RAS order, with its centre at the origin).

    Raises:
        ValueError: a value outside these.
    """

    grid: Grid
    registration: Registration = "affine"
    mask: Mask = "auto"
    bias_correction: BiasCorrection = "none"
    intensity: Intensity = "zscore"
    orientation_unknown: OrientationUnknown = "refuse"

    def record(self) -> dict[str, Any]:
        """Return the content of `preparation.json`; stores and encoders must agree on `kit.provenance.FIELDS` of it."""
        from kit.store.store import FORMAT  # imports pandas and blosc2, not needed to refuse a mistake in parameters

        return {
            "format": FORMAT, "axes": "zyx", "shape": list(self.grid.shape), "spacing_mm": self.grid.spacing_mm,
            "origin_mm": list(self.grid.origin_mm), "registration": self.registration, "mask": self.mask,
            "bias_correction": self.bias_correction, "intensity": self.intensity, "template": TEMPLATE_NAME,
            "versions": {name: version(name) for name in ("SimpleITK", "nibabel", "blosc2", "deepbet")},
        }
