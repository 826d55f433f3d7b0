"""Where tissues can be, from the mask's shape and the contrast inside it: a smooth inner border in every slice.

In a short-axis slice the mask's border is the epicardium. The endocardium is sought as a star-shaped contour around
the mask's centre: in polar coordinates it is one radius per angle, and dynamic programming finds the radii that best
separate the bright cavity from the wall, that change little from angle to angle, and that leave a wall of a usual
thickness. A smooth contour swallows papillary muscles and trabeculae, as readers do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates
from torch import Tensor

from monai_deepgmm.methods.naming import standardise
from monai_deepgmm.protocol import Anatomy

Array = NDArray[np.float64]

#: Angles around the centre, and radii from it to the outer border.
ANGLES, RADII = 72, 48
#: How many independent voxels the contrast of one ray through the wall is worth: neighbours repeat each other.
EVIDENCE = 10.0
#: The log-likelihood ratio that a single place can contribute at most; keeps a papillary muscle from having its way.
CLIP = 2.0
#: Standard deviation of the change of the relative radius from one angle to the next, and the largest step allowed.
SMOOTHNESS, MAX_STEP = 0.027, 3
#: How far the usual border is moved towards that of the neighbouring slices, smoothed over so many angles.
NEIGHBOURS, ANGULAR_SD = 0.25, 4.0
#: Standard deviation of the Gaussian that takes the noise off the contrast, in mm.
DENOISE_MM = 0.5


class Ring(NamedTuple):
    """The two borders of the wall, for each of B images.

    Attributes:
        inside: what lies within the inner border ``(B, 1, H, W)``, 0 or 1.
        angle: the index of each voxel's angle around the centre ``(B, H, W)``, 0 … ANGLES − 1.
        outer: the outer border's radius at each angle, in mm ``(B, ANGLES)``.
        inner: the inner one's.
    """

    inside: Tensor
    angle: NDArray[np.int64]
    outer: Array
    inner: Array

    @property
    def thickness_mm(self) -> Array:
        """The wall's mean thickness in each image ``(B,)``."""
        thickness: Array = (self.outer - self.inner).mean(1)
        return thickness


class _Polar(NamedTuple):
    """One image in polar coordinates around its mask's centre.

    Attributes:
        distance: of each voxel from the centre, in mm ``(H, W)``.
        turn: each voxel's angle as a share of a full turn ``(H, W)``.
        outer: the outer border's radius at each angle, in mm ``(ANGLES,)``.
        evidence: what the contrast says for each relative radius of the inner border ``(ANGLES, RADII)``.
    """

    distance: Array
    turn: Array
    outer: Array
    evidence: Array


def ring(
    image: Tensor,
    mask: Tensor,
    anatomy: Anatomy,
    sequences: tuple[str, ...],
    spacing_mm: tuple[float, ...],
    *,
    slices: tuple[int, ...] = (),
) -> Ring:
    """Finds the inner border in each image of a patient.

    The radius ρ(θ), as a share of the outer border's, maximises

    ``Σ_θ [ E Σ_{r<ρ(θ)} ℓ(θ, r) A(θ, r) / Ā − (ρ(θ) − m(θ))² / 2s² ] − Σ_θ (ρ(θ+1) − ρ(θ))² / 2t²``

    with ℓ the contrast (a log-likelihood ratio of inside against outside, clipped), A the area of a polar cell and Ā
    that of an average ray, E = ``EVIDENCE``, t = ``SMOOTHNESS``, and s the anatomy's. What is usual, m, is the
    anatomy's mean; the border is sought twice, the second time with m moved some way (``NEIGHBOURS``) to what was found
    in the neighbouring slices.

    Args:
        image: ``(B, M, H, W)``; any scale.
        mask: ``(B, 1, H, W)``.
        anatomy: the contrast and the usual radius.
        sequences: the names of the channels.
        spacing_mm: of H and W.
        slices: the position of each image along the stack, neighbours differ by 1; empty: none has neighbours.
    """
    weights = torch.tensor([anatomy.contrast.get(s, 0.0) for s in sequences]).to(image)
    contrast = (standardise(image, mask) * weights.reshape(-1, 1, 1)).sum(1).cpu().numpy()
    masks = mask[:, 0].cpu().numpy() > 0
    views = [_polar(c, m, np.array(spacing_mm)) for c, m in zip(contrast, masks, strict=True)]
    mean, sd = anatomy.radius
    first = [_border(v.evidence, np.full(ANGLES, mean), sd) for v in views]
    places = slices or tuple(2 * i for i in range(len(views)))
    borders = []
    for i, view in enumerate(views):
        beside = [first[j] - mean for j, at in enumerate(places) if abs(at - places[i]) == 1]
        if beside:
            moved = NEIGHBOURS * gaussian_filter1d(np.mean(beside, 0), ANGULAR_SD, mode="wrap")
            borders.append(_border(view.evidence, mean + moved, sd) * view.outer)
        else:
            borders.append(first[i] * view.outer)
    inside = [_within(v, b) & m for v, b, m in zip(views, borders, masks, strict=True)]
    return Ring(
        inside=torch.from_numpy(np.stack(inside))[:, None].to(mask),
        angle=np.stack([(v.turn * ANGLES).astype(np.int64) % ANGLES for v in views]),
        outer=np.stack([v.outer for v in views]),
        inner=np.stack(borders),
    )


def _border(evidence: Array, usual: Array, sd: float) -> Array:
    """The inner border's relative radius at each angle ``(ANGLES,)``."""
    ends = (np.arange(RADII) + 1) / RADII
    gain = EVIDENCE * evidence - ((ends - usual[:, None]) / sd) ** 2 / 2
    return ends[smoothest(gain, 1 / (2 * (SMOOTHNESS * RADII) ** 2))]


def _within(view: _Polar, border: Array) -> NDArray[np.bool_]:
    """What lies closer to the centre than a border given in mm ``(ANGLES,)``."""
    closed = np.interp(view.turn, np.arange(ANGLES + 1) / ANGLES, np.append(border, border[0]))
    inside: NDArray[np.bool_] = view.distance < closed
    return inside


def _polar(contrast: Array, mask: NDArray[np.bool_], spacing_mm: Array) -> _Polar:
    """One image around the centre of its mask."""
    grid = np.indices(mask.shape).astype(float)
    centre = np.array([axis[mask].mean() if mask.any() else axis.mean() for axis in grid])
    away = (grid - centre[:, None, None]) * spacing_mm[:, None, None]
    outer = _outer(mask, centre, spacing_mm)
    relative = (np.arange(RADII) + 0.5) / RADII
    points = centre[:, None, None] + _directions() / spacing_mm[:, None, None] * (outer[:, None] * relative)
    smooth = gaussian_filter(np.where(mask, contrast, 0), DENOISE_MM / spacing_mm)
    seen = map_coordinates(smooth, points, order=1, mode="nearest").clip(-CLIP, CLIP)
    # Outside the mask (a hole, an open ring) nothing is known.
    known = map_coordinates(mask.astype(float), points, order=1, mode="constant")
    area = relative * outer[:, None] ** 2
    evidence = np.cumsum(known * seen * area, 1) / max(area.sum() / ANGLES, 1e-9)
    turn = np.arctan2(away[1], away[0]) / (2 * np.pi) % 1
    return _Polar(np.hypot(*away), turn, outer, evidence)


def _directions() -> Array:
    """The unit vector of each angle ``(2, ANGLES, 1)``."""
    turns = 2 * np.pi * np.arange(ANGLES) / ANGLES
    return np.stack([np.cos(turns), np.sin(turns)])[..., None]


def _outer(mask: NDArray[np.bool_], centre: Array, spacing_mm: Array) -> Array:
    """How far the mask reaches at each angle, in mm, slightly smoothed."""
    step = spacing_mm.min() / 2
    lengths = np.arange(0.0, np.hypot(*(np.array(mask.shape) * spacing_mm)), step)
    points = centre[:, None, None] + _directions() / spacing_mm[:, None, None] * lengths
    found = map_coordinates(mask.astype(float), points, order=1, mode="constant") > 0.5
    farthest = np.where(found.any(1), len(lengths) - 1 - found[:, ::-1].argmax(1), 0)
    reach: Array = gaussian_filter1d(lengths[farthest] + step / 2, 1.0, mode="wrap")
    return reach


def smoothest(gain: Array, weight: float) -> NDArray[np.int64]:
    """The closed path through a table of gains that maximises ``Σ_a gain[a, p_a] − weight · Σ_a (p_{a+1} − p_a)²``.

    Dynamic programming along two turns, of which the middle one has nearly closed; then along one turn that begins
    and ends where that middle one began, so that it closes always.

    Args:
        gain: ``(A, R)``, cyclic in A.
        weight: of the squared steps; a step is at most ``MAX_STEP``.

    Returns:
        ``(A,)`` indices of R.
    """
    n_angles, half = len(gain), len(gain) // 2
    through = int(_best_path(np.concatenate([gain, gain]), weight)[half])
    turn = np.roll(gain, -half, axis=0)
    fixed = np.full(gain.shape[1], -np.inf)
    fixed[through] = 0
    turn = np.concatenate([turn[:1] + fixed, turn[1:], fixed[None]])
    return np.roll(_best_path(turn, weight)[:n_angles], half)


def _best_path(gain: Array, weight: float) -> NDArray[np.int64]:
    """The same for an open path."""
    n_radii = gain.shape[1]
    steps = np.arange(-MAX_STEP, MAX_STEP + 1)
    came_from = np.arange(n_radii) + steps[:, None]  # (steps, R)
    possible = (came_from >= 0) & (came_from < n_radii)
    cost = np.where(possible, weight * steps[:, None] ** 2, np.inf)
    source = came_from.clip(0, n_radii - 1)
    best, back = gain[0], []
    for row in gain[1:]:
        candidates = best[source] - cost
        choice = candidates.argmax(0)
        back.append(source[choice, np.arange(n_radii)])
        best = candidates[choice, np.arange(n_radii)] + row
    path = [int(best.argmax())]
    for previous in reversed(back):
        path.append(int(previous[path[-1]]))
    return np.array(path[::-1])
