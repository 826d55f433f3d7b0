"""How far voxels are from the border of a place, as far as only what lies near it matters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def border_distance(
    place: NDArray[np.bool_], reach_mm: float, spacing_mm: Sequence[float] | NDArray[np.floating]
) -> NDArray[np.float32]:
    """How far each voxel of some places is from the nearest voxel outside, centre to centre, in mm.

    Exact up to ``reach_mm``; what is farther has some number above it. One axis after the other, all places at once:
    faster than a whole distance transform of each.

    Args:
        place: ``(..., H, W)``.
        reach_mm: how far is looked.
        spacing_mm: of H and W.
    """
    squared = np.where(place, np.float32(np.inf), np.float32(0))
    for axis, step in enumerate(spacing_mm):
        before = squared.copy()
        for n in range(1, min(int(reach_mm / step), squared.shape[axis - 2] - 1) + 1):
            far = before + np.float32((n * step) ** 2)
            ahead, behind = (np.s_[..., n:], np.s_[..., :-n]) if axis else (np.s_[..., n:, :], np.s_[..., :-n, :])
            np.minimum(squared[ahead], far[behind], out=squared[ahead])
            np.minimum(squared[behind], far[ahead], out=squared[behind])
    return np.sqrt(squared)
