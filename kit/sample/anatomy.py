"""Generate one head: its shape, its tissue, and the known effects of age, sex and disease on them.

Everything drawn here belongs to the participant, so two sessions share it. Points are float32 (3, z, y, x) with
components (x, y, z) in mm: *head* millimetres before the warps, *atlas* millimetres (MNI152) after them. A point map
gives, for each voxel of the scan, the point of the atlas whose tissue it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import BSpline

from kit.sample.atlas import Atlas, Volume
from kit.store.grid import PAPER_CENTRE_MM, Grid

GENERATOR_VERSION = 2
DRAWS = 1  # keys the random draws, so that a new version of the generator draws the same people

# Cubic B-spline warps: knot spacing and SD of the coefficients, both in mm. Coefficients are clipped at 2.5 SD, below
# 0.4 knot spacings, where a single warp cannot fold (Choi and Lee 2000).
WARPS = ((48, 3.5), (24, 1.8), (12, 0.9))
FIELD_GRID = Grid((52, 60, 48), 4.0)

HEAD_SCALE_SD, AXIS_SCALE_SD = 0.027, 0.02
SEX_SCALE = 0.02  # men's heads are larger by this fraction, women's smaller
SEX_CEREBELLUM = 0.06  # the same for the cerebellum alone, which neither zoom nor affine registration undoes
# Alzheimer's disease at severity 1. Mild cases look healthy: this, not weak effects, makes the task hard.
# At 4 mm, a small network reaches an AUC of 0.93 from 75 labelled scans; CSF measured at the true place has 0.95.
AD_SEVERITY = (0.1, 1.9)  # uniform
AD_HIPPOCAMPUS = 3.0  # shift in atrophy
AD_HORNS = 3.5  # opening of the temporal horns, in log-odds of CSF
AD_TEMPORAL_SULCI = 2.0  # opening of the temporal lobes' sulci, in log-odds of CSF
AD_VENTRICLES_MM = 0.6  # equals 10 years of ageing, less than the spread between people of one age
ATROPHY_SHRINK, ATROPHY_CSF = 0.10, 0.75  # per unit of medial temporal atrophy
VENTRICLE_FALL_MM = 12.0
FLOW_STEPS = 2  # in a single step, a wide ventricle could fold the tissue between its horns

# Centres and widths (x, y, z) of Gaussian bumps, in atlas mm.
HIPPOCAMPI = (((-27, -19, -15), (9, 15, 9)), ((27, -19, -15), (9, 15, 9)))  # left, right
TEMPORAL_HORNS = (((-33, -22, -13), (7, 15, 8)), ((33, -22, -13), (7, 15, 8)))
TEMPORAL_LOBES = (((-50, -18, -22), (16, 28, 16)), ((50, -18, -22), (16, 28, 16)))
CEREBELLUM = ((0, -62, -34), (38, 24, 18))


def stream(seed: int, *names: str) -> np.random.Generator:
    """Return the generator of one named draw; it does not depend on any other draw."""
    text = "/".join(names).encode()
    return np.random.default_rng([DRAWS, seed, *text])


@dataclass(frozen=True)
class Anatomy:
    """What sets one head apart; points and sizes are along (x, y, z)."""

    head_scale: tuple[float, float, float]  # relative to the template
    cerebellum: float  # fraction by which it is larger than the head's scale implies
    dark_white: float  # darkening of the white matter near the ventricles, 0 to 1
    ventricles_mm: float  # how far their walls lie outside the template's
    sulci: float  # their opening, in log-odds of CSF
    hippocampus: tuple[float, float]  # atrophy (left, right), larger for less tissue; healthy at 60: mean 0, SD 0.7
    temporal_horns: float = 0.0  # their opening, in log-odds of CSF; only in Alzheimer's disease
    temporal_sulci: float = 0.0  # the same for the temporal lobes' sulci
    lesion_side: str = ""  # "left", "right", or "" for none
    lesion_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # atlas mm
    lesion_stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)  # larger values make it thinner
    lesion_radius_mm: float = 0.0  # before the random edge
    lesion_depth: float = 0.0  # fraction of the tissue that is lost


def draw_anatomy(seed: int, participant: str, age: float, sex: str, diagnosis: str) -> Anatomy:
    """Draw a head. One person at two ages (years), sexes or diagnoses differs only in the known effects."""
    rng = stream(seed, participant, "anatomy")
    sign = 1 if sex == "M" else -1
    head = 1 + sign * SEX_SCALE + HEAD_SCALE_SD * rng.standard_normal()
    scale = head * (1 + AXIS_SCALE_SD * rng.standard_normal(3))
    cerebellum = np.clip(sign * SEX_CEREBELLUM + 0.03 * rng.standard_normal(), -0.12, 0.12)
    ventricles = np.clip(0.8 + 0.06 * (age - 60) + 0.9 * rng.standard_normal(), -1.2, 4.0)
    sulci = 0.04 * (age - 60) + 0.45 * rng.standard_normal()
    hippocampus = 0.02 * (age - 60) + 0.5 * rng.standard_normal() + 0.5 * rng.standard_normal(2)
    severity = 0.0
    if diagnosis == "AD":
        severity = stream(seed, participant, "severity").uniform(*AD_SEVERITY)
    hippocampus = np.clip(hippocampus + AD_HIPPOCAMPUS * severity, -1.5, 5.0)
    ventricles = np.clip(ventricles + AD_VENTRICLES_MM * severity, -1.2, 4.0)
    lesion: dict[str, Any] = {}
    if diagnosis == "stroke":
        side = rng.choice([-1, 1])
        centre = (side * rng.uniform(24, 46), rng.uniform(-45, 25), rng.uniform(-5, 38))
        lesion = {"lesion_side": "left" if side < 0 else "right", "lesion_centre": tuple(map(float, centre)),
                  "lesion_stretch": tuple(np.exp(0.25 * rng.standard_normal(3)).tolist()),
                  "lesion_radius_mm": float(rng.uniform(12, 21)), "lesion_depth": float(rng.uniform(0.7, 1.0))}
    dark_white = np.clip(0.15 + 0.02 * (age - 60), 0, 1)
    return Anatomy(tuple(scale.tolist()), float(cerebellum), float(dark_white), float(ventricles), float(sulci),
                   tuple(hippocampus.tolist()), float(AD_HORNS * severity), float(AD_TEMPORAL_SULCI * severity),
                   **lesion)


def smooth_field(rng: np.random.Generator, grid: Grid, knots_mm: float, channels: int) -> torch.Tensor:
    """Draw cubic B-spline fields, float32 (channel, z, y, x).

    Knots are `knots_mm` apart. Coefficients are standard normal, clipped at 2.5; the field's own SD is about a third of
    that of its coefficients.
    """
    bases = [_bspline_basis(side, grid.spacing_mm / knots_mm) for side in grid.shape]
    knots = rng.standard_normal((channels, *(basis.shape[1] for basis in bases)), dtype=np.float32)
    field = torch.from_numpy(knots.clip(-2.5, 2.5))
    for basis in bases:  # each step contracts the first knot axis and appends a voxel axis
        field = torch.tensordot(field, basis, dims=([1], [1]))
    return field


def _bspline_basis(side: int, step: float) -> torch.Tensor:
    """Return cubic B-spline weights (voxel, knot) for voxels `step` knots apart."""
    at = np.arange(side) * step
    return torch.from_numpy(BSpline.design_matrix(at, np.arange(-3.0, int(at[-1]) + 5), 3).toarray().astype(np.float32))


def draw_fields(seed: int, participant: str) -> Volume:
    """Draw the head's random fields: warp (x, y, z; mm), two tissue textures, the lesion's edge."""
    warp = sum((spread * smooth_field(stream(seed, participant, f"warp {knots}"), FIELD_GRID, knots, 3)
                for knots, spread in WARPS), torch.zeros(()))
    texture = smooth_field(stream(seed, participant, "texture"), FIELD_GRID, 8, 2)
    edge = sum((weight * smooth_field(stream(seed, participant, f"edge {knots}"), FIELD_GRID, knots, 1)
                for knots, weight in ((16, 1.0), (8, 0.7))), torch.zeros(()))
    return Volume(torch.cat([warp, texture, edge])[None], FIELD_GRID.spacing_mm, FIELD_GRID.origin_mm)


def deform(head_points: torch.Tensor, warp: torch.Tensor, anatomy: Anatomy, atlas: Atlas) -> torch.Tensor:
    """Return the atlas point (mm) shown at each head point; `warp` is the head's random warp there, in mm."""
    centre = _column(PAPER_CENTRE_MM)
    points = (head_points - centre) / _column(anatomy.head_scale) + centre + warp
    share, offset = bump(points, *CEREBELLUM)
    points = points - anatomy.cerebellum * share * offset
    for _ in range(FLOW_STEPS):
        near = atlas.distances.at(points)
        distance, outward = near[0], near[1:4]
        reach = torch.exp(-distance.clamp(min=0) / VENTRICLE_FALL_MM) * (1 + distance / 5).clamp(0, 1)
        points = points - anatomy.ventricles_mm / FLOW_STEPS * reach * outward
    for atrophy, place in zip(anatomy.hippocampus, HIPPOCAMPI, strict=True):
        share, offset = bump(points, *place)
        points = points + ATROPHY_SHRINK * atrophy * share * offset
    return points


def lesion_share(points: torch.Tensor, edge: torch.Tensor, anatomy: Anatomy) -> torch.Tensor:
    """Return the fraction of each voxel that is lesion, 0 to 1: a ball whose edge a random field pushes in and out.

    `points` are atlas mm; `edge` is the head's random field (z, y, x), with an SD of about 0.4.
    """
    if not anatomy.lesion_side:
        return torch.zeros_like(edge)
    offset = (points - _column(anatomy.lesion_centre)) * _column(anatomy.lesion_stretch)
    radius = anatomy.lesion_radius_mm * (1 + 1.1 * edge).clamp(0.55, 1.6)
    same_side = points[0] * (1 if anatomy.lesion_side == "right" else -1) > 2
    return torch.sigmoid((radius - offset.square().sum(0).sqrt()) / 1.2) * same_side


def bump(points: torch.Tensor, middle: tuple, widths: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a Gaussian weight (z, y, x), 0 to 1, of points around `middle`, and their offsets from it (3, z, y, x)."""
    offset = points - _column(middle)
    return torch.exp(-0.5 * (offset / _column(widths)).square().sum(0)), offset


def _column(xyz: tuple) -> torch.Tensor:
    return torch.tensor(xyz, dtype=torch.float32).view(3, 1, 1, 1)
