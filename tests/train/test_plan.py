"""The plan is right about what can be checked here: counted operations, kept memory, and the arithmetic."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kit.models.mae import masks_for
from kit.params import Pretrain
from kit.runs import Run
from kit.train.plan import SUSTAINED, _counted, need, plan, seconds_per_item
from kit.train.pretrain import build_objective, pretrain


def params(store, folder, **changes):
    return Pretrain.model_validate({"prepared": store.folder, "output_dir": folder, "epochs": 0, "batch_size": 8,
                                    "projection": [16, 8], "validation_fraction": 0.2, **changes})


def test_operations_of_a_convolution_are_counted(store, tmp_path):
    asked = params(store, tmp_path / "run")
    found, layers = need(asked, store), []
    network = build_objective(asked, store)
    hooks = [module.register_forward_hook(lambda module, _, out: layers.append((module, out)))
             for module in network.modules() if isinstance(module, nn.Conv3d | nn.Linear)]
    network.head(network.encoder(torch.zeros(2, 1, *store.grid.shape)))
    for hook in hooks:
        hook.remove()
    forward = sum(2 * module.weight.numel() * (out[0, 0].numel() if out.dim() == 5 else 1) for module, out in layers)
    # two views, and backward twice the forward less the first layer's gradient of the image
    assert 0.9 * 3 * 2 * forward < found.operations <= 3 * 2 * forward
    assert found.parameters == sum(weight.numel() for weight in network.parameters())
    assert found.fixed_bytes == 16 * found.parameters and found.memory(4) > found.memory(2)


def test_copies_of_the_weights_are_counted_once(store, tmp_path):
    asked = params(store, tmp_path / "run", objective="mae", architecture="vit_narrow", precision="bf16")
    found, (few, many) = need(asked, store), (_counted(asked, store, scans)[2] for scans in (2, 8))
    assert found.scan_bytes == pytest.approx((many - few) / 6, rel=1e-6)
    assert found.fixed_bytes == 18 * found.parameters
    assert few - 2 * found.scan_bytes == pytest.approx(2 * found.parameters, rel=0.1)  # norms and the head stay float32


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_an_autoencoder_is_counted_with_the_patches_that_it_sees(store, tmp_path, ratio):
    asked = params(store, tmp_path / "run", objective="mae", architecture="vit_narrow", mask_ratio=ratio)
    found, model = need(asked, store), build_objective(asked, store).autoencoder
    with FlopCounterMode(display=False) as counter:  # computed, not faked
        masked = masks_for(range(2), len(model.encoder.brain_patches), ratio, seed=0, epoch=0)
        model(torch.zeros(2, 1, *store.grid.shape), masked).square().mean().backward()
    assert found.operations == counter.get_total_flops() / 2 and found.scan_bytes > 0


def test_only_shares_in_several_chunks_are_read_twice(store, tmp_path, monkeypatch):
    monkeypatch.setattr("kit.train.plan.seconds_per_item", lambda *_: (0.1, "given"))  # a GPU's differ from run to run
    whole, chunks = (plan(params(store, tmp_path / str(chunk), chunk=chunk))[0] for chunk in (0, 2))
    longer = chunks["hours"] / whole["hours"]  # shares of 8, 2 and 1 scans
    assert longer.tolist() == pytest.approx([4 / 3, 1, 1])
    assert (chunks["scans_per_second"] / whole["scans_per_second"]).tolist() == pytest.approx([1.5, 1, 1])


def test_the_plan_has_the_batches_of_the_cohort(store, tmp_path, monkeypatch):
    """15 participants learn, 7 of them with a second scan: a batch of 1024 is one of 15 and one of 7."""
    monkeypatch.setattr("kit.train.plan.seconds_per_item", lambda *_: (0.1, "given"))
    large = params(store, tmp_path / "run", batch_size=1024)
    table, words = plan(large)
    assert table["scans_at_a_time"].tolist() == [15, 3, 1] and "of 2 batches of up to 15 scans; times given" in words
    assert table["memory_gb"][0] == need(large, store).memory(15) / 1e9
    mae = params(store, tmp_path / "run", batch_size=1024, objective="mae", architecture="vit_narrow")
    assert plan(mae)[0]["scans_at_a_time"].tolist() == [15, 4, 2]  # no scan is left out: 15 on 4 are 4, 4, 4 and 3
    table, words = plan(params(store, tmp_path / "run", batch_size=1024, session_pairs=True))
    assert table["scans_at_a_time"].tolist() == [15, 3, 1] and "of 1 batch of 15 pairs; times given" in words


@pytest.mark.parametrize(("fits", "tried"), [(4, [6, 3]), (1, [6, 3, 1]), (0, [6, 3, 1])])
def test_a_step_that_does_not_fit_into_a_gpu_is_tried_with_fewer_scans(store, tmp_path, monkeypatch, fits, tried):
    asked, seen = params(store, tmp_path / "run"), []

    def measured(_objective, scans, *_):
        seen.append(scans)
        if scans > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5 * scans

    monkeypatch.setattr("kit.train.plan.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("kit.train.plan._measured", measured)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    if fits:
        source = f"measured on a GPU, {tried[-1]} scans at a time"
        assert seconds_per_item(asked, store, need(asked, store), 6) == (0.5, source)
    else:
        with pytest.raises(MemoryError, match="with 1 scans at a time: take a coarser grid or a smaller network"):
            seconds_per_item(asked, store, need(asked, store), 6)
    assert seen == tried


def test_the_plan_measures_a_single_scan_at_a_time(store, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("kit.train.plan.seconds_per_item", lambda *given: asked.append(given[-1]) or (0.1, "given"))
    plan(params(store, tmp_path / "run", chunk=1))
    assert asked == [1]


@pytest.mark.parametrize(("size", "refused"), [(12, ""), (4, "12"), (24, "12"), (15, "4 or 12")])
def test_the_plan_says_where_pretraining_refuses_its_batches(store, tmp_path, monkeypatch, size, refused):
    """24 gives batches of 15 and 7 scans."""
    monkeypatch.setattr("kit.train.plan.seconds_per_item", lambda *_: (0.1, "given"))
    words = plan(params(store, tmp_path / "run", batch_size=size))[1]
    assert words.partition("2_pretrain refuses these batches on ")[2].partition(" devices: ")[0] == refused


def test_an_objective_without_a_branch_is_not_taken_for_another(store, tmp_path):
    with pytest.raises(ValueError, match="no objective 'barlow'; there are simclr, mae"):
        build_objective(params(store, tmp_path / "run").model_copy(update={"objective": "barlow"}), store)


def test_the_plan_says_what_it_assumes(store, tmp_path):
    asked = params(store, tmp_path / "run")
    table, words = plan(asked)
    assert table["devices"].tolist() == [1, 4, 12] and table["hours"].is_monotonic_decreasing
    assert table["gpu_hours"].to_numpy() == pytest.approx(table["gpu_hours"][0])
    if not torch.cuda.is_available():
        assert "ESTIMATED from counted operations" in words and f"{SUSTAINED['fp32'] / 1e12:g} Tflop/s" in words
    run = Run.of(asked)
    assert run.folder == tmp_path / "run/plan" and asked.output_dir == tmp_path / "run"
    assert len(pretrain(asked, run)) == 0 and not (tmp_path / "run/checkpoints").exists()
    Run.of(params(store, tmp_path / "run", epochs=3))  # the real run's folder is still free
