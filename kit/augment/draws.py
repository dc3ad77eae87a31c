"""Draw a view's random numbers, keyed by (seed, epoch, scan, view): the same for any batch, worker or rank."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from kit.augment.recipe import Recipe, at_strength
from kit.augment.transforms import AXES
from kit.seeding import rng_for

# A transform's position selects its random stream: append new ones, or existing views change.
TRANSFORMS = ("crop", "flip", "rotate", "zoom", "shift", "gamma", "bias", "noise", "shear", "translate", "elastic",
              "scale", "gamma_inverted", "contrast", "histogram", "rician", "blur", "sharpen", "thick_slices", "gibbs",
              "motion", "ghosting", "spike", "cutout", "patches")

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Draw:
    """The random numbers of one view; the defaults change nothing. `kit.augment.transforms` explains each.

    A name ends in its unit: mm, degrees, or sd for a standard deviation; other numbers have none.
    Triples are along or about (z, y, x), and shears are z with y, z with x, y with x. An axis is 0 z, 1 y or 2 x.
    The crop's start and size are fractions of each side.
    `field_seed` seeds noise, bias field, control points, poses and box positions.
    """

    crop_start: Triple = (0.0, 0.0, 0.0)
    crop_size: Triple = (1.0, 1.0, 1.0)
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotation_degrees: Triple = (0.0, 0.0, 0.0)
    shear_degrees: Triple = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    translation_mm: Triple = (0.0, 0.0, 0.0)
    elastic_mm: float = 0.0
    shift: float = 0.0
    scale: float = 1.0
    gamma: float = 1.0
    gamma_inverted: float = 1.0
    contrast: float = 1.0
    histogram_sd: float = 0.0
    bias_sd: float = 0.0
    noise_sd: float = 0.0
    rician_sd: float = 0.0
    blur_mm: float = 0.0
    sharpen: float = 0.0
    slice_mm: float = 0.0
    slice_axis: int = 0
    gibbs_mm: float = 0.0
    motion_mm: float = 0.0
    motion_axis: int = 0
    ghosting: float = 0.0
    ghosting_axis: int = 0
    spike: float = 0.0
    cutout_mm: float = 0.0
    patches: float = 0.0
    field_seed: int = field(default=0, repr=False)

    def in_words(self) -> str:
        """Describe what was drawn in words and numbers, leaving out defaults.

        Some of it may still change nothing: a shift, which the z-score undoes, and slices or ringing below the spacing.
        """
        words = []
        for part in fields(self):
            value = getattr(self, part.name)
            if value == part.default or part.name == "field_seed" or part.name.endswith("_axis"):
                continue
            name, _, unit = part.name.rpartition("_")
            name, unit = (name, f" {unit}") if unit in ("mm", "degrees") else (part.name.replace("_", " "), "")
            axis = getattr(self, part.name.removesuffix("_mm") + "_axis", None)
            words.append(f"{name} {_numbers(value)}{unit}" + ("" if axis is None else f" along {AXES[axis]}"))
        return "; ".join(words) or "unchanged"


def _numbers(value: object) -> str:
    if isinstance(value, tuple) and isinstance(value[0], bool):
        return "along " + " and ".join(axis for axis, on in zip(AXES, value, strict=True) if on)
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{part + 0.0:.2f}" for part in value) + ")"
    return f"{value:.2f}"


def draw(recipe: Recipe, seed: int, epoch: int, scan: int, view: int, attempt: int = 0) -> Draw:
    """Draw one view.

    Each transform has its own random stream, so switching one off does not change the others' numbers.

    Args:
        recipe: what to draw.
        seed, epoch, scan, view: the view's key; `scan` comes from `kit.seeding.scan_key`.
        attempt: above 0 if earlier draws left too little brain in the box.
    """
    if recipe.strength != 1:
        recipe = at_strength(recipe, 1)
    values: dict[str, Any] = {}
    for number, name in enumerate(TRANSFORMS):
        transform = getattr(recipe, name)
        if transform is None and name != "noise":
            continue
        stream = rng_for(seed, epoch, scan, view, attempt, number)
        if name == "noise":
            values["field_seed"] = int(stream.integers(2**31))
            if transform is None:
                continue
        if name == "flip":
            on = stream.random(3) < transform.probability
            values["flip"] = tuple(bool(on[i]) and axis in transform.axes for i, axis in enumerate(AXES))
        elif stream.random() < transform.probability:
            values.update(_values(transform, stream))
    return Draw(**values)


def _values(transform: Any, stream: np.random.Generator) -> dict[str, Any]:
    if transform.drawn == "crop_size":
        size = stream.uniform(transform.smallest, 1.0)
        return {"crop_size": tuple(size.tolist()), "crop_start": tuple((stream.random(3) * (1 - size)).tolist())}
    if widest := getattr(transform, "degrees", None) or getattr(transform, "mm", None):
        return {transform.drawn: tuple((stream.uniform(-1, 1, 3) * np.asarray(widest)).tolist())}
    values = {transform.drawn: float(stream.uniform(*transform.range))}
    if axes := getattr(transform, "axes", None):
        values[transform.drawn.removesuffix("_mm") + "_axis"] = AXES.index(axes[stream.integers(len(axes))])
    return values


def histogram_levels(draw: Draw, knots: int) -> np.ndarray:
    """Return the levels of `kit.augment.contrast.histogram`, rising from 0 to 1, (knots + 2,) float64."""
    levels = np.linspace(0, 1, knots + 2)
    levels[1:-1] += detail(draw, "histogram").normal(0, draw.histogram_sd, knots)
    return np.sort(np.clip(levels, 0, 1))


def detail(draw: Draw, name: str) -> np.random.Generator:
    """Return the random stream for a transform's details, such as positions; the same on every machine."""
    return rng_for(draw.field_seed, TRANSFORMS.index(name))
