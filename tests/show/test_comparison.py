"""The benchmark's figures and tables: what stands in them, and on which side."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kit.evaluate.metrics import LEAST_PARTICIPANTS
from kit.show.comparison import (
    PAGE,
    as_latex,
    as_markdown,
    forest,
    label_efficiency,
    ordered,
    scores_table,
    summary,
    verdict,
)

NOTE = "procedural data"
MODELS = {("SimCLR", "probe"): 0.2, ("random init", "probe"): 0.0, ("SimCLR", "finetune"): 0.3,
          ("volumes", "baseline"): 0.1, ("guess", "baseline"): 0.0}
TASKS = {"stroke": ("auc", 0.5), "age": ("mean_absolute_error", 10)}
WHERE = ("in_distribution", "out_of_distribution")


@pytest.fixture
def scores() -> pd.DataFrame:
    """The value says which row it is; guesses have no interval."""
    rows = []
    for (task, (metric, base)), where, ((encoder, mode), better), fraction in itertools.product(
            TASKS.items(), WHERE, MODELS.items(), (1.0, 0.2)):
        value = base + better + 0.1 * fraction
        low, high = (np.nan, np.nan) if encoder == "guess" else (value - 0.08, value + 0.06)
        rows.append({"encoder": encoder, "mode": mode, "task": task, "label_fraction": fraction, "metric": metric,
                     "distribution": where, "value": value, "low": low, "high": high, "participants": 120, "seeds": 2,
                     "converged": True, "models": 6, "flat": 0})
    return pd.DataFrame(rows)


@pytest.fixture
def differences() -> pd.DataFrame:
    """SimCLR's, probes on all labels: of stroke better than each rival, of age better than guessing alone."""
    rows = []
    for (task, (metric, _)), where, (rival, size, p) in itertools.product(
            TASKS.items(), WHERE, (("volumes", 0.1, 0.02), ("guess", 0.2, 0.01), ("MAE", 0.05, 0.3))):
        size = {"stroke": size, "age": -10 * size if rival == "guess" else 10 * size}[task]
        rows.append({"encoder": "SimCLR", "rival": rival, "task": task, "mode": "probe", "label_fraction": 1.0,
                     "distribution": where, "metric": metric, "difference": size, "low": size - 0.08,
                     "high": size + 0.04, "p": p / 6, "p_holm": p, "participants": 120, "seeds": 2})
    return pd.DataFrame(rows)


def points(axes) -> dict[str, tuple[list[float], bool]]:
    """rival -> interval and point from left to right, and whether the marker is filled."""
    rivals = dict(zip(axes.get_yticks(), (each.get_text() for each in axes.get_yticklabels()), strict=True))
    found = {}
    for line, marker in zip(axes.lines[1::2], axes.lines[2::2], strict=True):
        (low, high), (middle,) = line.get_xdata(), marker.get_xdata()
        found[rivals[marker.get_ydata()[0]]] = ([low, middle, high], marker.get_markerfacecolor() != "white")
    return found


def test_right_of_zero_the_encoder_is_better_also_where_the_metric_is_an_error(differences):
    figure = forest(differences, note=NOTE)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{task}, {where} distribution" for task in ("stroke", "age") for where in ("in", "out of")]
    stroke, age = points(figure.axes[0]), points(figure.axes[2])
    assert list(stroke) == ["guess", "volumes", "MAE"]  # what has to be beaten first
    np.testing.assert_allclose(stroke["volumes"][0], [0.02, 0.1, 0.14])
    np.testing.assert_allclose(age["guess"][0], [1.96, 2, 2.08])  # its difference of errors is -2 [-2.08, -1.96]
    np.testing.assert_allclose(age["volumes"][0], [-1.04, -1, -0.92])  # years worse
    assert "rival better        encoder better" in figure.axes[0].get_xlabel()
    assert [figure.axes[place].get_xlabel().splitlines()[1] for place in (0, 2)] == [
        "difference of AUC", "difference of mean absolute error (years)"]
    left, right = figure.axes[2].get_xlim()
    assert left == -right and right > 2.08
    unknown = differences.assign(difference=np.nan, low=np.nan, high=np.nan)
    assert forest(unknown).axes[0].get_xlim() == pytest.approx((-1.08, 1.08))  # no participant has both models' scores
    assert figure.get_supxlabel() == NOTE


def test_a_marker_is_filled_where_holm_leaves_a_difference(differences):
    assert {name: filled for name, (_, filled) in points(forest(differences).axes[0]).items()} == {
        "guess": True, "volumes": True, "MAE": False}
    differences.loc[differences["rival"] == "volumes", ["low", "high", "p", "p_holm"]] = np.nan
    bare = points(forest(differences).axes[0])["volumes"]
    assert not bare[1] and bare[0][1] == pytest.approx(0.1) and np.isnan(bare[0][0])


def test_the_margin_says_how_many_participants_and_seeds(differences):
    differences.loc[differences["rival"] == "volumes", "participants"] = 118
    texts = {text.get_position()[1]: text.get_text() for text in forest(differences).axes[0].texts}
    assert texts == {0: "120, 2", 1: "118, 2", 2: "120, 2", -1: "n, seeds"}


def test_a_rival_that_a_test_set_lacks_leaves_its_row_empty(differences):
    gone = (differences["rival"] == "volumes") & (differences["distribution"] == "out_of_distribution")
    figure = forest(differences[~gone])
    assert len(figure.axes[0].lines) == 7 and len(figure.axes[1].lines) == 5
    assert [marker.get_ydata()[0] for marker in figure.axes[1].lines[2::2]] == [0, 2]


def test_three_test_sets_stand_in_two_columns(differences):
    third = differences[differences["distribution"] == "in_distribution"].assign(distribution="AIBL")
    shown = [axes.get_title() for axes in forest(pd.concat([differences, third])).axes if axes.get_visible()]
    assert shown == [f"{task}, {where}" for task in TASKS for where in ("in distribution", "out of distribution",
                                                                      "AIBL")]


def test_a_forest_is_of_one_encoder_and_mode(differences):
    with pytest.raises(ValueError, match="differences holds several of mode: probe, finetune; select one"):
        forest(pd.concat([differences, differences.assign(mode="finetune")]))
    with pytest.raises(ValueError, match="differences lacks p_holm"):
        forest(differences.drop(columns="p_holm"))


def test_what_has_to_be_beaten_comes_first():
    names = ["SimCLR", "MAE deep", "random init", "supervised ViT", "volumes", "guess", "SimCLR", "another"]
    assert ordered(names) == ["guess", "volumes", "random init", "supervised ViT", "MAE deep", "SimCLR", "another"]


def test_the_table_has_every_score_and_baselines_beside_every_mode(scores):
    table = scores_table(scores)
    assert list(table.columns) == ["guess", "volumes", "random init", "SimCLR"]
    assert table.index.names == ["task", "metric", "distribution", "mode", "label_fraction", "participants"]
    assert len(table) == 2 * 2 * 2 * 2
    row = ("stroke", "auc", "in_distribution", "probe", 0.2, 120)
    assert list(table.loc[row]) == ["0.52 [–]", "0.62 [0.54, 0.68]", "0.52 [0.44, 0.58]", "0.72 [0.64, 0.78]"]
    tuned = ("age", "mean_absolute_error", "out_of_distribution", "finetune", 1.0, 120)
    assert list(table.loc[tuned]) == ["10.1 [–]", "10.2 [10.1, 10.3]", "", "10.4 [10.3, 10.5]"]
    assert (table == "").sum().to_dict() == {"guess": 0, "volumes": 0, "random init": 8, "SimCLR": 0}


def test_a_baseline_that_stands_beside_nothing_keeps_its_row(scores):
    table = scores_table(scores[(scores["mode"] == "baseline") | (scores["label_fraction"] == 1)])
    alone = table.xs("baseline", level="mode")
    assert set(alone.index.get_level_values("label_fraction")) == {0.2} and (alone["SimCLR"] == "").all()
    assert set(scores_table(scores[scores["mode"] == "baseline"]).index.get_level_values("mode")) == {"baseline"}


def test_a_cell_with_fewer_participants_says_so(scores, differences):
    scores.loc[scores["encoder"] == "volumes", "participants"] = 117
    table = scores_table(scores)
    assert len(table) == 16 and table["volumes"].str.endswith(" (n = 117)").all()
    assert not table["SimCLR"].str.contains("n =").any()
    assert "    in, n = 117–120" in summary(scores, differences[:0])


def test_scores_by_seed_are_refused(scores):
    with pytest.raises(ValueError, match=r"scores: 40 cells have several scores.*give scores over seeds"):
        scores_table(pd.concat([scores, scores]))
    with pytest.raises(ValueError, match="scores lacks participants"):
        scores_table(scores.drop(columns="participants"))


def test_markdown_and_latex_have_every_cell(scores):
    table = scores_table(scores.replace("volumes", "50 % & a|b_c"))
    lines = as_markdown(table).splitlines()
    assert lines[0].startswith("| task | metric | distribution | mode | label fraction | participants | guess | ")
    assert r"| 50 % & a\|b c |" in lines[0] and lines[1] == "|" + " --- |" * 10
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    assert [row[6:] for row in rows] == table.to_numpy().tolist() and rows[0][4] == "0.2"

    latex = as_latex(table)
    head, *body = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r" \\")]
    assert r"50 \% \& a|b c" in head and len(body) == 16
    assert [[cell.strip() for cell in line.split(" & ")][6:] for line in body] == table.to_numpy().tolist()
    rules = [line for line in latex.splitlines() if line.startswith("\\")]
    assert rules == [r"\begin{tabular}{llllllllll}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]


def test_a_turned_table_joins_its_headings(scores):
    first = as_markdown(scores_table(scores).T).splitlines()[0]
    assert first.startswith("| encoder | age, mean absolute error, in distribution, finetune, 0.2, 120 | ")


def test_the_printed_summary(scores, differences):
    text = summary(scores, differences, NOTE)
    assert text.startswith("""\
Main result (procedural data): score [95 % interval over participants and seeds]

Linear probe on frozen features, 100% of the labels
  AUC, higher is better
                 stroke             stroke
                 in, n = 120        out of, n = 120
    guess        0.60 [–]           0.60 [–]
    volumes      0.70 [0.62, 0.76]  0.70 [0.62, 0.76]
    random init  0.60 [0.52, 0.66]  0.60 [0.52, 0.66]
    SimCLR       0.80 [0.72, 0.86]  0.80 [0.72, 0.86]
  mean absolute error, lower is better
""")
    assert """
  SimCLR minus its rival [95 % interval]; * p < .05 after Holm's correction
  AUC, above 0: SimCLR is better
             stroke                  stroke
             in, n = 120             out of, n = 120
    guess    +0.20 [+0.12, +0.24] *  +0.20 [+0.12, +0.24] *
    volumes  +0.10 [+0.02, +0.14] *  +0.10 [+0.02, +0.14] *
    MAE      +0.05 [-0.03, +0.09]    +0.05 [-0.03, +0.09]
  mean absolute error, below 0: SimCLR is better
""" in text
    assert summary(scores[::-1], differences).index("Linear probe") < summary(scores[::-1], differences).index("All w")
    assert "\nAll weights trained, 100% of the labels\n" in text and "nan" not in text
    assert text.count("minus its rival") == 1  # nothing is compared of what was fine-tuned
    assert f"\n[–]: no interval, as there are fewer than {LEAST_PARTICIPANTS} participants (of a class)" in text


def test_the_sentence_counts_wins_and_losses(differences):
    assert verdict(differences) == (
        "What it shows: of 8 comparisons of SimCLR with rivals that see scans, SimCLR is better in 2, worse in 2, and "
        "4 are not decided; of 4 with rows that see none, SimCLR is better in 4, worse in 0, and 0 are not decided (p "
        "< .05 after Holm's correction over all).")
    others = differences.assign(encoder="MAE", rival="SimCLR", difference=1.0)
    assert verdict(pd.concat([differences, others])) == verdict(differences)
    differences.loc[differences["task"] == "stroke", ["difference", "low", "high"]] *= -1
    assert "of 8 comparisons of SimCLR with rivals that see scans, SimCLR is better in 0, worse in 4, and 4 are" in (
        verdict(differences))
    assert "of 4 with rows that see none, SimCLR is better in 2, worse in 2, and 0 are" in verdict(differences)
    only = differences[differences["rival"] == "guess"]
    assert verdict(only).startswith("What it shows: of 4 comparisons of SimCLR with rows that see none, SimCLR is ")
    differences.loc[differences["rival"] == "MAE", "p_holm"] = np.nan
    said = verdict(differences)
    assert "of 4 comparisons" in said and "not decided (p < .05 after Holm's correction over all); 4 further" in said
    assert "; 4 further pairs have no interval, so they are not tested" in said
    assert "nothing is compared" in verdict(differences[:0])


def test_the_summary_names_what_is_not_trained_to_the_end(scores, differences):
    assert "standard error): none.\n" in summary(scores, differences)
    scores["converged"] = scores["converged"].astype(object)
    scores.loc[scores["mode"] == "baseline", "converged"] = np.nan  # nothing to train
    scores.loc[(scores["mode"] == "finetune") & (scores["task"] == "age"), "converged"] = False
    text = " ".join(summary(scores, differences).split())  # folded at the page
    assert "standard error): SimCLR (finetune, age, 20%, 100%). [–]" in text
    scores.loc[(scores["mode"] == "finetune") & (scores["task"] == "stroke"), "converged"] = None
    text = " ".join(summary(scores, differences).split())
    assert "(finetune, age, 20%, 100%); no verdict: SimCLR (finetune, stroke, 20%, 100%). [–]" in text


def test_the_summary_counts_models_that_tell_people_hardly_apart(scores, differences):
    assert "one number" not in summary(scores, differences)
    age = (scores["task"] == "age") & (scores["mode"] == "finetune") & (scores["label_fraction"] == 0.2)
    scores.loc[age, "flat"] = 2
    scores.loc[scores["task"] == "stroke", "flat"] = np.nan  # classes
    text = " ".join(summary(scores, differences).split())
    assert "below 0.2 of the labels'): 2 of 6 models of SimCLR (finetune, age, 20%). [–]" in text


def test_the_summary_keeps_to_the_page(scores, differences):
    tasks = [f"a task of number {number}" for number in range(4)]
    scores, differences = (pd.concat([table[table["task"] == "stroke"].assign(task=task) for task in tasks])
                           for table in (scores, differences))
    lines = summary(scores, differences).splitlines()
    assert 100 < max(map(len, lines)) <= PAGE
    heads = [line.split("a task of number ")[1:] for line in lines if "a task of number" in line]
    assert all(len(head) % 2 == 0 for head in heads)  # both test sets of a task stand side by side
    assert [int(each) for head in heads for each in head][:8] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_label_efficiency_has_a_panel_per_task_and_distribution(scores):
    figure = label_efficiency(scores, note=NOTE)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{task}, {where} distribution" for task in ("stroke", "age") for where in ("in", "out of")]
    assert [axes.get_ylabel() for axes in figure.axes] == ["AUC", "", "mean absolute error (years)", ""]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "labels used", "labels used"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "guess", "volumes", "random init", "SimCLR, probe", "SimCLR, finetune"]
    lines = {drawn.get_label(): drawn for drawn in figure.axes[0].containers}
    line, _, (bars,) = lines["SimCLR, probe"]
    np.testing.assert_allclose(line.get_xydata()[:, 0], [0.2, 1], rtol=0.05)  # sorted, and a little beside each other
    np.testing.assert_allclose(line.get_xydata()[:, 1], [0.72, 0.8])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [0.64, 0.78])
    assert [lines[name][0].get_marker() for name in ("SimCLR, probe", "SimCLR, finetune")] == ["o", "s"]
    assert figure.axes[2].get_ylim() == (0, pytest.approx(2 * scores.query("task == 'age'")["value"].max()))
    assert [lines[name][0].get_linestyle() for name in ("volumes", "SimCLR, probe", "SimCLR, finetune")] == [
        ":", "-", "--"]
    line, _, (bars,) = lines["guess"]
    assert np.isfinite(line.get_xydata()).all()
    assert not any(np.isfinite(bar).any() for bar in bars.get_segments())
    assert figure.get_supxlabel() == NOTE


def test_pyplot_keeps_no_figure(scores, differences):
    label_efficiency(scores)
    forest(differences)
    assert plt.get_fignums() == []
