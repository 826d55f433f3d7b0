"""The voxels inside each mask of a batch, gathered to the front of one dense axis, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the voxels lie that count.

    Attributes:
        inside: 1 for those, 0 for what fills up an image that has fewer ``(B, 1, N)``.
        where: the flat position of each in its image ``(B, N)``; what fills up lies one beyond the last voxel.
        shape: of the images, ``*S``.
        whole: whether every voxel of every image counts, so that nothing is to be moved.
    """

    inside: Tensor
    where: Tensor
    shape: tuple[int, ...]
    whole: bool = False

    @property
    def size(self) -> int:
        """How many voxels an image has."""
        return int(torch.Size(self.shape).numel())

    def rows(self, index: Tensor) -> Packing:
        """Those of some of the images."""
        return self._replace(inside=self.inside[index], where=self.where[index])

    def repeated(self, times: int) -> Packing:
        """Those of all images so many times over."""
        return self._replace(inside=self.inside.repeat(times, 1, 1), where=self.where.repeat(times, 1))

    def pack(self, values: Tensor, *, clean: bool = True) -> Tensor:
        """``(B, C, *S)`` → ``(B, C, N)``.

        Args:
            values: the images.
            clean: what fills up is 0, so that it is always finite; else it is some voxel's.
        """
        if self.whole:
            return values.flatten(2)
        index = self.where.clamp_max(self.size - 1)[:, None].expand(-1, values.shape[1], -1)
        found = values.flatten(2).gather(2, index)
        return torch.where(self.inside > 0, found, 0) if clean else found

    def spread(self, values: Tensor, outside: float = 0.0) -> Tensor:
        """The way back: ``(B, C, N)`` → ``(B, C, *S)``, whose images do not lie close together in memory."""
        if self.whole:
            return values.reshape(*values.shape[:2], *self.shape)
        full = values.new_full((*values.shape[:2], self.size + 1), outside)
        full.scatter_(2, self.where[:, None].expand_as(values), values)
        return torch.unflatten(full[..., :-1], 2, self.shape)

    def boxes(self) -> Packing:
        """The same voxels in boxes of one size, of which each lies around those of its image."""
        counts, rest, lines = self.inside[:, 0] > 0, self.where, []
        for side in reversed(self.shape):
            along, rest = rest % side, rest // side
            first = torch.where(counts, along, side).amin(1, keepdim=True)
            lines.append(torch.where(counts, along - first, -1))
        sides = [max(int(along.max()) + 1, 1) for along in lines]
        where, stride = torch.zeros_like(rest), 1
        for along, side in zip(lines, sides, strict=True):
            where, stride = where + along * stride, stride * side
        return self._replace(where=torch.where(counts, where, stride), shape=tuple(reversed(sides)))


def packing(mask: Tensor) -> Packing:
    """The voxels of masks ``(B, 1, *S)`` that are above 0, in order."""
    flat = mask.flatten(1) > 0
    counts = flat.sum(1)
    image, voxel = flat.nonzero(as_tuple=True)
    turn = torch.arange(len(voxel), device=mask.device) - (counts.cumsum(0) - counts)[image]
    longest = max(int(counts.max()), 1)
    where = torch.full((len(mask), longest), flat.shape[1], device=mask.device)
    where[image, turn] = voxel
    inside = (where < flat.shape[1])[:, None].to(mask.dtype)
    return Packing(inside, where, tuple(mask.shape[2:]), bool(inside.all()) and longest == flat.shape[1])
