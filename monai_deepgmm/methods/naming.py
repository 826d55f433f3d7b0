"""Which component is which tissue, without any label.

The protocol says how bright each tissue is in each sequence and how deep it lies. That alone sorts every voxel, softly
and roughly: the *signature map*. A component gets the name of the tissue whose signature map it overlaps best, all
components being named at once. With known means (μ_data) the map is made from those instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_deepgmm.images.resampling import relative_depth
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.protocol import Tissue

#: How far a voxel may stray from its tissue's signature: in standard deviations inside the mask, and in relative depth.
BRIGHTNESS_SD, DEPTH_SD = 0.7, 0.2
#: Two assignments whose mean soft Dice differ by this much are told apart with odds e : 1.
CERTAINTY_SCALE = 0.04
#: Assignments of so many tissues are all tried.
FEW = 6
#: Sequences are called exchanged when other names explain a voxel better by this much log-likelihood on average.
SWAP_MARGIN = 0.15
#: That takes no more voxels than these.
ENOUGH = 1 << 19


class Naming(NamedTuple):
    """Which component bears which tissue's name.

    Attributes:
        order: (B, T) the component of each tissue, in the protocol's order.
        certainty: (B,) the probability of this assignment among all, from how much worse the others overlap, 0 to 1.
        agreement: (B, T) the share of each named component that lies where the signature map expects the tissue.
    """

    order: Tensor
    certainty: Tensor
    agreement: Tensor


def standardise(image: Tensor, mask: Tensor) -> Tensor:
    """The image ``(B, M, *S)`` with mean 0 and standard deviation 1 inside the mask: the scale of signatures."""
    axes = tuple(range(2, image.ndim))
    count = mask.sum(axes, keepdim=True).clamp_min(1)
    centred = image - (image * mask).sum(axes, keepdim=True) / count
    deviation = ((centred.square() * mask).sum(axes, keepdim=True) / count).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)


def signature_map(
    image: Tensor,
    mask: Tensor,
    tissues: tuple[Tissue, ...],
    sequences: tuple[str, ...],
    spacing_mm: tuple[float, ...],
    *,
    measured: Tensor | None = None,
) -> Tensor:
    """Each voxel's tissue as the protocol's signatures alone would have it.

    ``q_t(x) ∝ exp(−½ Σ_m ((z_m(x) − s_tm) / 0.7)² − ½ ((depth(x) − c_t) / 0.2)²)`` with z standardised inside the mask.

    Args:
        image: ``(B, M, *S)``, channels as in ``sequences``; any scale.
        mask: ``(B, 1, *S)``.
        tissues: T tissues with their signatures s and centralities c.
        sequences: the M sequences.
        spacing_mm: of the axes in ``*S``.
        measured: where each sequence was ``(B, M, *S)``; elsewhere it says nothing. None: everywhere.

    Returns:
        ``(B, T, *S)``, sums to 1 inside the mask, 0 outside.
    """
    seen = mask.expand_as(image) if measured is None else measured.to(mask)
    where = mask[:, 0] > 0
    z, seen, depth = _inside(image, mask, seen, where, tissues, spacing_mm)
    expected = image.new_zeros((len(image), len(tissues), *image.shape[2:]))
    expected.movedim(1, 0)[:, where] = _log_expected(z, seen, depth, tissues, [sequences])[0].softmax(0)
    return expected


def _inside(
    image: Tensor,
    mask: Tensor,
    seen: Tensor,
    where: Tensor,
    tissues: tuple[Tissue, ...],
    spacing_mm: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All voxels of a mask: standardised, where each sequence was seen ``(M, N)``, and the relative depth ``(N,)``.

    The depth is None where it tells nothing about any of the tissues: it costs seconds in 3-D.
    """
    z, known = (values.movedim(1, 0)[:, where] for values in (standardise(image, seen), seen))
    if all(t.centrality is None for t in tissues):
        return z, known.to(z), None
    return z, known.to(z), relative_depth(mask, spacing_mm)[:, 0][where].to(z)


def _log_expected(
    z: Tensor, seen: Tensor, depth: Tensor | None, tissues: tuple[Tissue, ...], orders: Sequence[tuple[str, ...]]
) -> Tensor:
    """How well each voxel fits each tissue's signature and place, as a log density ``(O, T, N)``, up to its own factor.

    Args:
        z: ``(M, N)``.
        seen: ``(M, N)``, 0 where a sequence says nothing.
        depth: ``(N,)``.
        tissues: T of them.
        orders: O ways to call the channels.
    """
    signatures = torch.tensor([[[t.signature[s] for s in order] for t in tissues] for order in orders]).to(z)
    linear = torch.cat([signatures, -0.5 * signatures.square()], -1) / BRIGHTNESS_SD**2  # −½ z² is the same for all
    found = linear @ torch.cat([z * seen, seen])
    for k, tissue in enumerate(tissues):
        if tissue.centrality is not None and depth is not None:
            found[:, k] -= 0.5 * ((depth - tissue.centrality) / DEPTH_SD).square()
    return found


def name(resp: Tensor, expected: Tensor, *, given: bool = False) -> Naming:
    """Names components by their overlap with the maps of where tissues are expected.

    The assignment maximises the sum over tissues of the soft Dice ``2 Σ w q / (Σ w + Σ q)``.

    Args:
        resp: responsibilities w ``(B, K, *S)``, 0 outside the mask.
        expected: the signature map q ``(B, T, *S)``, T = K.
        given: the components are in the order of the tissues already, as a trained network's are; only how certain
            that order is and how well it agrees is computed.
    """
    w, q = resp.flatten(2), expected.flatten(2).to(resp.dtype)
    shared = w @ q.mT  # (B, K, T)
    dice = 2 * shared / (w.sum(-1)[:, :, None] + q.sum(-1)[:, None]).clamp_min(1e-9)
    order, certainty = zip(*(_assign(table, given=given) for table in dice.cpu().numpy()), strict=True)
    chosen = torch.tensor(np.stack(order), device=resp.device)
    agreement = shared / w.sum(-1).clamp_min(1e-9)[:, :, None]
    picked = agreement.take_along_dim(chosen[:, None], 1).squeeze(1)
    return Naming(chosen, torch.tensor(certainty), picked)


def _assign(dice: np.ndarray, *, given: bool) -> tuple[np.ndarray, float]:
    """The best (or the given) component of each tissue, from a (K, T) table, and that assignment's probability.

    The rivals are the best assignments in which one of the tissues gets another component.
    """
    components, tissues = [np.arange(len(dice))] * 2 if given else _assigned(dice)
    order = components[np.argsort(tissues)]
    best = dice[components, tissues].mean()
    odds = 1.0
    for component, tissue in zip(components, tissues, strict=True):
        barred = dice.copy()
        barred[component, tissue] = -len(dice)
        rival = barred[_assigned(barred)].mean()
        odds += float(np.exp((rival - best) / CERTAINTY_SCALE)) / 2  # a swap of two tissues is met twice
    return order, 1 / odds


def _assigned(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the assignment with the largest sum."""
    if len(table) > FEW:
        from scipy.optimize import linear_sum_assignment  # here, as importing it takes long

        rows, columns = linear_sum_assignment(table, maximize=True)
        return rows, columns
    rows, every = np.arange(len(table)), _orders(len(table))
    return rows, every[table[rows, every].sum(1).argmax()]


@functools.cache
def _orders(count: int) -> np.ndarray:
    """All orders of so many things ``(O, count)``."""
    return np.array(list(permutations(range(count)))).reshape(-1, count)


def reorder(fit: Fit, order: Tensor) -> Fit:
    """The fit with its components in the order of the tissues; ``order`` is ``Naming.order`` (B, T)."""
    if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
        return fit  # a head's responsibilities are not worth copying

    def pick(values: Tensor) -> Tensor:
        index = order.to(values.device).reshape(*order.shape, *[1] * (values.ndim - 2))
        return values.take_along_dim(index, 1)

    mixture = fit.mixture
    covariances = mixture.covariances
    tied = covariances.shape[1] < order.shape[1]
    named = mixture._replace(
        weights=pick(mixture.weights),
        means=pick(mixture.means),
        covariances=covariances if tied else pick(covariances),
    )
    lost = fit.diagnostics.collapsed
    diagnostics = fit.diagnostics if lost is None else fit.diagnostics._replace(collapsed=pick(lost))
    return Fit(pick(fit.resp), named, diagnostics)


def looks_swapped(
    image: Tensor,
    mask: Tensor,
    tissues: tuple[Tissue, ...],
    sequences: tuple[str, ...],
    *,
    spacing_mm: tuple[float, ...],
    measured: Tensor | None = None,
) -> tuple[str, ...] | None:
    """Whether the signatures would fit clearly better if the sequences' names were exchanged.

    Args:
        image: ``(B, M, *S)``; any scale.
        mask: ``(B, 1, *S)``.
        tissues: with their signatures and centralities.
        sequences: the names of the channels, as the user gave them.
        spacing_mm: of the axes in ``*S``.
        measured: where each sequence was ``(B, M, *S)``; None: everywhere.

    Returns:
        The names that fit the channels better, or None where the given ones are fine.
    """
    if len(sequences) == 1:
        return None
    seen = mask.expand_as(image) if measured is None else measured
    step = max(1, round((mask.numel() / ENOUGH) ** (1 / len(spacing_mm)))) if mask.numel() > ENOUGH else 1
    thinned = (slice(None), slice(None), *[slice(None, None, step)] * len(spacing_mm))
    if mask[thinned].any():
        image, mask, seen = image[thinned], mask[thinned], seen[thinned]
    else:  # a mask so thin that it falls between them
        step = 1
    where, seen = mask[:, 0] > 0, seen.to(mask)
    z, seen, depth = _inside(image, mask, seen, where, tissues, tuple(step * s for s in spacing_mm))
    orders = [sequences, *(order for order in permutations(sequences) if order != sequences)]
    given, *rivals = (-_log_expected(z, seen, depth, tissues, orders).logsumexp(1).mean(1)).tolist()
    return None if given - min(rivals) < SWAP_MARGIN else orders[1 + int(np.argmin(rivals))]
