"""A mask that a network found, and how sure it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Found(NamedTuple):
    """A mask that a network found.

    Attributes:
        mask: ``(X, Y, Z)`` bool.
        confidence: the mean probability inside it; 0 where it is empty.
    """

    mask: NDArray[np.bool_]
    confidence: float


def found(mask: NDArray[np.bool_], probability: NDArray[np.floating[Any]]) -> Found:
    """The mask with its confidence.

    Args:
        mask: ``(X, Y, Z)`` bool.
        probability: ``(X, Y, Z)`` of what the mask is of.
    """
    return Found(mask, float(probability[mask].mean()) if mask.any() else 0.0)
