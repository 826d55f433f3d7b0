"""How far voxels are from the border of a place, as far as only what lies near it matters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def border_distance(
    place: NDArray[np.bool_], reach_mm: float, spacing_mm: Sequence[float] | NDArray[np.floating]
) -> NDArray[np.float32]:
    """How far each voxel of some places is from the nearest voxel outside, centre to centre, in mm.

    Exact up to ``reach_mm``; what is farther has some number above it. One axis after the other: faster than
    a whole distance transform.

    Args:
        place: ``(..., H, W)``.
        reach_mm: how far is looked.
        spacing_mm: of H and W.
    """
    found = np.where(place, np.float32(np.inf), np.float32(0))
    for one in found.reshape(-1, *place.shape[-2:]):  # which, and what is made of it, the cache holds
        down = _nearest(one, reach_mm, spacing_mm[0])
        one[:] = _nearest(down.T, reach_mm, spacing_mm[1]).T
    return np.sqrt(found, out=found)


def _nearest(squared: NDArray[np.float32], reach_mm: float, step_mm: float) -> NDArray[np.float32]:
    """The least of squared distances ``(H, W)`` and of those from other rows with the way from there."""
    before = np.ascontiguousarray(squared)  # so that shifted rows are one piece of memory
    found, far = before.copy(), np.empty_like(before)
    for n in range(1, min(int(reach_mm / step_mm), len(before) - 1) + 1):
        np.add(before, np.float32((n * step_mm) ** 2), out=far)
        np.minimum(found[n:], far[:-n], out=found[n:])
        np.minimum(found[:-n], far[n:], out=found[:-n])
    return found
