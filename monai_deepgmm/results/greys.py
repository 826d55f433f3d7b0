"""Which intensities are shown black and white: those of the wall or the brain, not of fat beside it."""

from __future__ import annotations

import numpy as np

from monai_deepgmm.results.segmentation import Segmentation


def wall(segmentation: Segmentation) -> np.ndarray:
    """Where the greys should tell most: what ``percent`` is a percentage of, or the mask, (X, Y, Z) bool."""
    protocol = segmentation.protocol
    shares = [t.index for t in segmentation.tissues if t.name in protocol.percent_of]
    partial = len(protocol.percent_of) < len(protocol.tissues)
    if not (partial and shares):
        return segmentation.mask
    chosen = np.zeros(256, dtype=bool)
    chosen[shares] = True
    return np.asarray(chosen[segmentation.labels])


def wall_ranges(segmentation: Segmentation, planes: np.ndarray, walls: np.ndarray) -> list[tuple[float, float]]:
    """The wall's 1st and 99th percentile in each plane, or in all at once where the volume is one image.

    Args:
        segmentation: says which.
        planes: intensities (slices, rows, columns).
        walls: the wall, alike; a plane without takes the range of the nearest one with.
    """
    if segmentation.protocol.unit == "volume":
        return [grey_range(planes[walls], 99.0)] * len(planes)
    held = np.flatnonzero(walls.any(axis=(1, 2)))
    if not held.size:
        return [grey_range(planes)] * len(planes)
    ranges = {k: grey_range(planes[k][walls[k]], 99.0) for k in held}
    return [ranges[held[np.abs(held - k).argmin()]] for k in range(len(planes))]


def grey_range(image: np.ndarray, upper: float = 99.5) -> tuple[float, float]:
    """The intensities shown as black and white, robust against a few bright or dark voxels.

    Args:
        image: of any shape.
        upper: the percentile that is shown white; the 1st is black.
    """
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, [1.0, upper]) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6 * max(1.0, abs(low))))
