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
from monai_deepgmm.protocol import Protocol

Array = NDArray[np.floating[Any]]

#: What the contours' fits count beside that of the rings, and up to what: any bright pool in the dark has a good inner
#: contour, but nothing around its wall. Nowhere but at hearts of 59 patients do rings and contours say more than 3.2 in
#: all; this much ends the search.
INNER_WEIGHT, MOST_INNER, OUTER_WEIGHT, MOST_OUTER, GOOD_RANK = 0.25, 3.0, 0.7, 2.0, 3.5
#: The usual radius of the cavity where it is widest, in mm; less than that speaks against a place, by the standard
#: deviation of its logarithm.
USUAL_WIDTH_MM, WIDTH_SD = 22.0, 0.25
#: An outermost slice whose fit is below this holds no ventricle; nor does one whose fit is below that share of the
#: median, unless there is one sequence alone, on which an apex shows poorly.
LEAST_SLICE_FIT, LEAST_SLICE_SHARE = 0.8, 0.45
#: The confidence is one half at this fit, and grows with this softness. Nowhere but at hearts of 59 patients is the
#: fit above 4.5; at hearts it is above 3.
HALF_FIT, SOFTNESS = 2.15, 0.5
#: How far away another place begins, in mm. The confidence is halved where one is behind by this little, in the same
#: units, with this softness.
ELSEWHERE_MM, HALF_MARGIN, MARGIN_SOFTNESS = 25.0, 0.1, 0.2


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


def find_by(
    image: NDArray[np.floating], protocol: Protocol, sequences: Sequence[str], spacing_mm: Sequence[float]
) -> Found:
    """Finds the ventricle, with what a protocol tells of its sequences.

    Args:
        image: ``(M, X, Y, Z)``.
        protocol: whose anatomy says where blood is brighter than wall, and whose tissues, which are seen where.
        sequences: of the M channels.
        spacing_mm: of X, Y and Z.
    """
    anatomy = protocol.anatomy
    contrast = dict(anatomy.contrast) if anatomy else {}
    if anatomy and anatomy.enhancement:
        contrast[anatomy.enhancement.sequence] = 1.0
    shown = {s for tissue in protocol.tissues if tissue.criteria for s in tissue.seen_in}
    return find(image, [contrast.get(s, 1.0) for s in sequences], [s not in shown for s in sequences], spacing_mm)


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
        tried.append((rank(place, found), place, found))
        if tried[-1][0] > GOOD_RANK:
            break
    if not tried:
        return Found(np.zeros(image.shape[1:], bool), 0.0, np.zeros((0, 3)))
    best, place, found = max(tried, key=lambda one: one[0])
    found = contours.settled(stack, place, found, np.asarray(even, bool))
    held = _held(found.fit, LEAST_SLICE_SHARE if len(stack) > 1 else 0.0)
    mask = polar_grid.enclosed(found.outer_mm, found.centres, place.spacing_mm, stack.shape[1:3]) & held
    numbers = np.flatnonzero(held)
    middles = found.centres + polar_grid.centroid(found.outer_mm) / place.spacing_mm
    centres = np.insert(middles[numbers], axis, numbers, axis=1)
    confidence = float(expit((found.fit[numbers].mean() - HALF_FIT) / SOFTNESS)) if len(numbers) else 0.0
    middle = found.centres.mean(0)
    for other, _, elsewhere in tried:
        if np.hypot(*((elsewhere.centres.mean(0) - middle) * in_plane)) > ELSEWHERE_MM:
            confidence *= float(expit((best - other - HALF_MARGIN) / MARGIN_SOFTNESS))
    return Found(np.moveaxis(mask, 2, axis), confidence, centres)


def rank(place: Candidate, found: Contours) -> float:
    """What speaks for a place.

    Args:
        place: where rings fit, and how well.
        found: the contours there.

    Returns:
        The sum of what rings and both contours say, each up to a limit, less what speaks against a narrow cavity.
    """
    inner, outer = float(found.inner_fit.mean()), float(found.outer_fit.mean())
    fits = INNER_WEIGHT * min(inner, MOST_INNER) + OUTER_WEIGHT * min(outer, MOST_OUTER)
    return place.score + fits - _too_small(found)


def _too_small(found: Contours) -> float:
    """What speaks against a cavity that is narrow in every slice, as the aorta is."""
    widest = float(found.inner_mm.mean(1).max())
    return float((min(np.log(widest / USUAL_WIDTH_MM), 0.0) / WIDTH_SD) ** 2 / 2)


def _held(fit: Array, share: float) -> NDArray[np.bool_]:
    """The slices between the outermost two that hold the ventricle ``(Z,)``."""
    good = np.flatnonzero(fit >= max(LEAST_SLICE_FIT, share * float(np.median(fit))))
    held = np.zeros(len(fit), bool)
    if len(good):
        held[good[0] : good[-1] + 1] = True
    return held
