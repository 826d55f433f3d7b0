"""Losses that train a network without labels: the mixture's likelihood, and regularisers added to it.

The network's output w takes the place of the E-step: an M-step from w gives (π, μ, Σ), and the loss is the negative
log-likelihood of the image under them (S §3, Alg. 3 and 4). Gradients flow through the M-step.

A loss is called as MONAI's trainers call theirs, ``loss(logits, target)``; since it looks at the image and needs the
mask, the target is both of them, one after the other along the channels: ``cat([image, mask], 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monai_deepgmm.mixture.gaussian import (
    COVARIANCES,
    VARIANCE_FLOOR,
    Covariance,
    Mixture,
    log_shares,
    m_step,
    masked_mean,
    nll,
    unknown,
)
from monai_deepgmm.mixture.statistics import estimate
from monai_deepgmm.networks.likelihood import Voxels, likelihood, voxels
from monai_deepgmm.networks.registry import finest

#: A regulariser r(Π, μ, Σ): ``(mixture, resp, image, mask)`` → a scalar.
Regulariser = Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]


class Term(NamedTuple):
    """One regulariser of a weighted sum, ``weight · regulariser``."""

    weight: float
    regulariser: Regulariser


def parts(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, image and mask of ``(logits, cat([image, mask], 1))``, in single precision at least."""
    precision = torch.float64 if target.dtype == torch.float64 else torch.float32
    return logits.to(precision), target[:, :-1].to(precision), target[:, -1:].to(precision)


class MixtureNLL(nn.Module):
    """NLL (S eq. 2) or NLL_V (S §2.1) of each image under the mixture that the network's output implies, plus terms.

    Computed in single precision at least, whatever the network ran in, and from the logarithms of the weights, so that
    a component far behind still has a gradient.

    Args:
        spatial: NLL_V, with Π the network's output; else NLL, with π its mean over the mask.
        covariance: the shape of Σ.
        terms: regularisers with their weights, λ r(Π, μ, Σ).
        floor: the variance floor.

    Raises:
        ValueError: there is no such covariance.
    """

    def __init__(
        self,
        *,
        spatial: bool = True,
        covariance: Covariance = "diag",
        terms: Sequence[Term | tuple[float, Regulariser]] = (),
        floor: float = VARIANCE_FLOOR,
    ) -> None:
        super().__init__()
        if covariance not in COVARIANCES:
            raise unknown(covariance)
        self.spatial, self.covariance, self.floor = spatial, covariance, floor
        self.terms = tuple(Term(*term) for term in terms)
        # Regularisers that are modules follow the loss to its device.
        self.regularisers = nn.ModuleList(t.regulariser for t in self.terms if isinstance(t.regulariser, nn.Module))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, M + 1, *S)`` → a scalar: the mean over the images, and the terms."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.both(*parts(logits, target))[0]

    def both(self, logits: Tensor, image: Tensor, mask: Tensor, seen: Voxels | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and the NLL of each image ``(B,)``, which is 0 where the mask is empty.

        They are differentiable in the logits, once; ``seen`` is what ``voxels`` makes of the image and the mask.
        """
        seen = seen or self.voxels(image, mask)
        values, loss, found = likelihood(logits, seen, "nll_v" if self.spatial else "nll")
        mixture = None
        if not found.detach()[..., -1].amin() > 0:
            # The mean of a component without any voxel is 0 on the image's own scale, where no subtraction cancels.
            log_resp = logits.log_softmax(1)
            mixture = m_step(image, log_resp.exp(), mask, covariance=self.covariance, floor=self.floor)
            values = nll(image, mask, mixture, log_resp if self.spatial else log_shares(log_resp, mask))
            loss = values.mean()
        if self.terms:
            resp = logits.softmax(1)
            mixture = mixture or seen.statistics.original(estimate(found, seen.statistics, seen.floor))
            mixture = mixture._replace(weights=resp) if self.spatial else mixture
            for weight, regulariser in self.terms:
                loss = loss + weight * regulariser(mixture, resp, image, mask)
        return loss, values

    def voxels(self, image: Tensor, mask: Tensor) -> Voxels:
        """What the loss looks at of images, the same in every step."""
        return voxels(image, mask, self.covariance, self.floor)

    def mixture(self, image: Tensor, resp: Tensor, mask: Tensor) -> Mixture:
        """The M-step from the network's output (S Alg. 3 lines 3 and 6)."""
        return m_step(image, resp, mask, covariance=self.covariance, spatial=self.spatial, floor=self.floor)


class MeanPrior(nn.Module):
    """r(μ) = ‖μ − μ_data‖² (S §4.2).

    Args:
        means: μ_data ``(K, M)``, on the image's scale. Where a value is NaN the mean is free.
    """

    means: Tensor

    def __init__(self, means: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("means", torch.as_tensor(means, dtype=torch.float64), persistent=False)

    def forward(self, mixture: Mixture, resp: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """A scalar; images with an empty mask have no means and do not count."""
        wanted = self.means.to(mixture.means)
        known = ~wanted.isnan()
        counted = (mask.flatten(1).sum(1) > 0).to(mixture.means.dtype)[:, None, None]
        squared = torch.where(known, mixture.means - wanted.nan_to_num(), 0).square() * counted
        return squared.sum() / counted.sum().clamp_min(1)


class StartCrossEntropy(nn.Module):
    """The cross-entropy to a map of where each tissue is expected, per voxel: how a network is brought to a start.

    The target is ``cat([expected, mask], 1)`` with the expected map ``(B, K, *S)``.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, K + 1, *S)`` → a scalar."""
        expected, mask = target[:, :-1], target[:, -1:]
        with torch.autocast(logits.device.type, enabled=False):
            surprise = -(expected * logits.to(expected.dtype).log_softmax(1)).sum(1, keepdim=True)
            return masked_mean(surprise, mask).mean()


class Staged(nn.Module):
    """A loss that begins as the cross-entropy to a start and then becomes another, such as ``MixtureNLL``.

    The target is ``cat([image, mask, expected], 1)``; ``epoch`` is set by whoever counts the epochs, from 1.

    Args:
        loss: called with ``cat([image, mask], 1)``.
        start_epochs: epochs of the cross-entropy alone.
        start_weight: how much of the cross-entropy is kept afterwards, as a prior on Π.
    """

    def __init__(self, loss: nn.Module, *, start_epochs: int = 0, start_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.teacher = loss, StartCrossEntropy()
        self.start_epochs, self.start_weight = start_epochs, start_weight
        self.epoch = 1

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """``(B, K, *S)`` and ``(B, M + 1 + K, *S)`` → a scalar; of several outputs, the first is the finest."""
        logits = finest(logits)
        scan, expected = target[:, : -logits.shape[1]], target[:, -logits.shape[1] :]
        place: Tensor | float = 0.0
        if self.epoch <= self.start_epochs or self.start_weight:
            place = self.teacher(logits, torch.cat([expected, scan[:, -1:]], 1))
        if self.epoch <= self.start_epochs:
            return torch.as_tensor(place)
        out: Tensor = self.loss(logits, scan) + self.start_weight * place
        return out
