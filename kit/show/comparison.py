"""The benchmark's figures and tables: encoders against chance, baselines and each other.

Inputs are `scores` and `differences` as `kit.evaluate` writes them (`scores.csv`, `differences.csv`), with intervals
over participants and seeds. `title` and `note`: see `kit.show.figure.blank`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.evaluate.metrics import FLAT, LEAST_PARTICIPANTS
from kit.show.figure import MAX_WIDTH, TEXT, blank, label, shared_legend
from kit.show.wording import in_units, need, need_one, readable, with_interval

BASELINES = ("guess", "demographics", "site", "volumes", "voxels", "random init")  # an encoder has to beat these
BLIND = ("guess", "demographics", "site")  # rows that see no scan
MODES = {"probe": "Linear probe on frozen features", "finetune": "All weights trained",
         "baseline": "Without an encoder"}
METRIC_WORDS = {"auc": "AUC, higher is better", "mean_absolute_error": "mean absolute error, lower is better"}
ERRORS = ("mean_absolute_error",)  # lower is better
SIGNIFICANT = 0.05  # for p after Holm's correction
PAGE = 130  # characters per line of the summary
_CELL = ["encoder", "mode", "task", "label_fraction", "metric", "distribution"]
_PANEL = ["task", "metric", "distribution", "label_fraction"]


def forest(differences: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw an encoder's difference from each rival with its interval: a panel per task and test set, AUC first.

    Right of zero the encoder is better; for errors the sign is flipped. Markers are filled where p < .05 after Holm's
    correction. The right margin gives the numbers of participants and seeds.

    Args:
        differences: for one encoder, mode and label fraction: `encoder, rival, task, mode, label_fraction,
            distribution, metric, difference` (encoder minus rival), `low, high` (nan without an interval), `p_holm,
            participants, seeds`.

    Raises:
        ValueError: a column is missing, or there are several encoders, modes or label fractions.
    """
    need(differences, "differences", [*_CELL, "rival", "difference", "low", "high", "p_holm", "participants", "seeds"])
    need_one(differences, "differences", ["encoder", "mode", "label_fraction"])
    encoder, mode, fraction = differences.iloc[0][["encoder", "mode", "label_fraction"]]
    rivals, tested = ordered(differences["rival"]), list(differences["distribution"].unique())
    columns = min(2, len(tested))
    rows = math.ceil(len(tested) / columns)  # of panels per task
    tasks = sorted(differences.groupby(["metric", "task"], sort=False), key=lambda each: each[0][0] in ERRORS)
    title = title or f"{encoder} against each rival ({MODES[mode].lower()}, {100 * fraction:g}% of the labels)"
    figure = blank(MAX_WIDTH if columns > 1 else 560, (17 * len(rivals) + 66) * rows * len(tasks) + 20,
                   f"{title}\n● p < .05 after Holm's correction, ○ otherwise", note)
    panels = figure.subplots(rows * len(tasks), columns, squeeze=False).reshape(len(tasks), rows * columns)
    for ((metric, task), of_task), row in zip(tasks, panels, strict=True):
        widest = _towards_better(of_task).abs().max(axis=None)
        widest = widest if widest > 0 else 1.0  # nan: no pair has a difference; 0: all are equal
        for axes in row[len(tested):]:
            axes.set_visible(False)
        for number, (where, axes) in enumerate(zip(tested, row, strict=False)):
            here = of_task[of_task["distribution"] == where].set_index("rival")
            _forest_panel(axes, here, rivals)
            axes.set_yticks(range(len(rivals)), rivals if number % columns == 0 else [""] * len(rivals))
            axes.set_xlim(-1.08 * widest, 1.08 * widest)
            unit = "AUC" if metric == "auc" else in_units(readable(metric), task)
            label(axes, f"◂ rival better        encoder better ▸\ndifference of {unit}", "",
                  f"{readable(task)}, {readable(where)}")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return figure


def _forest_panel(axes: Axes, here: pd.DataFrame, rivals: list[str]) -> None:
    axes.axvline(0, color="grey", linewidth=0.8)
    for place, rival in enumerate(rivals):
        if rival not in here.index:
            continue
        row = here.loc[[rival]]
        low, value, high = _towards_better(row).iloc[0]
        axes.plot([low, high], [place, place], color="C0", linewidth=1.2)
        axes.plot(value, place, color="C0", marker="o", markersize=5,
                  markerfacecolor="C0" if row["p_holm"].iloc[0] < SIGNIFICANT else "white")
        axes.text(1.02, place, f"{row['participants'].iloc[0]:.0f}, {row['seeds'].iloc[0]:.0f}", va="center",
                  transform=axes.get_yaxis_transform(), fontsize=TEXT - 1, color="#555555")
    axes.text(1.02, -1, "n, seeds", va="center", transform=axes.get_yaxis_transform(), fontsize=TEXT - 1,
              color="#555555")
    axes.set_ylim(len(rivals) - 0.4, -0.6)  # the first row at the top


def _towards_better(differences: pd.DataFrame) -> pd.DataFrame:
    """Columns low, difference and high, signed so that above 0 the encoder is better."""
    columns = ["low", "difference", "high"]
    turned = differences[columns[::-1]].mul(-1).set_axis(columns, axis=1)
    return differences[columns].where(~differences["metric"].isin(ERRORS), turned)


def ordered(names: Iterable[str]) -> list[str]:
    """Sort unique names: first what an encoder has to beat, then supervised, MAE, and the rest in their given order."""
    def rank(name: str) -> int:
        if name in BASELINES:
            return BASELINES.index(name)
        families = [name.lower().startswith(family) for family in ("supervised", "mae")]
        return len(BASELINES) + (families.index(True) if any(families) else len(families))
    return sorted(dict.fromkeys(names), key=rank)


def scores_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Pivot scores to a row per comparison and a column per encoder or baseline, as text "0.84 [0.77, 0.90]".

    "[–]" is a missing interval, an empty cell a missing score. Baselines are repeated for every mode. The rows' index:
    task, metric, distribution, mode, label fraction, participants tested (the largest number; cells with fewer say so).

    Args:
        scores: `encoder, mode, task, label_fraction, metric, distribution, value, low, high, participants`.

    Raises:
        ValueError: a column is missing, or a cell has several scores.
    """
    cells = _cells(scores)
    fewer = cells["participants"] < cells["most"]
    cells["text"] += [f" (n = {number:.0f})" if less else ""
                      for number, less in zip(cells["participants"], fewer, strict=True)]
    cells["participants"] = cells["most"]
    rows = ["task", "metric", "distribution", "mode", "label_fraction", "participants"]
    return cells.pivot(index=rows, columns="encoder", values="text").fillna("")[ordered(cells["encoder"])]


def as_markdown(table: pd.DataFrame) -> str:
    """Format a table as Markdown; levels of a multi-level heading are joined by commas."""
    flat = _flat(table)
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in [list(flat.columns), *flat.to_numpy().tolist()]]
    escaped.insert(1, ["---"] * flat.shape[1])
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def as_latex(table: pd.DataFrame) -> str:
    """Format a table as a LaTeX `tabular` for the package booktabs; text is escaped."""
    return _flat(table).to_latex(index=False, escape=True, column_format="l" * _flat(table).shape[1])


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Turn the index into columns and everything into text."""
    table = table.copy()
    if table.columns.nlevels > 1:
        table.columns = [", ".join(map(_plain, names)) for names in table.columns]
    flat = table.reset_index().map(_plain)
    return flat.set_axis([_plain(name) for name in flat.columns], axis=1)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else readable(value)


def summary(scores: pd.DataFrame, differences: pd.DataFrame, note: str = "") -> str:
    """Summarise the main result as text, at most 130 characters wide, with one sentence on what it shows.

    For each mode, at its largest label fraction: the scores, baselines first; then the differences of the reference
    encoder, which is the first in `differences`. The sentence counts all its differences, whichever side they favour.

    Args:
        scores: as for `scores_table`, with `converged` (False: longer training improves the validation score;
            empty: no verdict), `models` and `flat`; see `kit.evaluate.benchmark.run_benchmark`.
        differences: as for `forest`, for any number of encoders, modes and label fractions; may be empty.
        note: a remark on the data, such as "procedural data".
    """
    need(scores, "scores", [*_CELL, "converged", "models", "flat"])
    about, cells = f" ({note})" if note else "", _cells(scores)
    lines = [f"Main result{about}: score [95 % interval over participants and seeds]"]
    reference = differences["encoder"].iloc[0] if len(differences) else None
    for mode in [each for each in MODES if each in set(cells["mode"])]:
        of_mode = cells[cells["mode"] == mode]
        fraction = of_mode["label_fraction"].max()
        lines += ["", f"{MODES[mode]}, {100 * fraction:g}% of the labels"]
        lines += _text_tables(of_mode[of_mode["label_fraction"] == fraction], METRIC_WORDS)
        chosen = differences if reference is None else differences[
            (differences["encoder"] == reference) & (differences["mode"] == mode)
            & (differences["label_fraction"] == fraction)]
        if len(chosen):
            lines += ["", f"  {reference} minus its rival [95 % interval]; * p < .05 after Holm's correction"]
            lines += _text_tables(chosen.assign(encoder=chosen["rival"], text=_difference_texts(chosen)),
                                  {name: words.replace(" is better", f": {reference} is better")
                                   .replace(", higher", ", above 0").replace(", lower", ", below 0")
                                   for name, words in METRIC_WORDS.items()})
    lines += ["", *textwrap.wrap(verdict(differences), PAGE)]
    known = scores["converged"].map(str).where(scores["converged"].notna(), "")
    tuned = scores["mode"] == "finetune"
    lacking, unchecked = _models(scores[known == "False"]), _models(scores[tuned & (known == "")])
    lines += textwrap.wrap(f"Not trained to the end (training three times as long improves the validation score by "
                           f"more than the gain's standard error): {lacking or 'none'}"
                           f"{f'; no verdict: {unchecked}' if unchecked else ''}.", PAGE)
    if len(flat := scores[tuned & (scores["flat"] > 0) & (scores["distribution"] == "in_distribution")]):
        counts = [f"{flat.at[row, 'flat']:.0f} of {flat.at[row, 'models']:.0f} models of {_models(flat.loc[[row]])}"
                  for row in flat.index]
        lines += textwrap.wrap("Fine-tuned, but predict nearly one number for everybody (in distribution; standard "
                               f"deviation below {FLAT:g} of the labels'): {'; '.join(counts)}.", PAGE)
    if scores["low"].isna().any():
        lines += textwrap.wrap(f"[–]: no interval, as there are fewer than {LEAST_PARTICIPANTS} participants (of a "
                               "class), or as every draw gives the same.", PAGE)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def verdict(differences: pd.DataFrame) -> str:
    """Say how often the first encoder is better or worse than its rivals after Holm's correction.

    Comparisons with rows that see no scan (`BLIND`) are counted on their own: they are easy to win.
    """
    if differences.empty:
        return "What it shows: nothing is compared, as there are no differences."
    encoder = differences["encoder"].iloc[0]
    own = differences[differences["encoder"] == encoder]
    tested, better = own["p_holm"].notna(), _towards_better(own)["difference"] > 0
    settled, blind = own["p_holm"] < SIGNIFICANT, own["rival"].isin(BLIND)
    untested = f"; {(~tested).sum()} further pairs have no interval, so they are not tested" if not tested.all() else ""

    def counted(which: pd.Series) -> str:
        return (f"{encoder} is better in {(which & settled & better).sum()}, worse in "
                f"{(which & settled & ~better).sum()}, and {(which & tested & ~settled).sum()} are not decided")

    groups = [(which, rivals) for which, rivals in ((~blind, "rivals that see scans"), (blind, "rows that see none"))
              if (tested & which).any()]
    parts = [f"of {(tested & which).sum()}{f' comparisons of {encoder}' if not number else ''} with {rivals}, "
             f"{counted(which)}" for number, (which, rivals) in enumerate(groups)]
    return f"What it shows: {'; '.join(parts)} (p < .05 after Holm's correction over all){untested}."


def _models(scores: pd.DataFrame) -> str:
    """List the models of these scores, with their modes, tasks and label fractions."""
    models = scores.groupby(["encoder", "mode", "task"], sort=False)["label_fraction"].unique()
    shares = {model: ", ".join(f"{100 * each:g}%" for each in sorted(fractions)) for model, fractions in models.items()}
    return "; ".join(f"{encoder} ({mode}, {readable(task)}, {listed})"
                     for (encoder, mode, task), listed in shares.items())


def _difference_texts(differences: pd.DataFrame) -> list[str]:
    return [with_interval(row.difference, row.low, row.high, _digits(row.metric), "+")
            + (" *" if row.p_holm < SIGNIFICANT else "") for row in differences.itertuples()]


def _text_tables(cells: pd.DataFrame, metrics: dict[str, str]) -> Iterator[str]:
    """Yield text tables by metric: a row per encoder, a column per task and test set, wrapped at the page width."""
    for metric, scored in sorted(cells.groupby("metric", sort=False), key=lambda each: each[0] in ERRORS):
        yield f"  {metrics.get(metric, readable(metric))}"
        names, places = ordered(scored["encoder"]), scored.groupby(["task", "distribution"], sort=False)
        columns = {}
        for (task, where), here in places:
            where = readable(where.replace("_distribution", ""))  # "in" or "out of"
            texts = here.set_index("encoder")["text"].reindex(names, fill_value="")
            tested = [f"{number:.0f}" for number in sorted({here["participants"].min(), here["participants"].max()})]
            columns[task, where] = [readable(task), f"{where}, n = {'–'.join(tested)}", *texts]
        left = max(map(len, names)) + 6
        wide = max(len(cell) for column in columns.values() for cell in column) + 2
        at_once, together = max(1, (PAGE - left) // wide), scored["distribution"].nunique()
        at_once -= at_once % together if at_once > together else 0  # keeps a task's test sets together
        listed = list(columns.values())
        for start in range(0, len(listed), at_once):
            for head, *texts in zip(["", "", *names], *listed[start:start + at_once], strict=True):
                yield f"    {head:{left - 4}s}" + "".join(f"{text:{wide}s}" for text in texts)


def label_efficiency(scores: pd.DataFrame, title: str = "", note: str = "") -> Figure:
    """Draw each metric against the label fraction: a row per task and metric, a column per distribution.

    There is a line per encoder and mode with 95 % intervals over participants and seeds: baselines dotted and grey,
    probes solid, fine-tuning dashed with open squares. The axis of an error ends at twice the largest value; longer
    intervals are cut off.

    Args:
        scores: `encoder, mode, task, metric, distribution, label_fraction` (0-1), `value`, `low` and `high`.
    """
    need(scores, "scores", [*_CELL, "value", "low", "high"])
    rows = list(scores.groupby(["task", "metric"], sort=False))
    columns, names = sorted(scores["distribution"].unique()), ordered(scores["encoder"])
    models = sorted(scores.groupby(["encoder", "mode"], sort=False).groups, key=lambda model: names.index(model[0]))
    figure = blank(360 * len(columns) + 180, 220 * len(rows) + 20, title, note)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for ((task, metric), of_task), row in zip(rows, panels, strict=True):
        for distribution, axes in zip(columns, row, strict=True):
            here = of_task[of_task["distribution"] == distribution].sort_values("label_fraction", kind="stable")
            for number, (name, mode) in enumerate(models):
                line = here[(here["encoder"] == name) & (here["mode"] == mode)]
                beside = 1 + 0.02 * (number - (len(models) - 1) / 2)  # so that error bars do not overlap
                reach = [(line["value"] - line["low"]).clip(0), (line["high"] - line["value"]).clip(0)]
                if len(line):
                    axes.errorbar(line["label_fraction"] * beside, line["value"], yerr=reach,
                                  **_style(name, mode, names))
            axes.set_xscale("log")
            axes.set_xticks(sorted(scores["label_fraction"].unique()))
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
            height = "AUC" if metric == "auc" else in_units(readable(metric), task)
            label(axes, "labels used" if row[0] is panels[-1, 0] else "", height if axes is row[0] else "",
                  f"{readable(task)}, {readable(distribution)}")
        if metric != "auc":  # an interval of a few seeds may reach ten times as far
            row[0].set_ylim(0, 2 * of_task["value"].max())
    shared_legend(figure)
    return figure


def _style(name: str, mode: str, names: list[str]) -> dict:
    if name in BASELINES:
        place = BASELINES.index(name)
        return {"color": f"{0.7 - 0.1 * place:.1f}", "linestyle": ":", "linewidth": 1, "marker": "sv^<>D"[place],
                "markersize": 4, "elinewidth": 0.6, "label": name}
    number = [each for each in names if each not in BASELINES].index(name)
    form = {"linestyle": "--", "marker": "s", "markerfacecolor": "white"} if mode == "finetune" else {"marker": "o"}
    return {"color": f"C{number}", "linewidth": 1.4, "markersize": 4, "capsize": 2, "label": f"{name}, {mode}", **form}


def _cells(scores: pd.DataFrame) -> pd.DataFrame:
    """Add `text`, and repeat baselines for each mode that has a score with the same `_PANEL`."""
    need(scores, "scores", [*_CELL, "value", "low", "high", "participants"])
    if (twice := scores[scores.duplicated(_CELL)]).size:
        raise ValueError(f"scores: {len(twice)} cells have several scores, the first {tuple(twice[_CELL].iloc[0])}; "
                         "give scores over seeds (`scores.csv`), not a score a seed (`tidy.csv`)")
    baseline = scores["mode"] == "baseline"
    parts, alone = [], scores[baseline]
    for mode, of_mode in scores[~baseline].groupby("mode", sort=False):
        beside = _panels(scores[baseline]).isin(_panels(of_mode))
        parts += [scores[baseline][beside].assign(mode=mode), of_mode]
        alone = alone[~_panels(alone).isin(_panels(of_mode))]
    cells = pd.concat([*parts, alone], ignore_index=True)
    most = cells.groupby([*_PANEL, "mode"])["participants"].transform("max")
    texts = [with_interval(row.value, row.low, row.high, _digits(row.metric))
             for row in cells.itertuples()]
    return cells.assign(text=texts, most=most.astype(int))


def _panels(scores: pd.DataFrame) -> pd.Index:
    return pd.MultiIndex.from_frame(scores[_PANEL])


def _digits(metric: str) -> int:
    return 1 if metric in ERRORS else 2
