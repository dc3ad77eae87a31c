"""One view's random numbers, keyed by (seed, epoch, scan, view): the same whatever the batch, worker or rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from kit.augment.recipe import Recipe

TRANSFORMS = ("crop", "flip", "rotate", "zoom", "shift", "gamma", "bias", "noise")
AXES = ("z", "y", "x")


@dataclass(frozen=True)
class Draw:
    """The numbers of one view; the defaults change nothing.

    Attributes:
        crop_start, crop_size: shares of each side (z, y, x).
        flip: mirror along (z, y, x).
        rotation_degrees: about (z, y, x).
        zoom: above 1 the brain becomes larger.
        shift: added inside the mask.
        gamma: exponent.
        bias_sd: standard deviation of the log bias field.
        noise_sd: standard deviation of the noise.
        field_seed: of the bias field and the noise, which are drawn voxel by voxel on the device.
    """

    crop_start: tuple[float, float, float] = (0.0, 0.0, 0.0)
    crop_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotation_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    shift: float = 0.0
    gamma: float = 1.0
    bias_sd: float = 0.0
    noise_sd: float = 0.0
    field_seed: int = field(default=0, repr=False)

    def in_words(self) -> str:
        """What was drawn, in words and numbers; what changes nothing is left out."""
        changed = {name: value for name, value in asdict(self).items()
                   if value != getattr(Draw, name, None) and name != "field_seed"}
        words = [f"{name.replace('_', ' ')} {_numbers(value)}" for name, value in changed.items()]
        return "; ".join(words) or "unchanged"


def _numbers(value: object) -> str:
    if isinstance(value, tuple) and isinstance(value[0], bool):
        return "along " + " and ".join(axis for axis, on in zip(AXES, value, strict=True) if on)
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{part:.2f}" for part in value) + ")"
    return f"{value:.2f}"


def draw(recipe: Recipe, seed: int, epoch: int, scan: int, view: int, attempt: int = 0) -> Draw:
    """Draw one view.

    Each transform has a stream of its own, so that switching one off leaves the others' numbers alone.

    Args:
        recipe: what to draw.
        seed, epoch, scan, view: the view's key; `scan` as `kit.data.loader.scan_key` gives it.
        attempt: above 0 when earlier draws left no brain in the box.
    """
    streams = {name: np.random.Generator(np.random.Philox(np.random.SeedSequence(
        [seed, epoch, scan, view, attempt, number]))) for number, name in enumerate(TRANSFORMS)}
    values: dict[str, object] = {"field_seed": int(streams["noise"].integers(2**31))}
    for name in TRANSFORMS:
        transform = getattr(recipe, name)
        if transform is None:
            continue
        stream = streams[name]
        if name == "flip":
            on = stream.random(3) < transform.probability
            values["flip"] = tuple(bool(on[i]) and axis in transform.axes for i, axis in enumerate(AXES))
        elif stream.random() < transform.probability:
            values.update(_values(name, transform, stream))
    return Draw(**values)


def _values(name: str, transform: object, stream: np.random.Generator) -> dict[str, object]:
    if name == "crop":
        size = stream.uniform(transform.smallest, 1.0)
        return {"crop_size": tuple(size.tolist()), "crop_start": tuple((stream.random(3) * (1 - size)).tolist())}
    if name == "rotate":
        degrees = stream.uniform(-1, 1, 3) * np.asarray(transform.degrees)
        return {"rotation_degrees": tuple(degrees.tolist())}
    value = float(stream.uniform(*transform.range))
    return {{"bias": "bias_sd", "noise": "noise_sd"}.get(name, name): value}
