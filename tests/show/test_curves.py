"""Curves and tables: the numbers that stand in them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from kit.evaluate.metrics import LEAST_PARTICIPANTS, score
from kit.show.curves import (
    benchmark_table,
    embedding_map,
    label_efficiency,
    predictions,
    summary,
    training_curves,
    with_interval,
)

NOTE = "procedural data"
COMPARED = (("simclr", "probe", 0.2), ("random", "probe", 0.0), ("simclr", "finetune", 0.3))


@pytest.fixture
def tidy() -> pd.DataFrame:
    """Two seeds; the value says which row it is."""
    rows = []
    for task, metric, base in (("stroke", "auc", 0.5), ("age", "mean_absolute_error", 10)):
        for distribution in ("in_distribution", "out_of_distribution"):
            for encoder, mode, better in COMPARED:
                for fraction in (1.0, 0.2):
                    for seed in (0, 1):
                        value = base + better + 0.1 * fraction + 0.02 * seed
                        rows.append({"encoder": encoder, "mode": mode, "task": task, "metric": metric,
                                     "distribution": distribution, "label_fraction": fraction, "seed": seed,
                                     "value": value, "low": value - 0.08, "high": value + 0.06, "participants": 120})
    return pd.DataFrame(rows)


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_training_curves_draw_what_the_log_has():
    log = pd.DataFrame({"epoch": [0, 1, 2], "train_loss": [3.0, 2, 1], "validation_loss": [3.5, np.nan, 1.5],
                        "learning_rate": [1e-3, 5e-4, 0], "seconds": [6.0, 5, 5.5]})
    figure = training_curves(log, note=NOTE)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "seconds per epoch"]
    assert names(figure.axes[0]) == ["train loss", "validation loss"]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xydata(), [[0, 3.5], [2, 1.5]])
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [1e-3, 5e-4, 0])
    assert figure.axes[2].get_ylim()[0] == 0
    assert figure.get_supxlabel() == NOTE
    assert len(training_curves(log[["epoch", "train_loss"]]).axes) == 1
    lines = training_curves(log.assign(mean_scan_loss=2.0)).axes[0].lines
    assert {line.get_label(): line.get_linestyle() for line in lines} == {
        "train loss": "-", "validation loss": "-", "mean scan loss": "--"}
    with pytest.raises(ValueError, match="log lacks loss; its columns are epoch, seconds"):
        training_curves(log[["epoch", "seconds"]])
    with pytest.raises(ValueError, match="no rows"):
        training_curves(log[:0])


def test_label_efficiency_has_a_panel_per_task_and_distribution(tidy):
    figure = label_efficiency(tidy, note=NOTE)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{task}, {where} distribution" for task in ("stroke", "age") for where in ("in", "out of")]
    assert [axes.get_ylabel() for axes in figure.axes] == ["AUC", "", "mean absolute error (years)", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["simclr, probe", "random, probe",
                                                                         "simclr, finetune"]
    line, _, (bars,) = figure.axes[0].containers[0]
    np.testing.assert_allclose(line.get_xydata()[:, 0], [0.2, 1], rtol=0.05)  # sorted, and a little beside each other
    np.testing.assert_allclose(line.get_xydata()[:, 1], [0.73, 0.81])  # means over the two seeds
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [0.65, 0.79])
    assert figure.axes[0].containers[2][0].get_linestyle() == "--"
    assert figure.get_supxlabel() == NOTE


def test_benchmark_table_reads_as_text(tidy):
    table = benchmark_table(tidy)
    assert list(table.columns) == ["simclr", "random"]
    row = ("stroke", "auc", "in_distribution", "probe", 0.2, 120)
    assert table.loc[row, "simclr"] == "0.73 [0.65, 0.79]"
    age = ("age", "mean_absolute_error", "out_of_distribution", "probe", 1.0, 120)
    assert table.loc[age, "random"] == "10.1 [10.0, 10.2]"
    assert table.loc[("stroke", "auc", "in_distribution", "finetune", 1.0, 120), "random"] == ""
    assert table.index.names[-1] == "participants" and len(table) == 16
    with pytest.raises(ValueError, match="tidy lacks participants"):
        benchmark_table(tidy.drop(columns="participants"))


def test_the_printed_summary(tidy):
    head = " " * 36 + "simclr              random\n"
    assert summary(tidy, NOTE).startswith(f"""\
Main result (procedural data): mean over seeds [95 % interval over test participants]

Linear probe on frozen features, 100% of the labels, in and out of distribution
{head}  AUC, higher is better
    stroke, in             n = 120  0.81 [0.73, 0.87]   0.61 [0.53, 0.67]
    stroke, out of         n = 120  0.81 [0.73, 0.87]   0.61 [0.53, 0.67]
  mean absolute error, lower is better
    age, in                n = 120  10.3 [10.2, 10.4]   10.1 [10.0, 10.2]
    age, out of            n = 120  10.3 [10.2, 10.4]   10.1 [10.0, 10.2]

All weights trained, 100% of the labels, in and out of distribution
{" " * 36}simclr
""")


def test_where_there_is_no_interval_none_is_shown(tidy):
    assert with_interval(1.0, None, None) == with_interval(1.0, np.nan, np.nan) == "1.00 [–]"
    tidy.loc[(tidy["task"] == "stroke") & (tidy["seed"] == 0), ["low", "high"]] = np.nan  # of one seed is enough
    table = benchmark_table(tidy)
    assert table.loc[("stroke", "auc", "in_distribution", "probe", 0.2, 120), "simclr"] == "0.73 [–]"
    assert table.loc[("age", "mean_absolute_error", "in_distribution", "probe", 1.0, 120), "random"].endswith("10.2]")
    text = summary(tidy)
    assert "0.81 [–]            0.61 [–]" in text and "nan" not in text
    assert f"\n[–]: no interval, as there are fewer than {LEAST_PARTICIPANTS} participants (of a class)" in text
    line, _, (bars,) = label_efficiency(tidy).axes[0].containers[0]
    assert np.isfinite(line.get_xydata()).all()
    assert not any(np.isfinite(bar).any() for bar in bars.get_segments())


def test_the_figures_numbers_are_those_of_the_score():
    """One participant of a hundred scans, and `01` of two datasets, who are two."""
    rng = np.random.default_rng(0)
    who = [*range(40), *[7] * 100]
    table = pd.DataFrame({"participant": [f"{number // 2:02d}" for number in who],
                          "dataset": ["AB"[number % 2] for number in who], "true": [number % 2 for number in who]})
    table["predicted"] = table["true"] + rng.normal(size=len(table))
    ids = table["dataset"] + "/" + table["participant"]
    auc = score(table["true"].to_numpy(), table["predicted"].to_numpy(), "classification", ids)
    assert auc["participants"] == 40
    assert names(predictions(table, "auc").axes[0])[0] == f"n = 40 (AUC = {auc['value']:.2f})"
    assert f"{roc_auc_score(table['true'], table['predicted']):.2f}" != f"{auc['value']:.2f}"
    error = score(table["true"].to_numpy(), table["predicted"].to_numpy(), "regression", ids)
    assert names(predictions(table, "mean_absolute_error").axes[0])[0] == f"n = 40, error {error['value']:.1f}"


def test_roc_curves_name_their_area_and_their_number():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"true": rng.integers(0, 2, 60)})
    table["predicted"] = table["true"] + rng.normal(size=60)
    table["distribution"] = ["in_distribution"] * 40 + ["out_of_distribution"] * 20
    figure = predictions(table, "auc", note=NOTE)
    area = roc_auc_score(table["true"][:40], table["predicted"][:40])
    assert names(figure.axes[0])[0] == f"in distribution, n = 40 (AUC = {area:.2f})"
    curve = figure.axes[0].lines[0].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(area)
    assert figure.axes[0].get_xlabel() == "false positive rate" and figure.get_supxlabel() == NOTE
    assert names(predictions(table.drop(columns="distribution"), "auc").axes[0])[0].startswith("n = 60 (AUC")


def test_ages_are_drawn_true_against_predicted_in_years_and_other_numbers_without():
    table = pd.DataFrame({"true": [50.0, 60, 70], "predicted": [53.0, 60, 64]})
    score = predictions(table, "mean_absolute_error", "mmse").axes[0]
    assert names(score) == ["n = 3, error 3.0"] and (score.get_xlabel(), score.get_ylabel()) == ("true", "predicted")
    axes = predictions(table, "mean_absolute_error", "age").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true (years)", "predicted (years)")
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), table.to_numpy())
    assert names(axes) == ["n = 3, error 3.0 years"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[50, 50], [70, 70]])


def test_embedding_map_finds_the_direction_that_varies():
    rng = np.random.default_rng(0)
    age = rng.uniform(50, 80, 40)
    embeddings = 0.01 * rng.normal(size=(40, 6))
    embeddings[:, 4] += age
    figure = embedding_map(embeddings, age, note=NOTE, name="age (years)")
    first = figure.axes[0].collections[0].get_offsets()[:, 0]
    assert abs(np.corrcoef(first, age)[0, 1]) > 0.999
    assert figure.axes[0].get_xlabel() == "component 1 (100 % of variance)"
    assert figure.axes[1].get_ylabel() == "age (years)" and figure.get_supxlabel() == NOTE
    by_site = embedding_map(embeddings, ["A", "B"] * 20, name="site").axes[0]
    assert names(by_site) == ["A", "B"] and by_site.get_legend().get_title().get_text() == "site"
    assert [len(dots.get_offsets()) for dots in by_site.collections] == [20, 20]


def test_pyplot_keeps_no_figure(tidy):
    label_efficiency(tidy)
    predictions(pd.DataFrame({"true": [0, 1], "predicted": [0.2, 0.3]}), "auc")
    assert plt.get_fignums() == []
