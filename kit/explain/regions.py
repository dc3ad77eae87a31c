"""Shares of saliency maps by brain region, for one scan and over participants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from kit.evaluate.metrics import bootstrap
from kit.explain.atlas import Atlas
from kit.explain.label_names import BOTH
from kit.explain.saliency import Maps
from kit.store.store import Store

ELSEWHERE = "in no region"  # brain not covered by the atlas
COLUMNS = ["method", "region", "side", "share_of_saliency", "low", "high", "share_of_brain", "ratio", "participants"]


def region_intervals(maps: Maps, store: Store, atlas: Atlas | Mapping[str, Atlas], participants: Mapping[str, str],
                     seed: int = 0) -> pd.DataFrame:
    """Compute regions' shares of maps: means over participants with bootstrap intervals over participants.

    A participant with several scans counts once, by their mean. Intervals reflect only the sampling of participants;
    the model is fixed.

    Args:
        maps: by (scan, method), (depth, height, width) on the store's grid.
        store: of the scans; shares are taken inside its masks.
        atlas: on the store's grid; or one per scan, as from `kit.explain.atlas.own_atlases`, with regions matched by
            name and side.
        participants: each scan's participant; see `kit.cohort.identity.participant_ids`.
        seed: of the bootstrap.

    Returns:
        Columns method, region, side, share_of_saliency (mean share of the absolute map, 0-1), low and high (95 %
        bootstrap percentile interval; nan with one participant), share_of_brain, ratio (of the two means; 1 for a
        uniform map), participants. A method's regions are sorted by share, largest first. No map, no row.

    Raises:
        ValueError: shapes differ, or a map is zero or not finite inside its mask.
    """
    if not maps:
        return pd.DataFrame(columns=COLUMNS)
    shares = {(method, scan): shares_of(values, store.read(scan)[1], atlas if isinstance(atlas, Atlas) else atlas[scan])
              for (scan, method), values in maps.items()}
    table = pd.concat(shares, names=["method", "scan"]).unstack(["region", "side"]).fillna(0.0)
    who = [table.index.get_level_values("method"), table.index.get_level_values("scan").map(participants)]
    table = table.groupby(who, sort=False).mean()  # (method, participant) x (share, region, side)
    methods = dict.fromkeys(method for _, method in maps)
    return pd.concat([_with_intervals(table.loc[each], each, seed) for each in methods], ignore_index=True)[COLUMNS]


def _with_intervals(shares: pd.DataFrame, method: str, seed: int) -> pd.DataFrame:
    """One method's regions, strongest first: means over participants (rows) with bootstrap intervals."""
    saliency, count = shares["share_of_saliency"], len(shares)
    drawn = np.concatenate([weights @ saliency.to_numpy() / count for weights in bootstrap(count, seed=seed)])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0) if count > 1 else np.full((2, drawn.shape[1]), np.nan)
    table = pd.DataFrame({"method": method, "share_of_saliency": saliency.mean(), "low": low, "high": high,
                          "share_of_brain": shares["share_of_brain"].mean(), "participants": count})
    table = table[table["share_of_brain"] > 0].reset_index()
    return table.assign(ratio=table["share_of_saliency"] / table["share_of_brain"]).sort_values(
        "share_of_saliency", ascending=False, kind="stable")


def shares_of(saliency_map: np.ndarray, mask: np.ndarray, atlas: Atlas) -> pd.DataFrame:
    """Compute regions' shares of one scan's absolute map, left and right apart.

    Args:
        saliency_map, mask: (depth, height, width) on the atlas's grid; voxels outside the mask are ignored.

    Returns:
        By region and side, share_of_saliency and share_of_brain (0-1, each summing to 1); labels with the same name
        and side are merged. `in no region` is brain that the atlas does not cover.

    Raises:
        ValueError: shapes differ, or the map is zero or not finite inside the mask.
    """
    weight, brain = _inside(saliency_map, mask, atlas.labels.shape)
    table = pd.concat([pd.DataFrame({"label": [0], "region": ELSEWHERE, "side": BOTH}), atlas.table], ignore_index=True)
    labels = atlas.labels[brain]
    row_of = np.zeros(max(labels.max(), table["label"].max()) + 1, int)  # row 0 for labels not in the table
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
    if not 0 < weight.sum() < np.inf:
        raise ValueError("the map is zero or not finite inside the mask, so regions have no shares of it")
    return weight, brain
