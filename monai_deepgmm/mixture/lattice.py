"""A coarse lattice of an image's voxels, on which a mixture is fitted, and the neighbours of each on the full grid.

All masks are of one image: ``(1, 1, *S)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: An axis whose voxels are so many times as long as the shortest has no border of its own: its ends are real slices.
THICK = 2.0


class Lattice:
    """Every so many voxels of one image along each axis.

    Args:
        mask: ``(1, 1, *S)``, as 0 and 1 or bool.
        stride: for each axis of ``*S``.
    """

    def __init__(self, mask: Tensor, stride: tuple[int, ...]) -> None:
        self.stride = stride
        self.where = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
        self.mask = mask[self.where].to(torch.promote_types(mask.dtype, torch.float32))

    def inside(self, values: Tensor) -> Tensor:
        """Values on the lattice ``(1, C, *L)`` → those inside the mask ``(1, C, V)``."""
        return values[:, :, self.mask[0, 0] > 0]

    def voxels(self, values: Tensor) -> Tensor:
        """An image ``(1, C, *S)`` → its voxels of the lattice inside the mask ``(1, C, V)``."""
        return self.inside(values[self.where])


class Slab(NamedTuple):
    """Some of the mask's voxels: those of some rows along the first axis.

    Attributes:
        rows: those.
        inside: where the mask is in them ``(R, ...)``.
        flat: the voxels' indices in the flat image ``(V,)``.
    """

    rows: slice
    inside: Tensor
    flat: Tensor


class Neighbours:
    """The average over a voxel's nearest neighbours inside the mask, two along each axis, nearer ones weighing more.

    Args:
        mask: ``(1, 1, *S)``, as 0 and 1 or bool.
        spacing_mm: of the axes in ``*S``; a neighbour weighs as the inverse square of its distance.
    """

    def __init__(self, mask: Tensor, spacing_mm: tuple[float, ...]) -> None:
        self.weights = [(min(spacing_mm) / s) ** 2 for s in spacing_mm]
        self.count = self._sum(mask.to(torch.promote_types(mask.dtype, torch.float32))).clamp_min_(1e-6)

    def __call__(self, values: Tensor) -> Tensor:
        """``(1, K, *S)``, 0 outside the mask → the same shape."""
        return self._sum(values).div_(self.count)

    def _sum(self, values: Tensor) -> Tensor:
        out = torch.zeros_like(values)
        for axis, weight in enumerate(self.weights, start=2):
            n = values.shape[axis]
            out.narrow(axis, 0, n - 1).add_(values.narrow(axis, 1, n - 1), alpha=weight)
            out.narrow(axis, 1, n - 1).add_(values.narrow(axis, 0, n - 1), alpha=weight)
        return out


def slabs(mask: Tensor, voxels: int) -> list[Slab]:
    """The voxels of a mask ``(1, 1, *S)`` in slabs of about so many."""
    counts = mask[0, 0].flatten(1).sum(1) if mask.ndim > 3 else mask[0, 0].long()
    part = ((counts.cumsum(0) - 1).clamp_min(0) // voxels).tolist()
    row, found = math.prod(mask.shape[3:]), []
    for number in sorted(set(part)):
        rows = slice(part.index(number), len(part) - part[::-1].index(number))
        inside = mask[0, 0, rows]
        flat = inside.flatten().nonzero()[:, 0] + rows.start * row
        found.append(Slab(rows, inside, flat))
    return [slab for slab in found if len(slab.flat)]


def stride(mask: Tensor, spacing_mm: Sequence[float], voxels: int) -> tuple[int, ...]:
    """How many voxels to go along each axis, so that the lattice is about as coarse in mm everywhere, and small."""
    for step in itertools.count(1):
        found = tuple(max(1, round(step * min(spacing_mm) / s)) for s in spacing_mm)
        lattice = mask[(slice(None), slice(None), *(slice(None, None, s) for s in found))]
        if lattice.sum() <= voxels:
            break
    if lattice.sum() == 0:  # a mask so thin that every step leaves it out
        return (1,) * len(found)
    return found


def interior(inside: Tensor, spacing_mm: Sequence[float], depth: int) -> Tensor:
    """What lies more than ``depth`` voxels from the border, or all of it where that would leave less than half.

    At the border of a skull-stripped or resampled image voxels are in part nothing: dark in every sequence.

    Args:
        inside: 1 inside ``(1, 1, *S)``.
        spacing_mm: of the axes in ``*S``; thick ones have no border.
        depth: in voxels.
    """
    kept = inside
    for _ in range(depth):
        eroded = kept
        for axis, spacing in enumerate(spacing_mm, start=2):
            if spacing <= THICK * min(spacing_mm):
                eroded = torch.minimum(eroded, torch.minimum(_shifted(kept, axis, 1), _shifted(kept, axis, -1)))
        kept = eroded
    return kept if kept.sum() > inside.sum() / 2 else inside


def _shifted(values: Tensor, axis: int, by: int) -> Tensor:
    """Values moved along an axis, 0 where they come from beyond."""
    moved = torch.roll(values, by, axis)
    moved.select(axis, 0 if by > 0 else -1).zero_()
    return moved


def on_grid(field: Tensor, steps: tuple[int, ...], mask: Tensor) -> Tensor:
    """A field on the lattice, on the full grid ``(1, M, *S)``: linear in between, mean 1 over the mask, 1 outside."""
    for axis, (n, step) in enumerate(zip(mask.shape[2:], steps, strict=True), start=2):
        field = (field.movedim(axis, -1) @ _between(field.shape[axis], n, step).to(field)).movedim(-1, axis)
    inside = mask.expand_as(field) > 0
    mean = torch.where(inside, field, 0).flatten(2).sum(-1) / mask.sum()
    return torch.where(inside, field / mean.reshape(1, -1, *[1] * len(steps)), 1)


def _between(count: int, voxels: int, step: int) -> Tensor:
    """What each of ``count`` lattice points has to say at each voxel ``(count, voxels)``; after the last, it alone."""
    place = (torch.arange(voxels, dtype=torch.float64) / step).clamp_max(count - 1)
    return (1 - (torch.arange(count)[:, None] - place).abs()).clamp_min(0)
