"""The template's mask is fitted to a scan; other tools are called as commands, and refused where they are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.data import brain
from kit.data.brain import INSTALL, missing_tool, template_mask, tool_mask
from kit.data.nifti import ScanError
from kit.data.template import template
from kit.params import Preprocess
from kit.reading import ParameterError, check

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
    import sys

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


def test_template_mask_follows_the_scans_own_edges() -> None:
    values, known, affine = template()
    depth, to_mm = brain._template_depth()
    assert depth.max() > 40 and depth.min() < -5
    # A brain that is 3 mm narrower than the template's all around, dark fluid up to the template's edge.
    shrunk = np.zeros(values.shape, np.float32)
    low = np.rint(np.linalg.inv(affine) @ to_mm @ [0, 0, 0, 1])[:3].astype(int)[::-1]
    box = tuple(slice(at, at + side) for at, side in zip(low, depth.shape, strict=True))
    shrunk[box] = np.where(depth > 3, 0.8, np.where(depth > 0, 0.15, 0))
    truth = np.zeros(values.shape, bool)
    truth[box] = depth > 3
    found = template_mask(shrunk, affine, np.eye(4))
    assert dice(found, truth) > 0.97 > dice(known, truth)
    # Without contrast there is nothing to follow: the template's own mask stays.
    assert dice(template_mask(np.where(truth, shrunk, 0) * (values > 0.75), affine, np.eye(4)), known) > 0.99


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))
