"""Mixels: what was not measured is integrated out, outliers have a class, the first sequence can lead."""

from __future__ import annotations

import torch

from monai_deepgmm.mixture import mixels
from monai_deepgmm.mixture.gaussian import Mixture, log_density
from monai_deepgmm.mixture.lattice import interior
from monai_deepgmm.mixture.mixel_model import Model
from monai_deepgmm.mixture.mixels import Anchor, Observed, Stop
from monai_deepgmm.mixture.partial_volume import fit_partial_volume as fit

MEANS = torch.tensor([[[1.0, 5.0], [3.0, 2.0]]])
COVARIANCES = torch.tensor([[[[0.2, 0.1], [0.1, 0.4]], [[0.3, -0.1], [-0.1, 0.2]]]])
PURE = Mixture(torch.full((1, 2), 0.5), MEANS, COVARIANCES)


def halves(n: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two tissues side by side in a cube, two sequences: image, mask and start."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(n) >= n // 2).long()[:, None, None].expand(n, n, n)
    image = torch.tensor([[1.0, 3.0], [5.0, 2.0]])[:, truth][None]
    image = image + 0.2 * torch.randn(image.shape, generator=generator)
    start = torch.nn.functional.one_hot(truth, 2).movedim(-1, 0)[None].float() * 0.6 + 0.2
    return image, torch.ones(1, 1, n, n, n), start


def test_what_was_not_measured_is_integrated_out():
    values = torch.tensor([[[1.2, 1.2, 7.0, 7.0], [4.5, 9.0, 4.5, 9.0]]])
    seen = torch.tensor([[[True, True, False, False], [True, False, True, False]]])
    found = mixels.marginal_density(Observed(values, seen), PURE)
    assert torch.allclose(found[..., 0], log_density(values[..., :1], PURE)[..., 0])
    first = Mixture(PURE.weights, MEANS[..., :1], COVARIANCES[..., :1, :1])
    second = Mixture(PURE.weights, MEANS[..., 1:], COVARIANCES[..., 1:, 1:])
    assert torch.allclose(found[..., 1], log_density(values[:, :1, 1:2], first)[..., 0])
    assert torch.allclose(found[..., 2], log_density(values[:, 1:, 2:3], second)[..., 0])
    assert (found[..., 3] == 0).all()


def test_an_anchor_keeps_the_first_margin_and_what_the_others_are_given_it():
    told = Mixture(PURE.weights, torch.tensor([[[1.5], [9.0]]]), torch.tensor([[[[0.5]], [[9.0]]]]))
    found = mixels.anchored(PURE, Anchor(told, PURE.weights, (0,)))
    assert found.means[0, 0].tolist() == [1.5, 5.0]
    assert torch.isclose(found.covariances[0, 0, 0, 0], torch.tensor(0.5))

    def given_first(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return s[1, 0] / s[0, 0], s[1, 1] - s[1, 0] ** 2 / s[0, 0]

    for old, new in zip(given_first(COVARIANCES[0, 0]), given_first(found.covariances[0, 0]), strict=True):
        assert torch.isclose(old, new)
    assert torch.equal(found.means[0, 1], MEANS[0, 1])  # the other tissue is free
    assert torch.equal(found.covariances[0, 1], COVARIANCES[0, 1])


def test_a_few_hot_voxels_change_no_tissue():
    image, mask, start = halves()
    hot = image.clone()
    hot[0, :, 3:5, 3:5, 3:5] = 500.0
    plain, spoiled = (fit(each, mask, start, (1.0,) * 3, Model(((0, 1),), degree=0)) for each in (image, hot))
    assert torch.allclose(plain.mixture.means, spoiled.mixture.means, atol=0.05)
    assert torch.allclose(plain.mixture.weights, spoiled.mixture.weights, atol=0.02)


def test_where_a_sequence_was_not_measured_the_other_decides():
    image, mask, start = halves()
    measured = torch.ones_like(image)
    measured[:, 1, :, :, 16:] = 0
    padded = torch.where(measured > 0, image, 0)
    model = Model(((0, 1),), degree=0, anchored=(0, 1))
    whole = fit(image, mask, start, (1.0,) * 3, model)
    part = fit(padded, mask, start, (1.0,) * 3, model, measured=measured)
    assert (whole.resp.argmax(1) == part.resp.argmax(1)).float().mean() > 0.99
    assert torch.allclose(whole.mixture.means, part.mixture.means, atol=0.05)


def test_a_dark_border_takes_no_tissue():
    """The outermost voxels are half nothing, in both sequences, as after skull stripping."""
    image, mask, start = halves(32)
    image = torch.cat([image, image[:, :1] - 2 * image[:, 1:]], 1)  # a third sequence
    rim = interior(mask, (1.0,) * 3, 1) == 0
    spoiled = torch.where(rim, 0.3 * image, image)
    found = fit(spoiled, mask, start, (1.0,) * 3, Model(((0, 1),), degree=0))
    assert torch.allclose(found.mixture.means[0, :, :2], torch.tensor([[1.0, 5.0], [3.0, 2.0]]), atol=0.1)


def test_a_thick_axis_has_no_border_and_a_thin_mask_is_kept_whole():
    assert interior(torch.ones(1, 1, 12, 12, 4), (1.0, 1.0, 5.0), 1)[0, 0].sum() == 10 * 10 * 4
    thin = torch.ones(1, 1, 12, 12, 2)
    assert torch.equal(interior(thin, (1.0, 1.0, 1.0), 1), thin)


def test_outliers_are_told_from_tissues():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 1, 2000, generator=generator) * 0.1 + (torch.arange(2000) % 2) * 2.0
    values[..., :40] = 3.0 + 6 * torch.rand(40, generator=generator)
    observed = Observed(values, torch.ones_like(values, dtype=torch.bool))
    step = mixels.step(observed, torch.eye(2), 0.1, 1e-6)
    expected = torch.stack([(values[0, 0] < 1).float(), (values[0, 0] >= 1).float()])[None]
    found = mixels.run(step, *mixels.begin(step, expected), None, Stop(1e-4, 200))
    assert 0.01 < found.outliers < 0.03
    assert torch.allclose(found.pure.means[0, :, 0], torch.tensor([0.0, 2.0]), atol=0.02)


def test_of_a_fit_at_most_so_many_voxels_are_mixels():
    few = torch.tensor([[0.3, 0.2, 0.1, 0.4]])
    assert mixels.capped(few, 2) is few
    most = mixels.MOST_MIXELS
    # Each kind's parts stay in proportion, and so does the sum.
    many = torch.tensor([[0.05, 0.15, 0.6, 0.2]])
    assert torch.allclose(
        mixels.capped(many, 2), torch.tensor([[(1 - most) / 4, (1 - most) * 3 / 4, most * 3 / 4, most / 4]])
    )
    assert torch.allclose(mixels.capped(many / 2, 2), mixels.capped(many, 2) / 2)


def test_where_every_grey_is_as_frequent_many_voxels_are_still_pure():
    """Free mixels explain such an image alone, of two tissues that no voxel is of."""
    values = torch.linspace(1, 3, 2000)[None, None]
    step = mixels.step(Observed(values, torch.ones_like(values) > 0), mixels.mixing(2, ((0, 1),)), 0.3, 1e-3)
    expected = torch.cat([3 - values, values - 1], 1) / 2
    found = mixels.run(step, *mixels.begin(step, expected), None, Stop(1e-3, 300))
    assert torch.isclose(found.weights[0, 2:].sum(), torch.tensor(mixels.MOST_MIXELS), atol=1e-4)
    assert torch.isclose(found.weights.sum(), torch.tensor(1.0), atol=1e-4)
