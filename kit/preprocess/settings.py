"""How scans are prepared, and the words that say it."""

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
Allowed = Literal["registration", "mask", "bias_correction"]  # what may differ between preparations, if that is meant
# QC metrics beyond whose limits a scan is none to learn from; see `kit.preprocess.quality`.
UNUSABLE = ("template_similarity", "contrast", "grey_levels")
TEMPLATE_NAME = "ICBM152 2009a (nilearn)"


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared.

    Args:
        grid: where prepared arrays lie.
        registration: "affine", "rigid", or "none" for scans that already lie near MNI space.
        mask: "auto" (the cohort's mask_path where there is one, a stripped scan's own voxels, else deepbet's),
            "given" (mask_path), "nonzero" (a skull-stripped scan's voxels that are not its background, holes filled),
            "deepbet" (a network that comes with the kit), or the command "hd-bet" or "mri_synthstrip".
        bias_correction: "n4" or "none".
        intensity: "zscore" inside the mask, or "whitematter": the white-matter peak is 1.
        orientation_unknown: a scan whose header does not say where it lies is refused ("refuse"), or taken as
            stored in RAS order with its middle at the origin ("assume_ras").

    Raises:
        ValueError: a word that is none of these.
    """

    grid: Grid
    registration: Registration = "affine"
    mask: Mask = "auto"
    bias_correction: BiasCorrection = "none"
    intensity: Intensity = "zscore"
    orientation_unknown: OrientationUnknown = "refuse"

    def record(self) -> dict[str, Any]:
        """Return what `preparation.json` says: what a store, and an encoder trained on it, must agree on."""
        from kit.store.store import FORMAT  # pandas and blosc2: a mistake in parameters is refused without them

        return {
            "format": FORMAT, "axes": "zyx", "shape": list(self.grid.shape), "spacing_mm": self.grid.spacing_mm,
            "origin_mm": list(self.grid.origin_mm), "registration": self.registration, "mask": self.mask,
            "bias_correction": self.bias_correction, "intensity": self.intensity, "template": TEMPLATE_NAME,
            "versions": {name: version(name) for name in ("SimpleITK", "nibabel", "blosc2", "deepbet")},
        }
