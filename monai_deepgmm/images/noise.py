"""Noise, and how much a stack of slices has to be smoothed for it.

A fit looks at single voxels, and its tissues are told apart by the spread of the wall's values: noise widens it, and
what differs by less is not found. Readers do not mind, as they see an area and not a voxel. So a sequence that is much
noisier than what it shows is smoothed until it is not; all others stay as they are, bit by bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.images.measured import measured
from monai_deepgmm.mixture.spread import NORMAL_MAD

Bools = NDArray[np.bool_]
#: The quantiles that lie one standard deviation from the middle.
ONE_SIGMA = (0.16, 0.84)
#: Noise above this share of the spread of what is shown is smoothed, to this share; where a sequence's brightness is
#: averaged over neighbourhoods anyway, to the second one, which blurs borders less.
NOTABLE, LEFT, LEFT_AVERAGED = 0.15, 0.07, 0.14
#: What is shown has at least this share of the spread inside the mask, or noise would have no bound.
LEAST_SHOWN = 0.2
#: The Gaussian's standard deviation is at most this share of the organ's diameter.
MOST = 0.03


class Noise(NamedTuple):
    """What is known of one sequence.

    Attributes:
        share: the noise's standard deviation over the spread of what is shown.
        smoothing_mm: the standard deviation of the Gaussian that brings it down; 0: it stays.
    """

    share: float
    smoothing_mm: float

    def __str__(self) -> str:
        """For a warning, after the sequence's name."""
        share, mm = f"{self.share:.0%}", f"{self.smoothing_mm:.1f} mm"
        return f"has noise of {share} of what it shows in the mask, and was smoothed by {mm}"


def examine(image: NDArray[Any], mask: Bools, pixel_mm: tuple[float, float], *, left: float = LEFT) -> Noise:
    """How noisy a sequence is inside the mask, as the median over slices.

    ``n = 1.48 median |c ∗ x|`` with c the outer product of ``(1, −2, 1)`` with itself, over 6: edges and shading hardly
    count, and white noise keeps its standard deviation (Immerkær 1996). ``s² = σ² − n²``, σ being half of what lies
    between the quantiles of 16 and 84 %. A Gaussian of σ_p pixels leaves ``n / (2 √π σ_p)`` of white noise.

    Args:
        image: ``(B, H, W)``.
        mask: ``(B, H, W)``; slices without it tell nothing.
        pixel_mm: of H and W.
        left: the share that smoothing is to leave.
    """
    found = [_noise_and_spread(values, inside) for values, inside in zip(image, mask, strict=True) if inside.any()]
    if not found:
        return Noise(0.0, 0.0)
    noise, spread = np.median(found, axis=0).tolist()
    shown = math.sqrt(max(spread**2 - noise**2, (LEAST_SHOWN * spread) ** 2))
    share = noise / shown if shown > 0 else 0.0
    if share <= NOTABLE:
        return Noise(share, 0.0)
    diameter_mm = 2 * math.sqrt(float(np.median(mask.sum((1, 2))[mask.any((1, 2))])) * math.prod(pixel_mm) / math.pi)
    wanted = share / left / (2 * math.sqrt(math.pi)) * math.sqrt(math.prod(pixel_mm))
    return Noise(share, min(wanted, MOST * diameter_mm))


def _noise_and_spread(image: NDArray[Any], inside: Bools) -> tuple[float, float]:
    """Of one slice ``(H, W)``: the standard deviations of its noise, and of its values inside the mask."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    near = [
        np.arange(n[0] - 1, n[-1] + 2).clip(0, size - 1) for n, size in zip((rows, columns), image.shape, strict=True)
    ]
    around = image[np.ix_(*near)].astype(np.float64)  # what lies beyond the image is as its border
    curvature = np.diff(np.diff(around, 2, axis=0), 2, axis=1)[inside[box]] / 6
    low, high = np.quantile(image[inside], ONE_SIGMA)
    return NORMAL_MAD * float(np.median(np.abs(curvature))), float(high - low) / 2


def smoothed(
    image: NDArray[np.floating[Any]], mask: Bools, pixel_mm: tuple[float, float], sigma_mm: float
) -> NDArray[np.float32]:
    """Slices ``(B, H, W)`` averaged over a Gaussian's neighbourhood.

    What was not measured, and what lies beyond all tissues, is neither averaged nor changed.

    Args:
        image: ``(B, H, W)``.
        mask: ``(B, H, W)``.
        pixel_mm: of H and W.
        sigma_mm: the Gaussian's standard deviation.
    """
    usable = measured(torch.from_numpy(np.ascontiguousarray(image))[:, None], torch.from_numpy(mask.copy())[:, None])
    weight = np.where(mask, usable[:, 0].numpy(), image != 0).astype(np.float32)
    sigma = (0.0, *(sigma_mm / size for size in pixel_mm))
    total, around = (gaussian_filter(values, sigma) for values in (image * weight, weight))
    out: NDArray[np.float32] = np.where(weight > 0, total / np.maximum(around, 1e-6), image).astype(np.float32)
    return out
