"""The likelihood of images under the mixture that a network's output implies, and its gradient, in one pass.

Autograd would keep a dozen arrays of voxels × components and read each of them again. Here the forward pass already
knows the gradient: everything that is as large as the voxels is a softmax or a matrix product on the sufficient
statistics, and what lies between the moments and the coefficients of the densities has a few numbers per component.
The gradients are those of the logits; the image and the mask are data, and nothing here is differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.bounding_box import Box, cut, enclosing, paste
from monai_deepgmm.mixture.gaussian import Covariance
from monai_deepgmm.mixture.statistics import Statistics

#: The NLL of an image with maps of weights, with one weight per component, and the expected complete-data NLL.
Kind = Literal["nll_v", "nll", "complete"]
#: Moments → the coefficients θ, and what takes a gradient of θ to one of the moments.
Coefficients = tuple[Tensor, Callable[[Tensor], Tensor]]


class Voxels(NamedTuple):
    """What of a batch of images counts.

    Attributes:
        box: around all masks; on a GPU, which would have to wait for it, the whole image.
        share: of each voxel of the box in its image's mean ``(B, 1, N)``; 0 outside the mask.
        statistics: of the voxels of the box, standardised; 0 outside the mask.
        floor: of the variances ``(B, M)``, on the standardised scale.
    """

    box: Box
    share: Tensor
    statistics: Statistics
    floor: Tensor


def voxels(image: Tensor, mask: Tensor, covariance: Covariance, floor: float) -> Voxels:
    """The voxels of images ``(B, M, *S)`` inside masks ``(B, 1, *S)``; the floor is on the images' own scale."""
    box = enclosing(mask) if mask.device.type == "cpu" else tuple(slice(0, n) for n in mask.shape[2:])
    inside = cut(mask, box).flatten(2).to(image.dtype).clamp_min(0).sign_()
    x = cut(image, box).flatten(2) * inside
    count = inside.sum(-1).clamp_min(1)
    centre = x.sum(-1) / count
    x.sub_(centre[..., None]).mul_(inside)
    deviation = torch.linalg.vector_norm(x, dim=-1) / count.sqrt()
    # Of equal values the computed mean is off by a few roundings, so their deviation is seldom exactly zero.
    scale = torch.where(deviation > 16 * torch.finfo(x.dtype).eps * centre.abs(), deviation, 1.0)
    if covariance == "spherical":
        scale = scale.amax(1, keepdim=True).expand_as(scale)
    x /= scale[..., None]
    statistics = sufficient.of_standardised(x, inside, covariance)._replace(centre=centre, scale=scale)
    return Voxels(box, inside.div_(count[..., None]), statistics, floor / scale.square())


# Coefficients --------------------------------------------------------------------------------------------------------


def coefficients(moments: Tensor, seen: Voxels) -> Coefficients:
    """The coefficients θ ``(B, K, F)`` of the densities of an M-step with these moments, and its pullback.

    Args:
        moments: ``Σ_x w_xk φ(x)`` ``(B, K, F)``.
        seen: the voxels x.
    """
    if seen.statistics.covariance == "diag":
        return _diagonal(moments, seen.floor)
    with torch.enable_grad():
        leaf = moments.detach().requires_grad_()
        theta = sufficient.coefficients(sufficient.estimate(leaf, seen.statistics, seen.floor), seen.statistics)
    return theta.detach(), lambda gradient: torch.autograd.grad(theta, leaf, gradient)[0]


def _diagonal(moments: Tensor, floor: Tensor) -> Coefficients:
    """Those of variances, by hand: autograd takes three times as long for numbers so few."""
    m = floor.shape[-1]
    count = moments[..., -1:].clamp_min(torch.finfo(moments.dtype).tiny ** 0.5)
    expected = moments[..., :-1] / count  # E[x²], E[x]
    square, mean = expected[..., :m], expected[..., m:]
    variance = square - mean * mean
    precision = 1 / (variance.clamp_min(0) + floor[:, None])
    linear = mean * precision
    constant = (linear * mean - precision.log()).sum(-1, keepdim=True).add_(m * math.log(2 * math.pi)).mul_(-0.5)

    def pullback(gradient: Tensor) -> Tensor:
        quadratic, slope, offset = gradient[..., :m], gradient[..., m:-1], gradient[..., -1:]
        of_precision = slope * mean - 0.5 * (quadratic + offset * (mean * mean - 1 / precision))
        of_square = -of_precision * precision * precision * (variance >= 0)
        of_mean = (slope - offset * mean) * precision - 2 * of_square * mean
        both = torch.cat([of_square, of_mean], -1) / count
        return torch.cat([both, -(both * expected).sum(-1, keepdim=True)], -1)

    return torch.cat([-0.5 * precision, linear, constant], -1), pullback


# Functions of the logits ---------------------------------------------------------------------------------------------


def likelihood(logits: Tensor, seen: Voxels, kind: Kind) -> tuple[Tensor, Tensor]:
    """What each image costs under the mixture of an M-step from w = softmax(logits), per voxel.

    Computed from log w where the components are summed out, so that one far behind still has a gradient.

    Args:
        logits: ``(B, K, *S)``.
        seen: the voxels.
        kind: nll_v (S §2.1), nll (S eq. 2), or complete, the expected complete-data NLL (M eq. 3.2, with the constant).

    Returns:
        The values ``(B,)`` and the moments of the M-step ``(B, K, F)``. With nll and nll_v every component must have a
        share above 0: else the values are not to be used.
    """
    found: tuple[Tensor, Tensor] = _Likelihood.apply(logits, seen, kind)  # type: ignore[no-untyped-call]
    return found


class Found(NamedTuple):
    """What the forward pass finds.

    Attributes:
        values: of each image ``(B,)``, with the sign turned.
        of_moments: their gradient with respect to the moments ``(B, K, F)``.
        of_log_resp: and to log w, at these moments ``(B, K, N)``; None: it has none.
    """

    values: Tensor
    of_moments: Tensor
    of_log_resp: Tensor | None


class _Likelihood(torch.autograd.Function):
    """See ``likelihood``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, seen: Voxels, kind: Kind) -> tuple[Tensor, Tensor]:
        given = cut(logits, seen.box).flatten(2)
        resp = given.softmax(1)
        moments = resp @ seen.statistics.features.mT
        found = KINDS[kind](given, resp, moments, seen)
        ctx.save_for_backward(resp, found.of_moments, found.of_log_resp)
        ctx.seen, ctx.shape = seen, logits.shape
        ctx.set_materialize_grads(False)
        return seen.statistics.scale.log().sum(1) - found.values, moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_values: Tensor | None, of_moments: Tensor | None) -> tuple[Tensor | None, None, None]:
        resp, through, direct = ctx.saved_tensors
        if of_values is None:
            of_values = resp.new_zeros(len(resp))
        back = -of_values[:, None, None]
        gradient = through * back if of_moments is None else through * back + of_moments
        with torch.autocast(resp.device.type, enabled=False):
            of_log = (gradient @ ctx.seen.statistics.features).mul_(resp)
        if direct is not None:
            of_log.addcmul_(direct, back)
        of_log.addcmul_(resp, of_log.sum(1, keepdim=True), value=-1)  # from log w to the logits
        part = of_log.view(*of_log.shape[:2], *(side.stop - side.start for side in ctx.seen.box))
        return paste(part, ctx.seen.box, ctx.shape[2:]), None, None


def _log_total(values: Tensor, softmax: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials of ``(B, K, N)``, whose softmax is known ``(B, 1, N)``."""
    return values.amax(1, keepdim=True).sub_(softmax.amax(1, keepdim=True).log_())


def _nll_v(logits: Tensor, resp: Tensor, moments: Tensor, seen: Voxels) -> Found:
    """With Π = w."""
    theta, pullback = coefficients(moments, seen)
    joint = torch.baddbmm(logits, theta, seen.statistics.features)
    posterior = joint.softmax(1)
    evidence = _log_total(joint, posterior).sub_(_log_total(logits, resp))
    posterior *= seen.share
    of_theta = posterior @ seen.statistics.features.mT
    return Found((evidence * seen.share).sum((1, 2)), pullback(of_theta), posterior)


def _nll(logits: Tensor, resp: Tensor, moments: Tensor, seen: Voxels) -> Found:
    """With π the mean of w."""
    features = seen.statistics.features
    theta, pullback = coefficients(moments, seen)
    outside = features[:, -1:] == 0
    log_resp = (logits - _log_total(logits, resp)).masked_fill_(outside, torch.finfo(logits.dtype).min / 2)
    log_weights = log_resp.logsumexp(-1, keepdim=True)
    log_count = features[:, -1:].sum(-1, keepdim=True).clamp_min(1).log()
    joint = torch.cat([theta[..., :-1], theta[..., -1:] + log_weights - log_count], -1) @ features
    posterior = joint.softmax(1)
    evidence = _log_total(joint, posterior)
    of_theta = posterior.mul_(seen.share) @ features.mT
    direct = log_resp.sub_(log_weights).exp_().masked_fill_(outside, 0).mul_(of_theta[..., -1:])
    return Found((evidence * seen.share).sum((1, 2)), pullback(of_theta), direct)


def _complete(logits: Tensor, resp: Tensor, moments: Tensor, seen: Voxels) -> Found:
    """With π the mean of w, which also weighs the components' log densities: linear in the moments but for θ and π."""
    theta, pullback = coefficients(moments, seen)
    least = torch.finfo(moments.dtype).tiny
    count = moments[..., -1:]
    total = count.sum(1, keepdim=True).clamp_min(1)
    log_joint = torch.cat([theta[..., :-1], theta[..., -1:] + (count / total).clamp_min(least).log()], -1)
    return Found((log_joint * moments / total).sum((1, 2)), (log_joint + pullback(moments)) / total, None)


#: Each of them made of the logits ``(B, K, N)``, their softmax, the moments and the voxels.
KINDS: Mapping[Kind, Callable[[Tensor, Tensor, Tensor, Voxels], Found]] = {
    "nll_v": _nll_v,
    "nll": _nll,
    "complete": _complete,
}
