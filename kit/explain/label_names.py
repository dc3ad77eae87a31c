"""Names and sides of an atlas's labels."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

from kit.cohort.tabular import TableError, read_foreign
from kit.explain.atlas_files import wheel_file

BOTH = "both"  # side of midline regions, and of labels whose names state no side
SIDES = {"left": "left", "lh": "left", "L": "left", "right": "right", "rh": "right", "R": "right", "bothside": BOTH}


def label_names(source: str | Path) -> pd.DataFrame:
    """Read the names and sides of labels.

    Args:
        source: a CSV or TSV with numbers in the first present of the columns index, id, ROIid, value, label; names in
            the first present of name, ROIname, region, label; and optionally `hemisphere` or `side`. Or
            `deepmriprep:NAME`, the table of one of its atlases.

    Returns:
        label (int), region (the name without its side), side: left, right or both. The side comes from the name (Left,
        Right, lh or rh, or L or R as first or last word), otherwise from the side column. The name takes precedence
        because deepmriprep 0.3.0's neuromorphometrics has the basal forebrain's sides swapped in the column.

    Raises:
        TableError: these columns are missing, or a label appears twice.
    """
    if str(source).startswith("deepmriprep:"):
        data = wheel_file(str(source).partition(":")[2], ".csv")
        table = pd.read_csv(io.BytesIO(data), sep=";", dtype=str, keep_default_na=False)
    else:
        table = read_foreign(Path(source), list, text=None)
    folded = {str(name).casefold(): name for name in table}
    number = next((folded[name] for name in ("index", "id", "roiid", "value", "label") if name in folded), None)
    name = next((folded[name] for name in ("name", "roiname", "region", "label") if name in folded), None)
    if number is None or name in (None, number):
        raise TableError(f"{source}: needs columns index and label, or id and name; found {', '.join(table.columns)}")
    try:
        numbers = table[number].astype(float)
        if (numbers % 1).any():
            raise ValueError(number)
        labels = numbers.astype(int)
    except ValueError:
        raise TableError(f"{source}: column {number} must hold whole numbers") from None
    if labels.duplicated().any():
        raise TableError(f"{source}: label {labels[labels.duplicated()].iloc[0]} is in several rows; keep one")
    named = pd.DataFrame([split_side(each) for each in table[name]], columns=["region", "side"])
    given = next((folded[each] for each in ("hemisphere", "side") if each in folded), None)
    if given is not None:
        letter = table[given].str.strip().str.casefold().str[:1].map({"l": "left", "r": "right"}).fillna(BOTH)
        named["side"] = np.where(named["side"] == BOTH, letter, named["side"])
    named.insert(0, "label", labels.to_numpy())
    return named[named["label"] > 0].reset_index(drop=True)  # 0 is no region; maps on the grid hold no negative labels


def split_side(name: str) -> tuple[str, str]:
    """Split a region's name into the name without its side, and the side."""
    plain = re.sub(r"[\s_]+", " ", str(name)).strip()
    if found := re.search(r"(?:^|(?<=[ -]))(left|lh|right|rh|bothside)(?:[ -]|$)", plain, re.IGNORECASE):
        return (plain[:found.start()] + plain[found.end():]).strip(" -"), SIDES[found[1].casefold()]
    words = plain.split(" ")
    for place in (0, -1):
        if len(words) > 1 and words[place] in SIDES:
            side = SIDES[words.pop(place)]
            return " ".join(words), side
    return plain, BOTH
