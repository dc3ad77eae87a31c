"""Recipes: which transforms a view is made of, and from which ranges they are drawn.

A recipe is data: a YAML file beside this module, or the user's own. Every transform has a probability; what
a recipe does not name is not done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kit.reading import check, read_yaml
from kit.runs import resolve

FOLDER = Path(__file__).parent / "recipes"


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the range starts above its end: {value[0]:g} > {value[1]:g}")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Transform(BaseModel):
    """What all transforms share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0


class Crop(Transform):
    """A box of random size and place, resized to the full box; `smallest` is a share of each side (z, y, x)."""

    smallest: tuple[float, float, float]


class Flip(Transform):
    """Mirror along each of the axes, each with the probability."""

    axes: list[Literal["z", "y", "x"]]


class Rotate(Transform):
    """Rotation about z, y and x, each within plus or minus so many degrees."""

    degrees: tuple[float, float, float]


class Zoom(Transform):
    """One factor for all axes; above 1 the brain becomes larger."""

    range: Range


class Shift(Transform):
    """A number added inside the mask, in standard deviations of the z-scored image."""

    range: Range


class Gamma(Transform):
    """x -> ((x - min) / (max - min)) ** gamma * (max - min) + min, over the image's own range."""

    range: Range


class Bias(Transform):
    """Multiplication by exp(smooth field), as of a receive coil; `range` is the field's standard deviation."""

    range: Range
    spacing_mm: Annotated[float, Field(gt=0)] = 60  # between the field's control points


class Noise(Transform):
    """Gaussian noise inside the mask; `range` is its standard deviation on the z-scored image."""

    range: Range


class Recipe(BaseModel):
    """A view, in the order in which it is made; the z-score inside the mask always comes last."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    crop: Crop | None = None
    flip: Flip | None = None
    rotate: Rotate | None = None
    zoom: Zoom | None = None
    shift: Shift | None = None
    gamma: Gamma | None = None
    bias: Bias | None = None
    noise: Noise | None = None

    def problems(self) -> list[str]:
        """Nothing outside the recipe to check."""
        return []

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML values."""
        return self.model_dump(exclude_none=True, mode="json")


def names() -> list[str]:
    """The recipes that come with the kit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(recipe: str | Path) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises:
        ParameterError: no such recipe or file, or a fault in it; the message lists them all.
    """
    named = FOLDER / f"{recipe}.yaml"
    return check(Recipe, read_yaml(named if named.is_file() else resolve(recipe)))


def at_strength(recipe: Recipe, strength: float) -> Recipe:
    """The recipe with every range scaled about the value that changes nothing.

    Args:
        recipe: any recipe.
        strength: 0 changes nothing but the probability of flips, 1 leaves the recipe as it is.
    """
    neutral = {"zoom": 1.0, "gamma": 1.0}
    plain = recipe.plain()
    for name, transform in plain.items():
        middle = neutral.get(name, 0.0)
        if "range" in transform:
            transform["range"] = [max(middle + strength * (edge - middle), 0.05 if name in neutral else -1e9)
                                  for edge in transform["range"]]
    if "rotate" in plain:
        plain["rotate"]["degrees"] = [strength * degrees for degrees in plain["rotate"]["degrees"]]
    if "crop" in plain:
        plain["crop"]["smallest"] = [min(max(1 - strength * (1 - share), 0.05), 1.0)
                                     for share in plain["crop"]["smallest"]]
    return Recipe.model_validate(plain)
