"""The loss family of Ma 2022 (M): the expected complete-data likelihood, total variation, a bias field, a few labels.

Where ``losses.MixtureNLL`` sums the components out, L_GMM takes the network's softmax s for the posterior and weighs
each component's log density with it (M eq. 3.2): the function that EM's M-step maximises. They differ by the entropy
of s when s is the posterior: ``−L_GMM − (M/2) log 2π + H(s) = log-likelihood``.

Everything is per voxel by default, the mean over the mask, where M has sums. Divided by N, both sums of L_GMM_TV
shrink alike, so γ keeps its value; β, which stands beside a cross-entropy per voxel, becomes β·N: the paper's 1e-10 is
6.6e-6 for an image of 256×256 voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Covariance, Mixture, log_joint, m_step, masked_mean
from monai_deepgmm.networks.nll_loss import Regulariser, Term, parts
from monai_deepgmm.networks.registry import finest

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
#: A voxel whose label is not known.
IGNORE = -1


def l_gmm(image: Tensor, resp: Tensor, mask: Tensor, mixture: Mixture, *, reduction: Reduction = "mean") -> Tensor:
    """L_GMM, and L_GMM_B with a mixture that has a field (M eq. 3.2, 3.7), without the constant C.

    ``−Σ_k Σ_i s_ik [log π_k − ½ log|Σ_k| − ½ (x_i − b_i μ_k)ᵀ Σ_k⁻¹ (x_i − b_i μ_k)]``.

    Args:
        image: ``(B, M, *S)``.
        resp: s ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        mixture: π, μ, Σ and perhaps b; the paper's are those of an M-step from s.
        reduction: "mean" over the mask, or the paper's "sum".

    Returns:
        One value per image ``(B,)``; 0 where the mask is empty.

    Raises:
        ValueError: ``reduction`` is not one of ``REDUCTIONS``.
    """
    constant = 0.5 * image.shape[1] * math.log(2 * math.pi)
    expected = -(resp * (log_joint(image, mixture) + constant)).sum(1, keepdim=True)
    return _reduced(expected, mask, reduction)


def total_variation(
    resp: Tensor, mask: Tensor, *, spacing_mm: Sequence[float] | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """``Σ_k Σ_i |∇s_k(x_i)|`` (M eq. 3.4): differences along each axis between voxels that both lie inside the mask.

    Args:
        resp: s ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        spacing_mm: of the axes in ``*S``; a difference along an axis counts by the smallest spacing over its own.
            None: all are alike.
        reduction: "mean": over the voxels of the mask; or "sum".

    Returns:
        One value per image ``(B,)``; 0 where the mask is empty.

    Raises:
        ValueError: ``reduction`` is not one of ``REDUCTIONS``.
    """
    inside = (mask > 0).to(resp.dtype)
    spacing = spacing_mm or [1.0] * (resp.ndim - 2)
    total = resp.new_zeros(len(resp))
    for axis, step in enumerate(spacing, start=2):
        n = resp.shape[axis]
        if n > 1:
            both = inside.narrow(axis, 1, n - 1) * inside.narrow(axis, 0, n - 1)
            jumps = (resp.narrow(axis, 1, n - 1) - resp.narrow(axis, 0, n - 1)).abs() * both
            total = total + min(spacing) / step * jumps.flatten(1).sum(1)
    return _scaled(total, mask, reduction)


def shaded(
    image: Tensor,
    resp: Tensor,
    mask: Tensor,
    *,
    degree: int,
    rounds: int = 2,
    covariance: Covariance = "diag",
    shared: bool = False,
    floor: float = VARIANCE_FLOOR,
) -> Mixture:
    """The mixture of an M-step from s with a bias field (M eq. 3.8), differentiable in s.

    The field needs μ and Σ, and they need the field: the rounds begin at b = 1, and none raises L_GMM_B.

    Args:
        image: ``(B, M, *S)``, on a scale where 0 is no signal.
        resp: s ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        degree: P, the highest degree of the field's polynomials.
        rounds: how many times ω, μ and Σ are found in turn.
        covariance: the shape of Σ.
        shared: one field for all sequences, as in the paper.
        floor: the variance floor.
    """
    mixture = m_step(image, resp, mask, covariance=covariance, floor=floor)
    functions = bias.basis(mask, degree)
    for _ in range(rounds):
        mixture = bias.m_step(image, resp, mask, mixture, functions, covariance=covariance, shared=shared, floor=floor)
    return mixture


class GMMLoss(nn.Module):
    """L_GMM_TV (M eq. 3.4), shaded where ``degree`` is above 0 (M eq. 3.7), plus terms; the mean over the images.

    Called as ``losses.MixtureNLL``: ``loss(logits, cat([image, mask], 1))``. With a degree the image must be on a scale
    where 0 is no signal. Computed in single precision at least, whatever the network ran in.

    Args:
        gamma: γ of the total variation.
        degree: P of the field; 0: none.
        covariance: the shape of Σ.
        rounds: see ``shaded``.
        shared: one field for all sequences.
        reduction: "mean" over the mask, or the paper's "sum".
        terms: regularisers with their weights.
        spacing_mm: of the voxels, for the total variation; None: cubes.
        floor: the variance floor.

    Raises:
        ValueError: ``reduction`` is not one of ``REDUCTIONS``.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.0,
        degree: int = 0,
        covariance: Covariance = "diag",
        rounds: int = 2,
        shared: bool = False,
        reduction: Reduction = "mean",
        terms: Sequence[Term | tuple[float, Regulariser]] = (),
        spacing_mm: Sequence[float] | None = None,
        floor: float = VARIANCE_FLOOR,
    ) -> None:
        super().__init__()
        _check(reduction)
        self.gamma, self.degree, self.covariance, self.rounds = gamma, degree, covariance, rounds
        self.shared, self.reduction, self.spacing_mm, self.floor = shared, reduction, spacing_mm, floor
        self.terms = tuple(Term(*term) for term in terms)
        # Regularisers that are modules follow the loss to its device.
        self.regularisers = nn.ModuleList(t.regulariser for t in self.terms if isinstance(t.regulariser, nn.Module))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, M + 1, *S)`` → a scalar."""
        with torch.autocast(logits.device.type, enabled=False):
            resp, image, mask = parts(logits, target)
            mixture = self.mixture(image, resp, mask)
            loss = l_gmm(image, resp, mask, mixture, reduction=self.reduction).mean()
            if self.gamma:
                rough = total_variation(resp, mask, spacing_mm=self.spacing_mm, reduction=self.reduction)
                loss = loss + self.gamma * rough.mean()
            for weight, regulariser in self.terms:
                loss = loss + weight * regulariser(mixture, resp, image, mask)
        return loss

    def mixture(self, image: Tensor, resp: Tensor, mask: Tensor) -> Mixture:
        """(π, μ, Σ) of M eq. 3.3, or with ω of M eq. 3.8."""
        if not self.degree:
            return m_step(image, resp, mask, covariance=self.covariance, floor=self.floor)
        return shaded(
            image,
            resp,
            mask,
            degree=self.degree,
            rounds=self.rounds,
            covariance=self.covariance,
            shared=self.shared,
            floor=self.floor,
        )


class LabelCrossEntropy(nn.Module):
    """L_CE of M eq. 3.5: the cross-entropy to labels, of each image the mean over its labelled voxels.

    The target is ``(B, 1, *S)``, indices 0 … K−1, and ``IGNORE`` where nothing is known: outside the mask, beside
    scribbles, in images without labels. An image without any labelled voxel costs nothing.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, 1, *S)`` → a scalar, the mean over all images."""
        with torch.autocast(logits.device.type, enabled=False):
            precision = torch.float64 if target.dtype == torch.float64 else torch.float32
            labels = target.round().long()
            known = (labels != IGNORE).to(precision)
            surprise = -logits.to(precision).log_softmax(1).gather(1, labels.clamp_min(0))
            return masked_mean(surprise, known).mean()


class TotalLoss(nn.Module):
    """L_Total = α L_CE + β L_GMM_TV (M eq. 3.5), α only for images with labels.

    The target is the other loss's with the labels behind it: ``cat([image, mask, labels], 1)``; the labels are one
    channel, as in ``LabelCrossEntropy``.

    Args:
        loss: the label-free loss of every image, such as ``GMMLoss``.
        alpha: α, of images with labels.
        beta: β, per voxel; 0: the loss is never computed.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.loss, self.labelled = loss, LabelCrossEntropy()
        self.alpha, self.beta = alpha, beta

    @property
    def epoch(self) -> int:
        """The other loss's, where it counts them."""
        return int(getattr(self.loss, "epoch", 1))

    @epoch.setter
    def epoch(self, number: int) -> None:
        if hasattr(self.loss, "epoch"):
            self.loss.epoch = number

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, C + 1, *S)`` → a scalar; of several outputs, the first is the finest."""
        logits = finest(logits)
        loss = logits.new_zeros((), dtype=target.dtype)
        if self.alpha:
            loss = loss + self.alpha * self.labelled(logits, target[:, -1:])
        if self.beta:
            loss = loss + self.beta * self.loss(logits, target[:, :-1])
        return loss


def _check(reduction: Reduction) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} (choose one of {', '.join(REDUCTIONS)})")


def _reduced(values: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """``(B, 1, *S)`` → ``(B,)``."""
    return _scaled((values * mask).flatten(1).sum(1), mask, reduction)


def _scaled(total: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """Sums over the mask ``(B,)``, or the means."""
    _check(reduction)
    return total if reduction == "sum" else total / mask.flatten(1).sum(1).clamp_min(1)
