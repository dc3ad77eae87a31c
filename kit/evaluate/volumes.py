"""Brain volumes: three tissues by region, measured in prepared scans, or volumes from a user's table."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree
from sklearn.mixture import GaussianMixture

from kit.cohort.identity import HEADINGS, headings, normalised, read_id
from kit.cohort.tabular import TableError, numbers_of, read_foreign
from kit.preprocess.nifti import ScanError
from kit.preprocess.scan_file import read_scan
from kit.preprocess.template import template_on
from kit.runs import shown
from kit.store.grid import Grid
from kit.store.store import Store

TISSUES = ("csf", "grey", "white")
FITTED = 5000  # evenly spaced voxels that the mixture is fitted to
CUBE_MM = 30.0  # side of the cubes used as regions without an atlas
BRIGHTEST = 1.0  # interquartile ranges above the third quartile; brighter voxels count as this bright
LEAST_ML = 9.0  # template brain that a cube needs to be its own region: a third of its volume
NAMES = ("scan", "dataset", "participant", "session")  # a table's identifying columns


def tissue_volumes(image: np.ndarray, mask: np.ndarray, regions: np.ndarray, voxel_ml: float) -> np.ndarray:
    """Measure brain and tissue volumes in a T1-weighted scan.

    Args:
        image, mask: (depth, height, width) intensities on any scale, and the brain mask.
        regions: (depth, height, width) int; voxels with 0 count only towards the whole brain. See `regions_on`.
        voxel_ml: a voxel's volume in ml.

    Returns:
        (1 + 3 + 3 * regions,) float32, ml: the brain mask; its CSF, grey and white matter; then these three for each
        region in the order of labels.
    """
    inside, voxels = regions[mask], image[mask].astype(np.float64)
    shares = tissue_shares(voxels)
    count = int(regions.max()) + 1
    by_region = np.stack([np.bincount(inside, shares[:, tissue], count) for tissue in range(len(TISSUES))], 1)
    return voxel_ml * np.concatenate([[len(voxels)], by_region.sum(0), by_region[1:].ravel()]).astype(np.float32)


def tissue_shares(voxels: np.ndarray) -> np.ndarray:
    """Estimate each voxel's share of CSF, grey and white matter: posterior probabilities of a three-Gaussian mixture.

    The Gaussians share one variance, as noise is the same in all tissues. With separate variances, CSF's is so broad
    (partial volume) that it also claims the brightest voxels. Brightness is limited by `BRIGHTEST`: otherwise a few
    bright voxels (vessels, fat left by the mask) have a Gaussian of their own, and grey and white matter share one. Of
    40 heads of IXI this touched 0.1 % of the voxels and moved no tissue's share by more than .011.

    Args:
        voxels: (voxels,) T1-weighted intensities inside the brain.

    Returns:
        (voxels, 3), rows summing to 1.
    """
    low, high = np.percentile(voxels, [25, 75])
    voxels = np.minimum(voxels, high + BRIGHTEST * (high - low))
    sample = voxels[:: max(1, len(voxels) // FITTED), None]
    mixture = GaussianMixture(3, covariance_type="tied", random_state=0).fit(sample)
    return mixture.predict_proba(voxels[:, None])[:, np.argsort(mixture.means_[:, 0])]


def regions_on(grid: Grid, atlas: Path | None = None) -> np.ndarray:
    """Make regions on the grid in template space, int (depth, height, width), numbered from 1.

    They correspond between scans only as well as the scans are registered.

    Args:
        atlas: a NIfTI of labels in MNI millimetres, 0 outside; each voxel takes the label at its centre. None: 30 mm
            cubes, left and right kept apart; a cube with little template brain joins the nearest one with more.

    Raises:
        ScanError: the atlas cannot be read, or none of its labels lies in the template's brain.
    """
    if atlas is None:
        return _cubes(grid)
    written = Path(atlas).stat().st_mtime_ns if Path(atlas).exists() else 0
    return _atlas_on(grid, Path(atlas), written)


@lru_cache(maxsize=4)
def _atlas_on(grid: Grid, atlas: Path, _written: int) -> np.ndarray:
    labels, affine = read_scan(atlas)
    onto = np.linalg.inv(affine) @ grid.affine  # both (x, y, z)
    labels = ndimage.affine_transform(labels.T, onto, output_shape=grid.shape[::-1], order=0).T
    found = np.unique(labels[labels > 0])
    if not (labels[template_on(grid)[1]] > 0).any():
        raise ScanError(f"{shown(atlas)}: none of its labels lies in the template's brain; it must be in "
                        "millimetres of MNI152")
    return np.where(labels > 0, np.searchsorted(found, labels) + 1, 0)


@lru_cache(maxsize=4)
def _cubes(grid: Grid) -> np.ndarray:
    voxels_mm = [start + grid.spacing_mm * np.arange(side)
                 for start, side in zip(grid.origin_mm[::-1], grid.shape, strict=True)]  # along z, y and x
    places = [np.floor(each / CUBE_MM).astype(int) for each in voxels_mm]  # edge at 0 mm: no cube crosses the midline
    counts = [each[-1] - each[0] + 1 for each in places]
    cube = np.asarray(np.ravel_multi_index(np.ix_(*[each - each[0] for each in places]), counts))
    at = np.indices(counts).reshape(3, -1).T + [each[0] for each in places]  # (cubes, 3)
    brain_ml = np.bincount(cube[template_on(grid)[1]], minlength=len(at)) * grid.spacing_mm**3 / 1000
    region = np.zeros(len(at), int)
    for hemisphere in (at[:, 2] < 0, at[:, 2] >= 0):
        if hemisphere.any():
            here = brain_ml[hemisphere]
            large = here >= min(LEAST_ML, here.max())  # the largest always counts, even on a grid with little brain
            region[hemisphere] = region.max() + 1 + cKDTree(at[hemisphere][large]).query(at[hemisphere])[1]
    return region[cube]


def native_size(store: Store, rows: pd.DataFrame) -> np.ndarray:
    """Factors (scans,) that convert volumes in prepared scans to native volumes.

    Affine registration scales heads to the template; the factor then follows from the index's column `scale` (see
    `kit.preprocess.quality`). It is 1 for rigid registration and for `none`: scans that came affinely registered keep
    the volumes of heads scaled to the template.
    """
    affine = store.record["registration"] == "affine" and "scale" in rows
    return rows["scale"].to_numpy(np.float64) ** 3 if affine else np.ones(len(rows))


def read_volumes(path: str | Path) -> pd.DataFrame:
    """Read a table of volumes, such as `asegstats2table` of FreeSurfer writes: identifiers and columns of numbers.

    Every column of numbers counts as a volume: remove test scores, visits and the like from the table first.
    A file that has not changed is read only once.

    Raises:
        TableError: no column `participant` or `scan`, no numeric column, or two rows for one scan.
    """
    path = Path(path)
    stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
    return _read_volumes(path, stamp)


@lru_cache(maxsize=4)
def _read_volumes(path: Path, _stamp: tuple[int, int] | None) -> pd.DataFrame:
    def known(names: list[str]) -> list[str]:  # FreeSurfer names its subject column after the measure
        return headings(["participant" if name.startswith("Measure:") else name for name in names],
                        HEADINGS | {"scan": ("scan",)})

    table = read_foreign(path, known, text=NAMES)
    keys = [name for name in NAMES if name in table and table[name].ne("").any()]
    keys = ["scan"] if "scan" in keys else keys
    if not {"participant", "scan"} & set(keys):
        raise TableError(f"{shown(path)}: needs a column participant, or scan as in index.csv; found "
                         f"{', '.join(map(str, table.columns[:5]))}")
    table = table.set_index(_names(table, keys))
    if table.index.duplicated().any():
        raise TableError(f"{shown(path)}: several rows are of {', '.join(table.index[table.index.duplicated()][0])}; "
                         "add a column session, or scan as in index.csv, or keep one row")
    cells = table.drop(columns=[name for name in NAMES if name in table])
    columns = {name: values for name in cells if (values := numbers_of(cells[name])) is not None}
    numbers = pd.DataFrame(columns, table.index).dropna(axis=1, how="all").astype(np.float64)
    if numbers.empty:
        raise TableError(f"{shown(path)}: no column of numbers")
    numbers.attrs["keys"] = keys
    return numbers


def looked_up(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Look up volumes from `read_volumes` for an index's rows; nan where the table lacks a scan.

    Raises:
        TableError: the table has no column `dataset`, and one of its participants is in several datasets among `rows`;
            or no column `session`, and one has several scans among `rows`. Scans that are not among them are not seen.
    """
    keys = table.attrs["keys"]
    names = _names(rows, keys)
    for column, found, words in (
            ("dataset", rows["dataset"].map(normalised), "is in several datasets: add a column dataset"),
            ("session", rows["scan"], "has several scans: add a column session, or scan as in index.csv")):
        if {column, "scan"} & set(keys):
            continue
        counts = found.groupby(names.to_numpy()).nunique()
        if several := [name for name in counts.index[counts > 1] if name in table.index]:
            raise TableError(f"the table of volumes has one row of {', '.join(several[0])}, who {words}")
    return table.reindex(names).set_axis(rows.index)


def _names(table: pd.DataFrame, keys: list[str]) -> pd.Index:
    """Identifying tuples of a table's rows, normalised as everywhere in the kit; see `kit.cohort.identity.key`."""
    cells = [table[key].map(lambda cell, key=key: normalised(read_id(cell, "ses" if key == "session" else "sub")))
             if key != "scan" else table[key] for key in keys]
    return pd.Index(list(zip(*cells, strict=True)), tupleize_cols=False)
