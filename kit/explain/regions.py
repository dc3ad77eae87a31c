"""How much of a saliency map falls into which region of the brain, of one scan and over participants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from kit.evaluate.metrics import bootstrap
from kit.explain.atlas import Atlas
from kit.explain.label_names import BOTH
from kit.explain.saliency import Maps
from kit.store.store import Store

ELSEWHERE = "in no region"  # brain that the atlas leaves out
COLUMNS = ["method", "region", "side", "share_of_saliency", "low", "high", "share_of_brain", "ratio", "participants"]


def region_intervals(maps: Maps, store: Store, atlas: Atlas | Mapping[str, Atlas], participants: Mapping[str, str],
                     seed: int = 0) -> pd.DataFrame:
    """Share maps out over regions, as means over participants with intervals from the bootstrap over participants.

    A participant with several scans counts once, by their mean. Intervals are about the participants alone: the model
    is one and the same.

    Args:
        maps: by (scan, method), (depth, height, width) on the store's grid.
        store: of the scans, whose masks count.
        atlas: on the store's grid; or one for each scan, as `kit.explain.atlas.own_atlases` gives: regions are then
            matched by name and side.
        participants: each scan's participant; see `kit.cohort.identity.participant_ids`.
        seed: of the bootstrap.

    Returns:
        Columns method, region, side, share_of_saliency (mean share of the absolute map, 0-1), low and high (95 %
        percentiles of its bootstrap; nan with one participant), share_of_brain, ratio (of the two means; 1 is what an
        even map gives), participants. A method's regions are in the order of their share.

    Raises:
        ValueError: shapes differ, or a map is zero inside its mask.
    """
    shares = {(method, scan): shares_of(values, store.read(scan)[1], atlas if isinstance(atlas, Atlas) else atlas[scan])
              for (scan, method), values in maps.items()}
    table = pd.concat(shares, names=["method", "scan"]).unstack(["region", "side"]).fillna(0.0)
    who = [table.index.get_level_values("method"), table.index.get_level_values("scan").map(participants)]
    table = table.groupby(who, sort=False).mean()  # (method, participant) x (share, region, side)
    methods = dict.fromkeys(method for _, method in maps)
    return pd.concat([_with_intervals(table.loc[each], each, seed) for each in methods], ignore_index=True)[COLUMNS]


def _with_intervals(shares: pd.DataFrame, method: str, seed: int) -> pd.DataFrame:
    """One method's regions, the strongest first: means over the rows, which are participants, and their bootstrap."""
    saliency, count = shares["share_of_saliency"], len(shares)
    drawn = np.concatenate([weights @ saliency.to_numpy() / count for weights in bootstrap(count, seed=seed)])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0) if count > 1 else np.full((2, drawn.shape[1]), np.nan)
    table = pd.DataFrame({"method": method, "share_of_saliency": saliency.mean(), "low": low, "high": high,
                          "share_of_brain": shares["share_of_brain"].mean(), "participants": count})
    table = table[table["share_of_brain"] > 0].reset_index()
    return table.assign(ratio=table["share_of_saliency"] / table["share_of_brain"]).sort_values(
        "share_of_saliency", ascending=False, kind="stable")


def shares_of(saliency_map: np.ndarray, mask: np.ndarray, atlas: Atlas) -> pd.DataFrame:
    """Share one scan's absolute map out over an atlas's regions, left and right apart.

    Args:
        saliency_map, mask: (depth, height, width) on the atlas's grid; voxels outside the mask count nowhere.

    Returns:
        By region and side, share_of_saliency and share_of_brain (0-1, each summing to 1); labels of one name and side
        count together. `in no region` is brain that the atlas leaves out.

    Raises:
        ValueError: shapes differ, or the map is zero inside the mask.
    """
    weight, brain = _inside(saliency_map, mask, atlas.labels.shape)
    table = pd.concat([pd.DataFrame({"label": [0], "region": ELSEWHERE, "side": BOTH}), atlas.table], ignore_index=True)
    labels = atlas.labels[brain]
    row_of = np.zeros(max(labels.max(), table["label"].max()) + 1, int)  # row 0 for what the table lacks
    row_of[table["label"]] = np.arange(len(table))
    row, rows = row_of[labels], len(table)
    shares = pd.DataFrame({"share_of_saliency": np.bincount(row, weight[brain], rows) / weight.sum(),
                           "share_of_brain": np.bincount(row, minlength=rows) / len(row)})
    return shares.groupby([table["region"], table["side"]], sort=False).sum()


def _inside(saliency_map: np.ndarray, mask: np.ndarray, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Return the absolute map as float64, zero outside the mask, and the mask as booleans."""
    brain = np.asarray(mask, dtype=bool)
    if not saliency_map.shape == brain.shape == tuple(shape):
        raise ValueError(f"shapes differ: map {saliency_map.shape}, brain mask {brain.shape}, atlas {tuple(shape)}")
    weight = np.where(brain, np.abs(saliency_map.astype(np.float64)), 0)
    if not weight.sum() > 0:
        raise ValueError("the map is zero or not finite inside the mask: there is nothing to share out")
    return weight, brain
