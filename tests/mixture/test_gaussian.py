"""The mixture against scipy, naive loops, finite differences and the invariances it must have."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from tensors import each_covariance, each_model, each_shape
from tensors import scene as plain_scene
from torch import Tensor

from monai_deepgmm.mixture.gaussian import (
    VARIANCE_FLOOR,
    Mixture,
    e_step,
    log_density,
    log_joint,
    log_shares,
    m_step,
    masked_mean,
    nll,
)

K, M = 4, 3


def scene(shape=(5, 6), *, dtype=torch.float64, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Image, mask and logits; sequences depend on each other and have scales of their own."""
    logits, image, mask = plain_scene(shape, components=K, sequences=M, **options)
    image[:, 1] = 3 * image[:, 1] + 2 * image[:, 0] - 1
    return image.to(dtype), mask.to(dtype), logits.to(dtype)


def fitted(shape, covariance, spatial, **options) -> tuple[Tensor, Tensor, Mixture]:
    image, mask, logits = scene(shape, **options)
    return image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)


def matrix(mixture: Mixture, b: int, k: int) -> np.ndarray:
    """Σ of one component as a full matrix, whatever way it is stored."""
    stored = mixture.covariances[b, k if mixture.covariances.shape[1] > 1 else 0].numpy()
    return stored if stored.ndim == 2 else np.diag(np.broadcast_to(stored, (M,)))


@each_shape
@each_model
@each_covariance
def test_density_likelihood_and_posterior_are_scipys(covariance, spatial, shape):
    image, mask, mixture = fitted(shape, covariance, spatial)
    density = np.empty((2, K, *shape))
    for b, k in np.ndindex(2, K):
        law = multivariate_normal(mixture.means[b, k].numpy(), matrix(mixture, b, k))
        density[b, k] = law.logpdf(image[b].movedim(0, -1).numpy())
    np.testing.assert_allclose(log_density(image, mixture).numpy(), density, atol=1e-9)
    weights = mixture.weights.numpy()
    joint = weights.reshape(*weights.shape, *[1] * (image.ndim - weights.ndim)) * np.exp(density)
    inside = mask[:, 0].numpy() > 0
    expected = [-np.log(joint[b].sum(0)[inside[b]]).mean() for b in range(2)]
    np.testing.assert_allclose(nll(image, mask, mixture).numpy(), expected, atol=1e-6)
    resp = e_step(image, mask, mixture)
    np.testing.assert_allclose(resp.numpy(), joint / joint.sum(1, keepdims=True) * mask.numpy(), atol=1e-12)
    torch.testing.assert_close(resp.sum(1, keepdim=True), mask)


def test_one_gaussian_and_a_masked_mean_by_hand():
    image, mask = torch.tensor([[[0.0, 2.0, 7.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
    mixture = m_step(image, torch.ones(1, 1, 3), mask, floor=0.0)
    assert [part.item() for part in mixture[:3]] == [1.0, 1.0, 1.0]
    # Two voxels one standard deviation from the mean: ½ log 2π + ½.
    assert nll(image, mask, mixture).item() == pytest.approx(0.5 * np.log(2 * np.pi) + 0.5)
    mask = torch.tensor([[[1, 0, 1]], [[0, 0, 0]]], dtype=torch.bool)
    assert masked_mean(image.expand(2, 1, 3), mask).tolist() == [3.5, 0.0]


@each_shape
@each_model
@each_covariance
def test_m_step_is_the_naive_loop(covariance, spatial, shape):
    image, mask, logits = scene(shape)
    resp = logits.softmax(1)
    floor = torch.tensor([[0.1, 0.2, 0.4], [0.0, 0.5, 0.3]], dtype=torch.float64)
    mixture = m_step(image, resp, mask, covariance=covariance, spatial=spatial, floor=floor)
    for b in range(2):
        inside = mask[b, 0].numpy() > 0
        voxels, w = image[b].numpy()[:, inside], resp[b].numpy()[:, inside]
        scatters = []
        for k in range(K):
            mean = sum(w[k, x] * voxels[:, x] for x in range(voxels.shape[1])) / w[k].sum()
            np.testing.assert_allclose(mixture.means[b, k].numpy(), mean, atol=1e-12)
            scatters.append(sum(w[k, x] * np.outer(v - mean, v - mean) for x, v in enumerate(voxels.T)))
            if not spatial:
                assert mixture.weights[b, k].item() == pytest.approx(w[k].sum() / inside.sum())
        for k in range(K):
            full = scatters[k] / w[k].sum() + np.diag(floor[b].numpy())
            expected = {
                "full": full,
                "diag": np.diag(np.diag(full)),
                "spherical": np.eye(M) * np.diag(full).mean(),
                "tied": sum(scatters) / inside.sum() + np.diag(floor[b].numpy()),
            }[covariance]
            np.testing.assert_allclose(matrix(mixture, b, k), expected, atol=1e-12)
    if spatial:
        assert torch.equal(mixture.weights, resp)


@each_model
@each_covariance
def test_the_m_step_maximises_the_expected_likelihood(covariance, spatial):
    """Any small change of μ or Σ raises −Σ w log(π g): the M-step is a minimum, not only a formula."""
    image, mask, logits = scene()
    resp = logits.softmax(1)
    best = m_step(image, resp, mask, covariance=covariance, spatial=spatial, floor=0.0)

    def cost(mixture: Mixture) -> Tensor:
        return -(resp * mask * log_joint(image, mixture)).flatten(1).sum(1)

    for factor in (0.95, 1.05):
        assert (cost(best._replace(covariances=best.covariances * factor)) > cost(best)).all()
        assert (cost(best._replace(means=best.means + (factor - 1))) > cost(best)).all()


def test_an_unknown_covariance_lists_the_choices():
    image, mask, logits = scene()
    with pytest.raises(ValueError, match=r"'diagonal'.*diag, full, tied, spherical"):
        m_step(image, logits.softmax(1), mask, covariance="diagonal")  # type: ignore[arg-type]


@each_shape
@each_model
def test_given_logarithms_take_the_place_of_the_weights(spatial, shape):
    image, mask, mixture = fitted(shape, "diag", spatial)
    without = mixture._replace(weights=mixture.weights * torch.nan)
    given = mixture.weights.log()
    torch.testing.assert_close(log_joint(image, without, given), log_joint(image, mixture))
    torch.testing.assert_close(nll(image, mask, without, given), nll(image, mask, mixture))


@each_shape
def test_log_shares_are_those_of_an_m_step_and_hold_where_single_precision_has_no_weight_left(shape):
    image, mask, logits = scene(shape)
    expected = m_step(image, logits.softmax(1), mask).weights.log()
    torch.testing.assert_close(log_shares(logits.log_softmax(1), mask), expected)
    logits[:, 0] -= 120
    exact = m_step(image, logits.softmax(1), mask).weights.log()
    single = logits.float().requires_grad_()
    found = log_shares(single.log_softmax(1), mask.float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    found[:, 0].sum().backward()
    # Each voxel's part in the mean: they sum to 1 over the mask of each image.
    torch.testing.assert_close(single.grad[:, 0].flatten(1).sum(1), torch.ones(2))
    assert (single.grad[(mask == 0).expand_as(single)] == 0).all()
    log_resp = logits.log_softmax(1).requires_grad_()
    empty = log_shares(log_resp, 0 * mask)
    empty.sum().backward()
    assert empty.isfinite().all()
    assert (log_resp.grad == 0).all()


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 3)], ids=["2d", "3d"])
@each_model
@each_covariance
def test_gradients_of_the_loss_through_the_m_step(covariance, spatial, shape):
    image, mask, logits = scene(shape)

    def loss(image: Tensor, logits: Tensor) -> Tensor:
        return nll(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))

    assert torch.autograd.gradcheck(loss, (image.requires_grad_(), logits.requires_grad_()), atol=1e-5)


def loss_and_gradients(image: Tensor, logits: Tensor, mask: Tensor, covariance, spatial) -> list[Tensor]:
    image, logits = image.detach().requires_grad_(), logits.detach().requires_grad_()
    value = nll(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))
    value.sum().backward()
    return [value, image.grad, logits.grad]


@settings(deadline=None, max_examples=15)
@given(size=st.floats(1e3, 1e4), sign=st.sampled_from([-1, 1]), voxel=st.integers(6, 29), seed=st.integers(0, 99))
@each_model
@each_covariance
def test_far_outliers_in_float32_stay_finite(covariance, spatial, size, sign, voxel, seed):
    image, mask, logits = scene(seed=seed, dtype=torch.float32)
    image.flatten(2)[0, :, voxel] = sign * size
    image.flatten(2)[1, 1, voxel] = sign * size
    assert all(part.isfinite().all() for part in loss_and_gradients(image, logits, mask, covariance, spatial))
    resp = e_step(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))
    torch.testing.assert_close(resp.sum(1, keepdim=True), mask)


@each_model
@each_covariance
def test_an_outlier_that_no_component_explains_still_has_a_gradient(covariance, spatial):
    """In the linear domain its density underflows to 0 and the gradient is lost; here it pulls the means."""
    image, mask, mixture = fitted((5, 6), covariance, spatial, dtype=torch.float32)
    image[0, :, 2, 3] = 1e4
    means = mixture.means.clone().requires_grad_()
    value = nll(image, mask, mixture._replace(means=means)).sum()
    value.backward()
    assert value.isfinite()
    assert means.grad.isfinite().all()
    assert means.grad[0].abs().max() > 10


@each_model
@each_covariance
def test_a_component_without_weight_has_finite_gradients(covariance, spatial):
    image, mask, logits = scene(dtype=torch.float32)
    logits[:, 0] = -1e4  # its softmax is exactly zero
    assert all(part.isfinite().all() for part in loss_and_gradients(image, logits, mask, covariance, spatial))
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    assert (mixture.means[:, 0] == 0).all()
    if covariance != "tied":
        np.testing.assert_allclose(matrix(mixture, 0, 0), VARIANCE_FLOOR * np.eye(M), rtol=1e-5)
    assert e_step(image, mask, mixture)[:, 0].abs().max() < 1e-6


@each_covariance
@each_model
def test_an_empty_mask_costs_nothing(covariance, spatial):
    image, mask, logits = scene(dtype=torch.float32)
    mask[0] = 0
    value, *gradients = loss_and_gradients(image, logits, mask, covariance, spatial)
    assert (value != 0).tolist() == [False, True]
    assert all(gradient.isfinite().all() and (gradient[0] == 0).all() for gradient in gradients)
    resp = e_step(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))
    assert (resp[0] == 0).all()


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_dependent_sequences_do_not_break_the_cholesky_factor(covariance, scale):
    image, mask, logits = scene(dtype=torch.float32)
    image[:, 1], image[:, 2] = 2 * image[:, 0] + 3, -image[:, 0]
    assert all(part.isfinite().all() for part in loss_and_gradients(scale * image, logits, mask, covariance, False))


@each_shape
@each_model
@each_covariance
def test_a_batch_is_its_images_one_by_one(covariance, spatial, shape):
    image, mask, logits = scene(shape, batch=3)
    step = functools.partial(m_step, covariance=covariance, spatial=spatial)
    together = step(image, logits.softmax(1), mask)
    for b in range(3):
        one, inside = image[b : b + 1], mask[b : b + 1]
        alone = step(one, logits[b : b + 1].softmax(1), inside)
        for a, t in zip(alone[:3], together[:3], strict=True):
            torch.testing.assert_close(a[0], t[b])
        torch.testing.assert_close(nll(one, inside, alone)[0], nll(image, mask, together)[b])
        torch.testing.assert_close(e_step(one, inside, alone)[0], e_step(image, mask, together)[b])


@each_model
@each_covariance
def test_permuting_components_permutes_the_result_and_leaves_the_arguments_alone(covariance, spatial):
    given, order = scene(), [2, 0, 3, 1]
    image, mask, logits = (part.clone() for part in given)
    plain, mixed = (
        m_step(image, z.softmax(1), mask, covariance=covariance, spatial=spatial) for z in (logits, logits[:, order])
    )
    torch.testing.assert_close(mixed.means, plain.means[:, order])
    torch.testing.assert_close(e_step(image, mask, mixed), e_step(image, mask, plain)[:, order])
    torch.testing.assert_close(nll(image, mask, mixed), nll(image, mask, plain))
    assert all(torch.equal(a, b) for a, b in zip(given, (image, mask, logits), strict=True))


@each_covariance
def test_what_lies_outside_the_mask_and_the_order_of_sequences_change_nothing(covariance):
    image, mask, logits = scene()
    seen = (image, torch.where(mask > 0, image, 1e6))
    for a, b in zip(*(m_step(i, logits.softmax(1), mask, covariance=covariance)[:3] for i in seen), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    floor, order = torch.tensor([[0.5, 0.0, 3.0]], dtype=torch.float64), [2, 0, 1]
    plain = m_step(image, logits.softmax(1), mask, covariance=covariance, floor=floor)
    mixed = m_step(image[:, order], logits.softmax(1), mask, covariance=covariance, floor=floor[:, order])
    torch.testing.assert_close(nll(image[:, order], mask, mixed), nll(image, mask, plain))


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cpu"), ("float64", "cpu"), ("float32", "meta")])
@each_model
@each_covariance
def test_dtype_and_device_follow_the_image(covariance, spatial, dtype, device):
    """On the meta device any tensor made on the CPU by mistake would raise."""
    image, mask, logits = (part.to(device) for part in scene(dtype=getattr(torch, dtype)))
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    found = [*mixture[:3], nll(image, mask, mixture), e_step(image, mask, mixture), log_density(image, mixture)]
    assert {(part.dtype, part.device.type) for part in found} == {(image.dtype, device)}


@each_model
@pytest.mark.parametrize("covariance", ["diag", "full", "tied"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["double", "single"])
@pytest.mark.parametrize("place", [0, 1, M])
def test_a_sequence_of_zeros_cancels(covariance, spatial, dtype, tol, place):
    """It has the same density under every component, so that the mixture is that of the other sequences."""
    image, mask, logits = scene((9, 9), dtype=dtype)
    image[:, 2] += 4 * logits.argmax(1)
    padded = torch.cat([image[:, :place], torch.zeros_like(image[:, :1]), image[:, place:]], 1)
    without, with_it = (
        m_step(i, logits.softmax(1), mask, covariance=covariance, spatial=spatial) for i in (image, padded)
    )
    others = [m for m in range(M + 1) if m != place]
    assert (with_it.means[..., place] == 0).all()
    torch.testing.assert_close(with_it.means[..., others], without.means)
    resp, alone = e_step(padded, mask, with_it), e_step(image, mask, without)
    torch.testing.assert_close(resp, alone, rtol=tol, atol=tol)
    assert alone.amax(1).max() > 2 / K  # and they say something
    # In the likelihood it is worth a constant: the density of 0 under N(0, floor).
    worth = 0.5 * math.log(2 * math.pi * VARIANCE_FLOOR)
    torch.testing.assert_close(nll(padded, mask, with_it), nll(image, mask, without) + worth, rtol=tol, atol=tol)
