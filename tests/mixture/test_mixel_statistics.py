"""Densities and moments by matrix products are those of the shaded Gaussians; small work keeps one thread."""

from __future__ import annotations

import torch

from monai_deepgmm.mixture import mixel_statistics
from monai_deepgmm.mixture.gaussian import Mixture, log_density
from monai_deepgmm.mixture.serial import WORTH_SHARING, serial

MEANS = torch.tensor([[[1.0, 5.0, 2.0], [3.0, 2.0, 1.0]]])
ROOTS = torch.tensor([[[0.4, 0, 0], [0.1, 0.5, 0], [-0.1, 0.2, 0.3]], [[0.3, 0, 0], [0.0, 0.4, 0], [0.1, 0.0, 0.6]]])
COVARIANCES = (ROOTS @ ROOTS.mT)[None]


def voxels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Intensities, a field, and where each sequence was measured; all of three sequences."""
    generator = torch.Generator().manual_seed(0)
    values = 3 + torch.randn(3, 60, generator=generator)
    field = 1 + 0.2 * torch.rand(3, 60, generator=generator)
    measured = torch.rand(3, 60, generator=generator) > 0.3
    measured[:, :20] = True
    return values, field, measured


def test_densities_are_those_of_the_shaded_gaussians():
    values, field, _ = voxels()
    mixture = Mixture(torch.full((1, 2), 0.5), MEANS, COVARIANCES, field[None])
    known = mixel_statistics.patterns(torch.ones_like(values, dtype=torch.bool))
    seen = mixel_statistics.statistics(values, torch.ones_like(values) > 0, field, torch.tensor([2.0, 3.0, 1.0]), known)
    assert torch.allclose(seen.log_density(mixture), log_density(values[None], mixture), atol=1e-4)


def test_moments_are_sums_over_what_was_measured():
    values, field, measured = voxels()
    centre, resp = torch.tensor([2.0, 3.0, 1.0]), torch.rand(2, 60, generator=torch.Generator().manual_seed(1))
    known = mixel_statistics.patterns(measured)
    assert sum(len(pattern.where) for pattern in known) == 60
    found = mixel_statistics.statistics(values, measured, field, centre, known).moments(resp)
    b, c, one = field * measured, (values - field * centre[:, None]) * measured, measured.float()
    for mine, (first, second) in zip(found, ((c, c), (c, b), (b, b), (one, one)), strict=True):
        assert torch.allclose(mine, torch.einsum("nv,iv,jv->nij", resp, first, second), atol=1e-4)


def test_small_work_is_done_by_one_thread_and_large_work_by_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with serial(100):
            assert torch.get_num_threads() == 1
        with serial(WORTH_SHARING):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
