"""Figures for quality control of preprocessing: prepared scans, heads with masks, refused scans, metrics by site."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from nibabel.affines import apply_affine, from_matvec

from kit.cohort.identity import site_names
from kit.preprocess.nifti import ScanError
from kit.preprocess.quality import QC_GRID, QC_METRICS
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan
from kit.preprocess.template import template_on
from kit.show.figure import MAX_WIDTH, blank, label, shared_legend
from kit.show.planes import PLANES
from kit.show.slices import montage
from kit.store.grid import Grid
from kit.store.store import Store, read_transform

IN_A_ROW = 5  # histograms


def quality_montage(images: Sequence[np.ndarray], grid: Grid, titles: Sequence[str], note: str = "",
                    title: str = "") -> Figure:
    """Draw prepared scans in three planes with the template's brain outlined; see `kit.show.slices.montage`."""
    return montage(images, grid, titles, note, title, tuple(PLANES), [template_on(grid)[1]] * len(images))


def head_montage(rows: pd.DataFrame, store: Store, note: str = "", title: str = "",
                 assume_ras: bool = False) -> Figure:
    """Draw original scans registered to the template with their brain masks outlined, to judge the skull stripping.

    Args:
        rows: one row per scan: scan (its name in the store), participant, image_path, flags.
        store: of the prepared scans.
        assume_ras: see `no_codes_ok` of `kit.preprocess.scan_file.read_scan`.
    """
    images, masks = [], []
    for row in rows.itertuples():
        array, affine = read_scan(row.image_path, assume_ras)
        images.append(resample(array, affine, read_transform(store.folder, row.scan), QC_GRID.shape, QC_GRID.affine))
        mask = store.read(row.scan)[1]
        masks.append(resample(mask, store.grid.affine, np.eye(4), QC_GRID.shape, QC_GRID.affine) > 0.5)
    titles = [_wrapped(f"{row.participant}: {row.flags}" if row.flags else str(row.participant))
              for row in rows.itertuples()]
    return montage(images, QC_GRID, titles, note, title, tuple(PLANES), masks)


def refused_montage(failed: pd.DataFrame, note: str = "", title: str = "", assume_ras: bool = False) -> Figure:
    """Draw scans that were refused, centred on the middle of their volumes; black if a file cannot be read.

    Args:
        failed: one row per scan: participant, image_path, reason.
    """
    images, middle = [], apply_affine(QC_GRID.affine, (np.array(QC_GRID.shape[::-1]) - 1) / 2)
    for path in failed["image_path"]:
        try:
            array, affine = read_scan(path, assume_ras)
        except (ScanError, OSError):
            images.append(np.zeros(QC_GRID.shape, np.float32))
            continue
        centre = apply_affine(affine, (np.array(array.shape[::-1]) - 1) / 2)
        images.append(resample(array, affine, from_matvec(np.eye(3), centre - middle), QC_GRID.shape, QC_GRID.affine))
    titles = [_wrapped(f"{row.participant}: {row.reason}") for row in failed.itertuples()]
    return montage(images, QC_GRID, titles, note, title, tuple(PLANES))


def quality_histograms(index: pd.DataFrame, title: str = "", note: str = "",
                       brain_ml: tuple[float, float] | None = None) -> Figure:
    """Draw histograms of each QC metric that varies, by site; limits are dashed, flagged scans marked below.

    Args:
        index: of prepared scans, with the columns of `kit.preprocess.quality.QC_METRICS`, `flags`, and `site` or
            `dataset`.
        brain_ml: the limits of the brain's volume (ml), if not those for adults.
    """
    differing = {name: metric for name, metric in QC_METRICS.items() if index[name].nunique() > 1}
    rows = max(1, math.ceil(len(differing) / IN_A_ROW))
    figure = blank(MAX_WIDTH, 170 * rows, title, note)
    panels = figure.subplots(rows, IN_A_ROW, sharey=True).ravel()
    for axes in panels[len(differing):]:
        axes.set_visible(False)
    for number, (axes, (name, metric)) in enumerate(zip(panels, differing.items(), strict=False)):
        edges = np.histogram_bin_edges(index[name].astype(float), bins=16)
        for site, group in index.groupby(site_names(index).fillna("no site")):
            axes.hist(group[name], bins=edges, histtype="step", linewidth=1.3, label=f"{site} (n = {len(group)})")
        flagged = index[name][index["flags"].str.contains(name)]
        if len(flagged):
            axes.plot(flagged, 0 * flagged, "x", color="#b03a2e", markersize=6, clip_on=False, label="flagged")
        for limit in brain_ml if brain_ml and name == "brain_ml" else (metric.low, metric.high):
            if edges[0] <= limit <= edges[-1]:
                axes.axvline(limit, color="#b03a2e", linewidth=0.8, linestyle="--", label="limit")
        label(axes, name.replace("_", " "), "scans" if number % IN_A_ROW == 0 else "")
    shared_legend(figure)
    return figure


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 44)[:3])
