"""Nothing is lost: killed, stopped, interrupted, refused, on a full disk; each time with real processes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from kit.execute import parameters
from kit.params import Pretrain
from kit.runs import ROOT, Run
from kit.train import checkpoint
from kit.train.checkpoint import CheckpointError, Saver
from kit.train.pretrain import pretrain, pretrained_encoder, status
from tests.conftest import absent

EPOCHS = 8


def values(store, folder, **changes):
    return {"prepared": store.folder, "output_dir": folder, "epochs": EPOCHS, "batch_size": 8, "projection": [16, 8],
            "validation_fraction": 0.2, "checkpoint_minutes": 0, **changes}


def params(store, folder, **changes):
    return Pretrain.model_validate(values(store, folder, **changes))


def run(plain: dict) -> None:
    """What the notebook does, in a process of its own."""
    asked = Pretrain.model_validate(plain)
    pretrain(asked, Run.of(asked))


@pytest.fixture(scope="module")
def start():
    """Starts `run` in a fresh process, whose imports are already done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_survival"])

    def begin(plain):
        process = context.Process(target=run, args=(plain,))
        process.start()
        return process
    return begin


def children(number: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    own = [int(child) for task in Path(f"/proc/{number}/task").glob("*/children") for child in task.read_text().split()]
    return own + [one for child in own for one in children(child)]


def gone(numbers: list[int], seconds: float = 10) -> bool:
    """Whether these processes have ended (a zombie has)."""
    def alive(number):
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    until = time.monotonic() + seconds
    while any(map(alive, numbers)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def wait_for_checkpoint(folder: Path, newer_than: float, process) -> None:
    last, until = folder / "checkpoints/last.pt", time.monotonic() + 300

    def there() -> bool:
        try:
            return last.stat().st_mtime > newer_than
        except FileNotFoundError:  # for a moment between two renames only `previous.pt` is there
            return False

    while not there():
        running = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert time.monotonic() < until and running
        time.sleep(0.02)


def assert_same(first: Path, second: Path) -> None:
    """Weights and the loss curve, bit for bit."""
    one, two = (checkpoint.read_checkpoint(folder / "checkpoints") for folder in (first, second))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    logs = [pd.read_csv(folder / "log.csv").drop(columns="seconds") for folder in (first, second)]
    assert logs[0].equals(logs[1]) and len(logs[0]) == EPOCHS
    assert (second / "encoder.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "victims"), [(1, ["job"] * 2), (2, ["worker", "job"])])
def test_killed_at_random_moments_the_run_ends_as_if_undisturbed(store, tmp_path, start, workers, victims):
    whole, broken = (values(store, tmp_path / name, workers=workers) for name in ("whole", "broken"))
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    rng, died = random.Random(workers), 0
    for victim in victims:
        begun = time.time()
        process = start(broken)
        wait_for_checkpoint(tmp_path / "broken", begun, process)
        time.sleep(rng.uniform(0, 0.5))
        started = children(process.pid)
        worker = [child for child in started if "spawn_main" in command(child)][:1]
        targets = {"kernel": [process.pid], "worker": worker, "job": [process.pid, *started]}[victim]
        for target in targets:
            os.kill(target, signal.SIGKILL)
        process.join(300)
        died += process.exitcode != 0
        assert gone(started), "stray workers"
        if (tmp_path / "broken/encoder.safetensors").exists():
            break
    assert died
    process = start(broken)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert {path.name for path in (tmp_path / "broken/checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}


@pytest.mark.slow
def test_the_notebook_whose_kernel_is_killed_goes_on_when_run_again(store, tmp_path, start):
    process = start(parameters("2_pretrain", values(store, tmp_path / "whole")).plain())  # the notebook's defaults
    process.join()
    options = [text for name, value in values(store, tmp_path / "broken").items()
               for text in ("-p", name, str(value))]
    notebook = [sys.executable, "-m", "kit.execute", "2_pretrain", *options]
    rng, killed = random.Random(0), 0
    for _ in range(3):
        begun = time.time()
        with subprocess.Popen(notebook, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "KIT_PROGRESS": "off"}) as driver:
            until = time.monotonic() + 300
            while not ((last := tmp_path / "broken/checkpoints/last.pt").exists() and last.stat().st_mtime > begun):
                assert time.monotonic() < until and driver.poll() is None, driver.stderr.read()
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            kernel = next(child for child in children(driver.pid) if "ipykernel_launcher" in command(child))
            os.kill(kernel, signal.SIGKILL)
            said = driver.communicate(timeout=300)[1]
        killed += driver.returncode != 0 and "Kernel died" in said
        if (tmp_path / "broken/encoder.safetensors").exists():
            break
    assert killed
    subprocess.run(notebook, cwd=ROOT, check=True, capture_output=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def command(number: int) -> str:
    return Path(f"/proc/{number}/cmdline").read_text()


def test_a_stop_file_ends_it_with_a_checkpoint_and_it_goes_on_from_there(store, tmp_path):
    whole, broken = params(store, tmp_path / "whole"), params(store, tmp_path / "broken", checkpoint_minutes=10)
    pretrain(whole, Run.of(whole))
    folder = Run.of(broken)
    (folder / "stop").touch()
    log = pretrain(broken, folder)
    assert len(log) == 1 and np.isfinite(log["loss"][0]) and not (folder / "stop").exists()
    assert status(broken, folder).startswith(f"UNFINISHED: stopped in epoch 1 of {EPOCHS} after 1 of its steps")
    assert not (folder / "encoder.safetensors").exists() and not (folder / "log.csv").exists()
    assert pretrained_encoder(folder, broken)[1]["objective"] == "simclr"  # the notebook's later cells work
    pretrain(broken, folder)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert status(broken, folder) == f"finished: {EPOCHS} epochs"


def test_a_checkpoint_says_all_that_a_resume_needs(store, tmp_path):
    asked = params(store, tmp_path / "run", epochs=1, ema=0.9)
    pretrain(asked, Run.of(asked))
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert {"model", "optimizer", "average", "scheduler", "scaler", "position", "random", "params", "versions",
            "workers", "threads"} <= set(state)
    assert state["position"] == {"epoch": 1, "step": 0} and state["versions"]["torch"] == torch.__version__


def test_a_checkpoint_of_other_parameters_is_refused_with_the_differences(store, tmp_path):
    first = params(store, tmp_path / "run", epochs=1)
    pretrain(first, held := Run.of(first))
    held.close()
    other = params(store, tmp_path / "run", epochs=2, temperature=0.5)
    (tmp_path / "run/encoder.safetensors").unlink()
    (tmp_path / "run/params.yaml").write_text(yaml.safe_dump(other.plain()))
    with pytest.raises(CheckpointError, match=r"epochs: the checkpoint has 1, asked for 2\n.*temperature: .* 0.1"):
        pretrain(other, Run.of(other))


def test_a_recipe_that_changed_is_refused_with_the_differences(store, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("gamma: {range: [0.7, 1.4]}\n")
    asked = params(store, tmp_path / "run", recipe=str(recipe), checkpoint_minutes=10)
    held = Run.of(asked)
    (held / "stop").touch()
    pretrain(asked, held)
    assert pretrained_encoder(held, asked)[1]["views"]["gamma"]["range"] == [0.7, 1.4]
    recipe.write_text("gamma: {range: [0.5, 1.4]}\nnoise: {range: [0, 0.1]}\n")
    with pytest.raises(CheckpointError, match="with other parameters") as refused:
        pretrain(asked, held)
    assert "\n  views.gamma.range: the checkpoint has [0.7, 1.4], asked for [0.5, 1.4]\n" in str(refused.value)
    assert "\n  views.noise: the checkpoint has None, asked for {" in str(refused.value)
    assert "crop" not in str(refused.value)  # what is the same
    recipe.write_text("gamma: {range: [0.7, 1.4]}\n")
    pretrain(asked, held)
    recipe.write_text("gamma: {range: [0.5, 1.4]}\n")
    with pytest.raises(CheckpointError, match="views.gamma.range"):  # of a finished run, too
        pretrain(asked, held)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_takes_the_way_of_the_stop_file(store, tmp_path, workers):
    code = ("import sys; from kit.params import Pretrain; from kit.runs import Run; "
            "from kit.train.pretrain import pretrain, status; import json; "
            "asked = Pretrain.model_validate(json.loads(sys.argv[1])); run = Run.of(asked); pretrain(asked, run); "
            "print(status(asked, run))")
    plain = json.dumps({**values(store, tmp_path / "run", workers=workers, epochs=3000), "prepared": str(store.folder),
                        "output_dir": str(tmp_path / "run")})
    with subprocess.Popen([sys.executable, "-c", code, plain], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        until = time.monotonic() + 300
        while not (tmp_path / "run/checkpoints/last.pt").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        started = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as Jupyter does: the kernel's whole process group
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "UNFINISHED" in said and "stopping: writing a checkpoint" in said
    assert gone(started) and pd.read_csv(tmp_path / "run/unfinished.csv")["loss"].notna().all()


def test_the_best_checkpoint_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # what exFAT says

    checkpoint.save(tmp_path, {"epoch": 1}, best=True)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    monkeypatch.setattr(checkpoint.os, "link", refuse)
    checkpoint.save(tmp_path, {"epoch": 2}, best=True)
    checkpoint.save(tmp_path, {"epoch": 3})
    read = [checkpoint.read_checkpoint(tmp_path, name) for name in ("best", "previous", "last")]
    assert read == [{"epoch": 2}, {"epoch": 2}, {"epoch": 3}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 160 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "kit", disk]).returncode:
        absent("a small disk needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_is_tried_again(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "AGAIN_SECONDS", 0.0)
    saver = Saver(small_disk, minutes=0, retry_minutes=10)
    small, large = ({"weights": torch.rand(count), "log": []} for count in (1000, 1_000_000))
    assert saver.save(small)
    (small_disk / "other").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 2_000_000))
    with pytest.warns(UserWarning, match=r"the disk is full: no checkpoint .*last.pt stays as it was; trying again"):
        assert not saver.save(large)
    assert torch.equal(checkpoint.read_checkpoint(small_disk / "checkpoints")["weights"], small["weights"])
    assert saver.due()
    (small_disk / "other").unlink()
    assert saver.save(large) and len(checkpoint.read_checkpoint(small_disk / "checkpoints")["weights"]) == 1_000_000

    (small_disk / "other").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    hopeless = Saver(small_disk, minutes=0, retry_minutes=0)
    with pytest.raises(CheckpointError, match="gave up after 0 minutes. Make room, then run again"):
        hopeless.save(large, wait=True)


def test_a_full_quota_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(checkpoint, "save", refuse)
    with pytest.warns(UserWarning, match=r"^the quota is full: no .* MB free on its file system\); there is none yet"):
        assert not Saver(tmp_path, minutes=0, retry_minutes=10).save({})


def test_a_run_lives_through_a_full_disk(store, tmp_path, small_disk, monkeypatch):
    def make_room(seconds: float) -> None:  # somebody does, while the run waits to try again
        (small_disk / "other").unlink(missing_ok=True)

    monkeypatch.setattr(checkpoint.time, "sleep", make_room)
    asked = params(store, tmp_path / "run", epochs=2, checkpoint_minutes=10)
    folder = Run.of(asked)
    (folder / "checkpoints").symlink_to(small_disk)
    (small_disk / "other").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 200_000))
    with pytest.warns(UserWarning, match="there is none yet; trying again for 30.0 minutes"):
        log = pretrain(asked, folder)
    assert len(log) == 2 and status(asked, folder) == "finished: 2 epochs"
