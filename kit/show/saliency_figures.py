"""Figures of saliency maps: over the scan, as a mosaic, by group, by region, and in an interactive viewer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from kit.explain.regions import ELSEWHERE
from kit.preprocess.resample import resample, smoothed_inside
from kit.preprocess.template import template_on
from kit.runs import write_whole
from kit.show.figure import LEGEND, MAX_WIDTH, TEXT, bare, blank, in_words, label
from kit.show.planes import PLANES, Point, cut, footer, slice_mm, slice_name, strongest, voxel_at, window
from kit.show.slices import draw_grey, letters, same_shape
from kit.show.wording import need, readable
from kit.store.grid import Grid

if TYPE_CHECKING:
    from nilearn.plotting.html_stat_map import StatMapView

FWHM_MM = 8.0  # of the smoothed copies
TOP_PERCENTILE = 99.5  # of a map's non-zero absolute values: full colour
SHOWN_FROM = 0.2  # of full colour: weaker values are not drawn
VIEWER_MB = 3.0  # a larger page is made at 2 mm
OUTLINE, CROSS, REFUSED = "#ffd54a", "#4fc3f7", "#b03a2e"


class Scale(NamedTuple):
    """The colour scale of a map: full colour at `top`, and at -`top` if it is signed."""

    top: float
    signed: bool

    @classmethod
    def of(cls, *maps: np.ndarray) -> Scale:
        """Make one scale for several maps."""
        values = np.concatenate([values[values != 0] for values in maps])
        top = float(np.percentile(np.abs(values), TOP_PERCENTILE)) if values.size else 1.0
        return cls(top, bool((values < 0).any()))

    def colours(self) -> ScalarMappable:
        """The colour map: red above 0 and blue below if signed, else dark to bright."""
        norm = Normalize(-self.top if self.signed else 0, self.top)
        return ScalarMappable(norm, "RdBu_r" if self.signed else "inferno")


def smoothed(saliency_map: np.ndarray, grid: Grid, mask: np.ndarray | None = None) -> np.ndarray:
    """Smooth a map by a Gaussian of 8 mm FWHM, float32; with a mask over its voxels alone, and 0 outside it."""
    sigma = FWHM_MM / 2.355 / grid.spacing_mm
    if mask is None:
        return ndimage.gaussian_filter(saliency_map.astype(np.float32), sigma)
    return smoothed_inside(saliency_map, mask, sigma)


def scan_figure(image: np.ndarray, saliency_map: np.ndarray, grid: Grid, title: str = "", unit: str = "",
                outline: np.ndarray | None = None, note: str = "", at: Point | None = None) -> Figure:
    """Draw a scan in three planes: plain, with the smoothed map over it, and with the unsmoothed map.

    Weak values are transparent. Both maps share a colour bar on which 1 is the 99.5th percentile of each map's absolute
    non-zero values; the bar's label gives that percentile in the map's unit.

    Args:
        image, saliency_map: (depth, height, width) on the grid; zeros of the image are drawn black.
        title: see `kit.explain.checks.caption`; drawn in red if it says "not supported".
        unit: of the map, such as "output / SD".
        outline: (depth, height, width), a mask drawn as a contour, such as the known place of the effect.
        note: see `kit.show.figure.blank`.
        at: (x, y, z) MNI mm to cut through; None: where the smoothed map is strongest.

    Raises:
        ValueError: an array's shape is not the grid's.
    """
    same_shape(grid, image=image, saliency_map=saliency_map, outline=outline)
    smooth = smoothed(saliency_map, grid, image != 0)
    at = strongest(smooth, grid) if at is None else at
    rows = {"scan": None, f"map, smoothed {FWHM_MM:g} mm": smooth, "map as it is": saliency_map}
    scales = {name: Scale.of(values) for name, values in rows.items() if values is not None}
    relative = Scale(1.0, any(scale.signed for scale in scales.values()))  # the bar's: both maps have its colours
    figure, panels = _planes(grid, len(rows), title, note)
    for row, (name, values) in zip(panels, rows.items(), strict=True):
        if values is None:
            _draw_planes(row, image, None, None, grid, at, outline, name)
        else:
            _draw_planes(row, image, values / scales[name].top, relative, grid, at, outline, name,
                         smooth=values is smooth)
    tops = ", ".join(f"{scale.top:.2g}{' smoothed' if 'smoothed' in name else ' as it is'}"
                     for name, scale in scales.items())
    _bar(figure, panels[1:], relative, f"1 = {tops}" + (f" ({unit})" if unit else ""))
    return figure


def mosaic(image: np.ndarray, saliency_map: np.ndarray, grid: Grid, title: str = "", unit: str = "",
           outline: np.ndarray | None = None, note: str = "", slices: int = 12, smooth: bool = True) -> Figure:
    """Draw a map over evenly spaced axial slices from the bottom to the top of the brain, in rows of six.

    Args:
        smooth: draw the smoothed map; see `scan_figure` for the other arguments.

    Raises:
        ValueError: an array's shape is not the grid's, or the image is empty.
    """
    same_shape(grid, image=image, saliency_map=saliency_map, outline=outline)
    values = smoothed(saliency_map, grid, image != 0) if smooth else saliency_map
    found = np.flatnonzero((image != 0).any(axis=(1, 2)))
    if not found.size:
        raise ValueError("the image is empty: it has no slice to draw")
    margin = len(found) // (2 * slices)
    indices = np.unique(np.linspace(found[0] + margin, found[-1] - margin, slices).round().astype(int))
    scale, limits, in_a_row = Scale.of(values), window(image), 6
    rows = math.ceil(len(indices) / in_a_row)
    figure = blank(MAX_WIDTH, rows * ((MAX_WIDTH - 70) / in_a_row * grid.shape[1] / grid.shape[2] + 20) + 10, title,
                   footer(note))
    _redden(figure)
    panels = figure.subplots(rows, in_a_row, squeeze=False)
    for axes in panels.flat:
        bare(axes)
    for axes, index in zip(panels.flat, indices, strict=False):
        _draw(axes, image, values, scale, limits, "axial", index, outline, smooth)
        axes.set_title(f"z = {slice_mm(grid, 'axial', index):g} mm", fontsize=TEXT - 1)
    letters(panels[0, 0], "axial")
    _bar(figure, panels, scale, unit)
    return figure


def group_figure(means: Mapping[str, np.ndarray], grid: Grid, title: str = "",
                 unit: str = "multiples of a uniform map's mean", outline: np.ndarray | None = None, note: str = "",
                 background: np.ndarray | None = None, at: Point | None = None) -> Figure:
    """Draw groups' smoothed mean maps over the template, in the same slices and with one colour scale.

    For two groups their difference is added with its own scale, red where the second group is higher; it has the sign
    of the file that `class_means` writes. Without a group, as when every map is zero, a sentence says so.

    Args:
        means: (depth, height, width) on the grid, by group: one method's entries `mean ...` of
            `kit.explain.maps.class_means`, without their difference, which is computed here.
        background: (depth, height, width); None: the template's brain.
        at: (x, y, z) MNI mm to cut through; None: where the difference, or else the first mean, is strongest.

    Raises:
        ValueError: an array's shape is not the grid's.
    """
    if not means:
        return in_words(ALL_ZERO, title, note)
    template, brain = template_on(grid)
    background = np.where(brain, template, 0) if background is None else background
    same_shape(grid, background=background, outline=outline, **{str(name): values for name, values in means.items()})
    rows = {str(name): smoothed(values, grid, background != 0) for name, values in means.items()}
    shared = Scale.of(*rows.values())
    if len(rows) == 2:
        one, other = rows
        rows[f"{other} − {one}"] = rows[other] - rows[one]
    with_difference = len(rows) - len(means)
    at = strongest(list(rows.values())[-1 if with_difference else 0], grid) if at is None else at
    scales = [shared] * len(means) + [Scale.of(list(rows.values())[-1])._replace(signed=True)] * with_difference
    figure, panels = _planes(grid, len(rows), title, note)
    for row, (name, values), scale in zip(panels, rows.items(), scales, strict=True):
        _draw_planes(row, background, values, scale, grid, at, outline, name)
    _bar(figure, panels[:len(means)], shared, unit)
    if with_difference:
        _bar(figure, panels[len(means):], scales[-1], f"{unit}\nabove 0: higher in {list(means)[1]}".strip())
    return figure


ALL_ZERO = "every map is zero: nothing to draw"
SIDES, NO_SIDE = {"left": "#3b6ea5", "right": "#c1666b"}, "#8a8a8a"


def region_bars(table: pd.DataFrame, top: int = 10, note: str = "", title: str = "") -> Figure:
    """Draw the regions with the most attribution and their intervals, a panel per method.

    A bar is a region's share of the map, the black line its 95 % interval over participants, and the diamond its share
    of the brain, which is what a uniform map would give.

    Args:
        table: from `kit.explain.regions.region_intervals`.
        top: regions per method.

    Raises:
        ValueError: the table lacks a column.
    """
    if not len(table):
        return in_words(ALL_ZERO, title, note)
    need(table, "regions", ("method", "region", "side", "share_of_saliency", "low", "high", "share_of_brain"))
    methods = list(dict.fromkeys(table["method"]))
    columns = min(2, len(methods))
    rows = math.ceil(len(methods) / columns)
    count = min(top, table.groupby("method").size().max())
    figure = blank(MAX_WIDTH if columns > 1 else 620, rows * (count * 22 + 75), title, note)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(methods):]:
        axes.set_visible(False)
    for axes, method in zip(panels, methods, strict=False):
        some = table[(table["method"] == method) & (table["region"] != ELSEWHERE)]
        some = some.nlargest(top, "share_of_saliency")[::-1]
        shares = 100 * some[["share_of_saliency", "low", "high", "share_of_brain"]].to_numpy(float)
        places = np.arange(len(some))
        colours = some["side"].map(SIDES).fillna(NO_SIDE)
        axes.barh(places, shares[:, 0], color=colours, height=0.7)
        axes.hlines(places, shares[:, 1], shares[:, 2], color="black", linewidth=1.2)
        even, = axes.plot(shares[:, 3], places, "D", color="white", markeredgecolor="black", markersize=4.5)
        names = [f"{_short(row.region)}, {row.side}" if row.side in ("left", "right") else _short(row.region)
                 for row in some.itertuples()]
        axes.set_yticks(places, names)
        participants = int(some["participants"].iloc[0]) if "participants" in some and len(some) else 0
        people = f", {participants} participant{'s' * (participants > 1)}" if participants else ""
        label(axes, "share of the map (%)", "", readable(method) + people)
        axes.set_xlim(0)
    shown = {even: "share of the brain: a uniform map"}
    shown |= {Patch(color=colour): side for side, colour in SIDES.items()} | {Patch(color=NO_SIDE): "both, or no side"}
    figure.legend(shown.keys(), shown.values(), loc="outside lower right", ncols=len(shown), **LEGEND)
    return figure


def viewer(saliency_map: np.ndarray, grid: Grid, template: np.ndarray | None = None, title: str = "",
           smooth: bool = True) -> StatMapView:
    """Make nilearn's interactive viewer of a map, to browse by clicking and dragging.

    Make it the last value of a notebook cell, which the HTML report keeps, or save it as a page (`save_viewer`). It
    loads nothing from the network.

    Args:
        saliency_map: (depth, height, width) on the grid, in MNI millimetres.
        template: (depth, height, width) to draw it on; None: the template's brain.
        title: short; for a map that failed its checks it must say so.
        smooth: show the smoothed map.

    Returns:
        nilearn's view, a page of at most about 3 MB: maps whose page would be larger are resampled to 2 mm.

    Raises:
        ValueError: an array's shape is not the grid's.
    """
    if template is None:
        values, brain = template_on(grid)
        template = np.where(brain, values, 0)
    same_shape(grid, saliency_map=saliency_map, template=template)
    values = smoothed(saliency_map, grid, template != 0) if smooth else saliency_map
    view = _view(values, template, grid.affine, title)
    if len(view.html) > VIEWER_MB * 1e6 and grid.spacing_mm < 2:
        depth, height, width = (math.ceil(side * grid.spacing_mm / 2) for side in grid.shape)
        coarse = Grid((depth, height, width), 2.0)
        values, template = (resample(each, grid.affine, np.eye(4), coarse.shape, coarse.affine)
                            for each in (values, template))
        view = _view(values, template, coarse.affine, title)
    return view


def save_viewer(path: str | Path, view: StatMapView) -> Path:
    """Write a viewer as an HTML page, atomically."""
    return write_whole(path, lambda aside: aside.write_text(view.html, encoding="utf-8"))


def _view(values: np.ndarray, template: np.ndarray, affine: np.ndarray, title: str) -> StatMapView:
    from nilearn.plotting import view_img

    scale = Scale.of(values)
    images = [nib.Nifti1Image(np.ascontiguousarray(each.T, dtype=np.float32), affine) for each in (values, template)]
    colours = {"cmap": "RdBu_r", "symmetric_cmap": True} if scale.signed else {"cmap": "inferno", "vmin": 0,
                                                                               "symmetric_cmap": False}
    view = view_img(images[0], bg_img=images[1], threshold=SHOWN_FROM * scale.top, vmax=scale.top, title=title or None,
                    dim=0, black_bg=True, opacity=0.85, width_view=680, **colours)
    # The icon is the only thing that nilearn's page would load from the network.
    view.html = re.sub(r"<link[^>]*rel=.?icon[^>]*>", "", view.html)
    return view


def _planes(grid: Grid, rows: int, title: str, note: str) -> tuple[Figure, np.ndarray]:
    """Make a figure with three planes per row."""
    depth, height, width = grid.shape
    tall = max(depth, height) / (2 * width + height) * (MAX_WIDTH - 90)
    figure = blank(MAX_WIDTH, rows * (tall + 8) + 20, title, footer(note))
    _redden(figure)
    return figure, figure.subplots(rows, 3, squeeze=False, width_ratios=(width, width, height))


def _redden(figure: Figure) -> None:
    if "not supported" in figure.get_suptitle():
        figure._suptitle.set_color(REFUSED)  # type: ignore[attr-defined]  # matplotlib has no public way


def _draw_planes(row: np.ndarray, image: np.ndarray, values: np.ndarray | None, scale: Scale | None, grid: Grid,
                 at: Point, outline: np.ndarray | None, name: str, smooth: bool = True) -> None:
    """Draw one row: three planes through a point, with the row's name at the left."""
    z, y, x = voxel_at(grid, at)
    depth, height, _ = grid.shape
    for axes, plane, index in zip(row, PLANES, (z, y, x), strict=True):
        _draw(axes, image, values, scale, window(image), plane, index, outline, smooth)
        if values is None:
            line = {"color": CROSS, "linewidth": 0.6}
            axes.axvline(y if plane == "sagittal" else x, **line)
            axes.axhline(height - 1 - y if plane == "axial" else depth - 1 - z, **line)  # rows run down
        bare(axes, slice_name(grid, plane, index))
        letters(axes, plane)
    row[0].set_ylabel(name, fontsize=TEXT)


def _draw(axes: Axes, image: np.ndarray, values: np.ndarray | None, scale: Scale | None, limits: tuple[float, float],
          plane: str, index: int, outline: np.ndarray | None, smooth: bool = True) -> None:
    """Draw one slice: the scan, the map over it (weaker is more transparent), the outline."""
    draw_grey(axes, cut(image, plane, index), limits)
    if values is not None and scale is not None:
        picture = cut(values, plane, index).astype(np.float32)
        strength = np.clip(np.abs(picture) / scale.top, 0, 1)
        opacity = 0.85 * np.clip((strength - SHOWN_FROM) / (0.6 - SHOWN_FROM), 0, 1)
        colours = scale.colours()
        axes.imshow(picture, cmap=colours.cmap, norm=cast(Normalize, colours.norm), alpha=opacity,
                    interpolation="bilinear" if smooth else "nearest")
    if outline is not None and (edge := cut(outline, plane, index)).any():
        axes.contour(edge.astype(float), levels=[0.5], colors=OUTLINE, linewidths=0.9)


def _bar(figure: Figure, panels: np.ndarray, scale: Scale, unit: str) -> None:
    bar = figure.colorbar(scale.colours(), ax=list(np.ravel(panels)), fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=TEXT - 1)
    bar.set_label(unit, fontsize=TEXT - 1)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[:most - 1] + "…"
