"""Atlases: which region of the brain, and which side, a voxel of the prepared grid belongs to.

From an installed deepmriprep or its wheel (data files alone; the package is not imported), Harvard-Oxford through
nilearn, a NIfTI of labels with a table of their names, a cohort's own label maps, or the template's tissue maps.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import zipfile
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from kit.cohort.tables import read_cohort
from kit.cohort.tabular import TableError, read_foreign
from kit.preprocess.index import scan_names
from kit.preprocess.nifti import upright
from kit.preprocess.place import affine_of
from kit.preprocess.scan_file import read_scan
from kit.preprocess.template import template_on, tissue_share_on
from kit.runs import resolve, shown
from kit.store.grid import Grid
from kit.store.store import Store, read_transform

WHEEL = "KIT_DEEPMRIPREP"  # environment variable: deepmriprep's wheel, or a folder that it was unpacked into
TEMPLATES = "deepmriprep/data/templates/"
DEFAULT = "deepmriprep:aal3"
LEAST_INSIDE = 0.5  # of an atlas in MNI millimetres, this share of its voxels lies in the template's brain
BOTH = "both"  # the side of what lies on the midline, and of labels whose names say none
LOOK = "not stated there"

# The wheel's own licence, MIT, is that of its code. Its atlases have the names and tables of CAT12's, and this is what
# CAT12 says of each (github.com/ChristianGaser/cat12, templates_MNI152NLin2009cAsym/*.txt), or who is named.
LICENCES = {
    "Schaefer2018": "MIT (nilearn's description of the atlas)",
    "aal3": f"{LOOK}; nilearn says of AAL: unknown; cite Rolls et al. 2020",
    "anatomy3": f"{LOOK}; cite Eickhoff et al. 2005",
    "cobra": f"{LOOK}; of its parts, the hippocampus is for academic, non-commercial research (TIGRLab)",
    "hammers": "academic, non-commercial research and teaching, after filling out its agreement; not for patient care",
    "ibsr": "research on segmentation; anatomical studies and published images need the holder's permission",
    "julichbrain": f"{LOOK}; cite Amunts et al. 2020",
    "lpba40": "LONI Research License: no commercial use",
    "mori": f"{LOOK}; cite Oishi et al. 2009",
    "neuromorphometrics": "CC BY-NC; credit OASIS, and Neuromorphometrics, Inc., under academic subscription",
    "suit": "CC BY-NC 3.0; cite Diedrichsen et al. 2009",
    "thalamic_nuclei": "CC BY 4.0; cite Saranathan et al. 2021",
    "thalamus": "all rights reserved, University of Lausanne 2018; cite Najdenovska et al. 2018",
}
SIDES = {"left": "left", "lh": "left", "L": "left", "right": "right", "rh": "right", "R": "right", "bothside": BOTH}


class AtlasError(ValueError):
    """An atlas cannot be used; the message names it, what is wrong and what to do."""


class Atlas(NamedTuple):
    """Regions of a grid."""

    labels: np.ndarray  # int32 (depth, height, width); 0 and labels that the table lacks are no region
    affine: np.ndarray  # (4, 4), voxel (x, y, z) to MNI millimetres, RAS+
    table: pd.DataFrame  # label (int), region, side: left, right or both
    name: str
    licence: str
    source: str


class Placement(NamedTuple):
    """How an atlas lies on the template; shares 0-1."""

    inside: float  # of the atlas, in the template's brain
    covered: float  # of the template's brain, by the atlas
    sides: float  # of voxels whose region's name says a side, on that side; nan where none does


def load_atlas(source: str | Path | None, grid: Grid, names: str | Path | None = None) -> Atlas:
    """Load an atlas onto a grid: each voxel takes the label at its centre, so that small regions may be lost on coarse
    grids.

    Args:
        source: `deepmriprep:NAME`, such as `deepmriprep:aal3`, from the installed package or from what
            `$KIT_DEEPMRIPREP` names; `harvard-oxford`, which nilearn downloads once; `tissues`, the template's grey
            matter, white matter and fluid; the path of a NIfTI of labels in MNI152 millimetres. None: AAL3 where there
            is deepmriprep, else the tissues.
        grid: whose voxels get labels.
        names: of the labels of a NIfTI; see `label_names`.

    Raises:
        AtlasError: it is not there, or does not lie on the template, or left and right are swapped.
        ScanError, TableError: a file cannot be read.
    """
    if source is None:
        source = DEFAULT if _templates() is not None else "tissues"
    return _load(str(source), grid, None if names is None else str(names))


def placement(atlas: Atlas, grid: Grid) -> Placement:
    """Measure how an atlas lies on the template's brain, and whether left is left."""
    labelled, brain = np.isin(atlas.labels, atlas.table["label"]), template_on(grid)[1]
    side = _lookup(atlas, atlas.table["side"].map({"left": -1, "right": 1, BOTH: 0}))[labelled]
    right = np.broadcast_to(_right_of_midline(grid), brain.shape)[labelled]
    sided = side != 0
    return Placement(float(brain[labelled].mean()), float(labelled[brain].mean()),
                     float(((side > 0) == right)[sided].mean()) if sided.any() else float("nan"))


def own_atlas(store: Store, scan: str, path: str | Path, names: str | Path | None = None) -> Atlas:
    """Carry a scan's own label map onto the prepared grid, by the transform that its preparation stored.

    Args:
        store: where the scan lies.
        scan: its name in the index.
        path: of its label map, a file in the scan's own millimetres, 0 where there is no region.
        names: of the labels; see `label_names`. None: a label is called by its number.

    Raises:
        AtlasError: the label map does not lie on the prepared scan.
        ScanError, StoreError, TableError: a file cannot be read.
    """
    stored, affine = read_scan(path)
    labels = _on(stored, affine, read_transform(store.folder, scan), store.grid)
    found = np.unique(stored[stored > 0]).astype(int)
    if not (labels[store.read(scan)[1]] > 0).any():
        raise AtlasError(f"{shown(path)}: no label lies in the brain of {scan}; is it of another scan?")
    table = _complete(label_names(names) if names else None, found)
    return Atlas(labels, store.grid.affine, table, Path(path).name, "the cohort's", shown(path))


def own_atlases(store: Store, scans: list[str], cohort: str | Path, column: str,
                names: str | Path | None = None) -> dict[str, Atlas]:
    """Carry scans' own label maps, such as FreeSurfer's or DLMUSE's, onto the prepared grid; by scan.

    Args:
        store: where the scans lie.
        scans: names from the index.
        cohort: the table that the store was prepared from.
        column: its column of paths, such as `dlmuse_path`.
        names: of the labels; see `label_names`.

    Raises:
        AtlasError: the table lacks the column, or a scan's label map.
    """
    table = read_cohort(cohort)
    if column not in table:
        raise AtlasError(f"{shown(cohort)}: no column {column}; its columns are {', '.join(table.columns)}")
    paths = pd.Series(table[column].to_numpy(), scan_names(table))
    if lacking := [scan for scan in scans if not isinstance(paths.get(scan), str) or not paths[scan]]:
        raise AtlasError(f"{shown(cohort)}: no {column} of {len(lacking)} scans: {', '.join(lacking[:3])}")
    folder = resolve(cohort).parent
    return {scan: own_atlas(store, scan, folder / paths[scan], names) for scan in scans}


def label_names(source: str | Path) -> pd.DataFrame:
    """Read what labels are called.

    Args:
        source: a CSV or TSV with the numbers in the first of the columns index, id, ROIid, value, label that it has,
            the names in the first of name, ROIname, region, label, and perhaps `hemisphere` or `side`; or
            `deepmriprep:NAME`, the table of one of its atlases.

    Returns:
        label (int), region (the name without its side), side: left, right or both. The name says it by Left, Right, lh
        or rh, or by L or R as its first or last word; where it does not, the column of sides. (That of deepmriprep
        0.3.0's neuromorphometrics has the basal forebrain's sides swapped; the names are right.)

    Raises:
        TableError: no such columns, or a label twice.
    """
    if str(source).startswith("deepmriprep:"):
        data = _wheel_file(str(source).partition(":")[2], ".csv")
        table = pd.read_csv(io.BytesIO(data), sep=";", dtype=str, keep_default_na=False)
    else:
        table = read_foreign(Path(source), list, text=None)
    folded = {str(name).casefold(): name for name in table}
    number = next((folded[name] for name in ("index", "id", "roiid", "value", "label") if name in folded), None)
    name = next((folded[name] for name in ("name", "roiname", "region", "label") if name in folded), None)
    if number is None or name in (None, number):
        raise TableError(f"{source}: needs columns index and label, or id and name; found {', '.join(table.columns)}")
    try:
        labels = table[number].astype(float).astype(int)
    except ValueError:
        raise TableError(f"{source}: column {number} must hold whole numbers") from None
    if labels.duplicated().any():
        raise TableError(f"{source}: label {labels[labels.duplicated()].iloc[0]} stands in several rows; keep one")
    named = pd.DataFrame([_split_side(each) for each in table[name]], columns=["region", "side"])
    given = next((folded[each] for each in ("hemisphere", "side") if each in folded), None)
    if given is not None:
        letter = table[given].str.strip().str.casefold().str[:1].map({"l": "left", "r": "right"}).fillna(BOTH)
        named["side"] = np.where(named["side"] == BOTH, letter, named["side"])
    named.insert(0, "label", labels.to_numpy())
    return named[named["label"] != 0].reset_index(drop=True)


def atlas_names() -> list[str]:
    """Names of deepmriprep's atlases, none where it is not there."""
    templates = _templates()
    return [] if templates is None else sorted(path.name.removesuffix(".csv") for path in templates.iterdir()
                                               if path.name.endswith(".csv"))


@lru_cache(maxsize=4)
def _load(source: str, grid: Grid, names: str | None) -> Atlas:
    if source == "tissues":
        return _tissues(grid)
    if source == "harvard-oxford":
        atlas = _harvard_oxford(grid)
    elif source.startswith("deepmriprep:"):
        atlas = _of_deepmriprep(source, grid)
    elif ":" not in source or Path(source).exists():
        values, affine = read_scan(source)
        table = _complete(label_names(names) if names else None, np.unique(values[values > 0]).astype(int))
        atlas = Atlas(_on(values, affine, np.eye(4), grid), grid.affine, table, Path(source).name,
                      "see where it is from", shown(source))
    else:
        raise AtlasError(f"atlas {source!r}: say deepmriprep:NAME, harvard-oxford, tissues, or the path of a NIfTI")
    if set(atlas.table["side"]) == {BOTH}:
        atlas = _split_at_midline(atlas, grid)
    return _checked(atlas, grid)


def _checked(atlas: Atlas, grid: Grid) -> Atlas:
    if not np.isin(atlas.labels, atlas.table["label"]).any():
        raise AtlasError(f"atlas {atlas.name}: none of its labels lies on the grid; is it in MNI152 millimetres?")
    lies = placement(atlas, grid)
    if lies.inside < LEAST_INSIDE:
        raise AtlasError(f"atlas {atlas.name}: only {lies.inside:.0%} of it lies in the template's brain; it must be "
                         "in MNI152 millimetres (a label map in a scan's own space goes through own_atlas)")
    if lies.sides < 0.5:
        raise AtlasError(f"atlas {atlas.name}: its regions called left lie right of the midline; correct its affine, "
                         "or the table of names")
    atlas.labels.flags.writeable = False  # shared by all callers
    return atlas


def _of_deepmriprep(source: str, grid: Grid) -> Atlas:
    name = source.partition(":")[2]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(_wheel_file(name, ".nii.gz")))
    values, affine = upright(image.get_fdata(dtype=np.float32), affine_of(image.header))
    licence = next((words for start, words in LICENCES.items() if name.startswith(start)), "not verified")
    return Atlas(_on(values, affine, np.eye(4), grid), grid.affine, label_names(source), name, licence, source)


def _wheel_file(name: str, ending: str) -> bytes:
    templates = _templates()
    if templates is None:
        raise AtlasError(f"atlas deepmriprep:{name}: deepmriprep is not here; pip install deepmriprep==0.3.0, or "
                         f"pip download --no-deps deepmriprep==0.3.0 and name the wheel in ${WHEEL}")
    if name not in (known := atlas_names()):
        near = "".join(f"; did you mean {each}?" for each in get_close_matches(name, known, 1))
        raise AtlasError(f"atlas deepmriprep:{name}: deepmriprep has {', '.join(known)}{near}")
    return (templates / f"{name}{ending}").read_bytes()


def _templates() -> Path | zipfile.Path | None:
    """Where deepmriprep's data lie; the package, which needs others, is not imported."""
    if named := os.environ.get(WHEEL):
        if Path(named).is_dir():
            return Path(named) / TEMPLATES
        if not zipfile.is_zipfile(named):
            raise AtlasError(f"${WHEEL} names {named}, which is neither deepmriprep's wheel nor a folder")
        return zipfile.Path(named, TEMPLATES)
    spec = importlib.util.find_spec("deepmriprep")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1] / TEMPLATES


def _harvard_oxford(grid: Grid) -> Atlas:
    """Cortex over subcortical structures, the likeliest region above a probability of 25 %."""
    from nilearn.datasets import fetch_atlas_harvard_oxford

    try:
        parts = [fetch_atlas_harvard_oxford(f"{part}-maxprob-thr25-1mm", symmetric_split=True, verbose=0)
                 for part in ("cort", "sub")]
    except OSError as error:
        raise AtlasError("atlas harvard-oxford: nilearn could not fetch it; go online once, or put FSL's atlases under "
                         "~/nilearn_data/fsl/data/atlases, or take deepmriprep:aal3") from error
    labels, tables = np.zeros(grid.shape, np.int32), []
    for part in parts:
        values, affine = upright(part.maps.get_fdata(dtype=np.float32), part.maps.affine)
        names = [(1000 * len(tables) + number, *_split_side(name)) for number, name in enumerate(part.labels) if number]
        names = [row for row in names if not re.search("Cerebral (Cortex|White Matter)|Background", row[1])]
        on = _on(values, affine, np.eye(4), grid) + 1000 * len(tables)
        tables.append(pd.DataFrame(names, columns=["label", "region", "side"]))
        labels = np.where((labels == 0) & np.isin(on, tables[-1]["label"]), on, labels)
    return Atlas(labels, grid.affine, pd.concat(tables, ignore_index=True), "harvard-oxford",
                 "FSL's licence: non-commercial", "FSL, through nilearn")


def _tissues(grid: Grid) -> Atlas:
    """The likeliest tissue at each voxel's centre; fluid is what is neither grey nor white matter."""
    grey, white = (tissue_share_on(grid, tissue) for tissue in ("grey", "white"))
    table = pd.DataFrame({"label": [1, 2, 3], "region": ["grey matter", "white matter", "fluid"], "side": BOTH})
    labels = 1 + np.argmax([grey, white, 1 - grey - white], axis=0).astype(np.int32)
    atlas = _split_at_midline(Atlas(labels, grid.affine, table, "tissues", "free with its notice kept (McGill)",
                                    "ICBM152 2009a (Fonov et al. 2011), as nilearn's wheel has it"), grid)
    atlas.labels.flags.writeable = False  # shared by all callers
    return atlas


def _split_at_midline(atlas: Atlas, grid: Grid) -> Atlas:
    """Where no name says a side, x < 0 at a voxel's centre is left."""
    step = int(atlas.table["label"].max())
    labels = np.where((atlas.labels > 0) & _right_of_midline(grid), atlas.labels + step, atlas.labels)
    table = pd.concat([atlas.table.assign(side="left"),
                       atlas.table.assign(side="right", label=atlas.table["label"] + step)], ignore_index=True)
    return atlas._replace(labels=labels.astype(np.int32), table=table)


def _complete(named: pd.DataFrame | None, found: np.ndarray) -> pd.DataFrame:
    """A table of all labels found, those without a name called by their number."""
    named = pd.DataFrame(columns=["label", "region", "side"]) if named is None else named
    missing = sorted(set(found.tolist()) - set(named["label"]))
    rest = pd.DataFrame({"label": missing, "region": [f"label {each}" for each in missing], "side": BOTH})
    return pd.concat([each for each in (named, rest) if len(each)], ignore_index=True).astype({"label": int})


def _split_side(name: str) -> tuple[str, str]:
    """A region's name without its side, and the side."""
    plain = re.sub(r"[\s_]+", " ", str(name)).strip()
    if found := re.search(r"(?:^|(?<=[ -]))(left|lh|right|rh|bothside)(?:[ -]|$)", plain, re.IGNORECASE):
        return (plain[:found.start()] + plain[found.end():]).strip(" -"), SIDES[found[1].casefold()]
    words = plain.split(" ")
    for place in (0, -1):
        if len(words) > 1 and words[place] in SIDES:
            side = SIDES[words.pop(place)]
            return " ".join(words), side
    return plain, BOTH


def _on(values: np.ndarray, affine: np.ndarray, matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """Labels (z, y, x) at the centres of a grid's voxels, int32; `matrix` takes MNI millimetres to the labels' own."""
    onto = np.linalg.inv(affine) @ matrix @ grid.affine  # both (x, y, z)
    moved = ndimage.affine_transform(values.T, onto, output_shape=grid.shape[::-1], order=0)
    return np.ascontiguousarray(np.rint(moved).astype(np.int32).T)


def _right_of_midline(grid: Grid) -> np.ndarray:
    """(width,) bool: whether a voxel's centre has x of 0 or more."""
    return grid.origin_mm[0] + grid.spacing_mm * np.arange(grid.shape[2]) >= 0


def _lookup(atlas: Atlas, values: pd.Series) -> np.ndarray:
    """Each voxel's value of a column of the table, 0 elsewhere."""
    known = np.zeros(max(int(atlas.labels.max()), int(atlas.table["label"].max())) + 1, values.to_numpy().dtype)
    known[atlas.table["label"]] = values
    return known[atlas.labels]
