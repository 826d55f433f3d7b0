"""Tissues that are no part of a mixture, but too bright for all of it: lesions of the white matter on FLAIR.

A healthy brain has none and a sick one may have a hundredth of its volume, so that no component of a mixture would stay
with them. They are found when the healthy tissues are known, as regions: somewhere far brighter than the brightest
healthy tissue; as far as half the height above the tissue around them, which is where a blurred border lies; and amid
that tissue, since bright cortex is not (Schmidt et al. 2012 grow lesions from such seeds). Cortex may be as bright on
FLAIR as lesions are, but is less so on T2, so that both tell more. Healthy tissue is brighter in some places
than in others (the brain stem, shading): by how much is taken off first.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, find_objects, gaussian_filter, generate_binary_structure, label
from torch import Tensor

from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit, likeliest
from monai_deepgmm.protocol import Hyperintense, Tissue

#: Noise is smoothed by so many of the smallest voxel's sides (standard deviation).
SMOOTHING = 0.7
#: A region has at least so many seeds, grows by so many voxels at most, and is surrounded by so many.
LEAST_VOXELS, GROWTH, SHELL = 3, 8, 2
#: The neighbourhood whose healthy tissue says what is usual there: a Gaussian's standard deviation, in mm. What is
#: healthy lies within so many standard deviations of that tissue, and so many voxels away from what is too bright.
LOCAL_MM, USUAL, APART = 4.0, 2.0, 2
#: Where the neighbourhood holds less of it than this share, nothing is known of the place.
FAR = 1e-3
#: Median absolute deviations in a standard deviation.
NORMAL_MAD = 1.4826
#: A tissue of fewer voxels tells nothing of what is too bright.
ENOUGH = 100
#: By how much more a further sequence may count than the first: fluid is bright on T2, and no lesion.
MOST_AHEAD = 1.0

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


def _regions(resp: Tensor, index: int, images: Images, known: list[Tissue], rule: Hyperintense) -> Tensor:
    """Where one image has regions of the tissue ``(1, *S)``, as 0 and 1."""
    mask = images.mask[index, 0].cpu().numpy() > 0
    seen = mask & _measured(images, index, rule.sequence)
    labels = likeliest(resp[None])[0].cpu().numpy()
    names = [t.name for t in known]
    reference = seen & (labels == names.index(rule.brighter_than))
    around = seen & (labels == names.index(rule.inside))
    out = np.zeros_like(mask)
    if min(reference.sum(), around.sum()) >= ENOUGH:
        height = _heights(images, index, rule, mask, reference)
        height = _locally(height, around, rule.least, images.spacing_mm)
        middle, spread = _robust(height[reference])
        height = (height - middle) / spread
        level = float(np.median(height[around]))
        out = _grown(np.where(mask, height, -np.inf), level, around, reference, rule)
    return torch.from_numpy(out)[None]


def _heights(images: Images, index: int, rule: Hyperintense, mask: Bools, reference: Bools) -> Singles:
    """Brightness above the reference, in its robust standard deviations, on average over sequences ``(*S)``."""

    def scaled(values: Singles, where: Bools) -> Singles:
        middle, spread = _robust(values[where])
        return (values - middle) / spread

    def height(sequence: str, where: Bools) -> Singles:
        # What is too bright for any tissue counts as bright, though the fit left it out.
        image = images.image[index, images.sequences.index(sequence)].cpu().numpy()
        return scaled(_smoothed(image, mask, images.spacing_mm), where)

    first = height(rule.sequence, reference)
    total, count = first.copy(), np.ones_like(first)
    for sequence in (s for s in rule.also if s in images.sequences):
        seen = _measured(images, index, sequence)
        if (both := reference & seen).sum() >= ENOUGH:
            total += np.where(seen, np.minimum(height(sequence, both), first + MOST_AHEAD), 0)
            count += seen
    return scaled(total / count, reference)


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


def _grown(height: Singles, level: float, around: Bools, beside: Bools, rule: Hyperintense) -> Bools:
    """The regions that meet the rule.

    Args:
        height: brightness above the reference, in its standard deviations ``(*S)``; -inf outside the mask.
        level: that of the surrounding tissue, on average.
        around: where the surrounding tissue is.
        beside: where the reference is.
        rule: what a region must show.
    """
    found = np.zeros(height.shape, bool)
    cross = generate_binary_structure(height.ndim, 1)
    candidate = height > rule.least
    parts, _ = label(height > rule.seed, structure=np.ones((3,) * height.ndim))
    for number, box in enumerate(find_objects(parts), 1):
        wide = tuple(slice(max(0, s.start - GROWTH - SHELL), s.stop + GROWTH + SHELL) for s in box)
        seeds = parts[wide] == number
        if seeds.sum() < LEAST_VOXELS:
            continue
        half = max(rule.least, (level + float(np.median(height[wide][seeds]))) / 2)
        region = binary_dilation(seeds, cross, iterations=GROWTH, mask=height[wide] > half)
        shell = binary_dilation(region, cross, iterations=SHELL) & ~candidate[wide]
        inside, other = (around[wide] & shell).sum(), (beside[wide] & shell).sum()
        if inside >= rule.share * (inside + other):
            found[wide] |= region
    return found


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
