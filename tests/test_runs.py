"""A run's folder: files whole or not at all, one writer, the same parameters."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from matplotlib.figure import Figure

from kit import runs
from kit.runs import ROOT, Run, RunError, write_whole
from tests.faults import without

KILLED = """
import os, sys, signal
from kit.runs import write_whole
def write(aside):
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], write)
"""


def test_a_writer_killed_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(aside):
        aside.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "new.csv", write)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_writer_keeps_to_itself_is_for_others_as_well(tmp_path):
    """As safetensors' `save_file` does; the umask decides, and a link's source keeps its mode."""
    code = """if True:
        import os, sys, pathlib
        os.umask(int(sys.argv[2], 8))
        import torch
        from safetensors.torch import save_file
        from kit.runs import write_whole
        path = pathlib.Path(sys.argv[1])
        path.parent.mkdir()
        write_whole(path, lambda aside: save_file({"a": torch.zeros(1)}, aside))
        path.with_name("text").write_text("")
        print(oct(path.stat().st_mode & 0o777), oct(path.with_name("text").stat().st_mode & 0o777))
    """
    for number, (umask, mode) in enumerate((("022", "0o644"), ("027", "0o640"), ("077", "0o600"))):
        path = tmp_path / str(number) / "encoder.safetensors"
        done = subprocess.run([sys.executable, "-c", code, str(path), umask], capture_output=True, text=True)
        assert done.stdout.split() == [mode, mode], done.stderr
    source = tmp_path / "source"
    source.touch(mode=0o600)
    write_whole(tmp_path / "link", lambda aside: os.link(source, aside))
    assert source.stat().st_mode & 0o777 == 0o600


def test_other_parameters_are_refused_with_the_differences(tmp_path):
    Run.open(tmp_path / "run", {"seed": 5, "epochs": 3, "workers": 1}).close()
    Run.open(tmp_path / "run", {"seed": 0, "epochs": 3, "workers": 1}).close()  # nothing was done there
    (tmp_path / "run/log.csv").touch()
    with pytest.raises(RunError, match=r"seed: the folder has 0, asked for 1\n.*epochs: the folder has 3"):
        Run.open(tmp_path / "run", {"seed": 1, "epochs": 4, "workers": 1})
    Run.open(tmp_path / "run", {"seed": 0, "epochs": 3, "workers": 2}, frozenset({"workers"})).close()


def test_a_figure_alone_does_not_fix_the_parameters(tmp_path):
    """A notebook may show the cohort before it starts to work."""
    run = Run.open(tmp_path / "run", {"seed": 5})
    run.figure(Figure(), "cohort")
    assert run.figure(Figure(), "CN/AD") and (tmp_path / "run/figures/CN%2FAD.png").is_file()
    run.close()
    Run.open(tmp_path / "run/plan", {"seed": 5, "epochs": 0}).close()
    (tmp_path / "run/.ipynb_checkpoints").mkdir()  # of Jupyter, when somebody looks at the notebook there
    Run.open(tmp_path / "run", {"seed": 0}).close()
    assert "seed: 0" in (tmp_path / "run/params.yaml").read_text() and (tmp_path / "run/figures/cohort.png").exists()


@pytest.mark.parametrize("result", ["checkpoints/last.pt", "log.csv", "index.csv", "encoder.safetensors"])
def test_what_is_written_before_the_first_checkpoint_does_not_fix_the_parameters(tmp_path, result):
    """A run that needed too much memory in its first step is started again with a smaller `chunk`."""
    run = tmp_path / "run"
    Run.open(run, {"chunk": 0}).close()
    for name in ("damaged.csv", "made_from.json", "made_from.csv", "tensorboard/events.out", "live.json", "index.html",
                 "2_pretrain.ipynb"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    Run.open(run, {"chunk": 3}).close()
    (run / result).parent.mkdir(exist_ok=True)
    (run / result).touch()
    with pytest.raises(RunError, match="chunk: the folder has 3, asked for 2"):
        Run.open(run, {"chunk": 2})


def test_a_folder_of_other_files_is_no_run_and_is_left_as_it_is(tmp_path):
    for name in ("predictions.csv", "figures/mine.png", "environment.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=r"no params.yaml, so it is no run of the kit, which could overwrite or delete "
                                       r"environment.txt, figures/mine.png, predictions.csv; give another output"):
        Run.open(tmp_path, {"seed": 0})
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {".lock"} == {
        "predictions.csv", "figures", "figures/mine.png", "environment.txt"}
    (tmp_path / "predictions.csv").unlink()
    (tmp_path / "figures" / "mine.png").unlink()
    with pytest.raises(RunError, match=r"could overwrite or delete environment.txt; give another output"):
        Run.open(tmp_path, {"seed": 0})
    (tmp_path / "environment.txt").unlink()
    Run.open(tmp_path, {"seed": 0}).close()


@pytest.mark.parametrize("name", ["2_pretrain.ipynb", "report.html", "slurm-1.out", "slurm-1.err", "job.log",
                                  "preparation.json", "shards/0", "cells/a", "seed0/log.csv", "lost+found/x.csv"])
def test_what_jobs_notebooks_and_shards_leave_before_a_run_is_no_other_file(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    Run.open(tmp_path, {"seed": 0}).close()
    assert (tmp_path / "params.yaml").exists() and (tmp_path / name).exists()


HOLDS = """
import sys
from kit.runs import Run
run = Run.open(sys.argv[1], {"seed": 0})
print("held", flush=True)
sys.stdin.read()
"""


def test_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDS, folder], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing this run"):
            Run.open(folder, {"seed": 0})
        other.stdin.close()
    run = Run.open(folder, {"seed": 0})
    asked = [sys.executable, "-c", HOLDS, folder]
    refused = subprocess.run(asked, cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert "another process is writing this run" in refused.stderr
    run.close()
    assert subprocess.run(asked, cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL).stdout == "held\n"


def test_a_requeued_job_waits_for_the_lock_of_its_dead_node(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", HOLDS, folder], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        begun = time.monotonic()
        with pytest.raises(RunError, match="another process is writing this run"):
            Run.open(folder, {"seed": 0})
        assert time.monotonic() - begun >= 0.5
        monkeypatch.setattr(runs, "LOCK_SECONDS", 60)
        monkeypatch.setattr(runs.time, "sleep", lambda _: other.kill() or other.wait())
        Run.open(folder, {"seed": 0}).close()
    assert capsys.readouterr().out.count("perhaps on the node that this requeued job had before; waiting") == 2


def test_a_run_made_before_a_parameter_existed_has_its_default(tmp_path):
    Run.open(tmp_path / "run", {"seed": 0}).close()
    (tmp_path / "run/log.csv").touch()
    with pytest.raises(RunError, match="clip: the folder has 0, asked for 1"):
        Run.open(tmp_path / "run", {"seed": 0, "clip": 1}, defaults={"clip": 0})
    Run.open(tmp_path / "run", {"seed": 0, "clip": 0}, defaults={"clip": 0}).close()
    with pytest.raises(RunError, match="clip: the folder has 0, asked for 1"):  # written down now
        Run.open(tmp_path / "run", {"seed": 0, "clip": 1})


def test_the_lock_belongs_to_the_process(tmp_path):
    """It holds the folder once, however often it asks, until the last that asked is done."""
    first, second = (Run.open(tmp_path / "run", {"seed": 0}) for _ in range(2))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    third = Run.open(tmp_path / "link", {"seed": 0})
    asked = [sys.executable, "-c", HOLDS, tmp_path / "run"]

    def free():
        return not subprocess.run(asked, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL).returncode

    first.close()
    second.close()
    assert not free()
    (tmp_path / "run/log.csv").touch()
    with pytest.raises(RunError, match="other parameters"):
        Run.open(tmp_path / "run", {"seed": 1})  # a refusal takes nothing away
    assert not free()
    del third  # as a cell does that is run again
    assert free()
    again = Run.open(tmp_path / "run", {"seed": 0})
    shutil.rmtree(tmp_path / "run")  # somebody starts afresh, and the kernel lives on
    assert Run.open(tmp_path / "run", {"seed": 0}).folder == again.folder
    assert (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, error):
    code = without("flock", error) + HOLDS
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, check=True)
    assert done.stdout == "held\n" and (tmp_path / "run/params.yaml").exists()
    assert f"this file system has no locks ({os.strerror(error)})" in done.stderr and "one at a time" in done.stderr
    assert "another process" not in done.stderr


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", without("flock", errno.EIO) + HOLDS, tmp_path / "run"], cwd=ROOT,
                          text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode and os.strerror(errno.EIO) in done.stderr and "another process" not in done.stderr


def test_packages_with_broken_metadata_stop_no_run(tmp_path):
    """Real folders beside ours: without a name, without a version, empty, and bytes that are no text."""
    for name, text in (("nameless", b"Metadata-Version: 2.1\nVersion: 1\n"), ("odd", b"\xff\xfe\x00Name"),
                       ("versionless", b"Name: versionless\n"), ("empty", None), ("fine", b"Name: fine\nVersion: 2\n")):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        if text is not None:
            (tmp_path / f"{name}-1.dist-info/METADATA").write_bytes(text)
    subprocess.run([sys.executable, "-c", HOLDS, tmp_path / "run"], cwd=ROOT, check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    lines = (tmp_path / "run/environment.txt").read_text().splitlines()
    broken = {f"{name}-1.dist-info (its metadata are broken)" for name in ("nameless", "odd", "versionless", "empty")}
    assert {"fine==2", *broken} <= set(lines)
    assert any(line.startswith("torch==") for line in lines)


def test_what_a_run_leaves(tmp_path):
    run = Run.open(tmp_path / "run", {"seed": 0})
    run.metrics({"loss": 2})
    assert run.metrics({"auc": 0.5}) == {"loss": 2.0, "auc": 0.5} == json.loads((run / "metrics.json").read_text())
    assert run.metrics({"auc_low": float("nan")})["auc_low"] is None
    assert run.metrics({"auc_high": float("inf")})["auc_high"] is None
    assert not {"NaN", "Infinity"} & set((run / "metrics.json").read_text().replace(",", " ").split())  # no JSON
    assert "torch==" in (run / "environment.txt").read_text()
    (run / "made_from.json").write_text('{"fingerprint": "f123"}')
    assert run.metrics({"auc": 0.6})["fingerprint"] == "f123"
    (run / "made_from.json").unlink()
    assert sorted(os.listdir(run.folder)) == [".lock", "environment.txt", "metrics.json", "params.yaml"]
