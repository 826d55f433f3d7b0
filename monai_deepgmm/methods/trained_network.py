"""How a trained network segments: one forward pass, and one M-step from what it says (S Alg. 4, after training).

Of an image that is larger than the network takes at a time, the pass is one over windows that overlap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import resampling
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS, ModelReference, ModelSpec
from monai_deepgmm.mixture.fit import Diagnostics, Fit, collapsed
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR
from monai_deepgmm.mixture.packing import packing
from monai_deepgmm.mixture.steps import Model, Products
from monai_deepgmm.networks import registry
from monai_deepgmm.networks.quick_layers import quickened
from monai_deepgmm.networks.sizes import LARGEST, MULTIPLE
from monai_deepgmm.networks.weights import read, reason

#: Voxels that go through a network together, in images that are that small: coarse levels of single ones are slow.
AT_ONCE = 1 << 15


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """The network that a specification describes, its weights drawn from a seed."""
    return registry.fresh(functools.partial(registry.build, spec.network, **_shape(spec)), seed)


def tried(spec: ModelSpec) -> nn.Module:
    """The network, after a batch of the training's size has gone through it and has come out as every tissue's logits.

    Raises:
        UsageError: it cannot be made, or trained.
    """
    target, shape = spec.network.get("_target_"), (2, spec.channels, *spec.given)
    network = build(spec)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(f"--network {target}: it has no weights to train")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _checked(registry.logits(network.train(), torch.zeros(shape)), torch.zeros(shape), len(spec.tissues))
    except Exception as error:  # whatever a network of the user's own raises
        raise UsageError(f"--network {target}: cannot be run on images of shape {shape} ({reason(error)})") from error
    return network


def complete(spec: ModelSpec) -> dict[str, Any]:
    """The same network's class and arguments, as a bundle's JSON holds them."""
    return registry.complete(spec.network, **_shape(spec))


def sides(spec: ModelSpec) -> list[str | int]:
    """The sides of images that the network takes, as metadata say it: any multiple of 32, or the training's.

    Some networks are made for one size, or halve an image of 32 voxels until nothing is left to normalise.
    """
    small = dataclasses.replace(spec, size=(MULTIPLE,) * spec.spatial_dims, window=None)
    if registry.SIZE not in complete(spec):
        with contextlib.suppress(UsageError):
            tried(small)
            return [f"{MULTIPLE}*n"] * spec.spatial_dims
    return list(spec.given)


def _shape(spec: ModelSpec) -> dict[str, Any]:
    return {
        "spatial_dims": spec.spatial_dims,
        "in_channels": spec.channels,
        "out_channels": len(spec.tissues),
        "size": spec.given,
    }


@functools.lru_cache(maxsize=2)
def load(reference: ModelReference, device: str) -> nn.Module:
    """The network with its weights, ready to segment; kept, so that the next patient does not read it again.

    Raises:
        StudyError: ``E_MODEL``, the network cannot be made, or the weights are damaged or another network's.
    """
    file = SPEC
    try:
        registry.complete(reference.spec.network, **_shape(reference.spec))
        file = WEIGHTS.name
        state = read(reference.folder / WEIGHTS)
        file = SPEC
        needed = count(reference.spec)
        file = WEIGHTS.name
        if needed > (held := sum(value.numel() for value in state.values())):
            raise ValueError(f"the network has {needed} weights, but the file holds {held}")
        file = SPEC
        network = build(reference.spec)
        file = WEIGHTS.name
        network.load_state_dict(state)
    except Exception as error:  # whatever a network's class, or a damaged file, makes torch raise
        message = f"{file} cannot be used ({reason(error)})"
        raise StudyError("E_MODEL", message, "Train the model again") from error
    return quickened(network.to(device).eval(), training=False)


def count(spec: ModelSpec) -> int:
    """How many numbers a network consists of, without the memory that they would take; 0 where that is not known."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            named = registry.build(spec.network, **_shape(spec)).state_dict()
        except NotImplementedError:  # a class that computes while it is made
            return 0
    return sum(value.numel() for value in named.values())


def apply_network(
    network: nn.Module,
    spec: ModelSpec,
    image: Tensor,
    mask: Tensor,
    *,
    spacing_mm: tuple[float, ...],
    posterior: bool = True,
    sequences: tuple[str, ...] | None = None,
    merge: Tensor | None = None,
) -> Fit:
    """Segments images in one forward pass, and gives what EM would give after one M-step.

    A sequence that the network knows and the images lack is shown to it as 0; the mixture is that of the others.

    Args:
        network: trained as ``spec`` says.
        spec: what the network expects.
        image: ``(B, M, *S)``, its sequences in the order of ``spec``.
        mask: ``(B, 1, *S)``.
        spacing_mm: of the axes in ``*S``.
        posterior: whether ``resp`` holds the posterior Π·g, or else the network's own output.
        sequences: the M sequences, where they are not all that ``spec`` names.
        merge: ``(T, K)`` of 0 and 1, which of the network's K outputs make up each of T tissues; None: one each.

    Returns:
        The fit.

    Raises:
        StudyError: ``E_MODEL``, the network cannot be run on such an image.
    """
    own = [spec.sequences.index(s) for s in sequences or spec.sequences]
    given = image.new_zeros(len(image), len(spec.sequences), *image.shape[2:])
    given[:, own] = image
    output = weights(network, spec, given, mask, spacing_mm=spacing_mm) * mask
    if merge is not None:
        output = (merge.to(output) @ output.flatten(2)).reshape(len(output), -1, *output.shape[2:])
    voxels = packing(mask)
    w = voxels.pack(output)
    model = Model(spec.training.covariance or "tied", spec.training.spatial, VARIANCE_FLOOR)
    steps = Products.of(voxels.pack(image), voxels.inside.to(image.dtype), model)
    standardised = steps.maximise(w, None)
    expected = steps.expect(standardised)
    mixture = steps.original(standardised)
    return Fit(
        resp=voxels.spread(expected.resp) if posterior else output,
        mixture=mixture._replace(weights=output) if model.spatial else mixture,
        diagnostics=Diagnostics(nll=expected.nll, collapsed=collapsed(w, voxels.inside)),
    )


def weights(
    network: nn.Module, spec: ModelSpec, image: Tensor, mask: Tensor, *, spacing_mm: tuple[float, ...]
) -> Tensor:
    """The network's output w = Π on the image's own grid ``(B, K, *S)``; it sums to 1 over K everywhere.

    A few small images at a time, one large one: what is seen of an image does not depend on the others.

    Raises:
        StudyError: ``E_MODEL``, the network cannot be run on such an image.
    """
    sizes = [_size(spec, one[None], spacing_mm) for one in mask]
    found: list[Tensor] = []
    for size, run in itertools.groupby(sizes):
        count, step = len(list(run)), max(AT_ONCE // math.prod(size), 1)
        bounds = [*range(len(found), len(found) + count, step), len(found) + count]
        for part in (slice(*pair) for pair in itertools.pairwise(bounds)):
            found += _weights(network, spec, image[part], mask[part], size, spacing_mm=spacing_mm)
    return torch.stack(found)


def _size(spec: ModelSpec, mask: Tensor, spacing_mm: tuple[float, ...]) -> tuple[int, ...]:
    """As large as in training, since an instance norm counts the surroundings; larger only where the mask is."""
    needed = resampling.around(mask, spacing_mm, spec.training.grid_mm).size
    return tuple(max(sides) for sides in zip(needed, spec.given, strict=True))


@torch.no_grad()
def _weights(
    network: nn.Module,
    spec: ModelSpec,
    image: Tensor,
    mask: Tensor,
    size: tuple[int, ...],
    *,
    spacing_mm: tuple[float, ...],
) -> Tensor:
    """Of images ``(B, M, *S)`` that are seen on views of one size."""
    if math.prod(size) > LARGEST:
        message = f"the network's grid of {spec.training.grid_mm:g} mm makes an image of {_sides(size)} voxels"
        raise StudyError("E_MODEL", message, "Train another network, on a coarser grid")
    # A network that is made for one size sees larger images by windows, however it was trained.
    window = spec.given if spec.window is not None or registry.SIZE in complete(spec) else None
    through = registry.inferer(None if window == size else window)
    seen = resampling.around(mask, spacing_mm, spec.training.grid_mm, size)
    try:
        inside = resampling.look(mask.float(), seen, nearest=True)
        given = resampling.inputs(resampling.look(image.float(), seen), inside, spec.training.grid_mm)
        logits = through(given, lambda part: _checked(registry.logits(network, part), part, len(spec.tissues)))
        output = logits.softmax(1)
    except Exception as error:  # whatever a network of the user's own, or too large an image, raises
        message = f"the network cannot be run on an image of {_sides(size)} voxels ({reason(error)})"
        raise StudyError("E_MODEL", message, "Train another network, or use a method that needs none") from error
    w = resampling.back(output, seen).to(image).clamp_min(0)
    return w / w.sum(1, keepdim=True)


def _sides(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def _checked(output: Tensor, given: Tensor, tissues: int) -> Tensor:
    wanted = (len(given), tissues, *given.shape[2:])
    if tuple(output.shape) != wanted:
        raise ValueError(f"it gives an output of shape {tuple(output.shape)}, expected {wanted}")
    if not output.isfinite().all():
        raise ValueError("its output is not finite")
    return output
