"""Expectation-maximisation for GMM and SVGMM (Schwab et al. 2024, Alg. 1 and 2): start, step, loop, result.

A start is nothing but responsibilities ``(B, K, *S)``, so any idea of where to begin (k-means++, known means, labels,
another method's output) is a function that returns them. Several restarts are one larger batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field, statistics
from monai_deepgmm.mixture.fit import Diagnostics, Fit, chosen, collapsed, fewest, joined, stacked
from monai_deepgmm.mixture.gaussian import COVARIANCES, VARIANCE_FLOOR, Covariance, Mixture, unknown
from monai_deepgmm.mixture.packing import Packing, packing
from monai_deepgmm.mixture.steps import Expected, Model, Products, Shaded, reseed

#: How often one image's collapsed components are moved elsewhere before they are left as they are.
MAX_RESEEDS = 3
#: How many responsibilities are worked on at once by a CPU: fewer cost more calls, more no longer fit into its cache.
CACHED = 1 << 19


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
    accelerate: bool = True,
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
        accelerate: whether a GMM without a field extrapolates every second iterate (``statistics.extrapolated``); the
            NLL never rises either way.

    Returns:
        The fit; nothing in it is NaN.

    Raises:
        ValueError: the shapes do not belong together, there is no such covariance, or the image holds NaN or infinity
            inside the mask.
    """
    _check_shapes(image, mask, start)
    if covariance not in COVARIANCES:
        raise unknown(covariance)
    restarts = start.shape[0] if start.ndim == image.ndim + 1 else 1
    start = start.reshape(-1, *start.shape[-image.ndim + 1 :])
    voxels = packing(mask.to(image.dtype))
    every = voxels.repeated(restarts)
    packed_image = voxels.pack(image).repeat(restarts, 1, 1)
    if not packed_image.isfinite().all():
        raise ValueError("image: holds NaN or infinity inside the mask; leave such voxels out of the mask")
    options = _Options(Model(covariance, spatial, floor), tol, max_iter, accelerate)
    packed = _in_groups(packed_image, every.inside, every.pack(start), options)
    if degree:
        # From the unshaded fit: a field that is free from the start can take one tissue for another.
        basis = voxels.pack(bias_field.basis(mask.to(image.dtype), degree)).repeat(restarts, 1, 1)
        packed = _in_groups(packed_image, every.inside, packed.resp, options, basis)
    return _unpack(_best(packed, restarts), voxels)


def _check_shapes(image: Tensor, mask: Tensor, start: Tensor) -> None:
    """Refuses what broadcasting would take for something else."""
    got = f"image {tuple(image.shape)}, mask {tuple(mask.shape)}, start {tuple(start.shape)}"
    if image.ndim < 3 or not image.is_floating_point():
        raise ValueError(f"image: expected floating-point numbers (B, M, *S); got {image.dtype}, {got}")
    if mask.shape != (len(image), 1, *image.shape[2:]):
        raise ValueError(f"mask: expected (B, 1, *S) of the image (B, M, *S); got {got}")
    axis = start.ndim - image.ndim + 1  # of K
    if axis not in (1, 2) or (*start.shape[axis - 1 : axis], *start.shape[axis + 1 :]) != (
        len(image),
        *image.shape[2:],
    ):
        raise ValueError(f"start: expected (B, K, *S) or (R, B, K, *S) of the image (B, M, *S); got {got}")


class _Options(NamedTuple):
    model: Model
    tol: float
    max_iter: int
    accelerate: bool


def _in_groups(image: Tensor, mask: Tensor, start: Tensor, options: _Options, basis: Tensor | None = None) -> Fit:
    """The fits of packed images: on a CPU as many at once as its cache can hold, on a GPU all."""
    fits, longest = [], image.shape[2]
    most = len(image) if image.device.type != "cpu" else max(CACHED // (start.shape[1] * longest), 1)
    if most >= len(image):
        return _loop(image, mask, start, basis, options=options)
    for group in range(0, len(image), most):
        rows = slice(group, group + most)
        n = max(int(mask[rows].sum(-1).max()), 1)  # packed: what counts comes first
        parts = (None if part is None else part[rows, :, :n] for part in (image, mask, start, basis))
        fits.append(_padded(_loop(*parts, options=options), longest))  # type: ignore[arg-type]  # basis alone is None
    return joined(fits)


def _padded(fit: Fit, length: int) -> Fit:
    """A fit of N voxels as one of ``length``; what is added does not count."""

    def longer(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, length - values.shape[-1]))

    mixture = fit.mixture
    if mixture.weights.ndim == 3:
        mixture = mixture._replace(weights=longer(mixture.weights))
    if mixture.field is not None:
        mixture = mixture._replace(field=longer(mixture.field))
    return fit._replace(resp=longer(fit.resp), mixture=mixture)


class _State(NamedTuple):
    """Where the images stand that have not converged."""

    mixture: Mixture
    expected: Expected

    def rows(self, index: Tensor) -> _State:
        return _State(self.mixture.rows(index), self.expected.rows(index))


def _loop(image: Tensor, mask: Tensor, start: Tensor, basis: Tensor | None = None, *, options: _Options) -> Fit:
    """The iterations, on packed voxels: image ``(B, M, N)``, mask ``(B, 1, N)``, start ``(B, K, N)``.

    Every second iterate of a GMM goes on from where the last ones were heading, if that is no less likely.
    """
    model = options.model
    steps: Products | Shaded = (
        Products.of(image, mask, model) if basis is None else Shaded.of(image, mask, basis, model)
    )
    everything, quick = steps, options.accelerate and not model.spatial and basis is None
    mixture = steps.maximise(start.to(image.dtype), None)
    if model.spatial:
        mixture = mixture._replace(weights=_first_maps(start, mask, mixture.weights))
    state = _State(mixture, steps.expect(mixture))
    going = torch.arange(len(image), device=image.device)
    iterations, reseeded = torch.zeros_like(going), torch.zeros_like(going)
    converged = torch.zeros_like(going, dtype=torch.bool)
    trace, ended = [state.expected.nll], list[tuple[Tensor, _State]]()
    before, limit, moved = mixture, fewest(mask, start.shape[1]), torch.zeros_like(converged)
    for turn in range(options.max_iter):
        now, old = state
        updated = steps.maximise(old.resp, now)
        moved = torch.zeros_like(moved) if bool(moved.any()) else moved
        if (lost := old.resp.sum(-1) < limit).any():
            lost &= (reseeded[going] < MAX_RESEEDS)[:, None]
            updated = reseed(steps.image, steps.mask, updated, old.evidence, lost)
            moved = lost.any(1)
            reseeded[going] += moved.long()
        if quick and turn % 2:
            state, free = _leap(steps, (before, now, updated), old.nll, moved)
        else:
            state, free = _State(updated, steps.expect(updated)), ~moved
        before = now
        trace.append(trace[-1].index_copy(0, going, state.expected.nll))
        done = (old.nll - state.expected.nll < options.tol) & free
        if done.any():
            ended.append((going[done], state.rows(done)))
            converged[going[done]], iterations[going[done]] = True, turn + 1
            stay = ~done
            going, state, steps, before = going[stay], state.rows(stay), steps.rows(stay), before.rows(stay)
            limit, moved = limit[stay], moved[stay]
        if len(going) == 0:
            break
    iterations[going] = options.max_iter
    ended.append((going, state))
    order = torch.cat([rows for rows, _ in ended]).argsort()
    mixture, resp = stacked([state.mixture for _, state in ended]), torch.cat([s.expected.resp for _, s in ended])
    mixture, resp = mixture.rows(order), resp[order]
    diagnostics = Diagnostics(trace[-1], torch.stack(trace), iterations, converged, reseeded, collapsed(resp, mask))
    return Fit(resp, everything.original(mixture), diagnostics)


def _first_maps(start: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """Π of an SVGMM's first E-step ``(B, K, N)``: equal for all components that have a voxel.

    Π_k(x) = 0 never changes again, so an SVGMM that began with hard responsibilities would end there. Only a component
    without any voxel keeps 0: its mean is arbitrary, and it is moved in the first iteration.
    """
    present = ((start * mask).sum(-1, keepdim=True) > 0).to(like.dtype)
    return (present / present.sum(1, keepdim=True).clamp_min(1)).expand_as(like)


def _leap(
    steps: Products | Shaded, iterates: tuple[Mixture, Mixture, Mixture], last: Tensor, moved: Tensor
) -> tuple[_State, Tensor]:
    """Goes beyond the third of three iterates, in each image that this makes no less likely.

    Args:
        steps: of the images.
        iterates: p₀, p₁ and p₂.
        last: the NLL of p₁ ``(B,)``.
        moved: images in which p₂ is no iterate of EM ``(B,)``; they stay there.

    Returns:
        Where the images stand, and which of them stand at an iterate of EM, so that they may have converged ``(B,)``.
    """
    third = iterates[2]
    beyond, feasible = statistics.extrapolated(*iterates, steps.floor)
    leapt = feasible & ~moved
    mixture = third.updated(beyond, functools.partial(chosen, leapt))
    expected = steps.expect(mixture)
    worse = leapt & ~(expected.nll <= last)
    if worse.any():
        mixture = mixture.updated(third, functools.partial(chosen, worse))
        rows = worse.nonzero()[:, 0]
        expected = expected.replaced(rows, steps.rows(rows).expect(mixture.rows(rows)))
    return _State(mixture, expected), ~moved & (~leapt | worse)


# Result ----------------------------------------------------------------------------------------------------------


def _best(fits: Fit, restarts: int) -> Fit:
    """Keeps, for each image, the restart with the lowest NLL."""
    nll = fits.diagnostics.nll
    if restarts == 1 or nll is None:
        return fits
    rows = len(nll) // restarts
    choice = nll.reshape(restarts, rows).argmin(0)
    return fits.rows(choice * rows + torch.arange(rows, device=choice.device))


def _unpack(fits: Fit, packed: Packing) -> Fit:
    mixture = fits.mixture
    if mixture.weights.ndim == 3:
        mixture = mixture._replace(weights=packed.spread(mixture.weights, 1 / mixture.weights.shape[1]))
    if mixture.field is not None:
        mixture = mixture._replace(field=packed.spread(mixture.field, 1.0))
    return fits._replace(resp=packed.spread(fits.resp), mixture=mixture)
