"""Whether the mask of a ventricle holds one cavity, as it should, or two: then a neighbour's is in it as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, label

from monai_deepgmm.images.mask_examination import ENOUGH, planes
from monai_deepgmm.images.otsu import otsu
from monai_deepgmm.protocol import Protocol

Bools = NDArray[np.bool_]
Singles = NDArray[np.float32]

#: What is left of a pool where its rim, so thick in mm, is taken away; trabeculae and partial volume are no pools.
RIM_MM = 3.0
#: Noise is smoothed by a Gaussian of so many mm, which ends after so many standard deviations.
SMOOTHING_MM, REACH = 1.5, 4.0
#: A second pool may be so large, as a share of the largest in any slice: papillary muscles part a small apical cavity,
#: but no large one. In any slice of 25 hearts: .01 at most; where the mask holds the right ventricle as well, .12 to 1
#: in the worst slice of 24 of them.
SECOND = 0.1


def about(
    image: Singles, mask: Bools, spacing_mm: Sequence[float], axis: int, protocol: Protocol, sequences: Sequence[str]
) -> Iterator[str]:
    """A warning where a slice holds two separate bright pools.

    Args:
        image: (M, X, Y, Z).
        mask: (X, Y, Z).
        spacing_mm: of the three axes.
        axis: along which slices are stacked.
        protocol: only where its masks are ellipses around a cavity, and a sequence shows that brightest of all.
        sequences: the M.
    """
    shown = [s for s in sequences if _brightest(protocol, s)]
    if protocol.mask_shape is None or not protocol.mask_shape.ellipses or not shown:
        return
    stack = np.moveaxis(image[sequences.index(shown[0])], axis, 0)
    across = [s for i, s in enumerate(spacing_mm) if i != axis]
    found = {k: _pools(stack[k], plane, across) for k, plane in planes(mask, axis) if plane.sum() >= ENOUGH}
    largest = max((int(sizes[-1]) for sizes in found.values() if len(sizes)), default=0)
    shares = {k: float(sizes[-2]) / largest for k, sizes in found.items() if len(sizes) > 1}
    if shares and (worst := max(shares.items(), key=lambda one: one[1]))[1] > SECOND:
        yield (
            f"W_MASK_SHAPE: on {shown[0]} the mask holds two separate bright pools in slice {worst[0]}, the smaller "
            f"{100 * worst[1]:.0f} % of the largest of all (usual: up to {100 * SECOND:.0f} %); is a neighbour of the "
            f"{protocol.mask} in it?"
        )


def _brightest(protocol: Protocol, sequence: str) -> bool:
    """Whether what lies inside the wall is brighter on a sequence than all other tissues."""
    if protocol.anatomy is None or sequence not in protocol.sequences:
        return False
    levels = {t.name: t.signature[sequence] for t in protocol.tissues}
    inside = [levels.pop(name) for name in protocol.anatomy.inside]
    return min(inside) > max(levels.values())


def _pools(values: Singles, plane: Bools, spacing_mm: Sequence[float]) -> NDArray[np.int64]:
    """How many voxels the cores of bright pools (X, Y) have, in ascending order."""
    margins = [math.ceil(REACH * SMOOTHING_MM / s) + 1 for s in spacing_mm]
    lines = [np.flatnonzero(plane.any(1 - axis)) for axis in (0, 1)]
    ends = [(max(int(a[0]) - m, 0), int(a[-1]) + 1 + m) for a, m in zip(lines, margins, strict=True)]
    near = tuple(slice(*pair) for pair in ends)
    values, plane = values[near], plane[near]
    smooth = gaussian_filter(values, [SMOOTHING_MM / s for s in spacing_mm], truncate=REACH)
    bright = plane & (smooth > otsu(smooth[plane]))
    numbered, _ = label(distance_transform_edt(bright, sampling=spacing_mm) > RIM_MM)
    return np.sort(np.bincount(numbered.ravel())[1:])
