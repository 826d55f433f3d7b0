"""What late enhancement shows in the wall: how bright it is on the blood pool's scale, and what that is evidence of.

Three things are told apart. How much of a voxel is scar: where healthy wall is 0 and the patient's own scar level is 1,
a voxel's brightness is its share of scar (expectation-weighted, JCMR 18:27, instead of a cut at so many standard
deviations). Whether a place shines more than noise makes it: a local log-likelihood ratio. And whether the patient has
scar at all, which the wall as a whole tells.

An infarct begins at the endocardium and grows outwards, so that the wall's outer third tells nothing by itself: what is
bright there alone is fat, or the right ventricle. A voxel at one of the wall's borders is partly blood, fat or lung; it
counts for less the closer it lies to one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from monai_deepgmm.methods import blood_pool_scale
from monai_deepgmm.methods.blood_pool_scale import Scale, beside

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: A voxel counts fully when it lies so far from both borders, in mm; one at a border counts this little.
RIM_MM, RIM_WEIGHT = 3.0, 0.05
#: The neighbourhoods over which brightness and evidence are averaged: a Gaussian's standard deviation, in mm.
BRIGHTNESS_MM, EVIDENCE_MM = 1.4, 3.0
#: How much of a place's evidence lies in the neighbouring slices.
NEIGHBOURS = 0.5
#: The faintest enhancement that counts as scar, on the blood pool's scale.
FAINT = 0.6
#: The share of the wall, its darkest, that is healthy before anything is known; its median is looked for so often.
HEALTHY_QUANTILE, ROUNDS = 0.33, 5
#: Voxels that a wall, its healthy part or a blood pool needs to show a level.
MIN_WALL, MIN_HEALTHY, MIN_BLOOD = 20, 10, 10
#: The healthy part is at least this share of the wall.
MIN_HEALTHY_SHARE = 0.15
#: The blood's standard deviation is the distance from its median to this quantile: papillary muscles lie below it.
NOISE_QUANTILE = 0.84
#: Scar's own level is this quantile of what is brighter than half of it, drawn to the blood pool's as if this share of
#: the wall had shown it; half of it is at least this bright.
SCAR_QUANTILE, SCAR_PRIOR, LEAST_HALF = 0.75, 0.1, 0.3
#: Infarcts begin at the endocardium (Reimer and Jennings' wave front): so much of the wall's depth holds one that is
#: there. What lies beyond may be fat, or the right ventricle's blood.
INNER_DEPTH = 2 / 3
#: The share of the inner wall that must show evidence.
SHARE_WITH_EVIDENCE = 0.05
#: Otsu's share of the variance between two classes is this for a single Gaussian; more means that there are two.
ONE_CLASS = 2 / np.pi
#: What counts as a voxel of the wall's core when classes are counted.
CORE_WEIGHT = 0.5


class Enhancement(NamedTuple):
    """What late enhancement shows in B slices of a patient.

    Attributes:
        fraction: of each voxel that is scar, 0 to 1 ``(B, H, W)``; 0 outside the wall.
        evidence: the local log-likelihood ratio of faint scar against none ``(B, H, W)``; −∞ outside the wall.
        inner: the wall's inner two thirds ``(B, H, W)``.
        level: how bright the patient's scar is on the blood pool's scale.
        found: the log-likelihood ratio that a twentieth of the inner wall exceeds.
        separation: Otsu's share of the variance between two classes of the wall's brightness, 0 to 1.
        present: whether the patient has scar.
    """

    fraction: Array
    evidence: Array
    inner: Mask
    level: float
    found: float
    separation: float
    present: bool


def measure(
    image: Array,
    mask: Mask,
    inside: Mask,
    spacing_mm: tuple[float, ...],
    *,
    slices: tuple[int, ...],
    threshold: float,
) -> Enhancement | None:
    """Measures the wall of one patient.

    A voxel's evidence is ``ℓ = δ (x − δ/2) / σ²``: x its brightness on the blood pool's scale, δ = ``FAINT``, σ the
    blood's standard deviation on that scale. A patient has scar when ℓ, averaged locally with the wall's median as its
    healthy level, exceeds the threshold in a twentieth of the inner wall, or when that one's brightness falls into two
    classes: no single Gaussian has more than 2/π of its variance between two, and classes closer than δ/2 are noise.

    Args:
        image: late enhancement ``(B, H, W)``; any scale, but one for all slices or each its own.
        mask: ``(B, H, W)``.
        inside: what lies within the inner border ``(B, H, W)``.
        spacing_mm: of H and W.
        slices: the position of each along the stack.
        threshold: of the patient's evidence.

    Returns:
        What was found; None where blood is not brighter than the wall, so that nothing can be said.
    """
    wall, spacing = mask & ~inside, np.asarray(spacing_mm, dtype=float)
    weights, inner = _rim(mask, inside, spacing)
    blood, noise = _blood(image, inside)
    quantiles = [_level(i, w, 0.5) for i, w in zip(image, wall, strict=True)]
    cautious = blood_pool_scale.scale(np.array(quantiles), blood)
    smooth = Neighbourhood.of(image, weights, BRIGHTNESS_MM, spacing).mean()
    scale = _healthy_scale(image, smooth, wall, blood)
    if scale is None or np.isnan(noise).all():
        return None
    noise = (noise + np.nanmedian(noise)) / 2
    noise = np.where(np.isnan(noise), np.nanmedian(noise), noise)
    brightness = scale(smooth)
    level = _scar_level(brightness[wall])
    around = Neighbourhood.of(image, weights, EVIDENCE_MM, spacing)
    # Where half of the wall is as bright as blood, its median is not healthy.
    local = _evidence(around, cautious or scale, noise, slices)
    found = float(np.quantile(local[inner if inner.any() else wall], 1 - SHARE_WITH_EVIDENCE))
    separation, apart = _separation(brightness[(weights > CORE_WEIGHT) & inner])
    evidence = _evidence(around, scale, noise, slices)
    return Enhancement(
        fraction=np.where(wall, (brightness / level).clip(0, 1), 0),
        evidence=np.where(wall, evidence, -np.inf),
        inner=inner,
        level=level,
        found=found,
        separation=separation,
        present=found >= threshold or (separation > ONE_CLASS and apart >= FAINT / 2),
    )


class Neighbourhood(NamedTuple):
    """What images hold around each voxel; a scale is linear, so that this serves for all of them.

    Attributes:
        total: ``G ∗ (w x)`` with a Gaussian G ``(B, H, W)``.
        weight: ``G ∗ w``.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, images: Array, weights: Array, sigma_mm: float, spacing: Array) -> Neighbourhood:
        """That of images and weights ``(B, H, W)``."""
        known = np.where(weights > 0, images, 0)
        return cls(*(_blur(values, sigma_mm, spacing) for values in (known * weights, weights)))

    def mean(self) -> Array:
        """The weighted local mean ``(B, H, W)``."""
        mean: Array = self.total / np.maximum(self.weight, 1e-6)
        return mean


def _rim(mask: Mask, inside: Mask, spacing: Array) -> tuple[Array, Mask]:
    """What each voxel counts, less towards the borders of the wall, 0 outside it; and the inner wall ``(B, H, W)``."""
    half = spacing.min() / 2  # from a voxel's centre to its border
    wall = mask & ~inside
    weights, inner = wall.astype(float), wall.copy()
    for one, within, whole, cavity in zip(weights, inner, mask, inside, strict=True):
        outwards, inwards = (_depth(place, spacing) - half for place in (whole, ~cavity))
        for depth in (outwards, inwards):
            one *= (depth / RIM_MM).clip(RIM_WEIGHT, 1)
        if cavity.any():
            within &= (1 - INNER_DEPTH) * inwards < INNER_DEPTH * outwards
    return weights, inner


def _depth(place: Mask, spacing: Array) -> Array:
    """How far each voxel lies from the outside of a place ``(H, W)``, in mm; no end where there is none."""
    if place.all():
        return np.full(place.shape, np.inf)
    depth: Array = distance_transform_edt(place, sampling=spacing)
    return depth


def _blood(image: Array, inside: Mask) -> tuple[Array, Array]:
    """The blood pool's median and standard deviation in each slice ``(B,)``; NaN where there is too little of it."""
    levels = [_level(i, p, 0.5, MIN_BLOOD) for i, p in zip(image, inside, strict=True)]
    upper = [_level(i, p, NOISE_QUANTILE, MIN_BLOOD) for i, p in zip(image, inside, strict=True)]
    return np.array(levels), np.array(upper) - np.array(levels)


def _level(image: Array, place: Mask, share: float, least: int = MIN_WALL) -> float:
    """A quantile of what lies in a place ``(H, W)``; NaN where there is too little of it."""
    return float(np.quantile(image[place], share)) if place.sum() > least else float("nan")


def _healthy_scale(image: Array, smooth: Array, wall: Mask, blood: Array) -> Scale | None:
    """The scale whose 0 is the median of what is darker than half of the blood pool, slice by slice."""
    levels = np.array([_level(i, w, HEALTHY_QUANTILE) for i, w in zip(image, wall, strict=True)])
    found = blood_pool_scale.scale(levels, blood)
    for _ in range(ROUNDS):
        if found is None:
            break
        dark = wall & (found(smooth) < 0.5)
        for i, (healthy, whole) in enumerate(zip(dark.sum((1, 2)), wall.sum((1, 2)), strict=True)):
            if whole > MIN_WALL and healthy > max(MIN_HEALTHY_SHARE * whole, MIN_HEALTHY):
                levels[i] = np.median(image[i][dark[i]])
        found = blood_pool_scale.scale(levels, blood)
    return found


def _blur(images: Array, sigma_mm: float, spacing: Array) -> Array:
    """Each of B images ``(B, H, W)`` convolved with a Gaussian."""
    return np.stack([gaussian_filter(i, sigma_mm / spacing) for i in images])


def _evidence(around: Neighbourhood, scale: Scale, noise: Array, slices: tuple[int, ...]) -> Array:
    """ℓ averaged over the neighbourhood, in the neighbouring slices too; less where there is little to average.

    ``√N ∑ w ℓ / N`` with ``N = ∑ w``, sums over a Gaussian neighbourhood; w are the weights.
    """
    wall, unit, noise = (v[:, None, None] for v in (scale.wall, scale.unit, np.maximum(noise, 1e-9)))
    bright, count = (around.total - wall * around.weight) / unit, around.weight
    total = FAINT * (bright - FAINT / 2 * count) / (noise / unit) ** 2
    near = [beside(slices, i) for i in range(len(count))]
    total, count = (
        np.stack([(1 - NEIGHBOURS) * v[i] + NEIGHBOURS * v[j].mean(0) if j else v[i] for i, j in enumerate(near)])
        for v in (total, count)
    )
    evidence: Array = total / np.sqrt(np.maximum(count, 1e-9))
    return evidence


def _scar_level(brightness: Array) -> float:
    """How bright the wall's scar is ``(N,)``, of the wall's brightness on the blood pool's scale.

    ``m = (κ + s q) / (κ + s)``: q the quantile of what is brighter than m / 2, s its share of the wall, κ the prior.
    """
    level = 1.0
    for _ in range(ROUNDS):
        bright = brightness[brightness > level / 2]
        share = len(bright) / len(brightness)
        own = float(np.quantile(bright, SCAR_QUANTILE)) if len(bright) else 1.0
        level = max((SCAR_PRIOR + share * own) / (SCAR_PRIOR + share), 2 * LEAST_HALF)
    return level


def _separation(values: Array) -> tuple[float, float]:
    """Otsu's criterion: the largest share of the variance of values ``(N,)`` that lies between two classes.

    Returns:
        That share, and how far the means of these classes are apart.
    """
    ordered = np.sort(values)
    n = len(ordered)
    if n < 2 or not (variance := float(ordered.var())) > 0:
        return 0.0, 0.0
    count, sums = np.arange(1, n), np.cumsum(ordered)
    apart = (sums[-1] - sums[:-1]) / (n - count) - sums[:-1] / count
    between = count / n * (1 - count / n) * apart**2
    best = int(between.argmax())
    return float(between[best]) / variance, float(apart[best])
