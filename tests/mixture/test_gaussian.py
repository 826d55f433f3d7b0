"""The mixture against scipy, naive loops, finite differences and the invariances it must have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor

from monai_deepgmm.mixture.gaussian import (
    COVARIANCES,
    VARIANCE_FLOOR,
    Mixture,
    e_step,
    log_density,
    log_joint,
    m_step,
    masked_mean,
    nll,
)

SHAPES = [(5, 6), (3, 4, 3)]
K, M = 4, 3

each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
each_model = pytest.mark.parametrize("spatial", [False, True], ids=["gmm", "svgmm"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def scene(shape, *, batch=2, seed=0, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Image, mask with a hole and a bare border, and logits of responsibilities."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, M, *shape, generator=generator, dtype=torch.float64)
    image[:, 1] = 3 * image[:, 1] + 2 * image[:, 0] - 1
    logits = 2 * torch.randn(batch, K, *shape, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 1, *shape, dtype=torch.float64)
    mask[..., 0] = 0
    mask[(-1, 0, *(s // 2 for s in shape))] = 0
    return image.to(dtype), mask.to(dtype), logits.to(dtype)


def fitted(shape, covariance, spatial, **kwargs) -> tuple[Tensor, Tensor, Mixture]:
    image, mask, logits = scene(shape, **kwargs)
    return image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)


def matrix(mixture: Mixture, b: int, k: int) -> np.ndarray:
    """Σ of one component as a full matrix, whatever way it is stored."""
    stored = mixture.covariances[b, k if mixture.covariances.shape[1] > 1 else 0].numpy()
    return stored if stored.ndim == 2 else np.diag(np.broadcast_to(stored, (M,)))


def naive_log_density(image: Tensor, mixture: Mixture) -> np.ndarray:
    values = np.empty((len(image), K, *image.shape[2:]))
    for b in range(len(image)):
        for k in range(K):
            law = multivariate_normal(mixture.means[b, k].numpy(), matrix(mixture, b, k))
            values[b, k] = law.logpdf(image[b].movedim(0, -1).numpy())
    return values


def naive_weights(mixture: Mixture, image: Tensor) -> np.ndarray:
    weights = mixture.weights.numpy()
    return weights if weights.ndim == image.ndim else weights.reshape(*weights.shape, *[1] * (image.ndim - 2))


# Against scipy ---------------------------------------------------------------------------------------------------


@each_shape
@each_model
@each_covariance
def test_log_density_is_scipys(covariance, spatial, shape):
    image, _, mixture = fitted(shape, covariance, spatial)
    np.testing.assert_allclose(log_density(image, mixture).numpy(), naive_log_density(image, mixture), atol=1e-9)


@each_shape
@each_model
@each_covariance
def test_nll_is_the_naive_one_over_the_mask(covariance, spatial, shape):
    image, mask, mixture = fitted(shape, covariance, spatial)
    density = (naive_weights(mixture, image) * np.exp(naive_log_density(image, mixture))).sum(1)
    inside = mask[:, 0].numpy() > 0
    expected = [-np.log(density[b][inside[b]]).mean() for b in range(len(image))]
    np.testing.assert_allclose(nll(image, mask, mixture).numpy(), expected, atol=1e-6)


@each_shape
@each_model
@each_covariance
def test_e_step_is_bayes_rule_inside_and_zero_outside(covariance, spatial, shape):
    image, mask, mixture = fitted(shape, covariance, spatial)
    joint = naive_weights(mixture, image) * np.exp(naive_log_density(image, mixture))
    resp = e_step(image, mask, mixture)
    np.testing.assert_allclose(resp.numpy(), joint / joint.sum(1, keepdims=True) * mask.numpy(), atol=1e-12)
    torch.testing.assert_close(resp.sum(1, keepdim=True), mask)


def test_one_gaussian_by_hand():
    image = torch.tensor([[[0.0, 2.0, 7.0]]])
    mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    mixture = m_step(image, torch.ones(1, 1, 3), mask, floor=0.0)
    assert [part.item() for part in mixture[:3]] == [1.0, 1.0, 1.0]
    # Two voxels one standard deviation from the mean: ½ log 2π + ½.
    assert nll(image, mask, mixture).item() == pytest.approx(0.5 * np.log(2 * np.pi) + 0.5)


# M-step ----------------------------------------------------------------------------------------------------------


@each_shape
@each_model
@each_covariance
def test_m_step_is_the_naive_loop(covariance, spatial, shape):
    image, mask, logits = scene(shape)
    resp = logits.softmax(1)
    floor = torch.tensor([[0.1, 0.2, 0.4], [0.0, 0.5, 0.3]], dtype=torch.float64)
    mixture = m_step(image, resp, mask, covariance=covariance, spatial=spatial, floor=floor)
    for b in range(len(image)):
        inside = mask[b, 0].numpy() > 0
        voxels, w = image[b].numpy()[:, inside], resp[b].numpy()[:, inside]
        scatters = []
        for k in range(K):
            mean = sum(w[k, x] * voxels[:, x] for x in range(voxels.shape[1])) / w[k].sum()
            np.testing.assert_allclose(mixture.means[b, k].numpy(), mean, atol=1e-12)
            differences = [voxels[:, x] - mean for x in range(voxels.shape[1])]
            scatters.append(sum(w[k, x] * np.outer(d, d) for x, d in enumerate(differences)))
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


@each_covariance
def test_m_step_ignores_what_lies_outside_the_mask(covariance):
    image, mask, logits = scene((5, 6))
    elsewhere = torch.where(mask > 0, image, 1e6)
    for a, b in zip(
        m_step(image, logits.softmax(1), mask, covariance=covariance),
        m_step(elsewhere, logits.softmax(1), mask, covariance=covariance),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_model
@each_covariance
def test_the_m_step_maximises_the_expected_likelihood(covariance, spatial):
    """Any small change of μ or Σ raises −Σ w log(π g): the M-step is a minimum, not only a formula."""
    image, mask, logits = scene((5, 6))
    resp = logits.softmax(1)
    best = m_step(image, resp, mask, covariance=covariance, spatial=spatial, floor=0.0)

    def cost(mixture: Mixture) -> Tensor:
        return -(resp * mask * log_joint(image, mixture)).flatten(1).sum(1)

    for factor in (0.95, 1.05):
        assert (cost(best._replace(covariances=best.covariances * factor)) > cost(best)).all()
        assert (cost(best._replace(means=best.means + (factor - 1))) > cost(best)).all()


def test_an_unknown_covariance_lists_the_choices():
    image, mask, logits = scene((5, 6))
    with pytest.raises(ValueError, match=r"'diagonal'.*diag, full, tied, spherical"):
        m_step(image, logits.softmax(1), mask, covariance="diagonal")  # type: ignore[arg-type]


# Gradients -------------------------------------------------------------------------------------------------------


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
    assert image.grad is not None
    assert logits.grad is not None
    return [value, image.grad, logits.grad]


@settings(deadline=None, max_examples=15)
@given(size=st.floats(1e3, 1e4), sign=st.sampled_from([-1, 1]), voxel=st.integers(6, 29), seed=st.integers(0, 99))
@each_model
@each_covariance
def test_far_outliers_in_float32_stay_finite(covariance, spatial, size, sign, voxel, seed):
    image, mask, logits = scene((5, 6), seed=seed, dtype=torch.float32)
    image.flatten(2)[0, :, voxel] = sign * size
    image.flatten(2)[1, 1, voxel] = sign * size
    for part in loss_and_gradients(image, logits, mask, covariance, spatial):
        assert part.isfinite().all()
    resp = e_step(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))
    torch.testing.assert_close(resp.sum(1, keepdim=True), mask)


@each_model
@each_covariance
def test_an_outlier_that_no_component_explains_still_has_a_gradient(covariance, spatial):
    """In the linear domain its density underflows to 0 and the gradient is lost; here it pulls the means."""
    image, mask, logits = scene((5, 6), dtype=torch.float32)
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    far = image.clone()
    far[0, :, 2, 3] = 1e4
    means = mixture.means.clone().requires_grad_()
    value = nll(far, mask, mixture._replace(means=means)).sum()
    value.backward()
    assert value.isfinite()
    assert means.grad is not None
    assert means.grad.isfinite().all()
    assert means.grad[0].abs().max() > 10


@each_model
@each_covariance
def test_a_component_without_weight_has_finite_gradients(covariance, spatial):
    image, mask, logits = scene((5, 6), dtype=torch.float32)
    logits[:, 0] = -1e4  # its softmax is exactly zero
    parts = loss_and_gradients(image, logits, mask, covariance, spatial)
    assert all(part.isfinite().all() for part in parts)
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    assert (mixture.means[:, 0] == 0).all()
    if covariance != "tied":
        np.testing.assert_allclose(matrix(mixture, 0, 0), VARIANCE_FLOOR * np.eye(M), rtol=1e-5)
    assert e_step(image, mask, mixture)[:, 0].abs().max() < 1e-6


@each_covariance
@each_model
def test_an_empty_mask_costs_nothing(covariance, spatial):
    image, mask, logits = scene((5, 6), dtype=torch.float32)
    mask[0] = 0
    value, *gradients = loss_and_gradients(image, logits, mask, covariance, spatial)
    assert value[0] == 0
    assert value[1] != 0
    for gradient in gradients:
        assert (gradient[0] == 0).all()
        assert gradient.isfinite().all()
    resp = e_step(image, mask, m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial))
    assert (resp[0] == 0).all()


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_dependent_sequences_do_not_break_the_cholesky_factor(covariance, scale):
    image, mask, logits = scene((5, 6), dtype=torch.float32)
    image[:, 1], image[:, 2] = 2 * image[:, 0] + 3, -image[:, 0]
    for part in loss_and_gradients(scale * image, logits, mask, covariance, False):
        assert part.isfinite().all()


# Invariances -----------------------------------------------------------------------------------------------------


@each_shape
@each_model
@each_covariance
def test_a_batch_is_its_images_one_by_one(covariance, spatial, shape):
    image, mask, mixture = fitted(shape, covariance, spatial, batch=3)
    values, resp = nll(image, mask, mixture), e_step(image, mask, mixture)
    for b in range(3):
        alone_image, alone_mask, logits = (part[b : b + 1] for part in scene(shape, batch=3))
        alone = m_step(alone_image, logits.softmax(1), alone_mask, covariance=covariance, spatial=spatial)
        for one, many in zip(alone[:3], mixture[:3], strict=True):
            torch.testing.assert_close(one[0], many[b])
        torch.testing.assert_close(nll(alone_image, alone_mask, alone)[0], values[b])
        torch.testing.assert_close(e_step(alone_image, alone_mask, alone)[0], resp[b])


@each_model
@each_covariance
def test_permuting_components_permutes_the_result(covariance, spatial):
    image, mask, logits = scene((5, 6))
    order = [2, 0, 3, 1]
    plain = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    mixed = m_step(image, logits[:, order].softmax(1), mask, covariance=covariance, spatial=spatial)
    torch.testing.assert_close(mixed.means, plain.means[:, order])
    torch.testing.assert_close(e_step(image, mask, mixed), e_step(image, mask, plain)[:, order])
    torch.testing.assert_close(nll(image, mask, mixed), nll(image, mask, plain))


@each_covariance
def test_permuting_sequences_changes_nothing(covariance):
    image, mask, logits = scene((5, 6))
    floor = torch.tensor([[0.5, 0.0, 3.0]], dtype=torch.float64)
    order = [2, 0, 1]
    plain = m_step(image, logits.softmax(1), mask, covariance=covariance, floor=floor)
    mixed = m_step(image[:, order], logits.softmax(1), mask, covariance=covariance, floor=floor[:, order])
    torch.testing.assert_close(nll(image[:, order], mask, mixed), nll(image, mask, plain))


@each_model
@each_covariance
def test_arguments_are_left_as_they_were(covariance, spatial):
    image, mask, logits = scene((5, 6))
    resp = logits.softmax(1)
    before = [part.clone() for part in (image, mask, resp)]
    mixture = m_step(image, resp, mask, covariance=covariance, spatial=spatial)
    e_step(image, mask, mixture)
    nll(image, mask, mixture)
    assert all(torch.equal(a, b) for a, b in zip(before, (image, mask, resp), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_model
@each_covariance
def test_the_dtype_follows_the_image(covariance, spatial, dtype):
    image, mask, mixture = fitted((5, 6), covariance, spatial, dtype=dtype)
    parts = [*mixture[:3], nll(image, mask, mixture), e_step(image, mask, mixture), log_density(image, mixture)]
    assert {part.dtype for part in parts} == {dtype}


@each_model
@each_covariance
def test_the_device_follows_the_image(covariance, spatial):
    """On the meta device any tensor made on the CPU by mistake would raise."""
    image, mask, logits = (part.to("meta") for part in scene((5, 6), dtype=torch.float32))
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial)
    resp = e_step(image, mask, mixture)
    assert resp.device.type == nll(image, mask, mixture).device.type == "meta"
    assert resp.shape == logits.shape


def test_masked_mean_by_hand():
    values = torch.tensor([[[1.0, 2.0, 6.0]], [[1.0, 2.0, 6.0]]])
    mask = torch.tensor([[[1, 0, 1]], [[0, 0, 0]]], dtype=torch.bool)
    assert masked_mean(values, mask).tolist() == [3.5, 0.0]


# A sequence that is 0 everywhere -----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("covariance", ["diag", "full", "tied"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["double", "single"])
@pytest.mark.parametrize("place", [0, 1, M])
def test_a_sequence_of_zeros_cancels(covariance, spatial, dtype, rtol, place):
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
    torch.testing.assert_close(resp, alone, rtol=rtol, atol=rtol)
    assert alone.amax(1).max() > 2 / K  # and they say something
    # In the likelihood it is worth a constant: the density of 0 under N(0, floor).
    worth = 0.5 * np.log(2 * np.pi * VARIANCE_FLOOR)
    torch.testing.assert_close(nll(padded, mask, with_it), nll(image, mask, without) + worth, rtol=rtol, atol=rtol)
