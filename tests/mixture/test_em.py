"""EM against scikit-learn, planted parameters and its invariances; starts; collapse; what must not crash."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from tensors import assert_same, each_covariance, each_dtype, each_mask_dtype, each_model, is_finite, parts, row, seeded
from torch import Tensor

from monai_deepgmm.mixture import em, steps
from monai_deepgmm.mixture.fit import MIN_VOXELS
from monai_deepgmm.mixture.gaussian import m_step, nll
from monai_deepgmm.mixture.starts import kmeans_start, labels_start, means_start

K, M = 3, 2
CENTRES = torch.tensor([[-4.0, 0.0], [0.0, 5.0], [4.0, -1.0]], dtype=torch.float64)
SPREADS = torch.tensor([[0.5, 1.0], [1.0, 0.6], [0.8, 0.8]], dtype=torch.float64)

each_shape = pytest.mark.parametrize("shape", [(20, 21), (6, 7, 10)], ids=["2d", "3d"])


def scene(shape=(20, 21), *, batch=2, seed=0, blur=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Planted clusters: image, mask (of another size in each image), true labels; ``blur`` widens the clusters."""
    generator = seeded(seed)
    labels = torch.randint(K, (batch, 1, *shape), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 1
    noise = torch.randn(batch, M, *shape, generator=generator, dtype=torch.float64)
    flat = labels[:, 0]
    image = (CENTRES[flat] + blur * SPREADS[flat] * noise.movedim(1, -1)).movedim(-1, 1)
    mask = torch.ones(batch, 1, *shape, dtype=torch.float64)
    for b in range(batch):
        mask[b, ..., : b + 1] = 0
    return image, mask, labels


def soft_start(image: Tensor, mask: Tensor, *, seed=0) -> Tensor:
    logits = torch.randn(len(image), K, *image.shape[2:], generator=seeded(seed), dtype=torch.float64)
    squared = (image.flatten(2)[:, None] - CENTRES[..., None]).square().sum(2).view_as(logits)
    return (logits - 0.5 * squared).softmax(1) * mask


class Started(GaussianMixture):
    """scikit-learn's mixture, started from given responsibilities."""

    def _initialize_parameters(self, X, random_state, **_):  # noqa: N803
        self._initialize(X, self.resp)


@each_shape
@each_covariance
@pytest.mark.parametrize(("accelerate", "tol"), [(False, 1e-10), (True, 1e-14)], ids=["plain", "accelerated"])
def test_a_gmm_is_scikit_learns_from_the_same_start(covariance, shape, accelerate, tol):
    """Step by step without acceleration; with it both are only equal where they have converged to the last digit."""
    image, mask, _ = scene(shape, blur=2.5)
    start = soft_start(image, mask)
    floor = 1e-6 / steps.variance_inside(image.flatten(2), mask.flatten(2)).mean().item()
    fit = em.fit_em(
        image, mask, start, covariance=covariance, tol=tol, max_iter=9000, floor=floor, accelerate=accelerate
    )
    assert fit.diagnostics.converged.all()
    for b in range(len(image)):
        inside = mask[b, 0] > 0
        peer = Started(K, covariance_type=covariance, tol=tol, max_iter=9000, reg_covar=1e-6)
        peer.resp = start[b][:, inside].T.numpy()
        peer.fit(image[b][:, inside].T.numpy())
        ours = fit.mixture.covariances[b].squeeze(-1 if covariance == "spherical" else 0)
        np.testing.assert_allclose(fit.mixture.weights[b].numpy(), peer.weights_, atol=1e-4)
        np.testing.assert_allclose(fit.mixture.means[b].numpy(), peer.means_, atol=1e-4)
        np.testing.assert_allclose(ours.numpy().squeeze(), peer.covariances_, atol=1e-4)
        expected = -peer.score(image[b][:, inside].T.numpy())
        assert fit.diagnostics.nll[b].item() == pytest.approx(expected, abs=1e-7)


@each_shape
@each_model
@each_covariance
def test_planted_parameters_are_found_and_the_parts_of_a_fit_belong_together(covariance, spatial, shape):
    image, mask, labels = scene(shape)
    start = soft_start(image, mask)
    fit = em.fit_em(image, mask, start, covariance=covariance, spatial=spatial)
    found = fit.diagnostics
    assert found.converged.all()
    assert not found.collapsed.any()
    torch.testing.assert_close(fit.mixture.means, CENTRES.expand_as(fit.mixture.means), rtol=0, atol=0.3)
    right = (fit.resp.argmax(1, keepdim=True) == labels) & (mask > 0)
    assert right.sum() > 0.97 * mask.sum()
    if covariance == "diag":
        variances = SPREADS.square().expand_as(fit.mixture.covariances)
        torch.testing.assert_close(fit.mixture.covariances, variances, rtol=0.4, atol=0)
    assert fit.resp.shape == (len(image), K, *shape)
    torch.testing.assert_close(fit.resp.sum(1, keepdim=True), mask)
    torch.testing.assert_close(fit.mixture.weights.sum(1), torch.ones_like(fit.mixture.weights.sum(1)))
    torch.testing.assert_close(found.nll, nll(image, mask, fit.mixture))
    torch.testing.assert_close(found.nll, found.trace[-1])
    assert found.trace.shape == (found.iterations.max() + 1, len(image))
    if not spatial:  # the trace begins with the likelihood of the start
        floor = 1e-6 * steps.variance_inside(image.flatten(2), mask.flatten(2))
        first = nll(image, mask, m_step(image, start, mask, covariance=covariance, floor=floor))
        torch.testing.assert_close(found.trace[0], first)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), blur=st.floats(0.3, 5))
@each_model
@each_covariance
def test_em_never_raises_the_nll(covariance, spatial, seed, blur):
    image, mask, _ = scene(seed=seed, blur=blur)
    fit = em.fit_em(image, mask, soft_start(image, mask, seed=seed), covariance=covariance, spatial=spatial).diagnostics
    steps = fit.trace.diff(dim=0)[:, fit.reseeded == 0]
    assert steps.numel() == 0 or steps.max() < 1e-7


@each_model
@each_covariance
def test_a_batch_is_its_images_one_by_one(covariance, spatial):
    image, mask, _ = scene(batch=3, blur=2.0)
    mask[1, ..., 5:] = 0
    start = soft_start(image, mask)
    together = em.fit_em(image, mask, start, covariance=covariance, spatial=spatial)
    _, trace, iterations, *_ = together.diagnostics
    assert len(iterations.unique()) > 1  # so that they end at their own time
    for b, n in enumerate(iterations):
        one = slice(b, b + 1)
        alone = em.fit_em(image[one], mask[one], start[one], covariance=covariance, spatial=spatial)
        assert_same(alone, row(together, b), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(trace[: n + 1, b], alone.diagnostics.trace[:, 0])
        assert (trace[n:, b] == trace[n, b]).all()


@each_model
@each_covariance
def test_permuting_components_permutes_the_result_and_one_iteration_is_not_convergence(covariance, spatial):
    image, mask, _ = scene(blur=2.0)
    order = [2, 0, 1]
    plain = em.fit_em(image, mask, soft_start(image, mask), covariance=covariance, spatial=spatial)
    mixed = em.fit_em(image, mask, soft_start(image, mask)[:, order], covariance=covariance, spatial=spatial)
    torch.testing.assert_close(mixed.resp, plain.resp[:, order])
    torch.testing.assert_close(mixed.mixture.means, plain.mixture.means[:, order])
    torch.testing.assert_close(mixed.diagnostics.nll, plain.diagnostics.nll)
    stopped = em.fit_em(image, mask, soft_start(image, mask), covariance=covariance, spatial=spatial, max_iter=1)
    assert not stopped.diagnostics.converged.any()
    assert (stopped.diagnostics.iterations.tolist(), len(stopped.diagnostics.trace)) == ([1, 1], 2)


@settings(deadline=None, max_examples=5)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
@each_model
@each_covariance
def test_scaling_or_shifting_an_intensity_leaves_resp_alone(covariance, spatial, scale, shift):
    image, mask, _ = scene(blur=2.0)
    start = soft_start(image, mask)
    other = image.clone()
    other[:, 0] = scale * other[:, 0] + shift
    if covariance == "spherical":  # one variance for all sequences: only a scale that they share is harmless
        other[:, 1] = scale * other[:, 1]
    a, b = (
        em.fit_em(x, mask, start, covariance=covariance, spatial=spatial, tol=0, max_iter=20) for x in (image, other)
    )
    torch.testing.assert_close(a.resp, b.resp, rtol=0, atol=1e-6)


@each_dtype
@each_mask_dtype
@each_model
def test_the_dtype_follows_the_image(spatial, dtype, mask_dtype):
    image, mask, _ = scene()
    image, mask = image.to(dtype), mask.to(mask_dtype)
    start = kmeans_start(image, mask, K, generator=seeded())
    assert start.dtype == means_start(image, mask.to(dtype), CENTRES).dtype == dtype
    fit = em.fit_em(image, mask, start, spatial=spatial)
    assert {part.dtype for part in parts(fit) if part.is_floating_point()} == {dtype}


def test_float32_agrees_with_float64_even_far_from_zero():
    image, mask, _ = scene()
    near = em.fit_em(image, mask, soft_start(image, mask))
    far = em.fit_em((image + 1000).float(), mask, soft_start(image, mask))
    assert (near.resp.argmax(1) == far.resp.argmax(1)).double().mean() > 0.999
    torch.testing.assert_close(far.diagnostics.nll.double(), near.diagnostics.nll, rtol=0, atol=1e-3)


@each_shape
def test_the_maps_of_an_svgmm_tend_to_zero_and_one(shape):
    image, mask, _ = scene(shape, blur=2.0)
    fit, plain = (
        em.fit_em(image, mask, soft_start(image, mask), spatial=spatial, tol=1e-8, max_iter=5000)
        for spatial in (True, False)
    )
    assert fit.mixture.weights.shape == (2, K, *shape)
    largest = fit.mixture.weights.amax(1, keepdim=True)[mask > 0]
    assert (largest > 0.99).double().mean() > 0.98
    # A GMM is an SVGMM with equal maps, so the richer model fits better.
    assert (fit.diagnostics.nll < plain.diagnostics.nll).all()


def test_an_svgmm_leaves_a_hard_start():
    image, mask, labels = scene()
    wrong = labels.clone()
    shuffled = torch.rand(labels.shape, generator=seeded(1)) < 0.3
    wrong[shuffled] = (labels[shuffled] + 1) % K
    fit = em.fit_em(image, mask, labels_start(wrong, mask, K), spatial=True)
    right = (fit.resp.argmax(1, keepdim=True) == labels)[mask > 0].double().mean()
    assert right > 0.97  # it began at 0.7


@each_shape
@pytest.mark.parametrize("far", [False, True], ids=["near zero", "far from zero"])
def test_kmeans_finds_separate_clusters_and_depends_on_the_generator_alone(shape, far):
    image, mask, labels = scene(shape, blur=0.1 if far else 0.3)
    if far:  # where single precision has few digits left for the differences
        image = (image + 3e4).float()
    start = kmeans_start(image, mask, K, generator=seeded())
    assert torch.equal(start.sum(1, keepdim=True), mask.to(start))
    assert set(start.unique().tolist()) == {0.0, 1.0}
    for found, wanted, inside in zip(start.argmax(1), labels[:, 0], mask[:, 0] > 0, strict=True):
        # One cluster for each label, one label for each cluster.
        assert len(torch.stack([found, wanted])[:, inside].unique(dim=1).T) == K
    first, again, other = (kmeans_start(image, mask, 5, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), values=st.integers(1, 4), voxels=st.integers(1, 8), components=st.integers(1, 6))
def test_kmeans_clusters_only_what_lies_inside_each_value_once(seed, values, voxels, components):
    """Few, repeated values inside; whatever lies outside must not matter."""
    generator = seeded(seed)
    mask = torch.zeros(1, 1, 25)
    mask[..., torch.randperm(25, generator=generator)[:voxels]] = 1
    image = torch.randint(values, (1, 2, 25), generator=generator).float()
    starts = [
        kmeans_start(torch.where(mask > 0, image, outside), mask, components, generator=seeded(seed))
        for outside in (0.0, 1e6, torch.nan, torch.inf)
    ]
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert torch.equal(starts[0].sum(1, keepdim=True), mask)
    distinct = len(image[:, :, mask[0, 0] > 0].unique(dim=-1)[0].T)
    assert (starts[0].sum(-1) > 0).sum() == min(components, distinct)


def test_known_means_attract_their_voxels_in_their_order():
    image, mask, labels = scene(blur=0.5)
    order = [1, 2, 0]
    start = means_start(image, mask, CENTRES[order])
    torch.testing.assert_close(start.sum(1, keepdim=True), mask)
    found = torch.tensor(order)[start.argmax(1, keepdim=True)]
    assert torch.equal(found[mask > 0], labels[mask > 0])
    each = means_start(image, mask, torch.stack([CENTRES, CENTRES[order]]))
    torch.testing.assert_close(each[1], start[1])
    fit = em.fit_em(image, mask, start)
    torch.testing.assert_close(fit.mixture.means, CENTRES[order].expand(2, -1, -1), rtol=0, atol=0.3)


def test_starts_from_known_means_and_from_labels_by_hand():
    """Voxels at the means' distance 0 and 2; the shared variance is 0, 0, 1 on average: (0 + 0 + 1) / 3."""
    image = torch.tensor([[[0.0, 4.0, 1.0, torch.nan]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    start = means_start(image, mask, torch.tensor([[0.0], [4.0]]))
    odds = np.exp(-0.5 * (1 - 9) * 3)
    assert start[0, 0, 2].item() == pytest.approx(odds / (1 + odds), abs=1e-4)
    assert start[0, :, 3].tolist() == [0, 0]
    labels, mask = torch.tensor([[[[0, 2], [1, -1]]]]), torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    assert labels_start(labels, mask, 3).tolist() == [[[[1, 0], [0, 0]], [[0, 0], [1, 0]], [[0, 1], [0, 0]]]]


@each_model
@each_covariance
def test_of_restarts_the_best_is_kept_for_each_image(covariance, spatial):
    image, mask, _ = scene(batch=3, blur=2.5)
    starts = torch.stack([kmeans_start(image, mask, K, generator=seeded(s)) for s in range(4)])
    starts[0] = torch.rand(starts[0].shape, generator=seeded(9), dtype=torch.float64) * mask
    starts[0] /= starts[0].sum(1, keepdim=True).clamp_min(1e-9)
    fit = functools.partial(em.fit_em, image, mask, covariance=covariance, spatial=spatial, max_iter=30)
    best, alone = fit(starts), [fit(start) for start in starts]
    scores = torch.stack([one.diagnostics.nll for one in alone])
    assert (scores.amax(0) > scores.amin(0)).any()
    torch.testing.assert_close(best.diagnostics.nll, scores.amin(0))
    for b, r in enumerate(scores.argmin(0)):
        assert_same(row(best, b), row(alone[r], b), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(best.diagnostics.trace[-1, b], best.diagnostics.nll[b])


@each_model
@each_covariance
def test_a_collapsed_component_is_moved_and_reported(covariance, spatial):
    image, mask, labels = scene()
    fit = functools.partial(em.fit_em, mask=mask, covariance=covariance, spatial=spatial)
    # Component 2 begins empty in the second image, its voxels are given to 1.
    merged = labels.clone()
    merged[1] = torch.where(labels[1] == 2, 1, labels[1])
    found, healthy = (fit(image, start=labels_start(begin, mask, K)) for begin in (merged, labels))
    assert (found.diagnostics.reseeded >= 1).tolist() == [False, True]  # nobody but the one who lacks it
    assert (healthy.diagnostics.reseeded == 0).all()
    assert not found.diagnostics.collapsed.any()
    assert is_finite(found)
    if covariance in ("diag", "full"):  # it found its way back
        torch.testing.assert_close(found.diagnostics.nll, healthy.diagnostics.nll, rtol=0, atol=1e-3)
    # A component without voxels has no mean of its own; were it left at 0, a shift would change the result.
    start = labels_start(merged, mask, K)
    here, there = (fit(image + shift, start=start, tol=0, max_iter=20) for shift in (0.0, 50.0))
    torch.testing.assert_close(here.resp, there.resp, rtol=0, atol=1e-6)


def test_two_components_lost_at_once_do_not_become_twins():
    image, mask, labels = scene()
    fit = em.fit_em(image, mask, labels_start(torch.zeros_like(labels), mask, K), spatial=True)
    assert (fit.diagnostics.reseeded >= 1).all()
    assert (fit.mixture.means[:, 1] - fit.mixture.means[:, 2]).norm(dim=-1).min() > 1


@each_model
@each_covariance
@pytest.mark.parametrize("values", [1, 2])
def test_fewer_distinct_values_than_components(covariance, spatial, values):
    _, mask, labels = scene()
    for dtype in (torch.float32, torch.float64):
        image = 0.1 * (labels % values).to(dtype).expand(-1, M, -1, -1) + 0.1
        start = kmeans_start(image, mask, K, generator=seeded())
        assert torch.equal(start.sum(1, keepdim=True), mask.to(dtype))
        fit = em.fit_em(image, mask, start, covariance=covariance, spatial=spatial)
        assert is_finite(fit)
        torch.testing.assert_close(fit.resp.sum(1, keepdim=True), mask.to(dtype))
        assert (fit.diagnostics.reseeded > 0).all()


@each_model
def test_a_component_that_nothing_revives_is_reported(spatial):
    """Half the voxels are 0, half are 1, and no third value exists: a third component can win no voxel for itself."""
    image = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(50).reshape(1, 1, 100)
    mask = torch.ones_like(image)
    fit = em.fit_em(image, mask, labels_start(image.long(), mask, 3), spatial=spatial)
    assert is_finite(fit)
    assert fit.diagnostics.reseeded[0] >= 1
    assert torch.equal(fit.diagnostics.collapsed, fit.resp.sum(-1) < MIN_VOXELS)


@each_model
@each_covariance
@pytest.mark.parametrize("voxels", [0, 1, 2, 3])
def test_masks_of_fewer_voxels_than_components(covariance, spatial, voxels):
    image, mask, labels = scene()
    mask[0] = 0
    mask[0, 0, 3, 3 : 3 + voxels] = 1
    for start in (
        kmeans_start(image, mask, 5, generator=seeded()),
        labels_start(torch.zeros_like(labels), mask, 5),
        means_start(image, mask, torch.randn(5, M, generator=seeded())),
    ):
        fit = em.fit_em(image, mask, start, covariance=covariance, spatial=spatial)
        assert is_finite(fit)
        torch.testing.assert_close(fit.resp.sum(1, keepdim=True), mask)


@each_model
@each_covariance
@pytest.mark.parametrize("outside", [torch.nan, torch.inf, 1e30])
def test_what_lies_outside_the_mask_never_reaches_the_fit(covariance, spatial, outside):
    image, mask, _ = scene(batch=3)
    mask[2, ..., 4:] = 0  # much smaller than its neighbours, so that it is filled up in the batch
    dirty = torch.where(mask > 0, image, outside)
    for begin in (
        lambda x: kmeans_start(x, mask, K, generator=seeded()),
        lambda x: means_start(x, mask, CENTRES),
        lambda x: torch.where(mask > 0, soft_start(image, mask), outside),
    ):
        clean, other = (em.fit_em(x, mask, begin(x), covariance=covariance, spatial=spatial) for x in (image, dirty))
        assert_same(other, clean)
        assert is_finite(clean)


def test_one_component_is_the_sample_mean_and_variance():
    image, mask, _ = scene()
    fit = em.fit_em(image, mask, mask.clone(), floor=0.0)
    assert fit.diagnostics.converged.all()
    for b in range(len(image)):
        voxels = image[b][:, mask[b, 0] > 0]
        torch.testing.assert_close(fit.mixture.means[b, 0], voxels.mean(1))
        torch.testing.assert_close(fit.mixture.covariances[b, 0], voxels.var(1, correction=0))
