"""Gaussian smoothing inside a mask, in millimetres: what lies outside neither counts nor receives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

#: The kernel ends after so many standard deviations.
TRUNCATE = 3.0


def smooth(values: Tensor, mask: Tensor, sigma_mm: float, spacing_mm: tuple[float, ...]) -> Tensor:
    """Normalised convolution ``(G ∗ (m v)) / (G ∗ m)`` with a Gaussian G.

    Args:
        values: ``(B, C, *S)``.
        mask: m ``(B, 1, *S)``, 0 or 1.
        sigma_mm: the Gaussian's standard deviation; 0 leaves the values as they are.
        spacing_mm: of the axes in ``*S``.

    Returns:
        ``(B, C, *S)``, 0 outside the mask. A constant stays what it is.
    """
    inside = mask.to(values.dtype)
    if sigma_mm <= 0:
        return values * inside
    both = _convolve(torch.cat([values * inside, inside], 1), sigma_mm, spacing_mm)
    return both[:, :-1] / both[:, -1:].clamp_min(torch.finfo(values.dtype).tiny ** 0.5) * inside


def _convolve(values: Tensor, sigma_mm: float, spacing_mm: tuple[float, ...]) -> Tensor:
    """One axis after the other; beyond the image lies 0."""
    shape = values.shape
    for axis, spacing in enumerate(spacing_mm, start=2):
        reach = math.ceil(TRUNCATE * sigma_mm / spacing)
        offsets = torch.arange(-reach, reach + 1, dtype=values.dtype, device=values.device) * spacing
        kernel = (-0.5 * (offsets / sigma_mm).square()).exp()
        lines = values.movedim(axis, -1)
        flat = lines.reshape(-1, 1, shape[axis])
        values = functional.conv1d(flat, (kernel / kernel.sum())[None, None], padding=reach)
        values = values.reshape(lines.shape).movedim(-1, axis)
    return values
