"""No-reflow: the dark core of a scar, which blood did not reach, and late enhancement with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.methods.enclosure import cores

Mask = NDArray[np.bool_]


def no_reflow(scar: Mask, cavity: Mask, healthy: Mask, image: NDArray[np.floating], axis: int) -> Mask:
    """What of a scar is no brighter than half way from healthy myocardium to the scar, and enclosed by what is.

    In each slice the level of the scar is its upper quartile; a core is enclosed by bright scar, alone or with the
    cavity, and smaller than what encloses it.

    Args:
        scar: (X, Y, Z), its core included.
        cavity: (X, Y, Z).
        healthy: (X, Y, Z) healthy myocardium, whose median over all slices is the level of what does not enhance.
        image: (X, Y, Z) late enhancement.
        axis: along which slices are stacked.
    """
    found = np.zeros(scar.shape, dtype=bool)
    if not (healthy.any() and scar.any()):
        return found
    dark = float(np.median(image[healthy]))
    for k in np.flatnonzero(scar.any(tuple(a for a in range(3) if a != axis))):
        here, pool, values, out = (np.moveaxis(v, axis, 0)[k] for v in (scar, cavity, image, found))
        half = (dark + float(np.quantile(values[here], 0.75))) / 2
        bright = here & (values > half)
        out |= cores(bright, pool, here)
    return found
