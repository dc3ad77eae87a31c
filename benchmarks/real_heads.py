"""What preprocessing makes of real scans, of the same scans moved, spoilt and turned, and of things that are no brains.

    python -m benchmarks.real_heads             # all: about an hour on two cores
    python -m benchmarks.real_heads scans       # or scans, spoilt, poses: one after the other

It reads the scans of `KIT_REAL_SCANS` (default: ../shared/data) and Colin27 (Debian's mricron-data), prepares them by
`kit.preprocess.preprocess` on a 2 mm grid with `mask: auto, registration: rigid`, and writes tables and figures to
`outputs/bench/real_heads/`. docs/real_heads.md sets the limits of `kit.preprocess.quality.QC_METRICS` beside what was
measured, and says how much of this has been run. Everything resumes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from benchmarks.spoilt_scans import SPOILT, write_no_brains, write_spoilt
from kit.cohort.tables import read_cohort
from kit.preprocess.index import scan_names
from kit.preprocess.pool import run_all
from kit.preprocess.preprocess import prepare
from kit.preprocess.quality import QC_METRICS, flagged
from kit.preprocess.register import disagreement, find_transforms, rigid_part
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan
from kit.preprocess.selection import selection_bias
from kit.preprocess.settings import Preparation
from kit.preprocess.skullstrip import deepbet_mask, dice
from kit.preprocess.template import template
from kit.runs import ROOT, outputs_dir, write_table
from kit.show.figure import MAX_WIDTH, blank, label
from kit.show.quality_figures import quality_montage
from kit.store.grid import Grid
from kit.store.store import Store, read_facts, read_transform, scan_path

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
    worst = pd.concat([index[index["flags"] != ""], index.nsmallest(12, "mask_overlap")])
    worst = worst.drop_duplicates("scan").head(12)
    for name, rows in (("smallest", smallest), ("worst", worst)):
        figure = quality_montage([store.read(scan)[0].astype(np.float32) for scan in rows["scan"]], GRID,
                                 [f"{row.participant}, {row.brain_ml:.0f} ml" for row in rows.itertuples()],
                                 title=f"The {name} of {len(index)} real scans", note=SOURCES)
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
    """The rigid against the affine over all heads, against a longer search, and known moves."""
    store = Store.open(folder / "scans")
    rows = []
    for row in store.index[store.index["dataset"] == "IXI"].itertuples():
        found = read_facts(scan_path(store.folder, row.scan))["notes"]["transforms"]
        apart = disagreement(np.array(found["rigid"]), np.array(found["affine"]))
        rows.append({"participant": row.participant, "brain_ml": row.brain_ml, **apart._asdict()})
    apart = pd.DataFrame(rows)
    write_table(folder / "pose.csv", apart)
    apart = apart.drop(columns="participant")
    print("rigid against affine:", apart.describe(percentiles=[0.5, 0.95]).round(2).to_string(), sep="\n")
    print("Spearman with brain_ml:", apart.corr("spearman")["brain_ml"].round(2).to_string(), sep="\n")
    against_landmarks(folder, store)
    against_a_longer_search(folder, store, workers)
    known_moves(folder, store, workers)


def against_a_longer_search(folder: Path, store: Store, workers: int, scans: int = 40) -> None:
    """The rigid against the best of 27 starts at 8 mm, 8 at 4 and 3 at 2; half of the heads are the smallest."""
    path = folder / "longer_search.csv"
    if not path.is_file():
        heads = store.index[store.index["dataset"] == "IXI"].sort_values("brain_ml")
        small, rest = heads.iloc[:scans // 2], heads.iloc[scans // 2:]
        heads = pd.concat([small, rest.iloc[::len(rest) // (scans // 2)]]).head(scans)
        paths, points, rows = cohort().set_index("participant")["image_path"], brain_points(), []
        tasks = [(row.scan, paths[row.participant]) for row in heads.itertuples()]
        for (scan, _), found in run_all(_longer_search, tasks, workers):
            away = distance(found, read_transform(store.folder, scan), points)
            rows.append({"scan": scan, "median_mm": np.median(away), "most_mm": away.max()})
        write_table(path, pd.DataFrame(rows).merge(heads[["scan", "brain_ml"]], on="scan"))
    table = pd.read_csv(path)
    print("rigid against a longer search:", table.describe(percentiles=[0.5, 0.95]).round(2).to_string(), sep="\n")


def _longer_search(task: tuple[str, str]) -> np.ndarray:
    array, affine = read_scan(task[1])
    return find_transforms(array, affine, deepbet_mask(array), {8.0: 27, 4.0: 8, 2.0: 3}).rigid


def against_landmarks(folder: Path, store: Store) -> None:
    """The rigid, and the affine's rigid part, against landmarks that no registration has seen."""
    table = landmark_poses(store)
    write_table(folder / "landmarks.csv", table)
    for kind, good in table.groupby("kind"):
        print(f"{kind} against landmarks, {len(good)} heads:",
              good.describe(percentiles=[0.5, 0.95]).round(2).to_string(), sep="\n")
        print(good.corr("spearman", numeric_only=True)["brain_ml"].round(2).to_string())


def landmark_poses(store: Store) -> pd.DataFrame:
    """Rotation between each head's regions and all heads' mean pose, by the rigid and by the affine's rigid part.

    The centres of the label maps' regions are the landmarks. Each head is fitted to the median of all by a rotation
    (Kabsch 1976, doi:10.1107/S0567739476001873), by those 85 % of its landmarks that lie nearest. Heads whose
    landmarks lie twice as far off as others' are left out: their maps are wrong.
    """
    heads = store.index[store.index["dataset"] == "IXI"]
    maps = cohort().set_index("participant")["dlmuse_path"]
    centres = np.array([region_centres(maps[name]) for name in heads["participant"]])
    centres, tables = centres[:, np.isfinite(centres).all((0, 2))], []
    found = [read_facts(scan_path(store.folder, scan))["notes"]["transforms"] for scan in heads["scan"]]
    for kind in ("rigid", "affine"):
        to_mni = [np.linalg.inv(rigid_part(np.array(each[kind]))) for each in found]
        turns, rest = fitted_turns(np.array([apply_affine(*each) for each in zip(to_mni, centres, strict=True)]))
        angles = np.degrees(Rotation.from_matrix(turns).as_rotvec())
        tables.append(heads[["participant", "brain_ml"]].assign(
            kind=kind, pitch_deg=angles[:, 0], roll_deg=angles[:, 1], yaw_deg=angles[:, 2],
            angle_deg=np.linalg.norm(angles, axis=1), rest_mm=rest))
    table = pd.concat(tables, ignore_index=True)
    return table[table["rest_mm"] < 2 * table["rest_mm"].median()]


def region_centres(path: str, regions: int = 256) -> np.ndarray:
    """Centres of a label map's regions, (regions, 3) in the scan's mm; nan where there is none of a number."""
    labels, affine = read_scan(path)
    places = np.nonzero(labels)
    numbers = labels[places].astype(int)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(numbers, place, regions) / np.bincount(numbers, minlength=regions) for place in places]
    return apply_affine(affine, np.stack(means[::-1], axis=1))


def fitted_turns(heads: np.ndarray, near: float = 0.85) -> tuple[np.ndarray, np.ndarray]:
    """Return rotations (heads, 3, 3) from the mean pose to each head's, and the landmarks' median distance then, mm.

    Args:
        heads: (heads, landmarks, 3) mm; all are made as large as the median one.
        near: share of a head's landmarks, the nearest, by which it is fitted.
    """
    sizes = np.linalg.norm(heads - heads.mean(1, keepdims=True), axis=(1, 2))
    heads = heads * (np.median(sizes) / sizes).reshape(-1, 1, 1)
    middle, keep = heads[0], np.ones(heads.shape[:2], bool)
    for _ in range(20):
        turns, fitted = [], []
        for head, kept in zip(heads, keep, strict=True):
            centred = head - head[kept].mean(0)
            turn = Rotation.align_vectors(centred[kept], (middle - middle[kept].mean(0))[kept])[0]
            turns.append(turn)
            fitted.append(turn.inv().apply(centred) + middle[kept].mean(0))
        middle = np.median(fitted, axis=0)
        away = np.linalg.norm(fitted - middle, axis=2)
        keep = away <= np.quantile(away, near, axis=1, keepdims=True)
    turns = Rotation.concatenate(turns)
    return (turns.mean().inv() * turns).as_matrix(), np.median(away, axis=1)


def known_moves(folder: Path, store: Store, workers: int) -> None:
    """Thirty heads moved by known moves: how far from there they are found."""
    kinds = {name: SPOILT[name] for name in ("moved", "neck cut", "thick slices", "mirrored")}
    heads = store.index[store.index["dataset"] == "IXI"].sort_values("brain_ml").iloc[::6].head(30)
    paths = cohort().set_index("participant")["image_path"]
    table = write_spoilt(folder / "moved_files", paths[heads["participant"]].to_dict(), kinds, workers)
    index, failed = prepare(table.drop(columns=["kind", "of"]), folder / "moved", SETTINGS, workers)
    print(failed[["participant", "reason"]].to_string() if len(failed) else "none refused")
    still = heads.set_index("participant")["scan"]
    points, rows = brain_points(), []
    for row in index.merge(table[["participant", "kind", "of"]], on="participant").itertuples():
        move = np.loadtxt(folder / "moved_files" / f"{row.participant}.txt")
        expected = move @ read_transform(store.folder, still[row.of])
        found = read_transform(folder / "moved", row.scan)
        away = distance(found, expected, points)
        rows.append({"kind": row.kind, "of": row.of, "error_mm": np.median(away),
                     "error_95_mm": np.quantile(away, 0.95), "flags": row.flags})
    errors = pd.DataFrame(rows)
    write_table(folder / "moves.csv", errors)
    print(errors.groupby("kind")[["error_mm", "error_95_mm"]].describe(percentiles=[0.5, 0.95]).round(2).T.to_string())


def brain_points() -> np.ndarray:
    """Points all over the template's brain, (points, 3), MNI mm."""
    _, brain, to_mm = template()
    return apply_affine(to_mm, np.argwhere(brain)[::997, ::-1])


def distance(one: np.ndarray, other: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How far apart two transforms take points, mm."""
    return np.linalg.norm(apply_affine(one, points) - apply_affine(other, points), axis=1)


def spoilt(folder: Path, workers: int, every: int = 100) -> None:
    """Every so many-th scan moved, noised, cut, turned or of another contrast, and things that are no brains."""
    every_scan = cohort()
    some = pd.concat([every_scan[every_scan["dataset"] == "IXI"].iloc[::every],
                      every_scan[every_scan["dataset"] == "ds002748"].iloc[::every],
                      every_scan[every_scan["dataset"] == "ds000011"].iloc[:1]])
    paths = {f"{row.dataset}-{row.participant}": row.image_path for row in some.itertuples()}
    maps = every_scan["dlmuse_path"].dropna().tolist()[:2]
    table = write_spoilt(folder / "spoilt_files", paths, SPOILT, workers)
    table = pd.concat([table, write_no_brains(folder / "spoilt_files", maps)], ignore_index=True)
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
    """Draw each metric's values, a row a kind of scan, with the limits of `QC_METRICS`."""
    kinds = list(dict.fromkeys(index["kind"]))
    figure = blank(MAX_WIDTH, 260 * 5, "QC metrics of real scans, spoilt ones and things that are no brains", SOURCES)
    panels = figure.subplots(5, 3, sharey=True).ravel()
    for axes in panels[len(QC_METRICS):]:
        axes.set_visible(False)
    rng = np.random.default_rng(0)
    for axes, (name, metric) in zip(panels, QC_METRICS.items(), strict=False):
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
