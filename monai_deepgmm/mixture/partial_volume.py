"""Partial volume: a mixture whose voxels may hold two tissues at once, shaded, with neighbours that agree.

At 1 mm most voxels of the cortex lie across a border. A Gaussian mixture makes a tissue of such *mixels*, or widens the
pure ones until their borders move. Here every two tissues that touch have mixels: a share u of one and 1 − u of the
other, every u as likely (``mixels``). With u on a few nodes this is again a Gaussian mixture, of N nodes with fractions
a_n of K tissues, and EM finds μ, Σ, the nodes' weights, the share of outliers and Ma's bias field.

So few parameters need no more than a lattice of voxels, and only those off the border of what was measured: there,
voxels are in part nothing, and dark in every sequence. Where the first sequence defines some tissues (``anchored``),
the fit goes in two steps, margins first (Joe 2005): the first sequence alone finds its levels, and the others are
fitted given those. Else a tissue that a second sequence hardly shows is taken over by whatever stands out there.

Then each voxel's fractions are found on the full grid, where neighbours pull: ``π_n(x) ∝ π_n exp(β a_nᵀ s̄(x))``, s̄ the
average of the neighbours' fractions: a Markov random field in its mean-field approximation. A sequence that was not
measured in a voxel says nothing there; a voxel without any is left to its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field, mixels, slice_gain
from monai_deepgmm.mixture.bounding_box import enclosing, paste, within
from monai_deepgmm.mixture.fit import Diagnostics, Fit, collapsed, joined
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Mixture
from monai_deepgmm.mixture.lattice import Lattice, Neighbours, Slab, interior, on_grid, slabs, stride
from monai_deepgmm.mixture.mixel_model import Model, telling
from monai_deepgmm.mixture.mixels import Anchor, Observed, State, Step, Stop, nodes
from monai_deepgmm.mixture.serial import serial

#: A fit has converged when the nodes' responsibilities change by less than this, summed over a voxel, on average.
TOL = 1e-3
MAX_ITER = 500
#: How many times fewer voxels the first fit has than the second.
COARSER = 6
#: So many voxels next to the border of what was measured have no part in the fit.
BORDER = 1
#: So many voxels at a time, so that a whole head needs little memory.
CHUNK = 1 << 16
#: The degree of the first bias field, which must gain BIC.
FIRST_DEGREE = 2
#: Voxels repeat each other: so wide a patch of tissue, in mm, counts as one observation in BIC.
PATCH_MM = 16.0


def fit_partial_volume(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    spacing_mm: Sequence[float],
    model: Model,
    *,
    measured: Tensor | None = None,
    zero: Tensor | None = None,
    tol: float = TOL,
    max_iter: int = MAX_ITER,
    floor: float = VARIANCE_FLOOR,
) -> Fit:
    """Fits each image of a batch.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``; every image needs voxels inside.
        start: where each tissue is expected ``(B, K, *S)``, up to a factor of each voxel.
        spacing_mm: of the axes in ``*S``.
        model: the assumptions.
        measured: where each sequence was ``(B, M, *S)``, as 0 and 1; None: everywhere inside the mask.
        zero: what is subtracted from the image, so that 0 is no signal ``(B, M)``, as a field needs it; None: nothing.
            It is subtracted where voxels are looked at: a copy of a head is large.
        tol: a fit has converged when responsibilities change by less.
        max_iter: iterations at most.
        floor: the variance floor, as a fraction of each sequence's variance inside the mask.

    Returns:
        The fit, in single precision, to the image less ``zero``. ``resp`` are the expected fractions of the K tissues;
        the mixture is that of the pure tissues, with their shares ``(B, K)`` as weights, and has a field if the model
        does. The trace is the NLL on the lattice; since Σ is found from pure voxels and pooled, it need not fall in
        every iteration.
    """
    zero = image.new_zeros(image.shape[:2]) if zero is None else zero.to(image)
    settings = _Settings(tuple(spacing_mm), model, Stop(tol, max_iter), floor)
    fits = []
    for b in range(len(image)):
        one = slice(b, b + 1)
        inside = mask[one] > 0
        seen = inside.expand_as(image[one]) if measured is None else (measured[one] > 0) & inside
        fits.append(_one(image[one], zero[b], inside, seen, start[one], settings))
    return joined(fits)


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


class _Settings(NamedTuple):
    spacing_mm: tuple[float, ...]
    model: Model
    stop: Stop
    floor: float


class _Problem(NamedTuple):
    """One image, cut to its mask.

    Attributes:
        image: ``(1, M, *S)``.
        zero: what is subtracted from it ``(M,)``.
        seen: where each sequence was measured ``(1, M, *S)`` bool; nowhere outside the mask.
        fractions: of the nodes ``(N, K)``.
        settings: the assumptions, and when to stop.
    """

    image: Tensor
    zero: Tensor
    seen: Tensor
    fractions: Tensor
    settings: _Settings

    def first(self) -> _Problem:
        """The first sequence alone."""
        return self._replace(image=self.image[:, :1], zero=self.zero[:1], seen=self.seen[:, :1])

    def observed(self, lattice: Lattice) -> Observed:
        """The voxels of a lattice."""
        return Observed(lattice.voxels(self.image).float() - self.zero[:, None], lattice.voxels(self.seen))

    def at(self, slab: Slab) -> Observed:
        """The voxels of a slab."""
        values, seen = (part[:, :, slab.rows][:, :, slab.inside] for part in (self.image, self.seen))
        return Observed(values.float() - self.zero[:, None], seen)

    def lattice(self, voxels: int) -> Lattice:
        """A lattice of at most so many voxels, off the border of what was measured."""
        spacing_mm = self.settings.spacing_mm
        inside = self.seen.any(1, keepdim=True)
        inner = interior(inside, spacing_mm, BORDER)
        return Lattice(inner, stride(inner, spacing_mm, voxels))

    def step(self, lattice: Lattice) -> Step:
        """The M-step on a lattice."""
        return mixels.step(self.observed(lattice), self.fractions, self.settings.model.pooling, self.settings.floor)


class _Found(NamedTuple):
    """A fit, and its field on the full grid ``(1, M, *S)`` or None."""

    state: State
    field: Tensor | None


def _one(image: Tensor, zero: Tensor, mask: Tensor, seen: Tensor, start: Tensor, settings: _Settings) -> Fit:
    """The fit of one image, as a batch of one; all but ``zero`` ``(M,)`` as in ``_Problem``."""
    full = image.shape[2:]
    box = enclosing(mask)
    image, mask, seen, start = (values[within(box)] for values in (image, mask, seen, start))  # nothing is copied
    fractions = mixels.mixing(start.shape[1], settings.model.borders).to(image.device)
    gain = slice_gain.alternating(image, zero, seen) if settings.model.degree else None
    if gain is not None:
        image = (image - _spread(zero, image)) / gain + _spread(zero, image)
    problem = _Problem(image, zero.float(), seen, fractions, settings)
    anchored = image.shape[1] > 1 and len(settings.model.anchored) > 0
    with serial(len(fractions) * settings.model.voxels):
        found = _margins_first(problem, start) if anchored else _smooth(problem, _alone(problem, start))
    resp, last = _everywhere(problem, mask, found)
    state, field = found.state, found.field
    if settings.model.degree and field is None:
        field = torch.ones_like(image, dtype=torch.float32)
    if gain is not None and field is not None:
        field = field * gain
    pure = state.pure._replace(
        weights=resp.flatten(2).sum(-1) / mask.sum(), field=None if field is None else paste(field, box, full, 1.0)
    )
    diagnostics = Diagnostics(
        nll=last,
        trace=state.trace,
        iterations=torch.tensor([len(state.trace) - 1]),
        converged=torch.tensor([state.converged]),
        collapsed=collapsed(resp.flatten(2), mask.sum().float().expand(1, 1, 1)),
    )
    return Fit(paste(resp, box, full), pure, diagnostics)


def _spread(zero: Tensor, image: Tensor) -> Tensor:
    """A number of each sequence ``(M,)`` → ``(1, M, 1, …)``, as an image has axes."""
    return zero.to(image).reshape(1, -1, *[1] * (image.ndim - 2))


def _alone(problem: _Problem, start: Tensor) -> _Found:
    """All sequences of the problem together, from where each tissue is expected ``(1, K, *S)``."""
    model, stop = problem.settings.model, problem.settings.stop
    # EM creeps, so the way is gone on a few voxels, and only its end on more.
    coarse = problem.lattice(max(model.voxels // COARSER, 1))
    step = problem.step(coarse)
    expected = coarse.voxels(start).float()
    begin = mixels.begin(step, expected / expected.sum(1, keepdim=True).clamp_min(1e-12))
    found = mixels.run(step, *begin, None, stop)
    shaded = _likelier(step, [begin, (found.pure, found.weights)], coarse, problem.settings) if model.degree else None
    lattice = problem.lattice(model.voxels)
    step = problem.step(lattice)
    found = mixels.run(step, found.pure, found.weights, None, stop)
    if shaded is None:
        return _Found(found, None)
    begin = shaded.pure._replace(field=None), shaded.weights
    return _shaded(problem, step, lattice, found, begin)


def _smooth(problem: _Problem, found: _Found) -> _Found:
    """A fit once more, with smooth profiles of the mixels, if one sequence alone tells tissues apart; else as it is.

    Several tell by themselves where tissues lie. The field stays: where profiles are stiff, it takes over what they
    cannot explain.
    """
    if telling(found.state.pure) > 1:
        return found
    step = problem.step(problem.lattice(problem.settings.model.voxels))
    state, stop = found.state, problem.settings.stop
    smooth = mixels.run(step, state.pure, state.weights, None, stop, outliers=state.outliers, smooth=True)
    return _Found(smooth, found.field)


def _margins_first(problem: _Problem, start: Tensor) -> _Found:
    """The first sequence alone, then the others given its levels; with a field of all, the same once more."""
    stop = problem.settings.stop
    alone = _alone(problem.first(), start)
    found = _given(problem, alone)
    if found.field is None or not problem.settings.model.degree:
        return found
    lattice = problem.lattice(problem.settings.model.voxels)
    field = found.field
    step = problem.first().step(lattice)
    pure = alone.state.pure._replace(field=lattice.voxels(field[:, :1]))
    again = mixels.run(step, pure, alone.state.weights, None, stop)
    return _given(problem, _Found(again, field), shade=False)


def _given(problem: _Problem, alone: _Found, *, shade: bool = True) -> _Found:
    """All sequences, given what the first alone has told.

    Args:
        problem: with all sequences.
        alone: the fit to the first one; its field is of the first sequence, or of all.
        shade: whether a field of all sequences is looked for.
    """
    model, stop = problem.settings.model, problem.settings.stop
    lattice = problem.lattice(model.voxels)
    step = problem.step(lattice)
    b = torch.ones_like(step.observed.values)
    if alone.field is not None:
        known = lattice.voxels(alone.field)
        b = torch.cat([known, b[:, known.shape[1] :]], 1)
    first = Observed(step.observed.values[:, :1], step.observed.measured[:, :1])
    mixture = nodes(alone.state.pure._replace(field=b[:, :1]), alone.state.weights, step.fractions)
    joint = mixels.marginal_density(first, mixture) + mixture.weights.clamp_min(1e-30).log()[..., None]
    resp = joint.softmax(1)
    anchor = Anchor(alone.state.pure, alone.state.weights, model.anchored)
    pure = mixels.anchored(step(resp, b, step(resp, b, None)), anchor)._replace(field=b)
    found = mixels.run(step, pure, anchor.weights, None, stop, outliers=alone.state.outliers, anchor=anchor)
    if not (shade and model.degree):
        return _Found(found, alone.field)
    shaded = _shaded(problem, step, lattice, found, (found.pure, found.weights), anchor)
    if shaded.field is None and alone.field is not None:
        rest = torch.ones_like(problem.image[:, alone.field.shape[1] :], dtype=torch.float32)
        return _Found(found, torch.cat([alone.field, rest], 1))
    return shaded


def _likelier(step: Step, starts: Sequence[tuple[Mixture, Tensor]], lattice: Lattice, settings: _Settings) -> State:
    """The likelier of fits with a field of a low degree.

    A field that is free from the start can take one tissue for another, and one that starts from the unshaded fit can
    stay in its valley.
    """
    basis = lattice.inside(bias_field.basis(lattice.mask, _first_degree(settings.model)))
    tried = [mixels.run(step, pure, weights, basis, settings.stop) for pure, weights in starts]
    return min(tried, key=lambda state: float(state.trace[-1]))


def _first_degree(model: Model) -> int:
    """The degree of the first field."""
    return min(FIRST_DEGREE, model.degree) if model.require_bic_gain else model.degree


def _shaded(
    problem: _Problem,
    step: Step,
    lattice: Lattice,
    found: State,
    begin: tuple[Mixture, Tensor],
    anchor: Anchor | None = None,
) -> _Found:
    """The fit with a field; without one if it gains no BIC.

    Where BIC must gain, the low degree goes first, which costs least.

    Args:
        problem: the image.
        step: on the lattice.
        lattice: the lattice.
        found: the unshaded fit.
        begin: the tissues and weights that the shaded fit starts from.
        anchor: what the first sequence has told.
    """
    settings, field = problem.settings, None
    (pure, weights), model = begin, problem.settings.model
    spaced = tuple(n * s for n, s in zip(lattice.stride, settings.spacing_mm, strict=True))
    for degree in sorted({_first_degree(model), model.degree}):
        basis = bias_field.basis(lattice.mask, degree, beyond=True)
        inside = lattice.inside(basis)
        shaded = mixels.run(step, pure, weights, inside, settings.stop, outliers=found.outliers, anchor=anchor)
        gain = float(found.trace[-1] - shaded.trace[-1])
        terms = step.observed.values.shape[1] * (basis.shape[1] - 1)
        if model.require_bic_gain and field is None and gain <= bic_penalty(terms, lattice.mask, spaced):
            break
        found, field = shaded, _extended(shaded.pure.field, basis, lattice)
        pure, weights = shaded.pure, shaded.weights
    if field is None:
        return _Found(found, None)
    return _Found(found, on_grid(field, lattice.stride, problem.seen.any(1, keepdim=True)))


def _extended(field: Tensor | None, basis: Tensor, lattice: Lattice) -> Tensor:
    """A field known inside the mask ``(1, M, V)``, wherever the basis ``(1, J, *L)`` is."""
    if field is None:
        raise ValueError("no field to extend")
    g = lattice.inside(basis)
    omega = field @ g.mT / g.shape[-1]  # the basis is orthonormal over these voxels
    return (omega @ basis.flatten(2)).reshape(1, -1, *basis.shape[2:])


# The full grid ---------------------------------------------------------------------------------------------------


def _everywhere(problem: _Problem, mask: Tensor, found: _Found) -> tuple[Tensor, Tensor]:
    """Fractions ``(1, K, *S)`` on the full grid, where neighbours pull, and the NLL without that pull ``(1,)``."""
    fractions, model = problem.fractions, problem.settings.model
    every = slabs(mask, CHUNK)
    sizes = [len(slab.flat) for slab in every]
    joint = torch.split(fractions.new_empty(len(fractions), sum(sizes)), sizes, 1)
    outlying = mixels.broad(problem.observed(problem.lattice(model.voxels)))
    last = []
    for slab, target in zip(every, joint, strict=True):
        target.copy_(_joint(problem, slab, found, outlying))
        last.append(target.logsumexp(0).sum())
    resp = fractions.new_zeros(1, fractions.shape[1], *mask.shape[2:])
    flat, agreed = resp.view(fractions.shape[1], -1), Neighbours(mask, problem.settings.spacing_mm)
    coupling = model.beta(found.state.pure)
    for sweep in range(1 + model.sweeps if coupling else 1):
        pull = agreed(resp).flatten(2)[0] if sweep else None
        for slab, mine in zip(every, joint, strict=True):
            pulled = mine if pull is None else torch.addmm(mine, fractions, pull[:, slab.flat], alpha=coupling)
            flat[:, slab.flat] = fractions.mT @ pulled.softmax(0)
    return resp, -(torch.stack(last).sum() / sum(sizes))[None]


def _joint(problem: _Problem, slab: Slab, found: _Found, outlying: Mixture) -> Tensor:
    """The logarithm of weight times contaminated density of every node at the voxels of a slab ``(N, V)``."""
    state, observed = found.state, problem.at(slab)
    b = None if found.field is None else found.field.flatten(2)[:, :, slab.flat]
    mixture = nodes(state.pure._replace(field=b), state.weights, problem.fractions, smooth=state.smooth)
    density = mixels.contaminated(
        mixels.marginal_density(observed, mixture), mixels.marginal_density(observed, outlying), state.outliers
    )
    return density[0] + state.weights[0].clamp_min(torch.finfo(density.dtype).tiny).log()[:, None]
