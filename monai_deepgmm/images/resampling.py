"""What a trained network sees of an image: a grid of its own spacing around the mask, and the way back.

Scanners differ in voxel size, a network is used to one. Images are sampled (linearly) on that grid, the network's
output is sampled back, and everything else (mixture, labels, volumes) stays on the scan's own voxels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from monai_deepgmm.networks.sizes import MULTIPLE

#: Surroundings on each side of the mask, in mm.
MARGIN_MM = 4.0


class View(NamedTuple):
    """Where a view lies in the image it was taken of.

    Attributes:
        centre: the image's voxel coordinates that the view's middle falls on ``(B, D)``.
        step: image voxels per voxel of the view, along each of the D axes.
        size: of the view, along each axis.
        shape: of the image.
    """

    centre: Tensor
    step: tuple[float, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]


def around(mask: Tensor, spacing_mm: tuple[float, ...], grid_mm: float, size: tuple[int, ...] | None = None) -> View:
    """The view of each image that its mask asks for.

    Args:
        mask: ``(B, 1, *S)``.
        spacing_mm: of the axes in ``*S``.
        grid_mm: of the view, along every axis.
        size: of the view; None: what the largest mask needs.
    """
    step = tuple(grid_mm / s for s in spacing_mm)
    centres, extents = [], []
    for image in mask[:, 0]:
        where = torch.nonzero(image).cpu().double()
        where = where if len(where) else torch.zeros(1, len(step), dtype=torch.float64)
        low, high = where.amin(0), where.amax(0)
        centres.append((low + high) / 2)
        extents.append(high - low + 1)
    if size is None:
        widest = torch.stack(extents).amax(0).tolist()
        sides = (n * s + 2 * MARGIN_MM for n, s in zip(widest, spacing_mm, strict=True))
        size = tuple(int(-(-side // (grid_mm * MULTIPLE))) * MULTIPLE for side in sides)
    # The first voxel falls on one of the image's, so that nothing is interpolated where the spacings agree.
    reach = torch.tensor([(n - 1) / 2 * s for n, s in zip(size, step, strict=True)], dtype=torch.float64)
    return View((torch.stack(centres) - reach).round() + reach, step, size, tuple(mask.shape[2:]))


def look(values: Tensor, view: View, *, nearest: bool = False) -> Tensor:
    """``(B, C, *S)`` → ``(B, C, *size)``, 0 beyond the image."""
    return _sample(values, view.centre, view.step, view.size, nearest=nearest, padding="zeros")


def back(values: Tensor, view: View) -> Tensor:
    """The way back: ``(B, C, *size)`` → ``(B, C, *S)``; beyond the view its border goes on."""
    # Seen from the view, the image's middle lies off the view's middle by as much as the reverse.
    size, shape = (torch.tensor(n, dtype=torch.float64) for n in (view.size, view.shape))
    step = torch.tensor(view.step, dtype=torch.float64)
    centre = (size - 1) / 2 + ((shape - 1) / 2 - view.centre.cpu()) / step
    inverse = tuple(1 / s for s in view.step)
    return _sample(values, centre, inverse, view.shape, nearest=False, padding="border")


def relative_depth(mask: Tensor, spacing_mm: tuple[float, ...]) -> Tensor:
    """Distance to the mask's border over the largest such distance: 0 at the border, 1 at the deepest point.

    Args:
        mask: ``(B, 1, *S)``.
        spacing_mm: of the axes in ``*S``.

    Returns:
        ``(B, 1, *S)``, 0 outside the mask.
    """
    depths = [distance_transform_edt(m.numpy() > 0, sampling=spacing_mm) for m in mask[:, 0].cpu()]
    relative = np.stack([depth / max(float(depth.max()), 1e-9) for depth in depths])
    return torch.from_numpy(relative)[:, None].to(mask)


def inputs(image: Tensor, mask: Tensor, grid_mm: float) -> Tensor:
    """What the network is given of a view: the sequences, and the relative depth inside the mask.

    Args:
        image: ``(B, M, *size)``.
        mask: ``(B, 1, *size)``.
        grid_mm: of the view.

    Returns:
        ``(B, M + CONTEXT, *size)``.
    """
    return torch.cat([image, relative_depth(mask, (grid_mm,) * (mask.ndim - 2)).to(image)], 1)


def _sample(
    values: Tensor, centre: Tensor, step: tuple[float, ...], size: tuple[int, ...], *, nearest: bool, padding: str
) -> Tensor:
    """Samples each image at ``centre + step · (index − middle)`` for every index of a grid of a size."""
    dims = len(size)
    # grid_sample cannot tell where an axis of a single voxel ends; with a neighbour on both sides it can.
    thin = [int(n == 1) for n in values.shape[2:]]
    pads = [n for n in reversed(thin) for _ in "12"]
    values = torch.nn.functional.pad(values, pads, mode="constant" if padding == "zeros" else "replicate")
    # grid_sample counts from −1 at the first voxel to 1 at the last, and names the axes in reverse order.
    half = torch.tensor([(n - 1) / 2 for n in values.shape[2:]], dtype=torch.float64)
    lines = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * s for n, s in zip(size, step, strict=True)]
    offsets = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)  # (*size, D)
    centre = centre.cpu().double() + torch.tensor(thin)
    where = centre.reshape(-1, *[1] * dims, dims) + offsets
    grid = (where / half - 1).flip(-1).to(values)
    mode = "nearest" if nearest else "bilinear"
    sampled: Tensor = torch.nn.functional.grid_sample(values, grid, mode=mode, padding_mode=padding, align_corners=True)
    return sampled
