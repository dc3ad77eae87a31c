"""The checks: by hand where there is an answer, and a model that has learned nothing fails them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kit.evaluate.predict import predict
from kit.evaluate.tasks import read_tasks, score_tested
from kit.evaluate.tune import Choice, tune
from kit.explain.checks import (
    THRESHOLDS,
    agreement,
    areas,
    caption,
    check_maps,
    curves,
    incompleteness,
    layer_groups,
    outside_share,
    randomisation,
    rank_correlation,
    reinitialised,
    stability,
    verdicts,
)
from kit.explain.explainer import Explainer
from kit.explain.maps import no_better_than_chance
from kit.explain.saliency import Options
from kit.explain.shuffled import with_shuffled_labels
from kit.explain.targets import Output
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.params import Finetune
from kit.runs import Run, write_json, write_table
from kit.store.grid import Grid
from kit.store.store import Store
from tests.conftest import GRID, SHAPE, make_store

METHODS = ("gradient", "integrated_gradients")


class WithToken(nn.Module):
    """A layer with a parameter of its own and no `reset_parameters`, as a transformer's class token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(3 + 0.5 * torch.randn(1000))


class SumOf(nn.Module):
    """Sums a function of a scan's voxels."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.weight * self.function(images).sum((1, 2, 3, 4))


def explainer_for(model, store, **options) -> Explainer:
    return Explainer(model, lambda model, _: Output(model), "output", store, Options(**options))


@pytest.fixture(scope="module")
def scan(store) -> str:
    return store.index["scan"][1]  # of somebody with the bright corner


@pytest.fixture
def right_reader() -> nn.Module:
    """A model that has learned to look at the right side only (x is the last axis)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 4), nn.Softplus(), nn.Linear(4, 1))
    net[1].weight.data.view(4, *SHAPE)[..., :12] *= 1e-3
    return net


def test_rank_correlation_by_hand():
    mask = np.array([True, True, True, True, False])
    # Signs and the voxel outside do not count; ranks 1234 against 1243: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(np.array([1, -2, 3, 4, 0]), np.array([1, 2, 9, -5, 99]), mask) == pytest.approx(0.8)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5), mask))


def test_a_partial_correlation_takes_out_what_the_scan_explains():
    rng = np.random.default_rng(0)
    scan, one, other = rng.normal(size=(3, 20, 20, 20))
    mask = np.ones(scan.shape, bool)
    assert rank_correlation(one * scan, other * scan, mask) > 0.3
    assert abs(rank_correlation(one * scan, other * scan, mask, scan)) < 0.05
    assert rank_correlation(one * scan, one * scan, mask, scan) == pytest.approx(1)


def test_given_a_scan_whose_very_ranks_a_map_has_nothing_is_taken_out():
    rng = np.random.default_rng(0)
    for side in range(3, 30):  # whatever rounding leaves of 1 less a correlation of 1
        scan, other = rng.normal(size=(2, side, side, side))
        mask = np.ones(scan.shape, bool)
        plain = rank_correlation(scan, scan + other, mask)
        assert rank_correlation(-3 * scan, scan + other, mask, scan) == pytest.approx(plain, abs=1e-6)
        assert rank_correlation(scan, 2 * scan, mask, scan) == pytest.approx(1)


def test_layers_from_the_head_down():
    resnet = Predictor(build_encoder("resnet18_narrow", GRID))
    groups = layer_groups(resnet)
    assert [name for name, _ in groups] == ["head", "stage 4", "stage 3", "stage 2", "stage 1", "stem and norm"]
    covered = [name for name, _ in resnet.named_parameters()
               if any(name.startswith(f"{member}.") for _, members in groups for member in members)]
    assert covered == [name for name, _ in resnet.named_parameters()]
    vit = layer_groups(build_encoder("vit_narrow", Grid((36, 48, 40), 4.0)))
    assert [name for name, _ in vit] == ["stage 4", "stage 3", "stage 2", "stage 1", "stem and norm"]
    assert vit[-1][1] == ["autoencoder.patch_embedding", "autoencoder.patch_embedding.patch_embeddings",
                          "autoencoder.blocks.4"]  # a norm; not the autoencoder itself, with all its blocks
    assert [name for name, _ in layer_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))] == ["2", "0"]


def test_drawing_layers_anew_leaves_the_others():
    resnet = Predictor(build_encoder("resnet18_narrow", GRID))
    fresh = reinitialised(resnet, 0, ["head", "encoder.network.layer4"])
    same = {name: torch.equal(value, fresh.state_dict()[name]) for name, value in resnet.state_dict().items()
            if name.endswith("conv1.weight") or name == "head.weight"}
    assert {name for name, kept in same.items() if not kept} == {
        "head.weight", "encoder.network.layer4.0.conv1.weight", "encoder.network.layer4.1.conv1.weight"}


def test_a_map_of_learned_weights_changes_with_them(right_reader, store, scan):
    explainer = explainer_for(right_reader, store)
    maps = {method: explainer.map(scan, method) for method in METHODS}
    table = randomisation(explainer, scan, maps, seed=1)
    assert table.groupby("how", sort=False).size().to_dict() == {"cascading": 4, "independent": 2}
    whole = table[(table["how"] == "cascading") & (table["share"] == 1)].set_index("method")["rank_correlation"]
    assert (whole.abs() < 0.3).all()  # of integrated gradients beyond the image, which is in both of its maps
    head = table[(table["how"] == "cascading") & (table["share"] < 1)].set_index("method")["rank_correlation"]
    assert (head > whole).all()  # the head only weights four readers of the right side

    # maps of the copy itself are what a model that has learned nothing gives: 1
    copy = explainer_for(reinitialised(right_reader, 1, ["1", "3"]), store)
    own = {method: copy.map(scan, method) for method in METHODS}
    again = randomisation(copy, scan, own, seed=1)
    np.testing.assert_allclose(again.loc[again["share"] == 1, "rank_correlation"], 1)


def test_reinitialised_is_not_what_training_started_from():
    torch.manual_seed(3)
    start = nn.Linear(5, 4)
    assert not torch.equal(reinitialised(start, seed=3).weight, start.weight)


def test_reinitialised_draws_every_weight_by_its_seed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), WithToken(), nn.Linear(4, 2))
    net[1].running_mean.fill_(7)
    net[1].weight.data.fill_(2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    first, same, other = (reinitialised(net, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in ("0.weight", "0.bias", "2.token", "3.weight", "3.bias"):
        assert not torch.equal(first[name], before[name]) and not torch.equal(first[name], other[name])
    assert first["2.token"].mean() == pytest.approx(3, abs=0.1)
    assert first["2.token"].std() == pytest.approx(0.5, abs=0.1)
    assert first["1.running_mean"].abs().max() == 0 and torch.equal(first["1.weight"], torch.ones(4))


def test_deletion_and_insertion_of_a_sum(store, scan):
    """The output is the sum of one side's brightness: cubes in their true order win, in the reverse order they lose."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 1))
    net[1].weight.data.view(SHAPE).copy_(torch.from_numpy(np.indices(SHAPE)[2] >= 18))
    explainer = explainer_for(net, store, patch=4)
    true = explainer.map(scan, "gradient_x_input")
    table = curves(explainer, scan, {"gradient_x_input": true, "occlusion": -true, "gradient": np.abs(true)})
    image, mask = explainer.read(scan)
    ends = table[(table["kind"] == "deletion") & (table["method"] == "random 0")].set_index("fraction")["output"]
    with torch.no_grad():
        assert ends[0] == pytest.approx(float(net(torch.from_numpy(image)[None, None])), rel=1e-4)
    assert ends[1] == pytest.approx(net[1].bias.item(), abs=1e-4)
    found = areas(table)
    assert list(found.index) == ["gradient", "gradient_x_input", "occlusion"]
    both = found[["deletion", "insertion"]]
    assert (both.loc["gradient_x_input"] > 0.2).all() and (both.loc["occlusion"] < -0.2).all()
    beside = pd.concat([table, table[table["method"] == "occlusion"].assign(
        method="smoothgrad", output=lambda rows: 3 * rows["output"])])  # one that overshoots
    pd.testing.assert_frame_equal(areas(beside).drop("smoothgrad"), found)  # changes no other's numbers
    assert areas(curves(explainer, scan, {})).empty


@pytest.mark.parametrize("bottom", [True, False])
def test_equal_cubes_come_in_random_order_and_not_from_the_bottom_up(store, scan, bottom):
    """A map of zeros is worth nothing, wherever the model looks."""
    third = np.indices(SHAPE)[0] < SHAPE[0] // 3 if bottom else np.indices(SHAPE)[0] >= SHAPE[0] - SHAPE[0] // 3
    explainer = explainer_for(SumOf(lambda images: images.abs() * torch.from_numpy(third)), store, patch=4)
    found = areas(curves(explainer, scan, {"grad_cam": np.zeros(SHAPE)}))
    np.testing.assert_allclose(found[["deletion", "insertion"]], 0, atol=1e-5)


@pytest.mark.parametrize("patch", [4, 8])
def test_a_map_of_white_noise_is_no_better_than_random_order(store, scan, patch):
    explainer = explainer_for(SumOf(torch.abs), store, patch=patch)  # cubes of 2 and 4 voxels, cut at the brain's edge
    rng = np.random.default_rng(0)
    maps = {f"noise {number}": rng.normal(size=SHAPE) for number in range(8)}
    maps["gradient_x_input"] = explainer.map(scan, "gradient_x_input")
    table = areas(curves(explainer, scan, maps))
    found, by_chance = table[["deletion", "insertion"]].mean(axis=1), table["by_chance"]
    assert abs(found.drop("gradient_x_input").mean()) < 0.03
    assert found["gradient_x_input"] > THRESHOLDS.faithful * by_chance["gradient_x_input"]
    assert (found.drop("gradient_x_input") < THRESHOLDS.faithful * by_chance.drop("gradient_x_input")).all()


def test_fractions_are_of_the_brains_voxels_to_half_a_cube(store, scan):
    explainer = explainer_for(SumOf(lambda images: (images != 0).float()), store, patch=8)
    image, mask = explainer.read(scan)
    table = curves(explainer, scan, {"gradient": np.random.default_rng(0).normal(size=SHAPE)})
    inserted = np.where(table["kind"] == "insertion", table["fraction"], 1 - table["fraction"])
    assert np.abs(table["output"] - inserted * (image[mask] != 0).sum()).max() <= 4**3 / 2


def test_stability_falls_where_a_map_does_not_move_with_the_brain(store, scan):
    smooth = nn.Sequential(nn.AvgPool3d(6, 6), nn.Flatten(), nn.Linear(24, 4), nn.Softplus(), nn.Linear(4, 1))
    still = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 1))  # the same gradient for any scan
    fixed = explainer_for(still, store)
    rough = stability(fixed, scan, {"gradient": fixed.map(scan, "gradient")}).loc["gradient"]
    same = explainer_for(smooth, store)
    even = stability(same, scan, {"gradient": same.map(scan, "gradient")}).loc["gradient"]
    assert rough["noise"] == pytest.approx(1) and abs(rough["shift"]) < 0.1  # its weights do not move with the brain
    assert even["noise"] > 0.9 and even["shift"] > 0.5


def test_a_map_that_noise_wipes_out_is_not_left_out_of_the_means(store, scan):
    class Wiped(nn.Module):
        """Its gradient is zero for any scan but one."""

        def __init__(self, image: torch.Tensor) -> None:
            super().__init__()
            self.weight, self.image = nn.Parameter(torch.ones(())), image

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            alike = (images.detach() == self.image).flatten(1).all(1).float()
            return self.weight * alike * images.square().flatten(1).sum(1)

    image = store.read(scan)[0].astype(np.float32)
    explainer = explainer_for(Wiped(torch.from_numpy(image)[None]), store)
    found = explainer.map(scan, "gradient")
    assert np.ptp(found) > 0 and (stability(explainer, scan, {"gradient": found}) == 0).all(axis=None)


def test_outside_completeness_and_agreement_by_hand(store, scan, right_reader):
    mask = np.zeros((2, 2, 2), bool)
    mask[0] = True
    assert outside_share(np.where(mask, 3.0, -1.0), mask) == pytest.approx(0.25 / 0.5)
    assert np.isnan(outside_share(np.zeros((2, 2, 2)), mask))
    explainer = explainer_for(right_reader, store, steps=32)
    found = explainer.map(scan, "integrated_gradients")
    assert incompleteness(explainer, scan, found) < 0.02
    assert incompleteness(explainer, scan, 1.5 * found) == pytest.approx(0.5, abs=0.03)
    alike = agreement({"a": np.arange(8).reshape(2, 2, 2), "b": -np.arange(8).reshape(2, 2, 2)}, np.ones((2, 2, 2)))
    np.testing.assert_allclose(alike, 1)


GOOD = {"method": "gradient", "randomised": 0.1, "head": 0.9, "shuffled": 0.2, "deletion": 0.3, "insertion": 0.2,
        "by_chance": 0.02,        "noise": 0.95, "shift": 0.8, "outside": 0.4, "incomplete": 0.01, "agreement": 0.5}


@pytest.mark.parametrize(("changed", "words"), [
    ({"randomised": 0.8}, "random weights give much the same map"), ({"shuffled": 0.7}, "shuffled labels"),
    ({"deletion": -0.2}, "hardly sooner than removing brain"), ({"noise": 0.1}, "another map after a little noise"),
    ({"shift": 0.1}, "after a shift by one voxel"), ({"outside": 1.4}, "prefers what is outside the brain"),
    ({"incomplete": 0.2}, "off by 20 % (take more steps)"),
    ({"randomised": np.nan, "noise": np.nan}, "the same everywhere"),
    ({"insertion": np.nan, "deletion": np.nan}, "the output never changes"),
])
def test_each_check_can_fail_a_map(changed, words):
    good, bad = verdicts(pd.DataFrame([GOOD])), verdicts(pd.DataFrame([GOOD | changed]))
    assert good["supported"].all() and good["verdict"][0].startswith("passes: ")
    assert not bad["supported"].any() and words in bad["verdict"][0]
    assert caption("gradient", good) == "gradient" and caption("gradient", bad) == "gradient: not supported"
    assert caption("occlusion", good) == caption("occlusion", good[:0]) == "occlusion: not checked"
    without = verdicts(pd.DataFrame([GOOD | {"shuffled": np.nan, "incomplete": np.nan}]))
    assert without["supported"].all()  # what was not looked at is no fault


def test_scans_without_a_map_do_not_count_and_are_said():
    empty = GOOD | {"randomised": np.nan, "noise": np.nan, "shift": np.nan, "deletion": 0.9, "insertion": 0.9}
    found = verdicts(pd.DataFrame([GOOD, empty, empty]))
    assert found["supported"].all() and "beats random order by 0.25" in found["verdict"][0]  # as by the first alone
    assert found["verdict"][0].endswith("(no map in 2 of 3 scans)")
    unfaithful = GOOD | {"deletion": 0.0, "insertion": 0.0}
    assert not verdicts(pd.DataFrame([unfaithful, empty, empty]))["supported"].any()


def trained(store, task, steps=60):
    params = Finetune.model_validate({"prepared": store.folder, "output_dir": "unused", "task": "lesion",
                                      "encoder": "random:resnet18_narrow", "batch_size": 8, "steps": steps,
                                      "check_steps": 10, "patience": 0, "learning_rates": [3e-3]})
    encoder = build_encoder("resnet18_narrow", GRID)
    return tune(task, encoder, params, 0, choice=Choice(3e-3, 1e-2), check=False).predictor.eval()


@pytest.fixture(scope="module")
def task(store):
    return read_tasks({"prepared": store}, "lesion")[0]


def run_of(folder, model, task):
    """What 3_finetune leaves of a model's score."""
    found = predict(model, task.parts["test"].scans())[:, 0]
    folder.mkdir()
    scores = score_tested(task, {"test": found}, 0)["test"]
    write_json(folder / "metrics.json", {f"in_distribution_auc{'' if name == 'value' else f'_{name}'}": value
                                         for name, value in scores.items()})
    write_json(folder / "task.json", {"task": "lesion", "kind": "classification", "classes": ["0", "1"]})
    rows = task.parts["test"].rows
    write_table(folder / "predictions.csv", pd.DataFrame({"scan": rows["scan"], "participant": rows["participant"],
                                                          "distribution": "in_distribution", "predicted": found,
                                                          "true": task.parts["test"].labels}))
    return folder


@pytest.mark.slow
def test_a_trained_model_passes_and_a_randomised_one_fails(task, tmp_path):
    made = make_store(tmp_path / "store", participants=24 + 20)  # twenty more are tested: ten of each class are needed
    part = {scan: name for name, each in task.parts.items() for scan in each.rows["scan"]}
    made.index.assign(split=made.index["scan"].map(part).fillna("test")).to_csv(made.folder / "index.csv", index=False)
    store = Store.open(made.folder)
    task, = read_tasks({"prepared": store}, "lesion")
    model = trained(store, task, steps=30)
    rows = task.parts["test"].rows[task.parts["test"].labels == 1]
    scans = rows["scan"].head(2).tolist()
    for name, network in (("learned", model), ("random", reinitialised(model, 1))):  # some seeds are right by chance
        run = Run.open(tmp_path / f"{name} saliency", {})
        explainer = explainer_for(network, store, patch=4, steps=32)
        checked = check_maps(explainer, scans, ["gradient", "integrated_gradients"], run,
                             model_fault=no_better_than_chance(run_of(tmp_path / name, network, task)))
        assert {"checks.csv", "randomisation.csv", "agreement.csv", "verdicts.csv"} <= {
            path.name for path in run.folder.iterdir()}
        if name == "learned":
            assert checked.verdicts["supported"].tolist() == [False, True], checked.verdicts["verdict"].tolist()
        else:
            assert not checked.verdicts["supported"].any(), checked.verdicts["verdict"].tolist()


def test_people_swap_labels_and_tested_ones_keep_theirs(task):
    shuffled = with_shuffled_labels(task, 3)
    for name in ("train", "validation"):
        before, after = (pd.Series(each.parts[name].labels).groupby(each.parts[name].participants.to_numpy())
                         for each in (task, shuffled))
        assert sorted(before.first()) == sorted(after.first())
        assert (after.nunique() == 1).all()  # one person, one label, in all scans
    assert not np.array_equal(task.parts["train"].labels, shuffled.parts["train"].labels)
    assert np.array_equal(task.parts["test"].labels, shuffled.parts["test"].labels)


def test_a_map_of_shuffled_labels_is_another(store, task, tmp_path):
    model, other = trained(store, task, steps=20), trained(store, with_shuffled_labels(task), steps=20)
    rows = task.parts["test"].rows[task.parts["test"].labels == 1]
    checked = check_maps(explainer_for(model, store), rows["scan"].head(1).tolist(), ["gradient"],
                         Run.open(tmp_path, {}), shuffled=other)
    same = check_maps(explainer_for(model, store), rows["scan"].head(1).tolist(), ["gradient"], Run.open(tmp_path, {}),
                      shuffled=model)
    assert checked.table["shuffled"][0] < 0.5
    assert same.table["shuffled"][0] == pytest.approx(1) and "shuffled labels give" in same.verdicts["verdict"][0]
