"""Where tissues can be, from the mask's shape and the contrast inside it: a smooth inner border in every slice.

In a short-axis slice the mask's border is the epicardium. The endocardium is sought as a star-shaped contour around
the mask's centre: in polar coordinates it is one radius per angle, and dynamic programming finds the radii that best
separate the cavity from the wall, that change little from angle to angle, and that leave a wall of a usual thickness,
the patient's own as far as its slices agree on one. A smooth contour swallows papillary muscles and trabeculae, as
readers do.

On late enhancement scar is as bright as blood. What tells them apart is how much of the wall is bright at an angle: a
thin rim is blood that the border has left out, a broad one is scar. So the border is sought several times, each time
with the share of the wall that was bright at each angle as the chance that bright tissue is wall. And scar may be
brighter than blood: then what is nearer to the patient's own scar level is wall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import expit
from torch import Tensor

from monai_deepgmm.localisation.closed_path import smoothest
from monai_deepgmm.methods import blood_pool_scale, polar
from monai_deepgmm.methods.naming import standardise
from monai_deepgmm.methods.polar import ANGLES, ENDS, MIDDLES, RADII, PolarView
from monai_deepgmm.protocol import Anatomy

Array = NDArray[np.floating]

#: How many independent voxels the contrast of one ray through the wall is worth: neighbours repeat each other.
EVIDENCE = 10.0
#: The log-likelihood ratio that a single place can contribute at most; keeps a papillary muscle from having its way.
CLIP = 2.0
#: Standard deviation of the change of the relative radius from one angle to the next.
SMOOTHNESS = 0.027
#: How far the usual border is moved towards that of the neighbouring slices, smoothed over so many angles.
NEIGHBOURS, ANGULAR_SD = 0.25, 4.0
#: How far a patient's wall is as thick in each slice (1), and how far it is as large a share of the radius (0).
SAME_THICKNESS = 0.5
#: How often the border is sought; and from which time on the wall's bright share is taken from the last border.
ROUNDS, INFORMED = 5, 2

# Late enhancement, on the blood pool's scale.
#: Standard deviation of healthy wall around 0 and of blood around 1; of scar below its level, from where all is scar.
TISSUE_SD, SCAR_SD = 0.3, 0.35
#: The share of the cavity that is as dark as the wall: papillary muscles, trabeculae.
DARK_IN_CAVITY = 0.3
#: The bright share of the wall: before it is known, and its limits.
BRIGHT_IN_WALL, BRIGHT_LIMITS = 0.2, (0.03, 0.8)
#: What late enhancement counts beside the other sequences: its log-likelihood ratio is multiplied by this.
ENHANCEMENT_WEIGHT = 0.3
#: The quantile of the wall that stands for its healthy part, and the softness of "bright" around one half.
HEALTHY_QUANTILE, BRIGHT_SOFTNESS = 0.33, 0.12
#: Blood is looked at this far inside the border, and wall up to this share of the way to the outer one.
CAVITY_MARGIN, WALL_END = 0.03, 0.97


#: Polar cells are worked on in single precision.
SINGLE = np.float32


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


def rings(
    image: Tensor,
    mask: Tensor,
    anatomies: Sequence[Anatomy],
    sequences: tuple[str, ...],
    spacing_mm: tuple[float, ...],
    *,
    slices: tuple[int, ...] = (),
) -> list[Ring]:
    """Finds the inner border in each image of a patient, as each of some anatomies would have it.

    The radius ρ(θ), as a share of the outer border's, maximises

    ``Σ_θ [ E Σ_{r<ρ(θ)} ℓ(θ, r) A(θ, r) / Ā − (ρ(θ) − m(θ))² / 2s² ] − Σ_θ (ρ(θ+1) − ρ(θ))² / 2t²``

    with ℓ the contrast (a log-likelihood ratio of inside against outside, clipped), A the area of a polar cell and Ā
    that of an average ray, E = ``EVIDENCE``, t = ``SMOOTHNESS``, and s the anatomy's. It is sought ``ROUNDS`` times.
    What is usual, m, is at first the anatomy's mean; then the patient's own, the posterior mean

    ``m = (μ / τ² + Σ_i ρ̄_i / σ²) / (1 / τ² + n / σ²)``

    of n slices with mean radii ρ̄, τ and σ the anatomy's spread; moved some way (``NEIGHBOURS``) to what was found in
    the neighbouring slices. In a slice whose outer border has the radius R_i, 1 − m and 1 − ρ̄ count ``√(R̄ / R_i)``
    fold (``SAME_THICKNESS``): towards the apex the heart narrows sooner than its wall. The contrast of late
    enhancement is that of ``LateView``.

    Args:
        image: ``(B, M, H, W)``; any scale.
        mask: ``(B, 1, H, W)``.
        anatomies: alike but for the usual radius.
        sequences: the names of the channels.
        spacing_mm: of H and W.
        slices: the position of each image along the stack, neighbours differ by 1; empty: the images have nothing to
            do with each other.
    """
    anatomy = anatomies[0]
    views = [polar.view(m, np.array(spacing_mm)) for m in mask[:, 0].cpu().numpy() > 0]
    standard = standardise(image, mask).cpu().numpy().astype(SINGLE)
    weights = np.array([anatomy.contrast.get(s, 0.0) for s in sequences], dtype=SINGLE)
    plain = _sampled(views, np.tensordot(standard, weights, (1, 0)))
    late = anatomy.enhancement.sequence if anatomy.enhancement else None
    seen = LateView(_sampled(views, standard[:, sequences.index(late)]), views, slices) if late in sequences else None
    cells = np.stack([v.weight / v.ray for v in views]).astype(SINGLE)
    shape = (len(anatomies), len(views), ANGLES)
    means = np.array([a.radius[0] for a in anatomies])[:, None, None]
    thicker = _thicker(views, slices)
    usual = borders = np.broadcast_to(1 - (1 - means) * thicker, shape)
    shares, levels = np.full(shape, BRIGHT_IN_WALL), np.ones(shape[:2])
    for number in range(ROUNDS):
        contrast = plain
        if seen is not None:
            x = seen.on_scale(borders)
            if number >= INFORMED:
                shares, levels = seen.bright_share(x, borders), seen.scar_level(x, borders)
            contrast = plain + seen.contrast(x, shares, levels)
        gains = np.cumsum(contrast.clip(-CLIP, CLIP) * cells, -1)
        borders = _border(np.broadcast_to(gains, (*shape, RADII)), usual, anatomy.radius[1])
        usual = _usual(borders, means, anatomy.spread, slices, thicker)
    outer, angle = np.stack([v.outer for v in views]), np.stack([v.angle for v in views])
    inside = np.stack([v.within(b) for v, b in zip(views, borders.swapaxes(0, 1), strict=True)], 1)
    return [
        Ring(torch.from_numpy(i)[:, None].to(mask), angle, outer, found * outer)
        for i, found in zip(inside, borders, strict=True)
    ]


def _sampled(views: Sequence[PolarView], images: Array) -> Array:
    """Images ``(B, H, W)`` in polar cells ``(B, ANGLES, RADII)``."""
    return np.stack([v.sample(i) for v, i in zip(views, images, strict=True)]).astype(images.dtype)


def _border(gain: Array, usual: Array, sd: float) -> Array:
    """The inner border's relative radius at each angle ``(..., ANGLES)``."""
    penalty = (((ENDS - usual[..., None]) / sd) ** 2 / 2).astype(gain.dtype)
    return ENDS[smoothest(EVIDENCE * gain - penalty, 1 / (2 * (SMOOTHNESS * RADII) ** 2))]


def _thicker(views: Sequence[PolarView], slices: tuple[int, ...]) -> Array:
    """How much larger a share of the radius the wall is in each slice of a patient than on average ``(B, 1)``."""
    size = np.array([v.outer.mean() for v in views])[:, None]
    if not slices:
        return np.ones_like(size)
    more: Array = (size.mean() / np.maximum(size, 1e-9)) ** SAME_THICKNESS
    return more


def _usual(borders: Array, means: Array, spread: tuple[float, float], slices: tuple[int, ...], thicker: Array) -> Array:
    """The usual border of each image ``(V, B, ANGLES)`` after what was found in all of them.

    Args:
        borders: under each of V anatomies ``(V, B, ANGLES)``.
        means: those anatomies' usual radius ``(V, 1, 1)``.
        spread: of the usual radius between patients and within one.
        slices: the position of each image along the stack.
        thicker: from ``_thicker`` ``(B, 1)``.
    """
    if not slices:
        return np.broadcast_to(means, borders.shape)
    between, within = spread
    own = 1 - (1 - borders.mean(2, keepdims=True)) / thicker  # (V, B, 1)
    total = own.sum(1, keepdims=True) / within**2
    found = (means / between**2 + total) / (1 / between**2 + len(slices) / within**2)
    expected = 1 - (1 - found) * thicker  # (V, B, 1)
    usual = np.repeat(expected, ANGLES, 2)
    for i in range(len(slices)):
        if near := blood_pool_scale.beside(slices, i):
            moved = (borders[:, near] - expected[:, near]).mean(1)
            usual[:, i] += NEIGHBOURS * gaussian_filter1d(moved, ANGULAR_SD, mode="wrap")
    return usual


class LateView:
    """Late enhancement in polar cells, and what it says for borders of the wall.

    Args:
        image: ``(B, ANGLES, RADII)``.
        views: of the B images.
        slices: their positions along the stack; empty: they are not one patient's.
    """

    def __init__(self, image: Array, views: Sequence[PolarView], slices: tuple[int, ...]) -> None:
        self.image, self.slices = image, slices
        self.weights = np.stack([v.weight for v in views]).astype(SINGLE)
        # A cell that the mask only touches holds what lies outside.
        full = np.where(self.weights > self.weights.max((1, 2), keepdims=True) * 1e-3, self.weights, 0)
        self.sorted = blood_pool_scale.Sorted.of(image.reshape(len(image), -1), full.reshape(len(image), -1))

    def on_scale(self, borders: Array) -> Array:
        """The image on the blood pool's scale by borders ``(V, B, ANGLES)``; NaN where blood is not bright."""
        cavity = borders[..., None] - CAVITY_MARGIN > MIDDLES
        wall = (borders[..., None] < MIDDLES) & (MIDDLES < WALL_END)
        healthy, blood = (
            self.sorted.quantile(place.reshape(*place.shape[:-2], -1), share)
            for place, share in ((wall, HEALTHY_QUANTILE), (cavity, 0.5))
        )
        found = [
            blood_pool_scale.scale(dark, bright, pooled=bool(self.slices))
            for dark, bright in zip(healthy, blood, strict=True)
        ]
        return np.stack([np.full_like(self.image, np.nan) if scale is None else scale(self.image) for scale in found])

    def contrast(self, x: Array, shares: Array, levels: Array) -> Array:
        """The log-likelihood ratio of cavity against wall ``(V, B, ANGLES, RADII)``.

        ``log [(1 − d) N(x | 1, s) + d N(x | 0, s)] − log [(1 − b(θ)) N(x | 0, s) + b(θ) N(min(x, m) | m, S)]`` with
        d = ``DARK_IN_CAVITY``, b the bright share of the wall, m the scar's level, s = ``TISSUE_SD``, S = ``SCAR_SD``:
        where scar is brighter than blood, the border lies about half-way between the two, and not where blood's own
        scatter ends; where it is not, bright tissue is told from blood by its share alone.

        Args:
            x: the image on the blood pool's scale ``(V, B, ANGLES, RADII)``.
            shares: b ``(V, B, ANGLES)``.
            levels: m ``(V, B)``.
        """
        m = levels[..., None, None].astype(x.dtype)
        dark, bright = _normal(x, 0, TISSUE_SD), _normal(x, 1, TISSUE_SD)
        scar = _normal(np.minimum(x, m), m, SCAR_SD)
        b = shares[..., None].astype(x.dtype)
        cavity, wall = (1 - DARK_IN_CAVITY) * bright + DARK_IN_CAVITY * dark, (1 - b) * dark + b * scar
        ratio: Array = ENHANCEMENT_WEIGHT * np.log((cavity + 1e-3) / (wall + 1e-3))
        return np.where(np.isnan(ratio), 0.0, ratio)  # a slice without a scale of its own says nothing

    def scar_level(self, x: Array, borders: Array) -> Array:
        """How bright the wall's scar is in each image ``(V, B)``, one level for a stack; no less than blood's, 1.

        Args:
            x: the image on the blood pool's scale ``(V, B, ANGLES, RADII)``.
            borders: the last ones ``(V, B, ANGLES)``.
        """
        wall = (borders[..., None] < MIDDLES) & (MIDDLES < WALL_END) & (self.weights > 0) & ~np.isnan(x)
        found = np.ones(x.shape[:2])
        images = [slice(None)] if self.slices else range(x.shape[1])
        for levels, values, places in zip(found, x, wall, strict=True):
            for i in images:
                if (bright := values[i][places[i]]).size:
                    levels[i] = max(blood_pool_scale.scar_level(bright), 1)
        return found

    def bright_share(self, x: Array, borders: Array) -> Array:
        """The share of the wall that is bright at each angle, here and in the neighbouring slices ``(V, B, ANGLES)``.

        Args:
            x: the image on the blood pool's scale ``(V, B, ANGLES, RADII)``.
            borders: the last ones ``(V, B, ANGLES)``.
        """
        weights = self.weights * (borders[..., None] < MIDDLES)
        bright = np.where(np.isnan(x), BRIGHT_IN_WALL, expit((x - 0.5) / BRIGHT_SOFTNESS))
        share = (weights * bright).sum(-1) / np.maximum(weights.sum(-1), 1e-9)
        smooth = gaussian_filter1d(share, ANGULAR_SD, axis=-1, mode="wrap")
        found = smooth.copy()
        for i in range(len(self.slices)):
            if near := blood_pool_scale.beside(self.slices, i):
                found[:, i] = (smooth[:, i] + smooth[:, near].mean(1)) / 2
        limited: Array = found.clip(*BRIGHT_LIMITS)
        unknown = np.isnan(x).reshape(len(x), -1).all(1)
        limited[unknown] = BRIGHT_IN_WALL
        return limited


def _normal(x: Array, mean: float | Array, sd: float) -> Array:
    """A normal density without its constant factor."""
    density: Array = np.exp(-(((x - mean) / sd) ** 2) / 2) / sd
    return density
