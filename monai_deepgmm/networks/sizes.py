"""What every network of ours is given: which channels besides the sequences, and images of which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from monai_deepgmm.errors import UsageError

#: Channels of context that a network sees after the sequences: the relative depth inside the mask.
CONTEXT = 1
#: Sides of what a network sees are multiples of this, so that it may halve them five times.
MULTIPLE = 32
#: The most voxels that a network is shown at a time: a head at 0.5 mm.
LARGEST = 1 << 27
#: The finest and the coarsest voxel size of a network's grid, in mm.
GRID_MM = (0.01, 100.0)


def check_window(window: object) -> None:
    """Refuses windows that a network cannot halve.

    Args:
        window: one side for every axis, or one for each; 0: whole images; None: nobody asked.

    Raises:
        UsageError: a side is no multiple of ``MULTIPLE``, or 0 among others.
    """
    whole = window is None or (window == 0 and is_whole(window))
    sides = tuple(window) if isinstance(window, list | tuple) else (window,)
    if not whole and not (sides and even(sides, len(sides))):
        remedy = f"expected a multiple of {MULTIPLE}, or one for each axis; 0 for whole images"
        raise UsageError(f"window: got {window!r}, {remedy}")


def window_sides(window: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A window's side along each of the axes.

    Raises:
        UsageError: there are more or fewer sides than axes.
    """
    sides = (window,) * dims if isinstance(window, int) else tuple(window)
    if len(sides) != dims:
        raise UsageError(f"window: got {len(sides)} sides, expected {dims}, one for each axis of an image")
    return sides


def even(sides: Sequence[object], dims: int) -> bool:
    """Whether these are the sides of an image that a network can halve."""
    return len(sides) == dims and all(is_whole(n) and n > 0 and n % MULTIPLE == 0 for n in sides)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)
