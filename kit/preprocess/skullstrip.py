"""Find the brain in a scan's own voxels: a given mask, a stripped scan's, deepbet's, or another tool's."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kit.preprocess.header import corners_apart
from kit.preprocess.mask import LEAST_BRAIN_ML, MOST_BRAIN_ML, millilitres, nonzero_mask, own_voxels, read_mask
from kit.preprocess.nifti import ScanError, other_form, write_nifti

if TYPE_CHECKING:
    from deepbet import BrainExtraction

# deepbet's mask misses at most this share of a stripped scan's own voxels (all but its background), and 0.7 or more
# of a whole head's.
STRIPPED_OUTSIDE = 0.3

# deepbet 1.0.2's networks (TorchScript, in its wheel) and their SHA-256; other files are refused.
NETWORKS = {
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    "model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
}
# External commands: each reads IMAGE and writes MASK, or (HD-BET) its mask as <BRAIN>_bet.nii.gz.
COMMANDS = {
    "hd-bet": ["hd-bet", "-i", "IMAGE", "-o", "BRAIN", "-device", "cpu", "--disable_tta", "--save_bet_mask",
               "--no_bet_image"],
    "mri_synthstrip": ["mri_synthstrip", "-i", "IMAGE", "-m", "MASK"],
}
INSTALL = {
    "hd-bet": "pip install hd-bet (https://github.com/MIC-DKFZ/HD-BET)",
    "mri_synthstrip": "install FreeSurfer 7.3 or newer, or SynthStrip's own script "
                      "(https://surfer.nmr.mgh.harvard.edu/docs/synthstrip)",
}
TOOL_MINUTES = 60.0


class Brain(NamedTuple):
    """A brain mask on a scan's voxels."""

    mask: np.ndarray  # bool (z, y, x)
    source: str  # given, nonzero, deepbet, hd-bet or mri_synthstrip
    note: str = ""  # remark on the headers' sform and qform


def missing_tool(mask: str) -> str | None:
    """Return what to install if a kind of mask needs something missing; None if nothing is."""
    if mask in ("auto", "deepbet"):
        try:
            _network_folder()
        except ScanError as error:
            return f"mask: {error}"
    if mask in COMMANDS and not shutil.which(COMMANDS[mask][0]):
        return f"mask: no command {COMMANDS[mask][0]!r} on the PATH; {INSTALL[mask]}, or choose another mask"
    return None


def find_brain(kind: str, array: np.ndarray, affine: np.ndarray, mask_path: str, no_codes_ok: bool = False,
               other: np.ndarray | None = None) -> Brain:
    """Find a scan's brain.

    Args:
        kind: "given", "nonzero", "deepbet", a name in `COMMANDS`, or "auto": the given mask if there is one; else
            the voxels outside the background of an already stripped scan, or of one in which deepbet finds no brain;
            else deepbet's.
        array: (z, y, x) intensities.
        affine: (4, 4), voxel (x, y, z) to the scan's millimetres, RAS+.
        mask_path: the cohort's, or "".
        no_codes_ok: see `kit.preprocess.scan_file.read_scan`.
        other: where the header's other form (qform) puts the scan; see `kit.preprocess.nifti.other_form`.

    Raises:
        ScanError: no mask is given, or it cannot be used; deepbet or the tool is missing, fails or finds nothing; or
            the brain has less than `LEAST_BRAIN_ML`.
    """
    note = "" if other is None else (
        f"sform and qform disagree by {corners_apart(affine, other, array.shape):.1f} mm, sform taken")
    if kind == "given" or (kind == "auto" and mask_path):
        if not mask_path:
            raise ScanError("mask: no mask_path given for this scan; add it, or choose mask: auto")
        given = read_mask(mask_path, array, affine, no_codes_ok, other)
        if given.by_other_form:
            note = ", ".join(filter(None, [note, "mask aligned only by the qform, applied voxel by voxel"]))
        found = Brain(given.mask, "given")
    elif kind == "nonzero":
        found = Brain(nonzero_mask(array, affine), kind)
    elif kind in COMMANDS:
        found = Brain(tool_mask(kind, array, affine), kind)
    else:
        own = own_voxels(array) if kind == "auto" else None
        _network()  # raises if deepbet is missing
        try:
            found = Brain(deepbet_mask(array), "deepbet")
        except ScanError:  # deepbet knows whole heads, and may find nothing in a stripped one
            if own is None or millilitres(own, affine) > MOST_BRAIN_ML:
                raise
            found = Brain(own, "nonzero")
        if own is not None and np.count_nonzero(own & ~found.mask) <= STRIPPED_OUTSIDE * np.count_nonzero(own):
            found = Brain(own, "nonzero")
    if (volume := millilitres(found.mask, affine)) < LEAST_BRAIN_ML:
        raise ScanError(f"no brain: its mask ({found.source}) has {volume:.0f} ml; look at the scan, and choose "
                        "another mask if it has one")
    return found._replace(note=note)


def deepbet_mask(array: np.ndarray, quick: bool = False) -> np.ndarray:
    """Return the brain that deepbet finds in a T1-weighted head (Fisch et al. 2024), bool (z, y, x).

    Uses its own network, pre- and post-processing (doi:10.1016/j.compbiomed.2024.108845), on CUDA if available, else
    on one thread. It nearly always finds something: in noise, or a head lying on its side, a wrong brain.

    Args:
        array: (z, y, x) intensities in RAS order.
        quick: for a first look, use 128 voxels a side instead of 256, an eighth of the work.

    Raises:
        ScanError: it finds nothing at all.
    """
    import torch

    network, threads = _network(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        likely = network.run_model(np.ascontiguousarray(array.T), shape=(128 if quick else 256,) * 3)
        mask = network.postprocess(likely > 0.5)
    except (AssertionError, ValueError) as error:  # no voxel in the bounding box, or none in the mask
        raise ScanError("deepbet finds no brain; is this a T1-weighted head? If it is, give a mask (mask: given)"
                        ) from error
    finally:
        torch.set_num_threads(threads)
    return np.ascontiguousarray(mask.T) > 0


def tool_mask(tool: str, array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the mask that an installed command-line tool finds, bool (z, y, x).

    The tool gets the scan (z, y, x) as a new NIfTI file in a temporary folder, without its original header.

    Raises:
        ScanError: the command failed, took longer than an hour, or wrote no mask for this scan.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {"IMAGE": "scan.nii.gz", "BRAIN": "brain.nii.gz", "MASK": "mask.nii.gz"}
        paths = {name: str(Path(folder) / file) for name, file in paths.items()}
        write_nifti(paths["IMAGE"], array, affine)
        command = [paths.get(part, part) for part in COMMANDS[tool]]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60 * TOOL_MINUTES, check=False)
        except OSError as error:
            raise ScanError(f"{tool} did not start: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ScanError(f"{tool} took longer than {TOOL_MINUTES:g} minutes") from error
        written = [Path(folder) / name for name in ("mask.nii.gz", "brain_bet.nii.gz")]
        found = next((path for path in written if path.is_file()), None)
        if done.returncode or found is None:
            last = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-1:]
            raise ScanError(f"{tool} ended with code {done.returncode} and "
                            f"{'a' if found else 'no'} mask: {''.join(last)[:200]}".replace(folder, ""))
        # the tool may use ITK, which reads the qform if the sform is sheared; a qform cannot be
        return read_mask(found, array, affine, other=other_form(paths["IMAGE"])).mask


@lru_cache(maxsize=1)
def _network() -> BrainExtraction:
    """Return deepbet's networks, loaded once per process."""
    folder = _network_folder()
    from deepbet import BrainExtraction

    return BrainExtraction(model_path=str(folder / "model.pt"), bbox_model_path=str(folder / "bbox_model.pt"))


@lru_cache(maxsize=1)
def _network_folder() -> Path:
    """Return the folder of deepbet's networks after checking their hashes; the package itself is not imported.

    Raises:
        ScanError: deepbet is not installed, or a file is not as expected.
    """
    spec = importlib.util.find_spec("deepbet")
    if spec is None or spec.origin is None:
        raise ScanError("deepbet is not installed; pip install deepbet==1.0.2, or choose another mask")
    folder = Path(spec.origin).parents[1] / "data" / "models"
    for name, expected in NETWORKS.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ScanError(f"deepbet's {name} is missing or not the one of deepbet 1.0.2; pip install "
                            "--force-reinstall --no-deps deepbet==1.0.2")
    return folder


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Dice overlap of two bool arrays; 0.0 if both are empty."""
    total = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / total if total else 0.0
