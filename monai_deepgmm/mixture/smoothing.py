"""Gaussian smoothing inside a mask, in millimetres: what lies outside neither counts nor receives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The kernel ends after so many standard deviations.
TRUNCATE = 3.0


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
        sides = zip(mask.shape[2:], spacing_mm, strict=True)
        self.matrices = [_band(n, sigma_mm / s).to(mask) for n, s in sides] if sigma_mm > 0 else []
        self.reach = self.blur(mask).clamp_min(torch.finfo(mask.dtype).tiny ** 0.5)

    def __call__(self, values: Tensor) -> Tensor:
        """``(B, C, *S)`` → ``(B, C, *S)``, 0 outside the mask; a constant stays what it is."""
        if not self.matrices:
            return values * self.inside
        return self.blur(values * self.inside) / self.reach * self.inside

    def blur(self, values: Tensor) -> Tensor:
        """``G ∗ v``, one axis after the other; beyond the image lies 0."""
        for axis, matrix in enumerate(self.matrices, start=2):
            last = axis == values.ndim - 1
            values = values @ matrix if last else (values.movedim(axis, -1) @ matrix).movedim(-1, axis)
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
