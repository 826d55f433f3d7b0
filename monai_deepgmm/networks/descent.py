"""deepG and deepSVG on one image: a network fitted to it takes the place of the E-step (S §3, Alg. 3).

The parts are those of EM: start, step, loop, result, and the result is the same ``Fit``. A start is responsibilities
here too: the network is first trained to give them, so that its outputs begin in an order that means something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monai_deepgmm.mixture.bounding_box import Box, around, cut, enclosing, paste
from monai_deepgmm.mixture.fit import Diagnostics, Fit, collapsed, joined
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Covariance, e_step, nll
from monai_deepgmm.networks.nll_loss import MixtureNLL, Regulariser, StartCrossEntropy, Term
from monai_deepgmm.networks.quick_layers import quickened
from monai_deepgmm.networks.registry import fresh, inferer, logits

#: Sides of an image are cut to multiples of this: a network with five levels halves them four times.
MULTIPLE = 16
#: Voxels of surroundings that the network sees on each side of the mask.
MARGIN = 4
#: Gradient steps that are done at least, however small the gain (as in the paper's experiments).
MIN_STEPS = 10
#: The power of the polynomial decay of the learning rate, (1 - t / T)^2: the last steps settle.
DECAY = 2.0


class Descent(NamedTuple):
    """How a network is fitted to an image.

    Attributes:
        steps: gradient steps on the NLL, at most.
        start_steps: gradient steps on the cross-entropy to the start, before them.
        start_weight: how much of that cross-entropy is kept during them, as a prior on Π.
        lr: AdamW's learning rate; it decays polynomially to 0 over the steps.
        weight_decay: AdamW's.
        clip: the largest norm of a gradient.
        tol: the fit has converged when a step lowers the loss (NLL per voxel and regularisers) by less.
        window: what the network is given in a step, along each axis: a part of the image around a voxel of the mask
            that the seed draws, with a mixture of its own. Since parts differ, the fit has then converged when the mean
            of the last ``MIN_STEPS`` losses lies less than ``tol`` below that of as many before. None: all of it.
    """

    steps: int = 30
    start_steps: int = 20
    start_weight: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 1e-3
    clip: float = 12.0
    tol: float = 1e-3
    window: tuple[int, ...] | None = None


def fit_network(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    context: Tensor,
    *,
    network: Callable[[], nn.Module],
    seed: int,
    spatial: bool = True,
    covariance: Covariance = "diag",
    terms: Sequence[Term | tuple[float, Regulariser]] = (),
    together: bool = False,
    posterior: bool = True,
    floor: float = VARIANCE_FLOOR,
    descent: Descent | None = None,
) -> Fit:
    """Fits a network to each image, or one network to all of them, and gives what EM would give.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        start: responsibilities ``(B, K, *S)``.
        context: further channels that the network sees beside the image ``(B, C, *S)``, such as the depth below the
            mask's border; C may be 0.
        network: makes a new network from M + C channels to K logits.
        seed: of the network's weights, and of windows; every image begins with the same ones.
        spatial: True for deepSVG (NLL_V), False for deepG (NLL).
        covariance: the shape of Σ.
        terms: regularisers λ r(Π, μ, Σ).
        together: one network for all images, such as the slices of a patient, instead of one for each.
        posterior: whether ``resp`` holds the posterior Π·g (for deepG π·g), or else the network's own output.
        floor: the variance floor, as a fraction of a sequence's variance.
        descent: the optimiser's settings; None: the defaults.

    Returns:
        The fit. An image fitted together with others shares their verdict of convergence.
    """
    # Images are z-scored, so a fraction of the variance is the variance itself.
    loss = MixtureNLL(spatial=spatial, covariance=covariance, terms=terms, floor=floor).to(image.device)
    groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(image))]
    fits = [
        _descend(
            image[g], mask[g], start[g], context[g], fresh(network, seed), loss, posterior, descent or Descent(), seed
        )
        for g in groups
    ]
    return fits[0] if len(fits) == 1 else joined(fits)


# Step and loop ---------------------------------------------------------------------------------------------------


def _descend(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    context: Tensor,
    network: nn.Module,
    loss: MixtureNLL,
    posterior: bool,
    descent: Descent,
    seed: int,
) -> Fit:
    """One network, fitted to a batch of images at once."""
    box, shape = enclosing(mask, margin=MARGIN, multiple=MULTIPLE), image.shape[2:]
    # In double precision a network gains nothing and takes twice as long.
    small, inside, begin = (cut(t, box).float() for t in (image, mask, start))
    seen = torch.cat([small, cut(context, box).float()], 1)
    network = quickened(network.to(image.device).train(), training=True)
    optimizer = torch.optim.AdamW(network.parameters(), descent.lr, weight_decay=descent.weight_decay, fused=True)
    teacher = StartCrossEntropy()
    target = torch.cat([begin, inside], 1)
    windows = _windows(inside, descent.window, torch.Generator().manual_seed(seed))
    whole = loss.voxels(small, inside) if descent.window is None else None

    def step(starting: bool) -> tuple[Tensor, Tensor]:
        window = next(windows)
        output = logits(network, cut(seen, window))
        place = teacher(output, cut(target, window)) if starting or descent.start_weight else output.new_zeros(())
        value, each = place, place
        if not starting:
            value, each = loss.both(output, cut(small, window), cut(inside, window), whole)
            value = value + descent.start_weight * place
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), descent.clip)
        optimizer.step()
        return value.detach(), each.detach()

    for _ in range(descent.start_steps):
        step(starting=True)
    decay = torch.optim.lr_scheduler.PolynomialLR(optimizer, descent.steps + 1, DECAY)
    values: list[float] = []
    trace: list[Tensor] = []
    converged = False
    while len(values) < descent.steps and not converged:
        value, each = step(starting=False)
        values.append(float(value))
        trace.append(each)
        decay.step()
        converged = _settled(values, 1 if descent.window is None else MIN_STEPS, descent.tol)
    through = inferer(None if descent.window is None else _clipped(descent.window, inside))
    with torch.no_grad():
        weights = through(seen, functools.partial(logits, network)).softmax(1)
    return _result(image, mask, paste(weights, box, shape), loss, posterior, trace, converged)


def _settled(values: list[float], steps: int, tol: float) -> bool:
    """Whether the last so many losses are on average no better than those before them, but for tol."""
    before, lately = values[-2 * steps : -steps], values[-steps:]
    return len(values) >= max(MIN_STEPS + 1, 2 * steps) and sum(before) - sum(lately) < steps * tol


def _clipped(window: Sequence[int], mask: Tensor) -> tuple[int, ...]:
    return tuple(min(sides) for sides in zip(window, mask.shape[2:], strict=True))


def _windows(mask: Tensor, window: Sequence[int] | None, generator: torch.Generator) -> Iterator[Box]:
    """What is seen of images in each step: all of it, or a part around a voxel that lies in any of their masks."""
    shape = mask.shape[2:]
    if window is None or not mask.any():
        while True:
            yield tuple(slice(0, n) for n in shape)
    size, where = _clipped(window, mask), torch.nonzero(mask.sum((0, 1)).cpu())
    while True:
        yield around(where[int(torch.randint(len(where), (), generator=generator))].tolist(), size, shape)


# Result ----------------------------------------------------------------------------------------------------------


def _result(
    image: Tensor,
    mask: Tensor,
    output: Tensor,
    loss: MixtureNLL,
    posterior: bool,
    trace: list[Tensor],
    converged: bool,
) -> Fit:
    """The mixture of the network's last output w, and the labelling rule of the model it belongs to."""
    resp = output.to(image) * mask
    mixture = loss.mixture(image, resp, mask)
    final = nll(image, mask, mixture)
    flags = torch.full((len(image),), converged, device=image.device)
    count = torch.full((len(image),), len(trace), device=image.device)
    inside = mask.flatten(2)
    return Fit(
        resp=e_step(image, mask, mixture) if posterior else resp,
        mixture=mixture,
        diagnostics=Diagnostics(
            nll=final,
            trace=torch.stack([*(t.to(final) for t in trace), final]),
            iterations=count,
            converged=flags,
            collapsed=collapsed(resp.flatten(2), inside),
        ),
    )
