"""Atlases: the brain region and side of each voxel of the prepared grid.

Sources: an installed deepmriprep or its wheel (data files only; the package is not imported), Harvard-Oxford through
nilearn, a NIfTI of labels with a table of names, a cohort's own label maps, or the template's tissue maps.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from kit.cohort.tables import PROCEDURAL, read_cohort
from kit.explain.atlas_files import LICENCES, AtlasError, templates, wheel_file
from kit.explain.label_names import BOTH, label_names, split_side
from kit.params import Saliency
from kit.preprocess.header import affine_of
from kit.preprocess.index import scan_names
from kit.preprocess.nifti import ScanError, upright
from kit.preprocess.scan_file import read_scan
from kit.preprocess.template import template_on, tissue_share_on
from kit.runs import resolve, shown
from kit.store.grid import Grid
from kit.store.store import Store, read_transform

DEFAULT = "deepmriprep:aal3"
COLUMN = "column"  # `column:NAME` as atlas: a cohort column with the path of each scan's label map
LEAST_INSIDE = 0.5  # smallest share of an atlas that lies in the template's brain, or of a label map in the scan's
# A label map of which less lies in its scan's brain is named. Three IXI scans' own have 0.97 or more, other people's
# 0.62 to 0.90 in them: a wrong one may pass.
USUAL_INSIDE = 0.9


class Atlas(NamedTuple):
    """Labelled regions on a grid."""

    labels: np.ndarray  # int32 (depth, height, width); 0 and labels missing from the table are no region
    affine: np.ndarray  # (4, 4), voxel (x, y, z) to MNI millimetres, RAS+
    table: pd.DataFrame  # label (int), region, side: left, right or both
    name: str
    licence: str
    source: str


class Placement(NamedTuple):
    """How an atlas overlaps the template's brain, as shares 0-1."""

    inside: float  # share of the atlas inside the template's brain
    covered: float  # share of the template's brain covered by the atlas
    sides: float  # of the voxels in regions named left or right, the share on that side; nan if there are none


def load_atlas(source: str | Path | None, grid: Grid, names: str | Path | None = None) -> Atlas:
    """Load an atlas onto a grid. Each voxel takes the label at its centre, so coarse grids may lose small regions.

    If no name states a side, every region is split at x = 0, midline structures too; `own_atlas` splits nothing.

    Args:
        source: `deepmriprep:NAME`, such as `deepmriprep:aal3`, from the installed package or the path in
            `$KIT_DEEPMRIPREP`; `harvard-oxford`, which nilearn downloads once; `tissues`, the template's grey matter,
            white matter and fluid; or the path of a NIfTI of labels in MNI152 millimetres. None: AAL3 if deepmriprep
            is available, else the tissues.
        grid: the grid to label.
        names: names of a NIfTI's labels; see `label_names`.

    Raises:
        AtlasError: the atlas cannot be read, does not overlap the template, or has left and right swapped.
        TableError: the names cannot be read.
    """
    if source is None:
        source = DEFAULT if templates() is not None else "tissues"
    return _load(str(source), grid, names)


def atlas_for(params: Saliency, store: Store, scans: Sequence[str]) -> Atlas | dict[str, Atlas]:
    """Load the atlas that the parameters name: one for all scans, or with `column:NAME` each scan's own label map.

    Prints a warning if a template's atlas is laid over rigidly registered heads, which keep their own size.

    Raises:
        AtlasError: see `load_atlas` and `own_atlases`.
    """
    kind, _, column = (params.atlas or "").partition(":")
    if kind == COLUMN:
        assert params.cohort is not None  # the parameters were checked
        return own_atlases(store, list(scans), params.cohort, column, params.atlas_names, params.contrast)
    atlas = load_atlas(params.atlas, store.grid, params.atlas_names)
    people = ~store.index["dataset"].astype(str).str.startswith(PROCEDURAL)  # a procedural head is the template's
    if store.record.get("registration") == "rigid" and people.any():
        print(f"atlas {atlas.name}: the scans are registered rigidly, so heads keep their own size and a template's "
              "atlas misplaces regions (in a head of 90 % of the template's size 36 % of AAL3's voxels get another "
              "label, 6 mm off in the median); prepare with registration: affine, or set atlas: column:NAME")
    return atlas


def placement(atlas: Atlas, grid: Grid) -> Placement:
    """Measure how an atlas overlaps the template's brain, and whether its left is left."""
    labelled, brain = np.isin(atlas.labels, atlas.table["label"]), template_on(grid)[1]
    return Placement(float(brain[labelled].mean()), float(labelled[brain].mean()), _on_their_side(atlas, grid))


def _on_their_side(atlas: Atlas, grid: Grid) -> float:
    """Of the voxels in regions named left or right, the share on that side of x = 0; nan if there are none."""
    side = _lookup(atlas, atlas.table["side"].map({"left": -1, "right": 1, BOTH: 0}))
    right, sided = np.broadcast_to(_right_of_midline(grid), side.shape), side != 0
    return float(((side > 0) == right)[sided].mean()) if sided.any() else float("nan")


def own_atlas(store: Store, scan: str, path: str | Path, names: str | Path | None = None) -> Atlas:
    """Resample a scan's own label map onto the prepared grid, using the transform stored at preparation.

    Args:
        store: holds the scan.
        scan: its name in the index.
        path: of its label map, in the scan's native space; 0 is no region.
        names: names of the labels; see `label_names`. None: labels are named by number.

    Raises:
        AtlasError: the label map cannot be read, lies mostly outside the prepared brain, or has left and right swapped.
        StoreError, TableError: a file cannot be read.
    """
    stored, affine = _read(path)
    if not (np.rint(stored) > 0).any():
        raise AtlasError(f"{shown(path)}: holds no label")
    transform = read_transform(store.folder, scan)
    labels = _on(stored, affine, transform, store.grid)
    table = _complete(label_names(names) if names else None, stored)
    atlas = Atlas(labels, store.grid.affine, table, Path(path).name, "the cohort's", shown(path))
    if (inside := _inside(stored, affine, transform, labels, store, scan)) < LEAST_INSIDE:
        raise AtlasError(f"{shown(path)}: only {inside:.0%} of its labels' volume lies in the brain of {scan}; does it "
                         "belong to another scan? (labels of skull or skin are to be 0)")
    if _on_their_side(atlas, store.grid) < 0.5:
        raise AtlasError(f"{shown(path)}: its regions called left lie right of the midline of {scan}; correct its "
                         "affine, or the table of names")
    if inside < USUAL_INSIDE:
        print(f"{shown(path)}: {1 - inside:.0%} of its labels' volume lies outside the brain of {scan}; look whether "
              "it is this scan's")
    return atlas


def _inside(stored: np.ndarray, affine: np.ndarray, transform: np.ndarray, labels: np.ndarray, store: Store,
            scan: str) -> float:
    """Share of a label map's volume that lies in the prepared brain; what lies beyond the grid counts as outside."""
    volume = (np.rint(stored) > 0).sum() * abs(np.linalg.det(affine[:3, :3]) / np.linalg.det(transform[:3, :3]))
    return float((labels[store.read(scan)[1]] > 0).sum() * store.grid.spacing_mm**3 / volume)


def own_atlases(store: Store, scans: list[str], cohort: str | Path, column: str,
                names: str | Path | None = None, contrast: str = "T1w") -> dict[str, Atlas]:
    """Resample scans' own label maps, such as FreeSurfer's or DLMUSE's, onto the prepared grid; by scan.

    Args:
        store: holds the scans.
        scans: names from the index.
        cohort: the table that the store was prepared from.
        column: its column of paths, such as `dlmuse_path`.
        names: names of the labels; see `label_names`.
        contrast: which scans of a folder.

    Raises:
        AtlasError: the table lacks the column, or the path of a scan's label map; see also `own_atlas`.
    """
    table = read_cohort(cohort, contrast)
    if column not in table:
        raise AtlasError(f"{shown(cohort)}: no column {column}; its columns are {', '.join(table.columns)}")
    paths = pd.Series(table[column].to_numpy(), scan_names(table))
    if lacking := [scan for scan in scans if not isinstance(paths.get(scan), str) or not paths[scan]]:
        raise AtlasError(f"{shown(cohort)}: no {column} of {len(lacking)} scans: {', '.join(lacking[:3])}")
    root = resolve(cohort)
    folder = root if root.is_dir() else root.parent
    return {scan: own_atlas(store, scan, folder / Path(paths[scan]).expanduser(), names) for scan in scans}


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        return read_scan(path)
    except ScanError as error:
        raise AtlasError(f"{shown(path)}: {error}") from error


def _load(source: str, grid: Grid, names: str | Path | None) -> Atlas:
    if source == "tissues":
        return _tissues(grid)
    if source == "harvard-oxford":
        atlas = _harvard_oxford(grid)
    elif source.startswith("deepmriprep:"):
        atlas = _of_deepmriprep(source, grid)
    elif ":" not in source or resolve(source).exists():
        values, affine = _read(resolve(source))
        table = _complete(label_names(names) if names else None, values)
        atlas = Atlas(_on(values, affine, np.eye(4), grid), grid.affine, table, Path(source).name,
                      "not known; see its source", shown(source))
    else:
        raise AtlasError(f"atlas {source!r}: say deepmriprep:NAME, harvard-oxford, tissues, the path of a NIfTI, "
                         "or column:NAME of the cohort")
    if set(atlas.table["side"]) == {BOTH}:
        atlas = _split_at_midline(atlas, grid)
    return _checked(atlas, grid)


def _checked(atlas: Atlas, grid: Grid) -> Atlas:
    if not np.isin(atlas.labels, atlas.table["label"]).any():
        raise AtlasError(f"atlas {atlas.name}: none of its labels lies on the grid; is it in MNI152 millimetres?")
    lies = placement(atlas, grid)
    if lies.inside < LEAST_INSIDE:
        raise AtlasError(f"atlas {atlas.name}: only {lies.inside:.0%} of it lies in the template's brain; it must be "
                         "in MNI152 millimetres (for label maps in the scans' own space, set atlas: column:NAME)")
    if lies.sides < 0.5:
        raise AtlasError(f"atlas {atlas.name}: its regions called left lie right of the midline; correct its affine, "
                         "or the table of names")
    return atlas


def _of_deepmriprep(source: str, grid: Grid) -> Atlas:
    name = source.partition(":")[2]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(wheel_file(name, ".nii.gz")))
    values, affine = upright(image.get_fdata(dtype=np.float32), affine_of(image.header))
    licence = next((words for start, words in LICENCES.items() if name.startswith(start)), "not verified")
    return Atlas(_on(values, affine, np.eye(4), grid), grid.affine, label_names(source), name, licence, source)


def _harvard_oxford(grid: Grid) -> Atlas:
    """Harvard-Oxford: the most likely region above 25 % probability, cortex taking precedence over subcortex."""
    from nilearn.datasets import fetch_atlas_harvard_oxford

    try:
        parts = [fetch_atlas_harvard_oxford(f"{part}-maxprob-thr25-1mm", symmetric_split=True, verbose=0)
                 for part in ("cort", "sub")]
    except OSError as error:
        raise AtlasError("atlas harvard-oxford: nilearn could not fetch it; go online once, or put FSL's atlases under "
                         "~/nilearn_data/fsl/data/atlases, or take deepmriprep:aal3") from error
    labels = np.zeros(grid.shape, np.int32)
    tables: list[pd.DataFrame] = []
    for part in parts:
        values, affine = upright(part.maps.get_fdata(dtype=np.float32), part.maps.affine)
        names = [(1000 * len(tables) + number, *split_side(name)) for number, name in enumerate(part.labels) if number]
        names = [row for row in names if not re.search("Cerebral (Cortex|White Matter)|Background", row[1])]
        on = _on(values, affine, np.eye(4), grid) + 1000 * len(tables)
        tables.append(pd.DataFrame(names, columns=["label", "region", "side"]))
        labels = np.where((labels == 0) & np.isin(on, tables[-1]["label"]), on, labels)
    return Atlas(labels, grid.affine, pd.concat(tables, ignore_index=True), "harvard-oxford",
                 "FSL's licence: non-commercial", "FSL, through nilearn")


def _tissues(grid: Grid) -> Atlas:
    """The most likely tissue at each voxel's centre; fluid is what is neither grey nor white matter."""
    grey, white = (tissue_share_on(grid, tissue) for tissue in ("grey", "white"))
    table = pd.DataFrame({"label": [1, 2, 3], "region": ["grey matter", "white matter", "fluid"], "side": BOTH})
    labels = 1 + np.argmax([grey, white, 1 - grey - white], axis=0).astype(np.int32)
    return _split_at_midline(Atlas(labels, grid.affine, table, "tissues", "free with its notice kept (McGill)",
                                   "ICBM152 2009a (Fonov et al. 2011), as nilearn's wheel has it"), grid)


def _split_at_midline(atlas: Atlas, grid: Grid) -> Atlas:
    """Split an atlas without sides: voxel centres with x < 0 are left."""
    step = max(int(atlas.labels.max()), int(atlas.table["label"].max()))  # the grid may hold labels not in the table
    labels = np.where((atlas.labels > 0) & _right_of_midline(grid), atlas.labels + step, atlas.labels)
    table = pd.concat([atlas.table.assign(side="left"),
                       atlas.table.assign(side="right", label=atlas.table["label"] + step)], ignore_index=True)
    return atlas._replace(labels=labels.astype(np.int32), table=table)


def _complete(named: pd.DataFrame | None, values: np.ndarray) -> pd.DataFrame:
    """Complete a table of names with a label map's other labels, named by number."""
    found = np.unique(np.rint(values)).astype(int)
    named = pd.DataFrame(columns=["label", "region", "side"]) if named is None else named
    missing = sorted(set(found[found > 0].tolist()) - set(named["label"]))
    rest = pd.DataFrame({"label": missing, "region": [f"label {each}" for each in missing], "side": BOTH})
    return pd.concat([each for each in (named, rest) if len(each)], ignore_index=True).astype({"label": int})


def _on(values: np.ndarray, affine: np.ndarray, matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """Sample labels (z, y, x) at a grid's voxel centres, int32; `matrix` maps MNI to the labels' own millimetres."""
    onto = np.linalg.inv(affine) @ matrix @ grid.affine  # both (x, y, z)
    moved = ndimage.affine_transform(values.T, onto, output_shape=grid.shape[::-1], order=0)
    return np.ascontiguousarray(np.rint(moved).clip(0).astype(np.int32).T)


def _right_of_midline(grid: Grid) -> np.ndarray:
    """(width,) bool: whether voxel centres have x >= 0."""
    return grid.origin_mm[0] + grid.spacing_mm * np.arange(grid.shape[2]) >= 0


def _lookup(atlas: Atlas, values: pd.Series) -> np.ndarray:
    """Map labels to values of a table column, 0 for labels not in the table."""
    known = np.zeros(max(int(atlas.labels.max()), int(atlas.table["label"].max())) + 1, values.to_numpy().dtype)
    known[atlas.table["label"]] = values
    return known[atlas.labels]
