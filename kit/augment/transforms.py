"""The transforms of a recipe: each with a probability, ranges in real units, and the physics or paper behind it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Axis = Literal["z", "y", "x"]
AXES: tuple[Axis, ...] = ("z", "y", "x")

Axes = Annotated[tuple[Axis, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
CropShare = Annotated[float, Field(ge=0.05, le=1)]
Turn = Annotated[float, Field(ge=0, le=180)]
ShearDegrees = Annotated[float, Field(ge=0, le=60)]
TranslationMm = Annotated[float, Field(ge=0, le=200)]


class Transform(BaseModel):
    """Base class of all transforms.

    Attributes:
        probability: the chance that a view gets it.
        drawn: the field of `kit.augment.draws.Draw` that it sets.
        neutral: the value that changes nothing.
        most: full strength, see `kit.augment.recipe.alone`, and the upper end of the explorer's slider; recipes may go
            beyond it, up to `limits`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    drawn: ClassVar[str]
    neutral: ClassVar[float] = 0.0
    most: ClassVar[float] = 1.0
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0


class Ranged(Transform):
    """A transform with one number, drawn from a range within `limits`."""

    limits: ClassVar[tuple[float, float]] = (0.0, 1000.0)
    range: tuple[float, float]

    @field_validator("range")
    @classmethod
    def _possible(cls, value: tuple[float, float]) -> tuple[float, float]:
        (start, end), (low, high) = value, cls.limits
        if start > end:
            raise ValueError(f"the range starts above its end: {start:g} > {end:g}")
        if start < low or end > high:
            raise ValueError(f"the range must lie within {low:g} to {high:g}")
        return value


class Crop(Transform):
    """A box of random size and position, resized to the full box; `smallest` is a fraction of each side (z, y, x)."""

    drawn = "crop_size"
    smallest: tuple[CropShare, CropShare, CropShare]


class Flip(Transform):
    """Mirror along each of the axes, each with this probability."""

    drawn = "flip"
    axes: Axes


class Rotate(Transform):
    """Rotation about z, y and x, each within plus or minus the given degrees.

    `zeros`: beyond the scan is zero. `border`: beyond the crop, the crop's edge voxels are repeated. Both as in MONAI.
    """

    drawn, most = "rotation_degrees", 90
    degrees: tuple[Turn, Turn, Turn]
    padding: Literal["zeros", "border"] = "zeros"


class Shear(Transform):
    """Shear of z with y, z with x and y with x, each within plus or minus the given degrees."""

    drawn, most = "shear_degrees", 30
    degrees: tuple[ShearDegrees, ShearDegrees, ShearDegrees]


class Translate(Transform):
    """Translation along z, y and x, each within plus or minus the given mm."""

    drawn, most = "translation_mm", 40
    mm: tuple[TranslationMm, TranslationMm, TranslationMm]


class Zoom(Ranged):
    """One scale factor for all axes; above 1 the brain becomes larger."""

    drawn, neutral, limits, most = "zoom", 1.0, (0.05, 20), 2


class Elastic(Ranged):
    """A smooth free-form deformation (Rueckert et al. 1999); `range` is its control points' SD in mm."""

    drawn, most = "elastic_mm", 12
    apart_mm: Positive = 32  # between control points; cubic B-splines run between them


class Shift(Ranged):
    """A number added inside the mask, in standard deviations of the z-scored image.

    The final z-score undoes any shift; it is here because the paper's recipe has it.
    """

    drawn, limits, most = "shift", (-100, 100), 2


class Scale(Ranged):
    """Scale the signal above the darkest voxel; with noise added later, it changes the signal-to-noise ratio."""

    drawn, neutral, limits, most = "scale", 1.0, (0.01, 100), 3


class Gamma(Ranged):
    """x -> ((x - min) / (max - min)) ** gamma * (max - min) + min, over the image's own range."""

    drawn, neutral, limits, most = "gamma", 1.0, (0.2, 5), 4


class GammaInverted(Ranged):
    """Gamma of the inverted image, as in nnU-Net: it stretches dark tissue where gamma stretches bright tissue."""

    drawn, neutral, limits, most = "gamma_inverted", 1.0, (0.2, 5), 4


class Contrast(Ranged):
    """Scale about the mean, then clip to the original range, as in nnU-Net (Isensee et al. 2021)."""

    drawn, neutral, limits, most = "contrast", 1.0, (0.05, 20), 3


class Histogram(Ranged):
    """Grey levels remapped by a rising curve through random knots.

    `range`: SD of the knots' heights, as a fraction of the image's grey-level range.
    """

    drawn, limits, most = "histogram_sd", (0, 1), 0.3
    knots: Annotated[int, Field(ge=1, le=64)] = 4  # between the ends, which are fixed


class Bias(Ranged):
    """Multiply by a receive coil's field; `range` is the SD of its log at control points, linear in between."""

    drawn, limits, most = "bias_sd", (0, 5), 1
    spacing_mm: Positive = 60  # at most, between control points, which divide each side of the box evenly


class Noise(Ranged):
    """Gaussian noise inside the mask; `range` is its SD, in units of the scan's SD before its grey levels change."""

    drawn, most = "noise_sd", 1


class Rician(Ranged):
    """Noise of a magnitude image (Gudbjartsson and Patz 1995), which brightens dark voxels.

    `range` is the SD of the Gaussian noise in each of the two channels, in the unit of `Noise`.
    """

    drawn, most = "rician_sd", 1


class Blur(Ranged):
    """Gaussian blur; `range` is its full width at half maximum in mm."""

    drawn, limits, most = "blur_mm", (0, 60), 12


class Sharpen(Ranged):
    """Unsharp masking: x + amount * (x - blurred x); `range` is the amount."""

    drawn, limits, most = "sharpen", (0, 20), 3
    fwhm_mm: Positive = 4  # of the blur


class ThickSlices(Ranged):
    """An anisotropic acquisition: averages over slices this many mm thick, with linear interpolation between them.

    Slices no thicker than the grid's spacing change nothing: at 4 mm, `range: [1, 6]` acts in two of five draws.
    """

    drawn, limits, most = "slice_mm", (0, 60), 16
    axes: Axes = AXES  # across the slices; one of them is drawn


class Gibbs(Ranged):
    """Ringing at edges: k-space truncated as in an acquisition with voxels of this many mm.

    Voxels no larger than the grid's spacing change nothing: at 4 mm, `range: [1, 3]` never acts.
    """

    drawn, limits, most = "gibbs_mm", (0, 60), 12


class Motion(Ranged):
    """Head movement while k-space is filled (Shaw et al. 2019); `range` is the SD of its poses in mm and degrees."""

    drawn, limits, most = "motion_mm", (0, 40), 8
    axes: Axes = ("y", "z")  # phase encoding; one of them is drawn
    movements: Annotated[int, Field(ge=1, le=16)] = 2


class Ghosting(Ranged):
    """Copies along the phase-encoding axis: every `ghosts`-th line of k-space loses this share of its signal."""

    drawn, limits, most = "ghosting", (0, 1), 1
    axes: Axes = ("y", "z")
    ghosts: Annotated[int, Field(ge=2, le=16)] = 4


class Spike(Ranged):
    """One corrupted value in k-space: stripes across the image; `range` is their amplitude, in standard deviations."""

    drawn, most = "spike", 2


class Cutout(Ranged):
    """Boxes set to the mean (DeVries and Taylor 2017); `range` is their side in mm."""

    drawn, limits, most = "cutout_mm", (0, 200), 80
    boxes: Annotated[int, Field(ge=1, le=64)] = 3


class Patches(Ranged):
    """Patches of a regular grid set to the mean, like the masked autoencoder's input; `range` is their share."""

    drawn, limits, most = "patches", (0, 0.95), 0.9
    size_mm: Positive = 24
