"""How a trained network segments: one forward pass, and one M-step from what it says (S Alg. 4, after training)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from monai_deepgmm import networks, view
from monai_deepgmm.em import Fit, collapsed
from monai_deepgmm.errors import StudyError
from monai_deepgmm.mixture import VARIANCE_FLOOR, e_step, m_step, nll
from monai_deepgmm.spec import WEIGHTS, LabelRule, Reference, Spec


def build(spec: Spec, *, seed: int = 0) -> nn.Module:
    """The network that a specification describes, its weights drawn from a seed."""
    return networks.fresh(functools.partial(networks.build, spec.network, **_shape(spec)), seed)


def complete(spec: Spec) -> dict[str, Any]:
    """The same network's class and arguments, as a bundle's JSON holds them."""
    return networks.complete(spec.network, **_shape(spec))


def _shape(spec: Spec) -> dict[str, int]:
    return {"spatial_dims": spec.spatial_dims, "in_channels": spec.channels, "out_channels": len(spec.tissues)}


@functools.lru_cache(maxsize=2)
def load(reference: Reference, device: str) -> nn.Module:
    """The network with its weights, ready to segment; kept, so that the next patient does not read it again.

    Raises:
        StudyError: ``E_MODEL``, the weights do not fit the network.
    """
    network = build(reference.spec)
    try:
        weights = torch.load(reference.folder / WEIGHTS, map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).splitlines()[0]
        raise StudyError("E_MODEL", f"{WEIGHTS.name} cannot be used ({reason})", "Train the model again") from error
    return network.to(device).eval()


def fit(
    network: nn.Module,
    spec: Spec,
    image: Tensor,
    mask: Tensor,
    *,
    spacing_mm: tuple[float, ...],
    labels: LabelRule | None = None,
) -> Fit:
    """Segments images in one forward pass, and gives what EM would give.

    Args:
        network: trained as ``spec`` says.
        spec: what the network expects.
        image: ``(B, M, *S)``, its sequences in the order of ``spec``.
        mask: ``(B, 1, *S)``.
        spacing_mm: of the axes in ``*S``.
        labels: what ``resp`` holds: the posterior Π·g, or the network's own output; None: as ``spec`` says.

    Returns:
        The fit.
    """
    output = weights(network, image, mask, spec.grid_mm, spacing_mm=spacing_mm) * mask
    mixture = m_step(image, output, mask, covariance=spec.covariance, spatial=spec.spatial, floor=VARIANCE_FLOOR)
    final = nll(image, mask, mixture)
    batch = torch.zeros(len(image), dtype=torch.long, device=image.device)
    return Fit(
        resp=output if (labels or spec.labels) == "network" else e_step(image, mask, mixture),
        mixture=mixture,
        nll=final,
        trace=final[None],
        iterations=batch,
        converged=torch.ones_like(batch, dtype=torch.bool),
        reseeded=batch,
        collapsed=collapsed(output.flatten(2), mask.flatten(2)),
    )


@torch.no_grad()
def weights(
    network: nn.Module, image: Tensor, mask: Tensor, grid_mm: float, *, spacing_mm: tuple[float, ...]
) -> Tensor:
    """The network's output w = Π on the image's own grid ``(B, K, *S)``; it sums to 1 over K everywhere."""
    seen = view.around(mask, spacing_mm, grid_mm)
    small = view.look(image.float(), seen)
    inside = view.look(mask.float(), seen, nearest=True)
    # One by one: a patient's slices then need no more memory than one, and no label depends on its neighbours.
    given = view.inputs(small, inside, grid_mm)
    output = torch.cat([networks.logits(network, one[None]) for one in given]).softmax(1)
    w = view.back(output, seen).to(image).clamp_min(0)
    return w / w.sum(1, keepdim=True)
