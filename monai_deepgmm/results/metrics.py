"""Agreement of two label maps: overlap, surfaces, and the best way to pair their labels.

One unit at a time: a slice or a volume. A tissue that neither map holds has no agreement to speak of: its values are
NaN, and means leave it out. A tissue that only one map holds has a Dice of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

#: Breaks ties between pairings in favour of the one that renames nothing; far below any difference that matters.
_KEEP_NAMES = 1e-9


class Overlap(NamedTuple):
    """How K tissues overlap; each field is (K,), in the order of the indices.

    Attributes:
        dice: 2 |P∩T| / (|P| + |T|); NaN where both are empty.
        jaccard: |P∩T| / |P∪T|; NaN where both are empty.
        recall: |P∩T| / |T|; NaN where the reference is empty.
        precision: |P∩T| / |P|; NaN where the prediction is empty.
        voxels_predicted: |P|.
        voxels_true: |T|.
    """

    dice: Floats
    jaccard: Floats
    recall: Floats
    precision: Floats
    voxels_predicted: Counts
    voxels_true: Counts


class Surface(NamedTuple):
    """How far two surfaces lie apart; NaN where one of the two does not exist.

    Attributes:
        hd95_mm: the larger of the two directed 95th percentiles (linear between ranks).
        assd_mm: mean of all distances, from either surface's voxels to the other surface.
    """

    hd95_mm: float
    assd_mm: float


def confusion(predicted: Labels, reference: Labels, indices: Sequence[int]) -> Counts:
    """Counts how often each predicted label meets each true one.

    Args:
        predicted: labels (*S).
        reference: labels (*S).
        indices: the K label values that are tissues; every other value is background.

    Returns:
        (K+1, K+1) voxels: row i is predicted, column j is true; 0 is background, i ≥ 1 is ``indices[i - 1]``.

    Raises:
        ValueError: the two maps differ in shape, or an index is repeated or is 0.
    """
    if predicted.shape != reference.shape:
        raise ValueError(
            f"predicted has shape {predicted.shape}, reference {reference.shape}; they must lie on one grid"
        )
    if len(set(indices)) < len(indices) or 0 in indices:
        raise ValueError(f"indices: {list(indices)}; expected different label values other than 0")
    n = len(indices) + 1
    cells = _rank(predicted, indices) * n + _rank(reference, indices)
    return np.bincount(cells.ravel(), minlength=n * n).reshape(n, n).astype(np.int64)


def overlap(counts: Counts) -> Overlap:
    """Overlap of each tissue with its namesake.

    Args:
        counts: (K+1, K+1) from ``confusion``.
    """
    both = np.diagonal(counts)[1:].astype(np.float64)
    predicted, true = counts.sum(axis=1)[1:], counts.sum(axis=0)[1:]
    return Overlap(
        dice=_ratio(2 * both, predicted + true),
        jaccard=_ratio(both, predicted + true - both),
        recall=_ratio(both, true),
        precision=_ratio(both, predicted),
        voxels_predicted=predicted,
        voxels_true=true,
    )


def dice_table(counts: Counts) -> Floats:
    """Dice of every predicted tissue (row) with every true tissue (column).

    Args:
        counts: (K+1, K+1) from ``confusion``.

    Returns:
        (K, K); NaN where both are empty.
    """
    predicted, true = counts.sum(axis=1)[1:, None], counts.sum(axis=0)[None, 1:]
    return _ratio(2.0 * counts[1:, 1:], predicted + true)


def match(dice: Floats) -> tuple[int, ...]:
    """Pairs predicted with true tissues so that their mean Dice is as large as it can be: the oracle.

    It asks the reference for the names that an unnamed mixture lacks: what it gives is a bound and not a result. Pairs
    that are empty on both sides are left out of that mean. Having as many of them as possible never costs any Dice,
    since every other pair with an empty side scores 0; so they may be rewarded, and a linear assignment is exact.

    Args:
        dice: (K, K) from ``dice_table``: predicted (row), true (column).

    Returns:
        For each true tissue, the predicted tissue that it is paired with: a permutation of 0 … K-1.
    """
    from scipy.optimize import linear_sum_assignment

    reward = np.nan_to_num(dice, nan=1.0) + _KEEP_NAMES * np.eye(len(dice))
    true, predicted = linear_sum_assignment(reward.T, maximize=True)
    return tuple(int(p) for p in predicted[np.argsort(true)])


def oracle_matched_dice(counts: Counts) -> Floats:
    """Dice of each true tissue with the predicted tissue that ``match`` pairs it with.

    Args:
        counts: (K+1, K+1) from ``confusion``.

    Returns:
        (K,) in the order of the true tissues; NaN where both are empty.
    """
    table = dice_table(counts)
    return table[list(match(table)), range(len(table))]


def surface(
    predicted: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_], *, spacing_mm: Sequence[float]
) -> Surface:
    """Distances between the surfaces of two masks, between voxel centres.

    A mask's surface is its voxels that have a face (in 2-D an edge) in common with the outside; beyond the array all
    is outside. Axes of length 1 are left out, as every voxel of a single slice would be surface otherwise.

    Args:
        predicted: (*S) bool, 2-D or 3-D.
        reference: (*S) bool.
        spacing_mm: distance between voxel centres along each axis.

    Raises:
        ValueError: the masks differ in shape, or there is not one spacing per axis.
    """
    if predicted.shape != reference.shape or len(spacing_mm) != reference.ndim:
        found = f"{predicted.shape}, {reference.shape} and {len(spacing_mm)} spacings"
        raise ValueError(f"predicted, reference and spacing_mm do not fit together: {found}")
    if not (predicted.any() and reference.any()):
        return Surface(np.nan, np.nan)
    from monai.metrics import get_mask_edges, get_surface_distance  # here, as importing monai takes seconds
    from scipy.ndimage import find_objects

    axes = [axis for axis, n in enumerate(reference.shape) if n > 1] or [0]
    spacing = [float(spacing_mm[axis]) for axis in axes]
    shape = [reference.shape[axis] for axis in axes]
    either = (predicted | reference).reshape(shape)
    box = find_objects(either.astype(np.uint8))[0]  # MONAI's own crop is many times slower
    edges = get_mask_edges(predicted.reshape(shape)[box], reference.reshape(shape)[box], crop=False)
    there = np.asarray(get_surface_distance(*edges, spacing=spacing), dtype=np.float64)
    back = np.asarray(get_surface_distance(*reversed(edges), spacing=spacing), dtype=np.float64)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return Surface(float(hd95), float(np.concatenate([there, back]).mean()))


def _rank(labels: Labels, indices: Sequence[int]) -> Counts:
    """Each voxel's place in ``indices``, counted from 1; 0 for every other value."""
    order = np.argsort(indices)
    ascending = np.asarray(indices, dtype=np.int64)[order]
    if not len(ascending):
        return np.zeros(labels.shape, dtype=np.int64)
    place = np.searchsorted(ascending, labels).clip(max=len(ascending) - 1)
    return np.where(ascending[place] == labels, order[place] + 1, 0)


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """``part / whole``; NaN where ``whole`` is 0."""
    ratio: Floats = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole != 0)
    return ratio
