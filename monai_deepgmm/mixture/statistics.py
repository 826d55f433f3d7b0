"""A mixture of Gaussians as two matrix products: log densities are linear in sufficient statistics, and so are moments.

With ``φ(x) = (x xᵀ, x, 1)`` of a voxel's intensities x, ``log g(x | μ, Σ) = θ · φ(x)`` and an M-step needs nothing but
``Σ_x w_xk φ(x)``. So an iteration reads the voxels twice and makes no array of voxels × components × sequences. The
intensities are standardised first: the subtraction in ``Σ = E[x xᵀ] − μ μᵀ`` would cancel far from zero.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture.gaussian import Covariance, Mixture, floored_matrices


class Statistics(NamedTuple):
    """The sufficient statistics of packed images.

    Attributes:
        features: φ ``(B, F, N)``: squares (diag, spherical) or the products of all pairs of sequences (full, tied), the
            intensities, and 1; all 0 in voxels that do not count.
        centre: what was subtracted from the intensities ``(B, M)``.
        scale: what they were divided by ``(B, M)``.
        covariance: the shape of Σ.
        pairs: of sequences, whose product each quadratic feature is, two of ``(Q,)``.
    """

    features: Tensor
    centre: Tensor
    scale: Tensor
    covariance: Covariance
    pairs: tuple[Tensor, Tensor]

    def rows(self, index: Tensor) -> Statistics:
        """Those of some of the images."""
        parts = {name: getattr(self, name)[index] for name in ("features", "centre", "scale")}
        return self._replace(**parts)

    def original(self, mixture: Mixture) -> Mixture:
        """A mixture of the standardised intensities on the images' own scale."""
        means = mixture.means * self.scale[:, None] + self.centre[:, None]
        square = self.scale[:, None, :, None] * self.scale[:, None, None, :]  # (B, 1, M, M)
        if mixture.covariances.ndim == 3:
            square = square.diagonal(dim1=-2, dim2=-1)[..., : mixture.covariances.shape[-1]]
        return mixture._replace(means=means, covariances=mixture.covariances * square)


def statistics(image: Tensor, mask: Tensor, scale: Tensor, covariance: Covariance) -> Statistics:
    """The sufficient statistics of each voxel.

    Args:
        image: ``(B, M, N)``, finite.
        mask: ``(B, 1, N)``.
        scale: ``(B, M)``, about a standard deviation. With spherical Σ all sequences are divided by the largest.
        covariance: the shape of Σ.
    """
    centre = (image * mask).sum(-1) / mask.sum(-1).clamp_min(1)
    if covariance == "spherical":
        scale = scale.amax(1, keepdim=True).expand_as(scale)
    return of_centred((image - centre[..., None]) * mask, mask, scale, covariance)._replace(centre=centre)


def of_centred(x: Tensor, mask: Tensor, scale: Tensor, covariance: Covariance) -> Statistics:
    """The sufficient statistics of intensities ``(B, M, N)`` around 0, 0 outside the mask, when divided by a scale."""
    matrix = covariance in ("full", "tied")
    i, j = pairs = _pairs(x.shape[1], matrix, x.device)
    features = x.new_empty(len(x), len(i) + x.shape[1] + 1, x.shape[2])
    squares, linear = features[:, : len(i)], features[:, len(i) : -1]
    torch.div(x, scale[..., None], out=linear)
    torch.mul(*((linear[:, i], linear[:, j]) if matrix else (linear, linear)), out=squares)
    features[:, -1:] = mask
    return Statistics(features, torch.zeros_like(scale), scale, covariance, pairs)


@functools.cache
def _pairs(n_sequences: int, matrix: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sequences whose products are the quadratic features: all pairs, or each with itself; two of ``(Q,)``."""
    each = torch.arange(n_sequences, device=device)
    i, j = torch.triu_indices(n_sequences, n_sequences, device=device) if matrix else (each, each)
    return i, j


def coefficients(mixture: Mixture, like: Statistics) -> Tensor:
    """θ ``(B, K, F)`` with ``log g(x | μ_k, Σ_k) = θ_k · φ(x)``.

    Args:
        mixture: its weights are not used.
        like: the statistics that θ belongs to.
    """
    means, covariances = mixture.means, mixture.covariances
    n_sequences = means.shape[-1]
    if covariances.ndim == 3:
        variances = covariances.expand_as(means)
        precision, log_det = 1 / variances, variances.log().sum(-1)
        quadratic, linear = -0.5 * precision, means * precision
    else:
        cholesky = torch.linalg.cholesky(covariances)
        log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (B, K or 1)
        matrix = torch.cholesky_inverse(cholesky).expand(*means.shape, -1)
        i, j = like.pairs
        quadratic = matrix[..., i, j] * _halves(n_sequences, means.dtype, means.device)
        linear = (matrix @ means[..., None]).squeeze(-1)
    constant = -0.5 * ((linear * means).sum(-1) + log_det + n_sequences * math.log(2 * math.pi))
    return torch.cat([quadratic, linear, constant[..., None]], -1)


@functools.cache
def _halves(n_sequences: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How often the product of each pair of sequences counts in ``−½ xᵀ P x`` ``(Q,)``."""
    i, j = torch.triu_indices(n_sequences, n_sequences, device=device)
    return torch.where(i == j, -0.5, -1.0).to(dtype)


def estimate(moments: Tensor, like: Statistics, floor: Tensor) -> Mixture:
    """The parameters with which an M-step ends (S Alg. 1 line 4), from ``Σ_x w_xk φ(x)`` ``(B, K, F)``.

    Args:
        moments: of the statistics.
        like: those.
        floor: added to the variances ``(B, M)``, as in ``gaussian.m_step``.
    """
    n_sequences = floor.shape[-1]
    count = moments[..., -1]
    safe = count.clamp_min(torch.finfo(moments.dtype).tiny ** 0.5)[..., None]
    means = moments[..., -1 - n_sequences : -1] / safe
    (i, j), covariance = like.pairs, like.covariance
    scatter = moments[..., : len(i)] - safe * means[..., i] * means[..., j]
    weights = count / count.sum(1, keepdim=True).clamp_min(torch.finfo(moments.dtype).tiny)
    floor = floor[:, None]
    if covariance in ("diag", "spherical"):
        variances = (scatter / safe).clamp_min(0)
        if covariance == "spherical":
            variances, floor = variances.mean(-1, keepdim=True), floor.mean(-1, keepdim=True)
        return Mixture(weights, means, variances + floor)
    if covariance == "tied":
        scatter, safe = scatter.sum(1, keepdim=True), safe.sum(1, keepdim=True)
    matrices = scatter.new_empty(*scatter.shape[:2], n_sequences, n_sequences)
    matrices[..., i, j] = matrices[..., j, i] = scatter / safe
    return Mixture(weights, means, floored_matrices(matrices, floor))


def unconstrained(mixture: Mixture) -> Tensor:
    """π, μ and Σ as numbers of any value ``(B, P)``: log π, μ, and log variances or a Cholesky factor, log diagonal."""
    tiny = torch.finfo(mixture.weights.dtype).tiny
    if mixture.covariances.ndim == 3:
        spread = mixture.covariances.log()
    else:
        cholesky = torch.linalg.cholesky(mixture.covariances)
        diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
        spread = cholesky.tril(-1) + torch.diag_embed(diagonal.log())
    parts = (mixture.weights.clamp_min(tiny).log(), mixture.means, spread)
    return torch.cat([part.flatten(1) for part in parts], 1)


def constrained(numbers: Tensor, like: Mixture) -> Mixture:
    """The way back from ``unconstrained``; the weights sum to 1 again."""
    sizes = [part[0].numel() for part in (like.weights, like.means, like.covariances)]
    weights, means, spread = torch.split(numbers, sizes, 1)
    spread = spread.view_as(like.covariances)
    if like.covariances.ndim == 3:
        covariances = spread.exp()
    else:
        cholesky = spread.tril(-1) + torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1).exp())
        covariances = cholesky @ cholesky.mT
    return Mixture(weights.softmax(1), means.view_as(like.means), covariances)


def extrapolated(first: Mixture, second: Mixture, third: Mixture, floor: Tensor) -> tuple[Mixture, Tensor]:
    """Where three iterates of EM are heading (SQUAREM, Varadhan and Roland, Scand. J. Stat. 2008, scheme S3).

    ``p₀ − 2 α r + α² v`` with ``r = p₁ − p₀``, ``v = p₂ − 2 p₁ + p₀``, ``α = −‖r‖ / ‖v‖``, at most −1 (which is p₂).
    That it is better than the last iterate is not certain: whoever uses it compares likelihoods.

    Args:
        first: p₀; all three without a field or maps.
        second: p₁.
        third: p₂.
        floor: of the variances ``(B, M)``.

    Returns:
        The mixture, and in which images its variances stay well above the floor, below which no M-step comes ``(B,)``.
    """
    p0, p1, p2 = (unconstrained(m) for m in (first, second, third))
    r, v = p1 - p0, (p2 - p1) - (p1 - p0)
    length = r.norm(dim=1) / v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
    alpha = -length.nan_to_num(1.0).clamp(1.0, MAX_STEP)[:, None]
    found = constrained(p0 - 2 * alpha * r + alpha.square() * v, third)
    least = found.covariances.amin((1, 2)) if found.covariances.ndim == 3 else _least(found.covariances)
    return found, least > 4 * floor.amax(1)


def _least(covariances: Tensor) -> Tensor:
    """The smallest eigenvalue of an image's matrices ``(B, K, M, M)`` → ``(B,)``; NaN where there is none."""
    finite = covariances.isfinite().all((2, 3), keepdim=True)
    values = torch.linalg.eigvalsh(torch.where(finite, covariances, torch.eye(covariances.shape[-1]).to(covariances)))
    return torch.where(finite.squeeze(3), values, torch.nan).amin((1, 2))


#: The longest extrapolation, in steps of EM.
MAX_STEP = 64.0
