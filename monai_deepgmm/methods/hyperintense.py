"""Tissues that are no part of a mixture, but too bright for all of it: lesions of the white matter on FLAIR.

A healthy brain has none and a sick one may have a hundredth of its volume, so that no component of a mixture would stay
with them. They are found when the healthy tissues are known, as regions: somewhere far brighter than the brightest
healthy tissue; as far as half the height above what lies around them, which is where a blurred border lies; and amid
white matter, since bright cortex is not (Schmidt et al. 2012 grow lesions from such seeds). Cortex may be as bright on
FLAIR as lesions are, but is less so on T2, so that both tell more; not beside fluid, which is brighter still on T2.
Healthy tissue is brighter in some places than in others (the brain stem, shading): by how much is taken off first.
Where there is no cortex nearby, a small region may be less bright.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, find_objects, gaussian_filter, generate_binary_structure, label
from torch import Tensor

from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit, likeliest
from monai_deepgmm.mixture.spread import NORMAL_MAD
from monai_deepgmm.protocol import Hyperintense, Tissue

#: Noise is smoothed by so many of the smallest voxel's sides (standard deviation).
SMOOTHING = 0.7
#: A region has at least so many seeds, grows by so many voxels at most, and is surrounded by so many.
LEAST_VOXELS, GROWTH, SHELL = 3, 8, 2
#: What lies from so many voxels beyond it to so many says how bright its surroundings are; so often is that asked,
#: since the region grows less for it; of fewer voxels nothing is asked.
RING, ROUNDS, RING_VOXELS = (2, 4), 2, 10
#: A region and its ring lie so close to the seeds, in voxels.
MARGIN = GROWTH + RING[1] + SHELL
#: The neighbourhood that may be white matter alone (a Gaussian's standard deviation, in mm): there, a seed and the
#: border are lower by this share of how far white matter lies below the reference, but a seed is no lower than a border
#: amid the reference.
AMID_MM, LOWER = 3.0, 0.4
#: Only a small region may lack brighter seeds (a ball of 3 mm): what its voxels share with white matter dims it.
SMALL_MM3 = 113.0
#: The surrounding tissue is at least this share of all that surrounds a region, fluid included.
LEAST_INSIDE = 0.45
#: The neighbourhood whose healthy tissue says what is usual there: a Gaussian's standard deviation, in mm. What is
#: healthy lies within so many standard deviations of that tissue, and so many voxels away from what is too bright.
LOCAL_MM, USUAL, APART = 4.0, 2.0, 2
#: Where the neighbourhood holds less of it than this share, nothing is known of the place.
FAR = 1e-3
#: A tissue of fewer voxels tells nothing of what is too bright.
ENOUGH = 100
#: By how much more a further sequence may count than the first: fluid is bright on T2, and no lesion.
MOST_AHEAD = 1.0
#: The same so near to any other tissue, in mm, such as fluid.
BESIDE_MM, AHEAD_BESIDE = 2.2, 0.5

Bools = NDArray[np.bool_]
Singles = NDArray[np.float32]


def without(images: Images) -> Images:
    """The images with the components of the mixture alone; where these are expected need not sum to 1 any more."""
    kept = [k for k, tissue in enumerate(images.tissues) if tissue.hyperintense is None]
    if len(kept) == len(images.tissues):
        return images
    # The first ones are a view: a head is not worth copying.
    first = kept == list(range(len(kept)))
    expected = images.expected[:, : len(kept)] if first else images.expected[:, kept]
    return images._replace(tissues=tuple(images.tissues[k] for k in kept), expected=expected)


def added(fit: Fit, images: Images) -> Fit:
    """The fit of the components, with the other tissues found.

    Args:
        fit: of ``without(images)``.
        images: with all tissues.

    Returns:
        Responsibilities ``(B, K, *S)`` of all K tissues: a region's voxels are wholly its own. Its mean and covariance
        are those of these voxels (of the tissue around it where there are none).
    """
    for k, tissue in enumerate(images.tissues):
        rule = tissue.hyperintense
        if rule is None:
            continue
        known = [t for t in images.tissues[:k] if t.hyperintense is None or k > images.tissues.index(t)]
        regions = torch.stack([_regions(fit.resp[b], b, images, known, rule) for b in range(len(fit.resp))])
        fit = _inserted(fit, k, regions.to(fit.resp), images, known.index(_named(known, rule.inside)))
    return fit


def _named(tissues: list[Tissue], name: str) -> Tissue:
    return next(t for t in tissues if t.name == name)


class _Places(NamedTuple):
    """Where the healthy tissues of one image are, each ``(*S)``.

    Attributes:
        around: the tissue that a region lies in.
        reference: the tissue that it is brighter than.
        other: any other.
    """

    around: Bools
    reference: Bools
    other: Bools

    def within(self, box: tuple[slice, ...]) -> _Places:
        """The same in a box."""
        return _Places(*(where[box] for where in self))


def _regions(resp: Tensor, index: int, images: Images, known: list[Tissue], rule: Hyperintense) -> Tensor:
    """Where one image has regions of the tissue ``(1, *S)``, as 0 and 1."""
    mask = images.mask[index, 0].cpu().numpy() > 0
    seen = mask & _measured(images, index, rule.sequence)
    labels = likeliest(resp[None])[0].cpu().numpy()
    names = [t.name for t in known]
    around, reference = (labels == names.index(name) for name in (rule.inside, rule.brighter_than))
    places = _Places(seen & around, seen & reference, mask & ~around & ~reference)
    out = np.zeros_like(mask)
    if min(places.reference.sum(), places.around.sum()) >= ENOUGH:
        height = _heights(images, index, rule, mask, places)
        height = _locally(height, places.around, rule.least, images.spacing_mm)
        middle, spread = _robust(height[places.reference])
        height = np.where(mask, (height - middle) / spread, -np.inf)
        out = _grown(height, places, rule, images.spacing_mm)
    return torch.from_numpy(out)[None]


def _heights(images: Images, index: int, rule: Hyperintense, mask: Bools, places: _Places) -> Singles:
    """Brightness above the reference, in its robust standard deviations, on average over sequences ``(*S)``."""

    def scaled(values: Singles, where: Bools) -> Singles:
        middle, spread = _robust(values[where])
        return (values - middle) / spread

    def height(sequence: str, where: Bools) -> Singles:
        # What is too bright for any tissue counts as bright, though the fit left it out.
        image = images.image[index, images.sequences.index(sequence)].cpu().numpy()
        return scaled(_smoothed(image, mask, images.spacing_mm), where)

    reference = places.reference
    first = height(rule.sequence, reference)
    further = [s for s in rule.also if s in images.sequences]
    if not further:
        return first
    ahead = np.where(_near(places.other, images.spacing_mm), AHEAD_BESIDE, MOST_AHEAD).astype(np.float32)
    total, count = first.copy(), np.ones_like(first)
    for sequence in further:
        seen = _measured(images, index, sequence)
        if (both := reference & seen).sum() >= ENOUGH:
            total += np.where(seen, np.minimum(height(sequence, both), first + ahead), 0)
            count += seen
    return scaled(total / count, reference)


def _near(where: Bools, spacing_mm: tuple[float, ...]) -> Bools:
    """What lies within ``BESIDE_MM`` of some voxels ``(*S)``."""
    reach = [int(BESIDE_MM // s) for s in spacing_mm]
    axes = np.meshgrid(*(np.arange(-n, n + 1) * s for n, s in zip(reach, spacing_mm, strict=True)), indexing="ij")
    ball = sum(axis**2 for axis in axes) <= BESIDE_MM**2
    near: Bools = binary_dilation(where, ball)
    return near


def _locally(height: Singles, around: Bools, least: float, spacing_mm: tuple[float, ...]) -> Singles:
    """Heights ``(*S)`` of which those of the surrounding tissue nearby, where it is healthy, were taken off.

    Args:
        height: brightness above the reference.
        around: where the surrounding tissue is.
        least: from here on a voxel may belong to a region.
        spacing_mm: of the axes.
    """
    usual, spread = _robust(height[around])
    cross = generate_binary_structure(height.ndim, 1)
    healthy = around & (np.abs(height - usual) < USUAL * spread)
    healthy &= ~binary_dilation(height > least, cross, iterations=APART)
    sigma = [LOCAL_MM / s for s in spacing_mm]
    total = gaussian_filter(np.where(healthy, height - usual, 0).astype(np.float32), sigma)
    weight = gaussian_filter(healthy.astype(np.float32), sigma)
    local: Singles = height - total / np.maximum(weight, FAR)
    return local


def _measured(images: Images, index: int, sequence: str) -> Bools:
    """Where a sequence was measured ``(*S)``."""
    if images.measured is None:
        return np.ones(images.image.shape[2:], bool)
    where: Bools = images.measured[index, images.sequences.index(sequence)].cpu().numpy() > 0
    return where


def _grown(height: Singles, places: _Places, rule: Hyperintense, spacing_mm: tuple[float, ...]) -> Bools:
    """The regions that meet the rule.

    Args:
        height: brightness above the reference, in its standard deviations ``(*S)``; -inf outside the mask.
        places: where the healthy tissues are.
        rule: what a region must show.
        spacing_mm: of the axes.
    """
    found = np.zeros(height.shape, bool)
    level = float(np.median(height[places.around]))
    lower = max(LOWER * min(level, 0.0), rule.least - rule.seed) * _purity(places, spacing_mm)
    bright = height > rule.seed + lower
    parts, _ = label(bright, structure=np.ones((3,) * height.ndim))
    for number, box in enumerate(find_objects(parts), 1):
        wide = tuple(slice(max(0, s.start - MARGIN), s.stop + MARGIN) for s in box)
        seeds = parts[wide] == number
        if seeds.sum() < LEAST_VOXELS:
            continue
        here, near = height[wide], places.within(wide)
        least = rule.least + float(np.median(lower[wide][seeds]))
        region = _region(here, seeds, (near.around | near.reference) & ~bright[wide], level, least)
        small = region.sum() * math.prod(spacing_mm) <= SMALL_MM3
        sure = small or (here[seeds] > rule.seed).sum() >= LEAST_VOXELS
        if sure and _amid(region, here > rule.least, near, rule.share):
            found[wide] |= region
    return found


def _purity(places: _Places, spacing_mm: tuple[float, ...]) -> Singles:
    """The share of the surrounding tissue in what it and the reference have nearby ``(*S)``."""
    sigma = [AMID_MM / s for s in spacing_mm]
    around, reference = (gaussian_filter(where.astype(np.float32), sigma) for where in places[:2])
    share: Singles = around / np.maximum(around + reference, FAR)
    return share


def _region(height: Singles, seeds: Bools, healthy: Bools, level: float, least: float) -> Bools:
    """The region of some seeds, as far as half the height between theirs and that of its surroundings ``(*S)``.

    Args:
        height: brightness above the reference; -inf outside the mask.
        seeds: where it begins.
        healthy: what may tell how bright the surroundings are.
        level: how bright they are on average elsewhere.
        least: the border lies no lower.
    """
    cross = generate_binary_structure(height.ndim, 1)
    core = float(np.median(height[seeds]))
    half = max(least, (level + core) / 2)
    region: Bools = binary_dilation(seeds, cross, iterations=GROWTH, mask=height > half)
    for _ in range(ROUNDS):
        inner, outer = (binary_dilation(region, cross, iterations=n) for n in RING)
        ring = outer & ~inner & healthy
        if ring.sum() < RING_VOXELS:
            break
        half = max(least, (float(np.median(height[ring])) + core) / 2)
        region = binary_dilation(seeds & (height > half), cross, iterations=GROWTH, mask=height > half)
    return region


def _amid(region: Bools, candidate: Bools, places: _Places, share: float) -> bool:
    """Whether enough of what surrounds a region is the tissue that it should lie in."""
    cross = generate_binary_structure(region.ndim, 1)
    shell = binary_dilation(region, cross, iterations=SHELL) & ~candidate
    inside, reference, other = ((where & shell).sum() for where in places)
    return bool(inside >= max(share * (inside + reference), LEAST_INSIDE * (inside + reference + other)))


def _smoothed(image: NDArray[np.floating], mask: Bools, spacing_mm: tuple[float, ...]) -> Singles:
    """The image smoothed within the mask ``(*S)``; what lies outside has no part in it."""
    sigma = [SMOOTHING * min(spacing_mm) / s for s in spacing_mm]
    weight = gaussian_filter(mask.astype(np.float32), sigma)
    value = gaussian_filter(np.where(mask, image, 0).astype(np.float32), sigma)
    smooth: Singles = value / np.maximum(weight, 0.05)
    return smooth


def _robust(values: Singles) -> tuple[float, float]:
    """Median and standard deviation by the median absolute deviation, above 0."""
    middle = float(np.median(values))
    return middle, max(NORMAL_MAD * float(np.median(np.abs(values - middle))), 1e-6)


def _inserted(fit: Fit, k: int, regions: Tensor, images: Images, inside: int) -> Fit:
    """The fit with a tissue more, at index k, that takes the regions ``(B, 1, *S)`` from the others."""
    before, tissues = fit.resp, fit.resp.shape[1] + 1
    resp = before.new_empty(len(before), tissues, *before.shape[2:])
    resp[:, k] = regions[:, 0]
    for j, kept in enumerate(j for j in range(tissues) if j != k):
        torch.mul(before[:, j], 1 - regions[:, 0], out=resp[:, kept])
    mixture = fit.mixture
    moments = [_moments(image, where) for image, where in zip(images.image, regions[:, 0] > 0, strict=True)]
    mean, own = mixture.means[:, inside : inside + 1].clone(), mixture.covariances[:, inside : inside + 1].clone()
    for b, found in enumerate(moments):
        if found is not None:
            mean[b, 0], own[b, 0] = found
    share = resp.flatten(2).sum(-1) / images.mask.flatten(1).sum(-1, keepdim=True).to(resp)
    mixture = mixture._replace(
        weights=share,
        means=torch.cat([mixture.means[:, :k], mean, mixture.means[:, k:]], 1),
        covariances=torch.cat([mixture.covariances[:, :k], own, mixture.covariances[:, k:]], 1),
    )
    collapsed = fit.diagnostics.collapsed
    if collapsed is not None:  # a tissue that need not be there does not collapse
        there = torch.zeros_like(collapsed[:, :1])
        collapsed = torch.cat([collapsed[:, :k], there, collapsed[:, k:]], 1)
    return fit._replace(resp=resp, mixture=mixture, diagnostics=fit.diagnostics._replace(collapsed=collapsed))


def _moments(image: Tensor, where: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean ``(M,)`` and covariance ``(M, M)`` of an image ``(M, *S)`` at some voxels; None of fewer than two."""
    voxels = image[:, where].float()
    if voxels.shape[1] < 2:
        return None
    mean = voxels.mean(1)
    centred = voxels - mean[:, None]
    return mean, centred @ centred.mT / voxels.shape[1]
