"""Rings on grids of every kind, whose numbers are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.results.wall import plane

Affine = NDArray[np.float64]
INNER, OUTER = 20.0, 30.0


def turned(
    spacing: tuple[float, float, float], degrees: tuple[float, float] = (0.0, 0.0), shear: float = 0.0
) -> Affine:
    """Voxels of this size, turned about x and then y, whose second axis leans towards the first."""
    a, b = np.radians(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_y @ about_x @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1.0]]) @ np.diag(spacing)
    affine[:3, 3] = (-30.0, 12.0, 7.0)
    return affine


#: Grids, each with its slice axis: isotropic, anisotropic in the plane, oblique, sheared, slices along the first axis.
GRIDS = {
    "isotropic": (turned((1.0, 1.0, 8.0)), 2),
    "anisotropic": (turned((0.8, 1.5, 10.0)), 2),
    "oblique": (turned((1.2, 0.9, 8.0), (35.0, -50.0)), 2),
    "sheared": (turned((1.0, 1.0, 8.0), (10.0, 20.0), shear=0.3), 2),
    "first axis": (turned((9.0, 1.1, 0.9), (20.0, 15.0)), 0),
}


def polar(affine: Affine, axis: int, count: int = 4) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance in mm (X, Y, Z) from the middle of each of ``count`` slices, and the angle as ``plane`` counts it."""
    seen = plane(affine, axis)
    shape = [int(90 / s) | 1 for s in np.linalg.norm(affine[:3, :3], axis=0)]
    shape[axis] = count
    steps = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij"), -1)[..., list(seen.axes)]
    left, up = np.moveaxis(steps @ seen.to_mm.T, -1, 0)
    return np.hypot(left, up), np.degrees(np.arctan2(up, left)) % 360
