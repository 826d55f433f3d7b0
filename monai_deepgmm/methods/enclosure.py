"""What a bright region encloses, alone or with the cavity beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

Mask = NDArray[np.bool_]


def cores(bright: Mask, cavity: Mask, within: Mask) -> Mask:
    """The holes of a bright region that are smaller than it.

    Args:
        bright: the region ``(H, W)``.
        cavity: what may close its ring; no part of ``within``.
        within: where holes are looked for.
    """
    around, count = label(~(bright | cavity))
    edges = np.unique(np.concatenate([around[[0, -1]].ravel(), around[:, [0, -1]].ravel()]))
    if count <= np.count_nonzero(edges):  # nothing is enclosed
        return np.zeros_like(bright)
    holes, count = label(~np.isin(around, [0, *edges]) & within)
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    small = sizes < bright.sum()
    small[0] = False
    found: Mask = small[holes]
    return found
