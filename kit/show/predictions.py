"""Predictions against the truth: ROC curves, calibration, scatter, confusion, worst errors; embeddings in 2D.

The input has one row per scan: `true` and `predicted` (log-odds of class 1, or the number; for K > 2 classes the logits
`predicted_0 … predicted_{K-1}`). `participant` identifies the person, with `dataset` or `alias_of` if names are not
joined yet; without it each row is a participant. Rows are of one task and label fraction. There is a panel per
`encoder` and `mode` and a colour per `distribution`, if those columns exist. A participant's scans are averaged as in
`kit.evaluate.metrics.score`, so that figures agree with its numbers. Each `seed` counts equally, and so does each
`fold`'s model that tested a participant.
`title` and `note`: see `kit.show.figure.blank`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.decomposition import PCA
from sklearn.metrics import ConfusionMatrixDisplay, brier_score_loss, mean_absolute_error

from kit.cohort.identity import participant_ids
from kit.evaluate.metrics import LEAST_PARTICIPANTS, auc, fewest, per_participant, predicted_columns, predicted_of
from kit.show.figure import LEGEND, MAX_WIDTH, TEXT, blank, label
from kit.show.planes import PLANES
from kit.show.slices import montage
from kit.show.wording import UNITS, in_units, need, need_one, readable
from kit.store.store import Store

SPECIFICITY = 0.9  # of the operating point
IN_A_ROW = 3  # panels
DRAWS = 200  # bootstrap draws for a band
_ONE_CELL = ("task", "label_fraction")
_FALSE_POSITIVES = np.linspace(0, 1, 501)


def predictions(table: pd.DataFrame, metric: str, task: str = "", note: str = "",
                classes: Sequence[str] | None = None) -> Figure:
    """Draw predictions in the form that suits the metric, titled by the task: ROC, confusion matrix, or scatter.

    Args:
        metric: a value of `kit.evaluate.metrics.METRICS`.
        classes: their names, in the order of the numbers, for a confusion matrix; None: the numbers.
    """
    if metric != "auc":
        return scatter(table, task, note=note)
    if len(predicted_columns(table)) > 1:
        return confusion(table, classes, readable(task), note)
    return roc(table, readable(task), note)


def roc(table: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw ROC curves for two classes with the point at 90 % specificity.

    A curve is the mean sensitivity of the models (seeds, folds), each on its own scale. A seed's folds are weighted by
    their number of positive-negative pairs, so that the area is the AUC over pairs within folds. The band is the 95 %
    interval over participants and seeds (percentile bootstrap). It is not drawn with fewer than
    `kit.evaluate.metrics.LEAST_PARTICIPANTS` of a class.
    """
    need(table, "predictions", ["true", *predicted_columns(table)])
    figure, panels = _panels(table, title, note)
    for axes, group in panels:
        for name, colour, joined in _by_distribution(group):
            seeds = [each for _, each in joined.groupby("seed")]
            curves, areas = zip(*(_curves(each, each["weight"].to_numpy()[None]) for each in seeds), strict=True)
            curve = np.mean(curves, axis=0)[0]
            found = np.interp(1 - SPECIFICITY, _FALSE_POSITIVES, curve)
            axes.plot([0, *_FALSE_POSITIVES], [0, *curve], color=colour, linewidth=1.3,
                      label=f"{name}\nAUC {np.mean(areas):.2f}, sensitivity {found:.2f}")
            axes.plot(1 - SPECIFICITY, found, color=colour, marker="o", markersize=5)
            if all(_fewest(each) >= LEAST_PARTICIPANTS for each in seeds):
                axes.fill_between(_FALSE_POSITIVES, *_band(seeds), color=colour, alpha=0.15, linewidth=0)
        _identity(axes, [0, 1])
        label(axes, f"false positive rate (● {SPECIFICITY:.0%} specificity)", "sensitivity", axes.get_title())
        axes.legend(loc="lower right", **LEGEND)
    return figure


def _curves(joined: pd.DataFrame, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One seed's sensitivities (draws, rates) and areas (draws,) under row weights (draws, rows); nan without pairs."""
    curves, (areas, total) = np.zeros((len(weights), len(_FALSE_POSITIVES))), np.zeros((2, len(weights)))
    for rows in joined.groupby("fold").indices.values():
        true, predicted = (joined[name].to_numpy()[rows] for name in ("true", "predicted"))
        order = np.argsort(-predicted, kind="stable")
        ends = np.flatnonzero(np.diff(predicted[order], append=np.inf))  # tied predictions share a threshold
        up, across = ((weights[:, rows] * (true == of))[:, order].cumsum(1)[:, ends] for of in (1, 0))
        pairs = up[:, -1] * across[:, -1]  # 0 if a fold or draw lacks a class
        for draw in np.flatnonzero(pairs):  # 1e-9 to the right: the upper end of a step
            curves[draw] += pairs[draw] * np.interp(_FALSE_POSITIVES + 1e-9, [0, *across[draw] / across[draw, -1]],
                                                    [0, *up[draw] / up[draw, -1]])
        areas += pairs * np.nan_to_num(auc(true, predicted, weights[:, rows]))
        total += pairs
    total[total == 0] = np.nan
    return curves / total[:, None], areas / total


def _fewest(joined: pd.DataFrame) -> int:
    """Participants of the rarer class in the folds of one seed that have both classes."""
    true, predicted, people, folds = (joined[name].to_numpy() for name in ("true", "predicted", "participant", "fold"))
    return fewest(true, predicted, people, "classification", folds)


def _band(seeds: list[pd.DataFrame]) -> np.ndarray:
    """95 % band (2, rates) of the curves, with participants and seeds drawn with replacement."""
    rng, people = np.random.default_rng(0), np.unique(pd.concat(seeds)["participant"])
    drawn = rng.multinomial(len(people), np.full(len(people), 1 / len(people)), size=DRAWS)
    curves = [_curves(each, drawn[:, np.searchsorted(people, each["participant"])] * each["weight"].to_numpy())[0]
              for each in seeds]
    shares = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=DRAWS) / len(seeds)
    return np.nanquantile(np.einsum("ds,sdr->dr", shares, curves), [0.025, 0.975], axis=0)


def calibration(table: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw a calibration curve for two classes: the observed frequency of class 1 against its predicted probability.

    There are two to ten bins of equally many rows, about twenty participants or more in each if there are at least
    forty. In the curve every row counts equally (someone with two labels twice), in the legend's Brier score every
    participant.
    """
    need(table, "predictions", ["true", "predicted"])
    figure, panels = _panels(table, title, note)
    for axes, group in panels:
        for name, colour, joined in _by_distribution(group):
            given, people = expit(joined["predicted"]), joined["participant"].nunique()
            found, stated = calibration_curve(joined["true"], given, strategy="quantile",
                                              n_bins=int(np.clip(people // 20, 2, 10)))
            score = brier_score_loss(joined["true"], given, sample_weight=joined["weight"])
            axes.plot(stated, found, color=colour, linewidth=1.2, marker="o", markersize=4,
                      label=f"{name}\nBrier {score:.2f}")
        _identity(axes, [0, 1])
        label(axes, "predicted probability of class 1", "observed share of class 1", axes.get_title())
        axes.legend(loc="best", **LEGEND)
    return figure


def scatter(table: pd.DataFrame, task: str = "", title: str = "", note: str = "") -> Figure:
    """Draw predicted against true numbers, with the identity and a dashed fitted line: a slope below 1 is bias.

    Args:
        task: sets the axes' unit (`kit.show.wording.UNITS`), and the title if none is given.
    """
    need(table, "predictions", ["true", "predicted"])
    figure, panels = _panels(table, title or readable(task), note)
    ends = [table[["true", "predicted"]].min(axis=None), table[["true", "predicted"]].max(axis=None)]
    for axes, group in panels:
        for name, colour, joined in _by_distribution(group):
            true, predicted, weight = joined["true"], joined["predicted"], joined["weight"]
            error = mean_absolute_error(true, predicted, sample_weight=weight)
            words = f"{name}\nerror {error:.1f} {UNITS.get(task, '')}".rstrip()
            if true.nunique() > 1:
                slope, start = np.polyfit(true, predicted, 1, w=np.sqrt(weight))
                span = np.array([true.min(), true.max()])
                axes.plot(span, start + slope * span, color=colour, linestyle="--", linewidth=1.6,
                          path_effects=[withStroke(linewidth=3, foreground="white")])
                words += f", slope {round(slope, 2) + 0:.2f}"
            axes.scatter(true, predicted, s=12, alpha=0.6, color=colour, linewidth=0, label=words)
        _identity(axes, ends)
        label(axes, in_units("true", task), in_units("predicted", task), axes.get_title())
        axes.legend(loc="upper left", **LEGEND)
        axes.set_ylim(top=ends[1] + 0.3 * (ends[1] - ends[0]))  # room for the legend
    return figure


def confusion(table: pd.DataFrame, classes: Sequence[str] | None = None, title: str = "", note: str = "") -> Figure:
    """Draw confusion matrices as shares of the true class: a panel per encoder, mode and distribution.

    Args:
        classes: their names, in the order of the numbers.
    """
    need(table, "predictions", ["true", *predicted_columns(table)])
    count = max(2, len(predicted_columns(table)))
    classes = [str(number) for number in range(count)] if classes is None else classes
    if len(classes) != count:
        raise ValueError(f"classes: {len(classes)} names, {', '.join(classes)}; the predictions are of {count} classes")
    figure, panels = _panels(table, title, note, by=("encoder", "mode", "distribution"))
    for axes, group in panels:
        (name, _, joined), = _by_distribution(group)
        chosen = _probabilities(joined).argmax(axis=1)
        ConfusionMatrixDisplay.from_predictions(
            joined["true"].astype(int), chosen, labels=range(count), display_labels=list(map(readable, classes)),
            sample_weight=joined["weight"], normalize="true", values_format=".2f", cmap="Blues", colorbar=False,
            ax=axes, im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": TEXT})
        if max(map(len, classes)) > 4:
            axes.set_xticks(range(count), [each.get_text() for each in axes.get_xticklabels()], rotation=30, ha="right",
                            rotation_mode="anchor")
        heading = axes.get_title()
        label(axes, "predicted", "true", f"{heading}\n{name}" if heading else name)
        axes.spines[["top", "right"]].set_visible(True)
    return figure


def worst_errors(table: pd.DataFrame, store: Store, count: int = 6, task: str = "",
                 classes: Sequence[str] | None = None, title: str = "", note: str = "") -> Figure:
    """Draw the scans of the participants with the largest errors, in three planes, titled with truth and prediction.

    The error is the distance to the true number, or 1 minus the true class's probability. Predictions are averaged
    over seeds, and each participant is shown by the scan with the largest error.

    Args:
        table: as elsewhere, but for one encoder, mode and distribution, and with `scan`.
        store: holds these scans.
        task: sets the unit of a number.
        classes: their names, in the order of the numbers; None: predictions are numbers.

    Raises:
        ValueError: the table holds several encoders, modes or distributions, a scan that the store lacks, or labels of
            two classes (0 and 1) without `classes`: log-odds are no distance from these.
    """
    need(table, "predictions", ["scan", "true", *predicted_columns(table)])
    if classes is None and set(table["true"]) <= {0, 1}:
        raise ValueError("predictions: the labels are 0 and 1 only; name the two classes in `classes`")
    need_one(table, "predictions", [*_ONE_CELL, "encoder", "mode", "distribution"])
    if unknown := sorted(set(table["scan"]) - set(store.index["scan"])):
        raise ValueError(f"predictions: {len(unknown)} scans are not in {store.folder}, the first is {unknown[0]}; "
                         "select the distribution that was tested on this store")
    columns = predicted_columns(table)
    scans = table.assign(who=_who(table)).groupby(["who", "scan", "true"], as_index=False)[columns].mean()
    if classes is None:
        scans["error"] = (scans["predicted"] - scans["true"]).abs()
        scans["words"] = [f"true {row.true:.1f}, predicted {row.predicted:.1f} {UNITS.get(task, '')}".rstrip()
                          for row in scans.itertuples()]
    else:
        given, true = _probabilities(scans), scans["true"].astype(int)
        scans["error"] = 1 - given[np.arange(len(scans)), true]
        scans["words"] = [f"true {classes[of]}, predicted {classes[each.argmax()]} ({each.max():.2f})"
                          for of, each in zip(true, given, strict=True)]
    worst = scans.sort_values("error", ascending=False, kind="stable").drop_duplicates("who").head(count)
    return montage([store.read(scan)[0] for scan in worst["scan"]], store.grid,
                   [f"{row.who}\n{textwrap.fill(row.words, 48)}" for row in worst.itertuples()], note, title,
                   tuple(PLANES))


def embedding_maps(embeddings: Mapping[str, np.ndarray], labels: pd.DataFrame, title: str = "",
                   note: str = "") -> Figure:
    """Draw each encoder's embeddings on their first two principal components, coloured by each label.

    Args:
        embeddings: (scans, features) by the encoder's name, a row of panels each.
        labels: one row per scan, a column of panels each; more than two distinct numbers get a colour bar, anything
            else a legend. Scans without a value are grey.
    """
    names = list(labels.columns)
    figure = blank(max(400, 260 * len(names)), 250 * len(embeddings) + 30, title, note)
    panels = figure.subplots(len(embeddings), len(names), squeeze=False)
    for row, (encoder, values) in zip(panels, embeddings.items(), strict=True):
        fit = PCA(n_components=2, random_state=0)
        points = fit.fit_transform(values)
        first, second = 100 * fit.explained_variance_ratio_
        for axes, name in zip(row, names, strict=True):
            _coloured(axes, points, labels[name].reset_index(drop=True), name)
            label(axes, f"component 1 ({first:.0f} %)", f"component 2 ({second:.0f} %)", encoder)
    return figure


def _coloured(axes: Axes, points: np.ndarray, values: pd.Series, name: str) -> None:
    """Scatter points coloured by a number or a category."""
    known = values.notna().to_numpy() & (values.astype(str) != "").to_numpy()
    axes.scatter(points[~known, 0], points[~known, 1], s=8, color="0.8")
    points, values = points[known], values[known].reset_index(drop=True)
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 2:
        bar = axes.figure.colorbar(axes.scatter(points[:, 0], points[:, 1], c=values, s=12), ax=axes)
        bar.set_label(name, fontsize=TEXT)
        bar.ax.tick_params(labelsize=TEXT - 1)
    else:
        for value, rows in values.groupby(values).groups.items():
            axes.scatter(points[rows, 0], points[rows, 1], s=12, label=str(value))
        axes.legend(title=name, **LEGEND)


def _panels(table: pd.DataFrame, title: str, note: str,
            by: Sequence[str] = ("encoder", "mode")) -> tuple[Figure, Iterator[tuple[Axes, pd.DataFrame]]]:
    """Make a square panel for each combination of these columns' values, titled by them, and pair it with its rows."""
    need_one(table, "predictions", _ONE_CELL)
    order = pd.factorize(table["distribution"], sort=True)[0] if "distribution" in table.columns else 0
    table = table.assign(colour=[f"C{each}" for each in np.broadcast_to(order, len(table))])  # the same in each panel
    names = [name for name in by if name in table.columns and table[name].nunique() > 1]
    groups = list(table.groupby(names, sort=False)) if names else [((), table)]
    columns = min(IN_A_ROW, len(groups))
    rows = math.ceil(len(groups) / columns)
    wide = {1: 460, 2: 720, 3: MAX_WIDTH}[columns]
    figure = blank(wide, rows * wide / columns, title, note)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(groups):]:
        axes.set_visible(False)
    for axes, (values, _) in zip(panels, groups, strict=False):
        axes.set_title(", ".join(readable(value) for name, value in zip(names, values, strict=True)
                                 if name != "distribution" and value != "baseline"))
        axes.set_aspect("equal")
    return figure, zip(panels, (group for _, group in groups), strict=False)


def _by_distribution(group: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield each distribution's name with its number of participants, its colour, and its rows after `_joined`."""
    for name, rows in group.groupby("distribution") if "distribution" in group.columns else [("", group)]:
        joined = _joined(rows)
        words = ", ".join(filter(None, (readable(name), f"n = {joined['participant'].nunique()}")))
        yield words, rows["colour"].iloc[0], joined


def _joined(rows: pd.DataFrame) -> pd.DataFrame:
    """Average scans to one row per participant, label and model: participant, true, weight, predictions, seed, fold.

    Weights sum to 1 per participant.
    """
    parts: list[pd.DataFrame] = []
    rows = rows.assign(who=_who(rows), **{name: 0 for name in ("seed", "fold") if name not in rows.columns})
    for (seed, fold), of_model in rows.groupby(["seed", "fold"]):
        joined = per_participant(of_model["true"], predicted_of(of_model), of_model["who"])
        parts.append(joined.assign(seed=seed, fold=fold, model=len(parts)))
    whole = pd.concat(parts, ignore_index=True)
    models = whole.groupby("participant")["model"].transform("nunique")
    return whole.assign(weight=whole["weight"] / models)


def _who(rows: pd.DataFrame) -> pd.Series | np.ndarray:
    if "alias_of" in rows.columns or {"dataset", "participant"} <= set(rows.columns):
        return participant_ids(rows)
    if "participant" in rows.columns:
        return rows["participant"]
    return rows.groupby("seed").cumcount() if "seed" in rows.columns else np.arange(len(rows))  # seeds' rows are alike


def _probabilities(rows: pd.DataFrame) -> np.ndarray:
    """Convert log-odds or logits to probabilities (rows, classes)."""
    logits = rows[predicted_columns(rows)].to_numpy(np.float64)
    return softmax(np.hstack([0 * logits, logits]) if logits.shape[1] == 1 else logits, axis=1)


def _identity(axes: Axes, ends: Sequence[float]) -> None:
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set_aspect("equal")
