"""Recipes: which transforms make up a view, and the ranges they are drawn from.

A recipe is data: a YAML file beside this module, or the user's own. A transform that it does not name is not applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field

from kit.augment import transforms as kinds
from kit.augment.transforms import Flip
from kit.reading import check, read_yaml
from kit.runs import resolve, write_whole

FOLDER = Path(__file__).parent / "recipes"


class Recipe(BaseModel):
    """A view's transforms, in the order they act, whatever their order in a file.

    All act before the final z-score, except cutout and patches.

    If scans are not z-scored, views return to their original intensity scale; see `kit.augment.views.make_views`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    strength: Annotated[float, Field(ge=0, le=4)] = 1.0  # scales all ranges about the value that changes nothing
    crop: kinds.Crop | None = None
    flip: Flip | None = None
    shear: kinds.Shear | None = None
    rotate: kinds.Rotate | None = None
    zoom: kinds.Zoom | None = None
    translate: kinds.Translate | None = None
    elastic: kinds.Elastic | None = None
    shift: kinds.Shift | None = None
    scale: kinds.Scale | None = None
    gamma: kinds.Gamma | None = None
    gamma_inverted: kinds.GammaInverted | None = None
    contrast: kinds.Contrast | None = None
    histogram: kinds.Histogram | None = None
    bias: kinds.Bias | None = None
    motion: kinds.Motion | None = None
    ghosting: kinds.Ghosting | None = None
    spike: kinds.Spike | None = None
    gibbs: kinds.Gibbs | None = None
    thick_slices: kinds.ThickSlices | None = None
    blur: kinds.Blur | None = None
    sharpen: kinds.Sharpen | None = None
    rician: kinds.Rician | None = None
    noise: kinds.Noise | None = None
    cutout: kinds.Cutout | None = None
    patches: kinds.Patches | None = None

    def plain(self) -> dict[str, Any]:
        """Return the recipe as YAML values."""
        return self.model_dump(exclude_none=True, mode="json")

    def setting(self, name: str, setting: str) -> Any:
        """Return a transform's setting besides its range; if the recipe lacks the transform, the setting's default."""
        transform = getattr(self, name)
        if transform is None:
            return transform_types()[name].model_fields[setting].default
        return getattr(transform, setting)

    def text(self) -> str:
        """Return the recipe as YAML, one transform a line; `read_recipe` reads it back."""
        plain = self.plain()
        first = yaml.safe_dump({"strength": plain.pop("strength")})
        return first + "".join(f"{name}: " + yaml.safe_dump(values, sort_keys=False, default_flow_style=True,
                                                            width=10_000) for name, values in plain.items())


def transform_types() -> dict[str, type[kinds.Transform]]:
    """Return every transform's name and type, in the order they act."""
    return {name: get_args(info.annotation)[0] for name, info in Recipe.model_fields.items() if name != "strength"}


def alone(name: str, share: float = 1.0) -> Recipe:
    """Return a recipe with a single transform, always applied, at a share of the explorer slider's maximum.

    Args:
        name: the transform's name.
        share: 0 changes nothing, 1 is full strength (`most`). Both ends of a `range` are the value at this share, so
            that nothing about it is random.
    """
    kind = transform_types()[name]
    end = kind.neutral + share * (kind.most - kind.neutral)
    strong = {"smallest": [max(1 - 0.8 * share, 0.05)] * 3, "axes": ["x"], "degrees": [share * kind.most] * 3,
              "mm": [share * kind.most] * 3, "range": [end, end]}
    fields = {field: strong[field] for field in kind.model_fields
              if field in strong and (field != "axes" or name == "flip")}
    return Recipe.model_validate({name: fields | {"probability": float(share > 0)}})


def strength_in_words(name: str, share: float) -> str:
    """Describe the strength of `alone(name, share)` briefly, such as `±22°`, `6 mm` or `≥ 60%`."""
    transform = getattr(alone(name, share), name)
    if widest := getattr(transform, "degrees", None):
        return f"±{widest[0]:.0f}°"
    if widest := getattr(transform, "mm", None):
        return f"±{widest[0]:.0f} mm"
    if smallest := getattr(transform, "smallest", None):
        return f"≥ {smallest[0]:.0%}"
    if name == "flip":
        return "along " + " ".join(transform.axes)
    return f"{transform.range[1]:.3g}" + (" mm" if transform.drawn.endswith("_mm") else "")


def names() -> list[str]:
    """Return the names of the recipes that come with the kit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe by its name, or from a YAML file.

    Raises:
        ParameterError: no such recipe or file, or errors in it, all listed in the message.
    """
    named = FOLDER / f"{recipe}.yaml"
    return check(Recipe, read_yaml(named if named.is_file() else resolve(recipe)))


def save_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Write a recipe that `read_recipe`, and so `2_pretrain`, accepts; the file appears whole or not at all."""
    return write_whole(resolve(path), lambda aside: aside.write_text(recipe.text(), encoding="utf-8"))


def at_strength(recipe: Recipe, strength: float) -> Recipe:
    """Scale every range of a recipe about the value that changes nothing.

    Args:
        recipe: any recipe; its own `strength` is multiplied in.
        strength: 0 changes nothing, 1 leaves the recipe as it is. Below 1 it also scales the probability of flips;
            ranges stop at the limits of their transform.

    Returns:
        a recipe of strength 1.
    """
    strength *= recipe.strength
    plain = recipe.plain() | {"strength": 1.0}
    for name, kind in transform_types().items():
        transform = plain.get(name, {})
        if "range" in transform and issubclass(kind, kinds.Ranged):
            transform["range"] = [min(max(edge + (strength - 1) * (edge - kind.neutral), kind.limits[0]),
                                      kind.limits[1]) for edge in transform["range"]]
        for widest, limit in (("degrees", 60 if name == "shear" else 180), ("mm", 200)):
            if widest in transform:
                transform[widest] = [min(strength * edge, limit) for edge in transform[widest]]
    if "flip" in plain:
        plain["flip"]["probability"] *= min(strength, 1.0)
    if "crop" in plain:
        plain["crop"]["smallest"] = [min(max(share + (1 - strength) * (1 - share), 0.05), 1.0)
                                     for share in plain["crop"]["smallest"]]
    return Recipe.model_validate(plain)
