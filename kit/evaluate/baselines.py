"""Baselines without an encoder: guessing, age and sex, site, brain volumes, principal components of voxels.

Published comparisons found plain volumes ahead of several foundation models. Everything, including the components, is
fitted on the task's training part. The penalty is chosen on validation, as for a probe.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder
from torch.nn.functional import avg_pool3d

from kit.cohort.identity import normalised
from kit.cohort.labels import LabelError, sexes
from kit.cohort.tabular import ages, looks_missing, numbers_of, spelled
from kit.evaluate.measured import key_in_file, measured, measured_file
from kit.evaluate.probe import DEFAULT, probe_tested
from kit.evaluate.tasks import CORRECTION, Part, Task
from kit.evaluate.volumes import BRIGHTEST, looked_up, native_size, read_volumes, regions_on, tissue_volumes
from kit.runs import progress
from kit.store.store import Store

BASELINES = ("guess", "demographics", "site", "volumes", "voxels")
LEARNED = ("train", "validation")  # parts whose labels are read; all others are only predicted
DEMOGRAPHICS = ("age", "sex", "gender")
SAME = {"gender": "sex"}  # column names with the same meaning
COPY = 0.99  # a column correlating more than this with the label is the label in other units
LEAST_ROWS = 20  # fewer scans can agree by chance
SHOWN = 20  # columns of a table of volumes that are named, for the user to see what else is in it
COMPONENTS = 50
POOLED_MM = 4.0  # voxels are averaged to about this size: PCA on finer voxels costs much and adds little


class DoesNotApply(Exception):
    """A baseline has nothing to learn from; the message says why."""


def baseline_predictions(name: str, task: Task, *, demographics: Sequence[str] | None = None,
                         volumes: Path | None = None, atlas: Path | None = None, cache: Path | None = None,
                         say: Callable[[str], object] = print) -> dict[str, np.ndarray] | None:
    """Fit one of `BASELINES` on a task's training part and predict its test parts, whose labels are never read.

    Args:
        name: "guess" (the training mean, or the class frequencies), "demographics", "site" (each scan's
            cell in the column `site`, ignoring case; its `dataset` if there is none), "volumes" or "voxels".
        demographics: columns of the index; None: all `DEMOGRAPHICS` it has. Left out are the task's own column and its
            copies: of classes, a column with exactly one value for each; of numbers, one correlated above `COPY`.
        volumes: a table supplied by the user (see `kit.evaluate.volumes.read_volumes`); None: volumes measured in the
            prepared scans (see `kit.evaluate.volumes.tissue_volumes`).
        atlas: regions for the measured volumes; see `kit.evaluate.volumes.regions_on`.
        cache: folder for the volumes or voxels measured in each scan; None: measured every time.
        say: called with what is left out, and why.

    Returns:
        Predictions by part, one row per scan: log-odds of class 1 (scans,), logits of K > 2 classes (scans, K), or the
        number. Parts that lack the baseline's data are absent; in the part `CORRECTION`, scans that lack them are nan.
        None if there is nothing to learn from.

    Raises:
        LabelError: no such demographics column.
        TableError, ScanError: the table of volumes or the atlas cannot be used.
    """
    def tell(words: str) -> None:
        say(f"{name} on {task.labels.task}: {words}")

    try:
        if name == "guess":
            return _guess(task)
        if name == "voxels":
            return probe_tested(task, _components(task, cache))
        if name == "volumes" and volumes is not None:
            return _from_tables(task, _table_of_volumes(task, volumes, tell), tell)
        if name == "volumes":
            return probe_tested(task, _measured_volumes(task, atlas, cache))
        if name == "site":
            return _from_tables(task, {part: _sites(each.rows) for part, each in task.parts.items()}, tell)
        if name == "demographics":
            return _from_tables(task, _demographics(task, demographics, tell), tell)
    except DoesNotApply as reason:
        tell(f"no row, because {reason}")
        return None
    raise ValueError(f"no baseline {name}; there are {', '.join(BASELINES)}")


def _guess(task: Task) -> dict[str, np.ndarray]:
    labels = task.parts["train"].labels
    if task.labels.kind == "regression":
        guess = labels.mean()
    else:
        shares = np.log(np.bincount(labels.astype(int), minlength=len(task.labels.classes)) / len(labels))
        guess = shares[1] - shares[0] if len(shares) == 2 else shares
    return {name: np.full((len(part.rows), *np.shape(guess)), guess) for name, part in task.parts.items()
            if name not in LEARNED}


def _demographics(task: Task, columns: Sequence[str] | None, tell: Callable[[str], object]) -> dict[str, pd.DataFrame]:
    """Covariates by part, without copies of the label; a test set may name a column differently."""
    index = task.parts["train"].rows
    if columns is None:
        columns = [name for name in index if name.casefold() in DEMOGRAPHICS]
    if missing := [name for name in columns if name not in index]:
        raise LabelError(f"demographics: no column {', '.join(missing)}; the index has {', '.join(index.columns)}")
    if not columns:
        raise DoesNotApply(f"the index has no column {', '.join(DEMOGRAPHICS)}")
    columns = _without_label(task, {name: part.rows[list(columns)] for name, part in _labelled(task).items()}, tell)
    return {name: pd.DataFrame({column: _covariate(part.rows, column, index) for column in columns})
            for name, part in task.parts.items()}


def _covariate(rows: pd.DataFrame, column: str, index: pd.DataFrame) -> pd.Series:
    """One column of a part: numbers if it holds numbers in training, else categories; nan where missing."""
    alike = [name for name in rows if words_of(name) == words_of(column)]
    found = rows[column if column in rows else alike[0]] if alike else pd.Series(np.nan, rows.index)
    if words_of(column) == {"sex"}:  # always a category, even if coded as numbers; male, M and m are the same
        return sexes(found)
    learned = index[column]
    if words_of(column) == {"age"}:
        learned, found = ages(learned), ages(found)
    if numbers_of(learned) is not None:
        return pd.to_numeric(found, errors="coerce").astype(np.float64)
    return found.map(normalised, na_action="ignore").astype(object)


def _sites(rows: pd.DataFrame) -> pd.DataFrame:
    """Normalised site names, prefixed by dataset: site 1 of one dataset is not site 1 of another.

    A scan without a site has its dataset's name alone.
    """
    sites, datasets = rows[spelled(rows, "site") or "dataset"], rows["dataset"].map(normalised)
    return pd.DataFrame({"site": (datasets + "/" + sites.map(normalised)).where(sites.notna(), datasets)}, dtype=object)


def _table_of_volumes(task: Task, path: Path, tell: Callable[[str], object]) -> dict[str, pd.DataFrame]:
    table = read_volumes(path)
    parts = {name: part.rows for name, part in task.parts.items()}
    whole = {f"all of {name}": part.rows for name, part in _labelled(task).items()}
    found = looked_up(table, pd.concat(parts | whole))
    if others := [name for name in found if words_of(name) & set(DEMOGRAPHICS)]:
        tell(f"{', '.join(others)} of the table left out, as not volumes")
        found = found.drop(columns=others)
    columns = _without_label(task, {name: found.loc[name] for name in whole}, tell)
    more = f", ... ({len(columns)} columns)" if len(columns) > SHOWN else ""
    tell(f"read as volumes: {', '.join(columns[:SHOWN])}{more}")
    return {name: found.loc[name][columns] for name in parts}


def words_of(name: str) -> set[str]:
    """Split a column name into words: `Age_at_scan` gives age, at and scan."""
    words = set(re.findall(r"[^\W\d_]+|\d+", str(name).casefold()))
    return {SAME.get(word, word) for word in words}


def _labelled(task: Task) -> dict[str, Part]:
    """Training and validation parts with all their labels, whatever fraction of them is learned from."""
    return {name: (task.labelled or task.parts)[name] for name in LEARNED}


def _without_label(task: Task, tables: dict[str, pd.DataFrame], tell: Callable[[str], object]) -> list[str]:
    """Columns that do not give the label away, by name or by their values.

    Args:
        tables: the columns, by part of `_labelled`: with all labels, as few can agree by chance.
    """
    rows, own = pd.concat(list(tables.values())), words_of(task.labels.task)
    labels = pd.Series(np.concatenate([part.labels for part in _labelled(task).values()]), rows.index)
    kept = []
    for column in rows:
        words, both = words_of(column), pd.DataFrame({"one": _compared(rows[column]), "other": labels}).dropna()
        if (words and (words <= own or own <= words)) or _copy(both["one"], both["other"], task.labels.kind):
            tell(f"without {column}, which is the label or says the same")
        else:
            kept.append(column)
    if not kept:
        raise DoesNotApply("its only columns give the label away")
    return kept


def _compared(column: pd.Series) -> pd.Series:
    """A column's numbers, or else its normalised text; nan where a cell is empty or looks like a missing value."""
    if (numbers := numbers_of(column)) is not None:
        return numbers
    return column.map(lambda cell: np.nan if looks_missing(cell) else normalised(cell), na_action="ignore")


def _copy(one: pd.Series, labels: pd.Series, kind: str) -> bool:
    """Whether a column has exactly one value per class, or is the label in another unit."""
    values = one.nunique()
    if len(labels) < LEAST_ROWS or values < 2:
        return False
    if kind == "classification":
        return values == labels.nunique() == len(set(zip(one, labels, strict=True)))
    return pd.api.types.is_numeric_dtype(one) and abs(one.corr(labels)) > COPY


def _from_tables(task: Task, tables: dict[str, pd.DataFrame], tell: Callable[[str], object]) -> dict[str, np.ndarray]:
    """Encode columns and fit a probe: missing numbers become the training mean, categories are one-hot.

    A category unseen in training, such as another site, becomes all zeros. That a value is missing is learned from,
    too (an indicator column, or a category of its own), which a printed line says. So does one for each column of which
    a test set has no value, or none of training's categories, such as a sex that is coded otherwise.

    Scans with no known value are left out of training and validation, and are nan in the part `CORRECTION`. In a test
    part they are predicted from mean values; a test part with only such scans is left out.
    """
    parts, knowns = {}, {}
    for name, part in task.parts.items():
        known = knowns[name] = tables[name].notna().any(axis=1).to_numpy()
        if not known.all():
            who = part.participants[~known].unique()
            tell(f"no values for {len(who)} participants of {name}: {_listed(who)}")
        if known.any():
            parts[name] = part.only(known) if name in LEARNED else part
    if absent := [name for name in LEARNED if name not in parts]:
        raise DoesNotApply(f"no {absent[0]} scan has a value")
    tables = {name: tables[name].loc[part.rows.index] for name, part in parts.items()}
    train = tables["train"]
    if len(train) < 2 or len(set(parts["train"].labels)) < len(task.labels.classes):
        raise DoesNotApply(f"the {len(train)} training scans that have a value are too few, or lack a class")
    if task.labels.classes and len(set(parts["validation"].labels)) < 2:
        tell(f"validation scans with a value are all of one class, so the penalty is not chosen but {DEFAULT:g}")
    if gaps := [name for name in train if train[name].isna().any()]:
        tell(f"some training scans have no {_listed(gaps)}; that a value is missing is learned from, too")
    numbers = [name for name in train if train[name].dtype != object]
    categories = [name for name in train if name not in numbers]
    for name in (each for each in tables if each not in LEARNED):
        if lacking := [each for each in train if train[each].notna().any() and tables[name][each].isna().all()]:
            tell(f"{name} has no values of {_listed(lacking)}, so it is predicted without")
        for column in (each for each in categories if each != "site"):
            values, known = tables[name][column].dropna(), train[column].dropna()
            if len(values) and len(known) and not values.isin(known).any():
                tell(f"{column} of {name} has no value of training ({values.iloc[0]} there, {known.iloc[0]} in "
                     "training), so that it does not count there")
    encoder = make_column_transformer(
        (SimpleImputer(add_indicator=True, keep_empty_features=True), numbers),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), categories))
    tables = {name: table.fillna({column: "" for column in categories}) for name, table in tables.items()}
    encoder.fit(tables["train"])
    features = {name: encoder.transform(table) for name, table in tables.items()}
    if not np.ptp(features["train"], axis=0).any():
        raise DoesNotApply(f"all training scans have the same {', '.join(train)}")
    found = probe_tested(replace(task, parts=parts), features)
    return {name: np.where(knowns[name], values, np.nan) if name == CORRECTION else values
            for name, values in found.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _measured_volumes(task: Task, atlas: Path | None, cache: Path | None) -> dict[str, np.ndarray]:
    regions = {part.store.grid: regions_on(part.store.grid, atlas) for part in task.parts.values()}

    def measure(store: Store, scan: str) -> np.ndarray:
        image, mask = store.read(scan)
        return tissue_volumes(image, mask, regions[store.grid], store.grid.spacing_mm**3 / 1000)

    digests = {str(grid): hashlib.blake2b(each.tobytes()).hexdigest() for grid, each in regions.items()}
    found = _measured(task, measure, cache and measured_file(cache, "volumes", BRIGHTEST, sorted(digests.items())))
    return {name: found[name] * native_size(part.store, part.rows)[:, None] for name, part in task.parts.items()}


def _components(task: Task, cache: Path | None) -> dict[str, np.ndarray]:
    """Principal components of voxels averaged to about 4 mm, where most training scans have brain."""
    grids = {str(part.store.grid) for part in task.parts.values()}
    found = _measured(task, _pooled, cache and measured_file(cache, "voxels", sorted(grids)))
    shared = np.isfinite(found["train"]).mean(0) > 0.5
    if not shared.any():
        raise DoesNotApply("no voxel is inside the brain of most training scans")
    values = {name: np.nan_to_num(each[:, shared].astype(np.float32)) for name, each in found.items()}
    count = min(COMPONENTS, len(values["train"]) - 1, int(shared.sum()))
    pca = PCA(count, random_state=0).fit(values["train"])
    return {name: pca.transform(each) for name, each in values.items()}


def _pooled(store: Store, scan: str) -> np.ndarray:
    """Average a scan over blocks of voxels: (voxels,) float16, nan unless more than half of a block is brain."""
    size = max(1, round(POOLED_MM / store.grid.spacing_mm))
    image, mask = (torch.from_numpy(each.astype(np.float32))[None] for each in store.read(scan))
    pooled, inside = (avg_pool3d(each, size, ceil_mode=True)[0].numpy() for each in (image, mask))
    return np.where(inside > 0.5, pooled, np.nan).ravel().astype(np.float16)


def _measured(task: Task, measure: Callable[[Store, str], np.ndarray], path: Path | None) -> dict[str, np.ndarray]:
    """Measure each scan, (scans, width) by part; see `kit.evaluate.measured.measured` for the file."""
    keys = {name: [key_in_file(part.store, scan) for scan in part.rows["scan"]] for name, part in task.parts.items()}
    scans = {key: (part.store, scan) for name, part in task.parts.items()
             for key, scan in zip(keys[name], part.rows["scan"], strict=True)}
    found = measured(scans, lambda some: [measure(*each) for each in progress(some, desc="measuring scans")], path)
    return {name: np.stack([found[key] for key in each]) for name, each in keys.items()}
