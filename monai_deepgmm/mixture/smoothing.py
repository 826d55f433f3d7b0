"""Gaussian smoothing inside a mask, in millimetres: what lies outside neither counts nor receives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The kernel ends after so many standard deviations.
TRUNCATE = 3.0
#: So many voxels of a line are smoothed at once: of longer lines most of a matrix is 0.
BLOCK = 40
#: Where a line's voxels are looked at and which are smoothed, and the weights of the former in the latter.
Block = tuple[slice, slice, Tensor]


class Smoother:
    """Normalised convolution ``(G ∗ (m v)) / (G ∗ m)`` with a Gaussian G, ready for many v on one mask m.

    Args:
        mask: m ``(B, 1, *S)``, 0 or 1; its precision is that of the values to come.
        sigma_mm: the Gaussian's standard deviation; 0 leaves the values as they are.
        spacing_mm: of the axes in ``*S``.
    """

    def __init__(self, mask: Tensor, sigma_mm: float, spacing_mm: tuple[float, ...]) -> None:
        self.inside = mask
        # One matrix per axis: faster than a convolution for the sides that a box around a mask has.
        sides = [(n, sigma_mm / s) for n, s in zip(mask.shape[2:], spacing_mm, strict=True)]
        self.blocks = [_blocks(_band(n, s).to(mask), math.ceil(TRUNCATE * s)) for n, s in sides if s > 0]
        self.reach = self.blur(mask).clamp_min(torch.finfo(mask.dtype).tiny ** 0.5)

    def __call__(self, values: Tensor) -> Tensor:
        """``(B, C, *S)`` → ``(B, C, *S)``, 0 outside the mask; a constant stays what it is."""
        if not self.blocks:
            return values * self.inside
        return self.blur(values * self.inside) / self.reach * self.inside

    def blur(self, values: Tensor) -> Tensor:
        """``G ∗ v``, one axis after the other; beyond the image lies 0."""
        for axis, blocks in enumerate(self.blocks, start=2):
            # In memory the axis is between those before it and those behind it.
            lines = values.reshape(-1, values.shape[axis], math.prod(values.shape[axis + 1 :]))
            found = torch.empty_like(lines, memory_format=torch.contiguous_format)
            for near, here, weights in blocks:
                if lines.shape[2] == 1:
                    torch.matmul(lines[:, near, 0], weights, out=found[:, here, 0])
                else:
                    torch.matmul(weights.T, lines[:, near], out=found[:, here])
            values = found.view(values.shape)
        return values


def smooth(values: Tensor, mask: Tensor, sigma_mm: float, spacing_mm: tuple[float, ...]) -> Tensor:
    """What ``Smoother`` does, once: ``(B, C, *S)`` and a mask ``(B, 1, *S)`` → ``(B, C, *S)``."""
    return Smoother(mask.to(values.dtype), sigma_mm, spacing_mm)(values)


def _band(n: int, sigma: float) -> Tensor:
    """The symmetric matrix ``(n, n)`` that convolves n voxels with a Gaussian of so many voxels."""
    index = torch.arange(n, dtype=torch.float64)
    apart = (index[:, None] - index).abs()
    weights = (-0.5 * (apart / sigma).square()).exp()
    return torch.where(apart <= math.ceil(TRUNCATE * sigma), weights, 0)


def _blocks(band: Tensor, reach: int) -> list[Block]:
    """The parts of a band matrix ``(n, n)`` that are not 0, for so many voxels at once."""
    n, found = len(band), []
    for first in range(0, n, BLOCK):
        here = slice(first, min(first + BLOCK, n))
        near = slice(max(first - reach, 0), min(here.stop + reach, n))
        found.append((near, here, band[near, here].contiguous()))
    return found
