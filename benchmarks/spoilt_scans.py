"""Real scans moved, noised, cut, turned or of another contrast, and things that are no brains, written as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, from_matvec
from nibabel.eulerangles import euler2mat
from scipy import ndimage

from kit.preprocess.nifti import write_nifti
from kit.preprocess.pool import run_all
from kit.preprocess.register import ORIENTATIONS
from kit.preprocess.resample import resample
from kit.preprocess.scan_file import read_scan

Spoil = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _move(array: np.ndarray, affine: np.ndarray, rng: np.random.Generator, slice_mm: float = 0.0,
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A rotation of up to 20 degrees about each axis and a shift of up to 30 mm along each, then bias and noise."""
    middle = apply_affine(affine, (np.array(array.shape[::-1]) - 1) / 2)
    rotation = euler2mat(*np.deg2rad(rng.uniform(-20, 20, 3)))
    move = from_matvec(rotation, middle + rng.uniform(-30, 30, 3) - rotation @ middle)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    margin = np.ceil(40 / spacing).astype(int)
    to = affine @ from_matvec(np.eye(3), -margin)
    shape = np.array(array.shape[::-1]) + 2 * margin
    if slice_mm:
        factor = np.array([1, 1, slice_mm / spacing[2]])
        to, shape = to @ from_matvec(np.diag(factor)), np.maximum(shape / factor, 2).astype(int)
        array = ndimage.uniform_filter1d(array, max(1, round(slice_mm / spacing[2])), axis=0)
    moved = resample(array, affine, np.linalg.inv(move), tuple(shape[::-1].tolist()), to)
    return (*_noised(moved, to, rng)[:2], move)


def _noised(array: np.ndarray, affine: np.ndarray, rng: np.random.Generator, noise: float = 0.03, bias: float = 0.25,
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    field = ndimage.zoom(rng.normal(size=(4, 4, 4)).astype(np.float32), 8, order=3)
    field = ndimage.zoom(field, [side / 32 for side in array.shape], order=1)
    array = array * np.exp(bias * field / np.abs(field).max())
    sigma = noise * np.percentile(array, 99)
    # Rician, as in a magnitude image; a stripped scan's background stays zero.
    noisy = np.hypot(array + sigma * rng.standard_normal(array.shape), sigma * rng.standard_normal(array.shape))
    background = array == 0 if (array == 0).mean() > 0.5 else np.zeros(array.shape, bool)
    return np.where(background, 0, noisy).astype(np.float32), affine, np.eye(4)


def _neck_cut(array, affine, rng):
    """The lowest 12 % of slices are not in the field of view."""
    keep = round(0.12 * len(array))
    cut = affine.copy()
    cut[:3, 3] = apply_affine(affine, [0, 0, keep])
    return _move(array[keep:], cut, rng)


def _half(upper: bool) -> Spoil:
    def cut(array, affine, rng):
        bright = array > np.percentile(array, 60)
        rows = np.flatnonzero(bright.any((1, 2)))
        middle = int(rows[-1] - 75 / np.linalg.norm(affine[:3, 2]))  # half of a brain's height below the vertex
        out = array.copy()
        out[slice(middle, None) if upper else slice(middle)] = 0
        return out, affine, np.eye(4)
    return cut


def _turned(number: int) -> Spoil:
    def turn(array, affine, rng):
        return array, from_matvec(ORIENTATIONS[number]) @ affine, from_matvec(ORIENTATIONS[number])
    return turn


def _inverted(array, affine, rng):
    """Contrast as in a T2-weighted scan: dark becomes bright inside the head; the background stays dark."""
    top = np.percentile(array, 99.5)
    head = array > 0.1 * top
    return np.where(head, (1.1 * top - np.minimum(array, top)), array * 0.2).astype(np.float32), affine, np.eye(4)


def _two_values(array, affine, rng):
    return (array > np.percentile(array, 75)).astype(np.float32) * 100, affine, np.eye(4)


def _like_ct(array, affine, rng):
    """Bone bright, brain nearly without contrast, air dark; the skull is what is dark between scalp and brain."""
    top = np.percentile(array, 99)
    head = ndimage.binary_fill_holes(ndimage.binary_closing(array > 0.15 * top, iterations=3))
    depth = ndimage.distance_transform_edt(head, sampling=np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    hounsfield = np.where(head, 35 + 5 * np.clip(array / top, 0, 1), -1000)
    hounsfield[(depth > 5) & (depth < 12)] = 900
    return (hounsfield + rng.normal(0, 4, array.shape) + 1000).astype(np.float32), affine, np.eye(4)


def _mirrored(array, affine, rng):
    flip = np.diag([-1.0, 1, 1, 1])
    middle = apply_affine(affine, (np.array(array.shape[::-1]) - 1) / 2)
    flip[0, 3] = 2 * middle[0]
    return np.ascontiguousarray(array[:, :, ::-1]), affine, flip


SPOILT: dict[str, Spoil] = {
    "moved": _move, "noise 10 %": lambda array, affine, rng: _noised(array, affine, rng, 0.1, 0.0),
    "bias 60 %": lambda array, affine, rng: _noised(array, affine, rng, 0.01, 0.6),
    "neck cut": _neck_cut, "thick slices": lambda array, affine, rng: _move(array, affine, rng, 6.0),
    "mirrored": _mirrored,
    **{f"turned {name}": _turned(number) for number, name in
       [(next(n for n, turn in enumerate(ORIENTATIONS) if np.array_equal(turn, np.diag(signs))), axis)
        for axis, signs in (("x", [1, -1, -1]), ("y", [-1, 1, -1]), ("z", [-1, -1, 1]))]},
    "permuted": _turned(7), "no upper half": _half(True), "no lower half": _half(False),
    "contrast inverted": _inverted, "two values": _two_values, "like CT": _like_ct,
}


def write_spoilt(folder: Path, scans: dict[str, str], kinds: dict[str, Spoil], workers: int) -> pd.DataFrame:
    """Write scans (participant: path) spoilt in each way, and the moves that were made; a row a file."""
    rows = [{"participant": f"{of}-{kind.replace(' ', '-').replace('%', '')}", "of": of, "kind": kind, "session": "01",
             "dataset": "spoilt"} for kind in kinds for of in scans]
    table = pd.DataFrame(rows)
    table["image_path"] = [str(folder / f"{name}.nii.gz") for name in table["participant"]]
    todo = [(row.kind, scans[row.of], row.image_path, number) for number, row in enumerate(table.itertuples())
            if not Path(row.image_path).is_file()]
    for _ in run_all(_write_spoilt, todo, workers):
        pass
    return table


def _write_spoilt(task: tuple[str, str, str, int]) -> bool:
    kind, source, target, number = task
    array, affine, move = SPOILT[kind](*read_scan(source), np.random.default_rng([11, number]))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(target.removesuffix(".nii.gz") + ".txt", move)
    write_nifti(target, array, affine)
    return True


def write_no_brains(folder: Path, label_maps: list[str], names: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Write things that are no brains, all or those of some names; a row a file, and one a label map."""
    shape, to = (90, 110, 100), from_matvec(np.diag([2.0] * 3), [-100, -110, -90])
    z, y, x = np.meshgrid(*(2.0 * (np.arange(side) - side / 2) for side in shape), indexing="ij")
    radius, rng = np.sqrt(x**2 + y**2 + z**2), np.random.default_rng(5)
    angle = np.arctan2(y, x)
    noise = rng.rayleigh(4, shape)
    ball = np.where(radius < 75, 100, 0) + noise
    water = np.where(radius < 68, 100 * np.exp(-radius / 200), 0) + noise
    egg = np.where((x / 62) ** 2 + (y / 80) ** 2 + (z / 60) ** 2 < 1, 100, 0.0)
    shepp = egg - 60 * ((x / 57) ** 2 + (y / 75) ** 2 + (z / 55) ** 2 < 1) + noise
    for at, size in (((20, 10, 0), 15), ((-20, 10, 0), 18), ((0, 40, 10), 20), ((0, -35, 0), 10)):
        shepp += 30 * ((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2 < size**2)
    orange = np.where(radius < 45, 70 + 30 * (np.abs(np.sin(5 * angle)) > 0.2), 0) + noise
    orange += 50 * ((radius >= 45) & (radius < 52))
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), 3)
    melon = np.where(radius < 80, 80 + 150 * texture, 0).clip(0) + noise
    torso = np.where((x / 95) ** 2 + (y / 70) ** 2 < 1, 60, 0.0)
    for at, size, value in (((45, 0), 35, 10), ((-45, 0), 35, 10), ((0, -45), 15, 150)):
        torso[(x - at[0]) ** 2 + (y - at[1]) ** 2 < size**2] = value
    things = {"noise": noise * 10, "ball": ball, "water bottle": water,
              "stripped egg": egg * (1 + 0.05 * rng.standard_normal(shape)), "phantom": shepp,
              "orange": orange, "melon": melon, "torso": torso + noise}
    rows = []
    for name, array in things.items():
        write_nifti(folder / f"{name.replace(' ', '-')}.nii.gz", array.astype(np.float32), to)
        rows.append((name, str(folder / f"{name.replace(' ', '-')}.nii.gz")))
    rows += [(f"label map {number}", path) for number, path in enumerate(label_maps)]
    rows = [(name, path) for name, path in rows if names is None or name in names]
    return pd.DataFrame([{"participant": name.replace(" ", "-"), "of": "", "kind": "no brain", "session": "01",
                          "dataset": "spoilt", "image_path": path} for name, path in rows])
