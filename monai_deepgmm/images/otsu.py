"""Otsu's threshold between two classes of intensities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def otsu(values: NDArray[np.floating[Any]]) -> float:
    """The greatest intensity of the lower of two classes with the greatest variance between them.

    Args:
        values: ``(N,)``; a single level cannot be parted, and is the threshold.
    """
    levels, counts = np.unique(values.astype(np.float64), return_counts=True)
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * levels)
    above = values.size - below
    between = below * above * ((sums[-1] - sums[:-1]) / above - sums[:-1] / below) ** 2
    return float(levels[int(np.append(between, 0.0).argmax())])
