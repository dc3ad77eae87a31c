"""A recipe as widgets: a switch, a probability and ranges for each transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from kit.augment.recipe import Recipe, alone, transform_types
from kit.augment.transforms import AXES, Ranged, Transform

_TRIPLES = ("smallest", "degrees", "mm")  # settings with one number for each of z, y and x


class RecipeControls:
    """Widgets for all transforms; `recipe()` returns their settings as a recipe.

    Args:
        changed: called after each change by the user, never while `show` sets the widgets.

    Attributes:
        box: one row per transform, in the order of application, to display in a notebook.
        rows: rows by the transform's name.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed, self.quiet, self.strength = changed, False, 1.0
        self.rows = {name: _Row(name, kind, self._on_change) for name, kind in transform_types().items()}
        self.box = widgets.VBox([row.box for row in self.rows.values()])

    def _on_change(self, _change: object = None) -> None:
        if not self.quiet:
            self.changed()

    def show(self, recipe: Recipe) -> None:
        """Set the widgets to a recipe."""
        self.quiet, self.strength = True, recipe.strength
        try:
            plain = recipe.plain()
            for name, row in self.rows.items():
                row.show(plain.get(name))
        finally:
            self.quiet = False

    def recipe(self, strength: float | None = None) -> Recipe:
        """Return the recipe set by the widgets, with the overall strength."""
        chosen = {name: row.values() for name, row in self.rows.items() if row.on.value}
        return Recipe.model_validate({"strength": self.strength if strength is None else strength, **chosen})


class _Row:
    """One transform: a switch, its probability, and a slider for each range or setting."""

    def __init__(self, name: str, kind: type[Transform], changed: Callable[[object], None]) -> None:
        self.start = _start(name)
        self.on = widgets.Checkbox(False, description=name.replace("_", " "), indent=False, tooltip=kind.__doc__,
                                   layout=widgets.Layout(width="130px"))
        self.probability = widgets.BoundedFloatText(1, min=0, max=1, step=0.1, description="p",
                                                    layout=widgets.Layout(width="90px"),
                                                    style={"description_width": "14px"})
        self.sliders = _sliders(kind)
        self.box = widgets.HBox([self.on, self.probability, *self.sliders.values()])
        self.kept: dict[str, Any] = {}
        self.on.observe(self._enable, "value")
        self.show(None)
        for widget in (self.on, self.probability, *self.sliders.values()):
            widget.observe(changed, "value")

    def _enable(self, _change: object = None) -> None:
        for widget in (self.probability, *self.sliders.values()):
            widget.disabled = not self.on.value

    def show(self, values: dict[str, Any] | None) -> None:
        """Set the row to a transform's plain values; None switches it off, at its starting values."""
        self.kept = dict(values or self.start)
        self.on.value = values is not None
        self.probability.value = self.kept["probability"]
        for key, slider in self.sliders.items():
            field, axis = key
            value = self.kept[field]
            if field == "range":
                slider.min, slider.max = min(slider.min, value[0]), max(slider.max, value[1])
                slider.value = tuple(value)
            elif field == "axes":
                slider.value = tuple(value)
            else:
                slider.max = max(slider.max, value[axis])
                slider.value = value[axis]
        self._enable()

    def values(self) -> dict[str, Any]:
        """Return the transform's plain values; settings without a widget keep the recipe's."""
        values = self.kept | {"probability": self.probability.value}
        for (field, axis), slider in self.sliders.items():
            if field == "axes":
                values[field] = list(slider.value)
            elif axis is None:
                values[field] = [_moved(slider, *both) for both in zip(slider.value, values[field], strict=True)]
            else:
                values[field] = [_moved(slider, slider.value, old) if number == axis else old
                                 for number, old in enumerate(values[field])]
        return values


def _moved(slider: widgets.Widget, new: float, old: float) -> float:
    """Return a slider's number, or the recipe's own if the browser only rounded it to the slider's steps."""
    return old if abs(new - old) <= 0.51 * slider.step else round(new, 6)


def _start(name: str) -> dict[str, Any]:
    """Moderate starting values for a transform the user switches on: from no effect to 0.4 of the slider's maximum."""
    plain = alone(name, 0.4).plain()[name] | {"probability": 1.0}
    kind = transform_types()[name]
    if "range" in plain:
        plain["range"] = [kind.neutral, plain["range"][1]]
    return plain


def _sliders(kind: type[Transform]) -> dict[tuple[str, int | None], widgets.Widget]:
    """Build the widgets of a transform's settings, by (setting, axis)."""
    style, wide = {"description_width": "60px"}, widgets.Layout(width="330px")
    found: dict[tuple[str, int | None], widgets.Widget] = {}
    for field in kind.model_fields:
        if field == "range" and issubclass(kind, Ranged):
            low = -kind.most if kind.limits[0] < 0 else kind.limits[0]
            found[field, None] = widgets.FloatRangeSlider(value=(kind.neutral, kind.most), min=low, max=kind.most,
                                                          step=0.1 if kind.most > 4 else 0.01, readout_format=".2f",
                                                          description=_unit(kind), layout=wide, style=style)
        elif field == "axes" and kind.drawn == "flip":
            found[field, None] = widgets.SelectMultiple(options=AXES, description="along", rows=3, style=style,
                                                        layout=widgets.Layout(width="140px"))
        elif field in _TRIPLES:
            most, unit = (1.0, "share") if field == "smallest" else (kind.most, {"degrees": "°"}.get(field, field))
            low, step = (0.05, 0.01) if field == "smallest" else (0, 0.5)
            for number, axis in enumerate(("zy", "zx", "yx") if kind.drawn == "shear_degrees" else AXES):
                found[field, number] = widgets.FloatSlider(
                    low, min=low, max=most, step=step, readout_format=".2f" if low else ".1f", style=style,
                    description=f"{'' if low else '±'}{axis} {unit}", layout=widgets.Layout(width="210px"))
    return found


def _unit(kind: type[Transform]) -> str:
    return "mm" if kind.drawn.endswith("_mm") else "factor" if kind.neutral == 1 else "amount"
