"""What preprocessing makes of real scans, of the same scans moved, spoilt and turned, and of things that are no brains.

    python -m benchmarks.real_heads             # all: about an hour on two cores
    python -m benchmarks.real_heads scans       # or scans, spoilt, poses: one after the other

It reads the scans of `KIT_REAL_SCANS` (default: ../shared/data) and Colin27 (Debian's mricron-data), prepares them by
`kit.data.preprocess` on a 2 mm grid with `mask: auto, registration: rigid`, and writes tables and figures to
`outputs/bench/real_heads/`. docs/real_heads.md sets the limits of `kit.data.quality.METRICS` beside what was measured,
and says how much of this has been run. Everything resumes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from nibabel.affines import apply_affine, from_matvec
from nibabel.eulerangles import euler2mat
from scipy import ndimage

from kit.data.brain import dice
from kit.data.cohort import read_cohort
from kit.data.grid import Grid
from kit.data.nifti import write_nifti
from kit.data.pool import run_all
from kit.data.preprocess import Preparation, prepare
from kit.data.quality import METRICS, flagged
from kit.data.register import ORIENTATIONS, disagreement
from kit.data.resample import resample
from kit.data.scan_file import read_scan
from kit.data.selection import selection_bias
from kit.data.store import Store, read_facts, read_transform, scan_path
from kit.data.table import scan_names
from kit.data.template import template
from kit.runs import ROOT, outputs_dir, write_table
from kit.show.figure import MAX_WIDTH, blank, label
from kit.show.quality import quality_montage

SCANS = Path(os.environ.get("KIT_REAL_SCANS", ROOT.parent / "shared" / "data"))
COLIN = Path("/usr/share/mricron/templates/ch2.nii.gz")
GRID = Grid((75, 96, 96), 2.0)
SETTINGS = Preparation(GRID, "rigid", "auto")
SOURCES = ("IXI (brain-development.org, CC BY-SA 3.0), OpenNeuro ds000011, ds002748 and ds000228, UPENN-GBM (TCIA, "
           "Bakas et al. 2022, CC BY 4.0), Colin27 (Holmes et al. 1998)")


def cohort() -> pd.DataFrame:
    """All real scans, one a row: participant, session, dataset, image_path, age, sex, dlmuse_path (a label map's)."""
    ixi = read_cohort(SCANS / "ixi_2mm" / "cohort.csv")
    ixi["dlmuse_path"] = [str(SCANS / "ixi_2mm" / path) for path in ixi["dlmuse_path"]]
    tables = [ixi]
    for name in ("ds000011", "ds002748_2mm"):
        table = read_cohort(SCANS / name).assign(dataset=name.removesuffix("_2mm"))
        if "gender" in table:
            table["sex"] = table["gender"].str.upper()
        tables.append(table)
    singles = {"child": SCANS / "subpixar009_T1w.nii.gz", "tumour": SCANS / "00001_t1n.nii.gz", "colin27": COLIN}
    singles = {name: str(path) for name, path in singles.items() if path.is_file()}
    tables.append(pd.DataFrame({"participant": list(singles), "session": "01", "dataset": "single",
                                "image_path": list(singles.values())}))
    columns = ["participant", "session", "dataset", "image_path", "age", "sex", "dlmuse_path"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def scans(folder: Path, workers: int) -> None:
    """Prepare all real scans; overlap with the label maps, and whom refusals and flags hit."""
    table = cohort()
    index, failed = prepare(table.drop(columns="dlmuse_path"), folder / "scans", SETTINGS, workers)
    print(f"{len(index)} of {len(table)} real scans prepared")
    print(failed[["participant", "reason"]].to_string() if len(failed) else "none refused")
    print(index.loc[index["flags"] != "", ["participant", "dataset", "flags", "unusable"]].to_string())
    store = Store.open(folder / "scans")
    overlap = overlap_with_labels(table, store)
    write_table(folder / "overlap.csv", overlap)
    print(overlap[["dice", "cut"]].describe(percentiles=[0.05, 0.5, 0.95]).round(4).to_string())
    labels = table.assign(scan=scan_names(table)).merge(index[["scan", "brain_ml"]], on="scan", how="left")
    for name, hit in (("refused", labels["scan"].isin(failed["scan"])),
                      ("flagged", labels["scan"].isin(index.loc[index["flags"] != "", "scan"]))):
        tested = selection_bias(labels[["dataset", "age", "sex", "brain_ml"]], hit.to_numpy())
        print(name, int(hit.sum()), tested.to_string() if len(tested) else "nobody to compare", sep="\n")
    smallest = index[index["dataset"] == "IXI"].nsmallest(12, "brain_ml")
    worst = pd.concat([index[index["flags"] != ""], index.nsmallest(12, "mask_overlap")]).head(12)
    for name, rows in (("smallest", smallest), ("worst", worst)):
        figure = quality_montage([store.read(scan)[0].astype(np.float32) for scan in rows["scan"]], GRID,
                                 [f"{row.participant} {row.brain_ml:.0f} ml {row.flags}" for row in rows.itertuples()],
                                 title=f"The {name} of {len(index)} real scans", note=SOURCES[:60])
        figure.savefig(folder / f"{name}.png")


def overlap_with_labels(table: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return the Dice of each mask with its closed label map, and the share of the map's brain that it cuts off."""
    maps, rows = table.dropna(subset=["dlmuse_path"]).set_index("participant")["dlmuse_path"], []
    for row in store.index[store.index["participant"].isin(maps.index)].itertuples():
        labels, affine = read_scan(maps[row.participant])
        brain = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(labels > 0, 3), iterations=2))[3:-3, 3:-3, 3:-3]
        known = resample(brain, affine, read_transform(store.folder, row.scan), GRID.shape, GRID.affine) > 0.5
        mask = store.read(row.scan)[1]
        rows.append({"participant": row.participant, "dice": dice(mask, known),
                     "cut": np.count_nonzero(known & ~mask) / np.count_nonzero(known)})
    return pd.DataFrame(rows)


def poses(folder: Path, workers: int) -> None:
    """Known moves of thirty heads, and the rigid against the affine over all scans."""
    store = Store.open(folder / "scans")
    rows = []
    for row in store.index[store.index["dataset"] == "IXI"].itertuples():
        found = read_facts(scan_path(store.folder, row.scan))["notes"]["transforms"]
        apart = disagreement(np.array(found["rigid"]), np.array(found["affine"]))
        rows.append({"participant": row.participant, "brain_ml": row.brain_ml, **apart._asdict()})
    apart = pd.DataFrame(rows)
    apart = apart.drop(columns="participant")
    print("rigid against affine:", apart.describe(percentiles=[0.5, 0.95]).round(2).to_string(), sep="\n")
    print("Spearman with brain_ml:", apart.corr("spearman")["brain_ml"].round(2).to_string(), sep="\n")
    kinds = {name: SPOILT[name] for name in ("moved", "neck cut", "thick slices", "mirrored")}
    heads = store.index[store.index["dataset"] != "single"].sort_values("brain_ml").iloc[::len(store.index) // 30][:30]
    table = write_spoilt(folder / "moved_files", heads["participant"].tolist(), kinds, workers)
    index, failed = prepare(table.drop(columns=["kind", "of"]), folder / "moved", SETTINGS, workers)
    print(failed[["participant", "reason"]].to_string() if len(failed) else "none refused")
    still = store.index.set_index("participant")["scan"]
    _, brain, to_mm = template()
    points = apply_affine(to_mm, np.argwhere(brain)[::997, ::-1])
    rows = []
    for row in index.merge(table[["participant", "kind", "of"]], on="participant").itertuples():
        move = np.loadtxt(folder / "moved_files" / f"{row.participant}.txt")
        expected = move @ read_transform(store.folder, still[row.of])
        found = read_transform(folder / "moved", row.scan)
        away = np.linalg.norm(apply_affine(found, points) - apply_affine(expected, points), axis=1)
        rows.append({"kind": row.kind, "of": row.of, "error_mm": np.median(away),
                     "error_95_mm": np.quantile(away, 0.95), "flags": row.flags})
    errors = pd.DataFrame(rows)
    write_table(folder / "moves.csv", errors)
    print(errors.groupby("kind")[["error_mm", "error_95_mm"]].describe(percentiles=[0.5, 0.95]).round(2).T.to_string())


def spoilt(folder: Path, workers: int, every: int = 60) -> None:
    """Every so many-th scan moved, noised, cut, turned or of another contrast, and things that are no brains."""
    some = cohort()
    some = pd.concat([some[some["dataset"] == "IXI"].iloc[::every], some[some["dataset"] == "ds002748"].iloc[::every],
                      some[some["dataset"] == "ds000011"].iloc[:2]])
    table = write_spoilt(folder / "spoilt_files", some["participant"].tolist(), SPOILT, workers)
    table = pd.concat([table, write_no_brains(folder / "spoilt_files")], ignore_index=True)
    index, failed = prepare(table.drop(columns=["kind", "of"]), folder / "spoilt", SETTINGS, workers)
    kinds = table.set_index("participant")["kind"]
    # The cohort's distribution is of spoilt scans here: limits alone are looked at, as for a scan alone.
    index = pd.concat([flagged(index.iloc[[row]]) for row in range(len(index))]).assign(
        kind=lambda rows: rows["participant"].map(kinds))
    failed = failed.assign(kind=failed["participant"].map(kinds))
    write_table(folder / "spoilt.csv", index)
    counts = pd.DataFrame({
        "scans": kinds.value_counts(sort=False), "refused": failed["kind"].value_counts(),
        "flagged": index.loc[index["flags"] != "", "kind"].value_counts(),
        "unusable": index.loc[index["unusable"] != "", "kind"].value_counts(),
    }).fillna(0).astype(int)
    counts["unflagged"] = counts["scans"] - counts["refused"] - counts["flagged"]
    print(counts.to_string())
    print(failed[["participant", "reason"]].to_string())
    good = Store.open(folder / "scans").index.assign(kind="real scans")
    distributions(pd.concat([good, index], ignore_index=True)).savefig(folder / "metrics.png")


def distributions(index: pd.DataFrame) -> Figure:
    """Draw each metric's values, a row a kind of scan, with the limits of `METRICS`."""
    kinds = list(dict.fromkeys(index["kind"]))
    figure = blank(MAX_WIDTH, 260 * 5, "QC metrics of real scans, spoilt ones and things that are no brains", SOURCES)
    panels = figure.subplots(5, 3, sharey=True).ravel()
    for axes in panels[len(METRICS):]:
        axes.set_visible(False)
    rng = np.random.default_rng(0)
    for axes, (name, metric) in zip(panels, METRICS.items(), strict=False):
        for number, kind in enumerate(kinds):
            values = index.loc[index["kind"] == kind, name].astype(float)
            axes.plot(values, number + rng.uniform(-0.3, 0.3, len(values)), ".", markersize=2.5,
                      color="#1a5276" if number == 0 else "#7f8c8d")
        for limit in (metric.low, metric.high):
            if np.isfinite(limit):
                axes.axvline(limit, color="#b03a2e", linewidth=1)
        if name in ("snr", "grey_levels"):
            axes.set_xscale("log")
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        label(axes, name, "")
    return figure


Spoil = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _move(array: np.ndarray, affine: np.ndarray, rng: np.random.Generator, slice_mm: float = 0.0,
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A rotation of up to 20 degrees about each axis and a shift of up to 30 mm along each, then bias and noise."""
    middle = apply_affine(affine, (np.array(array.shape[::-1]) - 1) / 2)
    rotation = euler2mat(*np.deg2rad(rng.uniform(-20, 20, 3)))
    move = from_matvec(rotation, middle + rng.uniform(-30, 30, 3) - rotation @ middle)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    margin = np.ceil(40 / spacing).astype(int)
    to = affine @ from_matvec(np.eye(3), -margin)
    shape = np.array(array.shape[::-1]) + 2 * margin
    if slice_mm:
        factor = np.array([1, 1, slice_mm / spacing[2]])
        to, shape = to @ from_matvec(np.diag(factor)), np.maximum(shape / factor, 2).astype(int)
        array = ndimage.uniform_filter1d(array, max(1, round(slice_mm / spacing[2])), axis=0)
    moved = resample(array, affine, np.linalg.inv(move), tuple(shape[::-1].tolist()), to)
    return (*_noised(moved, to, rng)[:2], move)


def _noised(array: np.ndarray, affine: np.ndarray, rng: np.random.Generator, noise: float = 0.03, bias: float = 0.25,
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    field = ndimage.zoom(rng.normal(size=(4, 4, 4)).astype(np.float32), 8, order=3)
    field = ndimage.zoom(field, [side / 32 for side in array.shape], order=1)
    array = array * np.exp(bias * field / np.abs(field).max())
    sigma = noise * np.percentile(array, 99)
    # Rician, as in a magnitude image; a stripped scan's background stays zero.
    noisy = np.hypot(array + sigma * rng.standard_normal(array.shape), sigma * rng.standard_normal(array.shape))
    background = array == 0 if (array == 0).mean() > 0.5 else np.zeros(array.shape, bool)
    return np.where(background, 0, noisy).astype(np.float32), affine, np.eye(4)


def _neck_cut(array, affine, rng):
    """The lowest quarter of what lies below the brain's half is not in the field of view."""
    keep = round(0.12 * len(array))
    cut = affine.copy()
    cut[:3, 3] = apply_affine(affine, [0, 0, keep])
    moved, to, move = _move(array[keep:], cut, rng)
    return moved, to, move


def _half(upper: bool) -> Spoil:
    def cut(array, affine, rng):
        bright = array > np.percentile(array, 60)
        rows = np.flatnonzero(bright.any((1, 2)))
        middle = int(rows[-1] - 75 / np.linalg.norm(affine[:3, 2]))  # half of a brain's height below the vertex
        out = array.copy()
        out[middle:] = out[middle:] * 0 if upper else out[middle:]
        if not upper:
            out[:middle] = 0
        return out, affine, np.eye(4)
    return cut


def _turned(number: int) -> Spoil:
    def turn(array, affine, rng):
        return array, from_matvec(ORIENTATIONS[number]) @ affine, from_matvec(ORIENTATIONS[number])
    return turn


def _inverted(array, affine, rng):
    """Contrast as in a T2-weighted scan: dark becomes bright inside the head; the background stays dark."""
    top = np.percentile(array, 99.5)
    head = array > 0.1 * top
    return np.where(head, (1.1 * top - np.minimum(array, top)), array * 0.2).astype(np.float32), affine, np.eye(4)


def _two_values(array, affine, rng):
    return (array > np.percentile(array, 75)).astype(np.float32) * 100, affine, np.eye(4)


def _like_ct(array, affine, rng):
    """Bone bright, brain nearly without contrast, air dark; the skull is what is dark between scalp and brain."""
    top = np.percentile(array, 99)
    head = ndimage.binary_fill_holes(ndimage.binary_closing(array > 0.15 * top, iterations=3))
    depth = ndimage.distance_transform_edt(head, sampling=np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    hounsfield = np.where(head, 35 + 5 * np.clip(array / top, 0, 1), -1000)
    hounsfield[(depth > 5) & (depth < 12)] = 900
    return (hounsfield + rng.normal(0, 4, array.shape) + 1000).astype(np.float32), affine, np.eye(4)


def _mirrored(array, affine, rng):
    flip = np.diag([-1.0, 1, 1, 1])
    middle = apply_affine(affine, (np.array(array.shape[::-1]) - 1) / 2)
    flip[0, 3] = 2 * middle[0]
    return np.ascontiguousarray(array[:, :, ::-1]), affine, flip


SPOILT: dict[str, Spoil] = {
    "moved": _move, "noise 10 %": lambda array, affine, rng: _noised(array, affine, rng, 0.1, 0.0),
    "bias 60 %": lambda array, affine, rng: _noised(array, affine, rng, 0.01, 0.6),
    "neck cut": _neck_cut, "thick slices": lambda array, affine, rng: _move(array, affine, rng, 6.0),
    "mirrored": _mirrored,
    **{f"turned {name}": _turned(number) for number, name in
       [(next(n for n, turn in enumerate(ORIENTATIONS) if np.array_equal(turn, np.diag(signs))), axis)
        for axis, signs in (("x", [1, -1, -1]), ("y", [-1, 1, -1]), ("z", [-1, -1, 1]))]},
    "permuted": _turned(7), "no upper half": _half(True), "no lower half": _half(False),
    "contrast inverted": _inverted, "two values": _two_values, "like CT": _like_ct,
}


def write_spoilt(folder: Path, participants: list[str], kinds: dict[str, Spoil], workers: int) -> pd.DataFrame:
    """Write the spoilt scans and the moves that were made; a row a file."""
    rows = [{"participant": f"{of}-{kind.replace(' ', '-').replace('%', '')}", "of": of, "kind": kind, "session": "01",
             "dataset": "spoilt"} for kind in kinds for of in participants]
    table = pd.DataFrame(rows)
    table["image_path"] = [str(folder / f"{name}.nii.gz") for name in table["participant"]]
    paths = cohort().set_index("participant")["image_path"]
    todo = [(row.kind, paths[row.of], row.image_path, number) for number, row in enumerate(table.itertuples())
            if not Path(row.image_path).is_file()]
    for _ in run_all(_write_spoilt, todo, workers):
        pass
    return table


def _write_spoilt(task: tuple[str, str, str, int]) -> bool:
    kind, source, target, number = task
    array, affine, move = SPOILT[kind](*read_scan(source), np.random.default_rng([11, number]))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(target.removesuffix(".nii.gz") + ".txt", move)
    write_nifti(target, array, affine)
    return True


def write_no_brains(folder: Path, names: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Write things that are no brains, all or those of some names; a row a file."""
    shape, to = (90, 110, 100), from_matvec(np.diag([2.0] * 3), [-100, -110, -90])
    z, y, x = np.meshgrid(*(2.0 * (np.arange(side) - side / 2) for side in shape), indexing="ij")
    radius, rng = np.sqrt(x**2 + y**2 + z**2), np.random.default_rng(5)
    angle = np.arctan2(y, x)
    noise = rng.rayleigh(4, shape)
    ball = np.where(radius < 75, 100, 0) + noise
    water = np.where(radius < 68, 100 * np.exp(-radius / 200), 0) + noise
    egg = np.where((x / 62) ** 2 + (y / 80) ** 2 + (z / 60) ** 2 < 1, 100, 0.0)
    shepp = egg - 60 * ((x / 57) ** 2 + (y / 75) ** 2 + (z / 55) ** 2 < 1) + noise
    for at, size in (((20, 10, 0), 15), ((-20, 10, 0), 18), ((0, 40, 10), 20), ((0, -35, 0), 10)):
        shepp += 30 * ((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2 < size**2)
    orange = np.where(radius < 45, 70 + 30 * (np.abs(np.sin(5 * angle)) > 0.2), 0) + noise
    orange += 50 * ((radius >= 45) & (radius < 52))
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), 3)
    melon = np.where(radius < 80, 80 + 150 * texture, 0).clip(0) + noise
    torso = np.where((x / 95) ** 2 + (y / 70) ** 2 < 1, 60, 0.0)
    for at, size, value in (((45, 0), 35, 10), ((-45, 0), 35, 10), ((0, -45), 15, 150)):
        torso[(x - at[0]) ** 2 + (y - at[1]) ** 2 < size**2] = value
    things = {"noise": noise * 10, "ball": ball, "water bottle": water,
              "stripped egg": egg * (1 + 0.05 * rng.standard_normal(shape)), "phantom": shepp,
              "orange": orange, "melon": melon, "torso": torso + noise}
    maps = cohort().dropna(subset=["dlmuse_path"])["dlmuse_path"].iloc[:2]
    rows = []
    for name, array in things.items():
        write_nifti(folder / f"{name.replace(' ', '-')}.nii.gz", array.astype(np.float32), to)
        rows.append((name, str(folder / f"{name.replace(' ', '-')}.nii.gz")))
    rows += [(f"label map {number}", path) for number, path in enumerate(maps)]
    rows = [(name, path) for name, path in rows if names is None or name in names]
    return pd.DataFrame([{"participant": name.replace(" ", "-"), "of": "", "kind": "no brain", "session": "01",
                          "dataset": "spoilt", "image_path": path} for name, path in rows])


def main() -> None:
    """Run the parts that are asked for."""
    parts = {"scans": scans, "poses": poses, "spoilt": spoilt}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_heads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    folder = outputs_dir() / "bench" / "real_heads"
    for name in chosen.parts or parts:
        parts[name](folder, chosen.workers)


if __name__ == "__main__":
    main()
