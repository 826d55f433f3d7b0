"""Pure tissues and *mixels*, voxels that two of them share, as one Gaussian mixture of nodes; EM for it.

A mixel with a share u of tissue b and 1 − u of tissue a has the mean ``(1 − u) μ_a + u μ_b`` and the covariance
``(1 − u) Σ_a + u Σ_b`` (Choi et al. 1991; Santago and Gage 1993). Sequences differ in resolution and are never aligned
perfectly, so that the share that a second sequence sees differs from the first one's, by τ at the most:
``4 u (1 − u) τ² (μ_a − μ_b)²`` is added to the variances of all sequences but the first.

Every node is contaminated: a share ε of voxels, which EM finds, is explained by one broad Gaussian instead (vessels,
lesions, spikes). A sequence that was not measured in a voxel is integrated out, which is exact for a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field, mixel_profile, mixel_statistics
from monai_deepgmm.mixture.gaussian import Mixture, floored_matrices, log_density
from monai_deepgmm.mixture.mixel_statistics import MixelStatistics, Moments, Pattern, patterns

#: Into how many equal parts the share u is cut; a node lies in the middle of each.
NODES = 5
#: The share of voxels that are mixels when a fit begins, and at most: with more, tissues would have levels that hardly
#: any voxel has, and no noise, which explains an image as well, or better.
MIXELS, MOST_MIXELS = 0.3, 0.6
#: ε when a fit begins, and at most; the standard deviation of outliers in those of the whole image.
OUTLIERS, MOST_OUTLIERS, OUTLIER_SPREAD = 0.02, 0.1, 3.0
#: τ: how far the share that another sequence sees may differ from the first one's.
BLUR = 0.15
#: With little noise there are gaps between nodes, whose voxels would be no tissue's: so many times as wide as they are
#: apart is each in the first sequence, and their sum even within a tenth. In the others τ sees to it.
LEAST_WIDTH = 0.4
#: No logarithm of a responsibility is below this: what is not normal in single precision is slow.
LEAST = -40.0
#: A covariance from pairs of sequences measured in different voxels keeps at least this share of its variance.
LEAST_EIGENVALUE = 1e-3


class Stop(NamedTuple):
    """When EM ends: responsibilities change by less than ``tol``, or after ``max_iter`` iterations."""

    tol: float
    max_iter: int


class Observed(NamedTuple):
    """Voxels of one image, and where each sequence was measured.

    Attributes:
        values: ``(1, M, V)``.
        measured: ``(1, M, V)`` bool.
    """

    values: Tensor
    measured: Tensor

    def first(self) -> Observed:
        """The first sequence where it was measured."""
        where = self.measured[0, 0]
        return Observed(self.values[:, :1, where], self.measured[:, :1, where])


class State(NamedTuple):
    """What EM finds.

    Attributes:
        pure: the tissues, and the field at the voxels.
        weights: of the nodes ``(1, N)``.
        outliers: ε.
        trace: NLL per voxel ``(T + 1, 1)``.
        converged: whether it did.
        smooth: whether mixels have a smooth profile of their share.
    """

    pure: Mixture
    weights: Tensor
    outliers: float
    trace: Tensor
    converged: bool
    smooth: bool = False


class Anchor(NamedTuple):
    """What the first sequence alone has told, and what of it stays.

    Attributes:
        pure: the tissues in the first sequence: means ``(1, K, 1)``, covariances ``(1, K, 1, 1)``.
        weights: of the nodes ``(1, N)``, which stay.
        tissues: the indices of those whose levels stay; others are free, so that sequences which show them better can
            correct them.
    """

    pure: Mixture
    weights: Tensor
    tissues: tuple[int, ...]


def mixing(tissues: int, borders: Sequence[tuple[int, int]]) -> Tensor:
    """The fractions a of each node ``(N, K)``: the pure tissues, then for each border its mixels, u rising."""
    rows = [torch.eye(tissues)]
    u = (torch.arange(NODES) + 0.5) / NODES
    for a, b in borders:
        mixed = torch.zeros(NODES, tissues)
        mixed[:, a], mixed[:, b] = 1 - u, u
        rows.append(mixed)
    return torch.cat(rows)


def nodes(
    pure: Mixture, weights: Tensor, fractions: Tensor, *, smooth: bool = False, least: float = LEAST_WIDTH
) -> Mixture:
    """The mixture of all nodes.

    Args:
        pure: means ``(B, K, M)``, covariances ``(B, K, M, M)`` and field of the tissues.
        weights: of the nodes ``(B, N)``.
        fractions: a ``(N, K)``.
        smooth: whether a node's mixels hold any share within its part, evenly, and not all the same.
        least: else, how wide they are in the first sequence at least, as a share of what lies between two nodes.
    """
    means = fractions @ pure.means
    covariances = torch.einsum("nk,bkij->bnij", fractions, pure.covariances)
    spread = fractions @ pure.means.square() - means.square()  # u (1 − u) (μ_a − μ_b)²
    mixed = (1 - fractions.square().sum(1, keepdim=True)) / 2  # u (1 − u)
    apart = torch.where(mixed > 0, spread / mixed.clamp_min(1e-9), 0).clamp_min(0) / NODES**2
    own = covariances.diagonal(dim1=-2, dim2=-1)
    lacking = apart / 12 if smooth else (least**2 * apart - own).clamp_min(0)
    if covariances.shape[-1] == 1:  # of one sequence the variance says as much, and costs less
        return Mixture(weights, means, covariances[..., 0] + lacking, pure.field)
    blurred = 4 * BLUR**2 * spread.clamp_min(0)
    added = torch.cat([lacking[..., :1], blurred[..., 1:]], -1)
    return Mixture(weights, means, covariances + torch.diag_embed(added), pure.field)


# E-step ----------------------------------------------------------------------------------------------------------


def marginal_density(observed: Observed, mixture: Mixture) -> Tensor:
    """Log p of what was measured in each voxel under each component ``(1, N, V)``; 0 where nothing was."""
    if mixture.field is None and mixture.covariances.ndim == 3 and bool(observed.measured.all()):
        return log_density(observed.values, mixture)
    values, measured = observed.values[0], observed.measured[0]
    field = None if mixture.field is None else mixture.field[0]
    centre = mixture.means[0].mean(0)
    return mixel_statistics.statistics(values, measured, field, centre, patterns(measured)).log_density(mixture)


def broad(observed: Observed) -> Mixture:
    """The component of outliers: the median, and ``OUTLIER_SPREAD`` times the spread of each sequence."""
    values, measured = observed
    count = measured.sum(-1).clamp_min(1)
    known = torch.where(measured, values, torch.nan)
    middle = known.nanmedian(-1).values.nan_to_num(0)  # (1, M)
    centred = torch.where(measured, values - middle[..., None], 0)
    variance = centred.square().sum(-1) / count
    variance = torch.where(variance > 0, variance, 1.0)
    return Mixture(torch.ones_like(count[:, :1]), middle[:, None], OUTLIER_SPREAD**2 * variance[:, None])


def contaminated(inlying: Tensor, outlying: Tensor, outliers: float) -> Tensor:
    """``log((1 − ε) p + ε p₀)`` from log p ``(1, N, V)`` and log p₀ ``(1, 1, V)``."""
    inlying, outlying = inlying + math.log1p(-outliers), outlying + math.log(outliers)
    peak = torch.maximum(inlying, outlying)
    return inlying.sub_(outlying).abs_().neg_().exp_().log1p_().add_(peak)  # torch.logaddexp takes five times as long


# M-step ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The M-step of the pure tissues.

    Attributes:
        observed: the voxels.
        fractions: a ``(N, K)``.
        pooling: ν.
        floor: added to the variances ``(1, M)``.
        centre: about the mean of what was measured ``(M,)``.
        patterns: of what was measured.
    """

    observed: Observed
    fractions: Tensor
    pooling: float
    floor: Tensor
    centre: Tensor
    patterns: tuple[Pattern, ...]

    def seen(self, b: Tensor | None) -> MixelStatistics:
        """The statistics of the voxels under a field ``(1, M, V)`` or None."""
        values, measured = self.observed.values[0], self.observed.measured[0]
        field = None if b is None else b[0]
        return mixel_statistics.statistics(values, measured, field, self.centre, self.patterns)

    def __call__(self, resp: Tensor, b: Tensor | None, previous: Mixture | None) -> Mixture:
        """The M-step under a field ``(1, M, V)`` or None; see ``maximised``."""
        return self.maximised(resp, self.seen(b), previous)

    def maximised(self, resp: Tensor, seen: MixelStatistics, previous: Mixture | None) -> Mixture:
        """μ by least squares over all nodes, ``I(x) ≈ b(x) a_nᵀ μ``; Σ from what is left at the pure ones, pooled.

        Args:
            resp: of the nodes ``(1, N, V)``.
            seen: the statistics of the voxels.
            previous: its variances weigh the nodes; None: all weigh the same.
        """
        n_tissues, found = self.fractions.shape[1], seen.moments(resp[0])
        delta = self._deltas(found, resp, previous)
        cc, cb, bb, pairs = (part[:n_tissues] for part in found)
        shaded = cb * delta[:, None]  # Σ c_i b_j δ_j
        scatter = cc - shaded - shaded.mT + bb * delta[:, :, None] * delta[:, None]
        average = scatter.sum(0) / pairs.sum(0).clamp_min(1e-6)
        pooled = self.pooling * resp.shape[-1] + 1e-6
        covariances = ((scatter + pooled * average) / (pairs + pooled))[None]
        floored = floored_matrices(covariances, self.floor[:, None])
        whole = len(self.patterns) == 1 and self.patterns[0].where is None
        if not whole or bool(torch.linalg.cholesky_ex(floored).info.any()):
            floored = floored_matrices(_positive(covariances), self.floor[:, None])
        count = resp[:, :n_tissues].sum(-1)
        shares = count / count.sum(1, keepdim=True).clamp_min(1e-6)
        return Mixture(shares, (delta + seen.centre)[None], floored)

    def _deltas(self, found: Moments, resp: Tensor, previous: Mixture | None) -> Tensor:
        """δ = μ − μ₀ ``(K, M)``: the fractions of a node sum to 1, so that what holds of μ holds of δ."""
        a = self.fractions
        weight = torch.ones_like(found.bb[:, 0])
        if previous is not None:
            covariances = nodes(previous._replace(field=None), resp.mean(-1), a).covariances[0]
            weight = 1 / (covariances if covariances.ndim == 2 else covariances.diagonal(dim1=-2, dim2=-1))  # (N, M)
        bb, bc = (part.diagonal(dim1=-2, dim2=-1) * weight for part in (found.bb, found.cb))  # (N, M)
        left, right = torch.einsum("nm,nk,nl->mkl", bb, a, a), torch.einsum("nm,nk->mk", bc, a)
        ridge = 1e-6 * left.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        eye = torch.eye(a.shape[1]).to(left)
        solved: Tensor = torch.linalg.solve(left + ridge[:, None, None] * eye, right[..., None])
        return solved.squeeze(-1).mT


def step(observed: Observed, fractions: Tensor, pooling: float, floor: float) -> Step:
    """The M-step with the variance floor as a fraction of each sequence's variance."""
    whole = broad(observed)
    variance = whole.covariances[:, 0] / OUTLIER_SPREAD**2
    return Step(observed, fractions, pooling, floor * variance, whole.means[0, 0], patterns(observed.measured[0]))


def begin(maximise: Step, expected: Tensor) -> tuple[Mixture, Tensor]:
    """The pure tissues and the nodes' weights, from where each tissue is expected ``(1, K, V)``."""
    n_mixels = len(maximise.fractions) - expected.shape[1]
    nothing = expected.new_zeros(1, n_mixels, expected.shape[-1])
    mixels = torch.full((1, n_mixels), MIXELS / max(n_mixels, 1)).to(expected)
    weights = torch.cat([expected.mean(-1) * (1 - mixels.sum()), mixels], 1)
    return maximise(torch.cat([expected, nothing], 1), None, None), weights


def capped(weights: Tensor, tissues: int) -> Tensor:
    """The likeliest weights of the nodes ``(1, N)`` with at most ``MOST_MIXELS`` of mixels, as counted otherwise."""
    pure, mixed = weights[:, :tissues], weights[:, tissues:]
    whole, shared = pure.sum(1, keepdim=True), mixed.sum(1, keepdim=True)
    most = MOST_MIXELS * (whole + shared)
    if bool((shared <= most).all()):
        return weights
    return torch.cat([pure * (whole + shared - most) / whole.clamp_min(1e-12), mixed * most / shared], 1)


def _positive(covariances: Tensor) -> Tensor:
    """The nearest matrices ``(1, K, M, M)`` that are positive definite, but for roundings.

    Those from pairs of sequences that were measured in different voxels need not be, nor those of equal values.
    """
    values, vectors = torch.linalg.eigh(covariances)
    values = torch.maximum(values, LEAST_EIGENVALUE * values[..., -1:].clamp_min(0))
    nearest: Tensor = vectors @ torch.diag_embed(values) @ vectors.mT
    return nearest


# What the first sequence alone has told --------------------------------------------------------------------------


def anchored(pure: Mixture, anchor: Anchor) -> Mixture:
    """The tissues with the first sequence's margin as the anchor has it; p(other sequences | first) stays.

    ``Σ₁₁ → S``, ``Σ₂₁ → B S`` and ``Σ₂₂ → Σ₂₂ − B Σ₁₁ Bᵀ + B S Bᵀ`` with ``B = Σ₂₁ / Σ₁₁``.
    """
    kept = list(anchor.tissues)
    means, covariances = pure.means.clone(), pure.covariances.clone()
    old, new = covariances[:, kept, :1, :1], anchor.pure.covariances[:, kept].to(covariances)
    slope = covariances[:, kept, 1:, :1] / old
    left = covariances[:, kept, 1:, 1:] + slope * (new - old) @ slope.mT
    whole = torch.cat([torch.cat([new, (slope * new).mT], -1), torch.cat([slope * new, left], -1)], -2)
    means[:, kept, :1], covariances[:, kept] = anchor.pure.means[:, kept].to(means), whole
    return pure._replace(means=means, covariances=covariances)


# Loop ------------------------------------------------------------------------------------------------------------


def run(
    maximise: Step,
    pure: Mixture,
    weights: Tensor,
    basis: Tensor | None,
    stop: Stop,
    *,
    outliers: float = OUTLIERS,
    anchor: Anchor | None = None,
    smooth: bool = False,
) -> State:
    """EM from pure tissues and the nodes' weights, with a field if there is a basis ``(1, J, V)``.

    Only pure voxels speak for the field: where two tissues meet, mixels could explain any shade. With ``smooth`` the
    weights of a border's mixels are a smooth profile of their share, and a node's hold any share within its part.
    """
    observed, fractions = maximise.observed, maximise.fractions
    tissues = fractions.shape[1]
    least = LEAST_WIDTH if basis is None else 0.0  # a field could take what is wide for shading
    mixed = weights[:, tissues:]
    profile = mixel_profile.even(mixed, NODES) if smooth and mixed.shape[1] > 0 else None
    b = pure.field if basis is None or pure.field is not None else torch.ones_like(observed.values)
    outlying = marginal_density(observed, broad(observed))
    resp: Tensor | None = None
    trace: list[Tensor] = []
    converged, seen = False, maximise.seen(b)
    while len(trace) <= stop.max_iter:
        new, total = _expected(seen, nodes(pure, weights, fractions, smooth=smooth, least=least), outlying, outliers)
        trace.append(-total.mean()[None])
        converged = resp is not None and bool((resp - new).abs_().sum() < stop.tol * new.shape[-1])
        resp = new
        if converged:
            break
        share = resp.sum(1).mean()
        weights = resp.mean(-1) / share.clamp_min(1e-12)
        if profile is not None:
            profile = profile.updated(weights[:, tissues:])
            weights = torch.cat([weights[:, :tissues], profile.weights], 1)
        weights = capped(weights, tissues)
        outliers = min(max(1 - float(share), 1e-6), MOST_OUTLIERS)
        if anchor is not None:
            weights = anchor.weights
        if basis is not None:
            b = _field(observed, resp, pure, basis)
            seen = maximise.seen(b)
        pure = maximise.maximised(resp, seen, pure)
        pure = pure if anchor is None else anchored(pure, anchor)
    return State(pure._replace(field=b), weights, outliers, torch.stack(trace), converged, smooth)


def _expected(seen: MixelStatistics, mixture: Mixture, outlying: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """The E-step: responsibilities of the nodes ``(1, N, V)``, and log p of each voxel ``(1, 1, V)``."""
    inlying = seen.log_density(mixture).add_(mixture.weights.clamp_min(1e-30).log()[..., None])
    peak = inlying.amax(1, keepdim=True)
    resp = inlying.sub_(peak).clamp_min_(LEAST).exp_()
    evidence = resp.sum(1, keepdim=True).log_().add_(peak)
    total = contaminated(evidence, outlying, outliers)
    return resp.mul_((peak + math.log1p(-outliers) - total).exp_()), total


def _field(observed: Observed, resp: Tensor, pure: Mixture, basis: Tensor) -> Tensor:
    """The field from pure voxels that every sequence was measured in, and at all voxels ``(1, M, V)``."""
    n_tissues = pure.means.shape[1]
    whole = observed.measured.all(1, keepdim=True).to(resp)
    weights = resp[:, :n_tissues].mean(-1)
    tissues = Mixture(weights, pure.means, pure.covariances)
    return bias_field.field(observed.values, resp[:, :n_tissues] * whole, torch.ones_like(whole), tissues, basis)
