"""The loss family of Ma 2022 (M): the expected complete-data likelihood, total variation, a bias field, a few labels.

Where ``nll_loss.MixtureNLL`` sums the components out, L_GMM takes the network's softmax s for the posterior and weighs
each component's log density with it (M eq. 3.2): the function that EM's M-step maximises. They differ by the entropy
of s when s is the posterior: ``−L_GMM − (M/2) log 2π + H(s) = log-likelihood``.

Everything is per voxel, the mean over the mask, where M has sums. Divided by N, both sums of L_GMM_TV shrink alike, so
γ keeps its value; β, which stands beside a cross-entropy per voxel, becomes β·N: the paper's 1e-10 is 6.6e-6 for an
image of 256×256 voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from monai_deepgmm.mixture import bias_field
from monai_deepgmm.mixture.gaussian import (
    COVARIANCES,
    VARIANCE_FLOOR,
    Covariance,
    Mixture,
    log_joint,
    m_step,
    masked_mean,
    unknown,
)
from monai_deepgmm.mixture.statistics import estimate
from monai_deepgmm.networks.likelihood import likelihood, voxels
from monai_deepgmm.networks.nll_loss import Regulariser, Term, parts
from monai_deepgmm.networks.registry import finest

#: A voxel whose label is not known.
IGNORE = -1


def l_gmm(image: Tensor, resp: Tensor, mask: Tensor, mixture: Mixture) -> Tensor:
    """L_GMM, and L_GMM_B with a mixture that has a field (M eq. 3.2, 3.7), without the constant C, per voxel.

    ``−(1/|Ω|) Σ_k Σ_i s_ik [log π_k − ½ log|Σ_k| − ½ (x_i − b_i μ_k)ᵀ Σ_k⁻¹ (x_i − b_i μ_k)]``.

    s weighs the terms, and so their gradients: a component 120 logits behind has one of about e⁻¹²⁰ however it is
    computed. ``nll_loss.MixtureNLL`` is the loss that still pulls there.

    Args:
        image: ``(B, M, *S)``.
        resp: s ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        mixture: π, μ, Σ and perhaps b; the paper's are those of an M-step from s.

    Returns:
        One value per image ``(B,)``; 0 where the mask is empty.
    """
    constant = 0.5 * image.shape[1] * math.log(2 * math.pi)
    return masked_mean(-(resp * (log_joint(image, mixture) + constant)).sum(1, keepdim=True), mask)


def total_variation(resp: Tensor, mask: Tensor) -> Tensor:
    """``(1/|Ω|) Σ_k Σ_i Σ_axes |s_k(x_i + e_axis) − s_k(x_i)|``: the anisotropic total variation, of M eq. 3.4's |∇s|.

    The paper leaves the norm of ∇s open. This is the sum of its absolute components, differences between neighbours
    along each axis that both lie inside the mask: it is exact on the mask's border, where the Euclidean norm would lack
    a component, and its gradient is bounded everywhere and exists wherever neighbours differ. The price is that oblique
    borders count more than straight ones, in 2-D by √2 at most.

    Args:
        resp: s ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.

    Returns:
        One value per image ``(B,)``; 0 where the mask is empty.
    """
    inside = (mask > 0).to(resp.dtype)
    total = resp.new_zeros(len(resp))
    for axis in range(2, resp.ndim):
        both = inside.narrow(axis, 1, inside.shape[axis] - 1) * inside.narrow(axis, 0, inside.shape[axis] - 1)
        total = total + (resp.diff(dim=axis).abs() * both).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp_min(1)


def shaded(
    image: Tensor, resp: Tensor, mask: Tensor, *, degree: int, rounds: int = 2, covariance: Covariance = "diag"
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
    """
    mixture = m_step(image, resp, mask, covariance=covariance)
    functions = bias_field.basis(mask, degree)
    for _ in range(rounds):
        mixture = bias_field.m_step(image, resp, mask, mixture, functions, covariance=covariance)
    return mixture


class GMMLoss(nn.Module):
    """L_GMM_TV (M eq. 3.4), shaded where ``degree`` is above 0 (M eq. 3.7), plus terms; the mean over the images.

    Called as ``nll_loss.MixtureNLL``: ``loss(logits, cat([image, mask], 1))``. With a degree the image must be on a
    scale where 0 is no signal. Computed in single precision at least, whatever the network ran in.

    Args:
        gamma: γ of the total variation.
        degree: P of the field; 0: none.
        covariance: the shape of Σ.
        rounds: see ``shaded``.
        terms: regularisers with their weights.

    Raises:
        ValueError: there is no such covariance.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.0,
        degree: int = 0,
        covariance: Covariance = "diag",
        rounds: int = 2,
        terms: Sequence[Term | tuple[float, Regulariser]] = (),
    ) -> None:
        super().__init__()
        if covariance not in COVARIANCES:
            raise unknown(covariance)
        self.gamma, self.degree, self.covariance, self.rounds = gamma, degree, covariance, rounds
        self.terms = tuple(Term(*term) for term in terms)
        # Regularisers that are modules follow the loss to its device.
        self.regularisers = nn.ModuleList(t.regulariser for t in self.terms if isinstance(t.regulariser, nn.Module))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, M + 1, *S)`` → a scalar."""
        with torch.autocast(logits.device.type, enabled=False):
            logits, image, mask = parts(logits, target)
            resp = logits.softmax(1) if self.degree or self.gamma or self.terms else logits
            if self.degree:
                mixture = self.mixture(image, resp, mask)
                loss = l_gmm(image, resp, mask, mixture).mean()
            else:
                values, found = self.each(logits, image, mask)
                loss = values.mean()
            if self.gamma:
                loss = loss + self.gamma * total_variation(resp, mask).mean()
            for weight, regulariser in self.terms:
                if not self.degree:
                    mixture = found()
                loss = loss + weight * regulariser(mixture, resp, image, mask)
        return loss

    def each(self, logits: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[], Mixture]]:
        """L_GMM of each image ``(B,)`` without a field, and what gives the mixture; differentiable in the logits, once.

        ``Σ_i s_ik log g(x_i)`` is linear in the moments ``Σ_i s_ik φ(x_i)`` that the M-step needs, so that one matrix
        product serves both.
        """
        seen = voxels(image, mask, self.covariance, VARIANCE_FLOOR)
        values, _, found = likelihood(logits, seen, "complete")
        constant = 0.5 * image.shape[1] * math.log(2 * math.pi) * (mask.flatten(1).sum(1) > 0).to(values)
        return values - constant, lambda: seen.statistics.original(estimate(found, seen.statistics, seen.floor))

    def mixture(self, image: Tensor, resp: Tensor, mask: Tensor) -> Mixture:
        """(π, μ, Σ) of M eq. 3.3, or with ω of M eq. 3.8."""
        if not self.degree:
            return m_step(image, resp, mask, covariance=self.covariance)
        return shaded(image, resp, mask, degree=self.degree, rounds=self.rounds, covariance=self.covariance)


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
