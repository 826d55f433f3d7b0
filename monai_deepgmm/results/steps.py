"""What happens to a patient where a bundle's configuration says it, and how two such ways are told apart."""

from __future__ import annotations

import hashlib
import io
import pickle
import secrets
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_deepgmm.methods.config import Config
from monai_deepgmm.results.segment import Inferer, Solver

if TYPE_CHECKING:
    from monai.transforms import Compose


class Steps(NamedTuple):
    """What happens to a patient where it is not what the configuration says; a part that is None is.

    Attributes:
        preprocessing: from files to images.
        inferer: fits the mixture.
    """

    preprocessing: Compose | None = None
    inferer: Inferer | None = None

    @classmethod
    def unless_default(cls, preprocessing: Compose, inferer: Inferer, config: Config) -> Steps | None:
        """Those of a bundle's configuration; None where they are the configuration's own anyway."""
        own = config.preprocessing.transforms(config.protocol)
        steps = cls(
            None if _digest(_transforms(preprocessing)) == _digest(_transforms(own)) else preprocessing,
            None if isinstance(inferer, Solver) and inferer.config == config else inferer,
        )
        return steps if any(steps) else None

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: what the parts are called, and a hash that changes with any of them."""
        transforms = [] if self.preprocessing is None else _transforms(self.preprocessing)
        return {
            "preprocessing": [_name(step) for step in transforms] or None,
            "inferer": None if self.inferer is None else _name(self.inferer),
            "sha256": _digest([transforms, self.inferer]),
        }

    def can_be_sent(self) -> bool:
        """Whether another process can be given them, which functions without a name of their own cannot."""
        try:
            pickle.dumps(self)
        except Exception:  # of many kinds, whatever the user's own objects raise
            return False
        return True


def _transforms(preprocessing: Compose) -> list[Any]:
    """One by one; Compose itself bears random numbers that nobody draws."""
    return list(preprocessing.flatten().transforms)


def _name(step: object) -> str:
    kind = step if isinstance(step, FunctionType) else type(step)
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(content: object) -> str:
    """A hash of objects by what they hold; of what cannot be compared, another one each time."""
    stream = io.BytesIO()
    try:
        _Told(stream).dump(content)
    except Exception:  # as above
        return secrets.token_hex(32)
    return hashlib.sha256(stream.getvalue()).hexdigest()


class _Told(pickle.Pickler):
    """Pickles what is to be compared: functions by their code, tensors by their values, generators by their kind."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.fast = True  # equal objects are then written alike, whether or not they are one

    def reducer_override(self, value: object) -> Any:
        """Functions and code, which pickle knows by name or not at all, and tensors, which it knows by address."""
        if isinstance(value, FunctionType):
            inside = [cell.cell_contents for cell in value.__closure__ or ()]
            return tuple, ((value.__code__, value.__defaults__, value.__kwdefaults__, inside),)
        if isinstance(value, CodeType):
            return tuple, ((value.co_name, value.co_code, value.co_consts, value.co_names),)
        if isinstance(value, Tensor):
            held = value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
            return tuple, ((str(value.dtype), tuple(value.shape), held),)
        if isinstance(value, np.random.RandomState | np.random.Generator):
            return type, (None,)
        return NotImplemented
