"""All geometry of a view as one map, so that a scan is resampled once.

Images are linear and masks nearest neighbour, zero outside the scan. A map that leaves one axis to itself, as the
paper's does, separates: bilinear in the plane with that axis as channels, then linear along it. Any other map,
and any elastic bend, takes one 3D `grid_sample`, slab by slab so that no grid of the whole volume is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline

from kit.augment.draws import Draw, detail

IN_CACHE = 300_000  # voxels that are worked on at once on a CPU: eight slices of 192x192, or a small scan as a whole


def view_to_scan(draw: Draw, shape: tuple[int, int, int], spacing_mm: float = 1.0) -> np.ndarray:
    """Map from a view's coordinates to the scan's, both running from -1 to 1 over the box (z, y, x).

    The view is made as crop, resize, flip, shear, rotation, zoom, translation; the map goes back that way. All but
    crop and flip act in voxels about the box's middle, so they stay rigid where the sides differ.

    Args:
        draw: the view's numbers.
        shape: voxels (z, y, x).
        spacing_mm: of the grid, for the translation.

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


def _rotation(degrees: Sequence[float]) -> np.ndarray:
    """Rotation matrix on (z, y, x) vectors: about z, then y, then x."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _shear(degrees: Sequence[float]) -> np.ndarray:
    """Shear matrix on (z, y, x) vectors: z slides with y, z with x, y with x; the volume stays the same."""
    matrix = np.eye(3)
    matrix[[0, 0, 1], [1, 2, 2]] = np.tan(np.deg2rad(degrees))
    return matrix


def bend(draw: Draw, shape: tuple[int, int, int], spacing_mm: float, apart_mm: float) -> np.ndarray | None:
    """Control points of a smooth free-form deformation (Rueckert et al. 1999, cubic B-splines).

    Args:
        draw: `elastic_mm` is the standard deviation of each control point's displacement along each axis.
        shape, spacing_mm: of the view's grid.
        apart_mm: between control points. Displacements below 0.4 of it never fold the image
            (Choi and Lee 2000).

    Returns:
        (3, points z, points y, points x) float64, displacements along (z, y, x) in voxels; None without any.
    """
    if draw.elastic_mm == 0:
        return None
    points = [_spline(side, apart_mm / spacing_mm).shape[1] for side in shape]
    drawn = detail(draw, "elastic").normal(0, draw.elastic_mm, (3, *points))
    return np.clip(drawn, -0.4 * apart_mm, 0.4 * apart_mm) / spacing_mm


def _spline(side: int, apart: float) -> np.ndarray:
    """Cubic B-spline weights (side, points) of control points so many voxels apart, centred on the side."""
    spans = int(np.ceil(side / apart))
    at = (np.arange(side) + 0.5 - side / 2) / apart + spans / 2
    return BSpline.design_matrix(at, np.arange(-3.0, spans + 4), 3).toarray()


def resample(image: torch.Tensor, mask: torch.Tensor, back: np.ndarray, bent: np.ndarray | None = None,
             apart: float = 1.0, slab: int | None = None, out: tuple[torch.Tensor, torch.Tensor] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample one scan through a map.

    Args:
        image: (depth, height, width) float32 or float64, contiguous.
        mask: (depth, height, width) bool, contiguous.
        back: (3, 4), from `view_to_scan`.
        bent: control points from `bend`, which act on the view's coordinates before the map, or None.
        apart: voxels between the control points.
        slab: slices that are worked on at once: on a CPU what its cache holds, all on a GPU.
        out: where the view and its mask go, contiguous; new tensors by default.

    Returns:
        the view and its mask, of the same shapes and types; the view is zero outside the mask.
    """
    side = np.asarray(image.shape, float)
    linear = back[:, :3] * (side[:, None] / side[None, :])  # from voxel to voxel
    offset = (side * (back[:, :3] @ (1 / side - 1) + back[:, 3] + 1) - 1) / 2
    linear[np.abs(linear) < 1e-9] = 0  # sines of whole turns
    view, inside = out or (torch.empty_like(image), torch.empty_like(mask))
    slab = slab or (max(8, IN_CACHE // image[0].numel()) if image.device.type == "cpu" else image.shape[0])
    alone = [axis for axis in range(3) if not np.delete(linear[axis], axis).any()
             and not np.delete(linear[:, axis], axis).any()]
    mirrored = [axis for axis in range(3) if linear[axis, axis] < 0]
    still = np.diag([-1.0 if axis in mirrored else 1.0 for axis in range(3)])
    if bent is None and np.array_equal(linear, still) and np.allclose(offset, (side - 1) * (np.diag(still) < 0)):
        inside.copy_(mask.flip(mirrored))
        torch.mul(image.flip(mirrored), inside, out=view)
    elif bent is None and alone:
        _separable(image, mask, linear, offset, alone[0], slab, view, inside)
    else:
        _by_grid(image, mask, linear, offset, bent, apart, slab, view, inside)
    return view, inside


def _separable(image: torch.Tensor, mask: torch.Tensor, linear: np.ndarray, offset: np.ndarray, axis: int,
               slab: int, view: torch.Tensor, view_mask: torch.Tensor) -> None:
    """Resample through a map that leaves `axis` to itself: linearly along the axis, bilinearly in the plane."""
    scan, inside = image.movedim(axis, 0), mask.view(torch.int8).movedim(axis, 0)
    view, view_mask = view.movedim(axis, 0), view_mask.view(torch.int8).movedim(axis, 0)
    depth, height, width = scan.shape
    rest = [other for other in range(3) if other != axis]
    grid, pixels, known = (torch.from_numpy(part).to(image.device) for part in
                           in_plane(linear[np.ix_(rest, rest)], offset[rest], height, width))
    at = linear[axis, axis] * np.arange(depth) + offset[axis]
    below, near = np.floor(at + 1e-9).astype(int), np.rint(at).astype(int)
    shares, nothing = np.clip(at - below, 0, 1).tolist(), torch.zeros_like(scan[0])
    for start in range(0, depth, slab):
        part = range(start, min(start + slab, depth))
        between = torch.stack([torch.lerp(*(scan[index] if 0 <= index < depth else nothing
                                            for index in (below[number], below[number] + 1)), shares[number])
                               for number in part])
        moved = F.grid_sample(between[None], grid[None].to(image.dtype), mode="bilinear", align_corners=False)[0]
        for number in part:
            if 0 <= near[number] < depth:
                torch.mul(inside[near[number]].reshape(-1).take(pixels).view(height, width), known,
                          out=view_mask[number])
            else:
                view_mask[number].zero_()
        chosen = slice(part.start, part.stop)
        torch.mul(moved, view_mask[chosen], out=view[chosen])


def in_plane(linear: np.ndarray, offset: np.ndarray, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Where the pixels of a view's slice lie in the scan's, through a (2, 2) map of (row, column) and an offset.

    Returns:
        grid (height, width, 2) float32 for `grid_sample`; nearest pixels (height * width) int64, rows first; and
        which of these lie in the scan (height, width) int8.
    """
    sides = np.array([height, width])[:, None, None]
    where = np.tensordot(linear, np.indices((height, width)), 1) + offset[:, None, None]
    grid = np.ascontiguousarray(((2 * where + 1) / sides - 1)[::-1].transpose(1, 2, 0), np.float32)
    nearest = np.rint(where).astype(np.int64)
    known = ((nearest >= 0) & (nearest < sides)).all(0)
    return grid, np.where(known, nearest[0] * width + nearest[1], 0).reshape(-1), known.astype(np.int8)


def _by_grid(image: torch.Tensor, mask: torch.Tensor, linear: np.ndarray, offset: np.ndarray,
             bent: np.ndarray | None, apart: float, slab: int, view: torch.Tensor, view_mask: torch.Tensor) -> None:
    """Resample through any map, some slices at a time."""
    depth, height, width = image.shape

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(image)

    plane = np.tensordot(linear[:, 1:], np.indices((height, width)), 1) + offset[:, None, None]
    scale = (2 / np.array([width, height, depth]))[:, None, None]  # `grid_sample` counts (x, y, z), from -1 to 1
    grid_plane, grid_step = tensor(plane[::-1] * scale + scale / 2 - 1), tensor(linear[::-1, :1, None] * scale)
    plane, step, scale = tensor(plane), tensor(linear[:, :1, None]), tensor(scale)
    if bent is not None:
        points = tensor(np.tensordot(linear, bent, 1))  # displacements in the scan, as the map is linear
        along_z, along_y, along_x = (tensor(_spline(side, apart)) for side in image.shape)
    view_mask = view_mask.view(torch.int8)
    padded = F.pad(mask.view(torch.int8), (1, 1, 1, 1, 1, 1)).view(-1)  # what lies outside reads a border of zeros
    for start in range(0, depth, slab):
        part = slice(start, min(start + slab, depth))
        z = torch.arange(part.start, part.stop, device=image.device, dtype=image.dtype).view(-1, 1, 1, 1)
        where, grid = plane + z * step, grid_plane + z * grid_step  # (slices, 3, height, width)
        if bent is not None:
            here = along_y @ torch.einsum("sk,ckij->scij", along_z[part], points) @ along_x.T
            where += here
            grid += here.flip(1) * scale
        moved = F.grid_sample(image.expand(len(grid), 1, *image.shape), grid.permute(0, 2, 3, 1)[:, None],
                              mode="bilinear", align_corners=False)[:, 0, 0]  # slices as a batch: on every thread
        z, y, x = (where[:, axis].round_().clamp_(-1, side).to(torch.int32)
                   for axis, side in enumerate(image.shape))
        index = z.mul_(height + 2).add_(y).mul_(width + 2).add_(x).add_((height + 3) * (width + 2) + 1)
        torch.take(padded, index.long(), out=view_mask[part])
        torch.mul(moved, view_mask[part], out=view[part])
