"""Where a sequence was measured: neither padding, nor beyond its field of view, nor a value that no tissue has.

Zeros are what resampling, padding and skull stripping leave where there is no data. A spike, a wrapped integer or a
vessel lies far beyond all tissues; it would widen every scale and draw a component to itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import label
from torch import Tensor

#: The quantiles inside the mask that all tissues reach, and how many times as far from the median values may lie.
TAIL, REACH = 0.01, 2.0
#: Where values lie on both sides of 0, it is one of them unless it is so many times as frequent as any other.
FREQUENT = 3


def measured(image: Tensor, mask: Tensor) -> Tensor:
    """Where each sequence holds a usable value.

    A value v counts if it is not exactly 0 (unless 0 is one of a signed image's values, as in PSIR) and
    ``m − 2 (m − q₁) ≤ v ≤ m + 2 (q₉₉ − m)`` with m the median, q₁ and q₉₉ the quantiles of 1 and 99 % of what
    is not 0 inside the mask.

    Args:
        image: ``(B, M, *S)`` as it was read.
        mask: ``(B, 1, *S)``.

    Returns:
        ``(B, M, *S)`` bool, False outside the mask. A sequence that would have no such voxel has all of the mask.
    """
    inside = (mask > 0).expand_as(image)
    there = inside & (image != 0)
    for zeros, values, within in zip(there.flatten(0, 1), image.flatten(0, 1), inside.flatten(0, 1), strict=True):
        if _zero_is_a_value(values[within]):
            zeros |= within
    out = torch.zeros_like(inside)
    for b, m in torch.cartesian_prod(torch.arange(image.shape[0]), torch.arange(image.shape[1])).tolist():
        values = image[b, m][there[b, m]]
        if len(values) == 0:
            out[b, m] = inside[b, m]
            continue
        low, high = _limits(values)
        out[b, m] = there[b, m] & (image[b, m] >= low) & (image[b, m] <= high)
    return out


def _zero_is_a_value(values: Tensor) -> bool:
    """Whether values ``(N,)`` lie on both sides of 0, and 0 is no more frequent among them than without padding."""
    if not ((values < 0).any() and (values > 0).any()):
        return False
    zeros = int((values == 0).sum())
    others = np.unique(values[values != 0].cpu().numpy(), return_counts=True)[1]
    return 0 < zeros <= FREQUENT * int(others.max())


def limited(image: Tensor, mask: Tensor) -> Tensor:
    """The image with what lies beyond all tissues inside the mask brought back to the limit (winsorised).

    Where every slice is an image of its own, a few hot voxels would otherwise set the scale of its wall.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
    """
    out = image.clone()
    for values, inside in zip(out, mask[:, 0] > 0, strict=True):
        for channel in values:
            if inside.any():
                low, high = _limits(channel[inside])
                channel[inside] = channel[inside].clamp(low, high)
    return out


def _limits(values: Tensor) -> tuple[float, float]:
    """The least and the greatest of values ``(N,)`` that count: ``REACH`` times as far from the median as quantiles."""
    places = [round(q * (len(values) - 1)) for q in (TAIL, 0.5, 1 - TAIL)]
    low, middle, high = (float(v) for v in np.partition(values.cpu().numpy(), places)[places])
    return middle - REACH * (middle - low), middle + REACH * (high - middle)


def padding(image: NDArray[np.float32], mask: NDArray[np.bool_], axis: int | None = None) -> NDArray[np.bool_]:
    """What the mask has beyond the image: voxels that are exactly 0 in every sequence, as all is from there outwards.

    Args:
        image: (M, X, Y, Z).
        mask: (X, Y, Z).
        axis: along which slices are stacked, each an image of its own; None: a volume.

    Returns:
        (X, Y, Z); the zeros of the mask that zeros join to the image's edge. Those that tissue encloses are tissue:
        healthy wall that was nulled, or dark values that an export of few grey levels has cut off. Of a signed image,
        whose values go on below 0, none are.
    """
    empty: NDArray[np.bool_] = mask & (image == 0).all(0)
    if not empty.any() or any(_zero_is_a_value(torch.from_numpy(channel[mask])) for channel in image):
        return np.zeros_like(empty)
    if axis is None:
        return empty & from_edge((image == 0).all(0))
    for plane, values in zip(np.moveaxis(empty, axis, 0), np.moveaxis(image, axis + 1, 0), strict=True):
        if plane.any():
            plane &= from_edge((values == 0).all(0))
    return empty


def from_edge(place: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The parts of a place, an image or a volume, that reach its edge."""
    parts, _ = label(place)
    ends = [parts.take(end, axis).ravel() for axis in range(place.ndim) for end in (0, -1)]
    reach = np.unique(np.concatenate(ends))
    found: NDArray[np.bool_] = np.isin(parts, reach[reach > 0])
    return found
