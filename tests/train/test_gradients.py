"""One step's gradient: in chunks as in one go, accumulated as one batch, clipped, LARS by hand, averaged weights."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kit.augment.recipe import Recipe
from kit.device import device
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.reading import ParameterError
from kit.runs import ROOT
from kit.store.dataset import PreparedScans, collate
from kit.store.sampler import epoch_batches
from kit.store.store import StoreError
from kit.train.checkpoint import save
from kit.train.distributed import launch, process_group, rank
from kit.train.loop import Settings, State, TrainingError, chunks_of, fit, gradients, reads
from kit.train.objectives import MaskedReconstruction, SimCLR, Supervised
from kit.train.optimizers import Lars, build_optimizer
from tests.conftest import GRID

RECIPE = Recipe.model_validate({"gamma": {"range": [0.7, 1.4]}, "noise": {"range": [0.1, 0.3]}})
SETTINGS = Settings(epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.0, optimizer="adamw", schedule="cosine",
                    seed=0)


class Plain(nn.Module):
    """An encoder without BatchNorm."""

    features = 16

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.GELU(), nn.Conv3d(8, 16, 3, 2, 1), nn.GELU(),
                                    nn.AdaptiveAvgPool3d(1), nn.Flatten())

    def forward(self, images):
        return self.layers(images)


def simclr(encoder=None, **changes):
    torch.manual_seed(0)
    return SimCLR(encoder or Plain(), RECIPE, projection=[16, 8], temperature=0.2, seed=0, spacing_mm=4.0, **changes)


def gradient_of(objective, scans, chunk, batches):
    objective.zero_grad()
    step = [chunks_of(batch, chunk) for batch in batches]
    stream = iter([collate([scans[number] for number in part]) for part in reads(step, objective.compares)])
    report = gradients(objective, objective, stream, step, [(0, number) for number in range(len(step))], 0)
    assert next(stream, None) is None
    return report, torch.cat([weight.grad.flatten() for weight in objective.parameters() if weight.grad is not None])


@pytest.mark.parametrize("chunk", [3, 4])
def test_chunks_give_the_gradient_and_the_loss_of_the_whole_batch(store, chunk):
    scans, objective = PreparedScans(store, store.index), simclr()
    whole, one = gradient_of(objective, scans, 0, [list(range(8))])
    parts, many = gradient_of(objective, scans, chunk, [list(range(8))])
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
    assert (one - many).norm() < 1e-5 * one.norm()


def test_chunks_of_a_masked_autoencoder_add_up(store):
    scans = PreparedScans(store, store.index)
    objective = MaskedReconstruction(build_encoder("vit_narrow", GRID), 0.75, seed=0).train()
    whole, one = gradient_of(objective, scans, 0, [list(range(6))])
    parts, many = gradient_of(objective, scans, 4, [list(range(6))])
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
    assert (one - many).norm() < 1e-5 * one.norm()


def test_running_statistics_count_a_chunk_once(store):
    scans = PreparedScans(store, store.index)
    objective = simclr(build_encoder("resnet18_narrow", GRID))
    gradient_of(objective, scans, 4, [list(range(8))])
    norm = objective.encoder.network.bn1
    assert int(norm.num_batches_tracked) == 2 and norm.momentum == 0.1


def test_accumulated_batches_give_their_mean_gradient(store):
    scans, objective = PreparedScans(store, store.index), simclr()
    parts = [gradient_of(objective, scans, 0, [batch])[1] for batch in ([0, 1, 2, 3], [4, 5, 6, 7])]
    both = gradient_of(objective, scans, 0, [[0, 1, 2, 3], [4, 5, 6, 7]])[1]
    assert torch.allclose(both, sum(parts) / 2, rtol=1e-5, atol=1e-8)


def test_two_sessions_are_the_two_views(store):
    scans, objective = PreparedScans(store, store.index), simclr(paired=True).train()
    batch = collate([scans[number] for number in (0, 1, 2, 3)])
    first, second = objective.views(replace(batch, images=batch.images.float()), 0)
    alone = simclr().train()
    once = alone.views(replace(batch, images=batch.images.float()), 0)
    assert torch.equal(first, once[0][[0, 2]]) and torch.equal(second, once[1][[1, 3]])


def _chunked(store, folder: str) -> None:
    """One step on this process's share of eight scans, in chunks of two: the gradient that DDP leaves."""
    with process_group():
        objective = simclr()
        model = DistributedDataParallel(objective, find_unused_parameters=True)
        scans, step = PreparedScans(store, store.index), [chunks_of(list(range(8)), 2)]
        stream = iter([collate([scans[number] for number in part]) for part in reads(step, True)])
        gradients(model, objective, stream, step, [(0, 0)], 0)
        np.save(f"{folder}/{rank()}.npy", objective.encoder.layers[0].weight.grad.numpy())
        del model  # see `process_group`


@pytest.mark.slow
def test_chunks_in_two_processes_give_the_gradient_of_one_batch(store, tmp_path):
    objective = simclr()
    gradient_of(objective, PreparedScans(store, store.index), 0, [list(range(8))])
    one = objective.encoder.layers[0].weight.grad.numpy()
    launch(_chunked, (store, str(tmp_path)), 2)
    for number in (0, 1):
        assert np.abs(np.load(tmp_path / f"{number}.npy") - one).max() < 1e-5 * np.abs(one).max()


MEMORY = """
import json, sys, torch
from benchmarks.ratio import memory_bytes
from torch import nn
from kit.augment.recipe import Recipe
from kit.store.dataset import Batch
from kit.models.encoders import build_encoder
from kit.store.grid import Grid
from kit.train.objectives import SimCLR
from kit.train.loop import chunks_of, gradients, reads
from kit.train.distributed import set_threads
set_threads()  # as the loop does: it also has glibc keep what a step frees
scans, chunk, steps = map(int, sys.argv[1:])
objective = SimCLR(build_encoder("resnet18_narrow", Grid((64, 64, 64), 4.0)), Recipe(), projection=[16, 8],
                   temperature=0.2, seed=0, spacing_mm=4.0)
step = [chunks_of(list(range(scans)), chunk)]
def stream():
    for part in reads(step, True):
        images = torch.randn(len(part), 1, 64, 64, 64).half()
        yield Batch(images, torch.ones_like(images, dtype=torch.bool), list(part), torch.zeros(len(part)))
before = memory_bytes("VmHWM")
for _ in range(steps):
    gradients(objective, objective, stream(), step, [(0, 0)], 0)
print(json.dumps((memory_bytes("VmHWM") - before) / 1e6))
"""


@pytest.mark.slow
def test_memory_of_a_batch_in_chunks_is_not_that_of_the_batch():
    def megabytes(*numbers):
        said = subprocess.run([sys.executable, "-c", MEMORY, *map(str, numbers)], cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout
        return json.loads(said)

    # Live tensors of four scans take 290 MB, but the allocator keeps what it likes: peaks of 360 to 710 MB were seen.
    # Sixteen scans at once take four times the tensors, 64 sixteen times.
    assert megabytes(64, 4, 1) < megabytes(16, 0, 1)


def test_lars_is_the_formula():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, replace(SETTINGS, optimizer="lars", learning_rate=0.5, weight_decay=0.1))
    weight, bias, velocity = layer.weight.detach().clone(), layer.bias.detach().clone(), [0, 0]
    for _ in range(3):
        layer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        change = layer.weight.grad + 0.1 * weight
        change = change * 1e-3 * math.sqrt(float((weight**2).sum())) / math.sqrt(float((change**2).sum()))
        velocity = [0.9 * velocity[0] + change, 0.9 * velocity[1] + layer.bias.grad]
        weight, bias = weight - 0.5 * velocity[0], bias - 0.5 * velocity[1]
        optimizer.step()
        assert torch.allclose(layer.weight, weight) and torch.allclose(layer.bias, bias)
    assert isinstance(optimizer, Lars)


def test_layers_near_the_head_learn_faster():
    objective = Supervised(Predictor(build_encoder("resnet18_narrow", GRID)), "classification", flip=False, seed=0)
    optimizer = build_optimizer(objective, replace(SETTINGS, layer_decay=0.5))
    scale = {id(weight): group["scale"] for group in optimizer.param_groups for weight in group["params"]}
    network = objective.encoder.network
    weights = [objective.predictor.head.weight, network.layer4[0].conv1.weight, network.layer1[0].bn1.bias,
               network.conv1.weight]
    assert [scale[id(weight)] for weight in weights] == [1, 1 / 2, 1 / 16, 1 / 32]
    assert len(scale) == len(list(objective.parameters()))


def test_a_decay_from_stage_to_stage_needs_stages():
    with pytest.raises(ParameterError, match="layer_decay: no stages in the parameters encoder.layers.0.weight, "):
        build_optimizer(simclr(), replace(SETTINGS, layer_decay=0.5))


def trained(store, folder=None, objective=None, **changes):
    scans, settings = PreparedScans(store, store.index), replace(SETTINGS, **changes)
    objective = objective or simclr()
    people = store.index["participant"].tolist()
    log = fit(objective, scans, lambda epoch: epoch_batches(people, 8, 0, epoch), PreparedScans(store, store.index[:0]),
              settings, folder)
    return objective, log


def test_the_gradient_is_clipped_and_its_norm_logged(store, tmp_path):
    free, log = trained(store, tmp_path / "free", clip=1e9, optimizer="lars", learning_rate=1.0, epochs=1)
    tied, low = trained(store, tmp_path / "tied", clip=1e-12, optimizer="lars", learning_rate=1.0, epochs=1)
    assert log["gradient_norm"][0] > 0
    start = simclr().state_dict()["encoder.layers.0.bias"].to(device())
    assert (free.state_dict()["encoder.layers.0.bias"] - start).abs().max() > 1e-4
    assert (tied.state_dict()["encoder.layers.0.bias"] - start).abs().max() < 1e-9


def test_the_moving_average_is_kept(store, tmp_path):
    plain, log = trained(store, tmp_path / "plain")
    kept, same = trained(store, tmp_path / "kept", ema=0.999)
    assert log["loss"].tolist() == same["loss"].tolist()  # the training itself is as without
    weights = [objective.encoder.layers[0].weight.detach() for objective in (plain, kept)]
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_the_moving_average_soon_forgets_the_first_weights():
    state = State(Falls(), replace(SETTINGS, ema=0.3, learning_rate=1e-2, schedule="constant"), None, None)
    state.set_rate(0.0)
    expected = math.nan
    for done in range(6):
        state.objective.place.grad = torch.ones_like(state.objective.place)
        state.update({"loss": 0.0})
        now = float(state.objective.place)
        decay = (0.0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3)[done]  # the first average is the weights themselves
        expected = decay * expected + (1 - decay) * now if done else now
        assert float(state.kept.place) == pytest.approx(expected, abs=1e-6)
        assert float(state.kept.place) != pytest.approx(now, abs=1e-6) or not done


def test_the_moving_average_leaves_indices_as_they_are(store):
    """Averaged in float32, patch 13 would become 12.99999 and be truncated to 12."""
    scans = PreparedScans(store, store.index)
    state = State(MaskedReconstruction(build_encoder("vit_narrow", GRID), 0.75, seed=0),
                  replace(SETTINGS, ema=0.95), None, None)
    stream = iter([collate([scans[number] for number in range(4)])] * 4)
    for turn in range(4):
        state.update({"loss": float(state.gradients(stream, [[[0, 1, 2, 3]]], [(0, turn)])["loss"])})
    assert state.kept is not state.objective
    assert torch.equal(state.kept.encoder.brain_patches, state.objective.encoder.brain_patches)


class Falls(nn.Module):
    """A parabola on which a high rate runs away to infinity, and a lower one does not."""

    compares, scans_per_item = False, 1

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.ones(1, 1))

    def forward(self, batch, epoch):
        return {"loss": (self.place ** 4).sum() * 1e3}


def test_a_loss_that_is_not_finite_stops_with_the_scans_and_the_checkpoint(store, tmp_path):
    changes = {"optimizer": "lars", "learning_rate": 1e6, "schedule": "constant", "epochs": 12, "checkpoint_minutes": 0}
    with pytest.raises(TrainingError, match="the loss is (nan|inf) in epoch .*; scans: made_.*lower learning_rate.*"
                                            "last.pt is from before that step"):
        trained(store, tmp_path, Falls(), **changes)
    state = torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)
    assert math.isfinite(state["model"]["place"])
    (tmp_path / "new").mkdir()
    with pytest.raises(TrainingError, match="or set clip: 1$"):  # in the first epoch, before any checkpoint
        trained(store, tmp_path / "new", Falls(), **{**changes, "learning_rate": 1e20, "checkpoint_minutes": 10})


class Overflows(Falls):
    """Its loss is finite, its gradient is not: the root of 0."""

    def forward(self, batch, epoch):
        return {"loss": (self.place * 0).sqrt().sum()}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were(store, tmp_path, clip):
    objective = Overflows()
    before = objective.place.detach().clone()
    with pytest.raises(TrainingError, match=r"the gradient is not finite \(the loss is 0\) in epoch 1, step 1; scans"):
        trained(store, tmp_path, objective, clip=clip, checkpoint_minutes=0)
    assert torch.equal(objective.place.detach().cpu(), before) and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("chunk", "accumulate"), [(4, 1), (0, 2)])
def test_a_scan_that_cannot_be_read_leaves_the_running_statistics_as_they_were(store, chunk, accumulate):
    """The step is repeated when the run resumes; its first parts must not count twice."""
    class WithNorm(Plain):
        def __init__(self):
            super().__init__()
            self.layers.insert(1, nn.BatchNorm3d(8))

    state = State(simclr(WithNorm()), replace(SETTINGS, chunk=chunk, accumulate=accumulate), None, None)
    before = [value.clone() for value in state.objective.buffers()]
    scans, step = PreparedScans(store, store.index), [chunks_of(list(range(8)), chunk)] * accumulate

    def stream():
        for number, chunk in enumerate(reads(step, True)):
            if number == len(reads(step, True)) - 1:
                assert any(not torch.equal(*pair) for pair in zip(before, state.objective.buffers(), strict=True))
                raise StoreError("damaged")
            yield collate([scans[scan] for scan in chunk])

    with pytest.raises(StoreError):
        state.gradients(stream(), step, [(0, number) for number in range(accumulate)])
    assert all(torch.equal(*pair) for pair in zip(before, state.objective.buffers(), strict=True))


@pytest.mark.parametrize(("architecture", "chunk", "words"), [
    ("resnet18_narrow", 2, "BatchNorm now sees up to 2 scans at a time instead of 8"),
    ("resnet18_narrow", 0, "results stay valid, but may differ in their last digits"),
    ("resnet18_narrow", 8, "results stay valid, but may differ in their last digits"),
    ("vit_narrow", 2, "results stay valid, but may differ in their last digits")])
def test_other_workers_that_change_batch_norms_statistics_are_told(tmp_path, capsys, architecture, chunk, words):
    state = State(simclr(build_encoder(architecture, GRID)), replace(SETTINGS, chunk=chunk), tmp_path, None)
    save(tmp_path / "checkpoints", state.plain() | {"workers": 4})
    state.restore()
    assert capsys.readouterr().out.startswith(f"resumed with workers 4 -> 1: {words}")


class BarlowTwins(nn.Module):
    """The two views' features agree and are not redundant (Zbontar et al. 2021, arXiv 2103.03230, eq. 1)."""

    compares, scans_per_item, recipe = True, 1, Recipe()

    def __init__(self):
        super().__init__()
        self.encoder = Plain()

    def forward(self, batch, epoch, embed=False):
        views = torch.stack([self.encoder(batch.images * gain + shift) for gain, shift in ((1.0, 0.0), (0.7, 0.3))])
        return views if embed else self.compare(*views)

    def compare(self, first, second):
        first, second = ((view - view.mean(0)) / (view.std(0) + 1e-6) for view in (first, second))
        matrix = first.T @ second / len(first)
        off = matrix - torch.diag(matrix.diagonal())
        return {"loss": (1 - matrix.diagonal()).square().sum() + 5e-3 * off.square().sum()}


def test_another_objective_trains_in_the_same_loop_and_in_chunks(store, tmp_path):
    logs, objectives = [], []
    for chunk in (0, 4):
        torch.manual_seed(0)
        objective, log = trained(store, tmp_path / str(chunk), BarlowTwins(), chunk=chunk, epochs=6)
        logs.append(log["loss"])
        objectives.append(objective.encoder.layers[0].weight)
    assert logs[0].iloc[-1] < 0.8 * logs[0].iloc[0]
    assert np.allclose(*logs, rtol=1e-3) and torch.allclose(*objectives, atol=1e-4)  # sums in another order


def test_out_of_memory_names_the_chunk_to_try(store):
    class Greedy(Falls):
        def forward(self, batch, epoch):
            return {"loss": (self.place * torch.empty(2**52)).sum()}

    with pytest.raises(MemoryError, match="out of memory with 8 scans at a time: set `chunk: 4`"):
        trained(store, None, Greedy())
    with pytest.raises(MemoryError, match="with 1 scans at a time: take a coarser grid"):
        trained(store, None, Greedy(), chunk=1)
    for chunk, scans, cure in ((0, 8, "set `chunk: 2`"), (3, 6, "set `chunk: 1`"), (1, 2, "take a coarser grid")):
        objective = Greedy()
        objective.scans_per_item = 2  # a chunk is counted in pairs
        with pytest.raises(MemoryError, match=f"with {scans} scans at a time: {cure}"):
            trained(store, None, objective, chunk=chunk)
