"""Figures of scans: three planes, many scans on a sheet, views beside the original; maps: `saliency_figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from kit.show.figure import MAX_WIDTH, TEXT, bare, blank
from kit.show.planes import EDGES, FULL_COLOUR, PLANES, Pair, Point, cut, footer, grey, slice_name, voxel_at, window
from kit.store.grid import Grid

IN_A_ROW = 3  # scans of a montage, transforms of a sheet


def three_planes(
    image: np.ndarray, grid: Grid, outline: np.ndarray | None = None, title: str = "", note: str = "",
    crosshair: Point | None = None,
) -> Figure:
    """Draw one scan in an axial, a coronal and a sagittal slice, with left on the left.

    Args:
        image: (depth, height, width) on the grid; exact zeros are drawn black.
        grid: its position in MNI152.
        outline: (depth, height, width), a mask drawn as a contour, such as the template's brain.
        title, note: see `kit.show.figure.blank`.
        crosshair: (x, y, z) MNI mm to cut through, marked by lines; None: the grid's middle, unmarked.

    Raises:
        ValueError: an array's shape is not the grid's.
    """
    same_shape(grid, image=image, outline=outline)
    depth, height, width = grid.shape
    voxel, limits = voxel_at(grid, crosshair), window(image)
    page = MAX_WIDTH - 60
    tall = max(depth, height) / (2 * width + height) * page
    figure = blank(page, tall + 30, title, footer(note))
    panels = figure.subplots(1, 3, width_ratios=(width, width, height))
    for axes, plane, index in zip(panels, PLANES, voxel, strict=True):
        draw_grey(axes, cut(image, plane, index), limits)
        if outline is not None and cut(outline, plane, index).any():
            edge = cut(outline, plane, index).astype(float)
            axes.contour(edge, levels=[0.5], colors="#ffd54a", linewidths=0.9)
        if crosshair is not None:
            z, y, x = voxel
            line = {"color": "#4fc3f7", "linewidth": 0.6}
            axes.axvline(y if plane == "sagittal" else x, **line)
            axes.axhline(height - 1 - y if plane == "axial" else depth - 1 - z, **line)  # rows run down
        letters(axes, plane)
        bare(axes, slice_name(grid, plane, index))
    return figure


def montage(images: Sequence[np.ndarray], grid: Grid, titles: Sequence[str], note: str = "", title: str = "",
            planes: Sequence[str] = ("axial",), outlines: Sequence[np.ndarray] | None = None) -> Figure:
    """Draw the middle slice of each scan, three scans per row.

    Args:
        images: (depth, height, width) each, on the grid; each with its own grey levels.
        titles: a short line per scan.
        planes: of `kit.show.planes.PLANES`; several slices of a scan are drawn side by side.
        outlines: (depth, height, width) each, masks drawn as contours, such as the template's brain.
    """
    tall, wide = _beside(np.empty(grid.shape, dtype=bool), grid, planes).shape
    rows = max(1, math.ceil(len(images) / IN_A_ROW))
    figure = blank(MAX_WIDTH, rows * (MAX_WIDTH / IN_A_ROW * tall / wide + 24), title, footer(note))
    panels = figure.subplots(rows, IN_A_ROW, squeeze=False).ravel()
    for axes in panels:
        bare(axes)
    around: Sequence[np.ndarray | None] = [None] * len(images) if outlines is None else outlines
    for axes, (image, text, outline) in zip(panels, zip(images, titles, around, strict=True), strict=False):
        same_shape(grid, image=image, outline=outline)
        draw_grey(axes, _beside(image, grid, planes), window(image))
        if outline is not None and (edge := _beside(outline, grid, planes)).any():
            axes.contour(edge, levels=[0.5], colors="#ffd54a", linewidths=0.7)
        axes.set_title(text, fontsize=TEXT - 1)
    if len(planes) == 1:
        letters(panels[0], planes[0])
    return figure


def views_sheet(
    pairs: Sequence[Pair], grid: Grid, titles: Sequence[str] | None = None, note: str = "", height: float = 210,
) -> Figure:
    """Draw an axial row per pair: original, view 1, view 2, and view 1 minus view 2 (red where view 1 is brighter).

    A row shares the original's grey levels, so that contrast changes are visible.

    Args:
        pairs: to draw; volumes (depth, height, width) on the grid.
        titles: one per row, such as the scan or the transform.
        height: of a square slice, pixels; taller slices get more.
    """
    index, (_, rows, columns) = voxel_at(grid)[0], grid.shape
    figure = blank(height * 29 / 7, len(pairs) * (height * rows / columns + 6) + 20, note=footer(note))
    panels = figure.subplots(len(pairs), 4, squeeze=False)
    for number, (row, pair) in enumerate(zip(panels, pairs, strict=True)):
        same_shape(grid, original=pair.original, view_1=pair.view_1, view_2=pair.view_2)
        low, high = window(pair.original)
        pictures = [cut(volume, "axial", index) for volume in (pair.original, pair.view_1, pair.view_2)]
        for axes, picture in zip(row, pictures, strict=False):
            draw_grey(axes, picture, (low, high))
        change = pictures[1].astype(np.float32) - pictures[2]
        most = FULL_COLOUR * (high - low)
        row[3].imshow(change, cmap="RdBu_r", vmin=-most, vmax=most)
        for axes, name in zip(row, ("original", "view 1", "view 2", "view 1 − view 2"), strict=True):
            bare(axes, name if number == 0 else "")
        row[0].set_ylabel(titles[number] if titles is not None else "", fontsize=TEXT)
        letters(row[0], "axial")
    return figure


def strengths_sheet(views: Mapping[str, Mapping[str, np.ndarray]], original: np.ndarray, grid: Grid,
                    note: str = "") -> Figure:
    """Draw one axial slice per transform and strength, weak to strong from left to right.

    Args:
        views: by the transform's name, then by the strength in words, which is written below the slice; volumes
            (depth, height, width) on the grid.
        original: its grey levels are used for all.
    """
    index, limits, count = voxel_at(grid)[0], window(original), len(next(iter(views.values())))
    for name, volumes in views.items():
        same_shape(grid, **{f"{name} {strength}": volume for strength, volume in volumes.items()})
    rows = math.ceil(len(views) / IN_A_ROW)
    tile = 600 / (IN_A_ROW * count) * grid.shape[1] / grid.shape[2] + 34
    figure = blank(600, rows * tile, note=footer(note))
    panels = figure.subplots(rows, IN_A_ROW, squeeze=False).ravel()
    for axes in panels:
        bare(axes)
    for axes, (name, volumes) in zip(panels, views.items(), strict=False):
        draw_grey(axes, np.hstack([cut(volume, "axial", index) for volume in volumes.values()]), limits)
        bare(axes, name.replace("_", " "))
        for number, strength in enumerate(volumes):
            axes.text((number + 0.5) / len(volumes), -0.03, strength, transform=axes.transAxes, ha="center", va="top",
                      fontsize=TEXT - 1.5)
    return figure


def _beside(volume: np.ndarray, grid: Grid, planes: Sequence[str]) -> np.ndarray:
    """Place the middle slices side by side, (rows, columns) float32; shorter ones are centred."""
    cuts = [cut(volume, plane, voxel_at(grid)[list(PLANES).index(plane)]) for plane in planes]
    tall = max(len(each) for each in cuts)
    padded = []
    for each in cuts:
        above = (tall - len(each)) // 2
        padded.append(np.pad(each.astype(np.float32), ((above, tall - len(each) - above), (0, 0))))
    return np.hstack(padded)


def draw_grey(axes: Axes, picture: np.ndarray, limits: tuple[float, float]) -> None:
    axes.imshow(grey(picture, limits), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")


def letters(axes: Axes, plane: str) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"))
    for letter, (x, y, ha, va) in zip(EDGES[plane], places, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, ha=ha, va=va, color="white", fontsize=TEXT,
                  fontweight="bold", path_effects=[withStroke(linewidth=2, foreground="black")])


def same_shape(grid: Grid, **volumes: np.ndarray | None) -> None:
    for name, volume in volumes.items():
        if volume is not None and volume.shape != grid.shape:
            raise ValueError(f"{name} has shape {volume.shape}; the grid's is {grid.shape}, as (z, y, x)")
