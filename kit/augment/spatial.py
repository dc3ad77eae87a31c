"""Apply all geometry of a view as one map, so that a scan is resampled only once.

Images are interpolated linearly, masks by nearest neighbour; outside the scan is zero. A few slices are resampled at a
time, so no grid of the whole volume is ever held. If the transform does not mix z with x and y (as in the paper's
recipe), z is resampled linearly first, then the plane bilinearly with z as channels. Otherwise only the voxels in the
view's brain are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline

from kit.augment.draws import Draw, detail

LARGEST = 1e15  # larger values are clipped, so that no sum of squares overflows
IN_CACHE = 300_000  # voxels processed at once on a CPU: eight slices of 192x192, or a whole small scan


def view_to_scan(draw: Draw, shape: Sequence[int], spacing_mm: float = 1.0) -> np.ndarray:
    """Return the map from a view's coordinates to the scan's, both from -1 to 1 over the box (z, y, x).

    A view is made by crop, resize, flip, shear, rotation, zoom, translation; the map inverts that. All but crop and
    flip act in voxels about the box's centre, so rotations stay rigid even if the sides differ.

    Args:
        draw: the view's numbers.
        shape: voxels (z, y, x).
        spacing_mm: grid spacing, for the translation.

    Returns:
        (3, 4) float64.
    """
    half = np.asarray(shape) / 2
    forward = draw.zoom * _rotation(draw.rotation_degrees) @ _shear(draw.shear_degrees)
    linear = np.linalg.inv(forward) * half[None, :] / half[:, None]
    linear = np.where(draw.flip, -1.0, 1.0)[:, None] * linear
    moved = -linear @ (np.asarray(draw.translation_mm) / spacing_mm / half)
    size, start = np.asarray(draw.crop_size), np.asarray(draw.crop_start)
    return np.concatenate([size[:, None] * linear, (size * moved + 2 * start + size - 1)[:, None]], axis=1)


def cropped_box(draw: Draw, shape: Sequence[int]) -> np.ndarray:
    """Return where the resized crop's first and last voxels lie in the scan, in voxels (z, y, x): (2, 3) float64."""
    side, size, start = (np.asarray(part, float) for part in (shape, draw.crop_size, draw.crop_start))
    first = start * side + (size - 1) / 2
    return np.stack([first, first + size * (side - 1)])


def _rotation(degrees: Sequence[float]) -> np.ndarray:
    """Return the rotation matrix on (z, y, x) vectors: about z, then y, then x."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = [other for other in range(3) if other != axis]
        rotation = np.eye(3)
        rotation[first, first] = rotation[second, second] = np.cos(angle)
        rotation[first, second], rotation[second, first] = -np.sin(angle), np.sin(angle)
        matrix = rotation @ matrix
    return matrix


def _shear(degrees: Sequence[float]) -> np.ndarray:
    """Return the shear matrix on (z, y, x) vectors: z slides with y, z with x, y with x; it preserves volume."""
    matrix = np.eye(3)
    matrix[[0, 0, 1], [1, 2, 2]] = np.tan(np.deg2rad(degrees))
    return matrix


def bend(draw: Draw, shape: Sequence[int], spacing_mm: float, apart_mm: float) -> np.ndarray | None:
    """Draw the control points of a smooth free-form deformation (Rueckert et al. 1999, cubic B-splines).

    Args:
        draw: `elastic_mm` is the standard deviation of each control point's displacement along each axis, before
            clipping.
        shape, spacing_mm: the view's grid.
        apart_mm: distance between control points. Displacements are clipped at 0.4 of it, below which they never fold
            the image (Choi and Lee 2000); at 32 mm an SD of 12 mm thus becomes 9 mm.

    Returns:
        (3, points z, points y, points x) float64, displacements along (z, y, x) in voxels; None if there are none.
    """
    if draw.elastic_mm == 0:
        return None
    points = [spline(side, apart_mm / spacing_mm).shape[1] for side in shape]
    drawn = detail(draw, "elastic").normal(0, draw.elastic_mm, (3, *points))
    return np.clip(drawn, -0.4 * apart_mm, 0.4 * apart_mm) / spacing_mm


def spline(side: int, apart: float) -> np.ndarray:
    """Return cubic B-spline weights (side, points) for control points `apart` voxels apart, centred on the side."""
    spans = int(np.ceil(side / apart))
    at = (np.arange(side) + 0.5 - side / 2) / apart + spans / 2
    return BSpline.design_matrix(at, np.arange(-3.0, spans + 4), 3).toarray()


def warp(image: torch.Tensor, mask: torch.Tensor, back: np.ndarray, bent: np.ndarray | None = None,
         apart: float = 1.0, slab: int | None = None,
         box: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample one scan's brain through a map.

    Args:
        image: (depth, height, width) of any floating type.
        mask: (depth, height, width) bool.
        back: (3, 4), from `view_to_scan`.
        bent: control points from `bend`, which act on the view's coordinates before the map, or None.
        apart: distance between control points, in voxels.
        slab: slices processed at once; by default what fits a CPU's cache.
        box: (2, 3) from `cropped_box`; points beyond it take the value and mask at its border. None: zero beyond the
            scan.

    Returns:
        values (voxels,) float32 (float64 if the image is) of the view's brain, clipped at `LARGEST`, and their indices
        in the flattened view, increasing, (voxels,) int64.
    """
    side = np.asarray(image.shape, float)
    linear = back[:, :3] * (side[:, None] / side[None, :])  # from voxel to voxel
    offset = (side * (back[:, :3] @ (1 / side - 1) + back[:, 3] + 1) - 1) / 2
    linear[np.abs(linear) < 1e-9] = 0  # sines of whole turns
    mirrored = [axis for axis in range(3) if linear[axis, axis] < 0]
    still = np.diag([-1.0 if axis in mirrored else 1.0 for axis in range(3)])
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    slab = slab or max(8, IN_CACHE // image[0].numel())
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]]
    if bent is None and np.array_equal(linear, still) and np.allclose(offset, (side - 1) * (np.diag(still) < 0)):
        parts, slab = [brain(image.flip(mirrored), mask.flip(mirrored))], len(image)
    elif bent is None and not (linear[0, 1:].any() or linear[1:, 0].any()):
        parts = _separable(image, mask, linear, offset, slab, box)
    else:
        parts = _by_points(image, mask, linear, offset, bent, apart, slab, box)
    values, indices = image.new_empty(image.numel()), mask.new_empty(mask.numel(), dtype=torch.int64)
    count = 0
    for first, (value, index) in zip(range(0, image.numel(), slab * image[0].numel()), parts, strict=True):
        part = slice(count, count + len(index))
        torch.clamp(value, -LARGEST, LARGEST, out=values[part])
        torch.add(index, first, out=indices[part])
        count = part.stop
    return values[:count], indices[:count]


def brain(volume: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values inside a mask, and their indices in the flattened volume."""
    indices = inside.reshape(-1).nonzero().view(-1)
    return volume.reshape(-1).index_select(0, indices), indices


def scatter(values: torch.Tensor, indices: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a volume with these values at these indices, and zeros elsewhere."""
    volume = values.new_zeros(tuple(shape))
    volume.view(-1).scatter_(0, indices, values)
    return volume


def _separable(image: torch.Tensor, mask: torch.Tensor, linear: np.ndarray, offset: np.ndarray, slab: int,
               box: np.ndarray | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Resample through a map that does not mix z with y and x: linearly along z, bilinearly in the plane."""
    inside, (depth, height, width) = F.pad(mask.view(torch.int8).flatten(1), (0, 0, 1, 1)), image.shape
    grid, pixels, known = (torch.from_numpy(part).to(image.device) for part in
                           in_plane(linear[1:, 1:], offset[1:], height, width, None if box is None else box[:, 1:]))
    at = linear[0, 0] * np.arange(depth) + offset[0]
    at = at if box is None else np.clip(at, *box[:, 0])
    below, padded = np.floor(at + 1e-9), F.pad(image, (0, 0, 0, 0, 1, 1))  # zero above and below the scan
    slices = [torch.from_numpy(np.clip(index, -1, depth).astype(np.int64) + 1).to(image.device)
              for index in (below, below + 1, np.rint(at))]
    share = torch.from_numpy(np.clip(at - below, 0, 1)).to(image)[:, None, None]
    for start in range(0, depth, slab):
        lower, upper, nearest = (index[start:start + slab] for index in slices)
        between = padded.index_select(0, lower).lerp_(padded.index_select(0, upper), share[start:start + slab])
        moved = F.grid_sample(between[None], grid[None].to(image.dtype), mode="bilinear", align_corners=False)[0]
        yield brain(moved, inside.index_select(0, nearest).index_select(1, pixels).mul_(known))


def in_plane(linear: np.ndarray, offset: np.ndarray, height: int, width: int,
             box: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Locate a view slice's pixels in the scan's slice, through a (2, 2) map of (row, column) and an offset.

    `box` (2, 2): the first and last (row, column) allowed, see `warp`.

    Returns:
        grid (height, width, 2) float32 for `grid_sample`; nearest pixels (height * width) int64, rows first; and
        whether these lie inside the scan (height * width) int8.
    """
    sides = np.array([height, width])[:, None, None]
    where = np.tensordot(linear, np.indices((height, width)), 1) + offset[:, None, None]
    where = where if box is None else np.clip(where, *box[:, :, None, None])
    grid = np.ascontiguousarray(((2 * where + 1) / sides - 1)[::-1].transpose(1, 2, 0), np.float32)
    nearest = np.rint(where).astype(np.int64)
    known = ((nearest >= 0) & (nearest < sides)).all(0).reshape(-1)
    return grid, np.where(known, (nearest[0] * width + nearest[1]).reshape(-1), 0), known.astype(np.int8)


def _by_points(image: torch.Tensor, mask: torch.Tensor, linear: np.ndarray, offset: np.ndarray, bent: np.ndarray | None,
               apart: float, slab: int, box: np.ndarray | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Resample through any map, point by point inside the brain."""
    padded, inside = (F.pad(part, (1,) * 6) for part in (image, mask.view(torch.int8)))  # zero outside the scan
    for where in _scan_coordinates(image.shape, linear, offset, bent, apart, slab, padded):
        if box is not None:
            where = torch.stack([axis.clamp(*ends) for axis, ends in zip(where, box.T.tolist(), strict=True)])
        near = _flat([axis.round().clamp_(-1, side) for axis, side in zip(where, image.shape, strict=True)], inside)
        indices = inside.view(-1).index_select(0, near).nonzero().view(-1)
        yield _between(padded, [axis.reshape(-1).index_select(0, indices) for axis in where]), indices


def _scan_coordinates(shape: tuple[int, ...], linear: np.ndarray, offset: np.ndarray, bent: np.ndarray | None,
                      apart: float, slab: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield coordinates in the scan, in voxels (3: z y x, slices, height, width) float, a few slices at a time."""
    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(like)

    plane = tensor(np.tensordot(linear[:, 1:], np.indices(shape[1:]), 1) + offset[:, None, None])[:, None]
    step = tensor(linear[:, 0, None, None, None])
    if bent is not None:
        points = tensor(np.tensordot(linear, bent, 1))  # displacements in the scan, since the map is linear
        along_z, along_y, along_x = (tensor(spline(side, apart)) for side in shape)
    for start in range(0, shape[0], slab):
        z = torch.arange(start, min(start + slab, shape[0]), device=like.device, dtype=like.dtype)
        where = plane + z[:, None, None] * step
        if bent is not None:
            where += along_y @ torch.einsum("sk,ckij->csij", along_z[start:start + slab], points) @ along_x.T
        yield where


def _flat(voxels: Sequence[torch.Tensor], padded: torch.Tensor) -> torch.Tensor:
    """Return int64 indices of voxels (z, y, x), integers from -1, in the flattened volume padded by one voxel."""
    z, y, x = (axis.reshape(-1).to(torch.int32) for axis in voxels)
    _, height, width = padded.shape
    return z.mul_(height).add_(y).mul_(width).add_(x).add_((height + 1) * width + 1).long()


def _between(padded: torch.Tensor, where: Sequence[torch.Tensor]) -> torch.Tensor:
    """Interpolate linearly in a volume padded by one voxel, at points (z, y, x) within the padding.

    It uses gathers, which on a CPU take half the time of `grid_sample` at the same points.
    """
    below = [axis.floor() for axis in where]
    z, y, x = (axis - lower for axis, lower in zip(where, below, strict=True))
    corner, volume = _flat(below, padded), padded.view(-1)
    row, plane = padded.shape[2], padded.shape[1] * padded.shape[2]

    def at(shift: int) -> torch.Tensor:
        return volume[shift:].index_select(0, corner)

    def along_x(shift: int) -> torch.Tensor:
        return torch.lerp(at(shift), at(shift + 1), x)

    def along_y(shift: int) -> torch.Tensor:
        return torch.lerp(along_x(shift), along_x(shift + row), y)

    return torch.lerp(along_y(0), along_y(plane), z)
