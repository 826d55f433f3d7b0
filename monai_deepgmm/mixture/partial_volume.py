"""Partial volume: a mixture whose voxels may hold two tissues at once, shaded, with neighbours that agree.

At 1 mm most voxels of the cortex lie across a border. A Gaussian mixture makes a tissue of such *mixels*, or widens the
pure ones until their borders move. Here every two tissues that touch have mixels: a share u of one and 1 − u of the
other, every u as likely, with mean ``(1 − u) μ_a + u μ_b`` and covariance ``(1 − u) Σ_a + u Σ_b`` (Choi et al. 1991;
Santago and Gage 1993). With u on a few nodes this is again a Gaussian mixture, of N nodes with fractions a_n of K
tissues, and EM finds μ, Σ, the nodes' weights and Ma's bias field.

So few parameters need no more than a lattice of voxels. Then each voxel's fractions are found on the full grid, where
neighbours pull: ``π_n(x) ∝ π_n exp(β a_nᵀ s̄(x))``, s̄ the average of the neighbours' fractions: a Markov random field in
its mean-field approximation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture import em
from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste
from monai_deepgmm.mixture.fit import Diagnostics, Fit, collapsed, joined
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Mixture, floored_matrices, log_density

#: A fit has converged when the nodes' responsibilities change by less than this, summed over a voxel, on average.
TOL = 1e-3
MAX_ITER = 500
#: Into how many equal parts the share u is cut; a node lies in the middle of each.
NODES = 5
#: How many times fewer voxels the first fit has than the second.
COARSER = 6
#: The share of voxels that are mixels when a fit begins.
MIXELS = 0.3
#: So many voxels at a time, so that a whole head needs little memory.
CHUNK = 1 << 17
#: The degree of the bias field's polynomials, and that of the first field, which must gain BIC.
DEGREE, FIRST_DEGREE = 3, 2
#: Voxels repeat each other: so wide a patch of tissue, in mm, counts as one observation in BIC.
PATCH_MM = 16.0


class Model(NamedTuple):
    """What is assumed besides the data.

    Attributes:
        borders: pairs of tissues that touch, and so share voxels.
        degree: of the bias field; 0: none.
        require_bic_gain: whether the field must explain more than its parameters cost (``bic_penalty``), or is dropped.
        pooling: ν; a tissue's covariance is drawn towards the average of all, as by ν N voxels of N.
        coupling: β, how strongly neighbours agree; 0: not at all.
        sweeps: mean-field iterations.
        voxels: how many voxels of the mask the lattice holds, at most.
    """

    borders: tuple[tuple[int, int], ...]
    degree: int = DEGREE
    require_bic_gain: bool = True
    pooling: float = 0.1
    coupling: float = 3.0
    sweeps: int = 3
    voxels: int = 25_000


def fit(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    spacing_mm: Sequence[float],
    model: Model,
    *,
    tol: float = TOL,
    max_iter: int = MAX_ITER,
    floor: float = VARIANCE_FLOOR,
) -> Fit:
    """Fits each image of a batch.

    Args:
        image: ``(B, M, *S)``; with a field, 0 must be no signal.
        mask: ``(B, 1, *S)``; every image needs voxels inside.
        start: where each tissue is expected ``(B, K, *S)``.
        spacing_mm: of the axes in ``*S``.
        model: the assumptions.
        tol: a fit has converged when responsibilities change by less.
        max_iter: iterations at most.
        floor: the variance floor, as a fraction of each sequence's variance inside the mask.

    Returns:
        The fit, in single precision. ``resp`` are the expected fractions of the K tissues; the mixture is that of the
        pure tissues, with their shares ``(B, K)`` as weights, and has a field if the model does. The trace is the NLL
        on the lattice; since Σ is found from pure voxels and pooled, it need not fall in every iteration.
    """
    stop = _Stop(tol, max_iter)
    images = zip(*(torch.split(values, 1) for values in (image, mask, start)), strict=True)
    return joined([_one(i, m, s, tuple(spacing_mm), model, stop, floor) for i, m, s in images])


def mixing(tissues: int, borders: Sequence[tuple[int, int]]) -> Tensor:
    """The fractions a of each node ``(N, K)``: the pure tissues, then for each border its mixels, u rising."""
    rows = [torch.eye(tissues)]
    u = (torch.arange(NODES) + 0.5) / NODES
    for a, b in borders:
        mixed = torch.zeros(NODES, tissues)
        mixed[:, a], mixed[:, b] = 1 - u, u
        rows.append(mixed)
    return torch.cat(rows)


def nodes(pure: Mixture, weights: Tensor, fractions: Tensor) -> Mixture:
    """The mixture of all nodes.

    Args:
        pure: means ``(B, K, M)``, covariances ``(B, K, M, M)`` and field of the tissues.
        weights: of the nodes ``(B, N)``.
        fractions: a ``(N, K)``.
    """
    covariances = torch.einsum("nk,bkij->bnij", fractions, pure.covariances)
    if covariances.shape[-1] == 1:  # of one sequence the variance says as much, and costs less
        covariances = covariances[..., 0]
    return Mixture(weights, fractions @ pure.means, covariances, pure.field)


def bic_penalty(terms: int, mask: Tensor, spacing_mm: Sequence[float]) -> float:
    """The NLL per voxel that a field must gain: half a logarithm of the observations for each parameter, as in BIC.

    Args:
        terms: free parameters.
        mask: of one image ``(1, 1, *S)``.
        spacing_mm: of its axes; a patch of ``PATCH_MM`` is one observation.
    """
    patches = float(mask.sum()) * math.prod(s / PATCH_MM for s in spacing_mm)
    return terms / 2 * math.log(max(patches, 2.0)) / max(patches, 2.0)


# One image -------------------------------------------------------------------------------------------------------


class _Stop(NamedTuple):
    tol: float
    max_iter: int


class _State(NamedTuple):
    """What EM finds on the lattice.

    Attributes:
        pure: the tissues, and the field at the voxels of the lattice.
        weights: of the nodes ``(1, N)``.
        trace: NLL per voxel ``(T + 1, 1)``.
        converged: whether it did.
    """

    pure: Mixture
    weights: Tensor
    trace: Tensor
    converged: bool


def _one(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    spacing_mm: tuple[float, ...],
    model: Model,
    stop: _Stop,
    floor: float,
) -> Fit:
    """The fit of one image, as a batch of one."""
    box, full = enclosing(mask), image.shape[2:]
    image, mask, start = (cut(values, box).float() for values in (image, mask, start))
    fractions = mixing(start.shape[1], model.borders).to(image)
    # EM creeps, so the way is gone on a few voxels, and only its end on more.
    coarse = _Lattice(mask, _stride(mask, spacing_mm, max(model.voxels // COARSER, 1)))
    step = _step(coarse.voxels(image), fractions, model.pooling, floor)
    begin = _begin(step, coarse.voxels(start))
    found = _em(step, *begin, None, stop)
    shaded = _likelier(step, [begin, (found.pure, found.weights)], coarse, model, stop) if model.degree else None
    lattice = _Lattice(mask, _stride(mask, spacing_mm, model.voxels))
    step = _step(lattice.voxels(image), fractions, model.pooling, floor)
    found, field = _em(step, found.pure, found.weights, None, stop), None
    if shaded is not None:
        found, lattice_field = _shaded(step, found, shaded, lattice, spacing_mm, model, stop)
        field = torch.ones_like(image) if lattice_field is None else _on_grid(lattice_field, lattice.stride, mask)
    resp, last = _everywhere(image, mask, found, field, fractions, spacing_mm, model)
    pure = found.pure._replace(
        weights=resp.flatten(2).sum(-1) / mask.sum(),
        field=None if field is None else 1 + paste(field - 1, box, full),
    )
    diagnostics = Diagnostics(
        nll=last,
        trace=found.trace,
        iterations=torch.tensor([len(found.trace) - 1]),
        converged=torch.tensor([found.converged]),
        collapsed=collapsed(resp.flatten(2), mask.flatten(2)),
    )
    return Fit(paste(resp, box, full), pure, diagnostics)


class _Lattice:
    """Every so many voxels of one image along each axis.

    Args:
        mask: ``(1, 1, *S)``.
        stride: for each axis of ``*S``.
    """

    def __init__(self, mask: Tensor, stride: tuple[int, ...]) -> None:
        self.stride = stride
        self.where = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
        self.mask = mask[self.where]

    def inside(self, values: Tensor) -> Tensor:
        """Values on the lattice ``(1, C, *L)`` → those inside the mask ``(1, C, V)``."""
        return values[:, :, self.mask[0, 0] > 0]

    def voxels(self, values: Tensor) -> Tensor:
        """An image ``(1, C, *S)`` → its voxels of the lattice inside the mask ``(1, C, V)``."""
        return self.inside(values[self.where])


def _stride(mask: Tensor, spacing_mm: Sequence[float], voxels: int) -> tuple[int, ...]:
    """How many voxels to go along each axis, so that the lattice is about as coarse in mm everywhere, and small."""
    for step in itertools.count(1):
        stride = tuple(max(1, round(step * min(spacing_mm) / s)) for s in spacing_mm)
        lattice = mask[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
        if lattice.sum() <= voxels:
            break
    if lattice.sum() == 0:  # a mask so thin that every step leaves it out
        return (1,) * len(stride)
    return stride


# EM on the lattice -----------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The M-step of the pure tissues.

    Attributes:
        voxels: ``(1, M, V)``.
        fractions: a ``(N, K)``.
        pooling: ν.
        floor: added to the variances ``(1, M)``.
    """

    voxels: Tensor
    fractions: Tensor
    pooling: float
    floor: Tensor

    def __call__(self, resp: Tensor, b: Tensor | None, previous: Mixture | None) -> Mixture:
        """μ by least squares over all nodes, ``I(x) ≈ b(x) a_nᵀ μ``; Σ from what is left at the pure ones, pooled.

        Args:
            resp: of the nodes ``(1, N, V)``.
            b: the field ``(1, M, V)`` or None.
            previous: its variances weigh the nodes; None: all weigh the same.
        """
        voxels, a = self.voxels, self.fractions
        b = torch.ones_like(voxels) if b is None else b
        n_tissues = a.shape[1]
        weight = torch.ones(len(a), voxels.shape[1]).to(voxels)
        if previous is not None:
            weight = 1 / (a @ previous.covariances[0].diagonal(dim1=-2, dim2=-1))  # (N, M)
        bb, bx = ((resp[0] @ values[0].mT) * weight for values in (b.square(), b * voxels))  # (N, M)
        left, right = torch.einsum("nm,nk,nl->mkl", bb, a, a), torch.einsum("nm,nk->mk", bx, a)
        ridge = 1e-6 * left.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        eye = torch.eye(n_tissues).to(left)
        means = torch.linalg.solve(left + ridge[:, None, None] * eye, right[..., None]).squeeze(-1).mT[None]
        w = resp[:, :n_tissues]
        centred = voxels[:, None] - b[:, None] * means[..., None]  # (1, K, M, V)
        scatter = (centred * w[:, :, None]) @ centred.mT
        count = w.sum(-1)
        average = scatter.sum(1, keepdim=True) / count.sum(1).clamp_min(1e-6)[:, None, None, None]
        pooled = self.pooling * voxels.shape[-1] + 1e-6
        covariances = (scatter + pooled * average) / (count + pooled)[..., None, None]
        covariances = floored_matrices(covariances, self.floor[:, None])
        return Mixture(count / count.sum(1, keepdim=True).clamp_min(1e-6), means, covariances)


def _step(voxels: Tensor, fractions: Tensor, pooling: float, floor: float) -> _Step:
    """The M-step with the variance floor as a fraction of each sequence's variance."""
    return _Step(voxels, fractions, pooling, floor * em.variance_inside(voxels, torch.ones_like(voxels[:, :1])))


def _begin(step: _Step, expected: Tensor) -> tuple[Mixture, Tensor]:
    """The pure tissues and the nodes' weights, from where each tissue is expected ``(1, K, V)``."""
    n_mixels = len(step.fractions) - expected.shape[1]
    nothing = expected.new_zeros(1, n_mixels, expected.shape[-1])
    mixels = torch.full((1, n_mixels), MIXELS / max(n_mixels, 1)).to(expected)
    weights = torch.cat([expected.mean(-1) * (1 - mixels.sum()), mixels], 1)
    return step(torch.cat([expected, nothing], 1), None, None), weights


def _likelier(
    step: _Step, starts: Sequence[tuple[Mixture, Tensor]], lattice: _Lattice, model: Model, stop: _Stop
) -> _State:
    """The likelier of fits with a field of a low degree.

    A field that is free from the start can take one tissue for another, and one that starts from the unshaded fit can
    stay in its valley.
    """
    basis = lattice.inside(bias.basis(lattice.mask, _first(model)))
    tried = [_em(step, pure, weights, basis, stop) for pure, weights in starts]
    return min(tried, key=lambda state: float(state.trace[-1]))


def _first(model: Model) -> int:
    """The degree of the first field."""
    return min(FIRST_DEGREE, model.degree) if model.require_bic_gain else model.degree


def _shaded(
    step: _Step,
    found: _State,
    start: _State,
    lattice: _Lattice,
    spacing_mm: tuple[float, ...],
    model: Model,
    stop: _Stop,
) -> tuple[_State, Tensor | None]:
    """The fit with a field, and that field on the whole lattice; without, and None, if it gains no BIC.

    Where BIC must gain, the low degree goes first, which costs least.

    Args:
        step: on the lattice.
        found: the unshaded fit.
        start: a shaded fit on another lattice.
        lattice: the lattice.
        spacing_mm: of the image.
        model: the assumptions.
        stop: when a fit ends.
    """
    pure, weights, field = start.pure._replace(field=None), start.weights, None
    spaced = tuple(n * s for n, s in zip(lattice.stride, spacing_mm, strict=True))
    for degree in sorted({_first(model), model.degree}):
        basis = bias.basis(lattice.mask, degree, beyond=True)
        shaded = _em(step, pure, weights, lattice.inside(basis), stop)
        gain = float(found.trace[-1] - shaded.trace[-1])
        terms = step.voxels.shape[1] * (basis.shape[1] - 1)
        if model.require_bic_gain and field is None and gain <= bic_penalty(terms, lattice.mask, spaced):
            break
        found, field = shaded, _extended(shaded.pure.field, basis, lattice)
        pure, weights = shaded.pure, shaded.weights
    return found, field


def _em(step: _Step, pure: Mixture, weights: Tensor, basis: Tensor | None, stop: _Stop) -> _State:
    """EM from pure tissues and the nodes' weights, with a field if there is a basis ``(1, J, V)``.

    Only pure voxels speak for the field: where two tissues meet, mixels could explain any shade.
    """
    voxels, n_tissues = step.voxels, pure.means.shape[1]
    ones = torch.ones_like(voxels[:, :1])
    b = pure.field if basis is None or pure.field is not None else torch.ones_like(voxels)
    resp: Tensor | None = None
    trace: list[Tensor] = []
    converged = False
    while len(trace) <= stop.max_iter:
        mixture = nodes(pure._replace(field=b), weights, step.fractions)
        new, surprise, _ = em.step(voxels, ones, mixture)
        trace.append(surprise)
        converged = resp is not None and bool((new - resp).abs().sum(1).mean() < stop.tol)
        resp = new
        if converged:
            break
        weights = resp.mean(-1)
        if basis is not None:
            tissues = Mixture(weights[:, :n_tissues], pure.means, pure.covariances)
            b = bias.field(voxels, resp[:, :n_tissues], ones, tissues, basis)
        pure = step(resp, b, pure)
    return _State(pure._replace(field=b), weights, torch.stack(trace), converged)


# The full grid ---------------------------------------------------------------------------------------------------


def _extended(field: Tensor | None, basis: Tensor, lattice: _Lattice) -> Tensor:
    """A field known inside the mask ``(1, M, V)``, wherever the basis ``(1, J, *L)`` is."""
    if field is None:
        raise ValueError("no field to extend")
    g = lattice.inside(basis)
    omega = field @ g.mT / g.shape[-1]  # the basis is orthonormal over these voxels
    return (omega @ basis.flatten(2)).reshape(1, -1, *basis.shape[2:])


def _on_grid(field: Tensor, stride: tuple[int, ...], mask: Tensor) -> Tensor:
    """A field on the lattice, on the full grid ``(1, M, *S)``: linear in between, mean 1 over the mask, 1 outside."""
    sides = [(n - 1) * s + 1 for n, s in zip(field.shape[2:], stride, strict=True)]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    full = functional.interpolate(field, size=sides, mode=mode, align_corners=True)
    # Voxels after the lattice's last have its field.
    pads = [p for n, s in zip(reversed(mask.shape[2:]), reversed(sides), strict=True) for p in (0, n - s)]
    full = functional.pad(full, pads, mode="replicate")
    mean = (full * mask).flatten(2).sum(-1) / mask.sum()
    return torch.where(mask > 0, full / mean.reshape(1, -1, *[1] * len(sides)), 1)


def _everywhere(
    image: Tensor,
    mask: Tensor,
    found: _State,
    field: Tensor | None,
    fractions: Tensor,
    spacing_mm: tuple[float, ...],
    model: Model,
) -> tuple[Tensor, Tensor]:
    """Fractions ``(1, K, *S)`` on the full grid, where neighbours pull, and the NLL without that pull ``(1,)``."""
    where = torch.nonzero(mask.flatten() > 0).flatten()
    parts = torch.split(where, CHUNK)
    log_weights = found.weights[0].clamp_min(torch.finfo(image.dtype).tiny).log()[:, None]
    joint = image.new_empty(len(fractions), len(where))
    for part, target in zip(parts, torch.split(joint, CHUNK, 1), strict=True):
        b = None if field is None else field.flatten(2)[:, :, part]
        mixture = nodes(found.pure._replace(field=b), found.weights, fractions)
        torch.add(log_density(image.flatten(2)[:, :, part], mixture)[0], log_weights, out=target)
    last = -torch.cat([part.logsumexp(0) for part in torch.split(joint, CHUNK, 1)]).mean()[None]
    resp = image.new_zeros(1, fractions.shape[1], *mask.shape[2:])
    agreed = _Neighbours(mask, spacing_mm)
    for sweep in range(1 + model.sweeps if model.coupling else 1):
        pull = agreed(resp).flatten(2)[0] if sweep else torch.zeros_like(resp[0]).flatten(1)
        for part, mine in zip(parts, torch.split(joint, CHUNK, 1), strict=True):
            pulled = torch.addmm(mine, fractions, pull[:, part], alpha=model.coupling)
            resp.view(1, len(pull), -1)[0, :, part] = fractions.mT @ pulled.softmax(0)
    return resp, last


class _Neighbours:
    """The average over a voxel's nearest neighbours inside the mask, two along each axis, nearer ones weighing more.

    Args:
        mask: ``(1, 1, *S)``.
        spacing_mm: of the axes in ``*S``; a neighbour weighs as the inverse square of its distance.
    """

    def __init__(self, mask: Tensor, spacing_mm: tuple[float, ...]) -> None:
        self.weights = [(min(spacing_mm) / s) ** 2 for s in spacing_mm]
        self.count = self._sum(mask).clamp_min(1e-6)

    def __call__(self, values: Tensor) -> Tensor:
        """``(1, K, *S)``, 0 outside the mask → the same shape."""
        return self._sum(values) / self.count

    def _sum(self, values: Tensor) -> Tensor:
        out = torch.zeros_like(values)
        for axis, weight in enumerate(self.weights, start=2):
            n = values.shape[axis]
            out.narrow(axis, 0, n - 1).add_(values.narrow(axis, 1, n - 1), alpha=weight)
            out.narrow(axis, 1, n - 1).add_(values.narrow(axis, 0, n - 1), alpha=weight)
        return out
