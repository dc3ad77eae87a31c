"""Mean maps of groups of participants in MNI space, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kit.explain.saliency import Maps


def group_means(maps: Maps, masks: Mapping[str, np.ndarray], method: str, groups: Mapping[str, Sequence[str]],
                participants: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Average one method's maps over the participants of each group.

    Each map is divided by the mean of its absolute values in the brain: a voxel of 2 holds twice what an even map would
    give it, and no participant counts more than another for a steeper output. A participant's scans count once, by
    their mean.

    Args:
        maps: by (scan, method), (depth, height, width) on one grid.
        masks: by scan, true in the brain.
        method: of the maps.
        groups: the scans of each group, by its name, such as the true class.
        participants: each scan's participant.

    Returns:
        (depth, height, width) float32 by group.

    Raises:
        ValueError: a group has no map, or a map is zero in its brain.
    """
    return {name: _mean(maps, masks, method, scans, participants, name) for name, scans in groups.items()}


def difference(means: Mapping[str, np.ndarray], first: str, second: str) -> np.ndarray:
    """The mean map of one group minus that of another, (depth, height, width) float32."""
    return means[first] - means[second]


def _mean(maps: Maps, masks: Mapping[str, np.ndarray], method: str, scans: Sequence[str],
          participants: Mapping[str, str], name: str) -> np.ndarray:
    there = [scan for scan in scans if (scan, method) in maps]
    if not there:
        raise ValueError(f"group {name}: no map by {method} of its {len(scans)} scans")
    scans_of = {who: [scan for scan in there if participants[scan] == who] for who in
                dict.fromkeys(participants[scan] for scan in there)}
    total = np.zeros(maps[there[0], method].shape)
    for several in scans_of.values():
        for scan in several:
            values, inside = maps[scan, method].astype(np.float64), np.asarray(masks[scan], bool)
            level = np.abs(values[inside]).mean()
            if not level > 0:
                raise ValueError(f"{scan}, {method}: the map is zero or not finite in the brain")
            total += np.where(inside, values / level, 0) / (len(several) * len(scans_of))
    return total.astype(np.float32)
