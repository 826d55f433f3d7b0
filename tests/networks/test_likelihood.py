"""The likelihood's gradients by hand against autograd through the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import each_covariance, each_shape, scene
from torch import Tensor

from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.gaussian import log_joint, log_shares, m_step, masked_mean, nll
from monai_deepgmm.networks.likelihood import coefficients, likelihood, voxels

FLOOR = 0.2
each_kind = pytest.mark.parametrize("kind", ["nll_v", "nll", "complete"])


def plain(kind: str, logits: Tensor, image: Tensor, mask: Tensor, covariance) -> tuple[Tensor, Tensor]:
    """The values and the means, as the formulas are written."""
    log_resp = logits.log_softmax(1)
    mixture = m_step(image, log_resp.exp(), mask, covariance=covariance, floor=FLOOR)
    if kind == "complete":
        surprise = -(log_resp.exp() * log_joint(image, mixture)).sum(1, keepdim=True)
        return masked_mean(surprise, mask), mixture.means
    weights = log_resp if kind == "nll_v" else log_shares(log_resp, mask)
    return nll(image, mask, mixture, weights), mixture.means


@each_kind
@each_covariance
@each_shape
def test_values_and_gradients_are_those_of_the_plain_formulas(kind, covariance, shape):
    logits, image, mask = scene(shape)
    image = 40 + 3 * image
    mask[0, 0, :2] = 0  # the box around the masks is not the image
    found = []
    for fast in (True, False):
        leaf = logits.clone().requires_grad_()
        if fast:
            seen = voxels(image, mask, covariance, FLOOR)
            values, mean, moments = likelihood(leaf, seen, kind)
            means = seen.statistics.original(sufficient.estimate(moments, seen.statistics, seen.floor)).means
        else:
            values, means = plain(kind, leaf, image, mask, covariance)
            mean = values.mean()
        # All ways in which a loss uses them, with another weight for each image.
        (mean + values * torch.tensor([1.0, -2.5]) + (means - 39).square().sum((1, 2))).sum().backward()
        found.append((values.detach(), leaf.grad))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9)
    assert found[0][1].abs().max() > 1e-3


def test_the_coefficients_of_variances_by_hand_are_those_of_autograd_also_where_a_variance_is_rounded_to_zero():
    logits, image, mask = scene()
    seen = voxels(image, mask, "diag", FLOOR)
    moments = (logits.softmax(1).flatten(2)[..., : seen.share.shape[-1]] @ seen.statistics.features.mT).requires_grad_()
    with torch.no_grad():
        moments[0, 0, 0] = -1e-3  # less than the square of its mean
    wanted = sufficient.coefficients(sufficient.estimate(moments, seen.statistics, seen.floor), seen.statistics)
    theta, pullback = coefficients(moments.detach(), seen)
    torch.testing.assert_close(theta, wanted.detach())
    direction = torch.linspace(-1, 2, theta.numel()).double().view_as(theta)
    torch.testing.assert_close(pullback(direction), torch.autograd.grad(wanted, moments, direction)[0])


@each_kind
def test_a_gradient_of_the_gradient_is_refused(kind):
    logits, image, mask = scene()
    values, *_ = likelihood(logits.requires_grad_(), voxels(image, mask, "diag", FLOOR), kind)
    (gradient,) = torch.autograd.grad(values.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("offset", [0.0, 5.0, 1e4])
def test_equal_values_have_a_deviation_of_one_and_others_their_own(offset):
    _, image, mask = scene((9, 11), dtype=torch.float32)
    image[:, 0] = offset
    image[:, 1] += offset
    scale = voxels(image, mask, "diag", FLOOR).statistics.scale
    assert scale[:, 0].tolist() == [1, 1]
    inside = image[:, 1][mask[:, 0] > 0].double()
    assert math.isclose(float(scale[:, 1].mean()), float(inside.std()), rel_tol=0.1)
