"""Densities and moments of shaded voxels as matrix products, where some sequences may not have been measured.

With ``c = x − b μ₀`` (μ₀ any centre, b the field) and ``δ = μ − μ₀`` a node's distance ``(x − b μ)ᵀ P (x − b μ)`` is
linear in the products of all pairs of c, of c with b, and of all pairs of b. So are the moments that an M-step needs.
What was not measured is 0 in all of them, and the precision P is that of the sequences that were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture.gaussian import Mixture


class Pattern(NamedTuple):
    """Voxels in which the same sequences were measured.

    Attributes:
        kept: the indices of those sequences.
        where: the voxels; None: all.
    """

    kept: list[int]
    where: Tensor | None


class Moments(NamedTuple):
    """Sums over voxels, weighted by each node's responsibilities; all ``(N, M, M)``.

    Attributes:
        cc: of ``c cᵀ``.
        cb: of ``c bᵀ``.
        bb: of ``b bᵀ``.
        seen: of 1 where both sequences were measured.
    """

    cc: Tensor
    cb: Tensor
    bb: Tensor
    seen: Tensor


class MixelStatistics(NamedTuple):
    """The products of V voxels.

    Attributes:
        features: ``(F, V)``: c c, b b and 1 of all pairs of sequences, and c b of all.
        centre: μ₀ ``(M,)``.
        patterns: which voxels hold which sequences.
    """

    features: Tensor
    centre: Tensor
    patterns: tuple[Pattern, ...]

    def log_density(self, mixture: Mixture) -> Tensor:
        """Log p of what was measured in each voxel under each component ``(1, N, V)``; 0 where nothing was."""
        count, voxels = mixture.means.shape[1], self.features.shape[1]
        if len(self.patterns) == 1 and self.patterns[0].where is None:
            theta, constant = self._coefficients(mixture, self.patterns[0].kept)
            return torch.addmm(constant[:, None], theta, self.features)[None]
        out = self.features.new_zeros(1, count, voxels)
        for kept, where in self.patterns:
            theta, constant = self._coefficients(mixture, kept)
            out[0, :, where] = torch.addmm(constant[:, None], theta, self.features[:, where])
        return out

    def _coefficients(self, mixture: Mixture, kept: list[int]) -> tuple[Tensor, Tensor]:
        """θ ``(N, F)`` and a constant ``(N,)`` with ``log g = θ · φ + constant`` of the margin of some sequences."""
        n, m = len(mixture.means[0]), len(self.centre)
        covariances = mixture.covariances[0]
        if covariances.ndim == 2:
            covariances = torch.diag_embed(covariances.expand(n, m))
        precision, constant = covariances.new_zeros(n, m, m), covariances.new_zeros(n)
        if kept:
            index = torch.tensor(kept)
            cholesky = torch.linalg.cholesky(covariances[:, index[:, None], index])
            precision[:, index[:, None], index] = torch.cholesky_inverse(cholesky)
            log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            constant = -log_det - 0.5 * len(kept) * math.log(2 * math.pi)
        delta = mixture.means[0] - self.centre
        i, j = torch.triu_indices(m, m)
        both = precision[:, i, j] * torch.where(i == j, -0.5, -1.0).to(precision)
        parts = [
            both,
            both * delta[:, i] * delta[:, j],
            torch.zeros_like(both),
            (precision * delta[:, None]).flatten(1),
        ]
        return torch.cat(parts, 1), constant

    def moments(self, resp: Tensor) -> Moments:
        """Of responsibilities ``(N, V)``."""
        n, m = len(resp), len(self.centre)
        found = resp @ self.features.T
        i, j = torch.triu_indices(m, m)
        cc, bb, seen, cb = found.split([len(i), len(i), len(i), m * m], 1)  # type: ignore[no-untyped-call]
        symmetric = found.new_empty(3, n, m, m)
        for out, values in zip(symmetric, (cc, bb, seen), strict=True):
            out[:, i, j] = out[:, j, i] = values
        return Moments(symmetric[0], cb.reshape(n, m, m), symmetric[1], symmetric[2])


def patterns(measured: Tensor) -> tuple[Pattern, ...]:
    """The patterns of what was measured ``(M, V)``."""
    if bool(measured.all()):
        return (Pattern(list(range(len(measured))), None),)
    code = (measured * 2 ** torch.arange(len(measured), device=measured.device)[:, None]).sum(0)
    codes = sorted(set(code.tolist()))
    return tuple(Pattern([m for m in range(len(measured)) if c >> m & 1], (code == c).nonzero()[:, 0]) for c in codes)


def statistics(
    values: Tensor, measured: Tensor, field: Tensor | None, centre: Tensor, known: tuple[Pattern, ...]
) -> MixelStatistics:
    """The products of voxels.

    Args:
        values: x ``(M, V)``.
        measured: ``(M, V)`` bool.
        field: b ``(M, V)``; None: 1.
        centre: μ₀ ``(M,)``.
        known: the patterns of what was measured.
    """
    whole = len(known) == 1 and known[0].where is None
    b = torch.ones_like(values) if field is None else field
    c = values - b * centre[:, None]
    if not whole:
        b, c = b * measured, torch.where(measured, c, 0)
    m = len(values)
    i, j = torch.triu_indices(m, m)
    features = values.new_ones(3 * len(i) + m * m, values.shape[1])
    cc, bb, seen, cb = features.split([len(i), len(i), len(i), m * m])  # type: ignore[no-untyped-call]
    torch.mul(c[i], c[j], out=cc)
    torch.mul(b[i], b[j], out=bb)
    if not whole:
        torch.mul(measured[i], measured[j].to(values), out=seen)
    torch.mul(c[:, None], b, out=cb.view(m, m, -1))
    return MixelStatistics(features, centre, known)
