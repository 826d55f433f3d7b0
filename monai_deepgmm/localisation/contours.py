"""Which voxels are ventricle: two closed contours, alternating with what blood, wall and surroundings look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from monai_deepgmm.localisation import polar_grid, ventricle_shape
from monai_deepgmm.localisation.annulus import Candidate
from monai_deepgmm.localisation.appearance import densities
from monai_deepgmm.localisation.closed_path import smoothest
from monai_deepgmm.localisation.polar_grid import ENDS_MM, MIDDLES_MM, STEP_MM

Array = NDArray[np.floating[Any]]

#: Standard deviation of the Gaussian that takes the noise off the image, in mm.
DENOISE_MM = 0.7
#: How often contours and appearance alternate at each place, and how often again at the best one; before which of
#: these rounds the centre moves to the outer contour's.
ROUNDS, MORE_ROUNDS, RECENTRED = 6, 10, (1, 2, 3, 4, 7)
#: The first contours: the inner one, and the wall at radius 0 in mm, and how much of the radius is added. The outer
#: one begins outside, and is drawn in.
INNER_SCALE, INNER_ADD_MM, WALL_MM, WALL_SHARE = 1.12, 1.0, 12.5, 0.08
#: How many independent cells a ray of 1 mm cells is worth, and the most that one cell can say.
EVIDENCE, CLIP = 0.15, 3.0
#: The usual wall in mm at radius 0 and how much of the radius is added; the standard deviation at an angle in mm;
#: the least wall.
USUAL_WALL_MM, USUAL_SHARE, WALL_SD_MM, LEAST_WALL_MM = 8.75, 0.08, 3.0, 3.0
#: Standard deviation of a contour's change from one angle to the next in mm; of its smoothing afterwards, in angles.
INNER_CHANGE_MM, OUTER_CHANGE_MM, SMOOTHING = 2.0, 1.2, 1.0
#: So many slices have a shape in common.
LEAST_SLICES = 3
#: How far from a contour its fit is looked at, in mm.
NEAR_MM = 8.0


class Contours(NamedTuple):
    """The two contours of Z slices.

    Attributes:
        centres: in voxels ``(Z, 2)``.
        inner_mm: the endocardium ``(Z, ANGLES)``.
        outer_mm: the epicardium ``(Z, ANGLES)``.
        inner_fit: of each slice: the mean log-likelihood ratios of both sides of the inner contour, added ``(Z,)``.
        outer_fit: the same of the outer one.
    """

    centres: Array
    inner_mm: Array
    outer_mm: Array
    inner_fit: Array
    outer_fit: Array

    @property
    def fit(self) -> Array:
        """Of both ``(Z,)``."""
        return self.inner_fit + self.outer_fit


def around(image: Array, start: Candidate, even: NDArray[np.bool_]) -> Contours:
    """Fits the two contours around a candidate.

    Args:
        image: ``(M, X, Y, Z)``.
        start: where.
        even: of the M sequences, those in which scar and edema look like the rest of the wall.
    """
    inner: Array = np.repeat(start.radii_mm[:, None] * INNER_SCALE + INNER_ADD_MM, polar_grid.ANGLES, 1)
    first = Contours(start.centres, inner, inner * (1 + WALL_SHARE) + WALL_MM, *np.zeros((2, len(inner))))
    return _alternated(image, first, range(ROUNDS), start.spacing_mm, even)


def settled(image: Array, start: Candidate, found: Contours, even: NDArray[np.bool_]) -> Contours:
    """The contours after more rounds, of which many places are not worth; the fit stays that of ``around``.

    More rounds make contours better, and so they do where no heart is: what a fit means was learnt without them. They
    begin with circles of the radii found: where two contours are as good, the coarse grid must not decide. Where no
    sequence shows the wall evenly, scar may be taken for blood: there they begin with the shape that the slices have in
    common, and are held to it.
    """
    shaped = not even.any() and len(found.outer_mm) >= LEAST_SLICES
    inner, outer = (np.repeat(c.mean(1, keepdims=True), polar_grid.ANGLES, 1) for c in (found.inner_mm, found.outer_mm))
    first = found._replace(inner_mm=inner, outer_mm=outer)
    if shaped:
        shape = ventricle_shape.fitted(found.outer_mm, found.centres * start.spacing_mm, found.fit)
        inner = np.maximum(shape.contours_mm - (outer - inner).mean(), shape.contours_mm / 2)
        first = found._replace(centres=shape.centres_mm / start.spacing_mm, inner_mm=inner, outer_mm=shape.contours_mm)
    rounds = range(ROUNDS, ROUNDS + MORE_ROUNDS)
    more = _alternated(image, first, rounds, start.spacing_mm, even, held_by=found.fit if shaped else None)
    return more._replace(inner_fit=found.inner_fit, outer_fit=found.outer_fit)


def _alternated(
    image: Array,
    found: Contours,
    rounds: Iterable[int],
    spacing_mm: Array,
    even: NDArray[np.bool_],
    *,
    held_by: Array | None = None,
) -> Contours:
    """The contours after some rounds, and their fit; held to their common shape by what slices count ``(Z,)``."""
    centres, inner, outer, *_ = found
    image = gaussian_filter(image, (0, *(DENOISE_MM / spacing_mm), 0), truncate=3)
    x, area = polar_grid.sample(image, centres, spacing_mm)
    shape = None
    for number in rounds:
        if number in RECENTRED:
            shift = polar_grid.centroid(outer)
            centres = centres + shift / spacing_mm
            inner, outer = polar_grid.around(inner, shift), polar_grid.around(outer, shift)
            x, area = polar_grid.sample(image, centres, spacing_mm)
        if held_by is not None:
            middles = centres * spacing_mm
            shape = ventricle_shape.fitted(outer, middles, held_by).around(middles)
        inner, outer = _drawn(x, area, inner, outer, even, shape)
    return Contours(centres, inner, outer, *_fits(x, area, inner, outer, even))


def _drawn(
    x: Array, area: Array, inner: Array, outer: Array, even: NDArray[np.bool_], shape: Array | None
) -> tuple[Array, Array]:
    """Both contours, drawn again by dynamic programming, the inner one first; the outer one near a shape, if any."""
    look = densities(x, area, inner, outer, even)
    wall = (_thickness(inner, outer) / 2 + _usual(inner) / 2)[:, None]
    gain = _gain(look.blood - look.wall, area) - _penalty(outer - wall)
    gain = gain - 50 * ((outer - LEAST_WALL_MM)[..., None] < ENDS_MM)
    inner = _smooth(ENDS_MM[smoothest(gain, 1 / (2 * (INNER_CHANGE_MM / STEP_MM) ** 2))])
    gain = _gain(look.wall - look.outside, area) - _penalty(inner + wall)
    gain = gain - 50 * ((inner + LEAST_WALL_MM)[..., None] > ENDS_MM)
    if shape is not None:
        gain = gain - _penalty(shape)
    return inner, _smooth(ENDS_MM[smoothest(gain, 1 / (2 * (OUTER_CHANGE_MM / STEP_MM) ** 2))])


def _gain(ratio: Array, area: Array) -> Array:
    """What a contour at each radius gains: the log-likelihood ratios of the cells within it, added."""
    gain: Array = np.cumsum(ratio.clip(-CLIP, CLIP) * area, 2) * EVIDENCE * STEP_MM
    return gain


def _penalty(expected_mm: Array) -> Array:
    penalty: Array = ((ENDS_MM - expected_mm[..., None]) / WALL_SD_MM) ** 2 / 2
    return penalty


def _thickness(inner: Array, outer: Array) -> Array:
    thickness: Array = (outer - inner).mean(1)
    return thickness


def _usual(inner: Array) -> Array:
    usual: Array = USUAL_WALL_MM + USUAL_SHARE * inner.mean(1)
    return usual


def _smooth(contours: Array) -> Array:
    smooth: Array = gaussian_filter1d(contours, SMOOTHING, axis=1, mode="wrap")
    return smooth


def _fits(x: Array, area: Array, inner: Array, outer: Array, even: NDArray[np.bool_]) -> tuple[Array, Array]:
    """How well the contours part blood from wall, and wall from surroundings, in each slice ``(Z,)``."""
    look = densities(x, area, inner, outer, even)
    endo = (look.blood - look.wall).clip(-CLIP, CLIP)
    epi = (look.wall - look.outside).clip(-CLIP, CLIP)
    within, beyond = inner[..., None], outer[..., None]
    wall = (within < MIDDLES_MM) & (beyond > MIDDLES_MM)
    blood = (within > MIDDLES_MM) & (within - NEAR_MM < MIDDLES_MM)
    outside = (beyond < MIDDLES_MM) & (beyond + NEAR_MM > MIDDLES_MM)

    def mean(ratio: Array, where: NDArray[np.bool_]) -> Array:
        weight = area * where
        found: Array = (ratio * weight).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1e-6)
        return found

    return mean(endo, blood) - mean(endo, wall), mean(epi, wall) - mean(epi, outside)
