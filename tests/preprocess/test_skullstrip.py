"""A scan's brain: given, its own voxels, deepbet's; other tools are called as commands, and refused where they miss."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from kit.params import Preprocess
from kit.preprocess import skullstrip
from kit.preprocess.nifti import ScanError, write_nifti
from kit.preprocess.skullstrip import INSTALL, NETWORKS, deepbet_mask, dice, find_brain, missing_tool, tool_mask
from kit.preprocess.template import template
from kit.reading import ParameterError, check
from kit.runs import ROOT

AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -7], [0, 0, 3, -11], [0, 0, 0, 1]])
TOOLS = ("hd-bet", "mri_synthstrip")

# Stands in for a tool: reads its own options, and finds what is brighter than 100. The first argument says how it
# fails, if it is to.
SCRIPT = '''#!{python}
import sys, nibabel, numpy
options = dict(zip(sys.argv[1:], sys.argv[2:]))
if "{fault}" == "code":
    sys.exit("out of memory")
image = nibabel.load(options["-i"])
mask = (numpy.asarray(image.dataobj) > 100).astype("uint8")
path = options["-m"] if "-m" in options else options["-o"].replace(".nii.gz", "_bet.nii.gz")
assert "-m" in options or "--save_bet_mask" in sys.argv
if "{fault}" == "shape":
    mask = mask[1:]
if "{fault}" != "nothing":
    nibabel.save(nibabel.Nifti1Image(mask, image.affine), path)
'''


def scan() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 200, (9, 8, 7)).astype(np.float32)


def install(tool: str, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str = "") -> None:
    (folder / tool).write_text(SCRIPT.format(python=sys.executable, fault=fault), encoding="utf-8")
    (folder / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_is_called_on_the_scan_and_its_mask_read(tool: str, tmp_path: Path, monkeypatch) -> None:
    install(tool, tmp_path, monkeypatch)
    assert missing_tool(tool) is None
    np.testing.assert_array_equal(tool_mask(tool, scan(), AFFINE), scan() > 100)


@pytest.mark.parametrize(("fault", "reason"), [
    ("code", "mri_synthstrip ended with code 1 and no mask: out of memory"), ("nothing", "code 0 and no mask"),
    ("shape", "mask: its shape"),
])
def test_a_tool_that_fails_is_a_reason(fault: str, reason: str, tmp_path: Path, monkeypatch) -> None:
    install("mri_synthstrip", tmp_path, monkeypatch, fault)
    with pytest.raises(ScanError, match=reason):
        tool_mask("mri_synthstrip", scan(), AFFINE)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_is_not_there_is_refused_before_work(tool: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ParameterError) as caught:
        check(Preprocess, {"output_dir": str(tmp_path), "mask": tool})
    assert f"no command '{tool}'" in str(caught.value) and INSTALL[tool] in str(caught.value)


def stripped() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain alone at 2 mm, and its affine."""
    values, mask, affine = template()
    return np.where(mask, 100 * values, 0)[::2, ::2, ::2].copy(), affine @ np.diag([2, 2, 2, 1])


def test_auto_takes_a_given_mask_and_a_stripped_scan_as_they_are(tmp_path: Path) -> None:
    array, affine = stripped()
    own = ndimage.binary_fill_holes(array > 0)
    found = find_brain("auto", array, affine, "")
    assert found.source == "nonzero"
    np.testing.assert_array_equal(found.mask, own)

    smaller = ndimage.binary_erosion(own)
    write_nifti(tmp_path / "mask.nii.gz", smaller, affine)
    found = find_brain("auto", array, affine, str(tmp_path / "mask.nii.gz"))
    assert found.source == "given"
    np.testing.assert_array_equal(found.mask, smaller)


@pytest.mark.slow
def test_auto_takes_z_scored_and_interpolated_brains_as_stripped() -> None:
    array, affine = stripped()
    own = ndimage.binary_fill_holes(array > 0)
    inside = (array - array[own].mean()) / array[own].std()
    for scored in (np.where(own, inside, 0), (array - array.mean()) / array.std()):
        found = find_brain("auto", scored.astype(np.float32), affine, "")
        assert found.source == "nonzero"
        np.testing.assert_array_equal(found.mask, own)
    moved = ndimage.shift(array, (0.5, 0.3, 0.4), order=3)
    found = find_brain("auto", moved, affine, "")
    assert found.source == "nonzero" and dice(found.mask, own) > 0.95


def test_auto_takes_a_stripped_scan_in_which_deepbet_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(array: np.ndarray, quick: bool = False) -> np.ndarray:
        raise ScanError("deepbet finds no brain")

    monkeypatch.setattr(skullstrip, "deepbet_mask", nothing)
    array, affine = stripped()
    found = find_brain("auto", array, affine, "")
    assert found.source == "nonzero"
    np.testing.assert_array_equal(found.mask, ndimage.binary_fill_holes(array > 0))
    head = np.where(ndimage.binary_dilation(array > 0, iterations=10), 90, array)  # larger than a brain
    whole = array + np.random.default_rng(0).uniform(0, 50, array.shape)  # without a background
    for kind, scan in (("deepbet", array), ("auto", head), ("auto", whole)):
        with pytest.raises(ScanError, match="deepbet finds no brain"):
            find_brain(kind, scan, affine, "")


def test_auto_strips_what_has_a_head_around_it() -> None:
    array, affine = stripped()
    own = ndimage.binary_fill_holes(array > 0)
    distance = ndimage.distance_transform_edt(~own, sampling=2)
    array[(distance > 8) & (distance < 20)] = 90  # a scalp; zero in the skull and outside
    found = find_brain("auto", array, affine, "")
    assert found.source == "deepbet"
    assert dice(found.mask, own) > 0.9


def test_two_runs_of_the_network_agree_to_the_bit() -> None:
    array, _ = stripped()
    np.testing.assert_array_equal(deepbet_mask(array, quick=True), deepbet_mask(array, quick=True))


def test_what_has_no_brain_to_speak_of_is_refused() -> None:
    array, affine = stripped()
    with pytest.raises(ScanError, match="no brain: its mask .nonzero. has"):
        find_brain("nonzero", np.where(np.arange(array.shape[0])[:, None, None] == 30, array, 0), affine, "")


def test_networks_that_are_not_as_expected_are_refused_before_work(tmp_path: Path, monkeypatch) -> None:
    real = Path(importlib.util.find_spec("deepbet").origin).parents[1]
    (tmp_path / "deepbet").mkdir()
    (tmp_path / "deepbet" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "data" / "models").mkdir(parents=True)
    for name in NETWORKS:
        data = bytearray((real / "data" / "models" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "data" / "models" / name).write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepbet", raising=False)
    skullstrip._network_folder.cache_clear()
    try:
        with pytest.raises(ParameterError, match="deepbet's bbox_model.pt is missing or not the one of deepbet 1.0.2"):
            check(Preprocess, {"output_dir": str(tmp_path), "mask": "auto"})
    finally:
        skullstrip._network_folder.cache_clear()


def test_no_window_is_needed() -> None:
    """deepbet's own program draws a window by tkinter, which servers lack."""
    code = ("import sys; sys.modules['tkinter'] = sys.modules['customtkinter'] = None\n"
            "from kit.preprocess.skullstrip import _network; _network()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
