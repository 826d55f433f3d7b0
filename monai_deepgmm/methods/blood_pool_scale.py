"""A scale on which late enhancement means the same in every patient: the healthy wall is 0, the blood pool 1.

The wall's own spread cannot say whether there is scar in it: a wall without any is stretched as far as one that is half
scar. The blood beside it can: it enhances like scar, and every slice holds some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

#: How far a slice's distance between wall and blood is drawn to its patient's.
POOLED = 0.5
#: No slice's distance is smaller than this share of its patient's: a slice that shows no contrast is not stretched.
LEAST = 0.3
#: Scar's own level is this quantile of what is brighter than half of it, drawn to the blood pool's as if this share of
#: the wall had shown it; half of it is at least this bright.
SCAR_QUANTILE, SCAR_PRIOR, LEAST_HALF = 0.75, 0.1, 0.3
#: How often that level is looked for.
ROUNDS = 5


class Scale(NamedTuple):
    """Where 0 and 1 lie in each of B slices.

    Attributes:
        wall: the level of the healthy wall ``(B,)``.
        unit: from there to the blood pool ``(B,)``, above 0.
    """

    wall: Array
    unit: Array

    def __call__(self, image: Array) -> Array:
        """Intensities ``(B, ...)`` on the scale, in their own precision."""
        wall, unit = (part.reshape(-1, *[1] * (image.ndim - 1)).astype(image.dtype) for part in (self.wall, self.unit))
        scaled: Array = (image - wall) / unit
        return scaled


def scale(wall: Array, blood: Array, *, pooled: bool = True) -> Scale | None:
    """The scale of a patient's slices from what each of them shows.

    Args:
        wall: the level of the healthy wall in each slice ``(B,)``; NaN where it shows too little of it.
        blood: that of the blood pool ``(B,)``, likewise.
        pooled: whether the slices are one patient's, and help each other out; else a slice without has NaN.

    Returns:
        The scale; None where blood is not brighter than the wall (blood that was nulled, or a wrong sequence). A slice
        that is scar all around shows no healthy wall, and has the other slices' level.
    """
    if not pooled:
        each = [scale(w, b) for w, b in zip(wall[:, None], blood[:, None], strict=True)]
        unknown = Scale(np.full(1, np.nan), np.full(1, np.nan))
        parts = [s or unknown for s in each]
        return Scale(np.concatenate([s.wall for s in parts]), np.concatenate([s.unit for s in parts]))
    unit = blood - wall
    if not (usual := median(unit)) > 0:
        return None
    # A wall that is as bright as blood, here and in the other slices, is scar all around: theirs is the healthy level.
    scarred = (unit < usual / 2) & (wall > (median(wall) + median(blood)) / 2)
    own = np.where(np.isnan(unit) | scarred, usual, unit)
    level = np.where(np.isnan(wall) | scarred, median(wall), wall)
    return Scale(level, np.maximum(POOLED * usual + (1 - POOLED) * own, LEAST * usual))


def scar_level(brightness: Array) -> float:
    """How bright the wall's scar is ``(N,)``, of the wall's brightness on the blood pool's scale.

    ``m = (κ + s q) / (κ + s)``: q the quantile of what is brighter than m / 2, s its share of the wall, κ the prior.
    """
    level = 1.0
    for _ in range(ROUNDS):
        bright = brightness[brightness > level / 2]
        shown = len(bright) / len(brightness)
        own = float(np.quantile(bright, SCAR_QUANTILE)) if len(bright) else 1.0
        level = max((SCAR_PRIOR + shown * own) / (SCAR_PRIOR + shown), 2 * LEAST_HALF)
    return level


def median(values: Array) -> float:
    """Of the few values that are not NaN; NaN where all are. numpy's takes a hundred times as long."""
    known: list[float] = sorted(value for value in values.tolist() if value == value)
    middle = len(known) // 2
    if not known:
        return float("nan")
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


class Sorted(NamedTuple):
    """Weighted values in ascending order, for quantiles of many parts of them.

    Attributes:
        order: of the values ``(B, N)``.
        values: sorted ``(B, N)``.
        weights: likewise.
    """

    order: NDArray[np.int64]
    values: Array
    weights: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Sorted:
        """Values and weights ``(B, N)``."""
        order = np.argsort(values, axis=1)
        return cls(order, np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1))

    def quantile(self, place: NDArray[np.bool_], share: float) -> Array:
        """The weighted quantile of each row's values in places ``(..., B, N)`` → ``(..., B)``; NaN: nothing weighs."""
        rows, (count, length) = np.arange(len(self.order)), self.order.shape
        # One index for rows and values: two take several times as long.
        found = place.reshape(*place.shape[:-2], count * length).take(self.order + length * rows[:, None], axis=-1)
        reached = np.cumsum(self.weights * found, axis=-1)
        index = (reached < share * reached[..., -1:]).sum(-1)
        return np.where(reached[..., -1] > 0, self.values[rows, index], np.nan)


def beside(slices: Sequence[int], index: int) -> list[int]:
    """The indices of the slices that lie directly beside one of them; none where positions are unknown."""
    return [j for j, at in enumerate(slices) if abs(at - slices[index]) == 1] if slices else []
