"""The networks that stand in for the E-step: the paper's U-Net, or any other that a configuration names.

A network takes ``(B, C, *S)`` and gives logits ``(B, K, *S)``; the softmax over K belongs to whoever uses them.
"""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks.unet import FILTERS

#: In 3-D, where a voxel of the finest level costs a hundred times as much, a quarter of them.
FILTERS_3D = tuple(n // 4 for n in FILTERS)
DEFAULT: Mapping[str, Any] = {"_target_": "monai_deepgmm.networks.UNet"}
#: On slices as accurate, and several times as fast.
QUICK: Mapping[str, Any] = {"_target_": "monai_deepgmm.networks.FoldedUNet", "filters": [48, 96, 192]}
#: How MONAI's classes call the size of images that a network is made for.
SIZE = "img_size"
#: The share of a window that its neighbour covers too; there both count, the less the nearer to their own borders.
OVERLAP = 0.25
#: What networks of MONAI that users ask for need besides channels; others are given in full. Those with attention are
#: much smaller than their classes' defaults: a cohort without labels is small, and its images are crops.
NAMED: Mapping[str, Mapping[str, Any]] = {
    "unet": DEFAULT,
    "quickunet": QUICK,
    "foldedunet": {"_target_": "monai_deepgmm.networks.FoldedUNet"},
    "basicunet": {"_target_": "monai.networks.nets.BasicUNet"},
    "dynunet": {
        "_target_": "monai.networks.nets.DynUNet",
        "kernel_size": [3, 3, 3, 3, 3],
        "strides": [1, 2, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2, 2],
    },
    "segresnet": {"_target_": "monai.networks.nets.SegResNet", "init_filters": 32},
    "modifiedunet": {"_target_": "monai_deepgmm.networks.ModifiedUNet"},
    "basicunetplusplus": {"_target_": "monai.networks.nets.BasicUNetPlusPlus"},
    "attentionunet": {
        "_target_": "monai.networks.nets.AttentionUnet",
        "channels": list(FILTERS),
        "strides": [2, 2, 2, 2],
    },
    "unetr": {"_target_": "monai.networks.nets.UNETR", "hidden_size": 192, "mlp_dim": 384, "num_heads": 6},
    "swinunetr": {"_target_": "monai.networks.nets.SwinUNETR", "feature_size": 24, "window_size": 4},
}
#: Of those, what is otherwise in 3-D.
NAMED_3D: Mapping[str, Mapping[str, Any]] = {"quickunet": {"filters": [24, 48, 96]}}
#: What the class of a network takes unless it is given, in 3-D.
IN_3D: Mapping[str, Mapping[str, Any]] = {
    "monai_deepgmm.networks.UNet": {"filters": list(FILTERS_3D)},
    "monai_deepgmm.networks.FoldedUNet": {"filters": [16, 32, 64]},
    "monai_deepgmm.networks.ModifiedUNet": {"filters": list(FILTERS_3D)},
}


def complete(
    definition: str | Mapping[str, Any] | None,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    size: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A network's class and all its arguments, from its name, its class's full name, or a mapping with ``_target_``.

    The mapping's values are plain data: unlike in a bundle's JSON, nothing in it is evaluated, and its target must be
    a class of networks. ``spatial_dims``, ``in_channels`` and ``out_channels`` are filled in where the class has them,
    and ``img_size`` where it is made for images of one size.

    Args:
        definition: one of ``NAMED``, a dotted name, or a mapping; None: the paper's U-Net.
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        size: of the images, along each axis of ``*S``; None: it varies.

    Returns:
        A mapping with ``_target_``, as a bundle's JSON holds it.

    Raises:
        UsageError: no such network, or one for images of one size where the size varies.
    """
    given = dict({"_target_": definition} if isinstance(definition, str) else definition or DEFAULT)
    if (name := str(given.get("_target_")).lower()) in NAMED:
        preset = {**NAMED[name], **(NAMED_3D.get(name, {}) if spatial_dims == 3 else {})}
        given = {**preset, **given, "_target_": preset["_target_"]}
    takes = inspect.signature(_class(given.get("_target_"))).parameters
    ours: dict[str, Any] = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
    if SIZE in takes:
        if size is None:
            hint = "train it on a cohort (deepgmm train), or name another"
            raise UsageError(f"--network {given['_target_']}: it is made for images of one size; {hint}")
        ours[SIZE] = list(size)
    if spatial_dims == 3:
        given = {**IN_3D.get(given["_target_"], {}), **given}
    return {**given, **{name: value for name, value in ours.items() if name in takes}}


def _class(target: object) -> type[nn.Module]:
    found = pydoc.locate(target) if isinstance(target, str) else None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        known = ", ".join(NAMED)
        raise UsageError(f"--network: {target!r} is no network; name one of {known}, or a class such as monai.….UNet")
    return found


def build(
    definition: str | Mapping[str, Any] | None,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    size: Sequence[int] | None = None,
) -> nn.Module:
    """A network as ``complete`` describes it, its weights drawn from the global generator.

    Raises:
        UsageError: no such network, or arguments that it does not take.
    """
    given = complete(
        definition, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, size=size
    )
    return _made(given.pop("_target_"), given)


def _made(target: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return _class(target)(**arguments)
    except ImportError as error:  # MONAI imports what only some of its networks need when they are made
        missing = re.search(r"No module named '(\w+)", str(error))
        name = missing[1] if missing else str(error).partition("\n")[0]
        raise UsageError(f"--network {target}: needs a package that is not installed: pip install {name}") from error
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        raise UsageError(f"--network {target}: {error}") from error


def seeded(target: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """A network for a bundle's JSON: its class's full name, all its arguments, and the seed of its weights.

    Raises:
        UsageError: as ``build``.
    """
    return fresh(lambda: _made(target, arguments), seed)


def fresh(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose weights are drawn from a seed, and from no generator that other threads draw from too."""
    with _Drawing(torch.Generator().manual_seed(seed)):
        return make()


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets every draw in this thread come from one generator, though layers do not take one.

    Args:
        generator: on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, with the generator where it takes one."""
        given = dict(kwargs or {})
        if any(argument.name == "generator" for argument in func._schema.arguments):
            given["generator"] = self.generator
        return func(*args, **given)


def logits(network: nn.Module, image: Tensor) -> Tensor:
    """What the network says ``(B, K, *S)``; of a deeply supervised one, the finest."""
    return finest(network(image))


def inferer(window: Sequence[int] | None = None) -> Inferer:
    """How an image goes through a network: at once, or window by window, in the memory that one window needs.

    Args:
        window: its size along each axis of ``*S``; None: the whole image.
    """
    if window is None:
        return SimpleInferer()
    return SlidingWindowInferer(tuple(window), sw_batch_size=1, overlap=OVERLAP, mode="gaussian")


def finest(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The first of what a deeply supervised network gives, and what any other gives itself."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
