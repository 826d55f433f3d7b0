"""A mixture that knows what to expect: EM with priors on its parameters and a smooth spatial prior, within one place.

Five things are added to the SVGMM (Schwab et al. 2024, §2.1). Priors draw μ and Σ of each component to the tissue
that it stands for, so that it bears that tissue's name, and stays finite where the tissue is absent. Π(x) is the
neighbourhood's average of the responsibilities instead of the voxel's own. Densities are tempered, g^β: the residuals
of neighbouring voxels repeat each other, so that one voxel is worth less than one observation. Tails may be heavier
than a Gaussian's: Student's t, and voxels that belong to no component. And where a component lies may be known: ρ(x).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.fit import Diagnostics, Fit, stacked
from monai_deepgmm.mixture.gaussian import Mixture, masked_mean
from monai_deepgmm.mixture.packing import Packing, packing
from monai_deepgmm.mixture.smoothing import Smoother
from monai_deepgmm.mixture.statistics import Statistics

#: A fit has converged when a responsibility changes by less than this on average.
TOL = 5e-3
MAX_ITER = 50


class Prior(NamedTuple):
    """What is expected of K components over M sequences, on the standardised scale of their place.

    Attributes:
        means: m ``(K, M)``, or one for each image ``(B, K, M)``.
        shares: π₀ ``(K,)``, sum 1.
        variance: v, the expected variance of each component in each sequence.
        mean_strength: κ; the prior on a mean is worth κ π₀_k N voxels, N those of the place.
        variance_strength: ν; likewise for a covariance.
        location: log ρ ``(B, K, *S)``, how likely each component is at each voxel, up to a factor of its own; None:
            everywhere alike.
    """

    means: Tensor
    shares: Tensor
    variance: float = 0.5
    mean_strength: float = 0.3
    variance_strength: float = 0.5
    location: Tensor | None = None


class DensityModel(NamedTuple):
    """How a component's density falls off, and what belongs to none.

    Attributes:
        dof: the degrees of freedom of Student's t; None: a Gaussian, which is its limit.
        outliers: the share of voxels that belong to no component; where none explains a voxel, it does not move them.
            Such voxels are labelled all the same.
        span: an outlier may lie anywhere in a cube with this side, in standard deviations.
    """

    dof: float | None = 10.0
    outliers: float = 0.0
    span: float = 10.0


class SpatialPrior(NamedTuple):
    """How neighbouring voxels hang together.

    Attributes:
        sigma_mm: standard deviation of the Gaussian neighbourhood that Π averages over.
        temper: β, what one voxel is worth as an observation.
        denoise_mm: standard deviation of the Gaussian that takes the noise off the image first.
    """

    sigma_mm: float = 2.2
    temper: float = 0.3
    denoise_mm: float = 0.5


def standardised(image: Tensor, place: Tensor) -> Tensor:
    """The image ``(B, M, *S)`` with median 0 and standard deviation 1 inside a place ``(B, 1, *S)``, 0 outside."""
    inside = place > 0
    found = torch.where(inside, image, torch.nan).flatten(2)
    centred = found - found.nanmedian(2, keepdim=True).values
    deviation = (centred.square().nanmean(2) - centred.nanmean(2).square()).clamp_min(0).sqrt()[..., None]
    return torch.where(inside, (centred / torch.where(deviation > 0, deviation, 1.0)).view_as(image), 0)


def fit_map_em(
    image: Tensor,
    place: Tensor,
    prior: Prior,
    spacing_mm: tuple[float, ...],
    *,
    spatial: SpatialPrior | None = None,
    density: DensityModel | None = None,
    tol: float = TOL,
    max_iter: int = MAX_ITER,
) -> Fit:
    """Fits the mixture to the voxels of one place in each image.

    E: ``w_xk ∝ Π_k(x) ρ_k(x) g(I(x) | μ_k, Σ_k)^β``, ρ_k with mean 1 over the place; M:
    ``Π_k = (G ∗ w_k) / (G ∗ 1)``, and with ``n_k = Σ_x w_xk``

    ``μ_k = (Σ_x w_xk I(x) + κ π₀_k N m_k) / (n_k + κ π₀_k N)``,
    ``Σ_k = (Σ_x w_xk (I(x) − μ_k)(I(x) − μ_k)ᵀ + ν π₀_k N v 1) / (n_k + ν π₀_k N)``.

    μ is the posterior's mode given Σ, and Σ shrinks the scatter towards v 1. It is not the mode of a normal-inverse-
    Wishart posterior, where ``κ π₀_k N (μ_k − m_k)(μ_k − m_k)ᵀ`` would widen a component that lies away from its prior:
    with it the mean Dice of 25 patients of MyOPS was .683, without it is .685.

    Args:
        image: ``(B, M, *S)``; it is standardised within the place.
        place: ``(B, 1, *S)``, where these K tissues can be.
        prior: what is expected of them, in their order.
        spacing_mm: of the axes in ``*S``.
        spatial: the neighbourhood; None: the defaults.
        density: the densities' tails; None: the defaults.
        tol: a fit has converged when a responsibility changes by less on average.
        max_iter: iterations at most.

    Returns:
        The fit: its components are in the order of the prior, its mixture is on the standardised scale, its NLL is
        NLL_V with the smooth Π, untempered.
    """
    spatial, model = spatial or SpatialPrior(), density or DensityModel()
    voxels = packing(place.to(image.dtype))
    task = _Task.of(voxels, voxels.pack(image), prior, spacing_mm, spatial)
    state = _State.of(task.expected(prior), task, spatial.temper, model)
    everything, going = task, torch.arange(len(image), device=image.device)
    iterations, change = torch.zeros_like(going), image.new_full((len(image),), torch.inf)
    trace, ended = [state.nll], list[tuple[Tensor, _State]]()
    while len(trace) <= max_iter and len(going):
        new = _State.of(task.maximised(state, prior), task, spatial.temper, model)
        change[going] = masked_mean((new.resp - state.resp).abs_().mean(1, keepdim=True), task.inside)
        iterations[going] += 1
        state = new
        trace.append(trace[-1].index_copy(0, going, state.nll))
        if (done := change[going] < tol).any():  # an image that has converged leaves the others alone
            over, left = done.nonzero().flatten(), (~done).nonzero().flatten()
            ended.append((going[over], state.rows(over)))
            going, state, task = going[left], state.rows(left), task.rows(left)
    ended.append((going, state))
    order = torch.cat([rows for rows, _ in ended]).argsort()
    resp = torch.cat([one.resp for _, one in ended])[order]
    mixture = stacked([one.mixture._replace(weights=one.prior * one.inside) for _, one in ended]).rows(order)
    mixture = mixture._replace(weights=everything.voxels.spread(mixture.weights))
    return Fit(voxels.spread(resp), mixture, Diagnostics(trace[-1], torch.stack(trace), iterations, change < tol))


class _Task(NamedTuple):
    """What stays as it is while a mixture is fitted, in packed voxels.

    Attributes:
        voxels: of the place, in the images.
        boxes: the same voxels in boxes around the places.
        seen: the statistics of the standardised images without their noise.
        neighbourhood: what Π averages over, in boxes of their size.
        reach: ``G ∗ 1`` of it ``(B, 1, N)``.
        means: m ``(B, K, M)``.
        location: log ρ ``(B, K, N)``, or None.
    """

    voxels: Packing
    boxes: Packing
    seen: Statistics
    neighbourhood: Smoother
    reach: Tensor
    means: Tensor
    location: Tensor | None

    @classmethod
    def of(
        cls, voxels: Packing, image: Tensor, prior: Prior, spacing_mm: tuple[float, ...], spatial: SpatialPrior
    ) -> _Task:
        """That of packed images ``(B, M, N)``."""
        boxes, inside = voxels.boxes(), voxels.inside
        boxed, seen = boxes.spread(inside), standardised(image, inside)
        if spatial.denoise_mm > 0:
            seen = boxes.pack(Smoother(boxed, spatial.denoise_mm, spacing_mm)(boxes.spread(seen)))
        location = None if prior.location is None else _centred(voxels.pack(prior.location.to(image)), inside)
        means = prior.means.to(image).expand(len(image), -1, -1)
        found = sufficient.of_centred(seen, inside, torch.ones_like(means[:, 0]), "full")
        around = Smoother(boxed, spatial.sigma_mm, spacing_mm)
        reach = torch.where(inside > 0, boxes.pack(around.reach), 1)
        return cls(voxels, boxes, found, around, reach, means, location)

    @property
    def inside(self) -> Tensor:
        """Which voxels count ``(B, 1, N)``."""
        return self.voxels.inside

    def rows(self, index: Tensor) -> _Task:
        """That of some of the images."""
        location = None if self.location is None else self.location[index]
        return self._replace(
            voxels=self.voxels.rows(index),
            boxes=self.boxes.rows(index),
            seen=self.seen.rows(index),
            reach=self.reach[index],
            means=self.means[index],
            location=location,
        )

    def expected(self, prior: Prior) -> Mixture:
        """The mixture before any voxel was seen."""
        shares = prior.shares.to(self.means)[:, None] * torch.ones_like(self.inside)
        spread = prior.variance * torch.eye(self.means.shape[-1]).to(self.means)
        return Mixture(shares, self.means, spread.expand(*self.means.shape, -1))

    def maximised(self, state: _State, prior: Prior) -> Mixture:
        """μ drawn towards its prior, Σ shrunk towards its own (see ``fit_map_em``), and the smooth Π.

        A t's scatter is divided by the sum of its weights, as parameter-expanded EM does: the same solution, sooner.
        """
        n_sequences, (i, j) = self.means.shape[-1], self.seen.pairs
        moments = (state.resp * state.t_weights) @ self.seen.features.mT
        count, total = moments[..., -1], self.inside.sum(2) * prior.shares.to(moments)  # (B, K)
        kappa, nu = (strength * total + 1e-9 for strength in (prior.mean_strength, prior.variance_strength))
        sums = moments[..., -1 - n_sequences : -1]
        means = (sums + kappa[..., None] * self.means) / (count + kappa)[..., None]
        # Σ w (x − μ)(x − μ)ᵀ of a μ that is not the mean of x.
        scatter = moments[..., : len(i)] - means[..., i] * sums[..., j] - means[..., j] * sums[..., i]
        scatter = scatter + count[..., None] * means[..., i] * means[..., j]
        scatter = scatter + torch.where(i == j, prior.variance, 0.0) * nu[..., None]
        covariances = scatter.new_empty(*means.shape, n_sequences)
        covariances[..., i, j] = covariances[..., j, i] = scatter / (count + nu)[..., None]
        return Mixture(self._maps(state.resp), means, covariances)

    def _maps(self, resp: Tensor) -> Tensor:
        """The smooth Π ``(B, K, N)``; they sum to 1, so that the last is what the others leave."""
        maps = torch.empty_like(resp)
        free = maps[:, :-1]
        around = self.neighbourhood.blur(self.boxes.spread(resp[:, :-1]))
        torch.div(self.boxes.pack(around, clean=False), self.reach, out=free)  # what fills up counts nowhere
        torch.sub(self.inside, free.sum(1, keepdim=True), out=maps[:, -1:])
        return maps


class _State(NamedTuple):
    """Where the images stand.

    Attributes:
        mixture: the last M-step's.
        prior: ``Π_k(x) ρ_k(x)``, normalised ``(B, K, N)``.
        resp: responsibilities ``(B, K, N)``.
        t_weights: what each voxel is worth to each component ``(B, K, N)``.
        nll: the untempered NLL_V ``(B,)``.
        inside: which voxels count ``(B, 1, N)``.
    """

    mixture: Mixture
    prior: Tensor
    resp: Tensor
    t_weights: Tensor
    nll: Tensor
    inside: Tensor

    @classmethod
    def of(cls, mixture: Mixture, task: _Task, temper: float, model: DensityModel) -> _State:
        """The E-step."""
        least, n_sequences = torch.finfo(mixture.weights.dtype).tiny ** 0.5, mixture.means.shape[-1]
        prior = mixture.weights.clamp_min(least)
        if task.location is not None:
            prior = prior.log_().add_(task.location).softmax(1)
        density, t_weights = _density(task.seen, mixture, model.dof)
        peak = density.amax(1, keepdim=True)
        density -= peak
        evidence = density.exp().mul_(prior).sum(1, keepdim=True).log_().add_(peak)
        if model.outliers > 0:
            nowhere = math.log(model.outliers) - n_sequences * math.log(model.span)
            inlier = math.log(1 - model.outliers) + evidence
            evidence = torch.logaddexp(inlier, torch.full_like(inlier, nowhere))
            t_weights = t_weights * (inlier - evidence).exp()
        resp = density.mul_(temper).exp_().mul_(prior)  # the likeliest without a prior has 1 before it
        resp *= task.inside / resp.sum(1, keepdim=True)
        return cls(mixture, prior, resp, t_weights, masked_mean(-evidence, task.inside), task.inside)

    def rows(self, index: Tensor) -> _State:
        """Those of some of the images."""
        parts = (self.prior, self.resp, self.t_weights, self.nll, self.inside)
        return _State(self.mixture.rows(index), *(part[index] for part in parts))


def _centred(location: Tensor, inside: Tensor) -> Tensor:
    """Log ρ ``(B, K, N)`` of which ρ has mean 1 over the place, so that it says where a component is, not how much."""
    total = location.masked_fill(inside == 0, -torch.inf).logsumexp(2)
    return location - (total - inside.sum(2).clamp_min(1).log())[..., None]


def _density(seen: Statistics, mixture: Mixture, dof: float | None) -> tuple[Tensor, Tensor]:
    """Each component's log density ``(B, K, N)``, Gaussian or Student's t, and each voxel's weight in its moments."""
    theta = sufficient.coefficients(mixture, seen)
    if dof is None:
        gaussian = theta @ seen.features
        return gaussian, torch.ones_like(gaussian)
    m, linear = mixture.means.shape[-1], (theta[..., -1 - mixture.means.shape[-1] : -1] * mixture.means).sum(-1)
    peak = theta[..., -1] + 0.5 * linear  # (B, K): the log density at the mean
    theta[..., -1] = -0.5 * linear
    distance = (theta @ seen.features).mul_(-2 / dof).clamp_min_(0)  # Mahalanobis', squared, over ν
    constant = math.lgamma((dof + m) / 2) - math.lgamma(dof / 2) + m / 2 * math.log(2 / dof)
    student = distance.log1p().mul_(-(dof + m) / 2).add_((peak + constant)[..., None])
    return student, ((dof + m) / dof) / distance.add_(1)
