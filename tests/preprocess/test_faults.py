"""Twelve kinds of bad file beside eight good scans; killed runs that go on as if nothing had been."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from kit.preprocess.nifti import read_nifti, write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.resample import resample
from kit.preprocess.settings import Preparation
from kit.preprocess.template import template
from kit.store.grid import Grid
from kit.store.store import Store

GRID = Grid((25, 32, 33), 6.0)
ROOT = Path(__file__).resolve().parents[2]


def brain(seed: int, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The template at `size` mm with noise, and its affine."""
    values, mask, affine = template()
    to = affine @ np.diag([size, size, size, 1])
    image = resample(values * mask, affine, np.eye(4), tuple(side // size for side in values.shape), to)
    noise = np.random.default_rng(seed).normal(0, 2, image.shape)
    return np.where(image > 0.05, 100 * image + noise, 0).clip(0).astype(np.float32), to


def good(path: Path, seed: int = 0, size: int = 4) -> str:
    write_nifti(path, *brain(seed, size))
    return str(path)


def header_edit(path: Path, offset: int, value: bytes) -> str:
    good(path)
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)
    return str(path)


def values_edit(path: Path, change) -> str:
    array, affine = brain(0)
    write_nifti(path, change(array), affine)
    return str(path)


# name: (how the file is made, what failed.csv says)
BAD = {
    "missing": (lambda path: str(path), "no such file"),
    "text": (lambda path: (path.write_text("not an image"), str(path))[1], "not a NIfTI"),
    "cut": (lambda path: (Path(good(path.with_suffix(".nii.gz"))).write_bytes(
        path.with_suffix(".nii.gz").read_bytes()[:5000]), str(path.with_suffix(".nii.gz")))[1], "truncated gzip"),
    "series": (lambda path: (nib.save(nib.Nifti1Image(np.stack([brain(0)[0].T] * 2, -1), brain(0)[1]), path),
                             str(path))[1], "one 3D volume"),
    "zero": (lambda path: values_edit(path, np.zeros_like), "all zero"),
    "constant": (lambda path: values_edit(path, lambda array: array * 0 + 3), "constant: each voxel is 3"),
    "nan": (lambda path: values_edit(path, lambda array: np.where(array > 90, np.nan, array)), "NaN"),
    "infinite": (lambda path: values_edit(path, lambda array: np.where(array > 90, np.inf, array)), "infinite"),
    "voxels": (lambda path: header_edit(path, 80, np.float32(-4).tobytes()), "zero or negative"),
    "nowhere": (lambda path: header_edit(path, 252, bytes(4)), "both 0.*orientation_unknown: assume_ras"),
    "noise": (lambda path: values_edit(path, lambda array: np.random.default_rng(1).uniform(1, 9, array.shape)),
              "zero is not its background"),
    "dicom": (lambda path: (path.with_suffix("").mkdir(), str(path.with_suffix("")))[1], "one DICOM series"),
}


def twenty(folder: Path) -> pd.DataFrame:
    paths = {name: make(folder / f"{name}.nii") for name, (make, _) in BAD.items()}
    paths |= {f"good{number}": good(folder / f"good{number}.nii.gz", number) for number in range(8)}
    return pd.DataFrame({"participant": list(paths), "session": "1", "dataset": "d",
                         "image_path": list(paths.values())})


@pytest.mark.slow
def test_twelve_bad_files_cost_eight_good_scans_nothing(tmp_path: Path) -> None:
    cohort = twenty(tmp_path)
    index, failed = prepare(cohort, tmp_path / "out", Preparation(GRID, "rigid", "nonzero"), workers=2)
    assert index["participant"].tolist() == [f"good{number}" for number in range(8)]
    assert failed["participant"].tolist() == list(BAD)
    for name, reason in zip(failed["participant"], failed["reason"], strict=True):
        assert pd.Series([reason]).str.contains(BAD[name][1])[0], f"{name}: {reason}"
        assert str(tmp_path) not in reason
    assert pd.read_csv(tmp_path / "out" / "failed.csv")["reason"].tolist() == failed["reason"].tolist()
    assert index["template_similarity"].min() > 0.9


def test_masks_of_another_shape_or_empty_are_reasons(tmp_path: Path) -> None:
    array, affine = brain(0)
    masks = {"good": (array > 0, affine), "shape": (array[1:] > 0, affine), "empty": (array > 1e6, affine)}
    for name, mask in masks.items():
        write_nifti(tmp_path / f"{name}.nii", *mask)
    cohort = pd.DataFrame({"participant": list(masks), "session": "1", "dataset": "d",
                           "image_path": good(tmp_path / "scan.nii.gz"),
                           "mask_path": [str(tmp_path / f"{name}.nii") for name in masks]})
    index, failed = prepare(cohort, tmp_path / "out", Preparation(GRID, "none", "given"), workers=0)
    assert index["participant"].tolist() == ["good"]
    assert "mask: its shape" in failed["reason"][0] and "mask: all zero" in failed["reason"][1]


def test_scan_without_codes_is_taken_as_stored_where_asked(tmp_path: Path) -> None:
    paths = [good(tmp_path / "said.nii"), header_edit(tmp_path / "unsaid.nii", 252, bytes(4))]
    (said, said_affine), (unsaid, affine) = read_nifti(paths[0]), read_nifti(paths[1], no_codes_ok=True)
    np.testing.assert_array_equal(said, unsaid)
    np.testing.assert_allclose(affine[:3, :3], said_affine[:3, :3])
    middle = affine @ [*(np.array(unsaid.shape[::-1]) - 1) / 2, 1]
    np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-4)
    cohort = pd.DataFrame({"participant": ["said", "unsaid"], "session": "1", "dataset": "d", "image_path": paths})
    settings = Preparation(GRID, "none", "nonzero", orientation_unknown="assume_ras")
    assert prepare(cohort, tmp_path / "out", settings, workers=0)[1].empty


KILLED = """
import sys
import pandas as pd
from pathlib import Path
from kit.store.grid import Grid
from kit.preprocess.preprocess import Preparation, prepare
if __name__ == "__main__":
    cohort = pd.read_csv(sys.argv[1], dtype=str)
    settings = Preparation(Grid((25, 32, 33), 6.0), "none", "nonzero", "n4")
    prepare(cohort, sys.argv[2], settings, workers=int(sys.argv[3]))
"""


def digests(folder: Path) -> dict[str, str]:
    """Of everything that is to be the same; the time taken stands in the files and the index."""
    store = Store.open(folder)
    arrays = {scan: hashlib.sha256(store.read(scan)[0].tobytes()).hexdigest() for scan in store.index["scan"]}
    return arrays | {"index": store.index.drop(columns="seconds").to_csv()}


@pytest.mark.slow
def test_killed_three_times_then_run_once_is_an_undisturbed_run(tmp_path: Path) -> None:
    paths = [good(tmp_path / f"{number}.nii.gz", number, size=8) for number in range(12)]
    cohort = pd.DataFrame({"participant": [f"p{number}" for number in range(12)], "session": "1", "dataset": "d",
                           "image_path": paths})
    cohort.to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "run.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KIT_PROGRESS": "off"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "cohort.csv")]

    def start(folder: Path, workers: int) -> subprocess.Popen:
        return subprocess.Popen([*command, str(folder), str(workers)], env=environment, start_new_session=True)

    begun = time.monotonic()
    assert start(tmp_path / "undisturbed", 2).wait() == 0
    whole = time.monotonic() - begun
    rng = np.random.default_rng(0)
    scans = tmp_path / "killed" / "scans"
    for workers in range(3):
        process = start(tmp_path / "killed", workers)
        time.sleep(rng.uniform(0.2, 0.8) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "index.csv").exists() or len(list(scans.glob("*.b2nd"))) == 12
    assert start(tmp_path / "killed", 2).wait() == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert len(Store.open(tmp_path / "killed").index) == 12
    assert sorted(path.name for path in scans.iterdir()) == sorted(f"d_p{number}_1.b2nd" for number in range(12))


def test_processes_end_with_their_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("import os, time\nfrom kit.preprocess.pool import run_all\n\ndef slow(task):\n"
                      "    print(os.getpid(), flush=True)\n    time.sleep(1)\n\n"
                      "if __name__ == '__main__':\n    list(run_all(slow, [1, 2, 3, 4, 5, 6], 1))\n")
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z (zombie)" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {worker} outlived its parent")
