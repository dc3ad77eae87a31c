"""Compare maps with known locations: the sample cohort's effects, and lesions implanted into real scans.

Measures per map, from its absolute values inside the brain:

- pointing: is its strongest voxel in the place, or next to it? (Zhang et al., arXiv 1608.00507)
- mass: the share of the map in the place; rank: of its n strongest voxels, the share in the place, where n is the
  place's number of voxels. (Arras et al., CLEVR-XAI, Information Fusion 2022)

A uniform or random map has a mass and a rank of about the place's share of the brain; `mass_ratio` and `rank_ratio` are
over that share. Its pointing is higher than the share, as the voxels around the place count too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation, gaussian_filter

from kit.cohort.identity import participant_ids
from kit.cohort.tabular import read_table
from kit.device import on_device
from kit.evaluate.finetune import load_predictor
from kit.evaluate.metrics import bootstrap
from kit.explain.explainer import Explainer
from kit.explain.maps import EFFECTS, check_model, effect_file, index_by_person, known_place
from kit.explain.saliency import check_methods
from kit.explain.targets import target_of
from kit.params import Saliency
from kit.provenance import write_stamped
from kit.runs import Run, progress
from kit.seeding import rng_for
from kit.store.grid import Grid
from kit.store.store import Store

MEASURES = ("pointing", "mass", "mass_ratio", "rank", "rank_ratio")
COLUMNS = ("scan", "method", "place", "share_of_brain", *MEASURES)
LEVEL = 0.95  # of the intervals


def against_place(found: np.ndarray, place: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Compare one map with a known place; all are (depth, height, width).

    Returns:
        `share_of_brain` of the place, 0-1; `pointing`, `mass`, `rank` (0-1; `pointing` is 0 or 1 unless several voxels
        are equally strong); `mass_ratio`, `rank_ratio` (over `share_of_brain`). If the map is zero in the brain, all
        but the share are nan.

    Raises:
        ValueError: shapes differ, or the place lies outside the brain.
    """
    brain = np.asarray(mask, bool)
    if not found.shape == brain.shape == np.shape(place):
        raise ValueError(f"shapes differ: map {found.shape}, brain mask {brain.shape}, known place {np.shape(place)}")
    known = np.asarray(place, bool) & brain
    if not known.any():
        raise ValueError("the known place lies outside the brain, so no map can be compared with it")
    share = float(known.sum() / brain.sum())
    if not np.abs(found[brain]).sum() > 0:
        return {"share_of_brain": share, **dict.fromkeys(MEASURES, float("nan"))}
    weight, count = np.where(brain, np.abs(found.astype(np.float64)), 0), int(known.sum())
    beside = binary_dilation(known)  # one voxel of tolerance; the method's authors allow some too
    # Equally strong voxels, as in a cube of occlusion, count by their share in the place, not by their order.
    least = np.sort(weight[brain])[-count]
    above, tied = brain & (weight > least), brain & (weight == least)
    rank = float((known[above].sum() + (count - above.sum()) * known[tied].mean()) / count)
    mass, pointing = float(weight[known].sum() / weight.sum()), float(beside[brain & (weight == weight.max())].mean())
    return {"share_of_brain": share, "pointing": pointing, "mass": mass, "mass_ratio": mass / share, "rank": rank,
            "rank_ratio": rank / share}


def truth_table(params: Saliency, explainer: Explainer, task: str | None, run: Run) -> pd.DataFrame:
    """Compare all methods' maps of all models with known places; also written to `truth.csv`.

    Each model is judged on tested participants of its own task whose place is known, drawn by the seed: models with
    the same task and split share them. The maps explain the prediction, whatever `target` says.

    Args:
        params: its `model` and `compare` are judged on `truth_participants` participants each.
        explainer: of the shown maps: its store and the methods' options.
        task: of `model`; None: an encoder, which has no task and thus no known place.

    Returns:
        One row per model, task and method, see `summary`; empty if no place is known.
    """
    store = explainer.store
    tables = [summary(pd.DataFrame(columns=COLUMNS), store).assign(model=[], task=[])]
    models = {"model": params.model, **params.compare} if task is not None else {}
    for name, folder in models.items():
        check_model(folder, store, params.allow_differences)
        model, record = load_predictor(folder, store.record)
        check_methods(model, params.methods, params.layer, params.baseline)
        output = target_of("prediction", on_device(model), record, store, pd.DataFrame({"scan": []}))
        here = explainer._replace(model=model.eval(), of=output.of, words=output.words)
        scans = scans_with_place(folder, store, record["task"], params.truth_participants, params.seed)
        found = summary(measure(here, scans, params.methods, record["task"]), store, params.seed, folder)
        tables.append(found.assign(model=name, task=record["task"]))
    table = pd.concat([each for each in tables if len(each)] or tables, ignore_index=True)
    table = table[["model", "task", *table.columns.drop(["model", "task"])]]
    write_stamped(run / "truth.csv", table)
    return table


def scans_with_place(model: Path, store: Store, task: str, count: int, seed: int) -> list[str]:
    """Draw in-distribution tested participants whose place of the task's effect is known, one scan each."""
    tested = read_table(model / "predictions.csv", text=("scan", "participant"))
    tested = tested.loc[tested["distribution"] == "in_distribution", "scan"]
    rows = index_by_person(store, model).set_index("scan", drop=False).loc[sorted(tested)]
    there = [scan for scan in rows["scan"]
             if (place := known_place(store, scan, task)) is not None and (place & store.read(scan)[1]).any()]
    if lost := [scan for scan in rows["scan"] if scan not in there and effect_file(store, scan, task).exists()]:
        print(f"known places of {task}: {len(lost)} of {len(lost) + len(there)} have no voxel in the brain on this "
              f"grid, and are left out: {', '.join(lost[:3])}")
    rows = rows.loc[there]
    there = rows.loc[~participant_ids(rows).duplicated().to_numpy(), "scan"].tolist()
    return [there[number] for number in rng_for(seed).permutation(len(there))[:count]]


def measure(explainer: Explainer, scans: Sequence[str], methods: Sequence[str], task: str) -> pd.DataFrame:
    """Make maps and compare them with known places: one row per scan and method, see `against_place`."""
    rows = []
    for scan in progress(scans, desc="known places", disable=not scans):
        place, mask = known_place(explainer.store, scan, task), explainer.store.read(scan)[1]
        assert place is not None  # the scans were drawn from those with one
        rows += [{"scan": scan, "method": method, "place": EFFECTS[task],
                  **against_place(explainer.map(scan, method), place, mask)} for method in methods]
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(table: pd.DataFrame, store: Store, seed: int = 0, model: Path | None = None) -> pd.DataFrame:
    """Average over participants, with 95 % bootstrap intervals over participants.

    Args:
        table: from `measure`.
        store: of its scans.
        seed: of the bootstrap.
        model: the run whose `aliases` tell who has several names; None: nobody has.

    Returns:
        One row per method: `method`, `participants`, `empty_maps` (participants left out because their maps are zero in
        the brain), and for each of `MEASURES` the mean, `<measure>_low` and `<measure>_high` (nan with fewer than two
        participants).
    """
    rows, index = [], store.index if model is None else index_by_person(store, model)
    person = dict(zip(index["scan"], participant_ids(index), strict=True))
    for method, part in table.groupby("method", sort=False):
        means = part.assign(participant=part["scan"].map(person)).groupby("participant")[list(MEASURES)].mean()
        nonzero = means.dropna()
        row = {"method": method, "participants": len(nonzero), "empty_maps": len(means) - len(nonzero)}
        for name in MEASURES:
            low, high = _interval(nonzero[name].to_numpy(), seed)
            row |= {name: nonzero[name].mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    columns = ["method", "participants", "empty_maps",
               *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high"))]
    return pd.DataFrame(rows, columns=columns)


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = np.concatenate([counts @ values / len(values) for counts in bootstrap(len(values), seed=seed)])
    return tuple(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())


def implant_lesion(image: np.ndarray, mask: np.ndarray, grid: Grid, place_mm: tuple[float, float, float],
                   radius_mm: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Implant a dark lesion, like an old infarct on T1: a ball with an irregular edge, as dark as fluid.

    Args:
        image: (depth, height, width), z-scored inside the mask and 0 outside; the result is z-scored again.
        mask: (depth, height, width), the brain.
        grid: of both.
        place_mm: (x, y, z) MNI millimetres of its centre.
        radius_mm: approximate radius.
        seed: of its edge and its texture.

    Returns:
        The scan, float32, and the lesion's voxels, bool, both (depth, height, width).

    Raises:
        ValueError: no voxel of the lesion lies in the brain.
    """
    rng, brain = np.random.default_rng([seed, 77]), np.asarray(mask, bool)
    apart = [start + grid.spacing_mm * np.arange(side) - centre for start, side, centre
             in zip(grid.origin_mm[::-1], grid.shape, place_mm[::-1], strict=True)]
    distance = np.sqrt(sum(each**2 for each in np.meshgrid(*apart, indexing="ij")))
    rough = gaussian_filter(rng.normal(size=grid.shape), max(1.0, 4 / grid.spacing_mm))
    edge = distance + 0.15 * radius_mm * rough / rough.std()  # irregular: SD 15 % of the radius
    depth = np.clip(0.5 + (radius_mm - edge) / max(grid.spacing_mm, 2.0), 0, 1) * brain  # soft edge, at least 2 mm wide
    lesion = depth >= 0.5
    if not lesion.any():
        raise ValueError(f"place_mm {place_mm}: no voxel within {radius_mm:g} mm lies in the brain")
    dark = np.quantile(image[brain], 0.03) + 0.2 * rng.normal(size=grid.shape)
    changed = np.where(brain, (1 - depth) * image.astype(np.float64) + depth * dark, 0)
    inside = changed[brain]
    return np.where(brain, (changed - inside.mean()) / inside.std(), 0).astype(np.float32), lesion
