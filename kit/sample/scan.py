"""Generate one procedural scan: a head in a pose, seen by a site's scanner.

The brain is cut out, as after skull stripping. Arrays are (z, y, x). A scan's bits depend only on the generator's
version, the seed, the names of participant and session, and their labels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from nibabel.affines import from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from kit.sample import anatomy as head
from kit.sample.anatomy import Anatomy, smooth_field, stream
from kit.sample.atlas import Atlas, load_atlas
from kit.store.grid import PAPER_CENTRE_MM, Grid

GRID = Grid((84, 104, 80), 2.0)
POSE_DEGREES, POSE_MM = 3.0, 1.5  # SD of the pose, about and along each axis
INTENSITY_UNIT = 100  # white matter is about 88; finer levels would only store more digits of noise


@dataclass(frozen=True)
class Site:
    """A scanner: tissue intensities and image quality."""

    csf: float  # mean intensities; 1 is the template's brightest voxel
    grey: float
    white: float
    gamma: float  # mean exponent of the intensities over the site's scans
    gamma_spread: float  # SD of that exponent between scans
    bias: float  # SD of the log field's spline coefficients
    noise: float  # SD of each part of the complex signal
    fwhm_mm: tuple[float, float, float]  # of the point spread function along (x, y, z), at least the voxel's 2 mm


SITES = {
    "A": Site(0.22, 0.66, 0.88, 1.00, 0.04, 0.10, 0.015, (2.2, 2.2, 2.2)),
    "B": Site(0.18, 0.62, 0.90, 1.12, 0.05, 0.18, 0.025, (2.4, 2.4, 3.5)),
    "C": Site(0.28, 0.70, 0.86, 0.90, 0.05, 0.14, 0.020, (3.2, 2.4, 2.4)),
    "OOD": Site(0.34, 0.70, 0.89, 0.82, 0.05, 0.28, 0.035, (2.6, 5.0, 2.6)),
}


@dataclass(frozen=True)
class ProceduralScan:
    """A scan, and the ground truth about it.

    Args:
        image: int16 (z, y, x), 0 outside the brain and at least 1 inside.
        brain: bool (z, y, x).
        effects: bool (z, y, x), where the effect of each name is strongest, not all that it changes: `lesion` (if any)
            holds about 85 % of a stroke's change in intensity, `hippocampus` (medial temporal lobes) a third of AD's,
            which also opens horns and sulci, `ventricles` (to 3 mm outside their walls) 8 % of ageing's and `cortex`
            (the outer 6 mm) 58 %. `cerebellum` is for sex, which also scales the whole head.
        affine: (4, 4), voxel (x, y, z) to mm, RAS+.
        latent: the fields of `Anatomy`, `lesion_ml` (millilitres) and `pose` ((4, 4), head mm to RAS mm); JSON values.
    """

    image: np.ndarray
    brain: np.ndarray
    effects: dict[str, np.ndarray]
    affine: np.ndarray
    latent: dict[str, Any]


def make_scan(
    participant: str, session: str, *, seed: int, age: float, sex: str, diagnosis: str, site: str,
    atlas: Atlas | None = None,
) -> ProceduralScan:
    """Make one scan, in about 0.3 s on one core.

    Args:
        participant: the participant's name; the sessions of one participant share the anatomy, apart from ageing.
        session: the session's name; it determines pose, contrast, bias field and noise.
        seed: the cohort's seed.
        age: years at this session.
        sex, diagnosis, site: "F" or "M"; "CN", "AD" or "stroke"; a name in `SITES`.
        atlas: the template; loaded if not given.

    Raises:
        ValueError: an unknown sex, diagnosis or site.
    """
    for name, value, known in (("sex", sex, ("F", "M")), ("diagnosis", diagnosis, ("CN", "AD", "stroke")),
                               ("site", site, tuple(SITES))):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    atlas = atlas or load_atlas()
    person = head.draw_anatomy(seed, participant, age, sex, diagnosis)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-identical sums, whatever the caller's number of threads
    try:
        pose = draw_pose(seed, participant, session)
        tissue = _tissue(GRID, pose, seed, participant, person, atlas)
        image = _acquire(tissue, SITES[site], GRID, seed, participant, session)
    finally:
        torch.set_num_threads(threads)
    brain = (tissue["brain"] > 0.5).numpy()
    marks = {"ventricles": tissue["distance"] < 3, "cortex": tissue["depth"] < 6,
             "hippocampus": tissue["medial_temporal"] > 0.15, "cerebellum": tissue["cerebellum"] > 0.5,
             "lesion": tissue["lesion"] > 0.5}
    effects = {name: mark.numpy() & brain for name, mark in marks.items()}
    levels = np.round(image * INTENSITY_UNIT).clip(1, np.iinfo(np.int16).max) * brain
    latent = {**asdict(person), "lesion_ml": effects["lesion"].sum().item() * 0.008, "pose": pose.tolist()}
    if not person.lesion_side:
        del effects["lesion"]
    return ProceduralScan(levels.astype(np.int16), brain, effects, GRID.affine, latent)


def draw_pose(seed: int, participant: str, session: str) -> np.ndarray:
    """Draw how the head lies in the scanner: (4, 4) rigid, head mm to RAS mm."""
    rng = stream(seed, participant, session, "pose")
    return rigid(rng.normal(0, POSE_DEGREES, 3), rng.normal(0, POSE_MM, 3))


def rigid(rotation_degrees: np.ndarray, translation_mm: np.ndarray) -> np.ndarray:
    """Return the (4, 4) matrix that rotates by a rotation vector about the head's centre, then translates."""
    turn, centre = Rotation.from_rotvec(rotation_degrees, degrees=True).as_matrix(), np.array(PAPER_CENTRE_MM)
    return from_matvec(turn, centre - turn @ centre + translation_mm)


def head_points(grid: Grid, pose: np.ndarray) -> torch.Tensor:
    """Return the point of the head (mm) that each voxel of the grid shows: float32 (3, z, y, x)."""
    to_head = np.linalg.inv(pose) @ grid.affine
    z, y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid.shape), indexing="ij")
    matrix = torch.from_numpy(to_head[:3].astype(np.float32))
    return torch.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in matrix])


def _tissue(
    grid: Grid, pose: np.ndarray, seed: int, participant: str, person: Anatomy, atlas: Atlas,
) -> dict[str, torch.Tensor]:
    """Look up the tissue in the atlas and apply age and disease; return named (z, y, x) maps."""
    # Deformations are smooth: compute them on a grid of half the (even) sides and interpolate, for speed. Each coarse
    # voxel is centred on 2x2x2 fine ones, as `interpolate` takes it to be.
    depth, height, width = grid.shape
    coarse = Grid((depth // 2, height // 2, width // 2), 2 * grid.spacing_mm)
    points = head_points(coarse, pose)
    fields = head.draw_fields(seed, participant).at(points)
    points = head.deform(points, fields[:3], person, atlas)
    smooth = torch.cat([points, atlas.distances.at(points)[[0, 4]], fields[3:]])  # 0 and 4: distance, depth
    smooth = torch.nn.functional.interpolate(smooth[None], scale_factor=2, mode="trilinear")[0]
    points, (distance, below), (texture, cortex_texture, edge) = smooth.split([3, 2, 3])
    tissue = torch.zeros(5, *grid.shape)
    near = below > 0  # the brain, and up to two voxels more
    tissue[:, near] = atlas.tissue.at(points[:, near][:, None, None])[:, 0, 0]
    csf, grey, white, residual, brain = tissue
    shell = torch.exp(-((below / 14) ** 2))
    bumps = [head.bump(points, *place)[0] for place in head.HIPPOCAMPI]
    atrophy = sum(amount * bump for amount, bump in zip(person.hippocampus, bumps, strict=True))
    horns, lobes = (sum(head.bump(points, *place)[0] for place in places)
                    for places in (head.TEMPORAL_HORNS, head.TEMPORAL_LOBES))
    sulci = person.sulci + person.temporal_sulci * lobes + 0.9 * texture
    odds = torch.stack([
        torch.log(csf + 0.02) + sulci * shell + head.ATROPHY_CSF * atrophy + person.temporal_horns * horns,
        torch.log(grey + 0.02) + 0.35 * cortex_texture,
        torch.log(white + 0.02) - 0.35 * cortex_texture])
    csf, grey, white = torch.softmax(1.35 * odds, 0)
    lesion = head.lesion_share(points, edge, person) * brain
    lost = person.lesion_depth * (1 + 0.6 * cortex_texture).clamp(0.3, 1)
    # White matter near the ventricles darkens with age, in patches.
    patches = torch.exp(-(((distance - 3) / 4) ** 2)) * torch.sigmoid(2.5 * (texture - 1))
    return {"csf": csf, "grey": grey, "white": white, "residual": residual, "brain": brain,
            "dark": patches * white * person.dark_white, "lesion": lesion, "lost": lesion * lost,
            "distance": distance, "depth": below, "medial_temporal": sum(bumps),
            "cerebellum": head.bump(points, *head.CEREBELLUM)[0]}


def _acquire(
    tissue: dict[str, torch.Tensor], site: Site, grid: Grid, seed: int, participant: str,
    session: str,
) -> np.ndarray:
    """Turn tissue into a magnitude image, float32 (z, y, x): contrast, bias field, point spread, Rician noise."""
    rng = stream(seed, participant, session, "contrast")
    grey, white, csf = (value + spread * rng.standard_normal() for value, spread in (
        (site.grey, 0.012), (site.white, 0.012), (site.csf, 0.015)))
    gamma = site.gamma + site.gamma_spread * rng.standard_normal()
    image = tissue["csf"] * csf + tissue["grey"] * grey + tissue["white"] * white + 0.8 * tissue["residual"]
    image = image - tissue["dark"] * (white - grey)
    image = image + tissue["lost"] * (1.05 * csf - image)
    image = (image.clamp(min=0) * tissue["brain"].clamp(0, 1)) ** gamma
    rng = stream(seed, participant, session, "bias")
    image = image * torch.exp(site.bias * smooth_field(rng, grid, 60, 1)[0])
    sigma = [np.sqrt(fwhm**2 - grid.spacing_mm**2) / 2.355 / grid.spacing_mm for fwhm in site.fwhm_mm[::-1]]
    blurred = ndimage.gaussian_filter(image.numpy(), sigma, truncate=3)
    rng = stream(seed, participant, session, "noise")
    real, imaginary = site.noise * rng.standard_normal((2, *grid.shape), dtype=np.float32)
    return np.hypot(blurred + real, imaginary)
