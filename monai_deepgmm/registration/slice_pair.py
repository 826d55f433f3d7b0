"""A slice of the reference and of another sequence, looked up on one grid around the organ."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: The grid on which slices are compared, and the standard deviation of the Gaussian before, in mm.
GRID_MM, SMOOTH_MM = 1.0, 1.0
#: A slice is looked up less far away than this.
MOVED_MM = 16.0


class SlicePair(NamedTuple):
    """One slice of both, around the mask.

    Attributes:
        where: the grid, in voxels of ``plane`` ``(2, x, y)``.
        depth_mm: of each place in the organ, negative outside ``(x, y)``.
        fixed: the reference there; NaN beyond the image.
        moving: the other there.
        plane: the other as far as it may be looked up, smoothed ``(X, Y)``.
        step_mm: of its voxels ``(2,)``.
    """

    where: Array
    depth_mm: Array
    fixed: Array
    moving: Array
    plane: Array
    step_mm: Array

    @property
    def comparable(self) -> bool:
        """Whether both show something."""
        return all(bool(np.nanmax(values) > np.nanmin(values)) for values in (self.fixed, self.moving))

    def shifted(self, mm: Array) -> Array:
        """The other slice, of which each place is looked up so far away."""
        return _looked_up(self.plane, self.where + (mm / self.step_mm)[:, None, None])


def pair(fixed: Array, moving: Array, mask: Bools, step_mm: Array, beyond_mm: float) -> SlicePair:
    """A slice of both, each ``(X, Y)`` with the mask, so far around it as is asked for."""
    near = _box(mask, step_mm, beyond_mm + MOVED_MM + 6 * SMOOTH_MM)  # no more is looked up
    fixed, moving, mask = fixed[near], moving[near], mask[near]
    depth = distance_transform_edt(mask, sampling=step_mm) - distance_transform_edt(~mask, sampling=step_mm)
    where = _around(mask, step_mm, beyond_mm + 2 * SMOOTH_MM)
    depth, fixed, moving = (
        gaussian_filter(a.astype(np.float32), SMOOTH_MM / step_mm, truncate=3) for a in (depth, fixed, moving)
    )
    inside: Array = map_coordinates(depth, where, order=1, mode="nearest")
    return SlicePair(where, inside, _looked_up(fixed, where), _looked_up(moving, where), moving, step_mm)


def _box(mask: Bools, step: Array, beyond_mm: float) -> tuple[slice, slice]:
    """The box of a mask and what is so near to it."""
    held, margin = np.argwhere(mask), np.ceil(beyond_mm / step).astype(int)
    (x, y), (right, up) = np.maximum(held.min(0) - margin, 0).tolist(), (held.max(0) + 1 + margin).tolist()
    return slice(x, right), slice(y, up)


def _around(mask: Bools, step: Array, beyond_mm: float) -> Array:
    """The voxel coordinates of the grid around the mask ``(2, x, y)``."""
    held = np.argwhere(mask)
    lines = []
    for low, high, mm in zip(held.min(0), held.max(0), step, strict=True):
        count = int(((high - low) * mm + 2 * beyond_mm) / GRID_MM) + 1
        lines.append((low + high) / 2 + (np.arange(count) - (count - 1) / 2) * GRID_MM / mm)
    return np.stack(np.meshgrid(*lines, indexing="ij"))


def _looked_up(plane: Array, where: Array) -> Array:
    found: Array = map_coordinates(plane, where, order=1, mode="constant", cval=np.nan)
    return found
