"""Expectation-maximisation for GMM and SVGMM (Schwab et al. 2024, Alg. 1 and 2): start, step, loop, result.

A start is nothing but responsibilities ``(B, K, *S)``, so any idea of where to begin (k-means++, known means, labels,
another method's output) is a function that returns them. Several restarts are one larger batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field
from monai_deepgmm.mixture.fit import Diagnostics, Fit, collapsed
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Covariance, Mixture, log_joint, m_step, masked_mean

#: How often one image's collapsed components are moved elsewhere before they are left as they are.
MAX_RESEEDS = 3


# Step ------------------------------------------------------------------------------------------------------------


def step(image: Tensor, mask: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """One E-step, with the likelihood that it costs nothing to know.

    Returns:
        Responsibilities ``(B, K, *S)``, the NLL per voxel ``(B,)``, and log p(I(x)) ``(B, 1, *S)``.
    """
    joint = log_joint(image, mixture)
    evidence = joint.logsumexp(1, keepdim=True)
    return (joint - evidence).exp() * mask, masked_mean(-evidence, mask), evidence


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


# Loop ------------------------------------------------------------------------------------------------------------


def fit_em(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    *,
    spatial: bool = False,
    covariance: Covariance = "diag",
    tol: float = 1e-6,
    max_iter: int = 1000,
    floor: float = VARIANCE_FLOOR,
    degree: int = 0,
) -> Fit:
    """Fits a mixture to each image of a batch by expectation-maximisation (S Alg. 1, Alg. 2 when ``spatial``).

    With a degree, the means are shaded by a bias field, which is found along with them (M eq. 3.6-3.8); that fit starts
    from one without a field, whose trace and iterations are not in the result.

    Images that have converged are left alone, so that an image's result does not depend on its neighbours in the
    batch. A component that collapses is moved to where the image is explained worst, at most ``MAX_RESEEDS`` times
    per image; the result says how often. Use float64 where the NLL's last digits matter.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``; every image needs voxels inside.
        start: responsibilities ``(B, K, *S)``, or ``(R, B, K, *S)`` for R restarts, of which the one with the lowest
            NLL is kept for each image.
        spatial: fit the SVGMM, whose weights are maps.
        covariance: the shape of Σ.
        tol: stop when the NLL per voxel gains less than this in one iteration.
        max_iter: stop then, converged or not.
        floor: the variance floor, as a fraction of each sequence's variance inside the mask.
        degree: P, the highest degree of the field's polynomials; 0: no field. With a field, 0 in the image must be no
            signal.

    Returns:
        The fit; nothing in it is NaN.
    """
    restarts = start.shape[0] if start.ndim == image.ndim + 1 else 1
    start = start.reshape(-1, *start.shape[-image.ndim + 1 :])
    inside, where = _pack_index(mask.to(image.dtype))
    every = inside.repeat(restarts, 1, 1)
    voxels = _pack(image, where, inside).repeat(restarts, 1, 1)
    options = _Options(spatial, covariance, tol, max_iter, floor)
    packed = _loop(voxels, every, _pack(start, where.repeat(restarts, 1), every), options)
    if degree:
        # From the unshaded fit: a field that is free from the start can take one tissue for another.
        basis = _pack(bias_field.basis(mask.to(image.dtype), degree), where, inside).repeat(restarts, 1, 1)
        packed = _loop(voxels, every, packed.resp, options, basis)
    return _unpack(_best(packed, restarts), where, inside, image.shape[2:])


class _Options(NamedTuple):
    spatial: bool
    covariance: Covariance
    tol: float
    max_iter: int
    floor: float


def _loop(image: Tensor, mask: Tensor, start: Tensor, options: _Options, basis: Tensor | None = None) -> Fit:
    """The iterations, on packed voxels: image ``(B, M, N)``, mask ``(B, 1, N)``, start ``(B, K, N)``."""
    batch = len(image)
    floor = options.floor * variance_inside(image, mask)  # (B, M)

    def maximise(rows: Tensor, resp: Tensor, previous: Mixture | None = None) -> Mixture:
        shape = {"covariance": options.covariance, "spatial": options.spatial, "floor": floor[rows]}
        if basis is None or previous is None:
            return m_step(image[rows], resp, mask[rows], **shape)  # type: ignore[arg-type]  # of the right kinds
        return bias_field.m_step(image[rows], resp, mask[rows], previous, basis[rows], **shape)  # type: ignore[arg-type]

    active = torch.arange(batch, device=image.device)
    mixture = maximise(active, start.to(image.dtype))
    if basis is not None:
        mixture = mixture._replace(field=torch.ones_like(image))
    if options.spatial:
        # Π_k(x) = 0 never changes again, so an SVGMM that began with hard responsibilities would end there. Only a
        # component without any voxel keeps 0: its mean is arbitrary, and it is moved in the first iteration.
        present = ((start * mask).sum(-1, keepdim=True) > 0).to(image.dtype)
        equal = present / present.sum(1, keepdim=True).clamp_min(1)
        mixture = mixture._replace(weights=equal.expand_as(mixture.weights))
    resp, last, evidence = step(image, mask, mixture)
    trace = [last.clone()]
    iterations = torch.zeros(batch, dtype=torch.long, device=image.device)
    reseeded = torch.zeros_like(iterations)
    converged = torch.zeros(batch, dtype=torch.bool, device=image.device)
    for _ in range(options.max_iter):
        updated = maximise(active, resp[active], mixture.rows(active))
        lost = collapsed(resp[active], mask[active]) & (reseeded[active] < MAX_RESEEDS)[:, None]
        moved = lost.any(1)
        if moved.any():
            updated = reseed(image[active], mask[active], updated, evidence[active], lost)
        new_resp, new_nll, new_evidence = step(image[active], mask[active], updated)
        gain = last[active] - new_nll
        mixture = mixture.updated(updated, functools.partial(_put, active))
        resp, last = _put(active, resp, new_resp), _put(active, last, new_nll)
        evidence = _put(active, evidence, new_evidence)
        trace.append(last.clone())
        iterations[active] += 1
        reseeded[active] += moved.long()
        converged[active] = (gain < options.tol) & ~moved
        active = active[~converged[active]]
        if len(active) == 0:
            break
    lost = collapsed(resp, mask)
    return Fit(resp, mixture, Diagnostics(last, torch.stack(trace), iterations, converged, reseeded, lost))


def variance_inside(image: Tensor, mask: Tensor) -> Tensor:
    """The variance of each sequence inside the mask ``(B, M)``; 1 where it is constant."""
    count = mask.sum(-1).clamp_min(1)
    centred = (image - ((image * mask).sum(-1) / count)[..., None]) * mask
    variance = centred.square().sum(-1) / count
    # Of equal values the computed mean is off by a rounding, so the variance of a constant is seldom exactly zero.
    low = torch.where(mask > 0, image, torch.inf).amin(-1)
    high = torch.where(mask > 0, image, -torch.inf).amax(-1)
    return torch.where(high > low, variance, 1.0)


def _put(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return new if len(rows) == len(old) else old.index_copy(0, rows, new)


# Result ----------------------------------------------------------------------------------------------------------


def _best(fits: Fit, restarts: int) -> Fit:
    """Keeps, for each image, the restart with the lowest NLL."""
    nll = fits.diagnostics.nll
    if restarts == 1 or nll is None:
        return fits
    rows = len(nll) // restarts
    choice = nll.reshape(restarts, rows).argmin(0)
    return fits.rows(choice * rows + torch.arange(rows, device=choice.device))


def _pack_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the voxels inside each image's mask to the front of one dense axis.

    Returns:
        The packed mask ``(B, 1, N)`` with N the largest number of voxels inside, and the voxels' flat positions
        ``(B, N)`` (an image with fewer voxels is filled up with positions outside its mask).
    """
    flat = mask.flatten(1).to(torch.bool)
    longest = max(int(flat.sum(1).max()), 1)
    where = flat.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return flat.take_along_dim(where, 1)[:, None].to(mask.dtype), where


def _pack(values: Tensor, where: Tensor, inside: Tensor) -> Tensor:
    """``(B, C, *S)`` → ``(B, C, N)``; what lies outside ``inside`` becomes 0, so that padding is always finite."""
    return torch.where(inside > 0, values.flatten(2).take_along_dim(where[:, None], 2), 0)


def _unpack(fits: Fit, where: Tensor, inside: Tensor, spatial_shape: torch.Size) -> Fit:
    def spread(values: Tensor, outside: float) -> Tensor:
        full = values.new_full((*values.shape[:2], spatial_shape.numel()), outside)
        values = torch.where(inside > 0, values, outside)
        return full.scatter(2, where[:, None].expand_as(values), values).reshape(*values.shape[:2], *spatial_shape)

    mixture = fits.mixture
    if mixture.weights.ndim == 3:
        mixture = mixture._replace(weights=spread(mixture.weights, 1 / mixture.weights.shape[1]))
    if mixture.field is not None:
        mixture = mixture._replace(field=spread(mixture.field, 1.0))
    return fits._replace(resp=spread(fits.resp, 0.0), mixture=mixture)
