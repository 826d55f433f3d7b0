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

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from monai_deepgmm.methods import blood_pool_scale
from monai_deepgmm.methods.blood_pool_scale import Scale, beside
from monai_deepgmm.methods.border_distance import border_distance

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

#: A voxel counts fully when it lies so far from both borders, in mm; one at a border counts this little.
RIM_MM, RIM_WEIGHT = 3.0, 0.05
#: The neighbourhoods over which brightness is averaged for levels and classes, for a voxel's share of scar, which is to
#: follow its border, and over which evidence is: a Gaussian's standard deviation, in mm.
BRIGHTNESS_MM, FRACTION_MM, EVIDENCE_MM = 1.4, 1.1, 3.0
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
#: Infarcts begin at the endocardium (Reimer and Jennings' wave front): so much of the wall's depth holds one that is
#: there, up to so many mm. What lies beyond may be fat, or the right ventricle's blood.
INNER_DEPTH, INNER_MM = 2 / 3, 12.0
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
    insides: Sequence[Mask],
    spacing_mm: tuple[float, ...],
    *,
    slices: tuple[int, ...],
    threshold: float,
) -> list[Enhancement | None]:
    """Measures the wall of one patient, for each of some inner borders.

    A voxel's evidence is ``ℓ = δ (x − δ/2) / σ²``: x its brightness on the blood pool's scale, δ = ``FAINT``, σ the
    blood's standard deviation on that scale. A patient has scar when ℓ, averaged locally with the wall's median as its
    healthy level, exceeds the threshold in a twentieth of the inner wall, or when that one's brightness falls into two
    classes: no single Gaussian has more than 2/π of its variance between two, and classes closer than δ/2 are noise.

    Args:
        image: late enhancement ``(B, H, W)``; any scale, but one for all slices or each its own.
        mask: ``(B, H, W)``.
        insides: what lies within each inner border ``(B, H, W)``.
        spacing_mm: of H and W.
        slices: the position of each along the stack.
        threshold: of the patient's evidence.

    Returns:
        What was found with each border; None where blood is not brighter than the wall, so that nothing can be said.
    """
    spacing, cavities = np.asarray(spacing_mm, dtype=float), np.stack(insides)
    weights, inner = _rim(mask, cavities, spacing)
    smooth, fine = (Neighbourhood.of(image, weights, mm, spacing).mean() for mm in (BRIGHTNESS_MM, FRACTION_MM))
    around = Neighbourhood.of(image, weights, EVIDENCE_MM, spacing)
    each = zip(cavities, inner, weights, smooth, fine, *around, strict=True)
    stack = _Stack(image, mask, slices, threshold)
    return [_measured(stack, inside, i, w, (s, f), Neighbourhood(*near)) for inside, i, w, s, f, *near in each]


class _Stack(NamedTuple):
    """Late enhancement of a patient ``(B, H, W)``, the mask, where the slices lie, and the evidence that is needed."""

    image: Array
    mask: Mask
    slices: tuple[int, ...]
    threshold: float


def _measured(
    stack: _Stack, inside: Mask, inner: Mask, weights: Array, means: tuple[Array, Array], around: Neighbourhood
) -> Enhancement | None:
    """What one inner border shows, all ``(B, H, W)``: see ``measure``."""
    image, slices = stack.image, stack.slices
    smooth, fine = means
    wall = stack.mask & ~inside
    healthy, middle = _levels(image, wall, (HEALTHY_QUANTILE, 0.5))
    blood, upper = _levels(image, inside, (0.5, NOISE_QUANTILE), MIN_BLOOD)
    noise = upper - blood
    cautious = blood_pool_scale.scale(middle, blood)
    scale = _healthy_scale(image, smooth, wall, healthy, blood)
    if scale is None or np.isnan(noise).all():
        return None
    noise = (noise + blood_pool_scale.median(noise)) / 2
    noise = np.where(np.isnan(noise), blood_pool_scale.median(noise), noise)
    brightness = scale(smooth)
    level = blood_pool_scale.scar_level(brightness[wall])
    # Where half of the wall is as bright as blood, its median is not healthy.
    local, evidence = _evidence(around, (cautious or scale, scale), noise, slices)
    found = float(quantiles(local[inner if inner.any() else wall], (1 - SHARE_WITH_EVIDENCE,))[0])
    separation, apart = _separation(brightness[(weights > CORE_WEIGHT) & inner])
    return Enhancement(
        fraction=np.where(wall, (scale(fine) / level).clip(0, 1), 0),
        evidence=np.where(wall, evidence, -np.inf),
        inner=inner,
        level=level,
        found=found,
        separation=separation,
        present=found >= stack.threshold or (separation > ONE_CLASS and apart >= FAINT / 2),
    )


class Neighbourhood(NamedTuple):
    """What images hold around each voxel; a scale is linear, so that this serves for all of them.

    Attributes:
        total: ``G ∗ (w x)`` with a Gaussian G ``(..., B, H, W)``.
        weight: ``G ∗ w``.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, images: Array, weights: Array, sigma_mm: float, spacing: Array) -> Neighbourhood:
        """That of images ``(B, H, W)`` and weights ``(..., B, H, W)``."""
        known = np.where(weights > 0, images, 0)
        return cls(*(_blur(values, sigma_mm, spacing) for values in (known * weights, weights)))

    def mean(self) -> Array:
        """The weighted local mean ``(..., B, H, W)``."""
        mean: Array = self.total / np.maximum(self.weight, 1e-6)
        return mean


def _rim(mask: Mask, insides: Mask, spacing: Array) -> tuple[Array, Mask]:
    """What each voxel counts, less towards the borders of the wall, 0 outside it; and the inner wall ``(V, B, H, W)``.

    Args:
        mask: ``(B, H, W)``.
        insides: what lies within each of V inner borders ``(V, B, H, W)``.
        spacing: of H and W.
    """
    half = float(spacing.min()) / 2  # from a voxel's centre to its border
    wall = mask & ~insides
    # The nearest voxel outside of a mask lies beside it: no more than its box and what is around it is looked at.
    held = [np.flatnonzero(mask.any((0, other))) for other in (2, 1)]
    rows, columns = (slice(max(at[0] - 1, 0), at[-1] + 2) if len(at) else slice(None) for at in held)
    outwards, inwards = np.full(mask.shape, -half, np.float32), np.full(insides.shape, -half, np.float32)
    for depth, place in ((outwards, mask), (inwards, ~insides)):
        depth[..., rows, columns] = border_distance(place[..., rows, columns], INNER_MM + half, spacing) - half
    outer, inner = ((depth / RIM_MM).clip(RIM_WEIGHT, 1) for depth in (outwards, inwards))
    weights: Array = outer * inner * wall
    open_ended = ~insides.any((2, 3), keepdims=True)  # a slice without a cavity has no inner side
    return weights, wall & (open_ended | ((1 - INNER_DEPTH) * inwards < INNER_DEPTH * outwards))


def quantiles(values: Array, shares: tuple[float, ...]) -> list[float]:
    """Quantiles of values ``(N,)``, as numpy's, which takes several times as long for a slice's."""
    places = [share * (len(values) - 1) for share in shares]
    lower = [int(place) for place in places]
    upper = [min(at + 1, len(values) - 1) for at in lower]
    ordered = np.partition(values, sorted({*lower, *upper}))
    return [
        float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
        for place, low, high in zip(places, lower, upper, strict=True)
    ]


def _levels(image: Array, place: Mask, shares: tuple[float, ...], least: int = MIN_WALL) -> Array:
    """Quantiles of what lies in a place in each slice ``(S, B)``; NaN where there is too little of it."""
    unknown = [float("nan")] * len(shares)
    found = [values[inside] for values, inside in zip(image, place, strict=True)]
    return np.array([quantiles(v, shares) if len(v) > least else unknown for v in found]).T


def _healthy_scale(image: Array, smooth: Array, wall: Mask, levels: Array, blood: Array) -> Scale | None:
    """The scale whose 0 is the median of what is darker than half of the blood pool, slice by slice.

    Args:
        image: ``(B, H, W)``.
        smooth: its local mean.
        wall: where the wall is.
        levels: where the wall's healthy part is taken to lie first ``(B,)``.
        blood: the blood pool's level ``(B,)``.
    """
    found, levels = blood_pool_scale.scale(levels, blood), levels.copy()
    walls = [(values[inside], local[inside]) for values, local, inside in zip(image, smooth, wall, strict=True)]
    for _ in range(ROUNDS):
        if found is None:
            break
        last = levels.copy()
        for i, ((values, local), limit) in enumerate(zip(walls, found.wall + found.unit / 2, strict=True)):
            dark = values[local < limit]
            if len(values) > MIN_WALL and len(dark) > max(MIN_HEALTHY_SHARE * len(values), MIN_HEALTHY):
                levels[i] = quantiles(dark, (0.5,))[0]
        if np.array_equal(last, levels, equal_nan=True):
            break
        found = blood_pool_scale.scale(levels, blood)
    return found


def _blur(images: Array, sigma_mm: float, spacing: Array) -> Array:
    """Images ``(..., H, W)`` convolved with a Gaussian, as scipy does it, but by a matrix for each axis."""
    rows, columns = (
        gaussian_filter1d(np.eye(n, dtype=images.dtype), sigma_mm / s, axis=0)
        for n, s in zip(images.shape[-2:], spacing, strict=True)
    )
    # By torch, which keeps to one thread where the patient has to.
    whole, first, second = (torch.from_numpy(np.ascontiguousarray(part)) for part in (images, rows, columns.T))
    blurred: Array = (first @ (whole @ second)).numpy()
    return blurred


def _evidence(
    around: Neighbourhood, scales: tuple[Scale, ...], noise: Array, slices: tuple[int, ...]
) -> tuple[Array, ...]:
    """ℓ averaged over the neighbourhood, in the neighbouring slices too; less where there is little to average.

    ``√N ∑ w ℓ / N`` with ``N = ∑ w``, sums over a Gaussian neighbourhood; w are the weights. One for each scale.
    """
    shares = np.eye(len(slices))  # of each slice in what is known of each
    for i in range(len(slices)):
        if near := beside(slices, i):
            shares[i] *= 1 - NEIGHBOURS
            shares[i, near] = NEIGHBOURS / len(near)
    total, weight = (values.reshape(len(slices), -1) for values in around)
    root = np.sqrt(np.maximum(shares.astype(weight.dtype) @ weight, 1e-9))
    found = []
    for scale in scales:
        factor = FAINT * scale.unit / np.maximum(noise, 1e-9) ** 2
        offset = factor * (scale.wall + scale.unit * FAINT / 2)
        bright = (shares * factor).astype(total.dtype) @ total - (shares * offset).astype(total.dtype) @ weight
        found.append((bright / root).reshape(around.total.shape))
    return tuple(found)


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
