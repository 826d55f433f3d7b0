"""The box around masks: most of an image is not worth computing on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Box = tuple[slice, ...]


def enclosing(mask: Tensor, *, margin: int = 0, multiple: int = 1) -> Box:
    """The box around all masks ``(B, 1, *S)``; may leave the image.

    Args:
        mask: where it is above 0 counts.
        margin: voxels added on each side.
        multiple: each side is a multiple of it.

    Returns:
        A slice of each axis of ``*S``; its start may be negative and its stop beyond the end.
    """
    sides, found = [], mask.amax((0, 1))
    for axis in range(found.ndim):
        along = found.movedim(axis, 0).reshape(found.shape[axis], -1).amax(1)
        inside = torch.nonzero(along > 0).flatten().tolist() or [0]
        low, high = inside[0], inside[-1] + 1
        side = -(-(high - low + 2 * margin) // multiple) * multiple
        first = (low + high - side) // 2
        sides.append(slice(first, first + side))
    return tuple(sides)


def around(voxel: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Box:
    """The box of a size with a voxel in its middle, or as near to it as the box stays within the image.

    Args:
        voxel: along each axis of ``*S``.
        size: of the box; at most the image's.
        shape: of the image, ``*S``.
    """
    firsts = (min(max(at - n // 2, 0), side - n) for at, n, side in zip(voxel, size, shape, strict=True))
    return tuple(slice(first, first + n) for first, n in zip(firsts, size, strict=True))


def cut(values: Tensor, box: Box, outside: float = 0.0) -> Tensor:
    """``(B, C, *S)`` cut to a box, ``outside`` where the box leaves it; with ``paste`` there and back.

    Where the box is the whole image, the result is the values themselves.
    """
    pads = [
        pad for side, n in zip(reversed(box), reversed(values.shape[2:]), strict=True) for pad in _beyond(side, int(n))
    ]
    return functional.pad(values, pads, value=outside) if any(pads) else values


def paste(values: Tensor, box: Box, shape: torch.Size, outside: float = 0.0) -> Tensor:
    """The way back: ``(B, C, *box)`` into an image of the shape ``*S``, with ``outside`` around the box."""
    back = tuple(slice(-side.start, -side.start + n) for side, n in zip(box, shape, strict=True))
    return cut(values, back, outside)


def within(box: Box) -> tuple[slice, ...]:
    """The box of a batch of images."""
    return (slice(None), slice(None), *box)


def _beyond(side: slice, length: int) -> tuple[int, int]:
    """How far a slice reaches beyond an axis on both sides; negative where it stays within."""
    return -side.start, side.stop - length
