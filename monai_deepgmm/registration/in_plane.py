"""How far each slice of a sequence lies beside the reference's, in its plane: patients breathe between sequences.

Edges around the organ are compared with those of the reference, and with the organ's outline as the mask has it. A
slice that would not gain by a margin stays where it is, and so does a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from monai_deepgmm.registration import edges

Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: The grid on which slices are compared, the standard deviation of the Gaussian before, and how far shifts go, in mm.
GRID_MM, SMOOTH_MM, REACH_MM = 1.0, 1.0, 12.0
#: What counts: the mask and so much around it; and so much outside and inside of its outline, in mm.
AROUND_MM, OUTSIDE_MM, INSIDE_MM = 10.0, 4.0, 2.0
#: A slice is moved if its agreement (with the reference, plus with the outline) gains so much, or if its sequence
#: gains so much in all slices together and the slice itself so much.
SLICE_GAIN, SEQUENCE_GAIN, LEAST_GAIN = 0.1, 0.065, 0.01


class Shift(NamedTuple):
    """How a slice lies beside the reference's.

    Attributes:
        mm: what has to be added to a place in the reference's slice to come to the same place in this one, along the
            two axes of the plane.
        before: how well edges agree without it, 0 to 2.
        after: how well with it.
    """

    mm: tuple[float, float]
    before: float
    after: float

    @property
    def gain(self) -> float:
        """What the shift brings."""
        return self.after - self.before


def shifts(fixed: Array, moving: Array, mask: Bools, spacing_mm: Sequence[float]) -> dict[int, Shift]:
    """The shift of each slice of a sequence.

    Args:
        fixed: the reference ``(X, Y, Z)``, slices along the last axis.
        moving: the sequence, on the same grid.
        mask: of the organ, as it lies in the reference.
        spacing_mm: of X and Y.

    Returns:
        Slice → shift, for the slices that hold the mask and show something.
    """
    step = np.asarray(spacing_mm, float)
    held = np.flatnonzero(mask.any((0, 1))).tolist()
    found = {z: _of_slice(fixed[..., z], moving[..., z], mask[..., z], step) for z in held}
    return {z: shift for z, shift in found.items() if shift is not None}


def kept(found: dict[int, Shift]) -> dict[int, Shift]:
    """The shifts that bring enough: those of single slices, or of all of a sequence that has moved."""
    if not found:
        return {}
    moved = float(np.mean([shift.gain for shift in found.values()])) > SEQUENCE_GAIN
    least = LEAST_GAIN if moved else SLICE_GAIN
    return {z: shift for z, shift in found.items() if shift.gain > least}


def _of_slice(fixed: Array, moving: Array, mask: Bools, step: Array) -> Shift | None:
    """One slice's shift; None where there is nothing to compare."""
    depth = distance_transform_edt(mask, sampling=step) - distance_transform_edt(~mask, sampling=step)
    coarse = _around(mask, step)
    inner = [_sampled(a, coarse, step) for a in (fixed, moving, depth.astype(np.float32))]
    if min(np.ptp(a) for a in inner[:2]) == 0:
        return None
    distance = inner[2]
    near = (distance > -AROUND_MM).astype(np.float32)
    outline = ((distance > -OUTSIDE_MM) & (distance < INSIDE_MM)).astype(np.float32)
    of_moving = edges.of(inner[1], near)
    reach = round(REACH_MM / GRID_MM)
    fits = edges.agreement(edges.of(inner[0], near), of_moving, near, reach)
    fits = fits + edges.agreement(edges.of(distance, outline), of_moving, outline, reach)
    place, best = edges.highest(fits)
    x, y = (place * GRID_MM).tolist()
    return Shift((x, y), float(fits[reach, reach]), best)


def _around(mask: Bools, step: Array) -> Array:
    """The voxel coordinates of the grid around the mask ``(2, x, y)``."""
    where = np.argwhere(mask)
    beyond = AROUND_MM + REACH_MM + 2 * SMOOTH_MM
    lines = []
    for low, high, mm in zip(where.min(0), where.max(0), step, strict=True):
        count = int(((high - low) * mm + 2 * beyond) / GRID_MM) + 1
        lines.append((low + high) / 2 + (np.arange(count) - (count - 1) / 2) * GRID_MM / mm)
    return np.stack(np.meshgrid(*lines, indexing="ij"))


def _sampled(plane: Array, where: Array, step: Array) -> Array:
    smooth = gaussian_filter(plane.astype(np.float32), SMOOTH_MM / step, truncate=3)
    found: Array = map_coordinates(smooth, where, order=1, mode="nearest")
    return found
