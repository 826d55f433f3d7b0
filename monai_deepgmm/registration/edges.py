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
from scipy import fft

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


def agreement(fixed: Edges, moving: Edges, weight: Array, reach: int) -> Array:
    """How well the edges agree at each shift from ``−reach`` to ``reach`` along both axes.

    Args:
        fixed: of the slice that stays.
        moving: of the other, on the same grid ``(x, y)``.
        weight: of the places of the slice that stays ``(x, y)``.
        reach: in voxels of the grid.

    Returns:
        ``(2 · reach + 1, 2 · reach + 1)``; at ``[reach + i, reach + j]`` what lies at ``x`` in ``fixed`` is compared
        with what lies at ``x + (i, j)`` in ``moving``.
    """
    size = [fft.next_fast_len(n + reach, real=True) for n in weight.shape]

    def spectrum(values: Array) -> NDArray[np.complexfloating[Any, Any]]:
        found: NDArray[np.complexfloating[Any, Any]] = fft.rfft2(values.astype(np.float32), size)
        return found

    parts = ((fixed.xx, moving.xx), (2 * fixed.xy, moving.xy), (fixed.yy, moving.yy))
    both = fft.irfft2(sum(spectrum(a * weight).conj() * spectrum(b) for a, b in parts), size)
    other = fft.irfft2(spectrum(weight).conj() * spectrum(moving.strength), size)
    own = float((weight * fixed.strength).sum())
    chosen = np.ix_(*(np.arange(-reach, reach + 1) % n for n in size))
    found: Array = both[chosen] / np.sqrt(np.maximum(own * other[chosen], 1e-12))
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
