"""The bias field: the smooth shading of MR images, as part of the mixture (Ma 2022, M, eq. 2.8 and 3.6-3.8).

An image is ``I(x) = b(x) J(x) + noise`` with ``b = ωᵀg``, g Legendre polynomials up to a degree, orthonormal over the
mask. Each sequence has a field of its own. Its scale is fixed: b has mean 1 over the mask, so the first coefficient
is 1. Intensities must be on a scale where 0 is no signal, or a product would mean nothing.

Symbols as in ``mixture``; J basis functions.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Covariance, Mixture, floored_covariances

#: A basis function that the others explain but for this share of its length does not exist on the mask.
DEPENDENT = 1e-6
#: A field above this spread, of which tissues explain this much, follows the tissues rather than the coil.
NOTABLE, ENTANGLED = 0.05, 0.5


def basis(mask: Tensor, degree: int, *, beyond: bool = False) -> Tensor:
    """Products of Legendre polynomials of total degree at most P, orthonormal over each image's mask (M eq. 3.6).

    ``(1/|Ω|) Σ_{x∈Ω} g_i(x) g_j(x) = δ_ij``, and ``g_0 = 1``. There are (P+1)(P+2)/2 of them in 2-D and
    (P+1)(P+2)(P+3)/6 in 3-D; those that the mask cannot tell from the ones before are 0 (a mask of one slice, say).

    Args:
        mask: Ω ``(B, 1, *S)``.
        degree: P, at least 0.
        beyond: whether the polynomials go on outside the mask.

    Returns:
        g ``(B, J, *S)``, 0 outside the mask unless ``beyond``.
    """
    raw = torch.stack([_raw(m[0], degree) for m in mask])  # (B, J, *S)
    flat, inside = raw.flatten(2), mask.flatten(2).to(raw.dtype)
    gram = (flat * inside) @ flat.mT / inside.sum(-1, keepdim=True).clamp_min(1)
    out = (_orthonormal(gram) @ flat).reshape(raw.shape).to(mask.dtype)
    return out if beyond else out * mask


def m_step(
    image: Tensor,
    resp: Tensor,
    mask: Tensor,
    previous: Mixture,
    basis: Tensor,
    *,
    covariance: Covariance = "diag",
    spatial: bool = False,
    floor: float | Tensor = VARIANCE_FLOOR,
) -> Mixture:
    """The M-step of a shaded mixture: ω, then μ, then Σ, each the best given the others, so that the NLL never rises.

    ``ω = U⁻¹V``; ``μ_k = (Σ_x w_xk b Σ_k⁻¹ b)⁻¹ Σ_x w_xk b Σ_k⁻¹ I``, which for a diagonal Σ is
    ``Σ_x w_xk b I / Σ_x w_xk b²``; ``Σ_k = Σ_x w_xk (I − b μ_k)(I − b μ_k)ᵀ / Σ_x w_xk`` (M eq. 3.8).

    Args:
        image: ``(B, M, *S)``, 0 is no signal.
        resp: responsibilities w ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        previous: its means and covariances give the field.
        basis: from ``basis``.
        covariance: the shape of Σ.
        spatial: True for the SVGMM.
        floor: as in ``mixture.m_step``.

    Returns:
        The mixture with its field, 1 outside the mask.
    """
    b = field(image, resp, mask, previous, basis)
    voxels, w = image.flatten(2), (resp * mask).flatten(2)  # (B, M, N), (B, K, N)
    count = w.sum(-1)
    flat = b.flatten(2)
    means = _means(voxels, w, flat, _precision(previous))
    centred = voxels[:, None] - flat[:, None] * means[..., None]
    covariances = floored_covariances(centred, w, covariance, floor)
    weights = resp if spatial else count / count.sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return Mixture(weights, means, covariances, b)


def field(image: Tensor, resp: Tensor, mask: Tensor, mixture: Mixture, basis: Tensor) -> Tensor:
    """The field b ``(B, M, *S)`` that explains the image best, given the tissues (M eq. 3.8): mean 1 over the mask.

    ``U = Σ_x g(x) g(x)ᵀ J₁(x)``, ``V = Σ_x g(x) J₂(x)``, ``J₁ = Σ_k w_xk μ_kᵀ Σ_k⁻¹ μ_k``,
    ``J₂ = Σ_k w_xk μ_kᵀ Σ_k⁻¹ I(x)``. With a field per sequence the systems of a diagonal Σ are separate, and those of
    a full one are blocks of one system.

    Args:
        image: ``(B, M, *S)``, 0 is no signal.
        resp: w ``(B, K, *S)``.
        mask: ``(B, 1, *S)``.
        mixture: μ and Σ.
        basis: g ``(B, J, *S)``.

    Returns:
        b, 1 outside the mask.
    """
    w, g = (resp * mask).flatten(2), basis.flatten(2)
    precision = _precision(mixture)
    if mixture.covariances.ndim == 3:
        omega = _separate(image.flatten(2), w, mixture.means, precision.diagonal(dim1=-2, dim2=-1), g)
    else:
        omega = _block(image.flatten(2), w, mixture.means, precision, g)
    # g_0 = 1 and the others have mean 0, so that the first coefficient is the field's mean.
    scale = omega[..., :1]
    there = scale.abs() > DEPENDENT
    omega = torch.where(there, omega / torch.where(there, scale, 1), 0)
    b = torch.where(there, omega @ g, 1).reshape(image.shape)  # a sequence without signal tells of no field
    return torch.where(mask > 0, b, 1)


def entangled(mixture: Mixture, resp: Tensor, mask: Tensor) -> Tensor:
    """The share of each field's variance over the mask that lies between tissues ``(B, M)``: 0 none, 1 all.

    A coil knows nothing of tissues. Where the field is notable and this is large, the field eats contrast; see
    ``suspicious``.
    """
    if mixture.field is None:
        return torch.zeros_like(mixture.means[:, 0])
    found = []
    for b in mixture.field.unbind(1):  # one sequence and tissue at a time, as those of a head are large
        above = ((b - 1) * mask[:, 0]).flatten(1)  # (B, N), mean 0
        weights = (((w * mask[:, 0]).flatten(1)) for w in resp.unbind(1))
        between = [(w * above).sum(1).square() / w.sum(1).clamp_min(1e-9) for w in weights]
        found.append(torch.stack(between).sum(0) / above.square().sum(1).clamp_min(1e-12))
    return torch.stack(found, 1)


def suspicious(mixture: Mixture, resp: Tensor, mask: Tensor) -> Tensor:
    """Whether a field follows the tissues ``(B, M)``: it is notable, and they explain most of it."""
    if mixture.field is None:
        return torch.zeros_like(mixture.means[:, 0], dtype=torch.bool)
    count = mask.flatten(1).sum(1).clamp_min(1)
    each = [(((b - 1) * mask[:, 0]).flatten(1).square().sum(1) / count).sqrt() for b in mixture.field.unbind(1)]
    notable = torch.stack(each, 1) > NOTABLE
    return notable & (entangled(mixture, resp, mask) > ENTANGLED) if bool(notable.any()) else notable


def terms(degree: int, dimensions: int) -> int:
    """J: how many polynomials of total degree at most P there are in so many dimensions."""
    return math.comb(degree + dimensions, dimensions)


# Basis -----------------------------------------------------------------------------------------------------------


def _raw(mask: Tensor, degree: int) -> Tensor:
    """Legendre products ``(J, *S)``, −1 to 1 being the box around one mask ``(*S)``; low degrees first."""
    inside = mask > 0
    axes = [_legendre(inside, axis, degree) for axis in range(mask.ndim)]  # each (P + 1, n)
    powers = [p for p in product(range(degree + 1), repeat=mask.ndim) if sum(p) <= degree]
    out = []
    for power in sorted(powers, key=lambda p: (sum(p), p)):
        value = torch.ones_like(mask, dtype=torch.float64)
        for axis, p in enumerate(power):
            shape = [-1 if i == axis else 1 for i in range(mask.ndim)]
            value = value * axes[axis][p].reshape(shape)
        out.append(value)
    return torch.stack(out)


def _legendre(inside: Tensor, axis: int, degree: int) -> Tensor:
    """P_0 … P_degree along one axis ``(degree + 1, n)``, from −1 to 1 over the mask's extent."""
    others = [i for i in range(inside.ndim) if i != axis]
    where = torch.nonzero(inside.sum(others) if others else inside).flatten()
    low, high = (int(where[0]), int(where[-1])) if len(where) else (0, 1)
    t = torch.arange(inside.shape[axis], dtype=torch.float64, device=inside.device)
    t = (2 * t - low - high) / max(high - low, 1)
    rows = [torch.ones_like(t), t]
    for n in range(1, degree):
        rows.append(((2 * n + 1) * t * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows[: degree + 1])


def _orthonormal(gram: Tensor) -> Tensor:
    """The lower triangular ``(B, J, J)`` that orthonormalises functions with these inner products (Gram-Schmidt)."""
    n = gram.shape[-1]
    rows: list[Tensor] = []
    for j in range(n):
        row = torch.zeros_like(gram[:, 0])
        row[:, j] = 1
        # Twice, since once loses digits.
        for _ in range(2):
            for done in rows:
                row = row - torch.einsum("bi,bij,bj->b", done, gram, row)[:, None] * done
        length = torch.einsum("bi,bij,bj->b", row, gram, row)
        exists = length > DEPENDENT * gram[:, j, j]
        row = torch.where(exists[:, None], row / length.clamp_min(1e-300).sqrt()[:, None], 0)
        rows.append(row)
    return torch.stack(rows, 1)


# Closed forms ----------------------------------------------------------------------------------------------------


def _precision(mixture: Mixture) -> Tensor:
    """Σ⁻¹ ``(B, K, M, M)``."""
    _, k, m = mixture.means.shape
    covariances = mixture.covariances
    if covariances.ndim == 3:
        return torch.diag_embed(1 / covariances.expand_as(mixture.means))
    inverse: Tensor = torch.linalg.inv(covariances)
    return inverse.expand(-1, k, m, m)


def _means(voxels: Tensor, w: Tensor, b: Tensor, precision: Tensor) -> Tensor:
    """μ ``(B, K, M)`` by least squares weighted with w and Σ⁻¹."""
    bb = torch.einsum("bkx,bmx,bnx->bkmn", w, b, b)
    bi = torch.einsum("bkx,bmx,bnx->bkmn", w, b, voxels)
    left, right = precision * bb, (precision * bi).sum(-1)
    ridge = torch.finfo(w.dtype).tiny ** 0.5 * torch.eye(left.shape[-1]).to(left)
    empty = (w.sum(-1) <= 0)[..., None]
    left = torch.where(empty[..., None], torch.eye(left.shape[-1]).to(left), left + ridge)
    solved: Tensor = torch.linalg.solve(left, right[..., None]).squeeze(-1)
    return torch.where(empty, 0, solved)


def _separate(voxels: Tensor, w: Tensor, means: Tensor, inverse: Tensor, g: Tensor) -> Tensor:
    """ω ``(B, M, J)`` for variances: one system for each sequence."""
    j1 = torch.einsum("bkx,bkm->bmx", w, means.square() * inverse)
    j2 = torch.einsum("bkx,bkm->bmx", w, means * inverse) * voxels
    u = torch.stack([(g * j[:, None]) @ g.mT for j in j1.unbind(1)], 1)  # (B, M, J, J)
    return _solved(u, j2 @ g.mT)


def _block(voxels: Tensor, w: Tensor, means: Tensor, precision: Tensor, g: Tensor) -> Tensor:
    """ω ``(B, M, J)`` for covariance matrices: sequences depend on each other, in one system of M·J unknowns."""
    n_images, n_sequences, n_terms = len(g), means.shape[-1], g.shape[1]
    products, seen = [], []  # of each tissue: Σ w g gᵀ (B, J, J), Σ w I gᵀ (B, M, J)
    for share in w.unbind(1):
        weighted = g * share[:, None]
        products.append(weighted @ g.mT)
        seen.append(voxels @ weighted.mT)
    drawn = means[..., None] * precision  # μ_m P_mn
    u = torch.einsum("bkmn,bkij->bminj", drawn * means[..., None, :], torch.stack(products, 1))
    v = torch.einsum("bkmn,bknj->bmj", drawn, torch.stack(seen, 1))
    size = n_sequences * n_terms
    return _solved(u.reshape(n_images, size, size), v.reshape(n_images, size)).reshape(v.shape)


def _solved(u: Tensor, v: Tensor) -> Tensor:
    """``U⁻¹V``; functions that do not exist on the mask get the coefficient 0."""
    lonely = u.diagonal(dim1=-2, dim2=-1) <= 0
    scale = u.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None]
    ridge = torch.where(lonely, scale, 1e-9 * scale if u.dtype == torch.float64 else 1e-6 * scale)
    solved: Tensor = torch.linalg.solve(u + torch.diag_embed(ridge), v[..., None]).squeeze(-1)
    return solved
