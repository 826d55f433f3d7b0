"""An image in polar coordinates around its mask's centre."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

#: Angles around the centre, and radii from it to the outer border.
ANGLES, RADII = 72, 48
#: The middle of each polar cell and its end, as shares of the way to the outer border ``(RADII,)``.
MIDDLES, ENDS = (np.arange(RADII) + 0.5) / RADII, (np.arange(RADII) + 1) / RADII
#: Standard deviation of the Gaussian that takes the noise off an image before it is sampled, in mm.
DENOISE_MM = 0.5


class PolarView(NamedTuple):
    """The polar grid of one image.

    Attributes:
        mask: ``(H, W)``.
        distance: of each voxel from the centre, in mm ``(H, W)``.
        turn: each voxel's angle as a share of a full turn ``(H, W)``.
        outer: the outer border's radius at each angle, in mm ``(ANGLES,)``.
        points: where the polar cells lie in the image, in voxels ``(2, ANGLES, RADII)``.
        weight: the area of each cell that lies in the mask, in mm² but for a factor ``(ANGLES, RADII)``.
        ray: the area of an average ray, on the same scale.
        spacing_mm: of H and W ``(2,)``.
    """

    mask: Mask
    distance: Array
    turn: Array
    outer: Array
    points: Array
    weight: Array
    ray: float
    spacing_mm: Array

    @property
    def angle(self) -> NDArray[np.int64]:
        """The index of each voxel's angle ``(H, W)``."""
        return (self.turn * ANGLES).astype(np.int64) % ANGLES

    def sample(self, image: Array) -> Array:
        """An image ``(H, W)`` in the polar cells ``(ANGLES, RADII)``; what lies outside the mask counts as 0."""
        smooth = gaussian_filter(np.where(self.mask, image, 0), DENOISE_MM / self.spacing_mm)
        return interpolated(smooth, self.points)

    def within(self, borders: Array) -> Mask:
        """What of the mask lies closer to the centre than borders, shares of the outer one ``(V, ANGLES)``."""
        radii, place = borders * self.outer, self.turn[self.mask] * ANGLES
        first = place.astype(np.int64)
        before, after = radii[:, first % ANGLES], radii[:, (first + 1) % ANGLES]
        inside = np.zeros((len(borders), *self.mask.shape), dtype=bool)
        inside[:, self.mask] = self.distance[self.mask] < before + (after - before) * (place - first)
        return inside


def interpolated(image: NDArray[np.floating], points: Array, *, outside: float | None = None) -> Array:
    """An image ``(H, W)`` at points ``(2, ...)`` in voxels, linearly; beyond it ``outside``, or its nearest voxel."""
    lasts = np.array(image.shape).reshape(2, *[1] * (points.ndim - 1)) - 1
    within = points.clip(0, lasts)
    first = within.astype(np.int64)
    (above, left), (down, right) = within - first, np.minimum(first + 1, lasts) - first
    at, values = first[0] * image.shape[1] + first[1], image.ravel()
    down *= image.shape[1]
    upper, lower = (values[i] + (values[i + right] - values[i]) * left for i in (at, at + down))
    found: Array = upper + (lower - upper) * above
    return found if outside is None else np.where((points == within).all(0), found, outside)


def view(mask: Mask, spacing_mm: Array) -> PolarView:
    """The polar grid around the centre of a mask ``(H, W)``."""
    grid = np.indices(mask.shape).astype(float)
    centre = np.array([axis[mask].mean() if mask.any() else axis.mean() for axis in grid])
    away = (grid - centre[:, None, None]) * spacing_mm[:, None, None]
    distance = np.hypot(*away)
    outer = _outer(mask, centre, float(distance[mask].max(initial=0.0)), spacing_mm)
    points = centre[:, None, None] + _directions() / spacing_mm[:, None, None] * (outer[:, None] * MIDDLES)
    # Outside the mask (a hole, an open ring) nothing is known.
    known = interpolated(mask.astype(float), points, outside=0.0)
    area = MIDDLES * outer[:, None] ** 2
    turn = np.arctan2(away[1], away[0]) / (2 * np.pi) % 1
    ray = max(float(area.sum()) / ANGLES, 1e-9)
    return PolarView(mask, distance, turn, outer, points, known * area, ray, spacing_mm)


def _directions() -> Array:
    """The unit vector of each angle ``(2, ANGLES, 1)``."""
    turns = 2 * np.pi * np.arange(ANGLES) / ANGLES
    return np.stack([np.cos(turns), np.sin(turns)])[..., None]


def _outer(mask: Mask, centre: Array, farthest_mm: float, spacing_mm: Array) -> Array:
    """How far the mask reaches at each angle, in mm, slightly smoothed; none of its voxels lies farther than said."""
    step = spacing_mm.min() / 2
    lengths = np.arange(0.0, farthest_mm + spacing_mm.sum(), step)
    points = centre[:, None, None] + _directions() / spacing_mm[:, None, None] * lengths
    found = interpolated(mask.astype(float), points, outside=0.0) > 0.5
    farthest = np.where(found.any(1), len(lengths) - 1 - found[:, ::-1].argmax(1), 0)
    reach: Array = gaussian_filter1d(lengths[farthest] + step / 2, 1.0, mode="wrap")
    return reach
