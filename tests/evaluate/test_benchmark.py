"""The table is complete, is not made twice, and does not depend on who wins."""

import pandas as pd

from kit.evaluate.benchmark import KEYS, models_of, run_benchmark
from kit.params import Benchmark
from kit.runs import Run
from kit.show.comparison import scores_table, summary
from tests.conftest import make_store


def test_table_is_complete_and_resumes(store, tmp_path):
    elsewhere = make_store(tmp_path / "elsewhere", seed=1, dataset="elsewhere")
    params = Benchmark.model_validate({
        "prepared": store.folder, "out_of_distribution": elsewhere.folder, "output_dir": tmp_path / "run",
        "encoders": {"ResNet": "random:resnet18_narrow", "ViT": "random:vit_narrow"}, "tasks": ["lesion", "age"],
        "finetune_tasks": ["lesion"], "label_fractions": [0.5, 1.0], "seeds": [0, 1], "epochs": 1})
    run = Run.of(params)
    tidy = run_benchmark(params, run)
    models = models_of(params)
    # 2 encoders x 2 tasks x (2 seeds on half of the labels + 1 on all) + 2 encoders x 2 seeds fine-tuned
    assert len(models) == len(set(models)) == 16
    assert len(tidy) == 32 and tidy["value"].notna().all() and set(tidy["distribution"]) == {
        "in_distribution", "out_of_distribution"}
    few = tidy["distribution"] == "in_distribution"  # five participants; out of distribution 24, 12 of each class
    assert tidy.loc[few, ["low", "high"]].isna().all(axis=None) and set(tidy["participants"]) == {5, 24}
    ages = tidy[~few & (tidy["task"] == "age")]
    assert ((ages["low"] < ages["value"]) & (ages["value"] < ages["high"])).all()

    # what is missing is made again, and comes out the same
    kept = tidy[~((tidy["encoder"] == "ViT") & (tidy["mode"] == "finetune"))]
    kept.to_csv(run / "tidy.csv", index=False)
    again = run_benchmark(params, run)
    keys = [*KEYS, "distribution"]
    pd.testing.assert_frame_equal(again.sort_values(keys, ignore_index=True), tidy.sort_values(keys, ignore_index=True),
                                  check_dtype=False, rtol=1e-4)
    scores = tidy[tidy["seed"] == 0].assign(trained=True)
    text = summary(scores, pd.DataFrame(), "made-up data")
    assert "nan" not in text and "[–]" in text and (scores_table(scores) != "").all(axis=None)
    assert "made-up data" in text and "in, n = 5 " in text and "out of, n = 24\n" in text and "ViT" in text
