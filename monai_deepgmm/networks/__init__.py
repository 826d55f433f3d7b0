"""Networks that take the place of the E-step, and the losses that fit them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: What configurations name as ``monai_deepgmm.networks.…``, and the room it lives in; imported when it is asked for.
_EXPORTS = {"UNet": "unet", "FoldedUNet": "folded_unet", "ModifiedUNet": "modified_unet"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
