"""A mixture that knows what to expect: EM with priors on its parameters and a smooth spatial prior, within one place.

Five things are added to the SVGMM (Schwab et al. 2024, §2.1). Priors draw μ and Σ of each component to the tissue
that it stands for, so that it bears that tissue's name, and stays finite where the tissue is absent. Π(x) is the
neighbourhood's average of the responsibilities instead of the voxel's own. Densities are tempered, g^β: the residuals
of neighbouring voxels repeat each other, so that one voxel is worth less than one observation. Tails may be heavier
than a Gaussian's: Student's t, and voxels that belong to no component. And where a component lies may be known: ρ(x).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste
from monai_deepgmm.mixture.fit import Diagnostics, Fit, chosen
from monai_deepgmm.mixture.gaussian import Mixture, log_density, masked_mean
from monai_deepgmm.mixture.smoothing import Smoother

#: A fit has converged when a responsibility changes by less than this on average.
TOL = 5e-3
MAX_ITER = 50


class Prior(NamedTuple):
    """What is expected of K components over M sequences, on the standardised scale of their place.

    Attributes:
        means: m ``(K, M)``.
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
    out = torch.zeros_like(image)
    for values, inside, target in zip(image, place[:, 0] > 0, out, strict=True):
        if inside.any():
            found = values[:, inside]
            centred = found - found.median(1, keepdim=True).values
            deviation = found.std(1, correction=0, keepdim=True)
            target[:, inside] = centred / torch.where(deviation > 0, deviation, 1.0)
    return out


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
    prior = prior._replace(means=prior.means.to(image), shares=prior.shares.to(image))
    box, full = enclosing(place), image.shape[2:]
    image, place = cut(image, box), cut(place.to(image.dtype), box)
    seen = Smoother(place, spatial.denoise_mm, spacing_mm)(standardised(image, place))
    neighbourhood = Smoother(place, spatial.sigma_mm, spacing_mm)
    n_images, n_sequences = image.shape[:2]
    location = None if prior.location is None else _centred(cut(prior.location.to(image), box), place)
    weights = prior.shares.reshape(1, -1, *[1] * (image.ndim - 2)) * torch.ones_like(place)
    expected = prior.variance * torch.eye(n_sequences).to(image)
    mixture = Mixture(
        weights,
        prior.means.expand(n_images, -1, -1),
        expected.expand(n_images, len(prior.shares), -1, -1),
    )
    resp, t_weights, last = _e_step(seen, place, _located(mixture, location), spatial.temper, model)
    trace = [last]
    change = torch.full((n_images,), torch.inf)
    iterations = torch.zeros(n_images, dtype=torch.long, device=image.device)
    active = torch.ones(n_images, dtype=torch.bool, device=image.device)
    while active.any() and len(trace) <= max_iter:
        updated = _m_step(seen, resp, t_weights, place, prior, neighbourhood)
        new, t_weights, nll = _e_step(seen, place, _located(updated, location), spatial.temper, model)
        change = masked_mean((new - resp).abs().mean(1, keepdim=True), place)
        # An image that has converged stays as it is, so that its neighbours in the batch change but roundings.
        mixture = mixture.updated(updated, functools.partial(chosen, active))
        resp, last = chosen(active, resp, new), torch.where(active, nll, last)
        trace.append(last)
        iterations = iterations + active
        active = active & (change >= tol)
    mixture = mixture._replace(weights=paste(_located(mixture, location).weights, box, full))
    return Fit(paste(resp, box, full), mixture, Diagnostics(last, torch.stack(trace), iterations, ~active))


def _centred(location: Tensor, place: Tensor) -> Tensor:
    """Log ρ ``(B, K, *S)`` of which ρ has mean 1 over the place, so that it says where a component is, not how much."""
    inside = location.masked_fill(place == 0, -torch.inf).flatten(2)
    mean = inside.logsumexp(2) - place.flatten(2).sum(2).clamp_min(1).log()
    return location - mean.reshape(*mean.shape, *[1] * (location.ndim - 2))


def _located(mixture: Mixture, location: Tensor | None) -> Mixture:
    """The mixture whose weights are ``Π_k(x) ρ_k(x)``, normalised."""
    if location is None:
        return mixture
    prior = mixture.weights.clamp_min(torch.finfo(location.dtype).tiny).log() + location
    return mixture._replace(weights=prior.softmax(1))


def _e_step(
    image: Tensor, place: Tensor, mixture: Mixture, temper: float, model: DensityModel
) -> tuple[Tensor, Tensor, Tensor]:
    """Responsibilities ``(B, K, *S)``, what each voxel is worth to each of them, and the untempered NLL_V ``(B,)``."""
    density, t_weights = _density(image, mixture, model.dof)
    prior = mixture.weights.clamp_min(torch.finfo(image.dtype).tiny).log()
    evidence = (prior + density).logsumexp(1, keepdim=True)
    if model.outliers > 0:
        nowhere = math.log(model.outliers) - image.shape[1] * math.log(model.span)
        inlier = math.log(1 - model.outliers) + evidence
        evidence = torch.logaddexp(inlier, torch.full_like(inlier, nowhere))
        t_weights = t_weights * (inlier - evidence).exp()
    nll = masked_mean(-evidence, place)
    return (prior + temper * density).softmax(1) * place, t_weights, nll


def _density(image: Tensor, mixture: Mixture, dof: float | None) -> tuple[Tensor, Tensor]:
    """Each component's log density ``(B, K, *S)``, Gaussian or Student's t, and each voxel's weight in its moments."""
    gaussian = log_density(image, mixture)
    if dof is None:
        return gaussian, torch.ones_like(gaussian)
    m = image.shape[1]
    peak = -0.5 * (m * math.log(2 * math.pi) + torch.logdet(mixture.covariances))  # (B, K)
    peak = peak.reshape(*peak.shape, *[1] * (gaussian.ndim - 2))
    distance = 2 * (peak - gaussian)  # Mahalanobis', squared
    constant = math.lgamma((dof + m) / 2) - math.lgamma(dof / 2) + m / 2 * math.log(2 / dof)
    student = peak + constant - (dof + m) / 2 * (1 + distance / dof).log()
    return student, (dof + m) / (dof + distance)


def _m_step(
    image: Tensor,
    resp: Tensor,
    t_weights: Tensor,
    place: Tensor,
    prior: Prior,
    neighbourhood: Smoother,
) -> Mixture:
    """μ drawn towards its prior, Σ shrunk towards its own (see ``fit``), and the smooth Π.

    A t's scatter is divided by the sum of its weights, as parameter-expanded EM does: the same solution, sooner.
    """
    voxels, w = image.flatten(2), (resp * t_weights).flatten(2)
    count, total = w.sum(-1), place.flatten(1).sum(1)[:, None] * prior.shares  # (B, K)
    kappa, nu = (strength * total + 1e-9 for strength in (prior.mean_strength, prior.variance_strength))
    means = (w @ voxels.mT + kappa[..., None] * prior.means) / (count + kappa)[..., None]
    centred = voxels[:, None] - means[..., None]  # (B, K, M, N)
    scatter = (centred * w[:, :, None]) @ centred.mT
    expected = prior.variance * torch.eye(image.shape[1]).to(image)
    covariances = (scatter + nu[..., None, None] * expected) / (count + nu)[..., None, None]
    return Mixture(neighbourhood(resp), means, covariances)
