"""The wall along rays from the middle of its cavity: how thick it is, and how deep a tissue reaches through it.

Each slice has its own rays, in mm in the slice's plane, so that oblique, anisotropic and sheared grids measure alike.
What is summed along them are the labels, smoothed by one voxel so that the staircase of the voxels' edges levels out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.methods.polar import interpolated

#: Rays of a slice, and voxels by which labels are smoothed in the plane.
RAYS, SMOOTHING = 120, 1.0
#: Rays to either side over which the thinnest and the thickest place are averaged: 15°.
BESIDE = 5
#: Percentages of the local thickness that a tissue must exceed to count as so far transmural.
DEPTHS = (25, 50, 75)

Mask = NDArray[np.bool_]


class Plane(NamedTuple):
    """The slices' common plane, as it is looked at from the apex.

    Attributes:
        axes: the two array axes that lie in it.
        to_mm: (2, 2) voxel steps along ``axes`` → mm; the first coordinate is the patient's left, the second a
            quarter turn counterclockwise as seen from the apex: anterior, where the plane is axial.
        towards_apex: (3,) its unit normal in mm (RAS), to the left, front and feet.
    """

    axes: tuple[int, int]
    to_mm: NDArray[np.float64]
    towards_apex: NDArray[np.float64]


class Rays(NamedTuple):
    """The wall of one patient, along ``A`` rays in each of ``S`` slices that hold both wall and cavity.

    Attributes:
        slices: (S,) along the slice axis, from base to apex.
        angles: (A,) in degrees from the patient's left, counterclockwise as seen from the apex.
        thickness_mm: (S, A) of the wall on the ray; NaN where it is open: thinner than half a voxel.
        depth: (S, A) the share of it that is the tissue; NaN likewise, and where the tissue is not known.
        wall_mm2: (S, A) the area of the wall between the ray and the next.
        tissue_mm2: (S, A) the tissue's area, likewise.
    """

    slices: NDArray[np.int64]
    angles: NDArray[np.float64]
    thickness_mm: NDArray[np.float64]
    depth: NDArray[np.float64]
    wall_mm2: NDArray[np.float64]
    tissue_mm2: NDArray[np.float64]


class WallSummary(NamedTuple):
    """A wall in numbers; None where no slice holds both wall and cavity, or the tissue is not known.

    Attributes:
        thickness_mean_mm: the mean over all rays.
        thickness_min_mm: the least mean over 30° of a slice; a single ray errs by a voxel, such a mean by half of one.
        thickness_max_mm: the greatest.
        transmural_25_percent: percentage of the rays on which the tissue takes more than 25 % of the thickness.
        transmural_50_percent: more than 50 %.
        transmural_75_percent: more than 75 %.
    """

    thickness_mean_mm: float | None = None
    thickness_min_mm: float | None = None
    thickness_max_mm: float | None = None
    transmural_25_percent: float | None = None
    transmural_50_percent: float | None = None
    transmural_75_percent: float | None = None


def plane(affine: NDArray[np.float64], axis: int) -> Plane:
    """The plane of the slices that are stacked along an array axis.

    Args:
        affine: (4, 4) voxel → mm (RAS).
        axis: the slice axis.
    """
    axes = (0, 1) if axis == 2 else (0, 2) if axis == 1 else (1, 2)
    columns = affine[:3, list(axes)]
    normal = np.cross(columns[:, 0], columns[:, 1])
    normal /= np.linalg.norm(normal)
    normal = normal if normal @ (-1.0, 1.0, -1.0) >= 0 else -normal
    left = np.array([-1.0, 0.0, 0.0]) + normal[0] * normal
    if np.linalg.norm(left) < 1e-6:  # a sagittal plane has no left: from its back, anterior is up there too
        left = np.cross((0.0, 1.0, 0.0), normal)
    left /= np.linalg.norm(left)
    return Plane(axes, np.stack([left, np.cross(normal, left)]) @ columns, normal)


def along_rays(wall: Mask, cavity: Mask, tissue: Mask | None, affine: NDArray[np.float64], axis: int) -> Rays:
    """Measures the wall along rays from the middle of the cavity of each slice.

    Args:
        wall: (X, Y, Z).
        cavity: (X, Y, Z), which the wall surrounds.
        tissue: (X, Y, Z), part of the wall; None: its depth is not known.
        affine: (4, 4) voxel → mm (RAS).
        axis: along which slices are stacked.
    """
    seen = plane(affine, axis)
    stack = [np.moveaxis(volume, axis, 0) for volume in (wall, cavity, wall if tissue is None else tissue)]
    chosen = np.flatnonzero(stack[0].any((1, 2)) & stack[1].any((1, 2)))
    if affine[:3, axis] @ seen.towards_apex < 0:
        chosen = chosen[::-1]
    angles = np.linspace(0.0, 360.0, RAYS, endpoint=False, dtype=np.float64)
    if not len(chosen):
        return Rays(chosen, angles, *(np.zeros((0, RAYS)) for _ in range(4)))
    organ = stack[0][chosen] | stack[1][chosen]
    walls, cavities, tissues = (_cropped(part[chosen], organ) for part in stack)
    middles = np.stack([np.argwhere(one).mean(0) for one in cavities])
    steps_mm, offsets = _steps(walls, middles, seen.to_mm, angles)
    sampled = [_sampled(part, middles, offsets) for part in (walls, tissues)]
    step = float(steps_mm[1] - steps_mm[0])
    thickness, depth = (part.sum(2) * step for part in sampled)
    thickness[thickness < _least_mm(seen)] = np.nan
    areas = [(part * steps_mm).sum(2) * step * math.radians(360.0 / RAYS) for part in sampled]
    if tissue is None:
        depth, areas[1] = np.full_like(depth, np.nan), np.full_like(depth, np.nan)
    return Rays(chosen, angles, thickness, depth / thickness, *areas)


def _cropped(stack: Mask, around: Mask) -> NDArray[np.float32]:
    """(S, H, W) as numbers, cut to where the organ is, with room for smoothing."""
    rows, columns = (np.flatnonzero(around.any(other)) for other in ((0, 2), (0, 1)))
    cut = stack[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    margin = math.ceil(3 * SMOOTHING)
    return np.pad(cut, ((0, 0), (margin, margin), (margin, margin))).astype(np.float32)


def _least_mm(seen: Plane) -> float:
    return float(np.linalg.norm(seen.to_mm, axis=0).min()) / 2


def _steps(
    walls: NDArray[np.float32], middles: NDArray[np.float64], to_mm: NDArray[np.float64], angles: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances from the middle (R,) in mm, half a voxel apart, and the voxel steps (A, R, 2) that lead there."""
    where = np.argwhere(walls)
    reach = np.linalg.norm((where[:, 1:] - middles[where[:, 0]]) @ to_mm.T, axis=1).max()
    voxels = np.linalg.norm(to_mm, axis=0)
    step = float(voxels.min()) / 2
    distances = (np.arange(math.ceil((reach + 3 * SMOOTHING * voxels.max()) / step)) + 0.5) * step
    directions = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))])
    return distances, np.einsum("ij,ja,r->ari", np.linalg.inv(to_mm), directions, distances)


def _sampled(
    stack: NDArray[np.float32], middles: NDArray[np.float64], offsets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The smoothed stack (S, H, W) along the rays (S, A, R)."""
    smooth = gaussian_filter(stack, (0, SMOOTHING, SMOOTHING), truncate=3, mode="constant")
    places = (middles[:, None, None] + offsets).transpose(0, 3, 1, 2)
    return np.stack([interpolated(one, at, outside=0.0) for one, at in zip(smooth, places, strict=True)])


def summary(rays: Rays, *, at: int | None = None) -> WallSummary:
    """The wall in numbers.

    Args:
        rays: from ``along_rays``.
        at: only the slice with this index; None: all.
    """
    chosen = slice(None) if at is None else rays.slices == at
    thickness, depth = (part[chosen].ravel() for part in (rays.thickness_mm, rays.depth))
    closed = np.isfinite(thickness)
    if not closed.any():
        return WallSummary()
    places = _around(rays.thickness_mm[chosen]).ravel()[closed]
    ends = (float(thickness[closed].mean()), float(places.min()), float(places.max()))
    known = np.isfinite(depth[closed]).all()
    return WallSummary(*ends, *(100 * float((depth[closed] > d / 100).mean()) if known else None for d in DEPTHS))


def _around(thickness: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean (S, A) over the rays near each, as far as the wall is closed."""
    near = [np.roll(thickness, turn, axis=1) for turn in range(-BESIDE, BESIDE + 1)]
    count = np.isfinite(near).sum(0)
    found: NDArray[np.float64] = np.nansum(near, axis=0) / np.maximum(count, 1)
    return found


def diameter_mm(organ: Mask, affine: NDArray[np.float64], axis: int) -> float:
    """The diameter of a disc as large as the largest slice of an organ ``(X, Y, Z)``."""
    pixels = np.moveaxis(organ, axis, 0).sum((1, 2)).max()
    return 2 * math.sqrt(float(pixels) * abs(float(np.linalg.det(plane(affine, axis).to_mm))) / math.pi)


def position_mm(index: int, affine: NDArray[np.float64], axis: int) -> float:
    """Where a slice's plane lies along the slices' normal, in scanner coordinates: as DICOM's slice location."""
    normal = plane(affine, axis).towards_apex
    normal = normal if normal @ affine[:3, axis] >= 0 else -normal
    return float(normal @ (affine[:3, 3] + index * affine[:3, axis]))
