"""Where the left ventricle is: a ring of wall around a disc of blood, matched in every slice on a coarse grid.

At every place of a slice and for every radius the disc is held against the ring around it, by how many pooled standard
deviations their means differ. What is best in a slice within a short way counts, and slices add up. Hearts lie near the
centre of the field of view, since the examination was planned on them; how far from it is a mild prior. Where voxels
are not as square as the header says, the heart is an ellipse along the grid: three stretches are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, maximum_filter

Array = NDArray[np.floating[Any]]

#: The grid's spacing, and the radii of the disc, in mm.
GRID_MM = 3.0
RADII_MM = np.array([9.0, 12.0, 15.0, 18.0, 21.0, 25.0, 29.0, 34.0])
#: What is left out between disc and ring on either side of the border, in mm; the ring's width at radius 0, in mm,
#: and how much of the radius is added to it.
GAP_MM, WALL_MM, WALL_SHARE = 1.5, 6.0, 0.1
#: The most that one sequence of one slice can say, in standard deviations.
CLIP = 2.0
#: The usual radius in mm, the standard deviation of its logarithm, and the weight of that prior.
USUAL_MM, RADIUS_SD, RADIUS_WEIGHT = 20.0, 0.4, 0.3
#: Standard deviation of the place around the centre of the field, as a share of its sides of at least 250 mm.
PLACE_SD, LEAST_FIELD_MM = 0.08, 250.0
#: Standard deviation of the logarithm of the stretch, its weight, and the stretches that are tried.
STRETCH_SD, STRETCH_WEIGHT, STRETCHES = 0.35, 0.1, (0.6, 1.0, 1.65)
#: How far a slice may lie beside its neighbours, in voxels of the grid; and how far peaks are apart, in mm.
SHIFT, APART_MM = 2, 15.0
#: Standard deviation of the change of log radius from slice to slice, of a slice's own shift in mm, their weight.
CHANGE_SD, SHIFT_SD_MM, AGREEMENT_WEIGHT = 0.25, 8.0, 0.3


class Candidate(NamedTuple):
    """A place where the left ventricle may be.

    Attributes:
        score: how well rings fit there, in standard deviations, with the priors.
        centres: in voxels, for each slice ``(Z, 2)``.
        radii_mm: of the disc, for each slice ``(Z,)``.
        spacing_mm: of the two in-plane axes, after the stretch that makes the heart round ``(2,)``.
    """

    score: float
    centres: Array
    radii_mm: Array
    spacing_mm: Array


def candidates(image: Array, contrast: Sequence[float], spacing_mm: Array, *, most: int = 3) -> list[Candidate]:
    """The best places, best first.

    Args:
        image: ``(M, X, Y, Z)``, slices along the last axis.
        contrast: of the M sequences: 1 where blood is brighter than wall, −1 where it is darker.
        spacing_mm: of X and Y ``(2,)``.
        most: how many at most.
    """
    field = _field(image)
    found = []
    for stretch in STRETCHES:
        spacing = spacing_mm * np.array([stretch**0.5, stretch**-0.5])
        rings = _rings(_coarse(image, spacing), contrast)
        score = maximum_filter(rings.max(0), (0, 2 * SHIFT + 1, 2 * SHIFT + 1)).mean(0) / len(contrast)
        score += _prior(score.shape, field, spacing) - (np.log(stretch) / STRETCH_SD) ** 2 * STRETCH_WEIGHT / 2
        score = gaussian_filter(score, 0.7)
        peaks = np.argwhere(score == maximum_filter(score, 5))
        found += [(score[tuple(p)], (p + 0.5) * GRID_MM / spacing - 0.5, spacing, rings, p) for p in peaks]
    found.sort(key=lambda one: -one[0])
    chosen: list[tuple[Array, Candidate]] = []
    for value, place, spacing, rings, peak in found:
        if all(np.hypot(*((place - other) * spacing_mm)) > APART_MM for other, _ in chosen):
            centres, radii = _by_slice(rings, peak, spacing)
            chosen.append((place, Candidate(float(value), centres, radii, spacing)))
        if len(chosen) == most:
            break
    return [one for _, one in chosen]


def _field(image: Array) -> list[tuple[int, int]]:
    """The first and last voxel, along X and Y, of what is not constant padding."""
    ends = []
    for axis in (1, 2):
        lines = np.moveaxis(image, axis, 0).reshape(image.shape[axis], image.shape[0], -1)
        used = np.flatnonzero(np.ptp(lines, axis=2).max(1) > 0)
        ends.append((int(used[0]), int(used[-1])) if len(used) else (0, image.shape[axis] - 1))
    return ends


def _coarse(image: Array, spacing_mm: Array) -> Array:
    """The image on the coarse grid, each slice with mean 0 and standard deviation 1 ``(M, Z, x, y)``."""
    smooth = gaussian_filter(image, (0, *(0.45 * GRID_MM / spacing_mm), 0), truncate=3)
    taken = []
    for size, step in zip(image.shape[1:3], spacing_mm, strict=True):
        middles = (np.arange(max(int(size * step / GRID_MM), 1)) + 0.5) * GRID_MM / step - 0.5
        taken.append(np.rint(middles).astype(int).clip(0, size - 1))
    coarse = smooth[:, taken[0]][:, :, taken[1]].transpose(0, 3, 1, 2)
    sd = coarse.std((2, 3), keepdims=True)
    scaled: Array = (coarse - coarse.mean((2, 3), keepdims=True)) / np.where(sd > 0, sd, 1)
    return scaled


def _rings(image: Array, contrast: Sequence[float]) -> Array:
    """How well a ring of each radius fits at each place of each slice ``(radii, Z, x, y)``, summed over sequences."""
    shape = image.shape[2:]
    reach = int((RADII_MM[-1] * (1 + WALL_SHARE) + WALL_MM + GAP_MM) / GRID_MM) + 2
    size = [fft.next_fast_len(n + reach, real=True) for n in shape]
    away = np.hypot(*np.meshgrid(*(np.minimum(np.arange(n), n - np.arange(n)) * GRID_MM for n in size), indexing="ij"))
    spectra = [fft.rfft2(x.astype(np.float32), size) for x in (np.ones(shape), image, image**2)]

    def moments(kernel: Array) -> tuple[Array, Array]:
        spectrum = fft.rfft2(kernel.astype(np.float32))
        count, first, second = (fft.irfft2(s * spectrum, size)[..., : shape[0], : shape[1]] for s in spectra)
        count = np.maximum(count, 1e-3)
        return first / count, np.maximum(second / count - (first / count) ** 2, 0)

    fits = []
    for radius in RADII_MM:
        inner, outer = radius + GAP_MM, radius * (1 + WALL_SHARE) + WALL_MM + GAP_MM
        blood, spread = moments(_within(away, radius - GAP_MM))
        wall, wall_spread = moments(_within(away, outer) * (1 - _within(away, inner)))
        differ = (blood - wall) / np.sqrt((spread + wall_spread) / 2 + 0.01)
        signed = differ * np.sign(contrast)[:, None, None, None]
        prior = (np.log(radius / USUAL_MM) / RADIUS_SD) ** 2 * RADIUS_WEIGHT / 2
        fits.append(signed.clip(-CLIP, CLIP).sum(0) - prior)
    return np.stack(fits)


def _within(away: Array, radius: float) -> Array:
    """A disc with a soft border."""
    disc: Array = np.clip((radius - away) / GRID_MM + 0.5, 0, 1)
    return disc


def _prior(shape: tuple[int, ...], field: Sequence[tuple[int, int]], spacing_mm: Array) -> Array:
    """The log prior of each place of the coarse grid: a Cauchy density around the middle of the field."""
    squares = []
    for size, (first, last), step in zip(shape, field, spacing_mm, strict=True):
        middle, side = (first + last) / 2 * step, max((last - first) * step, LEAST_FIELD_MM)
        places = (np.arange(size) + 0.5) * GRID_MM - step / 2
        squares.append(((places - middle) / (PLACE_SD * side)) ** 2)
    prior: Array = -0.5 * np.log1p(squares[0][:, None] + squares[1])
    return prior


def _by_slice(rings: Array, peak: NDArray[np.integer[Any]], spacing_mm: Array, window: int = 3) -> tuple[Array, Array]:
    """Each slice's own centre in voxels ``(Z, 2)`` and radius in mm ``(Z,)`` near a peak; neighbours agree on radii."""
    first = np.maximum(peak - window, 0)
    near = rings[:, :, first[0] : peak[0] + window + 1, first[1] : peak[1] + window + 1]
    shift = np.indices(near.shape[2:]) + (first - peak)[:, None, None]
    near = near - AGREEMENT_WEIGHT * (shift**2).sum(0) * (GRID_MM / SHIFT_SD_MM) ** 2 / 2
    best = near.max((2, 3))
    change = np.log(RADII_MM[:, None] / RADII_MM) / CHANGE_SD
    cost = AGREEMENT_WEIGHT * change**2 / 2
    total, back = best[:, 0], []
    for z in range(1, best.shape[1]):
        step = total[:, None] - cost
        back.append(step.argmax(0))
        total = step.max(0) + best[:, z]
    path = [int(total.argmax())]
    for previous in reversed(back):
        path.append(int(previous[path[-1]]))
    path = path[::-1]
    places = [np.unravel_index(near[r, z].argmax(), near.shape[2:]) for z, r in enumerate(path)]
    centres = (np.array(places) + first + 0.5) * GRID_MM / spacing_mm - 0.5
    return centres, RADII_MM[path]
