"""Predictions against the truth: the numbers that stand in the figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from kit.evaluate.metrics import score
from kit.show.predictions import calibration, confusion, embedding_maps, predictions, roc, scatter, worst_errors

NOTE = "procedural data"


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def two_classes(count: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"participant": [f"P{number}" for number in range(count)], "true": np.arange(count) % 2})
    return table.assign(predicted=table["true"] + rng.normal(size=count))


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
    assert names(roc(table).axes[0])[0].startswith(f"n = 40\nAUC {auc['value']:.2f}, ")
    assert f"{roc_auc_score(table['true'], table['predicted']):.2f}" != f"{auc['value']:.2f}"
    error = score(table["true"].to_numpy(), table["predicted"].to_numpy(), "regression", ids)
    assert names(scatter(table).axes[0])[0].startswith(f"n = 40\nerror {error['value']:.1f}, ")


def test_roc_curves_name_their_area_and_the_sensitivity_at_90_percent_specificity():
    table = two_classes()
    table["distribution"] = ["in_distribution"] * 40 + ["out_of_distribution"] * 20
    figure = roc(table, note=NOTE)
    axes, here = figure.axes[0], table[:40]
    area = roc_auc_score(here["true"], here["predicted"])
    false, true, _ = roc_curve(here["true"], here["predicted"], drop_intermediate=False)
    found = true[false <= 0.1].max()
    assert names(axes)[0] == f"in distribution, n = 40\nAUC {area:.2f}, sensitivity {found:.2f}"
    curve = axes.lines[0].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(area, abs=2e-3)
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.1, found]])
    assert axes.get_xlabel().startswith("false positive rate") and figure.get_supxlabel() == NOTE


def test_equal_predictions_give_the_diagonal():
    table = two_classes().assign(predicted=0.3)
    axes = roc(table).axes[0]
    assert names(axes)[0] == "n = 60\nAUC 0.50, sensitivity 0.10"
    curve = axes.lines[0].get_xydata()[1:]
    np.testing.assert_allclose(curve[:, 0], curve[:, 1], atol=1e-6)


def test_the_band_holds_the_curve_and_needs_ten_of_a_class():
    axes = roc(two_classes()).axes[0]
    band = axes.collections[0].get_paths()[0]
    middle = axes.lines[0].get_xydata()[50]
    assert band.contains_point(middle) and not band.contains_point((middle[0], middle[1] - 0.5))
    assert not roc(two_classes(19)).axes[0].collections  # nine of a class


def test_of_several_seeds_and_folds_the_mean_of_each_models_area_is_shown():
    """Each model's log-odds have a scale of their own: pooled they say something else."""
    first, second = two_classes(seed=0), two_classes(seed=1)
    both = pd.concat([first.assign(seed=0), second.assign(seed=1, predicted=100 - 5 * second["predicted"])])
    areas = [roc_auc_score(rows["true"], rows["predicted"]) for _, rows in both.groupby("seed")]
    assert abs(np.mean(areas) - roc_auc_score(both["true"], both["predicted"])) > 0.02
    assert f"n = 60\nAUC {np.mean(areas):.2f}" in names(roc(both).axes[0])[0]

    fold = np.arange(60) // 20  # each participant tested once, by a model that is far off in its own way
    crossed = first.assign(fold=fold, predicted=first["predicted"] + 3 * fold)
    within = np.mean([roc_auc_score(rows["true"], rows["predicted"]) for _, rows in crossed.groupby("fold")])
    assert f"n = 60\nAUC {within:.2f}" in names(roc(crossed).axes[0])[0]  # folds are of equal size here
    assert f"{within:.2f}" != f"{roc_auc_score(crossed['true'], crossed['predicted']):.2f}"


def test_a_fold_without_one_class_has_no_curve_of_its_own():
    table = two_classes().assign(fold=lambda rows: (rows["true"] == 1) & (rows.index > 40))
    kept = table[~table["fold"]]
    assert f"AUC {roc_auc_score(kept['true'], kept['predicted']):.2f}" in names(roc(table).axes[0])[0]


def test_there_is_a_panel_per_encoder_and_mode():
    table = pd.concat([two_classes().assign(encoder=encoder, mode=mode, task="sex", label_fraction=1.0)
                       for encoder, mode in (("SimCLR", "probe"), ("SimCLR", "finetune"), ("volumes", "baseline"))])
    for draw in (roc, calibration, confusion, scatter):
        shown = [axes.get_title().split("\n")[0] for axes in draw(table).axes]
        assert shown == ["SimCLR, probe", "SimCLR, finetune", "volumes"]
        with pytest.raises(ValueError, match="predictions holds several of task: sex, age; select one"):
            draw(pd.concat([table, table.assign(task="age")]))


def test_a_test_set_has_one_colour_in_all_panels():
    table = pd.concat([two_classes().assign(encoder=encoder, distribution=distribution)
                       for encoder, distribution in (("SimCLR", "elsewhere"), ("SimCLR", "in_distribution"),
                                                     ("volumes", "in_distribution"))])
    first, second = roc(table).axes
    colours = {text.split(",")[0]: line.get_color() for text, line in zip(names(first), first.lines[::2], strict=False)}
    assert second.lines[0].get_color() == colours["in distribution"] != colours["elsewhere"]


def test_without_names_each_row_is_a_participant_in_every_fold():
    table = two_classes(100).drop(columns="participant").assign(fold=np.arange(100) % 5)
    assert names(roc(table).axes[0])[0].startswith("n = 100\n") and len(roc(table).axes[0].collections) == 1
    seeds = pd.concat([table.assign(seed=seed) for seed in (0, 1)], ignore_index=True)
    assert names(roc(seeds).axes[0])[0].startswith("n = 100\n")


def test_calibration_is_on_the_diagonal_where_probabilities_are_true():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=4000)
    table = pd.DataFrame({"true": (rng.random(4000) < expit(odds)).astype(int), "predicted": odds})
    axes = calibration(table).axes[0]
    stated, found = axes.lines[0].get_data()
    assert len(stated) == 10 and np.abs(stated - found).max() < 0.07
    assert names(axes)[0] == f"n = 4000\nBrier {brier_score_loss(table['true'], expit(odds)):.2f}"
    stated, found = calibration(table.assign(predicted=4 * odds)).axes[0].lines[0].get_data()  # too sure of itself
    assert found[0] - stated[0] > 0.1 and stated[-1] - found[-1] > 0.1


def test_ages_are_drawn_true_against_predicted_in_years_with_their_bias():
    table = pd.DataFrame({"true": [50.0, 60, 70], "predicted": [55.0, 60, 65]})
    other = scatter(table, "mmse").axes[0]
    assert (other.get_xlabel(), other.get_ylabel()) == ("true", "predicted")
    axes = scatter(table, "age").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true (years)", "predicted (years)")
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), table.to_numpy())
    assert names(axes) == ["n = 3\nerror 3.3 years, slope 0.50"]
    fitted, identity = (line.get_xydata() for line in axes.lines)
    np.testing.assert_allclose(fitted, [[50, 55], [70, 65]])
    np.testing.assert_allclose(identity, [[50, 50], [70, 70]])
    assert "slope 0.00" in names(scatter(table.assign(predicted=58.1)).axes[0])[0]


def test_confusion_says_which_class_is_taken_for_which():
    """Of three old ones one is taken for middle; one participant's two scans count once."""
    logits = np.eye(3)[[0, 0, 1, 2, 2, 1, 1]]
    table = pd.DataFrame(logits, columns=[f"predicted_{number}" for number in range(3)]).assign(
        true=[0, 0, 1, 2, 2, 2, 2], participant=list("abcdeff"), predicted=np.nan)
    axes = confusion(table, ["young", "middle", "old"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.00", "0.00", "1.00", "0.00", "0.00", "0.33",
                                                        "0.67"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["young", "middle", "old"]
    assert axes.get_title() == "n = 6"
    with pytest.raises(ValueError, match="classes: 2 names, young, old; the predictions are of 3 classes"):
        confusion(table, ["young", "old"])


def test_confusion_of_two_classes_cuts_at_even_odds():
    table = pd.DataFrame({"true": [0, 0, 1, 1], "predicted": [-1.0, 0.1, 0.2, 3.0]})
    assert [text.get_text() for text in confusion(table).axes[0].texts] == ["0.50", "0.50", "0.00", "1.00"]


def test_the_metric_chooses_the_figure():
    table = two_classes()
    assert predictions(table, "auc", "sex").axes[0].get_ylabel() == "sensitivity"
    assert predictions(table, "mean_absolute_error", "age").axes[0].get_ylabel() == "predicted (years)"
    three = table.drop(columns="predicted").assign(predicted_0=0.0, predicted_1=1.0, predicted_2=0.5)
    figure = predictions(three, "auc", "diagnosis", NOTE)
    assert len(figure.axes[0].texts) == 9 and figure.get_suptitle() == "diagnosis" and figure.get_supxlabel() == NOTE
    three["true"] = np.arange(len(three)) % 3
    named = predictions(three, "auc", "diagnosis", classes=["CN", "MCI", "AD"]).axes[0]
    assert [tick.get_text() for tick in named.get_xticklabels()] == ["CN", "MCI", "AD"]


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_the_worst_errors_are_named_largest_first(store):
    """Participant 002 has two scans; seeds are averaged."""
    table = store.index.assign(true=store.index["age"], predicted=store.index["age"], encoder="SimCLR")
    table.loc[table["participant"] == "002", "predicted"] += [4.0, 30.0]
    table.loc[table["participant"] == "001", "predicted"] -= 20
    table = pd.concat([table.assign(seed=0), table.assign(seed=1, predicted=table["predicted"] + 1)])
    age = store.index.drop_duplicates("participant").set_index("participant")["age"]
    assert titles(worst_errors(table, store, 2, "age")) == [
        f"made/002\ntrue {age['002']:.1f}, predicted {age['002'] + 30.5:.1f} years",
        f"made/001\ntrue {age['001']:.1f}, predicted {age['001'] - 19.5:.1f} years"]
    with pytest.raises(ValueError, match="predictions holds several of encoder: SimCLR, MAE; select one"):
        worst_errors(pd.concat([table, table.assign(encoder="MAE")]), store)
    with pytest.raises(ValueError, match="predictions: 2 scans are not in .*, the first is elsewhere_made_000_01"):
        worst_errors(table.replace({"scan": {"made_000_01": "elsewhere_made_000_01", "made_001_01": "other"}}), store)


def test_the_worst_errors_of_classes_are_those_that_were_surest(store):
    table = store.index.assign(true=store.index["lesion"], predicted=6.0 * store.index["lesion"] - 3)
    table.loc[table["participant"] == "003", "predicted"] = -4.0
    table.loc[table["participant"] == "004", "predicted"] = 1.0
    assert titles(worst_errors(table, store, 2, classes=["healthy", "lesion"])) == [
        "made/003\ntrue lesion, predicted healthy (0.98)", "made/004\ntrue healthy, predicted lesion (0.73)"]
    with pytest.raises(ValueError, match="the labels are 0 and 1 only; name the two classes"):
        worst_errors(table, store)  # the surest hit would be the worst error


def test_embedding_maps_find_the_direction_that_varies():
    rng = np.random.default_rng(0)
    age = rng.uniform(50, 80, 40)
    embeddings = 0.01 * rng.normal(size=(40, 6))
    embeddings[:, 4] += age
    labels = pd.DataFrame({"age (years)": age, "site": ["A", "B"] * 20, "diagnosis": ["CN"] * 10 + [None] * 30})
    figure = embedding_maps({"SimCLR": embeddings, "random weights": rng.normal(size=(40, 6))}, labels, note=NOTE)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["SimCLR"] * 3 + ["random weights"] * 3
    first = panels[0].collections[1].get_offsets()[:, 0]
    assert abs(np.corrcoef(first, age)[0, 1]) > 0.999
    assert panels[0].get_xlabel() == "component 1 (100 %)" and figure.get_supxlabel() == NOTE
    assert {axes.get_ylabel() for axes in figure.axes} >= {"age (years)"}
    assert names(panels[1]) == ["A", "B"] and panels[1].get_legend().get_title().get_text() == "site"
    # nobody is grey where all have a value; of those without a diagnosis there are thirty
    assert [len(dots.get_offsets()) for dots in panels[1].collections] == [0, 20, 20]
    assert [len(dots.get_offsets()) for dots in panels[2].collections] == [30, 10]


def test_pyplot_keeps_no_figure():
    predictions(two_classes(), "auc")
    assert plt.get_fignums() == []
