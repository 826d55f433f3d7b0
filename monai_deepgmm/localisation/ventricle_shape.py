"""The shape that a ventricle's outer contours have in common: round, around a straight axis, narrower to its ends.

Where scar is as bright as blood, a slice's contours may leave the ventricle: scar goes to the cavity, and the outer
contour follows it into the right ventricle or fat. The other slices tell: a heart's axis is straight, and its radius
changes little from slice to slice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.localisation import polar_grid
from monai_deepgmm.localisation.polar_grid import ANGLES, DIRECTIONS, TURNS

Array = NDArray[np.floating[Any]]

#: How far a contour lies from the shape where it is right, in mm (the scale of a Cauchy density), and what that is
#: multiplied by in each round, since a shape is sought from afar.
SCALE_MM, ROUNDS = 2.5, (3, 3, 3, 2, 2, 2, *[1] * 9)
#: What lies outside of the shape is so many times further away: slices go astray outwards.
OUTWARDS = 1.5
#: How many independent places one angle is worth.
EVIDENCE = 0.15
#: Standard deviations in mm of: the radius; its change and its bend from the middle of the stack to its ends; the
#: place; how far the axis leans from the middle to the ends; by how much the shape is no circle.
DEVIATIONS_MM = np.array([1e3, 8.0, 4.0, 1e3, 1e3, 6.0, 6.0, 3.0, 3.0])
#: The least radius of the shape in mm; the least fit of a slice that counts.
LEAST_MM, LEAST_FIT = 6.0, 0.3


class VentricleShape(NamedTuple):
    """Outer contours as the shape would have them.

    Attributes:
        centres_mm: of each slice, on the straight axis ``(Z, 2)``.
        contours_mm: around these ``(Z, ANGLES)``.
    """

    centres_mm: Array
    contours_mm: Array

    def around(self, centres_mm: Array) -> Array:
        """The contours around other centres ``(Z, 2)``: ``(Z, ANGLES)``."""
        return polar_grid.around(self.contours_mm, centres_mm - self.centres_mm)


def fitted(contours_mm: Array, centres_mm: Array, fit: Array) -> VentricleShape:
    """Fits the shape to contours, of which some slices may have gone astray.

    At height z in the stack (−1 to 1) and angle θ the shape has the radius ``a + b z + c z² + e cos 2θ + f sin 2θ``, c
    at most 0, around a centre that is linear in z: weighted least squares, again and again, the weights those of a
    Cauchy density.

    Args:
        contours_mm: ``(Z, ANGLES)``.
        centres_mm: ``(Z, 2)``.
        fit: of each slice; one counts by its square ``(Z,)``.
    """
    z = np.linspace(-1, 1, len(contours_mm))[:, None]
    points = centres_mm[..., None] + DIRECTIONS * contours_mm[:, None]
    trust = np.maximum(fit, LEAST_FIT)[:, None] ** 2 * np.ones(ANGLES)
    trust /= trust.max()
    weight, centres = trust, np.repeat(np.median(centres_mm, axis=0)[None], len(z), 0)
    found: Array = np.zeros(len(DEVIATIONS_MM))
    for scale in ROUNDS:
        x, y = (points - centres[..., None]).transpose(1, 0, 2)
        turn, radius = np.arctan2(y, x), np.hypot(x, y)
        columns = _columns(z, turn)
        found = _solved(columns, radius, weight)
        away = radius - columns @ found
        away = np.where(away > 0, OUTWARDS * away, away)
        weight = trust / (1 + (away / (scale * SCALE_MM)) ** 2)
        centres = centres + found[3:5] + z * found[5:7]
    found[3:7] = 0  # the centres have moved
    return VentricleShape(centres, np.maximum(_columns(z, TURNS) @ found, LEAST_MM))


def _columns(z: Array, turn: Array) -> Array:
    """What each of the shape's numbers adds to the radius at each place ``(Z, ANGLES, 9)``."""
    z, turn = np.broadcast_arrays(z, turn)
    cosine, sine = np.cos(turn), np.sin(turn)
    parts = [np.ones_like(turn), z, z**2, cosine, sine, z * cosine, z * sine, np.cos(2 * turn), np.sin(2 * turn)]
    return np.stack(parts, -1)


def _solved(columns: Array, radius: Array, weight: Array) -> Array:
    """The numbers of the shape ``(9,)`` that fit radii ``(Z, ANGLES)`` best; never wider at both ends."""
    deviations = DEVIATIONS_MM.copy()
    weight = weight * EVIDENCE / SCALE_MM**2
    squares = np.einsum("zaj,za,zak->jk", columns, weight, columns)
    moments = np.einsum("zaj,za->j", columns, weight * radius)
    found: Array = np.linalg.solve(squares + np.diag(deviations**-2), moments)
    if found[2] > 0:
        deviations[2] = 1e-3
        found = np.linalg.solve(squares + np.diag(deviations**-2), moments)
    return found
