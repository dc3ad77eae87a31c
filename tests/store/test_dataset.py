"""Batches: every scan, balanced, in pairs; a participant once in each; in an order that (seed, epoch) decide."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from kit.runs import ROOT
from kit.seeding import scan_key
from kit.store import sampler
from kit.store.dataset import PreparedScans, collate, load_batches
from kit.store.sampler import (
    all_batches,
    balanced,
    batches_between,
    batches_of,
    epoch_batches,
    in_order,
    session_batches,
)
from kit.store.store import Store, StoreError, scan_path
from tests.conftest import absent
from tests.train.test_survival import children, command, wait_for_checkpoint

PARTICIPANTS = [f"p{number // 2}" for number in range(50)]
DATASETS = ["large"] * 30 + ["small"] * 6
PEOPLE = [f"{dataset}/{number // 2}" for number, dataset in enumerate(DATASETS)]  # two sessions each


def test_a_participant_comes_once_in_a_batch():
    for epoch in range(5):
        batches = epoch_batches(PARTICIPANTS, 8, seed=0, epoch=epoch)
        assert {len(batch) for batch in batches} == {8}
        for batch in batches:
            assert len({PARTICIPANTS[number] for number in batch}) == 8
        assert len({number for batch in batches for number in batch}) == sum(map(len, batches)) >= 40


def test_a_batch_of_one_scan_has_nothing_to_compare():
    batches = epoch_batches([*"abcdefghijk", "l", "l", "l", "l"], 16, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [12] and epoch_batches(["a", "a"], 16, seed=0, epoch=0) == [[0], [1]]


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_batches(PARTICIPANTS, 8, seed=0, epoch=0)
    assert first == epoch_batches(PARTICIPANTS, 8, seed=0, epoch=0)
    assert first != epoch_batches(PARTICIPANTS, 8, seed=0, epoch=1) != epoch_batches(PARTICIPANTS, 8, seed=1, epoch=1)


def test_a_cohort_smaller_than_a_batch_is_one_batch():
    assert sorted(epoch_batches(["a", "b", "c"], 8, seed=0, epoch=0)[0]) == [0, 1, 2]


@pytest.mark.parametrize(("count", "sizes"), [
    (48, [16] * 3), (49, [13, 12, 12, 12]), (33, [11] * 3), (3, [3]), (1, [1])])
def test_all_batches_drop_nobody_and_leave_nobody_alone(count, sizes):
    passes = [all_batches(count, 16, 0, epoch) for epoch in (0, 0, 1)]
    assert [len(batch) for batch in passes[0]] == sizes
    assert sorted(sum(passes[0], [])) == sorted(sum(passes[2], [])) == list(range(count))
    assert passes[0] == passes[1] and (passes[0] != passes[2] or count == 1)
    assert [len(batch) for batch in all_batches(5, 2, 0, 0)] == [3, 2]


def test_stretches_make_up_the_passes(monkeypatch):
    whole = [batch for epoch in range(4) for batch in all_batches(10, 4, 0, epoch)]
    assert len(whole) == 12 and batches_between(10, 4, 0, 0, 5) + batches_between(10, 4, 0, 5, 7) == whole
    shuffled = []
    monkeypatch.setattr(sampler, "all_batches", lambda *key: shuffled.append(key[3]) or all_batches(*key))
    assert batches_between(10, 4, 0, 2, 5) == whole[2:7]
    assert sorted(shuffled) == [0, 0, 1, 2]  # each pass once; the first also tells how many batches a pass has


def test_each_dataset_comes_as_often():
    chosen = balanced(DATASETS, seed=0, epoch=1)
    assert Counter(DATASETS[number] for number in chosen) == {"large": 18, "small": 18}
    counts = Counter(chosen)
    assert {counts[number] for number in range(30, 36)} == {3} and max(counts[number] for number in range(30)) == 1
    assert chosen == balanced(DATASETS, 0, 1) != balanced(DATASETS, 0, 2)


def test_balanced_says_the_shares_that_few_people_really_have():
    people, datasets = [f"p{number}" for number in range(1003)], ["large"] * 1000 + ["small"] * 3
    with pytest.warns(UserWarning, match=r"are really large 9\d\.\d%, small \d\.\d%, since a participant") as said:
        batches = batches_of(people, datasets, 32, seed=0, epoch=0, sampling="balanced")
    small = sum(number >= 1000 for batch in batches for number in batch) / sum(map(len, batches))
    assert f"small {small:.1%}" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches_of(people, datasets, 32, seed=0, epoch=1, sampling="balanced")  # said once
        batches_of(people, ["a"] * 500 + ["b"] * 503, 32, seed=0, epoch=0, sampling="balanced")


def test_a_participant_comes_once_in_a_batch_of_either_sampling():
    for sampling in ("all", "balanced"):
        batches = batches_of(PEOPLE, DATASETS, 4, seed=0, epoch=3, sampling=sampling)
        assert batches and all(len({PEOPLE[number] for number in batch}) == len(batch) == 4 for batch in batches)
        assert batches == batches_of(PEOPLE, DATASETS, 4, 0, 3, sampling)


def test_two_sessions_stand_together():
    batches = session_batches([*PEOPLE, "large/single"], 4, seed=0, epoch=0)
    seen = Counter()
    for batch in batches:
        firsts, seconds = batch[::2], batch[1::2]
        people = [[*PEOPLE, "large/single"][number] for number in firsts]
        assert len(set(people)) == 4 and [[*PEOPLE, "large/single"][number] for number in seconds] == people
        assert all((first == second) == (first == 36) for first, second in zip(firsts, seconds, strict=True))
        seen.update(people)
    assert max(seen.values()) == 1 and len(batches) == 4


def test_keys_are_the_same_everywhere():
    assert scan_key("made_000_01") == 40552930559249981 and scan_key("made_000_02") != scan_key("made_000_01")


def test_loading_in_processes_changes_nothing(store):
    scans = PreparedScans(store, store.index, store.index["age"].to_numpy())
    batches = in_order(len(scans), 5)
    here, there = list(load_batches(scans, batches)), list(load_batches(scans, batches, workers=1))
    assert len(here) == len(there) == 7
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images) and one.keys == other.keys
        assert torch.equal(one.labels, other.labels) and torch.equal(one.masks, other.masks)


def test_a_batch_holds_what_the_store_holds(store):
    scans = PreparedScans(store, store.index.iloc[3:5])
    batch = collate([scans[0], scans[1]]).to(torch.device("cpu"))
    image, mask = store.read(store.index["scan"][4])
    assert batch.images.dtype == torch.float32 and batch.images.shape == (2, 1, 12, 18, 24)
    assert np.array_equal(batch.images[1, 0].numpy(), image.astype(np.float32))
    assert np.array_equal(batch.masks[1, 0].numpy(), mask) and torch.isnan(batch.labels).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_scan_is_named(store, tmp_path, workers):
    shutil.copytree(store.folder, tmp_path / "store")
    name = store.index["scan"][3]
    scan_path(tmp_path / "store", name).write_bytes(b"no scan")
    scans = PreparedScans(Store.open(tmp_path / "store"), store.index.iloc[:8])
    with pytest.raises(StoreError, match=f"{name}.* damaged; delete it"):
        list(load_batches(scans, in_order(8, 4), workers))


SMALL = 'mount -t tmpfs -o size="$0" kit /dev/shm && exec "$@"'  # in a mount namespace of its own
TRAIN = """
import json, sys
from kit.params import Pretrain
from kit.runs import Run
from kit.train.pretrain import pretrain
if __name__ == "__main__":
    params = Pretrain.model_validate(json.loads(sys.argv[1]))
    print(pretrain(params, Run.of(params))["loss"].tolist())
"""


def with_shared_memory(size, tmp_path, values):
    """Pretrain in a process whose /dev/shm has so much room, as in some containers; what it said, its status."""
    (tmp_path / "train.py").write_text(TRAIN)
    command = [sys.executable, str(tmp_path / "train.py"), json.dumps(values)]
    if os.geteuid() or subprocess.run(["unshare", "-m", "sh", "-c", SMALL, size, "true"]).returncode:
        absent("a small /dev/shm needs root and the right to mount a tmpfs")
    return subprocess.run(["unshare", "-m", "sh", "-c", SMALL, size, *command], cwd=ROOT, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "KIT_PROGRESS": "off"})


@pytest.mark.slow
@pytest.mark.parametrize(("size", "words"), [
    ("32k", "loading processes cannot be started, as /dev/shm is full. Set loader_workers: 0"),
    ("160k", "a loading process failed, perhaps for lack of memory (RuntimeError: unable to"),
])
def test_too_little_shared_memory_ends_the_run_with_the_cure(store, tmp_path, size, words):
    done = with_shared_memory(size, tmp_path, {
        "prepared": str(store.folder), "epochs": 2, "batch_size": 8, "output_dir": str(tmp_path / "run"),
        "loader_workers": 2})
    assert done.returncode and f"LoaderError: {words}" in done.stderr and "docker: --shm-size" in done.stderr


@pytest.mark.slow
def test_a_loading_process_that_is_killed_ends_the_run_with_the_cure(store, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    values = {"prepared": str(store.folder), "epochs": 2000, "batch_size": 8, "output_dir": str(tmp_path / "run"),
              "loader_workers": 1, "projection": [16, 8], "checkpoint_minutes": 0}
    with subprocess.Popen([sys.executable, tmp_path / "train.py", json.dumps(values)], text=True, cwd=ROOT,
                          stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as training:
        wait_for_checkpoint(tmp_path / "run", 0, training)
        until = time.monotonic() + 60
        while not (loading := [child for child in children(training.pid) if "spawn_main" in command(child)]):
            assert time.monotonic() < until
        os.kill(loading[0], signal.SIGKILL)
        said = training.communicate(timeout=120)[1]
    assert training.returncode and "LoaderError: a loading process failed" in said and "Set loader_workers: 0" in said
