"""The E-step and the M-step of packed images, as one iteration of EM uses them.

Without a field both are matrix products on sufficient statistics; with one, the means differ from voxel to voxel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field
from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.gaussian import Covariance, Mixture, log_joint, m_step, masked_mean
from monai_deepgmm.mixture.statistics import Statistics


class Expected(NamedTuple):
    """What an E-step finds.

    Attributes:
        resp: responsibilities ``(B, K, N)``, 0 in voxels that do not count.
        nll: the NLL per voxel ``(B,)``.
        evidence: log p(I(x)) ``(B, 1, N)``, up to a constant of each image.
    """

    resp: Tensor
    nll: Tensor
    evidence: Tensor

    def rows(self, index: Tensor) -> Expected:
        """Those of some of the images."""
        return Expected(*(part[index] for part in self))

    def replaced(self, index: Tensor, new: Expected) -> Expected:
        """With those of some of the images replaced."""
        return Expected(*(old.index_copy(0, index, part) for old, part in zip(self, new, strict=True)))


class Model(NamedTuple):
    """What is fitted.

    Attributes:
        covariance: the shape of Σ.
        spatial: whether the weights are maps.
        floor: of the variances, as a fraction of each sequence's inside the mask.
    """

    covariance: Covariance
    spatial: bool
    floor: float


@dataclass(frozen=True, eq=False)
class Products:
    """E- and M-steps as matrix products on standardised intensities.

    Attributes:
        model: what is fitted.
        statistics: of the voxels.
        mask: ``(B, 1, N)``.
        floor: of the variances ``(B, M)``, on the standardised scale.
        log_scale: what standardising took off the NLL ``(B,)``.
    """

    model: Model
    statistics: Statistics
    mask: Tensor
    floor: Tensor
    log_scale: Tensor

    @classmethod
    def of(cls, image: Tensor, mask: Tensor, model: Model) -> Products:
        """Those of packed images ``(B, M, N)`` and masks ``(B, 1, N)``."""
        variance = variance_inside(image, mask)
        found = sufficient.statistics(image, mask, variance.sqrt(), model.covariance)
        floor = model.floor * variance / found.scale.square()
        return cls(model, found, mask, floor, found.scale.log().sum(1))

    @property
    def image(self) -> Tensor:
        """The standardised intensities ``(B, M, N)``."""
        return self.statistics.features[:, -1 - self.floor.shape[1] : -1]

    def rows(self, index: Tensor) -> Products:
        """Those of some of the images."""
        parts = (part[index] for part in (self.mask, self.floor, self.log_scale))
        return Products(self.model, self.statistics.rows(index), *parts)

    def maximise(self, resp: Tensor, previous: Mixture | None) -> Mixture:
        """The M-step."""
        moments = resp @ self.statistics.features.mT
        found = sufficient.estimate(moments, self.statistics, self.floor)
        return found._replace(weights=resp) if self.model.spatial else found

    def expect(self, mixture: Mixture) -> Expected:
        """The E-step. No weight or responsibility is below ``sqrt(tiny)``: subnormal numbers are slow."""
        theta = sufficient.coefficients(mixture, self.statistics)
        least = torch.finfo(theta.dtype).tiny ** 0.5
        if not self.model.spatial:
            theta[..., -1] += mixture.weights.clamp_min(least).log_()
        joint = theta @ self.statistics.features
        peak = joint.amax(1, keepdim=True)
        resp = joint.sub_(peak).clamp_min_(math.log(least)).exp_()
        if self.model.spatial:  # maps weigh the densities themselves: the logarithm of a map takes as long as the rest
            resp *= mixture.weights
        total = resp.sum(1, keepdim=True).clamp_min_(least)
        resp *= self.mask / total
        if self.model.spatial:
            torch.maximum(resp, least * self.mask, out=resp)
        evidence = total.log_().add_(peak)
        return Expected(resp, self.log_scale - masked_mean(evidence, self.mask), evidence)

    def original(self, mixture: Mixture) -> Mixture:
        """The mixture on the images' own scale."""
        return self.statistics.original(mixture)


@dataclass(frozen=True, eq=False)
class Shaded:
    """E- and M-steps of a mixture whose means a bias field shades.

    Attributes:
        model: what is fitted.
        image: ``(B, M, N)``, 0 for no signal.
        mask: ``(B, 1, N)``.
        floor: of the variances ``(B, M)``.
        basis: of the field's polynomials ``(B, P, N)``.
    """

    model: Model
    image: Tensor
    mask: Tensor
    floor: Tensor
    basis: Tensor

    @classmethod
    def of(cls, image: Tensor, mask: Tensor, basis: Tensor, model: Model) -> Shaded:
        """Those of packed images ``(B, M, N)``, masks ``(B, 1, N)`` and polynomials ``(B, P, N)``."""
        return cls(model, image, mask, model.floor * variance_inside(image, mask), basis)

    def rows(self, index: Tensor) -> Shaded:
        """Those of some of the images."""
        return Shaded(self.model, *(part[index] for part in (self.image, self.mask, self.floor, self.basis)))

    def maximise(self, resp: Tensor, previous: Mixture | None) -> Mixture:
        """The M-step; the first, which has no mixture before it, has no field."""
        covariance, spatial = self.model.covariance, self.model.spatial
        if previous is None:
            found = m_step(self.image, resp, self.mask, covariance=covariance, spatial=spatial, floor=self.floor)
            return found._replace(field=torch.ones_like(self.image))
        given = (self.image, resp, self.mask, previous, self.basis)
        return bias_field.m_step(*given, covariance=covariance, spatial=spatial, floor=self.floor)

    def expect(self, mixture: Mixture) -> Expected:
        """The E-step."""
        joint = log_joint(self.image, mixture)
        evidence = joint.logsumexp(1, keepdim=True)
        return Expected((joint - evidence).exp() * self.mask, -masked_mean(evidence, self.mask), evidence)

    def original(self, mixture: Mixture) -> Mixture:
        """The mixture itself."""
        return mixture


def reseed(image: Tensor, mask: Tensor, mixture: Mixture, evidence: Tensor, collapsed: Tensor) -> Mixture:
    """Moves collapsed components to where the mixture explains the image worst.

    The new mean is that of the twentieth of the voxels with the lowest density, for a second collapsed component the
    next twentieth, and so on (equal components would stay equal for ever); the new covariance is the average of the
    components that stand; the weights start equal.

    Args:
        image: ``(B, M, N)``.
        mask: ``(B, 1, N)``.
        mixture: the current parameters.
        evidence: log p(I(x)) ``(B, 1, N)``.
        collapsed: ``(B, K)``.
    """
    surprise = torch.where(mask > 0, -evidence, -torch.inf)
    rank = surprise.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (B, 1, N)
    wanted = (mask.sum(-1, keepdim=True) * 0.05).ceil().clamp_min(1)  # (B, 1, 1)
    parts = (mask.sum(-1, keepdim=True) / wanted).ceil().clamp_min(1)
    turn = (collapsed.cumsum(1)[..., None] - 1).remainder(parts)  # (B, K, 1): which twentieth is whose
    worst = ((rank / wanted).floor() == turn).to(image.dtype) * mask  # (B, K, N)
    place = worst @ image.mT / worst.sum(-1, keepdim=True).clamp_min(1)  # (B, K, M)
    means = torch.where(collapsed[..., None], place, mixture.means)
    covariances = mixture.covariances
    if covariances.shape[1] > 1:
        stands = (~collapsed).to(image.dtype).reshape(*collapsed.shape, *[1] * (covariances.ndim - 2))
        average = (covariances * stands).sum(1, keepdim=True) / stands.sum(1, keepdim=True).clamp_min(1)
        lost = collapsed.reshape(stands.shape)
        covariances = torch.where(lost, average.expand_as(covariances), covariances)
    weights = mixture.weights
    equal = torch.full_like(weights, 1 / weights.shape[1])
    hit = collapsed.any(1).reshape(-1, *[1] * (weights.ndim - 1))
    return mixture._replace(weights=torch.where(hit, equal, weights), means=means, covariances=covariances)


def variance_inside(image: Tensor, mask: Tensor) -> Tensor:
    """The variance of each sequence inside the mask ``(B, M)``; 1 where it is constant."""
    count = mask.sum(-1).clamp_min(1)
    centred = (image - ((image * mask).sum(-1) / count)[..., None]) * mask
    variance = centred.square().sum(-1) / count
    # Of equal values the computed mean is off by a rounding, so the variance of a constant is seldom exactly zero.
    low = torch.where(mask > 0, image, torch.inf).amin(-1)
    high = torch.where(mask > 0, image, -torch.inf).amax(-1)
    return torch.where(high > low, variance, 1.0)
