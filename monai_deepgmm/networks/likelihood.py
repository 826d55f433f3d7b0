"""The likelihood of images under the mixture that a network's output implies, and its gradient, in one pass.

Autograd would keep a dozen arrays of voxels × components and read each of them again. Here the forward pass already
knows the gradient: everything that is as large as the voxels is a softmax or a matrix product on the sufficient
statistics, and what lies between the moments and the coefficients of the densities has a few numbers per component.
The gradients are those of the logits; the image and the mask are data, and nothing here is differentiated twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.bounding_box import Box, enclosing, within
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
    inside = mask[within(box)].to(image.dtype).ceil().clamp_(0, 1)  # one of parts of voxels, too; sign takes long
    x, inside = (image[within(box)] * inside).flatten(2), inside.flatten(2)
    count = inside.sum(-1).clamp_min_(1)
    centre = x.sum(-1) / count
    x.addcmul_(centre[..., None], inside, value=-1)
    deviation = torch.linalg.vector_norm(x, dim=-1).div_(count.sqrt())
    # Of equal values the computed mean is off by a few roundings, so their deviation is seldom exactly zero.
    scale = deviation.masked_fill_(deviation <= centre.abs().mul_(16 * torch.finfo(x.dtype).eps), 1)
    if covariance == "spherical":
        scale = scale.amax(1, keepdim=True).expand_as(scale)
    statistics = sufficient.of_centred(x, inside, scale, covariance)._replace(centre=centre)
    return Voxels(box, inside.div_(count[..., None]), statistics, (scale * scale).reciprocal_().mul_(floor))


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
    variance = square.addcmul(mean, mean, value=-1)
    precision = variance.clamp_min(0).add_(floor[:, None]).reciprocal_()
    linear = mean * precision
    constant = precision.log().addcmul_(linear, mean, value=-1).sum(-1, keepdim=True)
    factors, offsets = _factors(m, moments.dtype, moments.device)

    def pullback(gradient: Tensor) -> Tensor:
        quadratic, slope, offset = gradient[..., :m], gradient[..., m:-1], gradient[..., -1:]
        away = slope.addcmul(offset, mean, value=-1)
        spread = quadratic.addcmul(slope + away, mean, value=-1)
        twice_of_square = spread.mul_(precision).sub_(offset).mul_(precision).masked_fill_(variance < 0, 0)
        of_mean = away.mul_(precision).addcmul_(twice_of_square, mean, value=-1)
        both = torch.cat([twice_of_square * 0.5, of_mean], -1).div_(count)
        return torch.cat([both, (both * expected).sum(-1, keepdim=True).neg_()], -1)

    return torch.addcmul(offsets, torch.cat([precision, linear, constant], -1), factors), pullback


@functools.cache
def _factors(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What ``(1/σ², μ/σ², Σ log 1/σ² − μ²/σ²)`` of m sequences are multiplied by to be θ, and what is added."""
    factors, offsets = torch.ones(2, 2 * m + 1, dtype=torch.float64)
    factors[:m], factors[-1] = -0.5, 0.5
    offsets[:-1], offsets[-1] = 0, -0.5 * m * math.log(2 * math.pi)
    return factors.to(device, dtype), offsets.to(device, dtype)


# Functions of the logits ---------------------------------------------------------------------------------------------


def likelihood(logits: Tensor, seen: Voxels, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """What each image costs under the mixture of an M-step from w = softmax(logits), per voxel.

    Computed from log w where the components are summed out, so that one far behind still has a gradient.

    Args:
        logits: ``(B, K, *S)``.
        seen: the voxels.
        kind: nll_v (S §2.1), nll (S eq. 2), or complete, the expected complete-data NLL (M eq. 3.2, with the constant).

    Returns:
        The values ``(B,)``, their mean, and the moments of the M-step ``(B, K, F)``. With nll and nll_v every component
        must have a share above 0: else the values are not to be used.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Likelihood.apply(logits, seen, kind)  # type: ignore[no-untyped-call]
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


class Output(NamedTuple):
    """What a network says of the voxels of the box.

    Attributes:
        logits: less the highest of each voxel ``(B, K, N)``.
        total: the sum of their exponentials ``(B, 1, N)``.
        resp: w ``(B, K, N)``.
    """

    logits: Tensor
    total: Tensor
    resp: Tensor

    @classmethod
    def of(cls, logits: Tensor, box: Box) -> Output:
        """That of ``(B, K, *S)``; in steps of its own a softmax over few components takes half as long."""
        given = logits[within(box)]
        given = (given - given.amax(1, keepdim=True)).flatten(2)
        resp = given.exp()
        total = resp.sum(1, keepdim=True)
        return cls(given, total, resp.div_(total))


class _Likelihood(torch.autograd.Function):
    """See ``likelihood``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, seen: Voxels, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
        output = Output.of(logits, seen.box)
        moments = torch.bmm(output.resp, seen.statistics.features.mT)
        found = KINDS[kind](output, moments, seen)
        ctx.save_for_backward(output.resp, found.of_moments, found.of_log_resp)
        ctx.seen, ctx.shape = seen, logits.shape
        ctx.set_materialize_grads(False)
        values = seen.statistics.scale.log().sum(1).sub_(found.values)
        return values, values.mean(), moments

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_values: Tensor | None, of_mean: Tensor | None, of_moments: Tensor | None
    ) -> tuple[Tensor, None, None]:
        resp, through, direct = ctx.saved_tensors
        back = resp.new_zeros(()) if of_mean is None else of_mean / -len(resp)
        if of_values is not None:
            back = back - of_values[:, None, None]
        gradient = through * back if of_moments is None else through * back + of_moments
        with torch.autocast(resp.device.type, enabled=False):
            of_log = torch.bmm(gradient, ctx.seen.statistics.features).mul_(resp)
        if direct is not None:
            of_log.addcmul_(direct, back)
        of_log.addcmul_(resp, of_log.sum(1, keepdim=True), value=-1)  # from log w to the logits
        found = resp.new_zeros(ctx.shape)
        part = found[within(ctx.seen.box)]
        part.copy_(of_log.view(part.shape))
        return found, None, None


def _posterior(joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log joint densities ``(B, K, N)``, which are overwritten: exponentials, their sum, and what was taken off."""
    highest = joint.amax(1, keepdim=True)
    ratio = joint.sub_(highest).exp_()
    return ratio, ratio.sum(1, keepdim=True), highest


def _nll_v(output: Output, moments: Tensor, seen: Voxels) -> Found:
    """With Π = w."""
    features = seen.statistics.features
    theta, pullback = coefficients(moments, seen)
    posterior, total, highest = _posterior(torch.bmm(theta, features).add_(output.logits))
    posterior *= seen.share / total
    evidence = total.div_(output.total).log_().add_(highest)
    of_theta = torch.bmm(posterior, features.mT)
    return Found(torch.bmm(evidence, seen.share.mT).flatten(), pullback(of_theta), posterior)


def _nll(output: Output, moments: Tensor, seen: Voxels) -> Found:
    """With π the mean of w."""
    features = seen.statistics.features
    theta, pullback = coefficients(moments, seen)
    outside = features[:, -1:] == 0
    log_resp = (output.logits - output.total.log()).masked_fill_(outside, torch.finfo(moments.dtype).min / 2)
    log_weights = log_resp.logsumexp(-1, keepdim=True)
    log_count = features[:, -1:].sum(-1, keepdim=True).clamp_min(1).log()
    log_joint = torch.cat([theta[..., :-1], theta[..., -1:] + log_weights - log_count], -1)
    posterior, total, highest = _posterior(torch.bmm(log_joint, features))
    posterior *= seen.share / total
    of_theta = torch.bmm(posterior, features.mT)
    direct = log_resp.sub_(log_weights).exp_().masked_fill_(outside, 0).mul_(of_theta[..., -1:])
    return Found(torch.bmm(total.log_().add_(highest), seen.share.mT).flatten(), pullback(of_theta), direct)


def _complete(output: Output, moments: Tensor, seen: Voxels) -> Found:
    """With π the mean of w, which also weighs the components' log densities: linear in the moments but for θ and π."""
    theta, pullback = coefficients(moments, seen)
    least = torch.finfo(moments.dtype).tiny
    count = moments[..., -1:]
    total = count.sum(1, keepdim=True).clamp_min(1)
    log_joint = torch.cat([theta[..., :-1], theta[..., -1:] + (count / total).clamp_min(least).log()], -1)
    return Found((log_joint * moments / total).sum((1, 2)), (log_joint + pullback(moments)) / total, None)


#: Each of them made of the output, the moments and the voxels.
KINDS: Mapping[Kind, Callable[[Output, Tensor, Voxels], Found]] = {
    "nll_v": _nll_v,
    "nll": _nll,
    "complete": _complete,
}
