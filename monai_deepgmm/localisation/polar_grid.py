"""Slices in polar coordinates around a centre each, and closed contours there and back in the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

Array = NDArray[np.floating[Any]]

#: Angles around the centre, radii from it, and the step from one radius to the next in mm.
ANGLES, RADII, STEP_MM = 72, 62, 1.0
#: The middle of each polar cell and its end, in mm ``(RADII,)``.
MIDDLES_MM, ENDS_MM = (np.arange(RADII) + 0.5) * STEP_MM, (np.arange(RADII) + 1.0) * STEP_MM
TURNS = 2 * np.pi * np.arange(ANGLES) / ANGLES
#: The unit vector of each angle ``(2, ANGLES)``.
DIRECTIONS = np.stack([np.cos(TURNS), np.sin(TURNS)])


def sample(image: Array, centres: Array, spacing_mm: Array) -> tuple[Array, Array]:
    """Slices in polar cells, and how much each cell counts.

    Args:
        image: ``(M, X, Y, Z)``.
        centres: in voxels ``(Z, 2)``.
        spacing_mm: of X and Y ``(2,)``.

    Returns:
        ``(Z, M, ANGLES, RADII)``, and each cell's area with mean 1, 0 outside the image ``(Z, ANGLES, RADII)``.
    """
    seen, area = [], []
    last = np.array(image.shape[1:3])[:, None, None] - 1
    for z, centre in enumerate(centres):
        points = centre[:, None, None] + DIRECTIONS[:, :, None] * MIDDLES_MM / spacing_mm[:, None, None]
        seen.append(np.stack([map_coordinates(x[..., z], points, order=1, mode="nearest") for x in image]))
        inside = ((points >= -0.5) & (points <= last + 0.5)).all(0)
        area.append(inside * MIDDLES_MM / MIDDLES_MM.mean())
    return np.stack(seen).astype(np.float64), np.stack(area)


def centroid(contours_mm: Array) -> Array:
    """The centroid of what closed contours ``(Z, ANGLES)`` enclose, in mm from their centres ``(Z, 2)``."""
    moment: Array = (contours_mm[:, None] ** 3 * DIRECTIONS).sum(2) * 2 / 3
    place: Array = moment / (contours_mm**2).sum(1)[:, None]
    return place


def around(contours_mm: Array, shift_mm: Array) -> Array:
    """The same contours ``(Z, ANGLES)`` around centres that have moved by ``(Z, 2)`` mm."""
    moved = np.empty_like(contours_mm)
    for z, (contour, shift) in enumerate(zip(contours_mm, shift_mm, strict=True)):
        points = DIRECTIONS * contour - shift[:, None]
        moved[z] = np.interp(TURNS, np.arctan2(points[1], points[0]), np.hypot(*points), period=2 * np.pi)
    return moved


def enclosed(contours_mm: Array, centres: Array, spacing_mm: Array, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """What the contours ``(Z, ANGLES)`` enclose ``(X, Y, Z)``."""
    grid = np.indices(shape).astype(float)
    mask = np.zeros((*shape, len(centres)), bool)
    for z, (contour, centre) in enumerate(zip(contours_mm, centres, strict=True)):
        away = (grid - centre[:, None, None]) * spacing_mm[:, None, None]
        radius = np.interp(np.arctan2(away[1], away[0]), TURNS, contour, period=2 * np.pi)
        mask[..., z] = np.hypot(*away) < radius
    return mask
