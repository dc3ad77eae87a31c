"""The transforms of a recipe: each with a probability and ranges in real units, and the physics or paper behind it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

AXES = ("z", "y", "x")

Axes = Annotated[tuple[Literal["z", "y", "x"], ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Turn = Annotated[float, Field(ge=0, le=180)]
ShearDegrees = Annotated[float, Field(ge=0, le=60)]
TranslationMm = Annotated[float, Field(ge=0, le=200)]


class Transform(BaseModel):
    """What all transforms share.

    Attributes:
        probability: of each view.
        drawn: which number of a `kit.augment.draws.Draw` it decides.
        neutral: the number that changes nothing.
        most: how far the explorer's slider reaches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    drawn: ClassVar[str]
    neutral: ClassVar[float] = 0.0
    most: ClassVar[float] = 1.0
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0


class Ranged(Transform):
    """A transform whose one number is drawn from a range, which must lie between `limits`."""

    limits: ClassVar[tuple[float, float]] = (0.0, 1000.0)
    range: tuple[float, float]

    @field_validator("range")
    @classmethod
    def _possible(cls, value: tuple[float, float]) -> tuple[float, float]:
        (start, end), (low, high) = value, cls.limits
        if start > end:
            raise ValueError(f"the range starts above its end: {start:g} > {end:g}")
        if start < low or end > high:
            raise ValueError(f"{cls.__name__.lower()} takes {low:g} to {high:g}")
        return value


class Crop(Transform):
    """A box of random size and place, resized to the full box; `smallest` is a share of each side (z, y, x)."""

    drawn = "crop_size"
    smallest: tuple[Share, Share, Share]


class Flip(Transform):
    """Mirror along each of the axes, each with the probability."""

    drawn = "flip"
    axes: Axes


class Rotate(Transform):
    """Rotation about z, y and x, each within plus or minus so many degrees.

    What comes in from beyond the box is zero, or the box's border stretched outwards (`padding`, MONAI's two).
    """

    drawn, most = "rotation_degrees", 90
    degrees: tuple[Turn, Turn, Turn]
    padding: Literal["zeros", "border"] = "zeros"


class Shear(Transform):
    """Shear of z with y, z with x and y with x, each within plus or minus so many degrees."""

    drawn, most = "shear_degrees", 30
    degrees: tuple[ShearDegrees, ShearDegrees, ShearDegrees]


class Translate(Transform):
    """A translation along z, y and x, each within plus or minus so many mm."""

    drawn, most = "translation_mm", 40
    mm: tuple[TranslationMm, TranslationMm, TranslationMm]


class Zoom(Ranged):
    """One factor for all axes; above 1 the brain becomes larger."""

    drawn, neutral, limits, most = "zoom", 1.0, (0.05, 20), 2


class Elastic(Ranged):
    """A smooth free-form deformation (Rueckert et al. 1999); `range` is its control points' deviation in mm."""

    drawn, most = "elastic_mm", 12
    apart_mm: Positive = 32  # between control points; cubic B-splines run between them


class Shift(Ranged):
    """A number added inside the mask, in standard deviations of the z-scored image.

    What only shifts and scales is undone by the z-score; the paper's recipe has it all the same.
    """

    drawn, limits, most = "shift", (-100, 100), 2


class Scale(Ranged):
    """A factor of the signal above the darkest voxel: with noise after it, a change of the signal's share."""

    drawn, neutral, limits, most = "scale", 1.0, (0.01, 100), 3


class Gamma(Ranged):
    """x -> ((x - min) / (max - min)) ** gamma * (max - min) + min, over the image's own range."""

    drawn, neutral, limits, most = "gamma", 1.0, (0.2, 5), 4


class GammaInverted(Ranged):
    """Gamma of the negative, as nnU-Net has it: dark tissue spreads where gamma spreads bright tissue."""

    drawn, neutral, limits, most = "gamma_inverted", 1.0, (0.2, 5), 4


class Contrast(Ranged):
    """A factor about the mean, then cut to the range that was there, as nnU-Net has it (Isensee et al. 2021)."""

    drawn, neutral, limits, most = "contrast", 1.0, (0.05, 20), 3


class Histogram(Ranged):
    """Grey levels bent by a rising line through random knots; `range` is their deviation, a share of all levels."""

    drawn, limits, most = "histogram_sd", (0, 1), 0.3
    knots: Annotated[int, Field(ge=1, le=64)] = 4  # between the ends, which stay


class Bias(Ranged):
    """Multiplication by exp(smooth field), as of a receive coil; `range` is the field's standard deviation."""

    drawn, limits, most = "bias_sd", (0, 5), 1
    spacing_mm: Positive = 60  # between the field's control points


class Noise(Ranged):
    """Gaussian noise inside the mask; `range` is its standard deviation on the z-scored image."""

    drawn, most = "noise_sd", 1


class Rician(Ranged):
    """Noise of a magnitude image: Gaussian in both channels (Gudbjartsson and Patz 1995); dark voxels brighten."""

    drawn, most = "rician_sd", 1


class Blur(Ranged):
    """A Gaussian; `range` is its full width at half maximum in mm."""

    drawn, limits, most = "blur_mm", (0, 60), 12


class Sharpen(Ranged):
    """Unsharp masking: x + amount * (x - blurred x); `range` is the amount."""

    drawn, limits, most = "sharpen", (0, 20), 3
    fwhm_mm: Positive = 4  # of the blurring


class ThickSlices(Ranged):
    """An anisotropic acquisition: means over slices so many mm thick, read out between them linearly."""

    drawn, limits, most = "slice_mm", (0, 60), 16
    axes: Axes = AXES  # across the slices; one of them is drawn


class Gibbs(Ranged):
    """Ringing at edges: k-space cut off at the edge of an acquisition with voxels of so many mm."""

    drawn, limits, most = "gibbs_mm", (0, 60), 12


class Motion(Ranged):
    """The head moves while k-space is filled (Shaw et al. 2019); `range` is its poses' deviation in mm and degrees."""

    drawn, limits, most = "motion_mm", (0, 40), 8
    axes: Axes = ("y", "z")  # phase encoding; one of them is drawn
    movements: Annotated[int, Field(ge=1, le=16)] = 2


class Ghosting(Ranged):
    """Copies along the phase-encoding axis: every few lines of k-space lose this share of their signal."""

    drawn, limits, most = "ghosting", (0, 1), 1
    axes: Axes = ("y", "z")
    ghosts: Annotated[int, Field(ge=2, le=16)] = 4


class Spike(Ranged):
    """One wrong value in k-space: stripes through the image; `range` is their amplitude, in standard deviations."""

    drawn, most = "spike", 2


class Cutout(Ranged):
    """Boxes set to the mean (DeVries and Taylor 2017); `range` is their side in mm."""

    drawn, limits, most = "cutout_mm", (0, 200), 80
    boxes: Annotated[int, Field(ge=1, le=64)] = 3


class Patches(Ranged):
    """Patches of a regular grid set to the mean, as the masked autoencoder's input; `range` is their share."""

    drawn, limits, most = "patches", (0, 0.95), 0.9
    size_mm: Positive = 24
