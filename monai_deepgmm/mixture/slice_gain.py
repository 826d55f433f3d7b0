"""The gain of every other slice: interleaved acquisitions, where one half of the slices is brighter than the other.

A slice less the average of its two neighbours, in logarithms, has a median of about 0 whatever the anatomy and however
smooth the shading. With a gain of every other slice this median alternates, by as much as the slices differ: nothing
else does, so that it is known before any tissue is. A polynomial field cannot follow it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monai_deepgmm.mixture.spread import NORMAL_MAD

#: Slices whose gains differ by less than this share are left alone; nothing is told of fewer slices.
LEAST, LEAST_SLICES = 0.02, 12
#: How many standard errors of a median the difference is away from 0, at least.
SURE = 4.0
#: Of so many voxels each slice tells at least; every so many along each axis within a slice are asked.
LEAST_VOXELS, EVERY = 50, 3
#: A median's standard error in that of a mean.
OF_MEDIAN = 1.2533


def alternating(image: Tensor, zero: Tensor, seen: Tensor) -> Tensor | None:
    """The gain of each voxel's slices.

    Args:
        image: one image ``(1, M, *S)``.
        zero: what is subtracted from it, so that 0 is no signal ``(M,)``.
        seen: where each sequence was measured ``(1, M, *S)`` bool.

    Returns:
        ``(1, M, *S)``, for each axis one of two values on every other slice; None where no axis has any.
    """
    gain: Tensor | None = None
    for m in range(image.shape[1]):
        for axis in range(image.ndim - 2):
            half = _half(image[0, m], zero[m], seen[0, m], axis)
            if half:
                gain = torch.ones_like(image, dtype=torch.float32) if gain is None else gain
                sign = _signs(image.shape[2 + axis], image)
                shape = [-1 if i == axis else 1 for i in range(image.ndim - 2)]
                gain[0, m] *= (half * sign).exp().reshape(shape)
    return gain


def _signs(n: int, like: Tensor) -> Tensor:
    """1 and -1 in turn ``(n,)``."""
    return 1 - 2 * (torch.arange(n, device=like.device) % 2).float()


def _half(values: Tensor, zero: Tensor, seen: Tensor, axis: int) -> float:
    """Half of the logarithm by which even slices along an axis are brighter than odd ones; 0 where it is not sure."""
    within = tuple(slice(None) if i == axis else slice(None, None, EVERY) for i in range(values.ndim))
    signal = (values[within].float() - zero).movedim(axis, 0).flatten(1)
    logs = signal.log().masked_fill(~(seen[within].movedim(axis, 0).flatten(1) & (signal > 0)), torch.nan)
    bend = logs[1:-1] - (logs[:-2] + logs[2:]) / 2  # of both neighbours, or NaN
    known = bend.isfinite().sum(1) >= LEAST_VOXELS
    if int(known.sum()) < LEAST_SLICES:
        return 0.0
    differences = (bend.nanmedian(1).values * _signs(len(logs), logs)[1:-1])[known]
    middle = float(differences.median())
    spread = NORMAL_MAD * float((differences - middle).abs().median())
    error = OF_MEDIAN * spread / math.sqrt(len(differences))
    return middle / 2 if abs(middle) > max(LEAST, SURE * error) else 0.0
