"""The anatomical mixture of a patient: the mask is split into places, and each place's tissues are fitted within it."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deepgmm.methods import endocardium as anatomy
from monai_deepgmm.methods import region_filter as presence
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.mixture import map_em as mapem
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Covariance, Mixture, m_step, nll
from monai_deepgmm.mixture.map_em import Field, Shape
from monai_deepgmm.protocol import Anatomy, Tissue


def fit(
    image: Tensor,
    mask: Tensor,
    tissues: tuple[Tissue, ...],
    sequences: tuple[str, ...],
    spacing_mm: tuple[float, ...],
    known: Anatomy,
    *,
    slices: tuple[int, ...] = (),
    field: Field | None = None,
    shape: Shape | None = None,
    covariance: Covariance = "full",
    tol: float = mapem.TOL,
    max_iter: int = mapem.MAX_ITER,
    floor: float = VARIANCE_FLOOR,
) -> Fit:
    """Fits the tissues inside the inner border there, and the others between the two borders.

    Args:
        image: ``(B, M, H, W)``.
        mask: ``(B, 1, H, W)``.
        tissues: K tissues; their levels and shares are the priors.
        sequences: the M sequences.
        spacing_mm: of H and W.
        known: where tissues can be.
        slices: the position of each image along the stack; empty: none has neighbours.
        field: how neighbouring voxels hang together.
        shape: the components' densities.
        covariance: the shape of the Σ that is reported.
        tol: see ``mapem.fit``.
        max_iter: see ``mapem.fit``.
        floor: the variance floor of that Σ.

    Returns:
        The fit, its components in the order of the tissues. Its mixture is on the image's scale; NLL, trace,
        iterations and convergence are those of the place with the most tissues, on that place's own scale.
    """
    ring = anatomy.ring(image, mask, known, sequences, spacing_mm, slices=slices)
    inside = [k for k, t in enumerate(tissues) if t.name in known.inside]
    outside = [k for k in range(len(tissues)) if k not in inside]
    places = [(ring.inside, inside), (mask - ring.inside, outside)]
    if not (inside and outside):
        places = [(mask, [*inside, *outside])]
    resp = image.new_zeros((len(image), len(tissues), *image.shape[2:]))
    weights = torch.zeros_like(resp)
    fits = []
    for place, members in places:
        if len(members) == 1:  # nothing to tell apart
            resp[:, members] = weights[:, members] = place
            continue
        prior = _prior([tissues[k] for k in members], sequences)
        found = mapem.fit(image, place, prior, spacing_mm, field=field, shape=shape, tol=tol, max_iter=max_iter)
        resp[:, members], weights[:, members] = found.resp, found.mixture.weights
        fits.append(found)
    mixture = m_step(image, resp, mask, covariance=covariance, spatial=True, floor=floor)
    richest = max(fits, key=lambda f: f.resp.shape[1]) if fits else _certain(mixture, resp, image, mask)
    # A tissue that the patient does not have leaves its component empty, as it should.
    never = torch.zeros(resp.shape[:2], dtype=torch.bool, device=resp.device)
    return richest._replace(resp=resp, mixture=mixture._replace(weights=weights), collapsed=never)


def _certain(mixture: Mixture, resp: Tensor, image: Tensor, mask: Tensor) -> Fit:
    """The fit where each place has one tissue: there is nothing to iterate."""
    final = nll(image, mask, mixture)
    none = torch.zeros(len(image), dtype=torch.long, device=image.device)
    never = torch.zeros(resp.shape[:2], dtype=torch.bool, device=image.device)
    return Fit(resp, mixture, final, final[None], none, none == 0, none, never)


def _prior(members: list[Tissue], sequences: tuple[str, ...]) -> mapem.Prior:
    means = torch.tensor([[t.level.get(s, 0.0) for s in sequences] for t in members], dtype=torch.float64)
    shares = torch.tensor([t.share for t in members], dtype=torch.float64)
    return mapem.Prior(means, shares / shares.sum())


def believed(
    resp: Tensor,
    image: Tensor,
    mask: Tensor,
    tissues: tuple[Tissue, ...],
    sequences: tuple[str, ...],
    spacing_mm: tuple[float, ...],
    known: Anatomy,
    *,
    slices: tuple[int, ...] = (),
) -> tuple[Tensor, list[Region]]:
    """Takes from each tissue the regions without the protocol's evidence (``presence.decide``), whoever found them.

    Args:
        resp: responsibilities ``(B, K, H, W)``.
        image: ``(B, M, H, W)``.
        mask: ``(B, 1, H, W)``.
        tissues: the K tissues.
        sequences: the M sequences.
        spacing_mm: of H and W.
        known: where tissues can be.
        slices: the position of each image along the stack.
    """
    ring = anatomy.ring(image, mask, known, sequences, spacing_mm, slices=slices)
    return presence.decide(resp, image, mask, ring, tissues, sequences, slices=slices, spacing_mm=spacing_mm)
