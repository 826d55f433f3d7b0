"""What tests of mixtures, losses and networks share: random tensors, marks, and comparisons of fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import COVARIANCES

each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
each_model = pytest.mark.parametrize("spatial", [False, True], ids=["gmm", "svgmm"])
each_shape = pytest.mark.parametrize("shape", [(5, 6), (3, 4, 3)], ids=["2d", "3d"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
each_mask_dtype = pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.uint8, torch.float32, torch.float64], ids=str
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def scene(
    shape: tuple[int, ...] = (5, 6),
    *,
    components: int = 3,
    sequences: int = 2,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, image, and a mask that leaves out a border and, in the last image, one voxel more."""
    logits, image = 2 * normal(batch, components, *shape, seed=seed), normal(batch, sequences, *shape, seed=seed + 1)
    mask = torch.ones(batch, 1, *shape)
    mask[..., 0] = 0
    mask[(-1, 0, *(n // 2 for n in shape))] = 0
    return logits.to(dtype), image.to(dtype), mask.to(dtype)


def joined(*parts: Tensor) -> Tensor:
    """Along the channels, as targets of losses are."""
    return torch.cat(parts, 1)


def cube(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Coordinates from −1 to 1 along each axis."""
    return torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij")


def parts(fit: Fit) -> list[Tensor]:
    """Every tensor of a fit."""
    return [part for part in (fit.resp, *fit.mixture, *fit.diagnostics) if part is not None]


def is_finite(fit: Fit) -> bool:
    return all(bool(part.isfinite().all()) for part in parts(fit))


def assert_same(one: Fit, other: Fit, **tolerance: float) -> None:
    """To the bit, unless a tolerance is given; all but the trace, whose length depends on the batch."""
    for a, b in zip(
        *(parts(f._replace(diagnostics=f.diagnostics._replace(trace=None))) for f in (one, other)), strict=True
    ):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def row(fit: Fit, index: int) -> Fit:
    """The fit of one image of a batch."""
    return fit.rows(torch.tensor([index]))
