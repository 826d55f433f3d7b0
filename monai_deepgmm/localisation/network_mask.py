"""A mask by another model: its bundle's transforms, network and inferer on one sequence, and the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.localisation import probable_mask, segmentation_bundle
from monai_deepgmm.localisation.probable_mask import Found
from monai_deepgmm.patients.study import MaskModel

if TYPE_CHECKING:
    from torch import Tensor, nn

#: What messages suggest.
REMEDY = "Use another bundle, or draw the mask and give it as a file"


class _Parts(NamedTuple):
    network: nn.Module
    transform: Callable[[dict[str, Any]], dict[str, Any]]
    inferer: Callable[..., Any]
    invert: Callable[[dict[str, Any]], dict[str, Any]]
    sigmoid: bool


def find(model: MaskModel, image: NDArray[np.floating[Any]], affine: NDArray[np.float64], axis: int) -> Found:
    """The chosen labels of a bundle's network.

    Args:
        model: the bundle.
        image: ``(X, Y, Z)``, its sequence.
        affine: voxel index → mm (RAS).
        axis: along which slices are stacked; a bundle finds them along the last.

    Raises:
        StudyError: ``E_MODEL``, the bundle cannot be run on this image.
    """
    order = [*(i for i in range(3) if i != axis), axis]
    turned = affine.copy()
    turned[:, :3] = affine[:, order]
    try:
        chosen = _chosen(_loaded(model), model, np.nan_to_num(image.transpose(order), posinf=0, neginf=0), turned)
    except Exception as error:  # whatever a bundle's network, weights or transforms raise
        from monai_deepgmm.networks.weights import reason

        told = f"the bundle {model.folder.name} cannot be run ({reason(error)})"
        raise StudyError("E_MODEL", told, REMEDY) from error
    back = np.argsort(order)
    return probable_mask.found(chosen[0].transpose(back), chosen[1].transpose(back))


def _chosen(
    parts: _Parts, model: MaskModel, image: NDArray[np.floating[Any]], affine: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Where the chosen labels are, and how probable ``(X, Y, Z)`` each."""
    import torch
    from monai.data import MetaTensor

    given = MetaTensor(torch.from_numpy(np.ascontiguousarray(image, np.float32))[None], affine=torch.from_numpy(affine))
    data = parts.transform({"image": given})
    with torch.no_grad():
        logits = parts.inferer(data["image"][None].as_tensor(), parts.network)[0]
    sure = logits.sigmoid() if parts.sigmoid else logits.softmax(0)
    back = parts.invert({**data, "pred": MetaTensor(sure, meta=data["image"].meta)})["pred"]
    found: NDArray[np.float32] = np.asarray(back.as_tensor() if isinstance(back, MetaTensor) else back)
    if found.shape[1:] != image.shape:
        raise ValueError(f"its output has the shape {found.shape[1:]}, the image {image.shape}")
    # Labels that may overlap count from 1, each with its channel; others from 0, the background's.
    channels = [label - 1 if parts.sigmoid else label for label in model.labels]
    if max(channels) >= len(found):
        raise ValueError(f"it has {len(found)} labels, --mask-labels asks for {max(model.labels)}")
    if parts.sigmoid:
        probability = found[channels].max(0)
        return probability > 0.5, probability
    return np.isin(found.argmax(0), channels), found[channels].sum(0)


@functools.lru_cache(maxsize=1)
def _loaded(model: MaskModel) -> _Parts:
    """The bundle, ready to run; kept for the next patient."""
    from monai import inferers, transforms

    from monai_deepgmm.networks import weights

    content = segmentation_bundle.read(model.folder)
    said = segmentation_bundle.definition(content)
    if model.trusted:
        network, steps, inferer = _trusted(content, model)
    else:
        network = _network(said.network)
        steps = [_made(transforms, step) for step in said.transforms]
        inferer = None if said.inferer is None else _made(inferers, said.inferer)
    state = weights.read(model.folder / segmentation_bundle.WEIGHTS)
    for key in ("model", "state_dict", "network"):  # as trainers wrap it
        state = state[key] if isinstance(state.get(key), dict) else state
    network.load_state_dict(state)
    transform = transforms.Compose(steps)
    back = {"transform": transform, "orig_keys": "image", "nearest_interp": False, "to_tensor": True}
    placed = any(isinstance(step, transforms.InvertibleTransform) for step in steps)
    invert = transforms.Invertd(keys="pred", **back) if placed else transforms.Identityd(keys="pred")
    flat = said.network.get("spatial_dims") == 2
    through = inferer or (_by_slice if flat else inferers.SimpleInferer())
    return _Parts(network.eval(), transform, through, invert, said.sigmoid)


def _network(said: Any) -> nn.Module:
    from monai.networks import nets

    given = dict(said)
    name = str(given.pop("_target_")).rpartition(".")[2]
    made: nn.Module = getattr(nets, name)(**given)
    return made


def _made(module: Any, said: Any) -> Any:
    """A transform or an inferer of plain arguments."""
    given = {key: value for key, value in dict(said).items() if key not in ("_target_", "keys", "_mode_")}
    keys = {"keys": "image"} if "keys" in said else {}
    name = str(said["_target_"]).rpartition(".")[2]
    return getattr(module, name)(**keys, **given)


def _trusted(content: dict[str, Any], model: MaskModel) -> tuple[nn.Module, list[Any], Any]:
    """The same parts of a bundle whose code is run."""
    from monai.bundle import ConfigParser

    parser = ConfigParser({**content, "bundle_root": str(model.folder), "device": "cpu"})
    network: nn.Module = parser.get_parsed_content("network_def")
    steps = list(parser.get_parsed_content("preprocessing").transforms) if "preprocessing" in content else []
    kept = [step for step in steps if type(step).__name__ not in segmentation_bundle.LOADING]
    return network, kept, parser.get_parsed_content("inferer") if "inferer" in content else None


def _by_slice(image: Tensor, network: nn.Module) -> Tensor:
    """Slice by slice along the last axis ``(1, C, X, Y, Z)``, each at once."""
    import torch

    return torch.stack([network(image[..., z]) for z in range(image.shape[-1])], -1)
