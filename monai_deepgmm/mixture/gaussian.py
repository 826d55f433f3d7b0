"""The Gaussian mixture: densities, expectation, maximisation and likelihood, as pure functions of tensors.

Schwab et al. 2024 (S) is the source. One set of functions serves the classical mixture (GMM, S eq. 1-2) and the
spatially variant one (SVGMM, S §2.1): only the shape of the mixing weights differs. Everything is computed in the
log domain, vectorised over images, components, sequences and voxels, and differentiable.

Symbols: B images, K components, M sequences, ``*S`` any spatial shape, N voxels inside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["diag", "full", "tied", "spherical"]
COVARIANCES: tuple[Covariance, ...] = ("diag", "full", "tied", "spherical")


def unknown(covariance: object) -> ValueError:
    """What is raised where a shape of Σ is none of these."""
    return ValueError(f"covariance: {covariance!r} is unknown; choose one of {', '.join(COVARIANCES)}")


#: Added to every variance (to the diagonal of every covariance matrix), in squared units of intensity.
VARIANCE_FLOOR = 1e-6


class Mixture(NamedTuple):
    """The parameters (π, μ, Σ) of B mixtures of K Gaussians over M sequences, and what shades them.

    The shapes say which model it is, and all of them broadcast against each other:

    Attributes:
        weights: π ``(B, K)`` for a GMM, Π ``(B, K, *S)`` for an SVGMM; they sum to 1 over K.
        means: μ ``(B, K, M)``.
        covariances: Σ. Variances ``(B, K, M)`` (diag) or ``(B, K, 1)`` (spherical); matrices ``(B, K, M, M)`` (full)
            or ``(B, 1, M, M)`` (tied).
        field: b ``(B, M, *S)``, the bias field that multiplies the means (Ma 2022, eq. 2.8), or None.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    field: Tensor | None = None

    def rows(self, index: Tensor) -> Mixture:
        """The mixtures of some of the images."""
        parts = (None if part is None else part[index] for part in self)
        return Mixture(*parts)  # type: ignore[arg-type]  # only the field may be None, before and after

    def updated(self, new: Mixture, put: Callable[[Tensor, Tensor], Tensor]) -> Mixture:
        """``put(old, new)`` of each parameter; both have a field, or neither."""
        pairs = zip(self, new, strict=True)
        parts = (None if old is None or fresh is None else put(old, fresh) for old, fresh in pairs)
        return Mixture(*parts)  # type: ignore[arg-type]


def m_step(
    image: Tensor,
    resp: Tensor,
    mask: Tensor,
    *,
    covariance: Covariance = "diag",
    spatial: bool = False,
    floor: float | Tensor = VARIANCE_FLOOR,
) -> Mixture:
    """The M-step: the parameters that maximise the expected likelihood (S Alg. 1 line 4, Alg. 2 line 4).

    ``μ_k = Σ_x w_xk I(x) / Σ_x w_xk``, ``Σ_k = Σ_x w_xk (I(x) − μ_k)(I(x) − μ_k)ᵀ / Σ_x w_xk`` (or its diagonal, its
    mean diagonal, its average over k), and ``π_k = (1/|Ω|) Σ_x w_xk``, or ``Π_k(x) = w_xk`` when ``spatial``.

    Args:
        image: ``(B, M, *S)``, finite everywhere.
        resp: responsibilities w ``(B, K, *S)``.
        mask: Ω as weights ``(B, 1, *S)``, 1 inside and 0 outside.
        covariance: the shape of Σ.
        spatial: True for the SVGMM.
        floor: added to the variances, a number or ``(B, M)``; keeps a component on equal values from Σ = 0. On the
            diagonal of a matrix it is at least a few roundings of that matrix, so that its Cholesky factor exists.

    Returns:
        The mixture. A component without any voxel gets μ = 0 and Σ = floor, never NaN.

    Raises:
        ValueError: ``covariance`` is not one of ``COVARIANCES``.
    """
    voxels = image.flatten(2)  # (B, M, N)
    w = (resp * mask).flatten(2)  # (B, K, N)
    count = w.sum(-1)  # (B, K)
    safe = count.clamp_min(torch.finfo(w.dtype).tiny ** 0.5)
    means = w @ voxels.mT / safe[..., None]
    centred = voxels[:, None] - means[..., None]  # (B, K, M, N)
    covariances = floored_covariances(centred, w, covariance, floor)
    weights = resp if spatial else count / count.sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return Mixture(weights, means, covariances)


def floored_covariances(centred: Tensor, w: Tensor, covariance: Covariance, floor: float | Tensor) -> Tensor:
    """Σ of the M-step, of any of the shapes in ``COVARIANCES``.

    Args:
        centred: intensities minus each component's mean ``(B, K, M, N)``.
        w: responsibilities ``(B, K, N)``, 0 outside the mask.
        covariance: the shape of Σ.
        floor: as in ``m_step``.
    """
    floor = torch.as_tensor(floor, dtype=w.dtype, device=w.device)
    floor = floor.expand(centred.shape[0], centred.shape[2])[:, None]  # (B, 1, M)
    covariances = _covariances(centred, w, w.sum(-1).clamp_min(torch.finfo(w.dtype).tiny ** 0.5), covariance)
    if covariance == "spherical":
        covariances = covariances + floor.mean(-1, keepdim=True)
    elif covariance == "diag":
        covariances = covariances + floor
    else:
        covariances = floored_matrices(covariances, floor)
    return covariances


def floored_matrices(covariances: Tensor, floor: Tensor) -> Tensor:
    """Matrices ``(B, K, M, M)`` with a floor ``(B, 1, M)`` added to the diagonal, of at least a few of its roundings.

    Sequences that depend on each other leave Σ singular to rounding, and the Cholesky factor would not exist.
    """
    diagonal = covariances.diagonal(dim1=-2, dim2=-1)
    rounding = 32 * torch.finfo(covariances.dtype).eps * diagonal
    return covariances + torch.diag_embed(torch.maximum(floor, rounding))


def _covariances(centred: Tensor, w: Tensor, count: Tensor, covariance: Covariance) -> Tensor:
    """Σ without its floor, from centred intensities ``(B, K, M, N)``, weights ``(B, K, N)`` and counts ``(B, K)``."""
    if covariance in ("diag", "spherical"):
        variances = (centred.square() @ w[..., None]).squeeze(-1) / count[..., None]
        return variances if covariance == "diag" else variances.mean(-1, keepdim=True)
    if covariance in ("full", "tied"):
        scatter = (centred * w[:, :, None]) @ centred.mT  # (B, K, M, M)
        if covariance == "full":
            return scatter / count[..., None, None]
        return scatter.sum(1, keepdim=True) / count.sum(1)[:, None, None, None]
    raise unknown(covariance)


def log_density(image: Tensor, mixture: Mixture) -> Tensor:
    """The log density of every voxel under every component: log g(I(x) | b(x) μ_k, Σ_k), b = 1 without a field (S §2).

    Args:
        image: ``(B, M, *S)``; with a field, on a scale where 0 is no signal.
        mixture: its means, covariances and field are used, its weights are not.

    Returns:
        ``(B, K, *S)``.
    """
    n_sequences = image.shape[1]
    means = mixture.means[..., None]  # (B, K, M, 1)
    if mixture.field is not None:
        means = mixture.field.flatten(2)[:, None] * means
    centred = image.flatten(2)[:, None] - means  # (B, K, M, N)
    if mixture.covariances.ndim == 3:  # diag, spherical
        variances = mixture.covariances.expand_as(mixture.means)
        distance = (1 / variances)[:, :, None] @ centred.square()  # (B, K, 1, N)
        distance, log_det = distance.squeeze(2), variances.log().sum(-1)
    else:  # full, tied
        cholesky = torch.linalg.cholesky(mixture.covariances)
        white = torch.linalg.solve_triangular(cholesky.expand(*centred.shape[:3], -1), centred, upper=False)
        distance = white.square().sum(2)
        log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_g = -0.5 * (n_sequences * math.log(2 * math.pi) + log_det[..., None] + distance)
    return log_g.reshape(*log_g.shape[:2], *image.shape[2:])


def log_joint(image: Tensor, mixture: Mixture, log_weights: Tensor | None = None) -> Tensor:
    """log(π_k g(I(x) | μ_k, Σ_k)) ``(B, K, *S)``, with π_k replaced by Π_k(x) where the weights are maps.

    Args:
        image: ``(B, M, *S)``.
        mixture: its weights are not used where their logarithms are given.
        log_weights: log π ``(B, K)`` or log Π ``(B, K, *S)``, from whoever has them without a detour by weights, which
            in single precision are 0 from e⁻¹⁰³ on.
    """
    if log_weights is None:
        log_weights = mixture.weights.clamp_min(torch.finfo(mixture.weights.dtype).tiny).log()
    log_weights = log_weights.reshape(*log_weights.shape, *[1] * (image.ndim - log_weights.ndim))
    return log_weights + log_density(image, mixture)


def log_shares(log_resp: Tensor, mask: Tensor) -> Tensor:
    """The logarithms of an M-step's π ``(B, K)``, from log w ``(B, K, *S)``; finite where the mask is empty."""
    nothing = torch.finfo(log_resp.dtype).min / 2
    inside = torch.where(mask > 0, log_resp, nothing).flatten(2)
    return inside.logsumexp(-1) - mask.flatten(1).sum(1, keepdim=True).clamp_min(1).log()


def e_step(image: Tensor, mask: Tensor, mixture: Mixture) -> Tensor:
    """The E-step, and the labelling rule: the posterior probability of each component (S Alg. 1 line 3, Bayes' rule).

    ``w_xk = π_k g(I(x) | μ_k, Σ_k) / Σ_k' π_k' g(I(x) | μ_k', Σ_k')``.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        mixture: GMM or SVGMM.

    Returns:
        Responsibilities ``(B, K, *S)``: they sum to 1 over K inside the mask and are 0 outside.
    """
    return log_joint(image, mixture).softmax(1) * mask


def nll(image: Tensor, mask: Tensor, mixture: Mixture, log_weights: Tensor | None = None) -> Tensor:
    """The negative log-likelihood per voxel (S eq. 2), and NLL_V (S §2.1) where the weights are maps.

    ``NLL = −(1/|Ω|) Σ_{x∈Ω} log Σ_k π_k g(I(x) | μ_k, Σ_k)``.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        mixture: GMM or SVGMM.
        log_weights: as in ``log_joint``.

    Returns:
        One value per image ``(B,)``; 0 where the mask is empty.
    """
    return masked_mean(-log_joint(image, mixture, log_weights).logsumexp(1, keepdim=True), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the voxels inside the mask: ``(B, 1, *S)`` and ``(B, 1, *S)`` → ``(B,)``; 0 for an empty mask."""
    mask = mask.to(values.dtype)
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)
