"""How usual what lies on each other is, for every shift of one slice against another at once.

Places of the slice that stays are sorted into kinds (how deep in the organ, how bright), voxels of the other into
levels of brightness. Which level lies on which kind, counted over a patient's slices, says how much more often they
meet than by chance, ``log p(level | kind) / p(level)``; its mean over the places is the agreement of a shift. That is
mutual information, point by point, with the histogram of all slices: one slice alone has too few voxels for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from monai_deepgmm.registration import correlation

Array = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

#: Levels of brightness of the slice that moves, and of the one that stays; each holds as many voxels.
LEVELS, FIXED_LEVELS = 16, 8
#: The borders of the bands of depth, in mm inside of the organ's outline.
BANDS_MM = np.array([-15.0, -8, -4, -2, 0, 2, 4, 6, 8, 11, 14])
KINDS = (len(BANDS_MM) + 1) * FIXED_LEVELS
#: So many levels counts are smoothed over (standard deviation); so many voxels a coarser estimate counts as.
LEVEL_SD, PRIOR = 1.0, 10.0
#: How much of its own counts a slice is judged by: little, or it would confirm where it was put.
OWN = 0.2


def borders(values: Array, count: int) -> Array:
    """Between which values levels change, so that as many of the values are of each ``(count − 1,)``."""
    held = values[np.isfinite(values)]
    found: Array = np.quantile(held, np.arange(1, count) / count) if held.size else np.zeros(count - 1)
    return found


def levels(values: Array, between: Array) -> Ints:
    """The level of each value, from 0; −1 where there is none (NaN)."""
    limits = between.astype(values.dtype)
    limits = np.where(limits < between, np.nextafter(limits, np.inf, dtype=values.dtype), limits)
    found = np.where(np.isfinite(values), np.int8(0), np.int8(-1))
    for limit in limits:  # so few that a search would take longer
        found += values >= limit
    return found


def kinds(depth_mm: Array, fixed: Array, region: NDArray[np.bool_]) -> Ints:
    """The kind of each place of the slice that stays ``(x, y)``: band of depth and level; −1 where it does not count.

    Args:
        depth_mm: in the organ, negative outside ``(x, y)``.
        fixed: the slice; NaN where there is none.
        region: what counts.
    """
    bright = levels(fixed, borders(fixed[region], FIXED_LEVELS))
    found: Ints = np.digitize(depth_mm, BANDS_MM) * FIXED_LEVELS + bright
    return np.where(region & (bright >= 0), found, -1)


def counts(kind: Ints, level: Ints) -> Array:
    """How often each level lies on each kind ``(KINDS, LEVELS)``."""
    both = (kind >= 0) & (level >= 0)
    found = np.bincount(kind[both] * LEVELS + level[both], minlength=KINDS * LEVELS)
    return found.reshape(KINDS, LEVELS).astype(float)


def usual(each: Sequence[Array]) -> list[Array]:
    """For each of a patient's slices, how much more often than by chance a level lies on a kind in all of them.

    The slice itself counts little.

    Args:
        each: the counts of each slice.

    Returns:
        Logarithms ``(KINDS, LEVELS)``; kinds that are rare are like their band of depth, and rare bands like all.
    """
    total = np.sum(each, axis=0)
    return [_log_ratio(total - (1 - OWN) * own) for own in each]


def spectra(level: Ints, reach: int) -> Tensor:
    """What ``agreement`` needs of the levels of the slice that moves, for shifts of up to so many voxels."""
    each = torch.arange(LEVELS, dtype=torch.int8)[:, None, None]
    return correlation.turned((torch.from_numpy(level.astype(np.int8)) == each).float(), reach)


def agreement(kind: Ints, seen: Tensor, usual: Array, reach: int) -> Array:
    """The mean log ratio at each shift from ``−reach`` to ``reach`` along both axes.

    Args:
        kind: of the places of the slice that stays ``(x, y)``.
        seen: ``spectra`` of the other's levels, on the same grid.
        usual: ``(KINDS, LEVELS)``.
        reach: in voxels of the grid.

    Returns:
        ``(2 · reach + 1, 2 · reach + 1)``, as ``edges.agreement`` has them; what would come from beyond the image
        counts nothing.
    """
    table = torch.zeros(LEVELS, KINDS + 1)  # the last is worth nothing, and of places of no kind
    table[:, :KINDS] = torch.from_numpy(usual.T)
    index = torch.from_numpy(np.where(kind >= 0, kind, KINDS).ravel())
    worth = table.index_select(1, index).view(LEVELS, *kind.shape)
    found = correlation.correlated(correlation.spectra(worth, reach), seen, kind.shape, reach)
    return found / max(int((kind >= 0).sum()), 1)


def _log_ratio(found: Array) -> Array:
    smooth = gaussian_filter1d(found, LEVEL_SD, axis=1, mode="nearest")
    chance = smooth.sum(0) / max(float(smooth.sum()), 1e-9) + 1e-6
    band = smooth.reshape(-1, FIXED_LEVELS, LEVELS).sum(1)
    band = (band + PRIOR * chance) / (band.sum(1, keepdims=True) + PRIOR)
    expected = PRIOR * np.repeat(band, FIXED_LEVELS, axis=0)
    logs: Array = np.log((smooth + expected) / (smooth.sum(1, keepdims=True) + PRIOR)) - np.log(chance)
    return logs
