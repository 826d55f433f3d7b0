"""A slice of the reference and of another sequence, looked up on one grid around the organ."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: The grid on which slices are compared, and the standard deviation of the Gaussian before, in mm.
GRID_MM, SMOOTH_MM = 1.0, 1.0
#: A slice is looked up less far away than this.
MOVED_MM = 16.0


class Still(NamedTuple):
    """A slice of the reference, around the mask.

    Attributes:
        near: the box of the file's slice that is looked at.
        lines: the grid, in voxels of the box along each axis.
        depth_mm: of each place in the organ, negative outside ``(x, y)``.
        values: the reference there; NaN beyond the image.
        step_mm: of the box's voxels ``(2,)``.
    """

    near: tuple[slice, slice]
    lines: tuple[Array, Array]
    depth_mm: Array
    values: Array
    step_mm: Array

    @classmethod
    def of(cls, fixed: Array, mask: Bools, step_mm: Array, beyond_mm: float) -> Still:
        """That of a slice ``(X, Y)`` with the mask, so far around it as is asked for."""
        near = _box(mask, step_mm, beyond_mm + MOVED_MM + 6 * SMOOTH_MM)  # no more is looked up
        mask = mask[near]
        depth, own = -distance_transform_edt(~mask, sampling=step_mm), _box(mask, step_mm, step_mm.max())
        depth[own] += distance_transform_edt(mask[own], sampling=step_mm)
        lines = _around(mask, step_mm, beyond_mm + 2 * SMOOTH_MM)
        inside = _looked_up(_smooth(depth, step_mm), lines, beyond=False)
        return cls(near, lines, inside, _looked_up(_smooth(fixed[near], step_mm), lines), step_mm)


class Moving(NamedTuple):
    """The slice of another sequence that lies on one of the reference.

    Attributes:
        still: that one.
        plane: the other as far as it may be looked up, smoothed ``(X, Y)``.
        values: the other on the grid; NaN beyond the image ``(x, y)``.
    """

    still: Still
    plane: Array
    values: Array

    @classmethod
    def of(cls, still: Still, moving: Array) -> Moving:
        """That of the file's slice ``(X, Y)``."""
        plane = _smooth(moving[still.near], still.step_mm)
        return cls(still, plane, _looked_up(plane, still.lines))

    @property
    def comparable(self) -> bool:
        """Whether both show something."""
        return all(bool(np.nanmax(values) > np.nanmin(values)) for values in (self.still.values, self.values))

    def shifted(self, mm: Array) -> Array:
        """The other slice, of which each place is looked up so far away."""
        x, y = mm / self.still.step_mm
        return _looked_up(self.plane, (self.still.lines[0] + x, self.still.lines[1] + y))


def _smooth(plane: Array, step_mm: Array) -> Array:
    found: Array = gaussian_filter(plane.astype(np.float32), SMOOTH_MM / step_mm, truncate=3)
    return found


def _box(mask: Bools, step: Array, beyond_mm: float) -> tuple[slice, slice]:
    """The box of a mask and what is so near to it."""
    held, margin = np.argwhere(mask), np.ceil(beyond_mm / step).astype(int)
    (x, y), (right, up) = np.maximum(held.min(0) - margin, 0).tolist(), (held.max(0) + 1 + margin).tolist()
    return slice(x, right), slice(y, up)


def _around(mask: Bools, step: Array, beyond_mm: float) -> tuple[Array, Array]:
    """The voxel coordinates of the grid around the mask, along each axis."""
    held = np.argwhere(mask)
    x, y = (
        (low + high) / 2 + (np.arange(count) - (count - 1) / 2) * GRID_MM / mm
        for low, high, mm in zip(held.min(0), held.max(0), step, strict=True)
        for count in [int(((high - low) * mm + 2 * beyond_mm) / GRID_MM) + 1]
    )
    return x, y


def _looked_up(plane: Array, lines: tuple[Array, Array], *, beyond: bool = True) -> Array:
    """A plane on a grid, linearly, one axis after the other; beyond the plane NaN, or the nearest where that is off."""
    found = plane
    for axis, line in enumerate(lines):
        last = plane.shape[axis] - 1
        within = line.clip(0, last)
        first = within.astype(np.int64)
        part = (within - first).reshape(-1, *[1] * (1 - axis))
        low, high = found.take(first, axis), found.take(np.minimum(first + 1, last), axis)
        found = low + (high - low) * part
    if beyond:
        for axis, line in enumerate(lines):
            outside = (line < 0) | (line > plane.shape[axis] - 1)
            found[outside if axis == 0 else np.s_[:, outside]] = np.nan
    return found.astype(plane.dtype)
