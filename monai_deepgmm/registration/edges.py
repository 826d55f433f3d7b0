"""How well the edges of two slices agree, for every shift of one against the other at once.

Sequences show the same tissues with other brightness, so that edges are compared by their direction, whatever their
sign: normalised gradient fields (Haber and Modersitzki, Methods Inf Med 2007). With the edges of a and b as
``n = ∇ / √(|∇|² + ε²)`` and a weight w, the agreement at a shift d is the weighted mean of ``(n_a(x) · n_b(x + d))²``
over that of the same of each with itself, ``√(Σ w |n_a|⁴ · Σ w |n_b(x + d)|⁴)``: between 0 and 1. Both are sums of
cross-correlations, which the Fourier transform gives for all shifts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm.registration import correlation

Array = NDArray[np.floating[Any]]


class Edges(NamedTuple):
    """The squared, normalised gradient of a slice, by its parts, each ``(x, y)``.

    Attributes:
        xx: along the first axis, squared.
        xy: the product of both.
        yy: along the second axis, squared.
        strength: ``|n|⁴``.
    """

    xx: Array
    xy: Array
    yy: Array
    strength: Array


def of(image: Array, weight: Array) -> Edges:
    """The edges of a slice ``(x, y)``; what is usual where the weight is not 0 counts half."""
    x, y = np.gradient(image)
    square: Array = np.square(x) + np.square(y)
    usual = float((square * weight).sum() / max(float(weight.sum()), 1e-9))
    scale: Array = 1 / (square + max(usual, 1e-12))
    return Edges(x * x * scale, x * y * scale, y * y * scale, (square * scale) ** 2)


class Still(NamedTuple):
    """The edges of the slice that stays, ready for many that move.

    Attributes:
        spectra: of the weighted edges ``(3, ...)`` and of the weights ``(1, ...)``.
        own: the weighted sum of their strength.
        shape: of the slice ``(x, y)``.
        reach: in voxels of the grid.
    """

    spectra: tuple[Tensor, Tensor]
    own: float
    shape: tuple[int, ...]
    reach: int

    @classmethod
    def of(cls, fixed: Edges, weight: Array, reach: int) -> Still:
        """Those of a slice, with the weight of each place ``(x, y)``."""
        parts = correlation.spectra([fixed.xx * weight, 2 * fixed.xy * weight, fixed.yy * weight, weight], reach)
        return cls((parts[:3], parts[3:]), float((weight * fixed.strength).sum()), weight.shape, reach)


def agreement(still: Still, moving: Tensor) -> Array:
    """How well the edges agree at each shift from ``−reach`` to ``reach`` along both axes.

    Args:
        still: of the slice that stays.
        moving: ``correlation.turned`` spectra of the edges of the other, on the same grid.

    Returns:
        ``(2 · reach + 1, 2 · reach + 1)``; at ``[reach + i, reach + j]`` what lies at ``x`` in the one is compared with
        what lies at ``x + (i, j)`` in the other.
    """
    given = (still.shape, still.reach)
    both, other = (
        correlation.correlated(*each, *given) for each in zip(still.spectra, (moving[:3], moving[3:]), strict=True)
    )
    found: Array = both / np.sqrt(np.maximum(still.own * other, 1e-12))
    return found


def highest(values: Array) -> tuple[Array, float]:
    """Where a map is highest, between its voxels and counted from its middle ``(2,)``, and how high it is there.

    At the border of the map, which is no peak, the place is not finer than a voxel.
    """
    peak = np.unravel_index(int(values.argmax()), values.shape)
    place = np.array(peak, float) - (np.array(values.shape) - 1) / 2
    for axis, (index, size) in enumerate(zip(peak, values.shape, strict=True)):
        if 0 < index < size - 1:
            line = np.take(values, peak[1 - axis], axis=1 - axis)
            before, at, after = (float(v) for v in line[index - 1 : index + 2])
            bend = before - 2 * at + after
            place[axis] += 0.5 * (before - after) / bend if bend < 0 else 0.0
    return place, float(values[peak])
