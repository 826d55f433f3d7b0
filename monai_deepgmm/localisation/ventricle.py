"""The left ventricle of short-axis slices, found from their intensities alone: no label, nothing trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from monai_deepgmm.localisation import annulus, contours, polar_grid
from monai_deepgmm.localisation.annulus import Candidate
from monai_deepgmm.localisation.contours import Contours

Array = NDArray[np.floating[Any]]

#: What the contours' fit counts beside that of the rings; a fit above which no other place is looked at.
FIT_WEIGHT, GOOD_FIT = 0.5, 5.5
#: An outermost slice whose fit is below this holds no ventricle.
LEAST_SLICE_FIT = 0.8
#: The confidence is one half at this fit, and grows with this softness. Nowhere but at hearts of 59 patients is the
#: fit above 4.5; at hearts it is above 3.
HALF_FIT, SOFTNESS = 2.5, 0.5
#: How far away another place begins, in mm. The confidence is halved where one is behind by this little, in the same
#: units, with this softness.
ELSEWHERE_MM, HALF_MARGIN, MARGIN_SOFTNESS = 25.0, 0.1, 0.1


class Found(NamedTuple):
    """The left ventricle of a patient.

    Attributes:
        mask: ``(X, Y, Z)`` bool, all False in slices without it.
        confidence: between 0 and 1.
        centres: in voxels along the first three axes, for each slice that holds it ``(n, 3)``.
    """

    mask: NDArray[np.bool_]
    confidence: float
    centres: Array


def find(
    image: NDArray[np.floating],
    contrast: Sequence[float],
    even: Sequence[bool],
    spacing_mm: Sequence[float],
) -> Found:
    """Finds the ventricle: rings say where it may be, contours which voxels, and how well they fit, which place.

    Args:
        image: ``(M, X, Y, Z)``; any scale. The slice axis is the one of the largest spacing.
        contrast: of the M sequences: 1 where blood is brighter than wall, −1 where it is darker.
        even: of the M sequences, whether scar and edema look like the rest of the wall there.
        spacing_mm: of X, Y and Z.
    """
    spacing = np.asarray(spacing_mm, float)
    axis = int(np.flatnonzero(spacing == spacing.max())[-1])
    stack = np.moveaxis(np.where(np.isfinite(image), image, 0).astype(np.float32), axis + 1, 3)
    in_plane = np.delete(spacing, axis)
    tried: list[tuple[float, Candidate, Contours]] = []
    for place in annulus.candidates(stack, contrast, in_plane):
        found = contours.around(stack, place, np.asarray(even, bool))
        tried.append((place.score + FIT_WEIGHT * float(found.fit.mean()), place, found))
        if found.fit.mean() > GOOD_FIT:
            break
    if not tried:
        return Found(np.zeros(image.shape[1:], bool), 0.0, np.zeros((0, 3)))
    rank, place, found = max(tried, key=lambda one: one[0])
    held = _held(found.fit)
    mask = polar_grid.enclosed(found.outer_mm, found.centres, place.spacing_mm, stack.shape[1:3]) & held
    numbers = np.flatnonzero(held)
    centres = np.insert(found.centres[numbers], axis, numbers, axis=1)
    confidence = float(expit((found.fit[numbers].mean() - HALF_FIT) / SOFTNESS)) if len(numbers) else 0.0
    middle = found.centres.mean(0)
    for other, _, elsewhere in tried:
        if np.hypot(*((elsewhere.centres.mean(0) - middle) * in_plane)) > ELSEWHERE_MM:
            confidence *= float(expit((rank - other - HALF_MARGIN) / MARGIN_SOFTNESS))
    return Found(np.moveaxis(mask, 2, axis), confidence, centres)


def _held(fit: Array) -> NDArray[np.bool_]:
    """The slices between the outermost two that hold the ventricle ``(Z,)``."""
    good = np.flatnonzero(fit >= LEAST_SLICE_FIT)
    held = np.zeros(len(fit), bool)
    if len(good):
        held[good[0] : good[-1] + 1] = True
    return held
