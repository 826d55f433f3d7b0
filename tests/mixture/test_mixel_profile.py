"""The profile of mixels: a border keeps its mixels, their shares are smooth, and EM of it never grows less likely."""

from __future__ import annotations

import torch

from monai_deepgmm.mixture import mixel_profile, mixels
from monai_deepgmm.mixture.mixels import Observed, Stop

NODES = mixels.NODES


def bend(weights: torch.Tensor) -> float:
    """The fourth differences of each border's mixels as a share of them: a polynomial of degree 3 has none."""
    each = weights.reshape(-1, NODES)
    return float((torch.diff(each, n=4, dim=1).abs().squeeze(1) / each.sum(1)).max())


def test_it_begins_with_every_share_as_likely_and_keeps_what_each_border_has():
    heaped = torch.tensor([[0.01, 0.02, 0.03, 0.3, 0.04, 0.1, 0.2, 0.1, 0.0, 0.0]])
    profile = mixel_profile.even(heaped, NODES)
    assert torch.allclose(profile.weights.reshape(2, NODES).sum(1), torch.tensor([0.4, 0.4]))
    assert float(profile.weights.std()) < 0.01
    for _ in range(50):
        before = float((heaped * profile.weights.log()).sum())
        profile = profile.updated(heaped)
        assert float((heaped * profile.weights.log()).sum()) >= before - 1e-6
    assert torch.allclose(profile.weights.reshape(2, NODES).sum(1), torch.tensor([0.4, 0.4]))
    assert bend(profile.weights) < 1e-4 < bend(heaped)


def test_a_smooth_profile_is_found_again():
    shapes = mixel_profile.even(torch.ones(1, NODES), NODES).shapes
    true = torch.tensor([[0.1, 0.0, 0.2, 0.3]]) @ shapes
    profile = mixel_profile.even(true, NODES)
    for _ in range(2000):
        profile = profile.updated(true)
    assert torch.allclose(profile.weights, true, atol=2e-3)


def test_em_heaps_mixels_of_one_share_only_where_it_may():
    """Two tissues, and a third of the voxels in between, all of about the same share."""
    generator = torch.Generator().manual_seed(0)
    level = torch.cat([torch.full((300,), 0.0), torch.full((300,), 0.7), torch.full((300,), 1.0)])
    values = (level + 0.05 * torch.randn(900, generator=generator))[None, None]
    observed = Observed(values, torch.ones_like(values, dtype=torch.bool))
    step = mixels.step(observed, mixels.mixing(2, [(0, 1)]), 0.3, 1e-3)
    expected = torch.stack([level < 0.5, level > 0.5]).float()[None] * 0.8 + 0.1
    begin = mixels.begin(step, expected)
    free, smooth = (mixels.run(step, *begin, None, Stop(1e-3, 60), smooth=smooth) for smooth in (False, True))
    assert bend(smooth.weights[:, 2:]) < 1e-4
    assert bend(free.weights[:, 2:]) > 0.5
